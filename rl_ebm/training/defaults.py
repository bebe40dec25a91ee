"""Default options by kind of policy: rates of toys would ruin what was trained before."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from typing import Any

from torch import nn

from rl_ebm.agents import entry_of
from rl_ebm.policies import Tabular, Transformer

PRETRAINED = 1_000_000
"""weights from which on a network of others is taken for one that was trained before"""
BATCH_SIZE = 64
RATE, ADAPTER_RATE = 1e-5, 1e-4
"""of Adam: for all weights of a pretrained model, and for those of an adapter"""


def options_of(agent: str, options: Any, policy: nn.Module | None) -> Any:
    """An agent's options: those given, else the defaults for the policy, which are told then.

    Raises:
        ValueError: options of another agent.
    """
    kind = entry_of(agent).config
    if options is None:
        options, chosen = default_options(kind, policy)
        if chosen:
            values = ", ".join(f"{name}={getattr(options, name)}" for name in chosen)
            print(
                f"{agent} for a pretrained policy: {values} (options= chooses others)",
                file=sys.stderr,
            )
    if not isinstance(options, kind):
        raise ValueError(
            f"options for {agent} must be a {kind.__name__}, got {type(options).__name__}"
        )
    return options


def default_options(kind: type[Any], policy: nn.Module | None) -> tuple[Any, list[str]]:
    """An agent's options where none are given, and the names of those made for the policy.

    The library's own policies, and small ones of others, start at random: the agent's defaults,
    tuned on those. A Hugging Face model, and any other with a million weights, was trained
    before: a smaller rate, and a batch that fits.

    Args:
        kind: the agent's class of options.
        policy: one that is passed in; None for a new one of the library's.
    """
    options = kind()
    if policy is None or not is_pretrained(policy):
        return options, []
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    whole = trained > 0.1 * sum(p.numel() for p in policy.parameters())
    wanted = {"lr": RATE if whole else ADAPTER_RATE, "batch_size": BATCH_SIZE}
    known = {field.name for field in fields(kind)}
    changes = {name: value for name, value in wanted.items() if name in known}
    return replace(options, **changes), list(changes)


def is_pretrained(policy: nn.Module) -> bool:
    """Whether a policy that is passed in is taken for a model that was trained before."""
    if isinstance(policy, (Tabular, Transformer)):
        return False
    if type(policy).__module__.startswith("rl_ebm.policies.hf."):
        return True
    return sum(p.numel() for p in policy.parameters()) >= PRETRAINED
