"""The expected gradient of a distillation loss, of all responses at once: by the logits.

A loss that reads nothing but the logits of each state gives a state the same on every row that
passes it. Then a few rows tell how each state moves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl_ebm.studies.losses.contract import Inputs, LossError
from rl_ebm.studies.losses.responses import Responses, normalised, over_visits
from rl_ebm.studies.losses.rows import Rows

FORBIDDEN = -1e4
"""logit of what the reference forbids: probability 0, and no 0 * inf in anybody's loss"""
SIZES = (0.25, 3.0)
"""nats of noise on the reference's logits where it is tried what a loss reads, and"""
SAME = 1e-9
"""of the largest gradient, what rounding does there"""
NAMES = ("student_logits", "teacher_logits", "tokens", "mask")


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


@dataclass(frozen=True)
class Distillation:
    """A loss, its teacher, and who draws.

    Attributes:
        teacher: q* of the exact solution, (S, A).
        student: share of the responses that the student draws; the teacher draws the rest.
        drawn: log pi of somebody else who draws.
    """

    responses: Responses
    rows: Rows
    teacher: Float[Tensor, "S A"]
    student: float = 1.0
    drawn: Float[Tensor, "S A"] | None = None

    def log_mu(self, theta: Tensor) -> Float[Tensor, "N"]:
        """log-law of the responses that are drawn."""
        r = self.responses
        if self.drawn is not None:
            return r.log_law(self.drawn)
        own = r.log_law(normalised(theta, r.start))
        taught = r.log_law(normalised(self.teacher, r.start))
        if self.student in (0.0, 1.0):
            return own if self.student else taught
        return torch.logaddexp(own + math.log(self.student), taught + math.log1p(-self.student))

    def inputs(self, theta: Tensor, which: Int64[Tensor, "n"] | None = None) -> Inputs:
        """What the loss is given, of every response or of some; logits 0 past its end."""
        r = self.responses
        rows = slice(None) if which is None else which
        states, past = r.states[rows], ~r.mask[rows, :, None]
        forbidden = torch.isneginf(r.start)
        student, teacher = (
            x.masked_fill(forbidden, FORBIDDEN)[states].masked_fill(past, 0.0)
            for x in (theta, self.teacher)
        )
        return student, teacher, r.tokens[rows], r.mask[rows]

    def weights(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The loss's derivative by the logits before each token, (N, T, A), and log mu."""
        r, log_mu = self.responses, self.log_mu(theta)
        mean = float(log_mu.exp() @ r.lengths)
        (found,) = self.rows.gradients(self.inputs(theta), r.lengths, mean)
        return found, log_mu

    @property
    def cost(self) -> int:
        """Rows that the loss is given for one field."""
        return len(self.responses.reward)

    @cached_property
    def _few(self) -> Few | None:
        """Rows that pass all states; None of a loss that reads more than a state's own logits.

        Tried on all rows, at logits of the reference's and much noise.
        """
        r = self.responses
        few = few_of(r.states, r.mask, len(r.start))
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(r.start.shape, generator=generator, dtype=torch.float64)
        for size in SIZES:
            theta = r.start.masked_fill(torch.isneginf(r.start), 0.0) + size * noise
            try:
                found = self.weights(theta)[0]
                off = (self._of_few(few, theta)[r.states] - found)[r.mask]
            except LossError:
                return None
            if float(off.abs().max()) > SAME * float(found.abs().max()):
                return None
        return few

    def _of_few(self, few: Few, theta: Tensor) -> Float[Tensor, "S A"]:
        r = self.responses
        log_mu = self.log_mu(theta)
        given, mean = self.inputs(theta, few.rows), float(log_mu.exp() @ r.lengths)
        (found,) = self.rows.gradients(given, r.lengths[few.rows], mean)
        visited = few.passed & (r.mass(log_mu).sum(1) > 0)
        return found[few.row, few.step] * visited[:, None]

    def per_visit(self, theta: Float[Tensor, "S A"]) -> Float[Tensor, "S A"]:
        """The gradient of each state's logits, over how often the state is visited."""
        if self._few is None:
            return over_visits(*self.field(theta))
        return self._of_few(self._few, theta)

    @property
    def visit_cost(self) -> int:
        """Rows that the loss is given for that."""
        return self.cost if self._few is None else len(self._few.rows)

    def rest_near(self, theta: Tensor, rest: float) -> None:
        """The steps of :mod:`rl_ebm.studies.losses.limit` get there."""

    def rest_on_kinks(self, theta: Tensor) -> None:
        """Those of :mod:`rl_ebm.studies.losses.way` do, state by state, or slides."""

    def field(self, theta: Float[Tensor, "S A"]) -> tuple[Tensor, Tensor]:
        """Expected gradient by theta, and the mass of each action under who draws."""
        found, log_mu = self.weights(theta)
        r = self.responses
        return r.add_rows(log_mu.exp()[:, None, None] * found), r.mass(log_mu)
