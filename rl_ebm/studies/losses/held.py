r"""Tokens that a kink holds: where a policy gradient comes to rest with log-probabilities at kinks.

A penalty |log pi - log p_ref|, or a clip, jumps where a token's own log-probability passes a place.
From both sides it may be pushed there, and then it stays: Filippov (1988) moves such a flow with
the mixture of both sides that holds it, and lets go when there is none. With C(s, a) the loss's
expected derivative by log pi(a|s) over how often that is drawn, the direction of
:mod:`rl_ebm.studies.losses.flow` is

    d log pi(a|s) = Cbar(s) - C(s, a),   Cbar(s) = sum_a pi(a|s) C(s, a),

and a token that is held has the C between those of its two sides that is nearest to Cbar: equal to
it, and it stays, or one of the two, and it leaves. At each state that is one equation for Cbar.
Between two events, a token that arrives at a place or leaves it, it is a smooth flow, and its rest
is one to the last digits. Where the places lie is found from the loss: by halving what jumps about
a point where no step is short enough. A loss that jumps elsewhere, by a sum over a response say, is
none of this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl_ebm.studies.losses.flow import GONE, Limit, Marks
from rl_ebm.studies.losses.policy_gradient import PolicyGradient
from rl_ebm.studies.losses.responses import normalised

ABOUT = 1e-4
"""nats about a token in which a jump is looked for, halved until they are"""
EXACTLY = 1e-12
BESIDE = 1e-9
"""nats beside a place at which a side of it is looked at"""
FLOOR = GONE - 10
"""log pi of what is dead and falls no further, so that it can come back"""
FULL = 1e-8
"""of a state, what its tokens may leave if all are held"""
TINY = 1e-290
"""mass of what is never drawn"""
ALIKE, ALIKE_MOST = 1e6, 4
"""places as far from the reference are looked for: to so many parts of a nat, and so many"""
JUMPS = 1e-5
"""of the largest derivative, what is a jump and not what is smooth in so short a way"""
NOISE = 0.1
"""of a jump, what rounding may do beside it"""
REST = 1e-11
"""of the largest C there was, what is no velocity"""
BEND = 0.3
"""of a state's largest velocity, what a step may change of any"""
FIRST, LONGEST = 0.1, 1.0
"""nats of the first step, and of any"""
NEXT = 1e-2
"""the least that is gone to a place, beside which others are as near, and"""
SLACK = 1e-9
"""of a step, what rounding leaves of the way there"""
SHORTEST = 1e-7
"""nats at the largest C of a step that is explained by no jump that is known"""
STEPS = 4000
WORK = 100_000_000
"""rows that the loss is given, at most"""


def rest_held(flow: PolicyGradient, theta: Float[Tensor, "S A"]) -> Limit | None:
    """The rest that follows a point at a kink; None where it is not of tokens that are held.

    Raises:
        LossError: a loss that is NaN or infinite on the way.
    """
    if flow.inner != 1 or flow.rounded != "no" or flow.drawn is not None or flow.rows.rough:
        return None
    way = _Way(flow, normalised(theta, flow.responses.start))
    return way.end() if way.look() else None


@dataclass(frozen=True)
class _Motion:
    """d log pi at a point."""

    velocity: Float[Tensor, "S A"]
    counts: Bool[Tensor, "S A"]
    """of states that are visited, and not dead"""
    lost: Bool[Tensor, "S A"]

    @property
    def speed(self) -> Float[Tensor, "S 1"]:
        """Of the fastest token that counts, of each state."""
        return self.velocity.abs().masked_fill(~self.counts, 0.0).amax(1, keepdim=True)

    @property
    def size(self) -> float:
        return float(self.speed.max())


@dataclass
class _Way:
    """A flow from event to event.

    Attributes:
        log_pi: of each action, (S, A).
        places: where tokens jump, (K, S, A), inf where fewer are known.
        side: of a token at a place, -1 or 1 where it leaves or passes it, 0 where it is held.
        apart: whether what a token is given hangs on its own side alone, at all that is known.
    """

    flow: PolicyGradient
    log_pi: Float[Tensor, "S A"]
    places: Float[Tensor, "K S A"] = field(init=False)
    side: Int64[Tensor, "S A"] = field(init=False)
    largest: float = 0.0
    apart: bool = True

    def __post_init__(self) -> None:
        self.places = torch.full((0, *self.log_pi.shape), torch.inf, dtype=torch.float64)
        self.side = torch.zeros(self.log_pi.shape, dtype=torch.int64)
        self.allowed = ~torch.isneginf(self.flow.responses.start)
        self.steps = min(STEPS, WORK // (2 * self.flow.cost))

    def given(self, read: Float[Tensor, "S A"]) -> Float[Tensor, "S A"]:
        """C, where the loss reads this for the log-probability of each token, and draws as here."""
        flow, r = self.flow, self.flow.responses
        log_mu, own = r.log_law(self.log_pi), flow.floored(r.at_tokens(self.log_pi))
        seen = flow.floored(r.at_tokens(read))
        inputs = (seen, seen, *flow.inputs(own, own, log_mu)[2:])
        (c,) = flow.rows.gradients(inputs, r.lengths, float(log_mu.exp() @ r.lengths))
        drawn = self.mass().clamp(min=TINY)
        return (r.add_up(log_mu.exp()[:, None] * c) / drawn).masked_fill(drawn <= TINY, 0.0)

    def mass(self) -> Float[Tensor, "S A"]:
        """How often each token is drawn."""
        return self.flow.responses.mass(self.flow.responses.log_law(self.log_pi))

    def look(self) -> bool:
        """Whether there are jumps about this point that were not known; they are from now on.

        What is charged for a distance from the reference jumps as far from it for every token.
        """
        before = int(torch.isfinite(self.places).sum())
        start = self.flow.responses.start
        first = self._jumps_about(self.log_pi)
        off = (first - start)[torch.isfinite(first)].mul(ALIKE).round().unique() / ALIKE
        for place in (first, *(self._jumps_about(start + x) for x in off.tolist()[:ALIKE_MOST])):
            near = 10 * BESIDE
            known = (self.places - place).abs().lt(near).any(0) if len(self.places) else False
            new = torch.isfinite(place) & ~torch.as_tensor(known)
            if bool(new.any()):
                self.places = torch.cat([self.places, place.masked_fill(~new, torch.inf)[None]])
                self._put(new & ((self.log_pi - place).abs() <= 2 * BESIDE), place)
        found = int(torch.isfinite(self.places).sum()) > before
        self.apart = self.apart and (not found or self._is_apart())
        return found and self.apart

    def _jumps_about(self, point: Float[Tensor, "S A"]) -> Float[Tensor, "S A"]:
        """Where each token jumps; inf where it does not."""
        low, high = point - ABOUT, point + ABOUT
        low_c, high_c = self.given(low), self.given(high)
        for _ in range(math.ceil(math.log2(2 * ABOUT / EXACTLY))):
            middle = (low + high) / 2
            c = self.given(middle)
            above = (high_c - c).abs() > (c - low_c).abs()
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
            low_c, high_c = torch.where(above, c, low_c), torch.where(above, high_c, c)
        place = (low + high) / 2
        beside = [self.given(place + k * BESIDE) for k in (-2, -1, 1, 2)]
        jump = (beside[2] - beside[1]).abs()
        noise = torch.maximum((beside[1] - beside[0]).abs(), (beside[3] - beside[2]).abs())
        seen = self.allowed & (self.log_pi > GONE)
        size = max(float(x.abs()[seen].max()) for x in beside)
        new = self.allowed & (jump > JUMPS * size) & (noise < NOISE * jump)
        return place.masked_fill(~new, torch.inf)

    def _put(self, at: Tensor, place: Tensor) -> None:
        self.log_pi = torch.where(at, place, self.log_pi)
        self.side = self.side.masked_fill(at, 0)
        self.log_pi, _ = _scaled(self.log_pi, self.allowed & ~self._here())

    def _here(self) -> Bool[Tensor, "S A"]:
        """Which tokens are at a place."""
        if not len(self.places):
            return torch.zeros_like(self.allowed)
        return (self.places == self.log_pi).any(0)

    def _is_apart(self) -> bool:
        place = self.places.nan_to_num(posinf=0.0).amin(0)
        known = ~torch.isinf(self.places).all(0)
        at = torch.where(known, place, self.log_pi)
        low, high = self.given(at - BESIDE), self.given(at + BESIDE)
        generator = torch.Generator().manual_seed(0)
        size = max(float(x.abs().max()) for x in (low, high))
        for _ in range(3):
            up = torch.rand(at.shape, generator=generator) < 0.5
            both = self.given(torch.where(up, at + BESIDE, at - BESIDE))
            off = (both - torch.where(up, high, low)).abs().max()
            if float(off) > JUMPS * size:
                return False
        return True

    def sides(self) -> tuple[Tensor, Tensor]:
        """C below and above the place of each token that is held; of others both are the same."""
        here = self._here()
        moved = self.log_pi + BESIDE * self.side
        held = here & (self.side == 0)
        low = self.given(torch.where(held, self.log_pi - BESIDE, moved))
        if not bool(held.any()):
            return low, low
        high = self.given(torch.where(held, self.log_pi + BESIDE, moved))
        return torch.where(held, low, high), high

    def motion(self) -> _Motion | None:
        """How it moves; None where a token is pushed away from a place to both sides."""
        low, high = self.sides()
        size = max(float(low.abs().max()), float(high.abs().max()))
        self.largest = max(self.largest, size)
        if bool((low > high + JUMPS * size).any()):
            return None
        p = self.log_pi.exp()
        mean = _mean(low, torch.maximum(low, high), p)
        velocity = (mean - mean.clamp(low, high)).masked_fill(~self.allowed, 0.0)
        visited = self.allowed & (self.mass().sum(1, keepdim=True).log() > GONE)
        lost = visited & (self.log_pi < GONE) & (velocity < 0)
        return _Motion(velocity, visited & ~lost, lost)

    def end(self) -> Limit | None:
        """Where it comes to rest; None where it does not, as far as this is looked at.

        Each state goes by its own clock: it sees what comes after it alone.
        """
        now, marks = self.motion(), Marks(self.flow.responses)
        step = torch.zeros_like(self.log_pi[:, :1])
        for _ in range(self.steps):
            if now is None:
                return None
            size = now.size
            marks.see(size, self.log_pi)
            if size <= REST * self.largest or self.largest == 0.0:
                return marks.known(self._rest(now, size), size)
            if self._turn(now):
                now = self.motion()
                continue
            speed = now.speed.clamp(min=REST * self.largest)
            step = torch.where(step > 0, step, FIRST / speed).clamp(max=LONGEST / speed)
            now = self._step(now, step, speed)
        return None

    def _turn(self, now: _Motion) -> bool:
        """Let go what leaves its place; whether something is held again that had been let go."""
        here, way = self._here() & now.counts, now.velocity.sign().long()
        back = here & (self.side * way < 0)
        leaves = here & (self.side == 0) & (now.velocity.abs() > REST * self.largest)
        self.side = torch.where(leaves, way, self.side).masked_fill(back, 0)
        return bool(back.any())

    def _step(
        self, now: _Motion, step: Float[Tensor, "S 1"], speed: Float[Tensor, "S 1"]
    ) -> _Motion | None:
        """One that changes little of each state's velocities; ``step`` becomes that of the next.

        It goes to the first place that a token comes to, and what it changes is looked at with that
        token still on the side from which it comes.
        """
        log_pi, side = self.log_pi, self.side
        taken = step.minimum(self._soonest(now).maximum(NEXT / speed))
        lands, fits = self._move(now, taken)
        new = self.motion()
        if new is None:
            return None
        steady = now.counts & new.counts
        off = (new.velocity - now.velocity).abs().masked_fill(~steady, 0.0).amax(1, keepdim=True)
        bend = off / speed
        good = fits & (bend <= BEND)
        self.log_pi = torch.where(good, self.log_pi, log_pi)
        self.side = torch.where(good, self.side.masked_fill(lands, 0), side)
        longer = torch.where(bend < BEND / 3, 1.5 * taken, taken).maximum(NEXT / speed)
        step.copy_(torch.where(good, longer, taken / 2))
        stuck = ~good & (step * self.largest < SHORTEST)
        if bool(stuck.any()):
            if not self.look():
                return None
            step.masked_fill_(stuck, 0.0)
        return self.motion() if bool(lands.any()) or not bool(good.all()) else new

    def _soonest(self, now: _Motion) -> Float[Tensor, "S 1"]:
        """When the first token of each state comes to a place."""
        free = self.allowed & ~(self._here() & (self.side == 0)) & (now.velocity != 0)
        far = torch.where(now.velocity > 0, torch.inf, -torch.inf).double()
        place = self._next(now.velocity, far)
        after = ((place - self.log_pi) / now.velocity).abs()
        return after.masked_fill(~free, torch.inf).amin(1, keepdim=True)

    def _move(
        self, now: _Motion, step: Float[Tensor, "S 1"]
    ) -> tuple[Bool[Tensor, "S A"], Bool[Tensor, "S 1"]]:
        """By a step of each state: what comes to a place, and whether all of it can."""
        held = self._here() & (self.side == 0)
        free = self.allowed & ~held
        place = self._next(now.velocity, self.log_pi + (1 + SLACK) * step * now.velocity)
        lands = free & torch.isfinite(place)
        there = (self.log_pi + step * now.velocity).clamp(min=FLOOR)
        there = there.masked_fill(~self.allowed, -torch.inf)
        new = torch.where(lands, place, torch.where(held, self.log_pi, there))
        moving = free & ~lands
        new, fits = _scaled(new, moving)
        stays = self.allowed & (new == self.log_pi)
        self.log_pi = new
        self.side = torch.where(stays, self.side, 0)
        if len(self.places):
            near = (self.places - self.log_pi).abs()
            nearest = self.places.gather(0, near.argmin(0)[None])[0]
            self._put(moving & (near.amin(0) < EXACTLY) & ~self._here(), nearest)
        self.side = torch.where(lands, -now.velocity.sign().long(), self.side)
        return lands, fits

    def _next(self, velocity: Tensor, there: Tensor) -> Float[Tensor, "S A"]:
        """The first place on the way of each token; inf where there is none."""
        found = torch.full_like(there, torch.inf)
        for place in self.places:
            between = (place - self.log_pi) * velocity.sign()
            on = (between > 0) & ((there - place) * velocity.sign() >= 0)
            nearer = on & ((place - self.log_pi).abs() < (found - self.log_pi).abs())
            found = torch.where(nearer, place, found)
        return found

    def _rest(self, now: _Motion, size: float) -> Limit:
        r = self.flow.responses
        theta = self.log_pi.masked_fill(~self.allowed | now.lost, -torch.inf)
        off = size / self.largest if self.largest else 0.0
        return Limit(theta, r.log_law(normalised(theta, r.start)), now.lost, off, kink=True)


def _mean(
    low: Float[Tensor, "S A"], high: Float[Tensor, "S A"], p: Float[Tensor, "S A"]
) -> Float[Tensor, "S 1"]:
    """Cbar: the mean of what lies between low and high and is nearest to it.

    The mean less Cbar falls, and is linear between two ends.
    """
    ends = torch.cat([low, high], 1).sort(1).values

    def over(x: Float[Tensor, "S n"]) -> Float[Tensor, "S n"]:
        nearest = x[:, :, None].clamp(low[:, None], high[:, None])
        return (p[:, None] * nearest).sum(2) - x

    at = over(ends)
    above = (at > 0).sum(1, keepdim=True).clamp(1, ends.shape[1] - 1)
    a, b = ends.gather(1, above - 1), ends.gather(1, above)
    left, right = at.gather(1, above - 1), at.gather(1, above)
    share = torch.where(left > right, left / (left - right).clamp(min=1e-300), 0.0)
    return a + share.clamp(0.0, 1.0) * (b - a)


def _scaled(
    log_pi: Float[Tensor, "S A"], which: Bool[Tensor, "S A"]
) -> tuple[Float[Tensor, "S A"], Bool[Tensor, "S 1"]]:
    """With these such that all of a state add up to 1; whether the others leave room for it."""
    left = 1 - log_pi.exp().masked_fill(which, 0.0).sum(1, keepdim=True)
    none = ~which.any(1, keepdim=True)
    fits = torch.where(none, left.abs() <= FULL, left > 0)
    total = log_pi.masked_fill(~which, -torch.inf).logsumexp(1, keepdim=True)
    shift = torch.where(none | ~fits, 0.0, left.clamp(min=TINY).log() - total)
    return torch.where(which, log_pi + shift, log_pi), fits
