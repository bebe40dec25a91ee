"""Counters: sums modulo a number, and brackets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.automata.machine import Machine, deterministic
from rl_ebm.automata.phrases import check_ids, check_score
from rl_ebm.automata.weights import check_values
from rl_ebm.automata.windows import check_size
from rl_ebm.messages.arguments import shown, whole
from rl_ebm.tokens import TokenSpace, check_space


def modular(
    space: TokenSpace,
    scores: Float[Tensor, "m"] | Sequence[float],
    values: Int64[Tensor, "A"] | Sequence[int] | None = None,
) -> Machine:
    """States are the sum so far."""
    check_space(space)
    final = _numbers(scores, "scores").double().detach().cpu()
    if final.ndim != 1 or not len(final):
        raise ValueError(f"scores has shape {tuple(final.shape)}, expected (m,), one for each rest")
    check_values(final, "scores")
    values = torch.arange(space.vocab_size) if values is None else _numbers(values, "values").cpu()
    if values.shape != (space.vocab_size,) or values.is_floating_point() or values.is_complex():
        raise ValueError(f"values must be {space.vocab_size} integers, one for each token")
    if space.eos_id is not None:
        values = values.index_fill(0, torch.tensor([space.eos_id]), 0)
    check_size(len(final), space.vocab_size, "a sum modulo a number", "use fewer rests")
    # Reduced first: large values overflow.
    next_ = (torch.arange(len(final))[:, None] + values.long() % len(final)) % len(final)
    return deterministic(next_, torch.zeros(next_.shape), final)


def _numbers(given: object, name: str) -> Tensor:
    """A tensor of what may be a list."""
    try:
        found = torch.as_tensor(given)
        if found.layout != torch.strided or found.is_meta:
            raise TypeError
        return found
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name} must be a list of numbers, got {shown(given)}") from None


def brackets(
    space: TokenSpace, opening: int, closing: int, depth: int, score: float | int
) -> Machine:
    """States are the depth, and one for what cannot be balanced any more."""
    check_ids(space, [opening], "opening")
    check_ids(space, [closing], "closing")
    check_score(score)
    if opening == closing or space.eos_id in (opening, closing):
        raise ValueError(
            f"opening and closing must be two tokens other than EOS, got {opening} and {closing}"
        )
    # Deeper than the response is long no bracket goes.
    depth = min(whole("depth", depth, 1), space.max_length)
    check_size(depth + 2, space.vocab_size, "brackets of this depth", "give a smaller depth")
    lost = depth + 1
    levels = torch.arange(depth + 2)
    next_ = levels[:, None].repeat(1, space.vocab_size)
    next_[:, opening] = levels + 1  # beyond the last level: lost
    next_[:, closing] = levels - 1
    next_[0, closing] = next_[lost] = lost
    _check_balance(space, opening, closing)
    final = torch.zeros(depth + 2, dtype=torch.float64)
    final[0] = float(score)
    return deterministic(next_, torch.zeros(next_.shape), final)


def _check_balance(space: TokenSpace, opening: int, closing: int) -> None:
    """Raise ValueError where no response can be balanced: brackets alone, an odd number of them."""
    if space.eos_id is None and space.vocab_size == 2 and space.max_length % 2:
        raise ValueError(
            f"no response can be balanced: it has {space.max_length} tokens, and {opening} and "
            f"{closing} are all that there are"
        )
