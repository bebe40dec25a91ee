"""Where responses can end: which states of an automaton are reached by whole responses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rl_ebm.tokens import TokenSpace

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
_MOST_WORK = 2 * 10**8
_DENSE = 2**26


def endings(next_: Ints, space: TokenSpace) -> Mask | None:
    """States in which a response may end, its EOS not read; None where that takes too long.

    Args:
        next_: transitions from state 0 on, (K, A); that of EOS is not followed.
    """
    source, target = _pairs(next_, space.eos_id)
    here = np.zeros(len(next_), dtype=np.bool_)
    here[0] = True
    seen = {here.tobytes(): 0}
    history = [here]
    ever = here.copy()
    last = space.max_length - (space.eos_id is not None)
    for t in range(1, last + 1):
        if t * len(source) > _MOST_WORK:
            return None
        following = np.zeros_like(here)
        following[target[here[source]]] = True
        here = following
        if space.eos_id is not None and not (here & ~ever).any():
            break
        ever |= here
        key = here.tobytes()
        if key in seen and space.eos_id is None:
            # The same states come round again and again.
            begin = seen[key]
            return history[begin + (last - begin) % (t - begin)]
        seen[key] = t
        history.append(here)
    return here if space.eos_id is None else ever


def shortest(next_: Ints, accepting: Mask) -> int | None:
    """The least number of tokens that lead from state 0 to an accepting state."""
    source, target = _pairs(next_, None)
    here = np.zeros(len(next_), dtype=np.bool_)
    here[0] = True
    for t in range(len(next_)):
        if bool((here & accepting).any()):
            return t
        following = here.copy()
        following[target[here[source]]] = True
        if (following == here).all():
            return None
        here = following
    return None


def _pairs(next_: Ints, eos_id: int | None) -> tuple[Ints, Ints]:
    """From where to where some token leads, each pair once."""
    k, a = next_.shape
    columns = np.arange(a) != eos_id
    if k * k <= _DENSE:
        there = np.zeros((k, k), dtype=np.bool_)
        there[np.arange(k)[:, None], next_[:, columns]] = True
        source, target = there.nonzero()
        return source, target
    rows = [np.unique(row[columns]) for row in next_]
    return np.repeat(np.arange(k), [len(row) for row in rows]), np.concatenate(rows)
