r"""Confidence bounds on the mean of a nonnegative variable that is given by its logarithm.

For independent X_i >= 0 with one mean m = E X (importance weights: m = Z), each function gets
log X_i, (..., n) in nats, and returns a bound on **log m** that holds with probability at least
1 - alpha for every n and every law of X: there is no asymptotics here. Leading dimensions are
separate problems. X may span hundreds of nats; log X = ``-inf`` is X = 0.

=================================  ======================================================
bound                              needs
=================================  ======================================================
:func:`markov_lower`               X >= 0
:func:`group_lower`                X >= 0; groups that are averaged by themselves
:func:`betting_lower`              X >= 0; closes in on m as n grows
:func:`empirical_bernstein_upper`  0 <= X <= a known bound
:func:`betting_upper`              0 <= X <= a known bound
=================================  ======================================================

A variable that is only known to be nonnegative has no upper bound on its mean: mass that no
sample met can be anywhere above. A lower bound stays one where E X <= m.

References: Gogate, Bidyuk and Dechter (2007), https://arxiv.org/abs/1206.5242 (Markov, groups);
Waudby-Smith and Ramdas (2020), https://arxiv.org/abs/2010.09686 (betting); Maurer and Pontil
(2009), https://arxiv.org/abs/0907.3740 (empirical Bernstein).
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


def markov_lower(log_x: Float[Tensor, "... n"], alpha: float) -> Float[Tensor, "..."]:
    """log mean X - log(1 / alpha): P(mean X >= m / alpha) <= alpha by Markov's inequality.

    Raises:
        ValueError: alpha out of (0, 1), no samples, NaN or +inf.
    """
    _check(log_x, alpha)
    return log_mean(log_x.double()) + math.log(alpha)


def group_lower(
    log_x: Float[Tensor, "... n"], alpha: float, groups: int, rank: int | None = None
) -> Float[Tensor, "..."]:
    """From means of disjoint groups: one of their order statistics, less log c.

    Each group's mean is >= c m with probability at most 1 / c (Markov), independently, so that
    ``rank`` of k groups are so with probability at most P(Binomial(k, 1 / c) >= rank), which c
    sets to alpha. The minimum (rank k) loses log(1 / alpha) / k; the median, rank (k + 1) // 2,
    loses more and does not hang on the worst group.

    Args:
        groups: k; the last n % k samples are left out.
        rank: of the group's mean from above, 1 for the largest; None for k, the smallest.

    Raises:
        ValueError: more groups than samples, a rank out of [1, groups], or as above.
    """
    _check(log_x, alpha)
    n = log_x.shape[-1]
    rank = groups if rank is None else rank
    if not 1 <= groups <= n:
        raise ValueError(f"groups must be in [1, {n}], the number of samples, got {groups}")
    if not 1 <= rank <= groups:
        raise ValueError(f"rank must be in [1, {groups}], got {rank}")
    means = log_mean(log_x.double()[..., : n - n % groups].unflatten(-1, (groups, -1)))
    chosen = means.sort(dim=-1, descending=True).values[..., rank - 1]
    return chosen + math.log(_tail_probability(groups, rank, alpha))


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


def empirical_bernstein_upper(
    log_x: Float[Tensor, "... n"], log_max: float, alpha: float
) -> Float[Tensor, "..."]:
    """For 0 <= X <= exp(log_max): Maurer and Pontil (2009), Theorem 4. Never above log_max.

    With X scaled to [0, 1] and s^2 its sample variance (n - 1 in the denominator),
    m <= mean + sqrt(2 s^2 log(2 / alpha) / n) + 7 log(2 / alpha) / (3 (n - 1)).

    Raises:
        ValueError: a value above log_max, or as above.
    """
    x = _scaled(log_x, log_max, alpha).exp()
    n = x.shape[-1]
    if n == 1:
        return torch.full(x.shape[:-1], log_max, dtype=x.dtype, device=x.device)
    log_term = math.log(2 / alpha)
    bound = x.mean(-1) + (2 * x.var(-1) * log_term / n).sqrt() + 7 * log_term / (3 * (n - 1))
    return log_max + bound.clamp(max=1.0).log()


def betting_upper(
    log_x: Float[Tensor, "... n"], log_max: float, alpha: float
) -> Float[Tensor, "..."]:
    """For 0 <= X <= exp(log_max): :func:`betting_lower` of what is missing to the maximum.

    From n samples it comes at most about log(n / log(1 / alpha)) nats below log_max.

    Raises:
        ValueError: a value above log_max, or as above.
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


def _tail_probability(k: int, rank: int, alpha: float) -> float:
    """The p with P(Binomial(k, p) >= rank) = alpha, from below."""
    low, high = 0.0, 1.0
    for _ in range(200):
        p = (low + high) / 2
        tail = math.fsum(math.comb(k, j) * p**j * (1 - p) ** (k - j) for j in range(rank, k + 1))
        low, high = (p, high) if tail <= alpha else (low, p)
    return low


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
