"""What objectives converge to, in function space: closed forms, scalar roots, enumerated flows.

A fixed point is that of the exact expected gradient, from p_ref, with one logit for each state
and action: no network, no noise. What an agent ends at beyond it is capacity and sampling.
"""

from rl_ebm.fixed_points.closed_form import best_of_n
from rl_ebm.fixed_points.distillation import Distillation, distilled
from rl_ebm.fixed_points.finite import penalised_in_groups, resampled_law
from rl_ebm.fixed_points.penalties import best_response, penalised
from rl_ebm.fixed_points.preferences import dpo_limit, ipo_limit
from rl_ebm.fixed_points.problem import FixedPoint, Penalty, Problem
from rl_ebm.fixed_points.stand_in import forbids, law_of, stand_ins


def target(options: object, problem: Problem) -> FixedPoint:
    """The EBM itself, whatever the options: it is stated, and nothing is computed."""
    return FixedPoint(problem.log_target, how="stated")


__all__ = [
    "Distillation",
    "FixedPoint",
    "Penalty",
    "Problem",
    "best_of_n",
    "best_response",
    "distilled",
    "dpo_limit",
    "forbids",
    "ipo_limit",
    "law_of",
    "penalised",
    "penalised_in_groups",
    "resampled_law",
    "stand_ins",
    "target",
]
