"""What every reward can do, and how a user's object becomes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor

from rl_ebm.tokens import TokenSpace

Prompts = Sequence[Sequence[int]]


@runtime_checkable
class Reward(Protocol):
    """R(x, y) for a space; ``forbids`` says whether some R is known to be ``-inf``."""

    forbids: bool

    def __call__(self, tokens: Tensor, lengths: Tensor, prompt_ids: Tensor) -> Tensor: ...

    def bind(self, space: TokenSpace, prompts: Prompts | None) -> Reward:
        """Check that the reward fits, before any work; return the reward to use."""
        ...

    def to(self, device: torch.device | str) -> Reward: ...


def as_reward(
    reward: Tensor | Callable[..., Any] | Reward, space: TokenSpace, prompts: Prompts | None
) -> Reward:
    """A reward from a tensor (one score for each sequence), a function, or a reward.

    Raises:
        TypeError: none of these.
        ValueError: a table of another size, or with a score that no EBM has.
    """
    from rl_ebm.rewards.function import Function
    from rl_ebm.rewards.table import Table

    if isinstance(reward, Reward):
        return reward.bind(space, prompts)
    if isinstance(reward, Tensor):
        return Table(reward).bind(space, prompts)
    if callable(reward):
        return Function(reward).bind(space, prompts)
    raise TypeError(
        f"reward must be a tensor of scores, a callable (tokens, lengths) -> (B,), or one of "
        f"rl_ebm.rewards, got {type(reward).__name__}"
    )


def check_values(reward: Shaped[Tensor, "..."], where: str) -> None:
    """Raise unless every reward is a number below +inf (``-inf`` is legal).

    Raises:
        ValueError: NaN or +inf, with the place of the first.
    """
    wrong = torch.isnan(reward) | torch.isposinf(reward)
    if bool(wrong.any()):
        place = wrong.flatten().nonzero()[0, 0]
        value = float(reward.flatten()[place])
        raise ValueError(
            f"{where} is {value} at index {int(place)}: a reward must be a number below +inf "
            "(-inf marks an impossible response)"
        )
