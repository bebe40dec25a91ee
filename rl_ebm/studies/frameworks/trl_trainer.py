"""Stand-ins for what a trainer of TRL has around its loss: its code runs, its models do not."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
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


def forget(trainer: Any) -> None:
    """Keep nothing of what earlier calls logged."""
    for kept in trainer._metrics.values():
        kept.clear()


def feed(trainer: Any, log_pi: Float[Tensor, "B T"]) -> None:
    """What the trainer would have computed with its model, and nothing kept of earlier calls."""
    forget(trainer)
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


@dataclasses.dataclass(frozen=True)
class Both:
    """Both responses of each pair, the chosen ones first, behind a prompt of one token.

    Attributes:
        log_pi: of each token, (2B, T), and
        log_ref: of each response, (2B,).
        lengths: tokens of each, (2B,).
        mask: where they are, (2B, T).
    """

    log_pi: Float[Tensor, "R T"]
    log_ref: Float[Tensor, "R"]
    lengths: Int64[Tensor, "R"]
    mask: Bool[Tensor, "R T"]

    @property
    def batch(self) -> dict[str, Tensor]:
        """What a collator makes of them."""
        prompt = torch.ones(len(self.mask), 1, dtype=torch.bool)
        read = torch.cat([prompt, self.mask], 1).long()
        return {
            "input_ids": torch.zeros_like(read),
            "attention_mask": read,
            "completion_mask": torch.cat([~prompt, self.mask], 1).long(),
        }


def pair_loss(
    call: Callable[[Both], Tensor], longest: int, rough: bool = False
) -> Callable[..., Tensor]:
    """What a trainer makes of pairs, as a function of the contract.

    Args:
        call: the trainer's own loss.
        longest: tokens of the longest response.
        rough: whether it is given float32.
    """

    def loss(
        chosen: Tensor,
        rejected: Tensor,
        chosen_ref: Tensor,
        rejected_ref: Tensor,
        chosen_length: Tensor,
        rejected_length: Tensor,
    ) -> Tensor:
        log_pi, log_ref = torch.cat([chosen, rejected]), torch.cat([chosen_ref, rejected_ref])
        if rough:
            log_pi, log_ref = log_pi.float(), log_ref.float()
        lengths = torch.cat([chosen_length, rejected_length])
        tokens, mask = spread(log_pi, lengths, longest)
        found = call(Both(tokens, log_ref, lengths, mask))
        assert isinstance(found, Tensor)
        return found

    return loss


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
