"""Laws of importance weights that are known exactly, and what to expect of a coverage test."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

REPETITIONS = 1000


class Law(NamedTuple):
    """A response has probability p; X = exp(log_x) is its weight."""

    p: Tensor
    log_x: Tensor

    @property
    def log_mean(self) -> float:
        return float(torch.logsumexp(self.p.log() + self.log_x, dim=0))


def _law(log_w: Tensor, log_pi: Tensor) -> Law:
    return Law(log_pi.softmax(0), log_w - log_pi.log_softmax(0))


def _laws() -> dict[str, Law]:
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(64, generator=g, dtype=torch.float64)
    other = torch.randn(64, generator=g, dtype=torch.float64)
    hidden = torch.zeros(64, dtype=torch.float64)
    hidden[0] = 9.0  # 99% of Z, which the policy meets once in 64
    some = normal.clone()
    some[::2] = -math.inf
    return {
        # The policy is near its target.
        "easy": _law(0.5 * normal, torch.zeros_like(normal)),
        # Weights over a hundred nats and more; the policy has most of them right.
        "peaked": _law(40 * normal - 300, 20 * normal + other),
        # Weights with a heavy tail: the target much sharper than the policy.
        "heavy": _law(4 * normal, 0.5 * other),
        # A mode that few samples meet.
        "hidden": _law(hidden, torch.zeros_like(normal)),
        # Half of the responses are impossible.
        "impossible": _law(some, other),
    }


LAWS = _laws()


def draw(name: str, repetitions: int, n: int, seed: int = 0) -> tuple[Tensor, float]:
    """log X of independent samples, (repetitions, n), and log E X."""
    law = LAWS[name]
    g = torch.Generator().manual_seed(seed + n)
    ids = torch.multinomial(law.p, repetitions * n, replacement=True, generator=g)
    return law.log_x[ids].view(repetitions, n), law.log_mean


def draw_target(name, repetitions, n, seed=1):
    """log W of exact samples of the target of a law, (repetitions, n)."""
    law = LAWS[name]
    p_star = (law.p.log() + law.log_x).softmax(0)
    ids = torch.multinomial(
        p_star, repetitions * n, replacement=True, generator=torch.Generator().manual_seed(seed)
    )
    return law.log_x[ids].view(repetitions, n)


def kls_of(name):
    """KL(pi, p*) and KL(p*, pi) of a law, by their definitions."""
    law = LAWS[name]
    log_pi = law.p.log()
    log_star = (log_pi + law.log_x).log_softmax(0)
    ratio = log_pi - log_star
    return float((log_pi.exp() * ratio).sum()), -float((log_star.exp() * ratio).nansum())


def binomial_quantile(q: float, n: int, p: float) -> int:
    """The smallest k with P(Binomial(n, p) <= k) >= q."""
    total = 0.0
    for k in range(n + 1):
        log_term = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        total += math.exp(log_term + k * math.log(p) + (n - k) * math.log1p(-p))
        if total >= q:
            return k
    return n


def most_misses(alpha: float, repetitions: int = REPETITIONS) -> int:
    """The most often that what fails with probability alpha may be seen to fail."""
    return binomial_quantile(0.999, repetitions, alpha)


def closed_wealth_bound(log_x: list[float], bets: list[float], alpha: float) -> float:
    """The m where the best wealth over time is 1 / alpha, by plain products of plain floats."""

    def best(log_m: float) -> float:
        wealth, top = [1.0] * len(bets), 0.0
        for x in log_x:
            ratio = math.exp(x) / math.exp(log_m)
            wealth = [w * (1 + b * (ratio - 1)) for w, b in zip(wealth, bets, strict=True)]
            top = max(top, math.fsum(wealth) / len(wealth))
        return top

    low, high = -60.0, 60.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if best(middle) >= 1 / alpha else (low, middle)
    return low
