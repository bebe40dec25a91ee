"""Stand-ins for what a trainer of TRL has around its loss: its code runs, its models do not."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl_ebm.tokens import length_mask


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


def spread(
    whole: Float[Tensor, "B"], lengths: Int64[Tensor, "B"], longest: int
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Log-probabilities of whole responses over as many tokens as each has, and where they are.

    Args:
        longest: tokens of the longest response, T.
    """
    mask = length_mask(lengths, longest)
    return (whole / lengths)[:, None].expand(mask.shape).masked_fill(~mask, 0.0), mask


class TokenZero:
    """A language model whose token 0 has the given log-probabilities, behind a prompt of one."""

    training = True

    def __init__(self, log_pi: Float[Tensor, "B T"]) -> None:
        self.log_pi = log_pi

    def train(self) -> None:
        """It has no other mode."""

    def __call__(self, *_: Any, **__: Any) -> SimpleNamespace:
        """What the fused head returns, and the logits of two tokens, (B, T + 1, 2).

        The other token's are the rest to 1, so that the log-softmax of the first is what was given,
        with a derivative of 1; that of a token that is sure is the least below 0.
        """
        given = self.log_pi
        end = given.new_zeros(len(given), 1, 2)
        less = given - torch.finfo(given.dtype).tiny
        other = torch.log(-torch.expm1(less))
        return SimpleNamespace(
            log_probs=given,
            entropy=torch.zeros_like(given),
            mean_logits=torch.zeros_like(given),
            is_top1=torch.zeros_like(given, dtype=torch.bool),
            logits=torch.cat([torch.stack([less, other], -1), end], 1),
        )


def shipped(config: type[Any], options: dict[str, Any]) -> bool:
    """Whether a configuration has these options by default, its beta apart."""
    given = vars(defaults(config))
    return all(name == "beta" or given[name] == value for name, value in options.items())
