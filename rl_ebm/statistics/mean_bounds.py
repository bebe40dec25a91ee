r"""Confidence bounds on the mean of a nonnegative variable that is given by its logarithm.

For independent X_i >= 0 with one mean m = E X (importance weights: m = Z), each function gets
log X_i, (..., n) in nats, and returns a bound on **log m** that holds with probability at least
1 - alpha for every n and every law of X: there is no asymptotics here. Leading dimensions are
separate problems. X may span hundreds of nats; log X = ``-inf`` is X = 0.

=====================  ======================================================
bound                  needs
=====================  ======================================================
:func:`betting_lower`  X >= 0; closes in on m as n grows
:func:`betting_upper`  0 <= X <= a known bound
=====================  ======================================================

A variable that is only known to be nonnegative has no upper bound on its mean: mass that no
sample met can be anywhere above. A lower bound stays one where E X <= m.

Waudby-Smith and Ramdas (2020), https://arxiv.org/abs/2010.09686.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

MAX_BETS = 2048
"""longer samples are averaged in blocks first: as valid, and as sharp where blocks are many"""
_STEPS = 36
"""of bisection: from some 25 nats to below 1e-9"""
_ROUNDING = 1e-9
"""how far, relatively, a value may stand above its bound by rounding"""


def log_mean(log_x: Float[Tensor, "... n"]) -> Float[Tensor, "..."]:
    """log of the sample mean; ``-inf`` where every X is 0."""
    return torch.logsumexp(log_x, dim=-1) - math.log(log_x.shape[-1])


def effective_sample_size(log_x: Float[Tensor, "... n"]) -> Float[Tensor, "..."]:
    """(sum X)^2 / sum X^2, in [1, n]; 0 where every X is 0."""
    ratio = 2 * torch.logsumexp(log_x, dim=-1) - torch.logsumexp(2 * log_x, dim=-1)
    return ratio.exp().masked_fill(torch.isneginf(log_x).all(-1), 0.0)


def betting_lower(log_x: Float[Tensor, "... n"], alpha: float) -> Float[Tensor, "..."]:
    r"""By betting against every smaller mean, as Waudby-Smith and Ramdas (2020) do.

    For each stake 0 <= lambda <= 1 the wealth prod_{i <= n} (1 + lambda (X_i / m - 1)) is a
    nonnegative martingale that starts at 1, and so is its mean over a fixed grid of stakes. By
    Ville's inequality it ever reaches 1 / alpha with probability at most alpha. The wealth falls
    as m grows, so the m at which it never did are those above a bound, found by bisection.

    In words: were m the mean, no way of betting on the X_i could be expected to win; so an m
    against which a bettor would have become 1 / alpha times as rich is rejected. The maximum over
    i, and not the wealth at the end, is what Ville's inequality speaks of, which is why a lucky
    start counts. The stakes are fixed before any X is seen: choosing the best of them afterwards
    would be another, wrong, test, while their mean is itself a bettor who splits his money.

    Raises:
        ValueError: alpha out of (0, 1), no samples, NaN or +inf.
    """
    _check(log_x, alpha)
    log_x = _blocks(log_x.double())
    n = log_x.shape[-1]
    bets = stakes(n).to(log_x.device)
    largest = log_x.amax(-1)
    nothing = torch.isneginf(largest)
    log_x = log_x.masked_fill(nothing[..., None], 0.0)
    largest = largest.masked_fill(nothing, 0.0)
    # At the largest running mean no bet has won (Jensen). The smallest stake, between 1 / (2 n)
    # and 1 / n, keeps 1 / e of its money while it loses, and wins enough from the largest X at:
    high = torch.logcumsumexp(log_x, dim=-1)
    high = (high - torch.arange(1, n + 1, device=log_x.device).log()).amax(-1)
    low = largest - math.log(2 * n) - 1 - math.log(len(bets)) + math.log(alpha)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        rejected = _log_wealth(log_x, middle, bets).amax(-1) >= -math.log(alpha)
        low, high = torch.where(rejected, middle, low), torch.where(rejected, high, middle)
    return low.masked_fill(nothing, -torch.inf)


def stakes(n: int) -> Float[Tensor, "G"]:
    """The stakes that :func:`betting_lower` spreads its money over, for up to n samples.

    Small ones, down to 1 / n, win from rare large values; those near 1 from values that hardly
    vary. Between neighbours the rate of growth loses about a tenth, and the mean over all costs
    log G of the wealth.
    """
    small = [2.0**-k for k in range(1, math.ceil(math.log2(n)) + 1)]
    large = [1 - 2.0**-k for k in range(2, 6)]
    return torch.tensor([1.0, *large, *small], dtype=torch.float64)


def betting_upper(
    log_x: Float[Tensor, "... n"], log_max: float, alpha: float
) -> Float[Tensor, "..."]:
    """For 0 <= X <= exp(log_max): :func:`betting_lower` of what is missing to the maximum.

    From n samples it comes at most about log(n / log(1 / alpha)) nats below log_max.

    Raises:
        ValueError: a value above log_max, or as :func:`betting_lower` does.
    """
    x = _scaled(log_x, log_max, alpha).exp()
    missing = betting_lower(torch.log1p(-x), alpha)
    return log_max + torch.log(-torch.expm1(missing))


def _log_wealth(log_x: Tensor, log_m: Tensor, bets: Tensor) -> Float[Tensor, "... n"]:
    """log of the wealth after each sample, (..., n)."""
    ratio = (log_x - log_m[..., None]).exp()
    wealth = torch.full_like(ratio, -torch.inf)
    for bet in bets.tolist():
        wealth = torch.logaddexp(wealth, torch.log(1 - bet + bet * ratio).cumsum(-1))
    return wealth - math.log(len(bets))


def _blocks(log_x: Tensor) -> Tensor:
    """Means of consecutive blocks, at most MAX_BETS of them: X >= 0 of the same mean."""
    n = log_x.shape[-1]
    size = -(-n // MAX_BETS)
    if size == 1:
        return log_x
    return log_mean(log_x[..., : n - n % size].unflatten(-1, (-1, size)))


def _scaled(log_x: Tensor, log_max: float, alpha: float) -> Tensor:
    """log of X / exp(log_max), at most 0."""
    _check(log_x, alpha)
    if not math.isfinite(log_max):
        raise ValueError(f"log_max must be finite, got {log_max}")
    scaled = log_x.double() - log_max
    if bool((scaled > _ROUNDING * max(1.0, abs(log_max))).any()):
        raise ValueError(
            f"a value has logarithm {float(log_x.max())}, above log_max = {log_max}: it is no bound"
        )
    return scaled.clamp(max=0.0)


def _check(log_x: Tensor, alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha!r}")
    if log_x.ndim == 0 or log_x.shape[-1] == 0:
        raise ValueError("a bound needs at least one sample")
    if bool((torch.isnan(log_x) | torch.isposinf(log_x)).any()):
        raise ValueError("the logarithm of a sample is NaN or +inf")
