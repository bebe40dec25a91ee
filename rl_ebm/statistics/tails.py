r"""Whether a sample shows that normal theory holds for its mean: one tail at a time.

The mean of n independent X is in mean +- t s / sqrt(n) as often as it says where n is large *for
the law of X*. What can be looked at, for the upper tail (the lower one is that of -X):

* what no sample met: a class of responses of probability up to log(2 / alpha) / n is not drawn
  at all with probability alpha / 2. Where such a class, with values as large as any that is known
  (of the sample, or of responses that its law hardly draws), would move the mean by more than the
  half-width, the interval cannot be trusted. For the sample's own largest value that is a limit
  on its share of the variance, (t / log(2 / alpha))^2, 28% at 95%;
* Pareto k-hat, the shape of a generalised Pareto distribution fitted to the largest values: from
  1/2 on the variance is infinite. Zhang and Stephens (2009), "A new and efficient estimation
  method for the generalized Pareto distribution", with the weak prior, tail size and use as a
  diagnostic of Vehtari et al. (2024), https://arxiv.org/abs/1507.02646;
* skewness g: the error of normal theory is of the order g / sqrt(n). Cochran's rule
  n >= 25 g^2 (1977, "Sampling techniques", 2.15).

None of them can see a class of responses that nothing points to. Where all values and their
probabilities are listed there is none, and :func:`is_normal` asks the law itself.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

FEWEST = 30
"""samples, below which nothing is concluded from their spread"""
INFINITE_VARIANCE = 0.5
"""the shape from which on a Pareto tail has no variance"""
_COCHRAN = 5.0
_LIGHT = 2.0
"""in its place for a tail that is known to be light: 4 draws are expected of a lone rare class"""


def unseen(alpha: float, n: int) -> float:
    """The probability of a class that n samples all miss with probability alpha / 2, about."""
    return math.log(2 / alpha) / n


def pareto_shape(excess: Float[Tensor, "m"]) -> float:
    """Shape k of a generalised Pareto distribution, from positive excesses over a threshold.

    The posterior mean of Zhang and Stephens (2009), drawn towards 1/2 as by ten excesses.
    ``-inf`` from fewer than 5 excesses, which show no tail.
    """
    x = excess.double().sort().values
    m = len(x)
    if m < 5 or float(x[0]) <= 0:
        return -math.inf
    grid = 30 + math.isqrt(m)
    j = torch.arange(1, grid + 1, dtype=torch.float64, device=x.device)
    quartile = x[int(m / 4 + 0.5) - 1]
    b = 1 / x[-1] + (1 - (grid / (j - 0.5)).sqrt()) / (3 * quartile)
    k = torch.log1p(-b[:, None] * x).mean(1)
    log_likelihood = m * ((-b / k).log() - k - 1)
    mean = (log_likelihood.softmax(0) * b).sum()
    shape = float(torch.log1p(-mean * x).mean())
    return (m * shape + 5) / (m + 10)


def pareto_k(x: Float[Tensor, "n"]) -> float:
    """Shape of the upper tail of a sample: its largest m = min(n / 5, 3 sqrt(n)) values.

    A heavy tail is as heavy further out, but where values come in clusters a threshold between
    two of them makes any look heavy: so the smaller of the shapes of m and of m / 2 values.
    ``-inf`` where half of them are equal to others: of a few values that occur again and again no
    tail can be drawn, and the largest of them has been seen to be one of those.
    """
    n = len(x)
    size = min(n // 5, math.ceil(3 * math.sqrt(n)))
    return min(_shape_beyond(x, size), _shape_beyond(x, size // 2))


def _shape_beyond(x: Float[Tensor, "n"], size: int) -> float:
    largest = x.double().sort(descending=True).values[: size + 1]
    excess = largest[:-1] - largest[-1]
    excess = excess[excess > 0]
    return -math.inf if 2 * len(excess.unique()) <= size else pareto_shape(excess)


def skewness(x: Float[Tensor, "n"], p: Float[Tensor, "n"] | None = None) -> float:
    """Third central moment in units of the standard deviation; 0 where all values are equal.

    Args:
        p: the values' probabilities; None where they are a sample.
    """
    x = x.double()
    p = torch.full_like(x, 1 / len(x)) if p is None else p
    d = x - p @ x
    variance = float(p @ d.square())
    return float(p @ d.pow(3)) / variance**1.5 if variance > 0 else 0.0


def is_normal(
    x: Float[Tensor, "e"],
    p: Float[Tensor, "e"],
    n: int,
    flat: float,
    light: tuple[bool, bool] = (False, False),
) -> bool:
    """Whether normal theory holds for the mean of n draws of a law that is listed.

    By Cochran's rule with the law's own skewness, which is large where a class that n draws may
    well miss moves the mean: one of probability p and far from all others has p^-1/2.

    Args:
        flat: a standard deviation that is rounding.
        light: whether the lower, the upper tail is known to be light.
    """
    spread = float(p @ (x - p @ x).square()) ** 0.5
    g = skewness(x, p)
    most = math.sqrt(n) / (_LIGHT if light[g > 0] else _COCHRAN)
    return n >= FEWEST and spread > flat and abs(g) <= most


def upper_doubt(
    x: Float[Tensor, "n"],
    half: float,
    alpha: float,
    elsewhere: Float[Tensor, "e"] | None = None,
    masses: Float[Tensor, "e"] | None = None,
    light: float = math.inf,
) -> str:
    """Why mean + half is no upper end of level alpha / 2 for E X; "" where nothing speaks
    against it.

    Args:
        x: the sample, finite.
        half: half-width of the interval of level alpha.
        elsewhere: values at responses that the law hardly draws.
        masses: about how probable responses like them are together.
        light: a point beyond which the tail is known to be light, P(X >= light + d) <= exp(-d).
    """
    n, mean = len(x), float(x.mean())
    missed = unseen(alpha, n)
    if n < FEWEST:
        return f"{n} samples are too few to see the tail"
    largest = float(x.max())
    if min(missed, math.exp(min(light - largest, 0.0))) * (largest - mean) > half:
        return f"one of {n} samples has too large a share of the variance"
    if elsewhere is not None and masses is not None and len(elsewhere):
        likely = torch.exp((light - elsewhere).clamp(max=0.0)).clamp(max=missed)
        moved = torch.minimum(masses, likely) * (elsewhere - mean)
        if float(moved.max()) > half:
            return (
                f"responses that are hardly drawn have values as far off as "
                f"{float(elsewhere[moved.argmax()]):.3g}, and {n} samples do not show how many "
                "there are"
            )
    if light < math.inf:
        return ""
    if skewness(x) > math.sqrt(n) / _COCHRAN:
        return f"{n} samples are too few for their skewness of {skewness(x):.2g}"
    k = pareto_k(x)
    if k >= INFINITE_VARIANCE:
        return f"the tail is heavy (Pareto k-hat {k:.2f})"
    return ""
