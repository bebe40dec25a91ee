r"""Where losses of pairs end whose labels are Bradley and Terry's: P(y over y') = sigma(R - R').

With h = log pi - log p_ref of a response, pairs of independent draws from mu to one prompt, and
f(h - h') the loss of the pair, the gradient of log pi(y) is mu(y) times a mean over y' ~ mu,

    DPO:  E[sigma(beta (h - h')) - P_eps] = 0,   P_eps = (1 - eps) P + eps (1 - P)
    IPO:  E[h - h' - (2 P - 1) / (2 tau)] = 0.

DPO has it at beta h = R + c, the EBM, whatever mu (Rafailov et al. 2023, arXiv 2305.18290, Sec. 4);
with smoothed labels (eps > 0) logit P_eps is no difference of two numbers, and the root depends on
mu. IPO is linear: h = E_mu[P(y over y')] / tau + c (Azar et al. 2023, arXiv 2310.12036, Eq. 11).
Where the policy itself draws, mu = pi and both are equations for pi: that of IPO is the Nash
equilibrium of the regularised game (Calandriello et al. 2024, arXiv 2403.08635). Responses of
equal reward have equal h, so that all of it is over the values of the reward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.fixed_points.problem import FixedPoint, Problem

MOST, MOST_SMOOTHED = 2**14, 2**10
"""values of the reward for which a limit is computed; where a system of their number is solved"""
WORK = 2**32
"""pairs of values, over all iterations, after which one is given up"""
EXACT = 1e-14
"""change of a law in an iteration that has ended"""


def dpo_limit(problem: Problem, smoothing: float, online: bool) -> FixedPoint:
    """The limit of DPO with temperature beta; of smoothed labels where ``smoothing`` > 0.

    Args:
        online: whether the policy draws the pairs, else p_ref.
    """
    if smoothing == 0:
        return FixedPoint(problem.log_target)
    value, log_ref, log_mu, place = by_value(problem)
    if len(value) > MOST_SMOOTHED:
        return FixedPoint(None, None, "not computed", sampler=True)
    wanted = (1 - 2 * smoothing) * torch.sigmoid(value[:, None] - value) + smoothing

    def h(log_law: Tensor, before: Tensor) -> Tensor:
        return smoothed_root(log_law.exp(), wanted, before * problem.beta) / problem.beta

    found = _ended(problem, log_ref, log_mu, place, h, online, 0.5)
    return found if found.log_law is None else replace(found, how="iteration")


def ipo_limit(problem: Problem, tau: float, online: bool) -> FixedPoint:
    """The limit of IPO; ``online`` as above."""
    value, log_ref, log_mu, place = by_value(problem)
    if len(value) > MOST:
        return FixedPoint(None, None, "not computed", sampler=True)

    def h(log_law: Tensor, before: Tensor) -> Tensor:
        law = log_law.exp()
        rows = [torch.sigmoid(part[:, None] - value) @ law for part in value.split(256)]
        return torch.cat(rows) / tau

    # The linear part is antisymmetric and turns: the step is what its size allows.
    return _ended(problem, log_ref, log_mu, place, h, online, 1 / (1 + (0.25 / tau) ** 2))


def by_value(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The values of R, log p_ref and log of the start's mass of each, the value of each response.

    What p_ref forbids has no mass, and the value of another.
    """
    allowed = problem.allowed
    reward = problem.g_responses * problem.beta
    value, place = torch.where(allowed, reward, reward[allowed][0]).unique(return_inverse=True)
    zero = torch.zeros_like(value)
    masses = []
    for log_p in (problem.log_ref_responses, problem.start_law):
        top = log_p[allowed].max()
        masses.append(zero.index_add(0, place, (log_p - top).exp()).log() + top)
    return value, masses[0], masses[1], place


def _ended(
    problem: Problem,
    log_ref: Float[Tensor, "V"],
    log_mu: Float[Tensor, "V"],
    place: Tensor,
    h: Callable[[Tensor, Tensor], Tensor],
    online: bool,
    step: float,
) -> FixedPoint:
    """The law p_ref exp(h), of pairs from mu; or h iterated on the law itself."""
    found = h(log_mu, torch.zeros_like(log_mu))
    if online:
        for _ in range(max(1, min(20_000, WORK // len(log_mu) ** 2))):
            new = h(torch.log_softmax(log_ref + found, 0), found)
            before, found = found, found + step * (new - found)
            a, b = (torch.softmax(log_ref + x, 0) for x in (before, found))
            if float((a - b).abs().sum()) < EXACT:
                break
        else:
            return FixedPoint(None, None, "not settled", sampler=True)
    law = torch.log_softmax(problem.log_ref_responses + found[place], 0)
    return FixedPoint(law, how="iteration" if online else "closed form", sampler=True)


def smoothed_root(
    w: Float[Tensor, "V"], wanted: Float[Tensor, "V V"], x: Float[Tensor, "V"]
) -> Float[Tensor, "V"]:
    """x with sum_j w_j (sigma(x_i - x_j) - wanted_ij) = 0 and sum w x = 0: Newton, step halved.

    It is where a convex sum over pairs is least.
    """

    def slope(x: Tensor) -> Tensor:
        return (torch.sigmoid(x[:, None] - x) - wanted) @ w

    off = slope(x)
    for _ in range(200):
        s = torch.sigmoid(x[:, None] - x)
        s = s * (1 - s)
        # w w^T: a constant has no slope, and is kept at 0.
        matrix = torch.diag(s @ w) - s * w + w
        move = torch.linalg.solve(matrix, off + (w @ x))
        size, new = 1.0, x - move
        while size > 1e-6 and float((slope(new).abs() * w).sum()) > float((off.abs() * w).sum()):
            size, new = size / 2, x - size / 2 * move
        x, off = new, slope(new)
        if float(move.abs().max()) < 1e-13 * (1 + float(x.abs().max())):
            break
    return x
