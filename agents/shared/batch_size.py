r"""How many responses a step draws, where nobody says: enough that noise is not most of a gradient.

The gradient g of a batch is its mean G and noise of variance N. Two batches in a row know nothing
of each other, and hardly differ in their policy, so that they are the two halves of one:

    cos(g, g') ~ |G|^2 / (|G|^2 + N)

Below 1/2 noise dominates: the batch is smaller than the noise scale of McCandlish et al. 2018
(arXiv 1812.06162), and the next steps draw twice as many, up to what a step can evaluate in about
the time that it takes anyway. At the start a small batch will do; near the end, or where rewards
have no structure, only large ones point anywhere. Adam divides by the size of the gradient, so that
its rate need not follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rl_ebm.ebm import EBM

START = 64
MOST = 2048
EVERY = 5
"""steps from one look to the next: a device is read at each"""
KEPT = 0.7
"""of the mean of the looks before, at each"""
LOOKS = 3
"""before the first growth"""
DOMINATED = 0.5
COUNTS = ("now", "steps", "looks", "cosine")
STATES = {"cpu": 2**12}
"""states that a step evaluates, at most, by the kind of device;"""
ELSEWHERE = 2**17
"""on others. Responses that share their prefixes share those states: a space that has no more has
batches of up to MOST"""


def most_responses(ebm: EBM) -> int:
    """Responses of a step that evaluate no more states than a device is given at a time."""
    states = STATES.get(ebm.device.type, ELSEWHERE)
    if ebm.num_prompts * ebm.space.num_states <= states:
        return MOST
    return min(MOST, max(START, states // ebm.space.max_length))


class BatchSize:
    """Responses of a step: as many as are asked for, or more and more of them.

    Args:
        asked: a fixed number; None for one that grows.
        least: what a step needs, at least.
        most: what it may grow to; where that is below ``least``, it stays there.
    """

    def __init__(self, asked: int | None, least: int = 1, most: int = MOST) -> None:
        self.grows, self.least, self.most = asked is None, least, most
        self.now = max(min(START, most), least) if asked is None else asked
        self.steps = self.looks = 0
        self.cosine = 0.0
        self.before = torch.empty(0)

    def saw(self, parameters: Iterable[nn.Parameter]) -> None:
        """Look at the gradients of the step that was just made."""
        if not self.grows or 2 * self.now > self.most:
            return
        self.steps += 1
        if self.steps % EVERY > 1:
            return
        gradient = torch.cat([_gradient(p) for p in parameters])
        if self.steps % EVERY == 0:
            self.before = gradient
        elif len(self.before):
            scale = (self.before.norm() * gradient.norm()).clamp(min=1e-30)
            self._look(float(self.before @ gradient / scale))
            self.before = gradient[:0]

    def _look(self, cosine: float) -> None:
        if not math.isfinite(cosine):  # the run says so, and stops
            return
        self.cosine = cosine if self.looks == 0 else KEPT * self.cosine + (1 - KEPT) * cosine
        self.looks += 1
        if self.looks >= LOOKS and self.cosine < DOMINATED:
            self.now *= 2
            if self.cosine > 0:  # as it is with half of the noise
                self.cosine = 2 * self.cosine / (1 + self.cosine)

    def state_dict(self) -> dict[str, Any]:
        """By its name: counts, mean, and a gradient that waits for the next; nothing if fixed."""
        if not self.grows:
            return {}
        state = {name: vars(self)[name] for name in COUNTS}
        return {"batch_size": state | {"before": self.before.clone()}}

    def load_state_dict(self, state: dict[str, Any], parameters: Iterable[nn.Parameter]) -> None:
        """What :meth:`state_dict` tells, of what is learned by these.

        It may have grown on a device that is given more at a time than this one.

        Raises:
            ValueError: numbers that it never has.
        """
        if not self.grows:
            return
        found = state["batch_size"]
        before, count = found["before"], sum(p.numel() for p in parameters)
        if not (
            self.least <= found["now"] <= max(MOST, self.least)
            and 0 <= found["looks"] <= found["steps"]
            and -1.001 < found["cosine"] < 1.001
            and len(before) in (0, count)
            and bool(torch.isfinite(before).all())
        ):
            raise ValueError("the state of a growing batch has numbers that it never has")
        for name in COUNTS:
            setattr(self, name, found[name])
        self.before = before


def _gradient(parameter: nn.Parameter) -> Float[Tensor, "n"]:
    """In float32; 0 where a step had none."""
    found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found.detach().flatten().float()
