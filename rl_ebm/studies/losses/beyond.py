"""Beyond the limit: other roots, other samplers, groups of a size, variance, clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.divergences import tv
from rl_ebm.statistics.expectations import certain
from rl_ebm.statistics.interval import Interval, average
from rl_ebm.studies.losses.cases import SLOW, Case, ended, root_from
from rl_ebm.studies.losses.flow import GONE, Limit, direction
from rl_ebm.studies.losses.kinds import AnyFlow, in_units
from rl_ebm.studies.losses.measures import (
    favoured,
    norm,
    variance_of_group,
    variance_of_one,
)
from rl_ebm.studies.losses.policy_gradient import PolicyGradient
from rl_ebm.studies.losses.preference import Preference
from rl_ebm.studies.losses.responses import normalised

GROUPS = (2, 4, 8, 16)
"""sizes of groups that are looked at, where none are asked for, of up to"""
KINDS = 512
"""different returns: more take minutes"""
PLAIN_STEPS = 30
"""of the flow itself in groups, whose field is dear"""
BEHIND = (4, 16)
"""updates by which the sampler is late"""
UPDATES = 200
"""of a sampler that is late, or rounded"""
APART = 1e-4
"""total variation from which on two limits are two, and"""
KNOWN = 1e-8
"""their accuracy"""
NOTHING = 1e-8
"""of the size of a gradient, what is none"""
MANY, MANY_PAIRS = 20_000, 2**20
"""tokens of all responses, or pairs of them, from which on fewer starts are tried"""


def other_roots(case: Case, limit: Limit) -> list[Float[Tensor, "N"]]:
    """Laws inside at which other starts end: the EBM, and two that are drawn. log-laws.

    A start that comes to a kink, or to a rest that is one of many, is not followed further.
    Of more than :data:`MANY` tokens the EBM alone is tried, of :data:`MANY_PAIRS` pairs none.
    """
    if isinstance(case.flow, Preference) and case.flow.cost > MANY_PAIRS:
        return []
    generator = torch.Generator().manual_seed(0)
    starts = [case.target]
    if case.responses.mask.numel() <= MANY:
        noise = [torch.randn(case.start.shape, generator=generator).double() for _ in range(2)]
        starts += [normalised(case.start + 3 * x, case.responses.start) for x in noise]
    found: list[Tensor] = []
    for start in starts:
        end = root_from(case, start)
        known = [limit.log_law, *found]
        if end is None or end.kink or end.accuracy > KNOWN:
            continue
        if all(float(tv(end.log_law, x)) > APART for x in known):
            found.append(end.log_law)
    return found


def depends_on_sampler(case: Case, limit: Limit) -> bool | None:
    """Whether the gradient at the limit is one where the draws are another law's, and nothing else
    changes; None on the boundary.
    """
    if not limit.settled or limit.kink or bool(limit.dead.any()):
        return None
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(case.start.shape, generator=generator).double()
    drawn = normalised(case.start + noise, case.responses.start)
    other = replace(case.flow, drawn=drawn)
    if isinstance(other, PolicyGradient):
        other = replace(other, recomputed=True)
    theta = limit.theta.masked_fill(torch.isneginf(limit.theta), 0.0)
    size = max(direction(other, case.start).size, direction(case.flow, case.start).size)
    return direction(other, theta).size > 1e-6 * max(size, 1e-300)


def at_target(cases: Sequence[Case]) -> dict[str, Any]:
    """The expected gradient at the EBM: norm, beside its noise, and what it would favour."""
    norms, noise, best = [], [], []
    for case in cases:
        scale = norm(case.flow, case.start)
        size = norm(case.flow, case.target)
        norms.append(size if size > NOTHING * scale else 0.0)
        noise.append(variance_of_one(case.flow, case.target) ** 0.5)
        best += favoured(case.flow, case.target, NOTHING * scale)
    best = sorted(best, key=lambda x: -x.rate)[:3]
    return {
        "norm": fmean(norms),
        "signal_to_noise": fmean(_ratio(a, b) for a, b in zip(norms, noise, strict=True)),
        "favours": [asdict(x) for x in best],
    }


def _ratio(signal: float, noise: float) -> float:
    return 0.0 if signal == 0 else signal / noise if noise > 0 else float("inf")


def variances(cases: Sequence[Case]) -> dict[str, Any]:
    """Of the gradient of one response and of groups, at the reference and at the EBM."""
    places: dict[str, list[Tensor]] = {
        "reference": [c.responses.start for c in cases],
        "target": [c.target for c in cases],
    }
    found: dict[str, Any] = {}
    for where, thetas in places.items():
        pairs = [(c.flow, x) for c, x in zip(cases, thetas, strict=True)]
        ones = [variance_of_one(*pair) for pair in pairs]
        signal = [norm(*pair) for pair in pairs]
        groups = {
            str(n): _mean([variance_of_group(*p, n, x) for p, x in zip(pairs, ones, strict=True)])
            for n in GROUPS
        }
        ratio = fmean(_ratio(a, b**0.5) for a, b in zip(signal, ones, strict=True))
        found[where] = {"one": fmean(ones), "groups": groups, "signal_to_noise": ratio}
    return found


def _mean(values: Sequence[float | Interval]) -> float | dict[str, Any]:
    exact = [x for x in values if not isinstance(x, Interval)]
    if len(exact) == len(values):
        return fmean(exact)
    drawn = [x if isinstance(x, Interval) else certain(x, 0.95) for x in values]
    return (average(drawn) if len(drawn) > 1 else drawn[0]).to_dict()


def small_groups(cases: Sequence[Case], asked: Sequence[int] | None) -> dict[str, Any]:
    """The limit in groups of each size: tv and accuracy; without a tv where it is not known.

    Args:
        asked: sizes; None for those of :data:`GROUPS` that take seconds.
    """
    kinds = max(_kinds(case) for case in cases)
    if asked is None and kinds > KINDS:
        why = f"{kinds} different returns take minutes: ask for them, groups={GROUPS}"
        return {str(size): {"tv": None, "why": why} for size in GROUPS}
    return {str(n): _of_groups(cases, n) for n in (GROUPS if asked is None else asked)}


def _kinds(case: Case) -> int:
    """Different returns at the start, of groups whose advantages are no multiples of those."""
    assert isinstance(case.flow, PolicyGradient)
    known, r = case.flow.advantages, case.responses
    if known.combine != "std":
        return 0
    return len(known.of_each(r.reward, r.at_tokens(r.start), r.log_ref, r.mask).unique())


def _of_groups(cases: Sequence[Case], size: int) -> dict[str, Any]:
    ends = []
    for case in cases:
        assert isinstance(case.flow, PolicyGradient)
        try:
            ends.append(ended(case, flow=replace(case.flow, group=size), plain=PLAIN_STEPS))
        except OverflowError as error:
            return {"tv": None, "why": str(error)}
    if not all(end.settled for end in ends):
        return {"tv": None, "why": "not settled"}
    return _ends(cases, [(e.log_law, e.accuracy) for e in ends]) | {
        "degenerate": any(bool(e.dead.any()) for e in ends)
    }


def other_samplers(cases: Sequence[Case], ends: Sequence[Limit]) -> dict[str, Any]:
    """A sampler that is late, and one that reads its logits in bfloat16."""
    found: dict[str, Any] = {}
    for late in BEHIND:
        laws = [_updated(c.flow, c.start, late) for c in cases]
        found[f"{late} updates late"] = _ends(cases, laws)
    for how in ("uncorrected", "corrected"):
        made = [_rounded(c, how) for c in cases]
        starts = [e.theta.masked_fill(torch.isneginf(e.theta), GONE) for e in ends]
        laws = [_updated(flow, x) for flow, x in zip(made, starts, strict=True)]
        bias = fmean(norm(flow, c.target) for flow, c in zip(made, cases, strict=True))
        found[f"bfloat16, {how}"] = _ends(cases, laws) | {"gradient_at_target": bias}
    return found


def _rounded(case: Case, how: str) -> PolicyGradient:
    assert isinstance(case.flow, PolicyGradient)
    return replace(case.flow, rounded=how, recomputed=True)


def _updated(flow: AnyFlow, start: Tensor, late: int = 0) -> tuple[Tensor, float]:
    """The mean law of the second half of :data:`UPDATES`, and how far the law still moves in it.

    An update moves each logit in units of how often it is drawn and of the loss's own gradients, by
    at most :data:`SLOW` nats at the start; who draws is the policy of some updates before.
    """
    r, flow = flow.responses, in_units(flow)
    theta = start.masked_fill(torch.isneginf(r.start), 0.0)
    h = SLOW / max(direction(flow, theta).size, SLOW)
    past, laws = [theta], []
    for i in range(UPDATES):
        drawn = normalised(past[0], r.start)
        now = direction(replace(flow, drawn=drawn) if late else flow, theta)
        theta = theta + (h * now.value).clamp(-SLOW, SLOW)
        past = [*past, theta][-late - 1 :]
        if i >= UPDATES // 2:
            laws.append(r.log_law(normalised(theta, r.start)))
    mean = torch.stack(laws).exp().mean(0).log()
    return mean, max(float(tv(mean, x)) for x in laws[:: max(1, len(laws) // 20)])


def _ends(cases: Sequence[Case], laws: Sequence[tuple[Tensor, float]]) -> dict[str, Any]:
    target = [case.responses.log_law(case.target) for case in cases]
    return {
        "tv": fmean(float(tv(x, t)) for (x, _), t in zip(laws, target, strict=True)),
        "accuracy": max(moved for _, moved in laws),
    }


def clipped(cases: Sequence[Case], at: Callable[[Case], Tensor], late: int = 0) -> float:
    """Share of the drawn tokens with an advantage and a choice, and without a gradient.

    Args:
        late: gradient steps of length ``rate`` that the policy is ahead of who draws.
    """
    shares = []
    for case in cases:
        assert isinstance(case.flow, PolicyGradient)
        flow, r = replace(case.flow, rate=case.rate), case.responses
        theta = at(case).masked_fill(torch.isneginf(r.start), 0.0)
        held = flow.who_draws(theta)
        theta = theta - case.rate * flow.steps(theta, held, late)
        c, log_mu = flow.weights(theta, held)
        log_pi = r.at_tokens(normalised(theta, r.start))
        gain = flow.inputs(log_pi, r.at_tokens(held), log_mu)[3]
        free = (log_pi < -1e-12) & (gain.abs() > 1e-12)
        p = log_mu.exp()[:, None]
        total = float((p * free).sum())
        shares.append(float((p * (free & (c == 0))).sum()) / total if total > 0 else 0.0)
    return fmean(shares)
