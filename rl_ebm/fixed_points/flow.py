r"""The expected gradient flow of a penalised policy gradient, enumerated, from p_ref.

With one logit for each state and action, and rewards in nats,

    d theta(s, a) / dt = p(s) pi(a|s) (A(s, a) - E_pi A(s, .)),
    A(s, a) = E[g - kappa | s, a]                       kappa in the reward
    A(s, a) = E[g | s, a] - kappa'(u(s, a))             kappa of each token in the loss
    A(s, a) = E[g - kappa'(u(y)) | s, a]                kappa of the response in the loss

(see :mod:`rl_ebm.fixed_points.penalties`): the mean of every sampled estimate of these
objectives, whatever its baseline, summed over the tokens of each response.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.divergences import KL_TERMS
from rl_ebm.fixed_points.problem import Penalty, Problem
from rl_ebm.soft_bellman import (
    expectation,
    forward_log_marginals,
    log_policy,
    sequence_log_probs,
)

LONGEST = 1e9
"""largest step in time"""
SHORTENED = 500
"""how often a step is made shorter, by a fifth to nine tenths, before the flow is given up"""
RAREST = -600.0
"""log pi - log p_ref below which a penalty grows no further: exp(-u) would overflow"""

SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": torch.ones_like,
    "k2": lambda u: u,
    "k3": lambda u: -torch.expm1(-u),
}
"""derivatives of :data:`rl_ebm.divergences.KL_TERMS`"""


def by_depth(problem: Problem, theta: Float[Tensor, "S A"]) -> list[Tensor]:
    """log pi of one table of logits, by depth; forbidden actions stay forbidden."""
    sizes = [len(t) for t in problem.log_ref]
    return [
        log_policy(x.masked_fill(torch.isneginf(r), -torch.inf))
        for x, r in zip(theta.split(sizes), problem.log_ref, strict=True)
    ]


def advantages(problem: Problem, log_pi: list[Tensor], penalty: Penalty) -> list[Tensor]:
    """A(s, a) of the module's docstring, by depth; 0 where forbidden."""
    estimator, place, level, group_std, *_ = penalty
    term = (KL_TERMS if place == "reward" else SLOPES)[estimator]
    forbidden = [torch.isneginf(r) for r in problem.log_ref]
    scale = 1.0
    if group_std and place == "loss":
        log_law, g = sequence_log_probs(log_pi, problem.space), problem.g_responses
        spread = (g - expectation(log_law, g).sum()).square()
        scale = float(problem.beta * expectation(log_law, spread).sum().sqrt())
    if level == "token":
        costs = [
            term((p - r).masked_fill(f, 0.0).clamp(min=RAREST)).masked_fill(f, 0.0)
            for p, r, f in zip(log_pi, problem.log_ref, forbidden, strict=True)
        ]
    else:
        u = sequence_log_probs(log_pi, problem.space) - problem.log_ref_responses
        costs = problem.at_ends(term(u.nan_to_num(nan=0.0).clamp(min=RAREST)))
    later = place == "reward" or level == "sequence"  # whether costs are part of the return
    found: list[Tensor] = []
    v: Tensor | None = None
    for g, cost, p, f in reversed(list(zip(problem.g, costs, log_pi, forbidden, strict=True))):
        q = g / scale - cost if later else g / scale
        if v is not None:
            q = q + problem.space.spread(v, fill=0.0)
        q = q.masked_fill(f, 0.0)
        v = expectation(p, q).sum(-1)
        found.append(q if later else q - cost)
    return found[::-1]


def field(problem: Problem, theta: Float[Tensor, "S A"], penalty: Penalty) -> Tensor:
    """d theta / dt."""
    log_pi = by_depth(problem, theta)
    marginals = forward_log_marginals(log_pi, problem.space)
    rows = []
    for m, p, a in zip(
        marginals,
        log_pi,
        advantages(problem, log_pi, penalty),
        strict=True,
    ):
        mean = expectation(p, a).sum(-1, keepdim=True)
        rows.append((m[:, None] + p).exp() * (a - mean))
    return torch.cat(rows)


def follow(
    problem: Problem, penalty: Penalty, tolerance: float = 1e-6, step: float = 1e-2
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """The flow from p_ref: time, theta and d theta / dt after each step.

    The pair of order 3 and 2 of Bogacki and Shampine (1989), steps chosen so that the error of
    each logit in one of them stays under ``tolerance``. It has no end, but where no step is short
    enough for that (what is paid has left float64): there it stops.
    """
    theta = torch.cat(problem.start()).nan_to_num(neginf=0.0)
    time, first = 0.0, field(problem, theta, penalty)
    while True:
        yield time, theta, first
        for _ in range(SHORTENED):
            second = field(problem, theta + step / 2 * first, penalty)
            third = field(problem, theta + step * 3 / 4 * second, penalty)
            new = theta + step / 9 * (2 * first + 3 * second + 4 * third)
            last = field(problem, new, penalty)
            error = step / 72 * float((-5 * first + 6 * second + 8 * third - 9 * last).abs().max())
            if error <= tolerance:
                break
            # Too long as well where something overflowed on the way: the error is inf or nan.
            known = math.isfinite(error)
            step *= min(max(_change(tolerance, error), 0.2), 0.9) if known else 0.2
        else:
            return
        time, theta, first = time + step, new, last
        step = min(step * min(max(_change(tolerance, error), 0.2), 5.0), LONGEST)


def _change(tolerance: float, error: float) -> float:
    """By what factor a step may change, from its error: that is of order 3."""
    return 0.9 * math.cbrt(tolerance / max(error, 1e-300))
