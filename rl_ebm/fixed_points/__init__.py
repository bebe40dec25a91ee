"""What objectives converge to, in function space: closed forms, scalar roots, enumerated flows.

A fixed point is that of the exact expected gradient, from p_ref, with one logit for each state
and action: no network, no noise. What an agent ends at beyond it is capacity and sampling.
"""

from rl_ebm.fixed_points.closed_form import best_of_n
from rl_ebm.fixed_points.penalised import best_response, penalised
from rl_ebm.fixed_points.problem import FixedPoint, Penalty, Problem


def target(options: object, problem: Problem) -> FixedPoint:
    """The EBM itself: of every objective that is right."""
    return FixedPoint(problem.log_target)


__all__ = [
    "FixedPoint",
    "Penalty",
    "Problem",
    "best_of_n",
    "best_response",
    "penalised",
    "target",
]
