"""The expected gradient of a distillation loss, of all responses at once: by the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.studies.losses.contract import Inputs
from rl_ebm.studies.losses.responses import Responses, normalised
from rl_ebm.studies.losses.rows import Rows

FORBIDDEN = -1e4
"""logit of what the reference forbids: probability 0, and no 0 * inf in anybody's loss"""
NAMES = ("student_logits", "teacher_logits", "tokens", "mask")


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

    def rest_near(self, theta: Tensor, rest: float) -> None:
        """The steps of :mod:`rl_ebm.studies.losses.limit` get there."""

    @property
    def kinks_first(self) -> bool:
        """There is no such method."""
        return False

    def is_minimum(self, theta: Tensor, kink: bool = False) -> bool:
        """None is known to be."""
        return False

    def rest_on_kinks(self, theta: Tensor, within: float = math.inf) -> None:
        """Those of :mod:`rl_ebm.studies.losses.way` do, state by state, or slides."""

    def field(self, theta: Float[Tensor, "S A"]) -> tuple[Tensor, Tensor]:
        """Expected gradient by theta, and the mass of each action under who draws."""
        found, log_mu = self.weights(theta)
        r = self.responses
        return r.add_rows(log_mu.exp()[:, None, None] * found), r.mass(log_mu)
