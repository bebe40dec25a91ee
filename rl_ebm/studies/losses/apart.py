"""States that do not see each other: each is followed by its own clock, with steps of its own.

Token-level distillation gives each state a gradient of its own logits, times how often the state is
visited. How fast a state's clock goes changes nothing of where it goes. So a state waits neither
for those before it to bring it visits, nor for another one's kink, which wants short steps.

About a kink a step of any order has an error of its own length, so these are of the simplest kind.
They grow while a state comes to rest: as the root of how much slower it is, so that all that they
are off by remains of the order of the first one's length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.studies.losses.flow import Limit, to_go
from rl_ebm.studies.losses.responses import Responses, normalised
from rl_ebm.studies.losses.visits import Alone

LONGER = 30.0
"""times the shortest step of a state, at most, while it comes to rest"""
LEAST = 1e-4
"""of the fastest state, what a state must have been for steps of its own: less may be rounding"""
STEPS = 6000
"""at most; fewer where they cost more:"""
WORK = 100_000_000
"""rows that the loss is given in them"""
WINDOW = 100
"""steps whose mean policy is looked at"""
STILL = 5e-3
"""of a step's length, in total variation: what is no motion of a mean about a kink"""
ENDED = 3e-4
"""how far it may still be to go where it has ended, in total variation"""


def followed_apart(
    alone: Alone, theta: Float[Tensor, "S A"], length: float, ended: float = ENDED
) -> Limit:
    """Where each state goes by itself.

    The policy at a state is a mean over a window of steps, the middle ones most, which evens out
    what jumps about a kink; its accuracy is how far the law is still to go.

    Args:
        length: nats of a state's step where it is fastest.
        ended: how far it may still be to go, in total variation.

    Raises:
        LossError: the loss fails on the way.
    """
    r = alone.responses
    time = fastest = torch.zeros_like(theta[:, :1])
    seen, left = [_Seen(time, normalised(theta, r.start).exp())], 1.0
    shares = torch.hann_window(WINDOW + 1, periodic=False, dtype=theta.dtype)[1:] / (WINDOW / 2)
    for _ in range(max(4, min(STEPS, WORK // alone.cost) // WINDOW)):
        mean = torch.zeros_like(theta)
        for share in shares:
            slope = -alone.per_visit(theta)
            speed = slope.abs().amax(1, keepdim=True)
            fastest = fastest.maximum(speed).maximum(LEAST * speed.max()).clamp(min=1e-290)
            h = length / fastest * (fastest / speed.clamp(min=1e-290)).sqrt().clamp(max=LONGER)
            theta, time = theta + h * slope, time + h
            mean += share * normalised(theta, r.start).exp()
        seen.append(_Seen(time, mean))
        left = to_go(partial(_law_by, r, seen), STILL * length) if bool(slope.any()) else 0.0
        if left <= ended:
            break
    policy = normalised(theta, r.start) if left == 0.0 else seen[-1].policy.log()
    dead = torch.zeros_like(theta, dtype=torch.bool)
    return Limit(theta, r.log_law(policy), dead, left, kink=True)


@dataclass(frozen=True)
class _Seen:
    """The mean policy of a window of steps, and each state's time at its end."""

    time: Float[Tensor, "S 1"]
    policy: Float[Tensor, "S A"]


def _law_by(r: Responses, seen: list[_Seen], share: float) -> Tensor:
    """The last law that was seen within a share of each state's own time."""
    times = torch.stack([x.time for x in seen])
    policies = torch.stack([x.policy for x in seen])
    at = (times <= share * times[-1]).sum(0) - 1
    return r.log_law(policies.gather(0, at.expand_as(policies[0])[None])[0].log())
