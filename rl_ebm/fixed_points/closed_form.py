r"""Fixed points in closed form, of policies and of laws over responses.

With g = R / beta and a penalty of weight 1 (nats), at a state with log p_ref and the plain
expected return Q, or at the root with one action for each response and Q = g:

    pi ~ p_ref exp(Q)             k2 in the loss: its gradient is that of KL(pi, p_ref)
    pi = p_ref / (lambda - Q)     k3 in the loss: its gradient is that of KL(p_ref, pi)

where lambda normalises: sum_a pi(a) (Q(a) - lambda) + p_ref(a) = 0 for every a.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.soft_bellman import log_policy


def softmax_rule(log_ref: Float[Tensor, "n A"], q: Float[Tensor, "n A"]) -> Float[Tensor, "n A"]:
    """log of pi ~ p_ref exp(q)."""
    return log_policy(log_ref + q)


def hyperbolic_rule(
    log_ref: Float[Tensor, "n A"], q: Float[Tensor, "n A"], iterations: int = 100
) -> Float[Tensor, "n A"]:
    """log of pi = p_ref / (lambda - q), with lambda > max q such that it sums to 1.

    Newton's method on h(d) = sum p_ref / (d + max q - q) = 1, d = lambda - max q: h is convex
    and falls, so that from the left of its root it rises to it and never passes it.
    """
    forbidden = torch.isneginf(log_ref)
    ref = log_ref.exp()
    best = q.masked_fill(forbidden, -torch.inf).amax(-1, keepdim=True)
    below = (best - q).masked_fill(forbidden, 1.0)
    # pi of the best action is p_ref / d <= 1: d starts at or left of the root.
    d = ref.masked_fill(forbidden | (below > 0), 0.0).sum(-1, keepdim=True)
    for _ in range(iterations):
        pi = ref / (d + below)
        step = (pi.sum(-1, keepdim=True) - 1) / (pi / (d + below)).sum(-1, keepdim=True)
        d = d + step.clamp(min=0.0)
        if bool((step.abs() <= 1e-15 * d).all()):
            break
    log_pi = log_ref - (d + below).log()
    # What rounding leaves of the sum.
    return log_policy(log_pi)


def best_of_n(log_ref: Float[Tensor, "N"], g: Float[Tensor, "N"], n: int) -> Float[Tensor, "N"]:
    """log-law of the best of n draws from p_ref; equal rewards share by p_ref.

    P(best <= v) = F(v)^n with F the law of g under p_ref.
    """
    log_ref = log_ref - torch.logsumexp(log_ref, 0)
    values, group = g.unique(return_inverse=True)
    mass = torch.zeros_like(values).index_add(0, group, log_ref.exp())
    # From the top down, so that rare best values keep their digits.
    above = mass.flip(0).cumsum(0).flip(0) - mass
    upper, lower = torch.log1p(-above.clamp(max=1.0)), torch.log1p(-(above + mass).clamp(max=1.0))
    # F(v)^n - F(v-)^n = F(v)^n (1 - (F(v-) / F(v))^n)
    gain = n * upper + torch.log(-torch.expm1(n * (lower - upper)))
    return log_ref - mass.log()[group] + gain[group]
