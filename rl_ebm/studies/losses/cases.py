"""A loss beside an EBM, once for each prompt: what :func:`rl_ebm.audit_loss` was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.divergences import tv
from rl_ebm.exact import Solution
from rl_ebm.messages.arguments import finite, is_number, shown, whole
from rl_ebm.policies import Policy
from rl_ebm.policies.scoring import tree_q_values
from rl_ebm.soft_bellman import q_from_r
from rl_ebm.studies.losses.advantages import Advantages, advantages_of
from rl_ebm.studies.losses.flow import Limit, direction
from rl_ebm.studies.losses.kinds import (
    AnyFlow,
    distillation_flow,
    in_units,
    policy_gradient_flow,
    preference_flow,
)
from rl_ebm.studies.losses.limit import FLOW_STEPS, limit_from, stopped
from rl_ebm.studies.losses.policy_gradient import LOWEST, PolicyGradient
from rl_ebm.studies.losses.preference import Pairs, Preference
from rl_ebm.studies.losses.responses import Responses, normalised, responses_of
from rl_ebm.studies.losses.way import back, decided
from rl_ebm.studies.problems import problems

Kind = Literal["policy-gradient", "distillation", "preference"]
SAMPLERS = ("policy", "student", "reference", "teacher")
SAME = 1e-8
"""total variation, and share of the first D, up to which the EBM is what was found"""
MOST_STEPS = 100
"""on one batch"""
PAIR_STEPS = 40
"""steps of the flow itself for losses of pairs, at most: the implicit ones go with it as well"""
SLOW = 0.1
"""most that a logit moves in an update whose length is not given"""


@dataclass(frozen=True)
class Asked:
    """The arguments of :func:`rl_ebm.audit_loss` that make the limit, checked."""

    loss: Callable[..., Any]
    kind: Kind
    advantages: Advantages
    sampler: str | float | Policy | None
    start: Policy | None
    inner_steps: int
    lr: float | None
    pairs: Pairs


def asked(
    loss: Any,
    kind: Any,
    advantages: Any,
    sampler: Any,
    start: Any,
    inner_steps: Any,
    lr: Any,
    pairs: Any = None,
) -> Asked:
    """The same, each of its kind and in its range; TypeError or ValueError where it is not."""
    if kind not in get_args(Kind):
        known = ", ".join(repr(k) for k in get_args(Kind))
        raise ValueError(f"kind must be one of {known}, got {shown(kind)}")
    if kind != "policy-gradient" and (advantages != "centred" or inner_steps != 1):
        raise ValueError(
            f"advantages and inner_steps are of policy gradients, and kind is {kind!r}"
        )
    if pairs is not None and kind != "preference":
        raise ValueError(f"pairs are of kind='preference', and kind is {kind!r}")
    if not isinstance(pairs, Pairs | None):
        raise TypeError(f"pairs must be Pairs(labels, temperature), got {shown(pairs)}")
    if is_number(sampler):
        if kind != "distillation":
            raise ValueError(
                f"a share of the draws is for kind='distillation', and kind is {kind!r}"
            )
        sampler = finite("sampler", sampler, 0.0, 1.0)
    elif isinstance(sampler, str) and sampler not in SAMPLERS:
        known = ", ".join(repr(s) for s in SAMPLERS)
        raise ValueError(f"sampler must be one of {known}, or a policy, got {sampler!r}")
    if pairs is not None and pairs.temperature != 1 and sampler not in ("policy", "student"):
        raise ValueError(
            f"a temperature of {pairs.temperature:g} is that of the policy's own draws: give "
            "sampler='policy', or leave it at 1"
        )
    steps = whole("inner_steps", inner_steps, 1, MOST_STEPS)
    rate = None if lr is None else finite("lr", lr, 0.0, above=True)
    gain, pairs = advantages_of(advantages), pairs or Pairs()
    return Asked(loss, kind, gain, sampler, start, steps, rate, pairs)


def sizes_of(groups: Any, kind: Kind) -> list[int]:
    """Sizes of groups that were asked for, checked."""
    if kind != "policy-gradient":
        raise ValueError(f"groups are of policy gradients, and kind is {kind!r}")
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        raise TypeError(f"groups must be a list of whole numbers, got {shown(groups)}")
    return [whole("each of groups", size, 2) for size in groups]


@dataclass(frozen=True)
class Case:
    """The loss at one prompt.

    Attributes:
        teacher: q* of the EBM, (S, A): its log pi, and V at each state.
        start: logits where the flow begins.
        rate: length of an update.
    """

    responses: Responses
    flow: AnyFlow
    teacher: Float[Tensor, "S A"]
    start: Float[Tensor, "S A"]
    rate: float

    @property
    def target(self) -> Float[Tensor, "S A"]:
        """log pi of the EBM."""
        return normalised(self.teacher, self.responses.start)


def cases_of(what: Asked, solution: Solution) -> list[Case]:
    """One for each prompt."""
    found = []
    for prompt, problem in enumerate(problems(solution)):
        r = responses_of(problem)
        terms = [a + b for a, b in zip(problem.log_ref, problem.g, strict=True)]
        teacher = torch.cat(q_from_r(terms, r.space)).masked_fill(
            torch.isneginf(r.start), -torch.inf
        )
        # Scores in float32 leave a solution that is kept in it; what is compared is float64.
        law = r.whole(r.log_law(normalised(teacher, r.start)))
        r = replace(r, problem=replace(problem, log_target=law))
        start = r.start
        if what.start is not None:
            start = _logits(what.start, r, prompt, solution.ebm.num_prompts)
        flow = _flow(what, r, teacher, prompt, solution.ebm.num_prompts)
        first = flow.field(start.masked_fill(torch.isneginf(start), 0.0))[0]
        rate = what.lr or SLOW / max(float(first.abs().max()), 1e-300)
        if what.inner_steps > 1:
            assert isinstance(flow, PolicyGradient)  # of which alone asked() takes more than one
            flow = replace(flow, inner=what.inner_steps, rate=rate)
        found.append(Case(r, flow, teacher, start, rate))
    return found


def _flow(what: Asked, r: Responses, teacher: Tensor, prompt: int, prompts: int) -> AnyFlow:
    if what.kind == "policy-gradient":
        drawn = _drawn(what.sampler, r, teacher, prompt, prompts)
        return policy_gradient_flow(what.loss, r, what.advantages, drawn=drawn)
    if what.kind == "preference":
        sampler = "reference" if what.sampler is None else what.sampler
        drawn = _drawn(sampler, r, teacher, prompt, prompts)
        return preference_flow(what.loss, r, drawn=drawn, pairs=what.pairs)
    shares = {None: 1.0, "policy": 1.0, "student": 1.0, "teacher": 0.0}
    if is_number(what.sampler):
        return distillation_flow(what.loss, r, teacher, what.sampler)
    if what.sampler is None or (isinstance(what.sampler, str) and what.sampler in shares):
        return distillation_flow(what.loss, r, teacher, shares[what.sampler])
    drawn = _drawn(what.sampler, r, teacher, prompt, prompts)
    return distillation_flow(what.loss, r, teacher, drawn=drawn)


def _drawn(
    sampler: str | float | Policy | None, r: Responses, teacher: Tensor, prompt: int, prompts: int
) -> Tensor | None:
    """log pi of who draws; None for the policy itself."""
    if sampler in (None, "policy", "student"):
        return None
    if sampler == "reference":
        return r.start
    if sampler == "teacher":
        return normalised(teacher, r.start)
    return normalised(_logits(sampler, r, prompt, prompts), r.start)


def _logits(policy: Any, r: Responses, prompt: int, prompts: int) -> Float[Tensor, "S A"]:
    """Of a policy at every state; what the reference forbids is forbidden."""
    found = tree_q_values(policy, r.space, prompts)[prompt].detach().double().cpu()
    if bool((torch.isneginf(found) & ~torch.isneginf(r.start)).any()):
        raise ValueError(
            "the policy that draws, or that the flow starts from, forbids tokens that the "
            "reference allows: it must give each a probability"
        )
    return found.masked_fill(torch.isneginf(r.start), -torch.inf)


def ended(
    case: Case,
    start: Tensor | None = None,
    flow: AnyFlow | None = None,
    plain: int = FLOW_STEPS,
) -> Limit:
    """Where the flow leads.

    Args:
        plain: steps of the flow itself, at most.
    """
    flow = in_units(case.flow if flow is None else flow)
    start = case.start if start is None else start
    rough = flow.rows.rough
    if isinstance(flow, Preference):
        plain = min(plain, PAIR_STEPS)
    end = decided(flow, start, limit_from(flow, start, rough, plain), rough)
    return _told_apart(case, flow, end) if end.settled and bool(end.dead.any()) else end


def root_from(case: Case, start: Float[Tensor, "S A"]) -> Limit | None:
    """A rest inside to which another start leads, and which comes back to itself when pushed.

    None where there is a kink on the way, or the rest is one of many: what takes minutes is left.
    """
    flow = in_units(case.flow)
    rough, start = flow.rows.rough, start.masked_fill(torch.isneginf(case.responses.start), 0.0)
    end = limit_from(flow, start, rough, along=stopped)
    if not end.settled or end.kink or bool(end.dead.any()):
        return None
    unit = float(direction(flow, start).value.abs().max())
    return back(flow, start, end, unit, rough, along=stopped)


def _told_apart(case: Case, flow: AnyFlow, end: Limit) -> Limit:
    """What is dead, from what the EBM makes as rare: where they are one law, up to rounding.

    The limit is then the EBM, if that is at rest, the rarest responses included; where those are
    too rare to see, nobody knows.
    """
    r, law = case.responses, case.responses.log_law(case.target)
    if float(tv(end.log_law, law)) > SAME:
        return end
    if bool((r.at_tokens(case.target) < LOWEST / r.mask.shape[1]).any()):
        return replace(end, faint=True)
    at, first = direction(flow, case.target), direction(flow, case.start)
    unit = max(float(first.value.abs().max()), float(at.value.abs().max()) * SAME)
    value = at.value[~torch.isneginf(r.start)]
    if float(value.abs().max()) > SAME * unit:
        return end
    nothing = torch.zeros_like(end.dead)
    return replace(end, theta=case.target, log_law=law, dead=nothing)
