r"""Beyond the limit: the expected gradient at one law, and the exact variance of its estimates.

The variance of a gradient is the trace of its covariance, over all logits. Of one response it is
E |g(y)|^2 - |E g|^2. Where the advantages of a group of G are returns less the mean of the group,
or of the others, the gradient of the group is a mean over its pairs,

    sum_{i<j} h(y_i, y_j) / C(G, 2),   h(y, y') = (f - f')(s - s') / 2 + (k + k') / 2,

with f the returns, s the derivative of the loss's gradient by the advantage and k the rest of it.
So its variance is (4 (G - 2) z_1 + 2 z_2) / (G (G - 1)), z_1 = Var E[h | y], z_2 = Var h
(Hoeffding 1948): no group is drawn, and no pair. Elsewhere all groups are listed where they are
few, and drawn where they are many; then the variance has an interval.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.statistics.expectations import sample_interval
from rl_ebm.statistics.interval import Interval
from rl_ebm.studies.losses.distillation import Distillation
from rl_ebm.studies.losses.kinds import AnyFlow
from rl_ebm.studies.losses.policy_gradient import PolicyGradient
from rl_ebm.studies.losses.preference import Preference
from rl_ebm.studies.losses.responses import Responses, normalised

FAVOURED = 3
"""responses that are named"""
LISTED = 2**14
"""groups up to which all are listed"""
DRAWN = 4096
"""groups that are drawn where there are more"""
ENTRIES = 2**24
"""of gradients of groups that are kept at a time"""


@dataclass(frozen=True)
class Favoured:
    """A response that a gradient makes likelier."""

    tokens: list[int]
    rate: float
    """d probability / d time, where the logits move by minus the expected gradient"""


def norm(flow: AnyFlow, theta: Tensor) -> float:
    """Of the expected gradient, over all logits."""
    return float(flow.field(theta)[0].norm())


def favoured(flow: AnyFlow, theta: Tensor, size: float = 0.0) -> list[Favoured]:
    """The responses whose probability the expected gradient raises most; none where it is 0.

    Args:
        size: norm up to which the gradient is nothing but rounding.
    """
    r: Responses = flow.responses
    log_pi = normalised(theta, r.start)
    gradient = flow.field(theta)[0].masked_fill(torch.isneginf(log_pi), 0.0)
    if float(gradient.norm()) <= size:
        return []
    moved = -(gradient - (log_pi.exp() * gradient).sum(1, keepdim=True))
    rate = r.log_law(log_pi).exp() * r.at_tokens(moved).sum(1)
    best = rate.topk(min(FAVOURED, len(rate)))
    found = []
    for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if value > 0:
            found.append(Favoured(r.tokens[i][r.mask[i]].tolist(), value))
    return found


def variance_of_one(flow: AnyFlow, theta: Tensor) -> float:
    """Of the gradient by one response, or one pair: the trace of its covariance."""
    mean = float(flow.field(theta)[0].square().sum())
    return max(_second_moment(flow, theta) - mean, 0.0)


def _second_moment(flow: AnyFlow, theta: Tensor) -> float:
    r = flow.responses
    log_pi = normalised(theta, r.start)
    if isinstance(flow, PolicyGradient):
        c, log_mu = flow.weights(theta)
        return float(log_mu.exp() @ r.inner(c, c, log_pi))
    if isinstance(flow, Distillation):
        g, log_mu = flow.weights(theta)
        return float(log_mu.exp() @ g.masked_fill(~r.mask[..., None], 0.0).square().sum((1, 2)))
    return _of_pairs(flow, theta, log_pi)


def _of_pairs(flow: Preference, theta: Tensor, log_pi: Tensor) -> float:
    r = flow.responses
    log_mu, log_law = r.log_law(flow.who_draws(theta)), r.log_law(log_pi)
    one, total = torch.ones(r.mask.shape, dtype=torch.float64), 0.0
    square, drawn = r.inner(one, one, log_pi), flow.pairs_of(log_mu)
    numbers = torch.arange(len(log_mu))
    for block in drawn.blocks():
        x, y = drawn.at(log_law, block)
        own, other = block.both(square)
        products = block.flat(r.products(numbers[block.chosen], log_pi))
        each = x.square() * own + y.square() * other + 2 * x * y * products
        total += float(block.weighted(each).sum())
    return total


def variance_of_group(
    flow: AnyFlow, theta: Tensor, size: int, one: float | None = None
) -> float | Interval:
    """Of the mean gradient of a group of responses, or of so many pairs.

    Args:
        one: :func:`variance_of_one`, where it is known.

    Returns:
        The number, or an interval where groups had to be drawn.
    """
    if not isinstance(flow, PolicyGradient) or flow.advantages.combine == "none":
        return (variance_of_one(flow, theta) if one is None else one) / size
    if flow.advantages.combine != "std":
        parts = _affine(flow, theta)
        if parts is not None:
            share = (size - 1) / size if flow.advantages.combine == "mean" else 1.0
            return _of_statistic(flow, theta, (parts[0] * share, *parts[1:]), size)
    return _by_groups(flow, theta, size)


Affine = tuple[Float[Tensor, "N"], Float[Tensor, "N T"], Float[Tensor, "N T"]]
"""returns f, slope s and rest k of each response"""


def _row_gradients(flow: PolicyGradient, theta: Tensor, rows: Tensor, gain: Tensor) -> Tensor:
    """The loss's derivative by the log pi of the tokens of some responses, at some advantages."""
    r = flow.responses
    held = flow.who_draws(theta)
    log_pi = r.at_tokens(normalised(theta, r.start))
    old = r.at_tokens(held) if not flow.recomputed else log_pi
    mean = float(r.log_law(held).exp() @ r.lengths)
    mask = r.mask[rows]
    gain = gain[:, None].expand(mask.shape).masked_fill(~mask, 0.0)
    inputs = (log_pi[rows], old[rows], r.log_ref[rows], gain, mask)
    return flow.rows.gradients(inputs, r.lengths[rows], mean)[0]


def _returns(flow: PolicyGradient, theta: Tensor) -> Tensor:
    r = flow.responses
    held = flow.who_draws(theta)
    old = r.at_tokens(held if not flow.recomputed else normalised(theta, r.start))
    return flow.advantages.of_each(r.reward, old, r.log_ref, r.mask)


def _affine(flow: PolicyGradient, theta: Tensor) -> Affine | None:
    """The loss's gradient as s * advantage + k; None where it is not so."""
    returns = _returns(flow, theta)
    rows = torch.arange(len(returns))

    def at(advantage: Tensor) -> Tensor:
        return _row_gradients(flow, theta, rows, advantage)

    rest = at(torch.zeros_like(returns))
    slope = at(torch.ones_like(returns)) - rest
    off = at(returns) - rest - slope * returns[:, None]
    size = float(slope.abs().max()) * float(returns.abs().max()) + float(rest.abs().max())
    return None if float(off.abs().max()) > 1e-6 * size else (returns, slope, rest)


def _of_statistic(flow: PolicyGradient, theta: Tensor, parts: Affine, size: int) -> float:
    """The variance of the module's docstring, from moments."""
    r, (f, s, k) = flow.responses, parts
    log_pi = normalised(theta, r.start)
    mu = r.log_law(flow.who_draws(theta)).exp()

    def mean(values: Tensor) -> Tensor:  # of gradients, (S, A)
        return r.gradient(mu[:, None] * values, log_pi)

    def moment(weight: Tensor, x: Tensor, y: Tensor) -> float:
        return float((mu * weight) @ r.inner(x, y, log_pi))

    def dot(x: Tensor, y: Tensor) -> float:
        return float((x * y).sum())

    one, rows = torch.ones_like(f), f[:, None]
    of_f, of_s, of_k, of_fs = float(mu @ f), mean(s), mean(k), mean(rows * s)
    apart = moment(f.square(), s, s) - 2 * of_f * moment(f, s, s)
    apart += float(mu @ f.square()) * moment(one, s, s)
    apart -= 2 * (dot(mean(rows.square() * s), of_s) - dot(of_fs, of_fs))
    together = moment(one, k, k) + dot(of_k, of_k)
    mixed = moment(f, s, k) - of_f * moment(one, s, k)
    mixed += dot(of_fs, of_k) - dot(mean(rows * k), of_s)
    second = (2 * apart + 2 * together + 4 * mixed) / 4
    # E[h | y] = (u(y) - f S + E[f s] + K) / 2, u = (f - F) s + k.
    u, fixed = (rows - of_f) * s + k, of_fs + of_k
    total = fixed - of_f * of_s + mean(u)
    first = moment(one, u, u) + dot(fixed, fixed) - 2 * of_f * dot(fixed, of_s)
    first += float(mu @ f.square()) * dot(of_s, of_s)
    first += 2 * float(mu @ (r.against(u, fixed, log_pi) - f * r.against(u, of_s, log_pi)))
    z1, z2 = ((x - dot(total, total)) / 4 for x in (first, 4 * second))
    return max(4 * (size - 2) * z1 + 2 * z2, 0.0) / (size * (size - 1))


def _by_groups(flow: PolicyGradient, theta: Tensor, size: int) -> float | Interval:
    """Of all groups, or of many that are drawn."""
    r = flow.responses
    log_pi = normalised(theta, r.start)
    law = r.log_law(flow.who_draws(theta)).exp()
    count = len(law)
    listed = size * math.log(count) <= math.log(LISTED)
    if listed:
        groups = torch.tensor(list(itertools.product(range(count), repeat=size)))
        weight = law[groups].prod(1)
    else:
        generator = torch.Generator().manual_seed(0)
        groups = torch.multinomial(law, DRAWN * size, True, generator=generator).view(-1, size)
        weight = torch.full((DRAWN,), 1 / DRAWN, dtype=torch.float64)
    squares, mean = [], torch.zeros(r.start.numel(), dtype=torch.float64)
    kept = []
    step = max(1, ENTRIES // r.start.numel())
    for part, w in zip(groups.split(step), weight.split(step), strict=True):
        found = _group_gradients(flow, theta, log_pi, part)
        mean += w @ found
        kept.append(found)
        squares.append(found.square().sum(1))
    if listed:
        return max(float(weight @ torch.cat(squares)) - float(mean.square().sum()), 0.0)
    off = torch.cat([(x - mean).square().sum(1) for x in kept]) * DRAWN / (DRAWN - 1)
    return sample_interval(off, 0.95)


def _group_gradients(
    flow: PolicyGradient, theta: Tensor, log_pi: Tensor, groups: Tensor
) -> Float[Tensor, "M SA"]:
    """The mean gradient of each group, its advantages taken in the group."""
    r, (count, size) = flow.responses, groups.shape
    rows = groups.flatten()
    f = _returns(flow, theta)[groups]
    gain = f - f.mean(1, keepdim=True)
    if flow.advantages.combine == "leave-one-out":
        gain = gain * size / (size - 1)
    elif flow.advantages.combine == "std":
        spread = f.std(1, keepdim=True)
        # Of returns that are all alike rounding leaves a little, and a little over as little.
        alike = spread <= 1e-12 * f.abs().amax(1, keepdim=True)
        gain = (gain / (spread + flow.advantages.epsilon)).masked_fill(alike, 0.0)
    values = _row_gradients(flow, theta, rows, gain.flatten()) / size
    mask, states, tokens = r.mask[rows], r.states[rows], r.tokens[rows]
    where = torch.arange(count).repeat_interleave(size)[:, None].expand(mask.shape)
    num_states, num_actions = r.start.shape
    flat = (where * num_states + states)[mask]
    level = torch.zeros(count * num_states, dtype=torch.float64).index_add(0, flat, values[mask])
    table = torch.zeros(count * num_states * num_actions, dtype=torch.float64)
    table.index_add_(0, flat * num_actions + tokens[mask], values[mask])
    rows_of = table.view(count, num_states, num_actions)
    return (rows_of - log_pi.exp() * level.view(count, num_states, 1)).flatten(1)
