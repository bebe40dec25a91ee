"""How states move that do not see each other: each by its own logits, over how often it is visited.

Token-level distillation gives each state a gradient of its own logits, times how often the state is
visited. Whether a loss does is tried on all responses, for a kink that only half of them reach
would not show on a few: what it gives a state may not change with the logits of others, nor with
the tokens before and after; in the mean over a row's tokens it is one over their number. It may
with the state's own token where one law draws all rows, since then the state's own logits alone say
how often that is drawn there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl_ebm.studies.losses.contract import LossError
from rl_ebm.studies.losses.distillation import Distillation
from rl_ebm.studies.losses.flow import GONE, Field
from rl_ebm.studies.losses.responses import Responses

SIZES = (0.25, 0.25, 0.25, 3.0, 3.0, 3.0)
"""nats of noise on logits where a loss is tried: the reference's, the teacher's and the end's"""
APART = 1e-5
"""of a state's gradient, what others may do to it: rounding, also of float32"""
SAME = 1e-9
"""of the largest gradient, what rounding does in float64"""
Gradients = Float[Tensor, "N T A"]


@dataclass(frozen=True)
class Alone:
    """States that do not see each other.

    Attributes:
        per_visit: logits to the gradient of each state's logits, (S, A) both, in units of how often
            the state is visited; but for a factor, which is how fast the state's own clock goes.
        cost: rows that the loss is given for that.
        rough: whether the loss computes in float32.
    """

    responses: Responses
    per_visit: Callable[[Tensor], Tensor]
    cost: int
    rough: bool


def alone_of(flow: Field, theta: Float[Tensor, "S A"]) -> Alone | None:
    """How each state moves by itself; None where it hangs on others, and of losses of responses.

    Args:
        theta: logits at a kink or an end, where a loss is tried as well: it is there that what
            states do to each other must show.
    """
    if not isinstance(flow, Distillation):
        return None
    r = flow.responses
    ones, by_token = torch.ones_like(r.lengths), r.states * r.start.shape[1] + r.tokens
    keys = [(r.states, ones), (r.states, r.lengths), (by_token, ones)]
    off = torch.zeros(len(keys), 2)
    try:
        for given in _tried(flow, theta):
            if given is None:
                return None
            off = off.maximum(torch.tensor([_off(r, given, *key) for key in keys]))
    except LossError:
        return None
    for (_, scale), (of_all, _) in zip(keys[:2], off.tolist(), strict=False):
        if of_all <= SAME:
            return _by_few(flow, scale)
    one_law = flow.drawn is not None or flow.student in (0.0, 1.0)
    if float(off[:, 1][: 3 if one_law else 2].min()) <= APART:
        return Alone(r, lambda x: over_visits(*flow.field(x)), flow.cost, flow.rows.rough)
    return None


def over_visits(gradient: Float[Tensor, "S A"], mass: Float[Tensor, "S A"]) -> Float[Tensor, "S A"]:
    """A gradient over how often each state is visited; 0 where it never is."""
    return gradient / mass.sum(1, keepdim=True).clamp(min=1e-290)


def _given(flow: Distillation, theta: Tensor, which: Tensor | None = None) -> Gradients:
    """The loss's derivative by the logits before each token, of rows that count 1 together."""
    lengths = flow.responses.lengths
    lengths = lengths if which is None else lengths[which]
    return flow.rows.gradients(flow.inputs(theta, which), lengths, 1.0)[0]


def _tried(flow: Distillation, end: Tensor) -> Iterator[Gradients | None]:
    """What it gives at some logits; None where that moves with the logits of others."""
    r = flow.responses
    if flow.rows.combination == "both" and len(r.lengths.unique()) > 1:
        yield None  # how many tokens there are in the mean weighs the two
    generator = torch.Generator().manual_seed(0)
    for base, size in product((r.start, flow.teacher, end), SIZES):
        half = torch.rand(len(base), 1, generator=generator) < 0.5
        here, there = (
            size * torch.randn(base.shape, generator=generator, dtype=torch.float64)
            for _ in range(2)
        )
        theta = base.clamp(min=GONE) + here
        now = _given(flow, theta)
        least = _sizes(r, now)[r.states]
        for moved in (half, ~half):
            off = (_given(flow, theta + there * moved) - now).abs().amax(2)
            if bool((off > APART * least)[r.mask & ~moved[r.states, 0]].any()):
                yield None
        yield now


def _sizes(r: Responses, given: Gradients) -> Float[Tensor, "S"]:
    """The largest gradient at each state; not less than rounding makes of the largest of all."""
    by_token = given.abs().amax(2).masked_fill(~r.mask, 0.0)
    most = torch.zeros(len(r.start), dtype=given.dtype)
    most = most.scatter_reduce(0, r.states.flatten(), by_token.flatten(), "amax")
    return most.clamp(min=max(SAME * float(most.max()), 1e-290))


def _off(r: Responses, given: Gradients, key: Int64[Tensor, "N T"], scale: Tensor) -> list[float]:
    """What differs where keys are the same: in shares of the largest gradient, and a state's."""
    given = given * scale[:, None, None]
    places = torch.arange(key.numel()).view_as(key)
    first = torch.full((int(key.max()) + 1,), key.numel())
    first = first.scatter_reduce(0, key[r.mask], places[r.mask], "amin")
    same = given.flatten(0, 1)[first[key].clamp(max=key.numel() - 1)]
    off = (given - same).abs().amax(2)[r.mask]
    sizes = _sizes(r, given)
    return [float((off / size).max()) for size in (sizes.max(), sizes[r.states[r.mask]])]


def _by_few(flow: Distillation, scale: Float[Tensor, "N"]) -> Alone:
    """By a few rows, where each that passes a state gives it the same, but for its scale."""
    r = flow.responses
    few = few_of(r.states, r.mask, len(r.start))
    # Whoever draws: which states that ever passes does not hang on the student's finite logits.
    visited = few.passed & (r.mass(flow.log_mu(r.start)).sum(1) > 0)

    def per_visit(theta: Tensor) -> Tensor:
        given = _given(flow, theta, few.rows) * scale[few.rows, None, None]
        return given[few.row, few.step] * visited[:, None]

    return Alone(r, per_visit, len(few.rows), flow.rows.rough)


@dataclass(frozen=True)
class Few:
    """Rows that pass all states that any row passes, and where each of these is."""

    rows: Int64[Tensor, "n"]
    row: Int64[Tensor, "S"]
    """which of the rows passes a state,"""
    step: Int64[Tensor, "S"]
    """before which of its tokens"""
    passed: Bool[Tensor, "S"]


def few_of(states: Int64[Tensor, "N T"], mask: Bool[Tensor, "N T"], count: int) -> Few:
    """A row for each last state, and more for what these do not pass.

    Args:
        states: id of the state before each token.
        mask: of the tokens of each row.
        count: number of states.
    """
    n, steps = states.shape
    chosen: list[int] = []
    row, step = (torch.zeros(count, dtype=torch.long) for _ in range(2))
    passed = torch.zeros(count, dtype=torch.bool)
    for t in reversed(range(steps)):
        those = mask[:, t].nonzero()[:, 0]
        first = torch.full((count,), n).scatter_reduce(0, states[those, t], those, "amin")
        new = first[(first < n) & ~passed]
        numbers = torch.arange(len(chosen), len(chosen) + len(new))
        for u in range(t + 1):
            row[states[new, u]], step[states[new, u]] = numbers, u
            passed[states[new, u]] = True
        chosen += new.tolist()
    return Few(torch.tensor(chosen, dtype=torch.long), row, step, passed)
