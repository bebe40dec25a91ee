r"""Advantages of a response in a group, in units of the group's standard deviation: expected.

A group is a response with value r and size - 1 others from a law; m is its mean and SS the sum of
squares around it. Where there are few groups, their values are listed. Where there are many,
sampling is not needed either, because both the root and the mean can be turned into integrals under
which the others are independent:

    1 / (sqrt(x) + eps) = int_0^inf exp(-t x) w(t) dt,
    w(t) = 1 / sqrt(pi t) - eps erfcx(eps sqrt(t)),
    exp(-s SS) (r - m) = sqrt(s n / pi) int (r - c) prod_i exp(-s (r_i - c)^2) dc,

so that with x = SS / (n - 1), s = t / (n - 1) and phi(s, c) = E[exp(-s (R - c)^2)]

    E[(r - m) / (std + eps)] = int w(t) sqrt(s n / pi) int (r - c) e^{-s (r - c)^2} phi^{n-1} dc dt.

Both integrands are analytic, so that the trapezoidal rule (in c, and in a y that makes both ends of
t fall off fast) converges faster than any power. Large t only see groups whose values all lie close
together, and are not all the same: t is followed until these are rarer than :data:`TOLERANCE`, and
c is cut into blocks that see the values around them, so that narrow bells cost no more than wide
ones.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

LISTED = 2**18
"""entries of the table of all groups, up to which they are listed"""
TOLERANCE = 1e-10
"""of an advantage"""
FIRST, STEP = -3.6, 0.15
"""y where it begins, t = exp(2 y - 2 exp(-y)) in units of the range of the values; its steps"""
FINE = 0.7
"""step of c in units of the width of the narrowest bell"""
WIDE = 9.0
"""the same units: how far past the values c goes"""
FADED = 36.0
"""exponents from which on exp(-x) is nothing"""
CLOSEST = 2.0**-22
"""distance, in units of the range, at which it is given up"""
NEGLIGIBLE = 1e-14
"""chance that all others are around a block, below which it is left out"""
BLOCK = 2**22
"""exponentials at a time"""


def multisets(kinds: int, size: int) -> Float[Tensor, "M kinds"]:
    """How often each kind is in every multiset of a size."""
    rows = torch.zeros(1, 0, dtype=torch.float64)
    left = torch.tensor([float(size)], dtype=torch.float64)
    for kind in range(kinds):
        if kind == kinds - 1:
            return torch.cat([rows, left[:, None]], 1)
        repeats = (left + 1).long()
        rows, left = rows.repeat_interleave(repeats, 0), left.repeat_interleave(repeats)
        starts = repeats.cumsum(0) - repeats
        count = torch.arange(len(left)) - starts.repeat_interleave(repeats)
        rows, left = torch.cat([rows, count[:, None].double()], 1), left - count
    raise ValueError(f"kinds must be >= 1, got {kinds}")


def group_advantages(
    log_law: Float[Tensor, "N"], g: Float[Tensor, "N"], size: int, epsilon: float = 1e-6
) -> Float[Tensor, "N"]:
    """Expected (g(y) - mean) / (std + epsilon) of a response in a group with size - 1 others.

    Args:
        log_law: of the others, summing to 1; -inf of what is never drawn.
        g: value of every response, finite.
        size: of the group, >= 2; std has size - 1 in its denominator.

    Raises:
        OverflowError: too many groups to list, and values too close to integrate.
    """
    values, place = g.unique(return_inverse=True)
    p = torch.zeros_like(values).index_add(0, place, log_law.exp())
    kinds = len(values)
    if math.comb(kinds + size - 2, size - 1) * kinds <= LISTED:
        return listed(values, p, size, epsilon)[place]
    return integrated(values, p, size, epsilon)[place]


def listed(
    values: Float[Tensor, "V"], p: Float[Tensor, "V"], size: int, epsilon: float
) -> Float[Tensor, "V"]:
    """By the sum over every multiset of the others: C(V + size - 2, size - 1) of V values."""
    others = multisets(len(values), size - 1)
    log_p = torch.where(others > 0, others * p.log(), 0.0).sum(1)
    log_p = log_p + math.lgamma(size) - torch.lgamma(others + 1).sum(1)
    found = []
    for value in values:
        # By differences: they are 0 exactly where all are alike, and std is next to nothing.
        apart = value - values
        off = others @ apart / size
        variance = (others @ apart.square() / size - off.square()).clamp(min=0.0)
        std = (variance * size / (size - 1)).sqrt()
        found.append((log_p.exp() * off / (std + epsilon)).sum())
    return torch.stack(found)


def integrated(
    values: Float[Tensor, "V"], p: Float[Tensor, "V"], size: int, epsilon: float
) -> Float[Tensor, "V"]:
    """By the double integral.

    Raises:
        OverflowError: the values are too close for what they weigh.
    """
    scale = float(values.max() - values.min())
    x, epsilon = (values - values.min()) / scale, epsilon / scale
    until = math.log(_last(x, p, size)) / 2 + STEP
    y = torch.arange(FIRST, until, STEP, dtype=torch.float64)
    t, slope = (2 * y - 2 * (-y).exp()).exp(), 2 + 2 * (-y).exp()
    weight = 1 / (math.pi * t).sqrt()
    if epsilon:
        weight = weight - epsilon * torch.special.erfcx(epsilon * t.sqrt())
    found = torch.zeros_like(x)
    for rate, factor in zip(
        (t / (size - 1)).tolist(), (STEP * slope * t * weight).tolist(), strict=True
    ):
        found += factor * _mean_deviation(x, p, size, rate)
    return found


def _mean_deviation(
    x: Float[Tensor, "V"], p: Float[Tensor, "V"], size: int, s: float
) -> Float[Tensor, "V"]:
    """E[exp(-s SS) (r - m)], by the trapezoidal rule in c, block by block."""
    reach = math.sqrt(FADED / s)
    width = 1 / math.sqrt(2 * s * size)
    step = FINE * width
    points = math.ceil(reach / step)
    count = math.ceil((1 + 2 * WIDE * width) / (points * step))
    starts = -WIDE * width + torch.arange(count, dtype=torch.float64) * (points * step)
    low = torch.searchsorted(x, starts - reach)
    high = torch.searchsorted(x, starts + (points - 1) * step + reach, right=True)
    total = torch.cat([p.new_zeros(1), p.cumsum(0)])
    busy = (total[high] - total[low]).clamp(min=0.0) ** (size - 1) > NEGLIGIBLE
    starts, low, high = starts[busy], low[busy], high[busy]
    found = torch.zeros_like(x)
    if not len(starts):
        return found
    seen = torch.arange(int((high - low).max()))
    inside = torch.arange(points, dtype=torch.float64) * step
    for block in torch.arange(len(starts)).split(max(1, BLOCK // (points * len(seen)))):
        place = low[block, None] + seen
        there = place < high[block, None]
        place = place.clamp(max=len(x) - 1)
        away = x[place][:, None] - (starts[block, None] + inside)[..., None]
        bells = torch.exp(-s * away.square())
        phi = torch.einsum("bcv,bv->bc", bells, p[place] * there)
        each = torch.einsum("bc,bcv->bv", phi ** (size - 1), away * bells)
        found.index_add_(0, place[there], each[there])
    return found * (step * math.sqrt(s * size / math.pi))


def _last(x: Float[Tensor, "V"], p: Float[Tensor, "V"], size: int) -> float:
    """The t from which on nothing is left.

    A group with some other value at a distance d has a variance of at least d^2 / (2 (size - 1)).
    The chance that all are within d and not all the same is q^(size - 1) - p^(size - 1).
    """
    total = torch.cat([p.new_zeros(1), p.cumsum(0)])
    far = 1.0
    while far >= CLOSEST:  # powers of 2, so that it does not change from law to law by a little
        low, high = torch.searchsorted(x, x - far), torch.searchsorted(x, x + far, right=True)
        near = (total[high] - total[low]).clamp(0.0, 1.0)
        if float((near ** (size - 1) - p ** (size - 1)).max()) <= TOLERANCE:
            return 2 * FADED * (size - 1) / far**2
        far /= 2
    raise OverflowError(
        f"groups of {size} are too many to list, and rewards too close to integrate over"
    )
