"""Intervals from log-weights: pure functions, and how the chance to fail is shared out."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.statistics.interval import Interval, Kind
from rl_ebm.statistics.mean_bounds import betting_lower, betting_upper, log_mean


def log_z_limits(
    log_w: Float[Tensor, "... n"],
    alpha: float,
    target_log_w: Float[Tensor, "... m"] | None = None,
    log_w_max: float | None = None,
    base_log_w: Float[Tensor, "... k"] | None = None,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Ends of an interval for log Z that fails with probability at most alpha.

    They cross only where one of them has failed. Half of alpha goes to each side, and all of it
    to the lower one where the upper is infinite or certain; the upper half is shared by the two
    upper bounds where there are two.

    Args:
        log_w: log W of independent unbiased (or too small on average) estimates of Z.
        target_log_w: log W of exact samples of p*; ``+inf`` where the policy has pi = 0.
        log_w_max: log of a bound on ``base_log_w``, and on Z, that is certain.
        base_log_w: log W of independent samples of another law, the reference's.
    """
    uppers = (target_log_w is not None) + (base_log_w is not None)
    low = betting_lower(log_w, alpha / 2 if uppers else alpha)
    high = torch.full_like(low, math.inf if log_w_max is None else log_w_max)
    if target_log_w is not None:
        high = torch.minimum(high, -betting_lower(-target_log_w, alpha / 2 / uppers))
    if base_log_w is not None:
        assert log_w_max is not None, "weights are bounded by a number that is known"
        high = torch.minimum(high, betting_upper(base_log_w, log_w_max, alpha / 2 / uppers))
    return low, high


def log_z_interval(log_w: Float[Tensor, "n"], confidence: float, **others: Any) -> Interval:
    """:func:`log_z_limits` with the estimate log mean W, which is too small on average."""
    # Limits that cross: one has failed, nobody knows which, so the interval covers both.
    low, high = sorted(map(float, log_z_limits(log_w, 1 - confidence, **others)))
    known = math.isfinite(low) and math.isfinite(high)
    kind: Kind = "finite-sample" if known else "one-sided finite-sample"
    return Interval(float(log_mean(log_w)), low, high, confidence, kind)


def self_normalised_kl(log_w: Tensor, confidence: float) -> Interval:
    """KL(p*, pi) by self-normalised weights: an estimate only, of which nothing is proved."""
    estimate = math.inf
    possible = log_w[~torch.isneginf(log_w)]
    if len(possible):
        mean = (torch.softmax(possible, dim=0) * possible).sum()
        estimate = max(float(mean - log_mean(log_w)), 0.0)
    return Interval(estimate, 0.0, math.inf, confidence, "one-sided finite-sample")
