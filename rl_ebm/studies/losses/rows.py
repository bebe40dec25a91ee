r"""How a loss puts the rows of a batch together, found from the loss itself.

The gradient by row i in a batch of B rows with n_1 .. n_B tokens is written as

    G_i = f(B) (a_i + b_i B / sum_j n_j):

rows that add up (b = 0: sums and means over responses, means over the tokens of each, constants),
rows that share a token count (a = 0), or one term of each. f, a and b of a row follow from the row
alone, repeated, and beside one of another length; every other batch must then agree. In a large
batch the sum over j is B E[n] under the law that draws, and G_i / f(B) is a_i + b_i / E[n].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.studies.losses.contract import Inputs, Loss, LossError

Combination = Literal["rows", "tokens", "both"]
CLOSE = 1e-7
"""relative difference that rounding may make; more where the loss is in float32"""
ROUGH = 1e-3
NEAR = 3e-2
"""the same, in a loss that leaves float32"""
CONSTANTS = 2
"""sizes of gradients, at most, that say nothing of rounding"""


Of = Callable[..., list[Tensor]]
"""row numbers to the gradient by each row of that batch"""


@dataclass(frozen=True)
class Rows:
    """A loss whose rows are known to combine in one of these ways.

    Attributes:
        combination: of the rows of a batch.
        total: whether f is 1: the loss is a sum over its rows, and no mean.
        rough: whether it computes in float32.
        spare: two rows, the shortest and the longest that it was tried on, and
        lengths: what they count: beside rows that are all as long one tells a from b.
        size: the largest gradient by one of the rows that it was tried on, alone.
        unit: what gradients are divided by.
    """

    loss: Loss
    combination: Combination
    total: bool
    rough: bool = False
    spare: Inputs = ()
    lengths: tuple[float, ...] = ()
    size: float = 1.0
    unit: float = 1.0

    def gradients(self, inputs: Inputs, counts: Float[Tensor, "N"], mean_count: float) -> Inputs:
        """G_i / f of every row, in a large batch whose mean count of tokens is given."""
        n = len(counts)
        scale = 1.0 if self.total else float(n)
        if self.combination == "rows":
            return self._of_loss(inputs, scale)
        own = float(counts.sum()) / n
        if self.combination == "tokens":
            return self._of_loss(inputs, scale * own / mean_count)
        return self._both(inputs, counts, mean_count, self._of_loss(inputs))

    def _of_loss(self, inputs: Inputs, times: float = 1.0) -> Inputs:
        return tuple(g * (times / self.unit) for g in self.loss.gradients(inputs))

    def _both(self, inputs: Inputs, counts: Tensor, mean_count: float, first: Inputs) -> Inputs:
        """From two batches with other mean counts: the second has one row n times more.

        That is the longest one, or where all are as long a row that is not of them.
        """
        n, x = len(counts), len(counts) / float(counts.sum())
        more: Inputs
        if float(counts.min()) < float(counts.max()):
            longest = int(counts.argmax())
            more, length = tuple(x[longest, None] for x in inputs), float(counts[longest])
        else:
            other = [i for i, length in enumerate(self.lengths) if length != float(counts[0])]
            if not other:  # there is one length
                return tuple(g * (1.0 if self.total else n) for g in first)
            more, length = tuple(x[other[0], None] for x in self.spare), self.lengths[other[0]]
        batch = tuple(
            torch.cat([x, y.expand(n, *x.shape[1:])]) for x, y in zip(inputs, more, strict=True)
        )
        second = self._of_loss(batch)
        y = 2 * n / (float(counts.sum()) + n * length)
        found = []
        for g, h in zip(first, second, strict=True):
            if not self.total:
                g, h = g * n, h * 2 * n
            b = (g - h[:n]) / (x - y)
            found.append(g + b * (1 / mean_count - x))
        return tuple(found)


def rows_of(loss: Loss, inputs: Inputs, counts: Float[Tensor, "B"], far: Inputs) -> Rows:
    """How these rows combine.

    Args:
        inputs: of at least 4 rows, no two alike, with every length that there is.
        counts: tokens of each.
        far: the same rows at other log-probabilities. A loss that sorts its batch, or clips by its
            largest, may couple nothing near the reference.

    Raises:
        LossError: in another way.
    """
    of = _by_each(loss, inputs)
    alone = [of(i)[0] for i in range(len(counts))]
    size = max(float(x.abs().max()) for x in alone)
    total = _is_total(of, alone, size)
    a, b = _terms(of, alone, counts, total)
    close = _tolerance(loss, inputs, alone)
    _check(of, counts, total, (a, b), close)
    kept = _kept(_by_each(loss, far), counts)
    if kept is not None:
        there = _terms(kept, [kept(i)[0] for i in range(len(counts))], counts, total)
        _check(kept, counts, total, there, close)
    shares = max(float(x.abs().max()) for x in b)
    adds = max(float(x.abs().max()) for x in a)
    kind: Combination = "both"
    if shares <= close * size * float(counts.max()):
        kind = "rows"
    elif adds <= close * size:
        kind = "tokens"
    ends = [int(counts.argmin()), int(counts.argmax())]
    spare, lengths = tuple(x[ends] for x in inputs), tuple(counts[ends].tolist())
    return Rows(loss, kind, total, close > CLOSE, spare, lengths, size or 1.0)


def _by_each(loss: Loss, inputs: Inputs) -> Of:
    def of(*rows: int) -> list[Tensor]:
        found = loss.gradients(tuple(x[list(rows)] for x in inputs))
        return [torch.cat([g[i].flatten() for g in found]) for i in range(len(rows))]

    return of


def _kept(of: Of, counts: Tensor) -> Of | None:
    """The gradients of all batches that are looked at; None of a loss that fails on one of them.

    What it says there it says again if the flow ever comes there.
    """
    n = len(counts)
    pairs = [(i, j) for i in range(n) if (j := _other(counts, i)) is not None]
    try:
        known = {rows: of(*rows) for rows in [*((i,) for i in range(n)), *pairs, *_batches(n)]}
    except LossError:
        return None
    return lambda *rows: known[rows]


def _other(counts: Tensor, i: int) -> int | None:
    """A row of another length; None where there is none."""
    other = (counts != counts[i]).nonzero()
    return int(other[0]) if len(other) else None


def _terms(
    of: Of, alone: list[Tensor], counts: Tensor, total: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """a and b of every row."""
    b = [_share(of, alone, counts, i, total) for i in range(len(counts))]
    a = [x - y / n for x, y, n in zip(alone, b, counts.tolist(), strict=True)]
    return a, b


def _check(
    of: Of, counts: Tensor, total: bool, terms: tuple[list[Tensor], list[Tensor]], close: float
) -> None:
    """Other batches of the same rows.

    Raises:
        LossError: one of them is not what a and b say.
    """
    a, b = terms
    size = max(
        float((x + y / n).abs().max()) for x, y, n in zip(a, b, counts.tolist(), strict=True)
    )
    for batch in _batches(len(counts)):
        scale = 1.0 if total else 1 / len(batch)
        mean = float(counts[list(batch)].mean())
        for i, g in zip(batch, of(*batch), strict=True):
            off = float((g / scale - a[i] - b[i] / mean).abs().max())
            if off > close * size:
                raise LossError(
                    "the loss couples the rows of a batch: in one of "
                    f"{len(batch)} the gradient by a response is {off / size:.2g} (of the largest) "
                    "off from that of rows that add up, or that share a token count; compute what "
                    "is of the whole batch outside, in advantages"
                )


def _is_total(of: Of, alone: list[Tensor], size: float) -> bool:
    """Whether f(B) is 1, and not 1 / B: from a row beside its own copies."""
    found = {}
    for count in (2, 3):
        ratios = []
        for i, g in enumerate(alone):
            top = int(g.abs().argmax())
            if float(g[top].abs()) > ROUGH * size:
                ratios.append(float(of(*[i] * count)[0][top] / g[top]))
        found[count] = ratios
    if all(abs(r - 1) < ROUGH for count in found for r in found[count]):
        return True
    if all(abs(r * count - 1) < ROUGH for count in found for r in found[count]):
        return False
    near = [abs(r - 1) < NEAR or abs(r * count - 1) < NEAR for count in found for r in found[count]]
    if all(near):
        raise LossError(
            "the loss computes in less than float32: its gradient by a response is rounded to "
            "about 1 in 100, so keep log-probabilities in the float64 that it is given"
        )
    shown = ", ".join(f"{r:.3g}" for r in found[2][:3])
    raise LossError(
        "the loss couples the rows of a batch: beside a copy of itself the gradient by a response "
        f"is {shown} of what it is alone, and neither 1 (a sum over rows) nor 0.5 (a mean)"
    )


def _share(of: Of, alone: list[Tensor], counts: Tensor, i: int, total: bool) -> Tensor:
    """b of a row, from a batch with a row of another length; 0 where there is none."""
    j = _other(counts, i)
    if j is None:
        return torch.zeros_like(alone[i])
    beside = of(i, j)[0] * (1.0 if total else 2.0)
    return (alone[i] - beside) / (1 / float(counts[i]) - 2 / float(counts[i] + counts[j]))


def _tolerance(loss: Loss, inputs: Inputs, alone: list[Tensor]) -> float:
    """What rounding does: more in a loss that leaves float64, which its gradients show.

    A hinge's are constants, which may fit float32 by themselves: then the losses of single rows
    must fit as well.
    """
    found = torch.cat(alone)
    rounded = _fits_float32(found)
    if rounded and len(found[found != 0].abs().unique()) <= CONSTANTS:
        values = [loss.value(tuple(x[i, None] for x in inputs)) for i in range(len(alone))]
        rounded = _fits_float32(torch.tensor(values, dtype=torch.float64))
    return ROUGH if rounded else CLOSE


def _fits_float32(x: Tensor) -> bool:
    return torch.equal(x.float().double(), x)


def _batches(n: int) -> list[tuple[int, ...]]:
    """Of 3 to n rows, some twice."""
    rows = list(range(n))
    return [
        tuple(rows),
        tuple(rows[:3]),
        tuple(rows[-3:]),
        (*rows[1:4], rows[1]),
        tuple(rows[::-2]),
    ]
