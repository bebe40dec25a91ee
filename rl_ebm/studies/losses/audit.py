r"""The audit of a loss that somebody wrote: what it converges to, exactly, in one call.

A loss is a plain function of float64 tensors on the CPU that returns one number. By its kind it is

- "policy-gradient": ``loss(log_pi, log_pi_old, log_ref, advantages, mask)``, all (B, T): of the
  tokens that were drawn, 0 past the end of each response, where ``mask`` is False (a loss that
  takes no bool is given floats);
- "distillation": ``loss(student_logits, teacher_logits, tokens, mask)``, (B, T, A) twice and (B, T)
  twice; the teacher's logits are q* of the solution;
- "preference": ``loss(chosen_log_pi, rejected_log_pi, chosen_log_ref, rejected_log_ref)``, (B,),
  sums over the tokens; a pair is labelled by sigmoid(R - R'), or by which R is higher. A loss of
  means over tokens takes two arguments more, ``chosen_length`` and ``rejected_length``, (B,)
  integers.

Rewards and advantages are in reward units, and beta stands in the loss, as in the frameworks.
Batches and groups are without end, steps without length; how rows make a batch is found from the
loss itself, :mod:`rl_ebm.studies.losses.rows`, and the way to the limit is that of
:mod:`rl_ebm.studies.losses.limit`. It is taken in steps: a zone that is narrower than one, some
hundredths of a nat, and in which alone a loss falls silent, may be stepped over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rl_ebm.divergences import tv
from rl_ebm.exact import Solution
from rl_ebm.fixed_points import FixedPoint
from rl_ebm.messages.arguments import shown
from rl_ebm.messages.numerals import as_json
from rl_ebm.policies import Policy
from rl_ebm.studies.audit import MEASURES, any_of, is_target, measures
from rl_ebm.studies.losses import beyond as further
from rl_ebm.studies.losses.advantages import Advantages
from rl_ebm.studies.losses.cases import Asked, Case, Kind, asked, cases_of, ended, sizes_of
from rl_ebm.studies.losses.flow import Limit
from rl_ebm.studies.losses.preference import Pairs

SURVIVORS = 5
"""responses of a limit on the boundary that are named"""
LABELS = dict(zip(MEASURES, ("TV", "KL(fp, p*)", "KL(p*, fp)", "E[R]"), strict=False))
EXACT = 1e-8
"""accuracy from which on a limit is one"""
VAGUE = 0.1
"""accuracy from which on a limit is not known"""
NEARLY = 1e-6
"""total variation up to which a limit that is known no better is the EBM"""


@dataclass(frozen=True)
class LossAudit:
    """What a loss converges to, with the keys of ``rl-ebm audit --json``, and more.

    Attributes:
        objective: the name that the loss goes by.
        options: its kind, and what :func:`audit_loss` was told of it.
        degenerate, is_target, tv, kl_fixed_point_target, kl_target_fixed_point, expected_reward,
            kl_reference, how, other_roots, depends_on_sampler: as :func:`rl_ebm.audit` has them;
            nats and reward units, means over the prompts.
        accuracy: total variation that the limit may be off by; of more than 0.1 there is none.
        survivors: of a limit on the boundary, how many responses keep a probability, and the
            likeliest of them.
        combines: how rows make a batch: "rows" add up, or share a count of "tokens", or "both".
        gradient_at_target: ``norm`` of the expected gradient at the EBM, over all logits; in units
            of the standard deviation of one response's, ``signal_to_noise``; and the responses that
            it ``favours``, with the rate of their probability.
        variance: at "reference" and "target", the variance of the gradient of "one" response (the
            trace of its covariance) and of groups of 2, 4, 8, 16, exact or as an interval, and the
            ``signal_to_noise`` of one.
        groups: for each size of group, ``tv`` of the limit from the EBM.
        sampler: the same where the sampler is late by so many updates, or reads its logits in
            bfloat16, without and with the correction by the ratio of both; and the norm of the
            expected gradient at the EBM.
        clipped: share of the drawn tokens, at the EBM and at the limit, that the loss gives no
            gradient though their advantage is not 0.
        has_reference: whether the EBM has one; without, ``kl_reference`` is minus the entropy.
        log_laws: the limit itself, of every response to each prompt in enumeration order; None
            where it did not settle.
    """

    objective: str
    options: dict[str, Any]
    degenerate: bool | None
    is_target: bool | None
    tv: float | None
    kl_fixed_point_target: float | None
    kl_target_fixed_point: float | None
    expected_reward: float | None
    kl_reference: float | None
    how: str
    other_roots: list[float]
    depends_on_sampler: bool | None
    accuracy: float
    survivors: dict[str, Any] | None
    combines: str
    gradient_at_target: dict[str, Any]
    variance: dict[str, Any]
    groups: dict[str, Any]
    sampler: dict[str, Any]
    clipped: dict[str, float | None]
    has_reference: bool
    log_laws: Tensor | None = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON, without the laws; infinite numbers as text."""
        values = {n: v for n, v in vars(self).items() if n != "log_laws"}
        return {name: _plain(value) for name, value in values.items()}

    def __str__(self) -> str:
        return to_text(self)


def audit_loss(
    loss: Callable[..., Any],
    solution: Solution,
    kind: Kind = "policy-gradient",
    *,
    advantages: str | Advantages | Callable[..., Any] = "centred",
    sampler: str | float | Policy | None = None,
    start: Policy | None = None,
    inner_steps: int = 1,
    lr: float | None = None,
    pairs: Any = None,
    name: str | None = None,
    options: dict[str, Any] | None = None,
    beyond: bool = True,
    groups: Sequence[int] | None = None,
) -> LossAudit:
    """What anybody's loss converges to on an EBM that can be solved: exactly, in one call.

    Args:
        loss: a function; :mod:`rl_ebm.studies.losses.audit` has what each kind is given.
        solution: of the EBM that the limit is held against, ``rl_ebm.solve(ebm)``.
        kind: "policy-gradient", "distillation" or "preference".
        advantages: of policy gradients: "centred" (R less its mean), "leave-one-out" (the same in a
            group without end), "group-std" (over the standard deviation as well), or a function
            ``(rewards, log_pi_old, log_ref, mask) -> (B,) or (B, T)``: what is paid as a reward.
        sampler: who draws: "policy" ("student"), "reference", "teacher" (the EBM), or a policy; of
            distillation also the student's share of the draws, the teacher having the rest. None:
            the policy, and the reference for preferences.
        start: where the flow begins; None for the reference.
        inner_steps: gradient steps on each batch, with ``log_pi_old`` held (PPO's epochs), each of
        lr: times the gradient of the mean over responses; None for one that moves no logit by more
            than 0.1 at the start.
        pairs: of preferences, Pairs(labels, temperature): who wins, and how warm the policy draws.
        name: what the loss is called; None for the function's own name.
        options: that are told with it.
        beyond: whether to say ``variance``, ``groups`` and ``sampler``; and ``other_roots``, for
            which no starts are tried of over a million pairs, and none is followed along a kink.
        groups: sizes of groups of which to say the limit, of policy gradients; None for 2, 4, 8 and
            16, as far as that takes seconds.

    Raises:
        TypeError: no function, no exact solution, or an argument of another kind.
        ValueError: an unknown name, an EBM that is too large to list, or a loss that cannot be
            audited (:class:`rl_ebm.studies.losses.contract.LossError` says what was seen of it).
    """
    if not isinstance(options, dict | None):
        raise TypeError(f"options are those that are told, {{name: value}}, got {shown(options)}")
    what = asked(loss, kind, advantages, sampler, start, inner_steps, lr, pairs)
    sizes = None if groups is None else sizes_of(groups, kind)
    cases = cases_of(what, solution)
    ends = [ended(case) for case in cases]
    return LossAudit(
        objective=_name(loss) if name is None else name,
        options=_options(what) | (options or {}),
        **_limit(cases, ends),
        combines=cases[0].flow.rows.combination,
        gradient_at_target=further.at_target(cases),
        **_further(what, cases, ends, beyond, sizes),
        has_reference=solution.ebm.reference is not None,
    )


def _name(loss: Callable[..., Any]) -> str:
    return getattr(loss, "__name__", type(loss).__name__)


def _options(what: Asked) -> dict[str, Any]:
    """What makes the limit, in words; what is as usual is left out."""
    found: dict[str, Any] = {"kind": what.kind}
    if what.kind == "policy-gradient":
        found["advantages"] = what.advantages.combine
    if what.sampler is not None:
        known = isinstance(what.sampler, (str, float))
        found["sampler"] = what.sampler if known else type(what.sampler).__name__
    if what.inner_steps > 1:
        found["inner_steps"] = what.inner_steps
    usual = Pairs()
    found |= {k: v for k, v in vars(what.pairs).items() if v != vars(usual)[k]}
    return found


def _limit(cases: Sequence[Case], ends: Sequence[Limit]) -> dict[str, Any]:
    """The keys of ``rl-ebm audit``, and how exactly they are known."""
    problems = [case.responses.problem for case in cases]
    points = [_point(case, end) for case, end in zip(cases, ends, strict=True)]
    known = [measures(p.log_law, c) for p, c in zip(points, problems, strict=True)]
    found = [m for m in known if m is not None]
    whole = len(found) == len(cases)
    accuracy = max(end.accuracy for end in ends)
    faint = any(end.faint for end in ends)
    verdict = is_target(points, problems) if accuracy <= EXACT and not faint else None
    if verdict is None and whole:  # of a loss in float32, along a kink, or too rare for float64
        off = fmean(m["tv"] for m in found)
        if off <= min(accuracy, NEARLY) and not faint:
            verdict = True
        elif off > 10 * accuracy + EXACT:
            verdict = False
    return {
        "degenerate": any_of([p.degenerate for p in points]),
        "is_target": verdict,
        **{key: fmean(m[key] for m in found) if whole else None for key in MEASURES},
        "how": next((p.how for p in points if p.log_law is None), points[0].how),
        "accuracy": accuracy,
        "survivors": _survivors(cases, ends),
        "log_laws": torch.stack([p.log_law for p in points if p.log_law is not None])
        if whole
        else None,
    }


def _point(case: Case, end: Limit) -> FixedPoint:
    if not end.settled:
        return FixedPoint(None, degenerate=bool(end.dead.any()) or None, how="not settled")
    if end.accuracy > VAGUE:
        where = "slides along a kink" if end.kink else "comes to one rest of many"
        return FixedPoint(None, None, f"{where}, and was not followed to its end")
    how = "flow, along a kink" if end.kink else "flow"
    if end.many:
        how += ", to one rest of many"
    degenerate = None if end.faint else bool(end.dead.any())
    return FixedPoint(case.responses.whole(end.log_law), degenerate, how)


def _survivors(cases: Sequence[Case], ends: Sequence[Limit]) -> dict[str, Any] | None:
    """How many responses keep a probability, of all prompts, and the likeliest."""
    if not any(bool(end.dead.any()) for end in ends):
        return None
    alive = [end.log_law > -torch.inf for end in ends]
    best = []
    for case, end in zip(cases, ends, strict=True):
        p = end.log_law.exp()
        r = case.responses
        for value, i in zip(*(x.tolist() for x in p.topk(min(SURVIVORS, len(p)))), strict=True):
            if value > 0:
                best.append({"tokens": r.tokens[i][r.mask[i]].tolist(), "probability": value})
    best.sort(key=lambda x: -float(x["probability"]))
    return {"responses": sum(int(x.sum()) for x in alive), "likeliest": best[:SURVIVORS]}


def _further(
    what: Asked,
    cases: Sequence[Case],
    ends: Sequence[Limit],
    beyond: bool,
    sizes: Sequence[int] | None,
) -> dict[str, Any]:
    """What needs more than the flow that led to the limit."""
    policy_gradient = what.kind == "policy-gradient"
    found: dict[str, Any] = {
        "other_roots": [],
        "depends_on_sampler": any_of(
            [further.depends_on_sampler(c, e) for c, e in zip(cases, ends, strict=True)]
        ),
        "variance": {},
        "groups": {},
        "sampler": {},
        "clipped": {},
    }
    if not beyond:
        return found
    for case, end in zip(cases, ends, strict=True):
        if end.settled:
            roots = further.other_roots(case, end)
            target = case.responses.log_law(case.target)
            found["other_roots"] += [float(tv(x, target)) for x in roots]
    found["variance"] = further.variances(cases)
    if policy_gradient:
        found["groups"] = further.small_groups(cases, sizes)
        found["sampler"] = further.other_samplers(cases, ends)
        found["clipped"] = {
            "target": further.clipped(cases, lambda c: c.target),
            "target, 4 updates late": further.clipped(cases, lambda c: c.target, 4),
            "reference, 4 updates late": further.clipped(cases, lambda c: c.responses.start, 4),
        }
    return found


def _plain(value: Any) -> Any:
    """JSON: infinite numbers as text, in whatever holds them."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return as_json(value)


def to_text(found: LossAudit) -> str:
    """An audit for people."""

    def number(x: float | None) -> str:
        return "?" if x is None else f"{x:.4g}"

    verdict = {True: "the EBM", False: "not the EBM", None: "not known exactly"}[found.is_target]
    if found.degenerate:
        verdict += ", on the boundary"
    labels = LABELS | {"kl_reference": "KL(fp, ref)" if found.has_reference else "-H(fp)"}
    told = ", ".join(f"{k}={v}" for k, v in found.options.items())
    lines = [
        f"{found.objective} ({told}) ends at: {verdict}",
        "  " + "   ".join(f"{labels[key]} {number(vars(found)[key])}" for key in MEASURES),
        f"  how: {found.how}, accurate to {found.accuracy:.1g} in TV; rows combine as "
        f"{found.combines}",
        f"  gradient at the EBM: norm {found.gradient_at_target['norm']:.4g}, signal to noise of "
        f"one response {found.gradient_at_target['signal_to_noise']:.4g}",
    ]
    for best in found.gradient_at_target["favours"]:
        lines.append(f"    favours {best['tokens']} (dp/dt {best['rate']:.3g})")
    if found.survivors is not None:
        lines.append(f"  survivors: {found.survivors['responses']} responses")
    lines += [f"  another root at TV {x:.4g}" for x in found.other_roots]
    for where, known in found.variance.items():
        lines.append(f"  variance of one response's gradient at the {where}: {known['one']:.4g}")
    changed = [*((f"groups of {k}", v) for k, v in found.groups.items()), *found.sampler.items()]
    for what, x in changed:
        off = "" if x["tv"] is None or x["accuracy"] <= EXACT else f" ± {x['accuracy']:.1g}"
        why = f" ({x['why']})" if "why" in x else ""
        lines.append(f"  {what}: TV {number(x['tv'])}{off}{why}")
    return "\n".join(lines)
