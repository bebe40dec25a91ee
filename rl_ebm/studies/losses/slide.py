"""Along a kink: where a gradient jumps no step is short enough, and the flow slides.

Where tokens of a policy gradient are held at their kinks, :mod:`rl_ebm.studies.losses.held` follows
them. Else steps of one length, each by what moves most, jump about the kink and follow it in the
mean; their mean is taken over ever more of them until it stays, and then with a shorter length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rl_ebm.divergences import tv
from rl_ebm.studies.losses.contract import LossError
from rl_ebm.studies.losses.flow import Field, Limit, direction, finished
from rl_ebm.studies.losses.held import rest_held
from rl_ebm.studies.losses.policy_gradient import PolicyGradient
from rl_ebm.studies.losses.responses import normalised

LENGTHS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
"""nats of a step, each until the mean of so many steps"""
WINDOW = 100
"""and then twice as many moves by no more than this share of the length"""
STAYS = 0.02
"""in total variation, or after so many means"""
WINDOWS = 7


def slide(flow: Field, theta: Tensor) -> Limit:
    """Along a kink, to its end."""
    if isinstance(flow, PolicyGradient):
        try:
            held = rest_held(flow, theta)
        except LossError:  # it fails between two places, which shorter steps may not reach
            held = None
        if held is not None:
            return held
    return by_steps(flow, theta)


def by_steps(flow: Field, theta: Tensor) -> Limit:
    """The same by steps of one length, by what moves most, until their mean stays; then shorter.

    What slides slowly moves a mean of twice as many steps twice as far: it stays if that is less.
    """
    r, theta, left = flow.responses, theta.clone(), 0.0
    laws = [r.log_law(normalised(theta, r.start))]
    for length in LENGTHS:
        laws, moved, left = [*laws, laws[-1]], math.inf, 1.0
        for k in range(WINDOWS):
            mean = torch.zeros_like(theta)
            for _ in range(WINDOW << k):
                now = direction(flow, theta)
                theta += length * (now.value / max(now.size, 1e-300)).clamp(-1, 1)
                mean += theta
            before, laws[-1] = laws[-1], r.log_law(normalised(mean / (WINDOW << k), r.start))
            further, moved = moved, float(tv(before, laws[-1]))
            left = moved if moved < 0.7 * further else 1.0
            if left <= STAYS * length:
                break
        theta = mean / (WINDOW << k)
    end = finished(flow, theta, direction(flow, theta), 0.0)
    off = min(1.0, float(tv(laws[-2], laws[-1])) + left)
    return Limit(end.theta, end.log_law, end.dead, off, kink=True)
