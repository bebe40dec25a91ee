r"""Bounds on the KL between a policy and the EBM, from the error of its logits alone.

With ``delta = q* - q`` at a state and its span ``L = max delta - min delta`` over the allowed
actions (the span does not see a constant added to the logits of a state):

* one state: ``KL <= K(L)``, ``K(L) = u - 1 - log u``, ``u = L / (1 - exp(-L))``. Sharp: it is
  attained. ``K(L) <= min(L^2 / 8, L)``; the same for both directions of the KL.
* one state, weighing actions: split them into likely and unlikely ones, of mass m under p and
  m' under p'; then ``KL(p, p') <= kl(m, m') + (1 - m) K(L_likely) + m K(L_unlikely)``, by the
  chain rule and K on either side. A span among actions that p hardly ever takes costs little.
* sequences, by the chain rule: ``KL(P_q, P*) <= sum_t E_{s_t ~ P_q} K(L_{s_t})`` (occupancy),
  at most ``n K(max L)`` with n the most unforced decisions of a response (span), at most
  ``2 T ||q - q*||_inf`` (arXiv 2512.15605, Prop. 3).

They hold where the policy gives nothing to what p* forbids; else KL(P_q, P*) is infinite. All in
nats. An infinite span gives an infinite bound.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rl_ebm.soft_bellman import Tables, expectation, forward_log_marginals, rounded_up
from rl_ebm.tokens import TokenSpace

_SERIES_BELOW = 0.25


def span_kl(span: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """K(L) = u - 1 - log u with u = L / (1 - exp(-L)): the most KL that a span L allows.

    By its series L^2/8 - L^4/576 + L^6/25920 - L^8/1075200 + L^10/43545600 below 0.25, where
    the closed form cancels.
    """
    # Both branches see arguments at which they are finite, for the gradient's sake.
    small = span < _SERIES_BELOW
    infinite = torch.isposinf(span)
    x = torch.where(small | infinite, torch.ones_like(span), span)
    u = x / -torch.expm1(-x)
    closed = u - 1 - u.log()
    s = torch.where(small, span, torch.zeros_like(span)).square()
    series = s * (1 / 8 + s * (-1 / 576 + s * (1 / 25920 + s * (-1 / 1075200 + s / 43545600))))
    return torch.where(small, series, closed).masked_fill(infinite, torch.inf)


def split_kl(log_p: Float[Tensor, "... A"], log_q: Float[Tensor, "... A"]) -> Float[Tensor, "..."]:
    """The most KL(p, q) that the spans of log p - log q on either side of a split allow.

    The best of all splits by p's own order, no split included: at most K(L), and the KL itself
    for two actions. Nothing else than the spans and the masses of the two sides is used.

    K(L) alone is a worst case over all laws with the span L, so that one action of probability
    1e-9 whose logit is off by 20 costs 17 nats. By the chain rule the choice may be made in two
    steps, first the side and then the action on it, and K is applied on each side with its own
    span: the bad action's side then weighs 1e-9. All A - 1 splits are tried by cumulative maxima
    and sums, forwards and backwards over the sorted actions, which costs one sort. The minimum of
    valid bounds is valid; it is not the KL, since the logits between the extremes are not read.

    Args:
        log_p, log_q: log-probabilities; ``-inf`` where forbidden. q may give some mass to
            what p forbids, at its exact cost, -log of the rest.
    """
    allowed = torch.isfinite(log_p)
    dead = ~allowed.any(-1)
    inside = torch.logsumexp(log_q.masked_fill(~allowed, -torch.inf), -1)
    log_p, order = log_p.sort(dim=-1, descending=True, stable=True)
    allowed = allowed.gather(-1, order)
    log_q = log_q.gather(-1, order).masked_fill(~allowed, -torch.inf) - inside[..., None]
    ratio = (log_p - log_q).masked_fill(~allowed, 0.0)
    spans, masses = [], []
    for flip in (False, True):  # the k likeliest actions; then all but them
        high, low = (ratio.masked_fill(~allowed, fill) for fill in (-torch.inf, torch.inf))
        p, q = log_p.exp(), log_q.exp()
        if flip:
            high, low, p, q = (x.flip(-1) for x in (high, low, p, q))
        span = high.cummax(-1).values - low.cummin(-1).values
        sums = [span, p.cumsum(-1), q.cumsum(-1)]
        if flip:
            # Entry k of the flipped sums is about all but the first A - 1 - k.
            nothing = torch.zeros_like(span[..., :1])
            sums = [torch.cat([x.flip(-1)[..., 1:], nothing], -1) for x in sums]
        spans.append(sums[0].clamp(min=0.0).nan_to_num(nan=torch.inf, posinf=torch.inf))
        masses.append(sums[1:])
    total = torch.zeros_like(log_p)
    for span, (p, q) in zip(spans, masses, strict=True):
        inner = torch.where(p > 0, p * span_kl(span), 0.0)
        total = total + torch.special.xlogy(p, p / q).masked_fill(p == 0, 0.0) + inner
    best = rounded_up(total.amin(-1).clamp(min=0.0) - inside, log_p.shape[-1])
    return best.masked_fill(dead, 0.0)


def centre(delta: Float[Tensor, "... A"], q_star: Float[Tensor, "... A"]) -> Float[Tensor, "... A"]:
    """delta less its mean over the allowed actions (q* finite); 0 elsewhere.

    Where the policy forbids an allowed action the state's entries are ``inf`` at all allowed
    actions: no constant brings them close.
    """
    allowed = torch.isfinite(q_star)
    delta = delta.masked_fill(~allowed, 0.0)
    lost = torch.isinf(delta).any(-1, keepdim=True) & allowed
    count = allowed.sum(-1, keepdim=True).clamp(min=1)
    mean = delta.masked_fill(lost, 0.0).sum(-1, keepdim=True) / count
    return (
        (delta.masked_fill(lost, 0.0) - mean)
        .masked_fill(~allowed, 0.0)
        .masked_fill(lost, torch.inf)
    )


def logit_span(q: Float[Tensor, "... A"], q_star: Float[Tensor, "... A"]) -> Float[Tensor, "..."]:
    """L_s, the span of q* - q over allowed actions; inf where q forbids one, 0 if none is."""
    allowed = torch.isfinite(q_star)
    delta = q_star.masked_fill(~allowed, 0.0) - q.masked_fill(~allowed, 0.0)
    high = delta.masked_fill(~allowed, -torch.inf).amax(-1)
    low = delta.masked_fill(~allowed, torch.inf).amin(-1)
    # q = -inf at an allowed action makes delta +inf there; inf - inf cannot arise with one.
    lost = torch.isinf(delta).any(-1)
    return torch.where(allowed.any(-1), high - low, torch.zeros_like(high)).masked_fill(
        lost, torch.inf
    )


def prop3_bound(
    max_span: Float[Tensor, "*n"], max_length: int | Int[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """2 T ||q - q*||_inf with the best constant for each state: ||.||_inf is half the span."""
    return 2 * max_length * (max_span / 2)


def span_bound(max_span: Float[Tensor, "*n"], space: TokenSpace) -> Float[Tensor, "*n"]:
    """n K(max L), n the most unforced decisions of a response."""
    if space.num_decisions == 0:
        return torch.zeros_like(max_span)
    return space.num_decisions * span_kl(max_span)


def occupancy_bound(log_pi: Tables, spans: Tables, space: TokenSpace) -> Float[Tensor, "..."]:
    """sum_t E_{s_t ~ pi} K(L_{s_t}); bounds KL(pi, pi*) for pi = P_q, KL(pi*, pi) for pi = P*.

    Args:
        log_pi: per-depth tables of the policy whose states count.
        spans: entry t holds L_s for every state of depth t, (..., branching**t).
    """
    marginals = forward_log_marginals(log_pi, space)
    terms = [
        expectation(m, span_kl(span)).sum(-1) for m, span in zip(marginals, spans, strict=True)
    ]
    return torch.stack(terms).sum(0)
