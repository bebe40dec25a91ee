r"""Where a policy gradient ends whose KL penalty, k2 or k3, stands in the reward.

At a fixed point g - kappa(u) is the same number c for all actions that are left at a state (of
all responses that are left, for a penalty of the response). kappa falls where u < 0, so that an
action that has become less likely than under p_ref loses more the rarer it gets. As a rule it is
driven out, only actions with u > 0 stay, and the limit is on the boundary; a common action of a
skewed p_ref can come to rest at u < 0, and the limit is inside. Which it is, and who stays,
depends on the way there. k3 of a rare action is exp(-u): times its probability that is p_ref, a
push that in exact expectation never fades and would bend the law of those that stay. But it comes
from draws of probability exp(u), which no sampler makes: an action that is driven out is taken to
be gone, with its push. So the flow from p_ref is followed, for a number of steps:

- until its gradient vanishes (:data:`FLAT`): the limit is where it stands, inside;
- or until the ones that stay are plain, and are the same :data:`LONGER` times later with the flow
  closer to the limit: the law on them is computed from kappa(u) = g - c and
  sum p_ref exp(u) = 1, to the last digits.
"""

from __future__ import annotations

import math
from itertools import islice

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_ebm.divergences import KL_TERMS, tv
from rl_ebm.fixed_points.flow import RAREST, by_depth, field, follow
from rl_ebm.fixed_points.problem import FixedPoint, Penalty, Problem
from rl_ebm.soft_bellman import forward_log_marginals, sequence_log_probs

STEPS = 400
"""steps after which a flow is given up; fewer where there are many responses, see :data:`WORK`"""
WORK = 5_000_000
"""entries of logits, summed over the steps, after which a flow is given up"""
CHECKED = 20
"""steps between two looks at who stays"""
NEAR = 0.02
"""total variation between the flow and a limit that it may have"""
LONGER = 2.0
"""time after which the limit must still be the same, in units of when it was first seen"""
SWING = 2e-3
"""total variation from its limit that the flow's own tolerance leaves"""
FLAT = 1e-10
"""largest entry of a gradient that has vanished"""
POLISH = 4000
"""steps at most to let a gradient vanish that has almost done so"""


def boundary_limit(problem: Problem, estimator: str, level: str) -> FixedPoint:
    """The limit from p_ref; without a law where the flow does not settle in its steps."""
    g = problem.g_responses[problem.allowed]
    if float(g.max() - g.min()) == 0:
        return FixedPoint(problem.start_law, sampler=True)
    key = (estimator, level)
    if key not in problem.limits:
        problem.limits[key] = _follow(problem, estimator, level)
    return problem.limits[key]


def _follow(problem: Problem, estimator: str, level: str) -> FixedPoint:
    penalty = Penalty(estimator, "reward", level)
    flow = follow(problem, penalty, tolerance=1e-3)
    seen: tuple[float, Tensor, float] | None = None  # when, what limit, how far from it
    before = 0.0
    steps = min(STEPS, max(CHECKED, WORK // sum(g.numel() for g in problem.g)))
    for i, (now, theta, slope) in enumerate(islice(flow, steps)):
        step, before = now - before, now
        if i % CHECKED != CHECKED - 1:
            continue
        log_pi = by_depth(problem, theta)
        log_law = sequence_log_probs(log_pi, problem.space)
        limit = settled(problem, log_pi, estimator, level)
        if limit is None:
            seen = None
            # At the 4th, 8th, 16th look: it costs many steps.
            look = (i + 1) // CHECKED
            if look >= 4 and look & (look - 1) == 0 and float(slope.abs().max()) < 1e-3:
                inside = _polished(problem, theta, penalty, step)
                if inside is not None:
                    return FixedPoint(inside, how="flow", sampler=True)
            continue
        far = float(tv(limit, log_law))
        if seen is None or float(tv(limit, seen[1])) > 1e-9:
            seen = (now, limit, far)
        elif now > LONGER * seen[0] and far <= max(0.75 * seen[2], SWING):
            return FixedPoint(limit, degenerate=True, how="flow", sampler=True)
    lost = _lost(problem, by_depth(problem, theta), penalty)
    return FixedPoint(None, degenerate=lost or None, how="not settled", sampler=True)


def _lost(problem: Problem, log_pi: list[Tensor], penalty: Penalty) -> bool:
    """Whether some action or response is so rare that nothing can bring it back.

    Its penalty is larger than all that rewards, and penalties of the likely ones, can differ by:
    it is punished more the rarer it gets.
    """
    term = KL_TERMS[penalty.estimator]
    g = problem.g_responses[problem.allowed]
    if penalty.level == "sequence":
        pairs = [(sequence_log_probs(log_pi, problem.space), problem.log_ref_responses)]
    else:
        pairs = list(zip(log_pi, problem.log_ref, strict=True))
    reach = float(g.max() - g.min())
    for _, log_ref in pairs:  # u is at most -log p_ref
        reach += float(term((-log_ref[~torch.isneginf(log_ref)]).clamp(min=0.0)).max())
    for p, log_ref in pairs:
        u = (p - log_ref).nan_to_num(nan=0.0).clamp(min=RAREST)
        if bool(((u < 0) & (term(u) > reach)).any()):
            return True
    return False


def _polished(
    problem: Problem, theta: Float[Tensor, "S A"], penalty: Penalty, step: float
) -> Float[Tensor, "N"] | None:
    """The law at which the gradient vanishes, where small steps of the flow make it do so.

    The flow's own steps are as long as their error allows, which near a rest is where they
    would begin to swing: a third of one does not.
    """
    step /= 3
    start = math.inf
    for i in range(POLISH):
        slope = field(problem, theta, penalty)
        largest = float(slope.abs().max())
        if largest < FLAT:
            return sequence_log_probs(by_depth(problem, theta), problem.space)
        if i % 100 == 0:  # on the way to the boundary it falls ever more slowly
            if largest > 0.7 * start:
                return None
            start = largest
        theta = theta + step * slope
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
