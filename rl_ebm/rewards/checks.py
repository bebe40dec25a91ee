"""Whether a reward is one, and whether what it has besides its calls agrees with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rl_ebm.automata.weights import check_values
from rl_ebm.messages.arguments import as_device, whole
from rl_ebm.rewards import base
from rl_ebm.rewards.automaton import Automaton
from rl_ebm.rewards.convert import as_reward
from rl_ebm.tokens import TokenSpace, check_space
from rl_ebm.tokens.prompts import GivenPrompts, check_prompts

ROWS = 64
"""responses that are tried"""
_ROUNDING = (1e-5, 20)
"""relative difference of two ways that is rounding still: a number, or so many steps of the
precision"""


def check(
    reward: Tensor | Callable[..., Any] | base.Reward,
    space: TokenSpace,
    prompts: GivenPrompts | None = None,
    rows: int = ROWS,
    device: torch.device | str = "cpu",
) -> None:
    """Try a reward on some responses, and hold all that it has to its calls.

    What a reward is, and what its members must equal, stands in
    :class:`rl_ebm.rewards.base.FullReward`. An EBM does not try its reward: a call may cost much.

    Args:
        reward: as an EBM takes it.
        rows: responses, of all prompts together.
        device: where the reward is.

    Raises:
        TypeError: no reward, or one that returns no tensor.
        ValueError: numbers of another shape, NaN or +inf; another number at a second call with
            the rows in another order; or a member that does not agree with the calls, by its name.
    """
    check_space(space)
    prompts = None if prompts is None else check_prompts(prompts)
    bound = as_reward(reward, space, prompts)
    count = 1 if prompts is None else len(prompts)
    tokens, lengths = _responses(space, whole("rows", rows, 1, 2**20))
    ids = torch.arange(len(tokens)) % count
    place = as_device(device)
    try:
        tried = tuple(x.to(place) for x in (tokens, lengths, ids))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{place} cannot be used here: {_said(error)}") from None
    want = _called(bound, tried)
    again = _called(bound, tuple(x.flip(0) for x in tried)).flip(0)
    _compare(want, again, "a second call, with the rows in another order", "it gives other numbers")
    if not bound.forbids and bool(torch.isneginf(want).any()):
        raise ValueError("the reward's forbids is False, and some response has -inf: say True")
    _check_members(bound, space, tried, want, count)


def _check_members(
    bound: base.Reward, space: TokenSpace, tried: tuple[Tensor, ...], want: Tensor, count: int
) -> None:
    tokens, lengths, ids = tried
    scores = base.scores_of(bound)
    if scores is not None:
        shape = (count, space.num_sequences)
        if tuple(scores.shape) != shape:
            raise ValueError(f"the reward's scores are {tuple(scores.shape)}, expected {shape}")
        listed = scores[ids, space.sequence_indices(tokens, lengths)]
        _compare(want, listed.cpu(), "scores", "they must be R in enumeration order")
    machine = base.machine_of(bound)
    if machine is not None:
        paid = Automaton(space, machine)(tokens, lengths, ids)
        _compare(want, paid.cpu(), "machine", "it must pay R")
    for prompt in range(count):
        least, largest = base.limits_of(bound, space, prompt)
        seen = want[ids.cpu() == prompt]
        slack = _slack(seen).masked_fill(torch.isneginf(seen), 0.0)
        if bool(((seen + slack < least) | (seen - slack > largest)).any()):
            raise ValueError(
                f"the reward's limits of prompt {prompt} are {least:g} and {largest:g}, and some "
                "response has a reward beyond them"
            )


def _responses(space: TokenSpace, rows: int) -> tuple[Tensor, Tensor]:
    """All responses where they are few, else some; token 0 past the end."""
    if space.num_sequences <= rows:
        return space.sequences()
    generator, t_max = torch.Generator().manual_seed(0), space.max_length
    tokens = space.unrank(torch.randint(space.branching, (rows, t_max), generator=generator))
    lengths = torch.full((rows,), t_max)
    if space.eos_id is not None:
        lengths = torch.randint(1, t_max + 1, (rows,), generator=generator)
        tokens[torch.arange(rows), lengths - 1] = space.eos_id
    return tokens.masked_fill(torch.arange(t_max) >= lengths[:, None], 0), lengths


def _called(bound: base.Reward, tried: tuple[Tensor, ...]) -> Tensor:
    """R of responses, on the CPU, checked."""
    try:
        with torch.no_grad():
            reward: Any = bound(*tried)
    except (RuntimeError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"the reward fails: {_said(error)}") from error
    if not isinstance(reward, Tensor):
        raise TypeError(f"the reward returned {type(reward).__name__}, expected a tensor")
    if reward.shape != tried[1].shape:
        raise ValueError(
            f"the reward returned shape {tuple(reward.shape)}, expected ({len(tried[1])},): one "
            "number for each row"
        )
    check_values(reward, "the reward's value")
    return reward.cpu()


def _said(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200].rstrip(".")


def _slack(reward: Tensor) -> Tensor:
    """What is rounding still, for each reward."""
    eps = torch.finfo(reward.dtype).eps if reward.dtype.is_floating_point else 0.0
    return max(_ROUNDING[0], _ROUNDING[1] * eps) * (1 + reward.double().abs())


def _compare(want: Tensor, got: Tensor, member: str, what: str) -> None:
    near = (want - got).abs() <= _slack(want)
    if not bool(((want == got) | near).all()):
        raise ValueError(f"the reward's {member} does not agree with its calls: {what}")
