r"""The soft backup of a whole tree, from the scores of its leaves up, in one chunked pass.

Level by level, a soft backup reads and writes every level and calls exp and log on each. Where
the log-weights of a chunk of leaves can be exponentiated as they are, or less the largest of
them, one exp for each leaf is enough: its sums over ever larger subtrees are the values of all
the states above, up to one log each. Where they lie too far apart for that (it would underflow
the smaller ones, and the states above them), the chunk is backed up by logsumexp, level by level.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.soft_bellman import soft_value

_CHUNK = 2**20
PLAIN = {torch.float32: 16.0, torch.float64: 600.0}
"""|R / beta| up to which it is exponentiated as it is, and V kept in the dtype of the scores.

For float32 what 24 bits leave of it: 16 is known to 1e-6. For float64 the range of the exponent:
exp(+-600) times 2**20 leaves is a normal number.
"""


def join(
    paid: Float[Tensor, "*n A"], w: Float[Tensor, "*n A"], beta: float
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n A"]]:
    """Values paid / beta + w of the actions of a state, less the paid / beta of the best of them.

    Next to a large R / beta a sum has few digits left; the differences of rewards, which are
    taken here before they are divided by beta, have all of theirs.

    Args:
        paid: R of a likely response behind each action, reward units.
        w: what else its value is made of, nats; ``-inf`` where nothing is possible.

    Returns:
        what is taken off, in reward units, and what is left.
    """
    best = (paid / beta + w).argmax(-1, keepdim=True)
    base = paid.gather(-1, best)
    return base[..., 0], (paid - base) / beta + w


def backup_leaves(
    scores: Float[Tensor, "N"],
    beta: float,
    branching: int,
    v: list[Tensor],
    paid: list[Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Fill the values of all states of a fixed-length tree without reference.

    Args:
        scores: R of every sequence in enumeration order, N = branching**T.
        beta: temperature; the log-weight of a leaf is R / beta.
        branching: children of a state.
        v: written: entry t gets V of the prefixes of depth t, in its own dtype.
        paid: written: R of a likely response below each prefix, by depth, in the dtype of the
            scores; V is then without this R / beta. None where V is whole.

    Returns:
        log of the sum of exp(R / beta), float64.
    """
    depth = len(v)  # of the leaves
    height = 1
    while height < depth and branching ** (height + 1) <= _CHUNK:
        height += 1
    roots = depth - height
    # Several subtrees in a chunk, where one is much smaller than a chunk.
    chunk = branching**height * max(1, _CHUNK // branching**height)
    safe = PLAIN[v[0].dtype]
    buffer = torch.empty(min(chunk, len(scores)), dtype=v[0].dtype, device=scores.device)
    for first in range(0, len(scores), chunk):
        leaves = scores[first : first + chunk]
        part = [
            slice(first // width, (first + len(leaves)) // width)
            for width in (branching ** (depth - t) for t in range(roots, depth))
        ]
        levels = [v[t][rows] for t, rows in enumerate(part, start=roots)]
        bases = paid and [paid[t][rows] for t, rows in enumerate(part, start=roots)]
        low, high = finite_range(leaves)
        base = high if bases and high > -torch.inf else 0.0
        # A beta that is next to nothing in float32 is left to the other way.
        far = max(abs(low - base), abs(high - base)) / beta if high > -torch.inf else 0.0
        if far <= safe and 1e-30 < beta < 1e30:
            _sum_up(leaves, beta, base, branching, levels, buffer[: len(leaves)])
            for level in bases or []:
                level.fill_(base)
        else:
            _logsumexp_up(leaves, beta, branching, levels, bases)
    value = v[roots].double()
    best = None if paid is None else paid[roots].double()
    for t in reversed(range(roots)):
        if paid is not None and best is not None:
            best, value = join(best.view(-1, branching), value.view(-1, branching), beta)
            paid[t].copy_(best)
        value = soft_value(value.view(-1, branching))
        v[t].copy_(value)
    return value[0] if best is None else value[0] + best[0] / beta


def finite_range(x: Tensor) -> tuple[float, float]:
    """Smallest and largest of the entries above ``-inf``, where there is one."""
    low, high = (float(end) for end in torch.aminmax(x))
    if low == -torch.inf and high > -torch.inf:
        low = float(x.masked_fill(torch.isneginf(x), high).min())
    return low, high


def _sum_up(
    leaves: Tensor,
    beta: float,
    base: float,
    branching: int,
    levels: list[Tensor],
    buffer: Tensor,
) -> None:
    if base or leaves.dtype != buffer.dtype:
        weight = buffer.copy_(leaves).sub_(base).div_(beta)
    else:
        weight = leaves if beta == 1 else torch.div(leaves, beta, out=buffer)
    total = torch.exp(weight, out=buffer)
    for v in reversed(levels):
        total = _row_sums(total.view(-1, branching))
        torch.log(total, out=v)  # log 0 = -inf: all leaves below are impossible


def _row_sums(x: Tensor) -> Tensor:
    if x.shape[1] > 8:
        return x.sum(1)
    # torch reduces short rows one by one; adding columns is several times faster.
    total = x[:, 0] + x[:, 1]
    for column in x.unbind(1)[2:]:
        total += column
    return total


def _logsumexp_up(
    leaves: Tensor,
    beta: float,
    branching: int,
    levels: list[Tensor],
    bases: list[Tensor] | None = None,
) -> None:
    value = leaves.double() / beta
    best: Tensor | None = None
    if bases is not None:
        best, value = split(leaves.double())
    for i, v in reversed(list(enumerate(levels))):
        if bases is not None and best is not None:
            best, value = join(best.view(-1, branching), value.view(-1, branching), beta)
            bases[i].copy_(best)
        value = soft_value(value.view(-1, branching))
        v.copy_(value)


def split(reward: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """Rewards as what :func:`join` takes: what is paid, and -inf nats where R is ``-inf``."""
    forbidden = torch.isneginf(reward)
    zero = torch.zeros_like(reward)
    return reward.masked_fill(forbidden, 0.0), zero.masked_fill(forbidden, -torch.inf)
