"""Smooth functions of two numbers as short sums of products, on panels of a few nats.

On each panel such a function is sum_ij c_ij T_i(u) T_j(v), with Chebyshev's polynomials T of where
u and v are in it. The terms come from its values at the nodes of a grid, and fade as fast as powers
where it is smooth (Trefethen, *Approximation Theory and Approximation Practice*, 2013, ch. 8). At a
kink they do not: that is how one is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

TERMS = 32
"""of Chebyshev's, by each number"""
FADED, LAST = 1e-14, 3
"""of the largest value, what the last terms are below, of those that are enough; so many"""
CLOSE = 1e-11
"""the same, how far off the sum may be anywhere"""
SEEN = 64
"""places of a panel where it is looked at, besides the nodes"""
PLACES = TERMS**2 + SEEN
"""of a panel, all that a function is asked at"""
ASIDE = 0.1234
"""of a width, below 0 a panel begins: kinks are fond of 0, and one between two would not be seen"""
Panel = tuple[int, int]
"""numbers of it, by u and by v"""


def panels_of(
    x: Float[Tensor, "N"], width: float, aside: float
) -> tuple[Int64[Tensor, "N"], Float[Tensor, "N n"]]:
    """In which each number is, and Chebyshev's polynomials there.

    Args:
        aside: of a width, how far below 0 one begins. Its upper end is part of it.
    """
    x = x / width + aside
    number = x.ceil() - 1
    return number.long(), chebyshev(2 * (x - number) - 1)


def chebyshev(x: Float[Tensor, "m"]) -> Float[Tensor, "m n"]:
    """T_0 .. T_(n - 1) at x in [-1, 1]."""
    return torch.cos(x.clamp(-1, 1).arccos()[:, None] * torch.arange(TERMS))


def places_of(
    panel: Panel, width: float, aside: float
) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"]]:
    """u and v where a function is to be asked for :func:`terms_of`."""
    u, v = (
        (number + (1 + x) / 2 - aside) * width
        for number, x in zip(panel, (_GRID_U, _GRID_V), strict=True)
    )
    return u, v


def terms_of(values: Float[Tensor, "f m"], size: float) -> Float[Tensor, "f n n"] | None:
    """Of some functions, by their values there; None where one is not smooth.

    Args:
        size: of the largest values that matter.
    """
    size = max(size, float(values.abs().max()))
    grid, beside = values[:, : TERMS**2].unflatten(1, (TERMS, TERMS)), values[:, TERMS**2 :]
    terms: Tensor = _TO_TERMS @ grid @ _TO_TERMS.T
    last = max(float(x.abs().max()) for x in (terms[:, -LAST:], terms[..., -LAST:]))
    if last > FADED * size:
        return None
    u, v = (chebyshev(x[TERMS**2 :]) for x in (_GRID_U, _GRID_V))
    found = ((u @ terms) * v).sum(-1)
    return terms if float((found - beside).abs().max()) <= CLOSE * size else None


def is_smooth(
    function: Callable[[Float[Tensor, "m"]], Float[Tensor, "f m"]],
    x: Float[Tensor, "m"],
    values: Float[Tensor, "f m"],
    width: float,
) -> bool:
    """Whether functions of one number are on all panels between the smallest and the largest x.

    Args:
        values: of them at x, which are to be those that the terms give: many on each panel.
    """
    number, of_x = panels_of(x, width, ASIDE)
    low = torch.arange(int(number.min()), int(number.max()) + 1)
    found = function(((low[:, None] + (1 + _NODES) / 2 - ASIDE) * width).flatten())
    terms = found.unflatten(1, (len(low), TERMS)) @ _TO_TERMS.T
    size = max(float(found.abs().max()), float(values.abs().max()))
    off = (terms[:, number - low[0]] * of_x).sum(-1) - values
    return float(off.abs().max()) <= CLOSE * size


_NODES = torch.cos(math.pi * (torch.arange(TERMS, dtype=torch.float64) + 0.5) / TERMS)
_BESIDE = 2 * torch.rand(2, SEEN, generator=torch.Generator().manual_seed(0)).double() - 1
_GRID_U, _GRID_V = torch.cat([torch.cartesian_prod(_NODES, _NODES).T, _BESIDE], 1)
_TO_TERMS = 2 / TERMS * chebyshev(_NODES).T
_TO_TERMS[0] /= 2
