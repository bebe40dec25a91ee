r"""Flows of rows of logits that do not know each other, each at its own pace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_ebm.fixed_points.flow import LONGEST

Field = Callable[[Tensor], Tensor]
"""theta, (n, A), to d theta / dt, row by row"""


class Limits(NamedTuple):
    """What rows end at."""

    log_pi: Float[Tensor, "n A"]
    known: Bool[Tensor, "n"]
    boundary: Bool[Tensor, "n"]
    """whether some action that was allowed has probability 0"""


def follow_rows(
    field: Field, theta: Float[Tensor, "n A"], tolerance: float = 1e-6
) -> Iterator[tuple[Tensor, Tensor]]:
    """The time and the logits of each row, after each try of a step; without an end.

    The pair of order 3 and 2 of Bogacki and Shampine (1989). A row whose error, in its largest
    logit, is above ``tolerance`` stays where it is, and tries a shorter step: across a jump of
    its field that is one of the size of the tolerance.
    """
    time = theta.new_zeros(len(theta), 1)
    step = torch.full_like(time, 1e-2)
    first = field(theta)
    while True:
        yield time[:, 0], theta
        second = field(theta + step / 2 * first)
        third = field(theta + step * 3 / 4 * second)
        new = theta + step / 9 * (2 * first + 3 * second + 4 * third)
        last = field(new)
        error = step / 72 * (-5 * first + 6 * second + 8 * third - 9 * last)
        error = error.abs().amax(-1, keepdim=True).nan_to_num(nan=torch.inf)
        done = error <= tolerance
        time = torch.where(done, time + step, time)
        theta, first = torch.where(done, new, theta), torch.where(done, last, first)
        change = 0.9 * (tolerance / error.clamp(min=1e-300)) ** (1 / 3)
        step = (step * change.clamp(0.2, 5.0)).clamp(max=LONGEST)
