r"""The soft backup of a whole tree, from the scores of its leaves up, in one chunked pass.

Level by level, a soft backup reads and writes every level and calls exp and log on each. Where
the log-weights of a chunk of leaves are small enough to be exponentiated as they are, one exp
for each leaf is enough: its sums over ever larger subtrees are the values of all the states
above, up to one log each. Nothing is subtracted before (no maximum), so nothing is lost to it.
Where they are not small, the chunk is backed up by logsumexp, level by level, in float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.soft_bellman import soft_value

_CHUNK = 2**20
# exp(+-60) times 2**20 leaves stays a normal float32; exp(+-600) a normal float64.
_SAFE = {torch.float32: 60.0, torch.float64: 600.0}


def backup_leaves(
    scores: Float[Tensor, "N"], beta: float, branching: int, v: list[Tensor]
) -> Float[Tensor, ""]:
    """Fill the values of all states of a fixed-length tree without reference.

    Args:
        scores: R of every sequence in enumeration order, N = branching**T.
        beta: temperature; the log-weight of a leaf is R / beta.
        branching: children of a state.
        v: written: entry t gets V of the prefixes of depth t, in its own dtype.

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
    safe = _SAFE[scores.dtype] * beta
    buffer = torch.empty(min(chunk, len(scores)), dtype=scores.dtype, device=scores.device)
    for first in range(0, len(scores), chunk):
        leaves = scores[first : first + chunk]
        levels = [
            v[t][
                first // branching ** (depth - t) : (first + len(leaves))
                // branching ** (depth - t)
            ]
            for t in range(roots, depth)
        ]
        low, high = _finite_range(leaves)
        # A beta that is next to nothing in float32 is left to the other way.
        if -safe <= low and high <= safe and 1e-30 < beta < 1e30:
            _sum_up(leaves, beta, branching, levels, buffer[: len(leaves)])
        else:
            _logsumexp_up(leaves, beta, branching, levels)
    value = v[roots].double()
    for t in reversed(range(roots)):
        value = soft_value(value.view(-1, branching))
        v[t].copy_(value)
    return value[0]


def _finite_range(x: Tensor) -> tuple[float, float]:
    low, high = (float(end) for end in torch.aminmax(x))
    if low == -torch.inf and high > -torch.inf:
        low = float(x.masked_fill(torch.isneginf(x), high).min())
    return low, high


def _sum_up(
    leaves: Tensor, beta: float, branching: int, levels: list[Tensor], buffer: Tensor
) -> None:
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


def _logsumexp_up(leaves: Tensor, beta: float, branching: int, levels: list[Tensor]) -> None:
    value = leaves.double() / beta
    for v in reversed(levels):
        value = soft_value(value.view(-1, branching))
        v.copy_(value)
