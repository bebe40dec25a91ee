"""The policy of a run: made from what its configuration says, or passed in."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rl_ebm.ebm import EBM
from rl_ebm.files import CONFIG, RunError
from rl_ebm.messages.arguments import shown
from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.policies import MLPConfig, Trainable
from rl_ebm.policies.base import device_of
from rl_ebm.training import kinds

OWN = {"kind": kinds.GIVEN["policy"]}
"""what stands in a configuration for a policy that was passed in"""


def make_policy(config: dict[str, Any], ebm: EBM, seed: int, values: bool) -> Any:
    """An untrained policy: ``config`` has the kind, and what makes it (a Transformer's sizes).

    Args:
        seed: of the initial weights.
        values: whether its raw logits are to be q.
    """
    # Explicit seeding that leaves the caller's global generator alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if "data" in config:
            policy = kinds.rebuild("policy", config, {}, ebm.space, ebm.prompts)
        else:
            policy = _by_name(config, ebm)
    policy = policy.to(ebm.device)
    policy.logits_are_values = values
    return policy


def _by_name(config: dict[str, Any], ebm: EBM) -> Any:
    """A policy of a kind without its parts, which the library's own have beside their names.

    Raises:
        ValueError: there is no such kind, or it needs parts, or makes something else.
    """
    name = config["kind"]
    if name not in kinds.KINDS["policy"]:
        *others, last = map(repr, kinds.KINDS["policy"])
        raise ValueError(f"policy must be {', '.join(others)} or {last}, got {name!r}")
    kind = kinds.KINDS["policy"][name]
    if not kind.registered:
        return kinds.rebuild("policy", config, {}, ebm.space, ebm.prompts)
    try:
        policy = kind.rebuild({}, ebm.space, ebm.prompts)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"a policy of the kind {name!r} is not made without its parts ({error!r}): make it, "
            "and pass it with policy="
        ) from error
    if type(policy) is not kind.of:  # a folder would not say what it is
        raise ValueError(
            f"the kind {name!r} is of {kind.of.__name__}, and made a {type(policy).__name__}"
        )
    return policy


def network_config(network: object, apart: bool) -> dict[str, Any]:
    """What a configuration says of a new policy: its kind, and its sizes.

    Args:
        apart: whether V is to have weights of its own, where it can.

    Raises:
        TypeError: neither sizes nor a name.
    """
    head = {kinds.HEAD: True} if apart else {}
    if isinstance(network, MLPConfig):
        return kinds.said_of("mlp", asdict(network) | head)
    if not isinstance(network, (str, TransformerConfig)):
        raise TypeError(
            "network must be a TransformerConfig, an MLPConfig, or a name ('transformer', "
            f"'tabular', 'mlp', or that of a registered kind), got {shown(network)}"
        )
    if network == "transformer":
        network = TransformerConfig()
    if isinstance(network, TransformerConfig):
        return {"kind": "transformer"} | asdict(network) | head
    return (
        kinds.said_of("mlp", asdict(MLPConfig()) | head) if network == "mlp" else {"kind": network}
    )


def policy_config(policy: object) -> dict[str, Any]:
    """What a configuration says of a policy that was passed in: its kind, if one is registered."""
    kind = kinds.kind_of("policy", policy)
    if kind is None or not kind.registered:
        return dict(OWN)
    return dict(kinds.describe("policy", policy)[0])


def with_parts(said: dict[str, Any], policy: object) -> dict[str, Any]:
    """What a configuration says of a policy that was made, by the name of a kind say."""
    kind = kinds.find("policy", said)
    return policy_config(policy) if kind is not None and kind.registered else said


def own_policy(policy: torch.nn.Module, ebm: EBM, values: bool) -> Trainable:
    """A policy that was passed in, checked and told whether its logits are to be q.

    Raises:
        ValueError: no module with logits, or one on another device than the EBM's.
    """
    if not isinstance(policy, Trainable):
        raise ValueError(
            "policy must be a torch.nn.Module with logits(tokens, prompt_ids=None), got "
            f"{type(policy).__name__}"
        )
    if device_of(policy).type != ebm.device.type:
        raise ValueError(
            f"the policy is on {device_of(policy)} and the EBM on {ebm.device}: move one of them"
        )
    own: Any = policy
    own.logits_are_values = values
    return policy


def check_asked(config: dict[str, Any], policy: object, run: Path, call: str) -> None:
    """Check that a policy is passed again exactly where the run trained one that was passed in.

    Args:
        call: the function that takes it, for the message.

    Raises:
        RunError: it is missing, or not wanted.
    """
    own = config["policy"] == OWN
    if own and policy is None:
        raise RunError(
            f"{run} trained a policy of your own: pass one made alike, {call}(run, policy=...)"
        )
    if not own and policy is not None:
        raise RunError(f"{run} makes its policy from its {CONFIG}: leave policy out")
