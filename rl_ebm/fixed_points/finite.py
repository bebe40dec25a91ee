r"""What finite numbers of responses make of a limit: resampling from n, advantages in groups of n.

Both are expectations over the n - 1 other responses, computed without drawing any.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.fixed_points.groups import group_advantages
from rl_ebm.fixed_points.normalised import normalised
from rl_ebm.fixed_points.penalties import NOT_COMPUTED, in_loss, penalised, without_ratio
from rl_ebm.fixed_points.problem import FixedPoint, Penalty, Problem


def resampled_law(
    log_proposal: Float[Tensor, "N"], log_weight: Float[Tensor, "N"], n: int, points: int = 4000
) -> Float[Tensor, "N"]:
    r"""log-law of a response drawn from n proposals with probability w / sum w (SIR).

    With phi(t) = E[exp(-t w)] under the proposal b, and 1 / S = int exp(-t S) dt,

        P(y) = n b(y) w(y) int exp(-t w(y)) phi(t)^(n - 1) dt,

    by the trapezoidal rule in log t, which converges exponentially here. Its bias is what fitting
    such samples ends at, instead of w b / sum w b.

    Args:
        log_proposal: log b of every response, summing to 1.
        log_weight: log w of every response; any constant may be added.
    """
    log_proposal = torch.log_softmax(log_proposal, 0)
    allowed = ~(torch.isneginf(log_proposal) | torch.isneginf(log_weight))
    # What is never proposed may weigh anything: 0 times inf is nan.
    log_w = (log_weight - log_weight[allowed].max()).masked_fill(~allowed, -torch.inf)
    w, b = log_w.exp(), log_proposal.exp()
    # exp(-t w) is 1 or 0 to all digits beyond these, for every w that is drawn at all.
    mean = float((b * w).sum())
    low, high = math.log(1e-12 / n), math.log(1e3 / mean) + 12.0
    log_t = torch.linspace(low, high, points, dtype=torch.float64)
    t, step = log_t.exp(), float(log_t[1] - log_t[0])
    total = torch.zeros_like(w)
    for part in t.split(max(1, 2**24 // len(w))):
        decay = torch.exp(-part[:, None] * w)
        phi = decay @ b
        total += (part * phi ** (n - 1) * step) @ decay
    law = math.log(n) + log_proposal + log_w + total.log()
    return torch.log_softmax(law.masked_fill(~allowed, -torch.inf), 0)


def group_fixed_point(
    problem: Problem,
    estimator: str,
    size: int,
    iterations: int = 500,
    level: str = "token",
    mean_tokens: bool = False,
) -> Float[Tensor, "N"]:
    """log-law that group-standardised advantages of groups of a size end at.

    The penalty, k2 or k3, is in the loss. The plain return of the closed form is here the expected
    advantage over beta, under the law itself: iterated to its fixed point.

    Args:
        level: "token" or "sequence", what the penalty is of.
        mean_tokens: whether the loss of a response is the mean over its tokens.

    Raises:
        OverflowError: groups whose advantages cannot be computed.
        RuntimeError: the iteration does not settle.
    """
    law = problem.start_law
    # What is never drawn adds no value of its own.
    g = torch.where(problem.allowed, problem.g_responses, problem.g_responses[problem.allowed][0])
    for _ in range(iterations):
        case = problem.with_returns(group_advantages(law, g, size) / problem.beta)
        new = (
            normalised(case, estimator, level, 1.0, baseline=False)
            if mean_tokens and problem.space.eos_id is not None
            else in_loss(case, estimator, level, 1.0)
        )
        change = float((new.exp() - law.exp()).abs().max())
        law = torch.log_softmax(torch.logaddexp(new, law), 0)  # half a step
        if change < 1e-12:
            return law
    raise RuntimeError(f"the fixed point of groups of {size} was not found: {change:.1e} left")


def penalised_in_groups(problem: Problem, penalty: Penalty, size: int, own: bool) -> FixedPoint:
    """The limit from p_ref where advantages are those of groups of a size.

    Args:
        own: whether the mean that is taken off a return has that return in it.
    """
    if not penalty.group_std:
        if own and penalty.place == "loss":
            # g - mean is (size - 1) / size of g less the mean of the others; kappa is not scaled.
            problem = problem.with_returns(problem.g_responses * (size - 1) / size)
        return penalised(problem, penalty)
    if penalty.ratio:
        plain = without_ratio(problem, penalty)
        return NOT_COMPUTED if plain is None else penalised_in_groups(problem, plain, size, own)
    if penalty.estimator == "k1":
        # In the reward the EBM has equal returns in every group; in the loss the best response
        # is above the mean of every group, as in large ones.
        return penalised(problem, penalty)
    unknown = FixedPoint(None, None, f"not computed for groups of {size}", sampler=True)
    if penalty.place == "reward":
        return unknown
    try:
        law = group_fixed_point(
            problem, penalty.estimator, size, level=penalty.level, mean_tokens=penalty.mean_tokens
        )
    except OverflowError:
        return unknown
    except RuntimeError:
        return FixedPoint(None, None, "not settled", sampler=True)
    return FixedPoint(law, how="iteration", sampler=True)
