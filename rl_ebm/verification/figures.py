"""The figures of a report: one table, from which all else is made.

An entry of :class:`Figures` (or :class:`Bounds`) is a field with all there is to say of a figure:
its name in texts, unit, how prompts combine, what it is at every prefix
(:mod:`rl_ebm.verification.every_prefix`) and along samples (:mod:`rl_ebm.verification.laws`), and
the sentence of the documentation. Reports, their text and JSON, TensorBoard's scalars and hparams,
``rl-ebm bench`` and the README read :data:`FIGURES`.

A new figure is one entry here, and its value by brute force in ``tests/support/verify_cases.py``;
``python -m benchmarks.readme`` then writes it into the README.
"""

# ruff: noqa: RUF009 - an entry is an immutable value
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Generic, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm import bounds, divergences
from rl_ebm.soft_bellman import expectation
from rl_ebm.statistics.expectations import bounded
from rl_ebm.verification import forms
from rl_ebm.verification.entry import NATS, REWARD, SHARE, Figure, Row, entry
from rl_ebm.verification.every_prefix import Accumulator, Sum

T = TypeVar("T")
_FROM_REFERENCE = "KL from reference (none: -H)"


@dataclass(frozen=True, kw_only=True)
class Bounds(Generic[T]):
    """Bounds on KL(policy, target), the loosest first; see :mod:`rl_ebm.bounds`.

    From samples the occupancy bound is estimated, the others cannot be: they need the largest
    error of all states, and what was visited bounds that from below alone.
    """

    prop3: T = entry(
        "bound of Proposition 3",
        NATS,
        "2T‖q − q*‖∞ with the best constant at each state: T times the largest span",
        exact=lambda t: bounds.prop3_bound(_spans(t), t.space.max_length),
        sampled=lambda s: forms.at_least(
            float(bounds.prop3_bound(forms.visited_span(s), s.solution.space.max_length)),
            s.confidence,
        ),
        infinite=True,
        row=Row("bound", "<= 2T |q - q*| (Prop. 3)"),
        told="bounds/prop3",
        bounds="kl_policy_target",
    )
    span: T = entry(
        "span bound",
        NATS,
        "n K(L): n decisions of a response, the largest span L of the error at a state",
        exact=lambda t: bounds.span_bound(_spans(t), t.space),
        sampled=lambda s: forms.at_least(
            float(bounds.span_bound(forms.visited_span(s), s.space)), s.confidence
        ),
        infinite=True,
        row=Row("bound", "<= span bound"),
        told="bounds/span",
        bounds="kl_policy_target",
    )
    occupancy: T = entry(
        "occupancy bound",
        NATS,
        "K(L) of each state, weighted by how often the policy is there",
        exact=Sum(
            of_states=lambda s: expectation(s.log_s, bounds.span_kl(s.spans)),
            finish=lambda total, t: total.masked_fill(t.forbidden_reached, torch.inf),
        ),
        sampled=lambda s: forms.of_policy(s, lambda v: v.occupancy, s.impossible or s.missing),
        infinite=True,
        row=Row("bound", "<= occupancy bound"),
        told="bounds/occupancy",
        bounds="kl_policy_target",
    )


def _spans(tree: Accumulator) -> Float[Tensor, "P"]:
    """The largest L_s; infinite where the policy gives what is impossible."""
    return tree.max_span.masked_fill(tree.forbidden_reached, torch.inf)


def _of_values(x: Callable[[Accumulator], Tensor]) -> Callable[[Accumulator], Tensor | None]:
    """None unless the policy's logits are values."""
    return lambda tree: x(tree) if tree.values else None


@dataclass(frozen=True, kw_only=True)
class Figures(Generic[T]):
    """Every figure of one report, in nats and reward units: numbers, or intervals around them."""

    form: ClassVar[Literal["exact", "sampled"]] = "exact"

    log_z: float = entry(
        "log Z",
        NATS,
        "log of the sum of p_ref exp(R/β) over all responses; exact from samples too",
        exact=lambda t: t.solution.log_z[t.ids],
        sampled=lambda s: s.log_z,
        row=Row("top"),
    )
    log_z_policy: float | None = entry(
        "the policy's log Z",
        NATS,
        "the log Z that the policy's values claim: V of the empty prefix, the logsumexp of its raw "
        "logits; only where these are values",
        exact=_of_values(lambda t: t.v_root),
        sampled=lambda s: s.v_root if s.values else None,
        row=Row("top"),
    )
    kl_target_policy: T = entry(
        "KL(target, policy)",
        NATS,
        "KL(p*, π): punishes what the policy misses",
        exact=lambda t: torch.stack(t.kl).sum(0),
        sampled=lambda s: forms.of_target(s, lambda v: v.kl, s.missing),
        infinite=True,
        row=Row("distance"),
        benched=True,
    )
    kl_policy_target: T = entry(
        "KL(policy, target)",
        NATS,
        "KL(π, p*): punishes what the policy makes up",
        exact=Sum(lambda s: expectation(s.log_s, divergences.kl(s.log_pi, s.log_pi_star))),
        sampled=lambda s: forms.of_policy(s, lambda v: v.kl, s.impossible),
        infinite=True,
        row=Row("distance"),
        benched=True,
    )
    tv: T = entry(
        "total variation",
        SHARE,
        "half of Σ|p* − π|: the most that the two probabilities of an event differ",
        # Sums over all responses pass their bounds by rounding.
        exact=Sum(
            of_responses=lambda y: divergences.tv(y.log_star, y.log_pi),
            finish=lambda total, _: total.clamp(max=1.0),
        ),
        sampled=forms.tv,
        row=Row("distance"),
        benched=True,
    )
    js: T = entry(
        "Jensen-Shannon",
        NATS,
        "mean KL of both to their mixture; at most log 2",
        exact=Sum(
            of_responses=lambda y: divergences.js(y.log_star, y.log_pi),
            finish=lambda total, _: total.clamp(0.0, math.log(2)),
        ),
        sampled=lambda s: bounded(forms.halves(s, forms.js), math.log(2), s.confidence),
        row=Row("distance"),
    )
    hellinger2: T = entry(
        "squared Hellinger",
        SHARE,
        "1 − Σ√(p* π), in [0, 1]: half of Σ(√p* − √π)²",
        exact=Sum(
            # Not 1 - sum: that loses what is small.
            of_responses=lambda y: ((y.log_star / 2).exp() - (y.log_pi / 2).exp()).square() / 2,
            finish=lambda total, _: total.clamp(max=1.0),
        ),
        sampled=lambda s: bounded(forms.halves(s, forms.hellinger2), 1.0, s.confidence),
        row=Row("distance"),
    )
    entropy_target: T = entry(
        "entropy of the target",
        NATS,
        "Shannon entropy of p*, without the reference",
        exact=Sum(of_responses=lambda y: divergences.entropy(y.log_star)),
        sampled=forms.entropy_target,
        row=Row("target", "entropy"),
        told="entropy_target",
    )
    entropy_policy: T = entry(
        "entropy of the policy",
        NATS,
        "Shannon entropy of π, without the reference",
        exact=Sum(of_responses=lambda y: divergences.entropy(y.log_pi)),
        sampled=lambda s: forms.entropy_interval(s.mine.visits, s.confidence),
        row=Row("policy", "entropy"),
        told="entropy_policy",
    )
    expected_reward_target: T = entry(
        "expected reward, target",
        REWARD,
        "E R under p*",
        exact=Sum(of_responses=lambda y: expectation(y.log_star, y.reward)),
        sampled=forms.reward_target,
        row=Row("target", "expected reward"),
        told="expected_reward_target",
    )
    expected_reward_policy: T = entry(
        "expected reward, policy",
        REWARD,
        "E R under π; −∞ where it gives what has reward −∞",
        exact=Sum(of_responses=lambda y: expectation(y.log_pi, y.reward)),
        sampled=forms.reward_policy,
        infinite=True,
        row=Row("policy", "expected reward"),
        told="expected_reward_policy",
        benched=True,
    )
    kl_target_reference: T = entry(
        "KL(target, reference)",
        NATS,
        "KL(p*, p_ref) = E R/β − log Z; without a reference p_ref counts each response as 1, and "
        "this is minus the entropy of p*",
        exact=Sum(
            lambda s: expectation(s.log_s_star, divergences.kl(s.log_pi_star, s.log_ref)),
        ),
        sampled=forms.kl_target_reference,
        row=Row("target", _FROM_REFERENCE),
    )
    kl_policy_reference: T = entry(
        "KL(policy, reference)",
        NATS,
        "KL(π, p_ref); infinite where π gives what the reference forbids; without a reference "
        "minus the entropy of π",
        exact=Sum(lambda s: expectation(s.log_s, divergences.kl(s.log_pi, s.log_ref))),
        sampled=forms.kl_policy_reference,
        infinite=True,
        row=Row("policy", _FROM_REFERENCE),
    )
    mass_impossible: T = entry(
        "mass on impossible",
        SHARE,
        "what the policy gives to responses with p* = 0, of reward −∞ or that the reference "
        "forbids; any makes KL(policy, target) infinite",
        exact=Sum(
            of_responses=lambda y: y.log_pi.exp().masked_fill(~torch.isneginf(y.log_star), 0.0),
            finish=lambda total, _: total.clamp(max=1.0),
        ),
        sampled=lambda s: bounded(
            torch.isneginf(s.mine.visits.log_star).double(), 1.0, s.confidence
        ),
        row=Row("distance"),
    )
    logits_linf: T = entry(
        "logit error, max",
        NATS,
        "max of |q − q*| over states with p*(s) > 0, centred by its mean over the allowed actions: "
        "logits are defined up to a constant there; from samples, of the states that were visited",
        exact=lambda t: torch.stack(t.linf).amax(0),
        sampled=lambda s: forms.largest(s, lambda v: max(v.linf)),
        prompts="max",
        infinite=True,
        row=Row("error"),
        told="logit error, max visited",
    )
    logits_linf_target: T | None = entry(
        "logit error, mean, target",
        NATS,
        "the mean over the states that samples of the target visit of each one's largest error",
        sampled=forms.OverStates(
            "star", lambda v: v.error, lambda v: v.reached, lambda s: s.missing
        ),
        infinite=True,
    )
    logits_linf_policy: T | None = entry(
        "logit error, mean, policy",
        NATS,
        "the same of samples of the policy; of states that the target never reaches none",
        sampled=forms.OverStates(
            "mine", lambda v: v.error, lambda v: v.reached, lambda s: s.missing
        ),
        infinite=True,
    )
    logits_span: T = entry(
        "logit span, max",
        NATS,
        "the largest L_s = max − min of q − q* over the allowed actions of a state",
        exact=lambda t: t.max_span,
        sampled=lambda s: forms.largest(s, lambda v: v.max_span),
        prompts="max",
        infinite=True,
        row=Row("aside", "span"),
        told="logit span, max visited",
    )
    log_ratio_span: T = entry(
        "span of the log-ratio",
        NATS,
        "max − min of log π − log p* over responses",
        exact=lambda t: t.ratio_high - t.ratio_low,
        sampled=forms.log_ratio_span,
        prompts="max",
        infinite=True,
        told="log_ratio_span",
    )
    bellman_residual_max: T | None = entry(
        "Bellman residual, max",
        NATS,
        "max of |q − r − V(s a)| on raw logits; only where these are values (`soft-q`, exact "
        "solutions)",
        exact=_of_values(lambda t: t.max_residual),
        sampled=lambda s: forms.largest(s, lambda v: v.max_residual) if s.values else None,
        prompts="max",
        infinite=True,
        row=Row("error"),
    )
    bellman_residual_mean: T | None = entry(
        "Bellman residual, mean",
        NATS,
        "its mean over the allowed actions, then over states under p*; from samples, over the "
        "transitions of those of the target",
        exact=_of_values(lambda t: t.sums["residual"] / t.sums["weight"]),
        sampled=forms.OverStates(
            "star", lambda v: v.residual, forms.num_tokens, lambda s: s.missing, of_values=True
        ),
        infinite=True,
        row=Row("aside", "mean"),
        told="Bellman residual, target",
    )
    bellman_residual_mean_policy: T | None = entry(
        "Bellman residual, policy",
        NATS,
        "the same over the transitions of samples of the policy",
        sampled=forms.OverStates(
            "mine", lambda v: v.residual, forms.num_tokens, lambda s: s.impossible, of_values=True
        ),
        infinite=True,
    )
    bounds: Bounds[T]


def _entries(kind: type, group: str = "") -> list[Figure]:
    found = [(f.name, f.metadata["figure"]) for f in fields(kind) if "figure" in f.metadata]
    return [replace(figure, key=group + name) for name, figure in found]


FIGURES: tuple[Figure, ...] = (*_entries(Figures), *_entries(Bounds, "bounds/"))
"""the table"""
SUMS = {f.key: f.exact for f in FIGURES if isinstance(f.exact, Sum)}
"""what is summed up over all prefixes or responses"""
