r"""Where a policy gradient ends whose KL penalty, k2 or k3, stands in the reward: on the boundary.

At a fixed point g - kappa(u) is the same number c for all actions that are left at a state (of
all responses that are left, for a penalty of the response). kappa falls where u < 0, so that an
action that has become less likely than under p_ref loses more the rarer it gets: it is driven
out, and only actions with u > 0 stay. Which ones do depends on the way there. So the flow from
p_ref is followed until the ones that stay are plain, and the law on them is computed from
kappa(u) = g - c and sum p_ref exp(u) = 1, to the last digits.
"""

from __future__ import annotations

import time

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_ebm.divergences import tv
from rl_ebm.fixed_points.flow import by_depth, follow
from rl_ebm.fixed_points.problem import FixedPoint, Penalty, Problem
from rl_ebm.soft_bellman import forward_log_marginals, sequence_log_probs

SECONDS = 5.0
"""time after which a flow is given up"""
NEAR = 0.02
"""total variation between the flow and its limit at which it has arrived"""


def boundary_limit(problem: Problem, estimator: str, level: str) -> FixedPoint:
    """The limit from p_ref; without a law where the flow does not settle in time."""
    g = problem.g_responses[problem.allowed]
    if float(g.max() - g.min()) == 0:
        return FixedPoint(torch.log_softmax(problem.log_ref_responses, 0))
    key = (estimator, level)
    if key not in problem.limits:
        law = _follow(problem, estimator, level)
        how = "not settled" if law is None else "flow"
        problem.limits[key] = FixedPoint(law, degenerate=True, how=how)
    return problem.limits[key]


def _follow(problem: Problem, estimator: str, level: str) -> Tensor | None:
    end = time.monotonic() + SECONDS
    flow = follow(problem, Penalty(estimator, "reward", level), tolerance=1e-3)
    for i, (_, theta, _) in enumerate(flow):
        if i % 20 == 19:
            law = settled(problem, by_depth(problem, theta), estimator, level)
            if law is not None:
                return law
        if time.monotonic() > end:
            break
    return None


def settled(problem: Problem, log_pi: list[Tensor], estimator: str, level: str) -> Tensor | None:
    """The law of the limit, where a point of the flow leaves no doubt about who stays."""
    log_law = sequence_log_probs(log_pi, problem.space)
    if level == "sequence":
        log_ref = problem.log_ref_responses[None]
        found, c = staying(log_ref, problem.g_responses[None], _stays(log_law - log_ref), estimator)
        limit, solved = found[0], not bool(c.isnan().any())
    else:
        tables: list[Tensor] = []
        values: list[Tensor] = []
        for g, log_ref, p in reversed(list(zip(problem.g, problem.log_ref, log_pi, strict=True))):
            w = g + problem.space.spread(values[-1], fill=0.0) if values else g
            w = w.masked_fill(torch.isneginf(log_ref), 0.0)
            found, c = staying(log_ref, w.nan_to_num(), _stays(p - log_ref), estimator)
            tables.append(found)
            values.append(c)
        marginals = forward_log_marginals(tables[::-1], problem.space)
        # Where the limit never is, nothing needs to balance.
        solved = not any(
            bool((c.isnan() & ~torch.isneginf(m)).any())
            for c, m in zip(values[::-1], marginals, strict=True)
        )
        limit = sequence_log_probs(tables[::-1], problem.space)
    return limit if solved and bool(tv(limit, log_law) < NEAR) else None


def _stays(u: Float[Tensor, "n A"]) -> Bool[Tensor, "n A"]:
    """Actions that have become likelier; the likeliest of these ratios where none has."""
    u = u.nan_to_num(nan=-torch.inf)
    return (u > 0) | (u == u.amax(-1, keepdim=True))


def staying(
    log_ref: Float[Tensor, "n A"],
    w: Float[Tensor, "n A"],
    stays: Bool[Tensor, "n A"],
    estimator: str,
) -> tuple[Float[Tensor, "n A"], Float[Tensor, "n"]]:
    """log pi on the actions that stay, and c: kappa(u) = w - c with u >= 0, sum of pi 1.

    c is nan where no such policy exists.
    """
    inverse = {"k2": _inverse_k2, "k3": _inverse_k3}[estimator]
    high = w.masked_fill(~stays, torch.inf).amin(-1)
    low = high - 1.0

    def mass(c: Tensor) -> Tensor:
        x = (w - c[:, None]).clamp(min=0.0)
        return (log_ref + inverse(x)).masked_fill(~stays, -torch.inf).logsumexp(-1)

    for _ in range(60):  # until there is too much mass at low
        short = mass(low) < 0
        low = torch.where(short, high - 2 * (high - low), low)
        if not bool(short.any()):
            break
    for _ in range(100):
        middle = (low + high) / 2
        over = mass(middle) > 0
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    u = inverse((w - low[:, None]).clamp(min=0.0))
    log_pi = (log_ref + u).masked_fill(~stays, -torch.inf)
    c = low.masked_fill(mass(low).abs() > 1e-6, torch.nan)
    return torch.log_softmax(log_pi, -1), c


def _inverse_k2(x: Tensor) -> Tensor:
    """u >= 0 with u^2 / 2 = x."""
    return (2 * x).sqrt()


def _inverse_k3(x: Tensor) -> Tensor:
    """u >= 0 with exp(-u) - 1 + u = x: Newton from the right, where it is convex."""
    u = x + (2 * x).sqrt()
    for _ in range(60):
        u = u - (torch.expm1(-u) + u - x) / (-torch.expm1(-u)).clamp(min=1e-300)
    return u.masked_fill(x == 0, 0.0)
