r"""Fixed points where the loss of a response is the mean over its tokens, and responses end early.

Each response then weighs w(y) = 1 / |y|, and its baseline b = E_pi[g] no longer cancels: a state
moves by

    A(s, a) = E[w (g - b) | s, a] - E[w | s, a] kappa'(u(s, a))        kappa of each token

and an interior fixed point has the same A(s, a) = lambda_s for all its actions. With W the mean
of w behind an action and Q that of w (g - b),

    pi = p_ref exp((Q - lambda) / W)          k2 in the loss
    pi = p_ref W / (lambda - (Q - W))         k3 in the loss

backwards over the depths, with b found such that it is the policy's own E[g]. Of a whole response
the same holds with one action for each response; there k3 moves
nothing, as E kappa' = 0. With k1 in the reward the fixed point stays the
EBM: w (g - u - b) must be one number c for all responses, and E[g - u - b] = 0 = c E|y|. Without a
baseline b is 0, and it is p_ref exp(g - c |y|).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.fixed_points.closed_form import hyperbolic_rule
from rl_ebm.fixed_points.problem import Problem
from rl_ebm.soft_bellman import expectation, log_policy, sequence_log_probs

WeighedRule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(log_ref, q, w), each (n, A), to log pi"""


def softmax_rule(
    log_ref: Float[Tensor, "n A"], q: Float[Tensor, "n A"], w: Float[Tensor, "n A"]
) -> Float[Tensor, "n A"]:
    """log of pi = p_ref exp((q - lambda) / w), with lambda such that it sums to 1.

    Newton on the log of the sum, which is convex in lambda, from the left of its root.
    """
    start = (q + w * torch.logsumexp(log_ref, -1, keepdim=True)).masked_fill(
        torch.isneginf(log_ref), torch.inf
    )
    x = start.amin(-1, keepdim=True)
    log_pi = log_ref
    for _ in range(100):
        log_pi = log_ref + (q - x) / w
        mass = torch.logsumexp(log_pi, -1, keepdim=True)
        step = mass / ((log_pi - mass).exp() / w).sum(-1, keepdim=True)
        x = x + step.clamp(min=0.0)
        if bool((step <= 1e-15 * x.abs()).all()):
            break
    return log_policy(log_pi)


def weighed_hyperbolic_rule(
    log_ref: Float[Tensor, "n A"], q: Float[Tensor, "n A"], w: Float[Tensor, "n A"]
) -> Float[Tensor, "n A"]:
    """log of pi = p_ref w / (lambda - (q - w))."""
    return hyperbolic_rule(log_ref + w.log(), q - w)


RULES: dict[str, WeighedRule] = {"k2": softmax_rule, "k3": weighed_hyperbolic_rule}


def normalised(
    problem: Problem, estimator: str, level: str, scale: float, baseline: bool = True
) -> Float[Tensor, "N"]:
    """log-law of the fixed point, with rewards in nats divided by ``scale``.

    Args:
        baseline: whether b is E_pi[g], else 0.
    """
    sizes = [len(g) for g in problem.g]
    lengths = torch.cat([torch.full((n,), t + 1.0) for t, n in enumerate(sizes)]).double()
    g = problem.g_responses.masked_fill(~problem.allowed, 0.0)
    rule = RULES[estimator]

    def law(b: float) -> Tensor:
        gain = (g - b) / scale / lengths
        if level == "sequence":
            rows = (problem.log_ref_responses, gain, 1 / lengths)
            return rule(*(x[None] for x in rows))[0]
        return sequence_log_probs(_backward(problem, rule, gain, 1 / lengths), problem.space)

    def excess(b: float) -> float:
        return float(expectation(law(b), g).sum()) - b

    if not baseline:
        return law(0.0)
    allowed = g[problem.allowed]
    start = float(expectation(problem.start_law, g).sum())
    first = excess(start)
    end = float(allowed.max() if first > 0 else allowed.min())
    return law(_root(excess, start, end, first))


def _backward(
    problem: Problem, rule: WeighedRule, gain: Float[Tensor, "N"], weight: Float[Tensor, "N"]
) -> list[Tensor]:
    """log pi by depth, where gain and weight are those of each response."""
    found: list[Tensor] = []
    later: tuple[Tensor, Tensor] | None = None
    ends = zip(problem.at_ends(gain), problem.at_ends(weight), strict=True)
    for log_ref, parts in reversed(list(zip(problem.log_ref, ends, strict=True))):
        q, w = parts
        if later is not None:
            q, w = (
                x + problem.space.spread(v, fill=0.0) for x, v in zip(parts, later, strict=True)
            )
        forbidden = torch.isneginf(log_ref)
        q, w = q.masked_fill(forbidden, 0.0), w.masked_fill(forbidden, 1.0)
        log_pi = rule(log_ref, q, w)
        later = expectation(log_pi, q).sum(-1), expectation(log_pi, w).sum(-1)
        found.append(log_pi)
    return found[::-1]


def _root(f: Callable[[float], float], a: float, b: float, fa: float) -> float:
    """A root between a and b, where f has different signs: the secant method of Illinois."""
    fb = f(b)
    side = 0
    for _ in range(200):
        if fa == fb or abs(b - a) <= 1e-15 * max(abs(a), abs(b), 1e-300):
            break
        c = (a * fb - b * fa) / (fb - fa)
        fc = f(c)
        if fc == 0:
            return c
        if (fc > 0) == (fb > 0):
            b, fb, fa, side = c, fc, fa / 2 if side == 1 else fa, 1
        else:
            a, fa, fb, side = c, fc, fb / 2 if side == -1 else fb, -1
        if abs(fc) < 1e-14 * max(1.0, abs(c)):
            return c
    return a if abs(fa) < abs(fb) else b
