"""How a user's object becomes a reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rl_ebm.rewards.base import Prompts, Reward
from rl_ebm.rewards.function import Function
from rl_ebm.rewards.table import Table
from rl_ebm.tokens import TokenSpace, check_space
from rl_ebm.tokens.prompts import check_prompts


def as_reward(
    reward: Tensor | Callable[..., Any] | Reward, space: TokenSpace, prompts: Prompts | None
) -> Reward:
    """A reward from a tensor (one score for each sequence), a function, or a reward.

    Raises:
        TypeError: none of these.
        ValueError: a table of another size, or with a score that no EBM has.
    """
    check_space(space)
    prompts = None if prompts is None else check_prompts(prompts)
    if isinstance(reward, Reward) and not isinstance(reward, type):
        return reward.bind(space, prompts)
    if isinstance(reward, Tensor):
        return Table(reward).bind(space, prompts)
    if callable(reward):
        return Function(reward).bind(space, prompts)
    raise TypeError(
        f"reward must be a tensor of scores, a callable (tokens, lengths) -> (B,), or one of "
        f"rl_ebm.rewards, got {type(reward).__name__}"
    )
