"""Stand-ins for what a trainer of TRL has around its loss: its code runs, its models do not."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class Accelerator:
    """One process on the CPU: everything gathered is what is here."""

    num_processes = 1
    process_index = 0
    device = torch.device("cpu")
    sync_gradients = True

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Tensor, reduction: str = "sum") -> Tensor:
        return x


def defaults(config: type[Any]) -> SimpleNamespace:
    """The shipped defaults of a configuration, by name; none of its checks, devices or folders."""
    found = {}
    for f in dataclasses.fields(config):
        if f.default is not dataclasses.MISSING:
            found[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            found[f.name] = f.default_factory()
    return SimpleNamespace(**found)


def stand_in(trainer: type[Any], config: type[Any], options: dict[str, Any], **members: Any) -> Any:
    """A trainer that was never set up: its methods, its configuration, and these members."""
    args = defaults(config)
    vars(args).update(options)
    args.steps_per_generation = args.gradient_accumulation_steps = 1
    found: Any = object.__new__(trainer)
    vars(found).update(
        vars(args),
        args=args,
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        **members,
    )
    return found


def feed(trainer: Any, log_pi: Float[Tensor, "B T"]) -> None:
    """What the trainer would have computed with its model, and nothing kept of earlier calls."""
    for kept in trainer._metrics.values():
        kept.clear()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        log_pi, torch.zeros_like(log_pi), None,
    )  # fmt: skip


def shipped(config: type[Any], options: dict[str, Any]) -> bool:
    """Whether a configuration has these options by default, its beta apart."""
    given = vars(defaults(config))
    return all(name == "beta" or given[name] == value for name, value in options.items())
