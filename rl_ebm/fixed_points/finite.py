r"""What finite numbers of responses make of a limit: resampling from n, advantages in groups of n.

Both are expectations over the n - 1 other responses, computed without drawing any.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.fixed_points.normalised import normalised
from rl_ebm.fixed_points.penalties import NOT_COMPUTED, in_loss, penalised, without_ratio
from rl_ebm.fixed_points.problem import FixedPoint, Penalty, Problem

MOST = 2**22
"""entries of the table of all groups, for which a limit of small groups is computed"""


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


def multisets(kinds: int, size: int) -> Float[Tensor, "M kinds"]:
    """How often each kind is in every multiset of a size."""
    rows = torch.zeros(1, 0, dtype=torch.float64)
    left = torch.tensor([float(size)], dtype=torch.float64)
    for kind in range(kinds):
        if kind == kinds - 1:
            return torch.cat([rows, left[:, None]], 1)
        repeats = (left + 1).long()
        rows, left = rows.repeat_interleave(repeats, 0), left.repeat_interleave(repeats)
        starts = repeats.cumsum(0) - repeats
        count = torch.arange(len(left)) - starts.repeat_interleave(repeats)
        rows, left = torch.cat([rows, count[:, None].double()], 1), left - count
    raise ValueError(f"kinds must be >= 1, got {kinds}")


def group_advantages(
    log_law: Float[Tensor, "N"], g: Float[Tensor, "N"], size: int, epsilon: float = 1e-6
) -> Float[Tensor, "N"]:
    """Expected (g(y) - mean) / std of a response in a group with size - 1 others from a law.

    Sums over every multiset of the others' values: C(V + size - 2, size - 1) of V values.
    """
    values, place = g.unique(return_inverse=True)
    p = torch.zeros_like(values).index_add(0, place, log_law.exp())
    others = multisets(len(values), size - 1)
    log_p = torch.where(others > 0, others * p.log(), 0.0).sum(1)
    log_p = log_p + math.lgamma(size) - torch.lgamma(others + 1).sum(1)
    found = []
    for value in values:
        # By differences: they are 0 exactly where all are alike, and std is next to nothing.
        apart = value - values
        off = others @ apart / size
        variance = (others @ apart.square() / size - off.square()).clamp(min=0.0)
        std = (variance * size / (size - 1)).sqrt()
        found.append((log_p.exp() * off / (std + epsilon)).sum())
    return torch.stack(found)[place]


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
    n = len(problem.g_responses[problem.allowed].unique())
    if penalty.place == "reward" or math.comb(n + size - 2, size - 1) * n > MOST:
        return FixedPoint(None, None, f"not computed for groups of {size}", sampler=True)
    try:
        law = group_fixed_point(
            problem, penalty.estimator, size, level=penalty.level, mean_tokens=penalty.mean_tokens
        )
    except RuntimeError:
        return FixedPoint(None, None, "not settled", sampler=True)
    return FixedPoint(law, how="iteration", sampler=True)
