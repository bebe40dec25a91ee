r"""Where a policy gradient with a KL penalty ends: estimator, place and level each move it.

The reward is R, the penalty beta * kappa with u = log pi - log p_ref, of a response (level
"sequence") or of each of its tokens, summed (level "token"):

    k1 = u,  k2 = u^2 / 2,  k3 = exp(-u) - 1 + u            (http://joschu.net/blog/kl-approx.html)

In the **reward** the penalty has no gradient of its own, and the policy gradient is that of
E[(R / beta - kappa) grad log pi] with kappa held fixed: at an interior fixed point R / beta -
kappa is constant. For k1 that is the EBM. k2 and k3 grow on both sides of u = 0, so that a
response that has become less likely than under p_ref is punished for it: as a rule it is driven
out, and the limit is on the boundary (:mod:`rl_ebm.fixed_points.boundary`).

In the **loss** the gradient is that of kappa itself at the responses drawn, which leaves out how
the draws depend on pi: E[kappa'(u) grad log pi], that is nothing for k1 (E grad log pi = 0: no
penalty is left), grad KL(pi, p_ref) for k2, grad KL(p_ref, pi) for k3. Of a whole response this
is the EBM for k2, and p_ref / (lambda - R / beta) for k3. Token by token it is the same at each
state, but the states visited are not weighed by what they will cost: the rule of
:mod:`rl_ebm.fixed_points.closed_form` with the plain return Q, backwards over the depths.
**Times the ratio** pi / pi_old the slope is kappa + kappa': u for k3, u + 1 for k1, which both
end where k2 does (E grad log pi = 0); u + u^2 / 2 for k2, which has no closed form.

**Advantages divided by their standard deviation** (GRPO, arXiv 2402.03300) weigh R by 1 / sigma
against a penalty of beta: the fixed point is that of beta sigma in the place of beta, with sigma
the standard deviation of R under that very policy. With the penalty in the reward they scale
the whole gradient, and move nothing.

**The mean over a response's tokens**, where responses end early, weighs short ones up:
:mod:`rl_ebm.fixed_points.normalised`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.fixed_points.boundary import boundary_limit
from rl_ebm.fixed_points.closed_form import hyperbolic_rule, softmax_rule
from rl_ebm.fixed_points.normalised import normalised
from rl_ebm.fixed_points.problem import FixedPoint, Penalty, Problem
from rl_ebm.soft_bellman import expectation, sequence_log_probs

RULES = {"k2": softmax_rule, "k3": hyperbolic_rule}
Law = Callable[[Problem, float], Tensor]
"""log-law of a problem with its rewards divided by a scale"""
NOT_COMPUTED = FixedPoint(None, degenerate=None, how="not computed", sampler=True)


def penalised(problem: Problem, penalty: Penalty) -> FixedPoint:
    """The limit from p_ref of the expected policy gradient."""
    plain = without_ratio(problem, penalty)
    if plain is None:
        return NOT_COMPUTED
    estimator, place, level, group_std, mean_tokens, baseline, _ = plain
    shortened = mean_tokens and problem.space.eos_id is not None
    if place == "reward":
        if estimator == "k1" and (baseline or not shortened):
            # g - u is one number, whoever drew the response; it is 0 with the baseline taken off.
            return FixedPoint(problem.log_target, sampler=not baseline)
        if estimator == "k1":  # w (g - u) is one number, as for k2 of the response in the loss
            scaled = normalised(problem, "k2", "sequence", 1.0, baseline)
            return FixedPoint(scaled, how="root", sampler=not baseline)
        if shortened:
            return NOT_COMPUTED
        return boundary_limit(problem, estimator, level)
    if estimator == "k1":
        if shortened:  # E[w grad log pi] is not 0: long responses are paid for being long
            return NOT_COMPUTED
        return best_response(problem)

    def law(case: Problem, scale: float) -> Tensor:
        if shortened:
            return normalised(case, estimator, level, scale, baseline)
        return in_loss(case, estimator, level, scale)

    if group_std:
        return _group_scaled(problem, law)
    how = "root" if shortened else "closed form"
    return FixedPoint(law(problem, 1.0), how=how, sampler=True)


def without_ratio(problem: Problem, penalty: Penalty) -> Penalty | None:
    """The penalty without a ratio that has the same expected gradient; None where none has."""
    if not penalty.ratio:
        return penalty
    shortened = penalty.mean_tokens and problem.space.eos_id is not None
    # With weights that go by length the 1 of u + 1 pays for long responses.
    if penalty.estimator == "k2" or (penalty.estimator == "k1" and shortened):
        return None
    return penalty._replace(estimator="k2", ratio=False)


def best_response(problem: Problem) -> FixedPoint:
    """The response of largest reward alone; p_ref where all are equal and nothing has a gradient.

    Where several tie, some of them stay, and which depends on the way there: no law is given.
    """
    g = problem.g_responses
    best = problem.allowed & (g == g[problem.allowed].max())
    if bool((best == problem.allowed).all()):
        return FixedPoint(problem.start_law, sampler=True)
    if int(best.sum()) > 1:
        return FixedPoint(None, degenerate=True, how="several best responses", sampler=True)
    return FixedPoint(torch.zeros_like(g).masked_fill(~best, -torch.inf), True, sampler=True)


def in_loss(problem: Problem, estimator: str, level: str, scale: float) -> Float[Tensor, "N"]:
    """log-law of k2 or k3 in the loss, rewards divided by ``scale``."""
    rule = RULES[estimator]
    if level == "token":
        return sequence_log_probs(problem.backward(rule, scale), problem.space)
    log_ref, g = problem.log_ref_responses, problem.g_responses
    return rule(log_ref[None], g[None] / scale)[0]


def deviation(log_law: Float[Tensor, "N"], g: Float[Tensor, "N"]) -> float:
    """Standard deviation of g under a law."""
    off = g - expectation(log_law, g).sum()
    # Squares leave float64 long before the numbers do.
    unit = off.masked_fill(torch.isneginf(log_law), 0.0).abs().max()
    if not float(unit) > 0:
        return 0.0
    return float(unit * expectation(log_law, (off / unit).square()).sum().sqrt())


def _group_scaled(problem: Problem, law_of: Law, points: int = 60) -> FixedPoint:
    """Roots s of sigma(law of R / (beta s)) = s, and the one that p_ref leads to.

    R and its standard deviation s under the law are in units of R's range, whatever size that is.
    """
    start, beta = problem.start_law, problem.beta
    allowed = problem.g_responses[problem.allowed]
    span = float(allowed.max() - allowed.min())
    if span == 0:  # a constant reward: no advantage, the penalty alone
        return FixedPoint(start, sampler=True)
    case = problem.with_returns(problem.g_responses / span)
    g = case.g_responses
    first = deviation(start, g)

    def law(scale: float) -> Tensor:
        return law_of(case, beta * scale)

    def excess(scale: float) -> float:
        return deviation(law(scale), g) / scale - 1

    # sigma is at most half of the range of g; below, the law is all but deterministic.
    powers = torch.logspace(0, -8, points, dtype=torch.float64)
    grid = sorted([*powers.tolist(), first])
    values = [excess(s) for s in grid]
    roots = [
        _bisect(excess, low, high)
        for low, high, a, b in zip(grid, grid[1:], values, values[1:], strict=False)
        if (a > 0) != (b > 0)
    ]
    at_first = values[grid.index(first)]
    ahead = [s for s in roots if (s > first) == (at_first > 0)]
    if not ahead:  # nothing stops the scale from falling to 0
        return replace(best_response(problem), other_roots=tuple(law(s) for s in roots))
    reached = min(ahead) if at_first > 0 else max(ahead)
    others = tuple(law(s) for s in roots if s != reached)
    return FixedPoint(law(reached), how="root", other_roots=others, sampler=True)


def _bisect(f: Callable[[float], float], low: float, high: float) -> float:
    """A root between two points where f has different signs, to the last digits."""
    sign = f(low) > 0
    for _ in range(200):
        middle = (low * high) ** 0.5
        if not low < middle < high:
            break
        low, high = (middle, high) if (f(middle) > 0) == sign else (low, middle)
    return low
