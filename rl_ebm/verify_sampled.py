r"""Verify a policy where prefixes cannot be listed, against a solution that knows each of them.

log p* is exact at every response, and p* can be sampled. So both divergences come from the chain
rule with the exact divergence at every visited state (Rao-Blackwell: the next token is never
drawn to know the KL there), and the total variation and Jensen-Shannon divergence from variables
that are bounded, with intervals that hold for every number of samples.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm import bounds
from rl_ebm.certificates.limits import sample_interval
from rl_ebm.estimates import Interval, check_confidence
from rl_ebm.exact import AutomatonSolution, Solution, summarise_automaton
from rl_ebm.mean_bounds import betting_lower, betting_upper
from rl_ebm.policies.scoring import Policy, device_of, evaluating, sample
from rl_ebm.report_sampled import (
    SampledBounds,
    SampledDepth,
    SampledReport,
    combine_sampled,
)
from rl_ebm.tokens import Batch
from rl_ebm.visits import WORST, Visits, rows_at_once

SAMPLES = 100
"""responses of target and policy each that a verification while training reads, at most"""


def samples_at(max_length: int) -> int:
    """How many responses a verification while training reads: what each takes is quadratic."""
    return max(8, min(SAMPLES, 2**25 // max_length**2))


@torch.no_grad()
def verify_sampled(
    policy: Policy,
    solution: Solution,
    samples: int = 1000,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
    memory: int = 2**28,
) -> SampledReport:
    """Compare any policy with the exact one along exact samples of both.

    Args:
        policy: anything with ``logits``, and better with ``start`` and ``step``.
        solution: of :func:`rl_ebm.solve`.
        samples: responses of the target, and as many of the policy, for each prompt.
        confidence: of every interval by itself.
        generator: on the CPU, or where policy and solution are; None for the global one.
        memory: about how many bytes the logits of one step may take.

    Raises:
        ValueError: fewer samples than 2, a confidence out of (0, 1), a policy for other prompts,
            or one whose logits are NaN or +inf.
    """
    check_confidence(confidence)
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}: one has no spread")
    solution.ebm.check_policy(policy)
    # The means over prompts hold where every prompt's own interval does.
    each = 1 - (1 - confidence) / solution.ebm.num_prompts
    with evaluating(policy):
        reports = [
            _verify_prompt(policy, solution, prompt, samples, each, generator, memory)
            for prompt in range(solution.ebm.num_prompts)
        ]
    return reports[0] if len(reports) == 1 else combine_sampled(reports)


def _verify_prompt(
    policy: Policy,
    solution: Solution,
    prompt: int,
    samples: int,
    confidence: float,
    generator: torch.Generator | None,
    memory: int,
) -> SampledReport:
    space, ebm = solution.space, solution.ebm
    values = bool(getattr(policy, "logits_are_values", False))
    device = device_of(policy)
    ids = torch.full((samples,), prompt, device=solution.device)
    drawn = solution.sample(samples, generator, ids).clean()
    parts = ids.to(device).split(rows_at_once(policy, space, memory))
    own = Batch.cat([sample(policy, space, len(part), generator, part) for part in parts])
    own = own.clean().to(solution.device)
    star = Visits(solution, drawn, True, values)
    mine = Visits(solution, own, False, values)
    for visits in (star, mine):
        visits.walk(policy, memory)
    reward_star = ebm.reward(drawn.tokens, drawn.lengths, drawn.prompt_ids).double().cpu()
    reward = ebm.reward(own.tokens, own.lengths, own.prompt_ids).double().cpu()
    tv = torch.cat([_shortfall(star.log_pi, star.log_star), _shortfall(mine.log_star, mine.log_pi)])
    halves = [_js(star), _js(mine)]
    lost = torch.isneginf(mine.log_star)
    reached = bool(lost.any())
    kl = sample_interval(mine.kl.masked_fill(lost, math.inf), confidence)
    span = max(star.max_span, mine.max_span)
    occupancy = mine.occupancy.masked_fill(lost, math.inf)
    ratio = torch.cat([(v.log_pi - v.log_star)[~torch.isneginf(v.log_star)] for v in (star, mine)])
    log_ratio_span = math.inf if reached else float(ratio.max() - ratio.min())
    worst = sorted([*star.worst, *mine.worst], key=lambda x: x[:2], reverse=True)
    seen: list[list[int]] = []
    prefixes = []
    for _, _, prefix in worst:
        if prefix.prefix not in seen:
            seen.append(prefix.prefix)
            prefixes.append(prefix)
    states, own_states = (x.lengths.double().cpu() for x in (drawn, own))
    known = None
    if isinstance(solution, AutomatonSolution):
        known = summarise_automaton(solution, 0, prompt)
    return SampledReport(
        mode="sampled",
        num_samples=samples,
        num_sequences=space.num_sequences,
        log_z=float(solution.log_z[prompt]),
        kl_target_policy=_positive(sample_interval(star.kl, confidence)),
        kl_policy_target=_positive(kl),
        tv=bounded(tv, 1.0, confidence),
        js=bounded((halves[0] + halves[1]) / 2, math.log(2), confidence),
        entropy_target=certain(known.entropy, confidence)
        if known is not None and known.entropy is not None
        else entropy_interval(star, confidence),
        entropy_policy=entropy_interval(mine, confidence),
        expected_reward_target=certain(known.expected_reward, confidence)
        if known is not None and known.expected_reward is not None
        else sample_interval(reward_star, confidence),
        expected_reward_policy=sample_interval(reward, confidence),
        mass_impossible=bounded(lost.double(), 1.0, confidence),
        logits_linf=at_least(max(*star.linf, *mine.linf), confidence),
        logits_linf_target=ratio_interval(star.error, star.reached, confidence),
        logits_linf_policy=ratio_interval(mine.error, mine.reached, confidence),
        logits_span=at_least(span, confidence),
        log_ratio_span=at_least(log_ratio_span, confidence),
        bellman_residual_max=at_least(max(star.max_residual, mine.max_residual), confidence)
        if values
        else None,
        bellman_residual_mean=ratio_interval(star.residual, states, confidence) if values else None,
        bellman_residual_mean_policy=ratio_interval(mine.residual, own_states, confidence)
        if values
        else None,
        bounds=SampledBounds(
            at_least(float(bounds.prop3_bound(_scalar(span), space.max_length)), confidence),
            at_least(float(bounds.span_bound(_scalar(span), space)), confidence),
            _positive(sample_interval(occupancy, confidence)),
        ),
        per_depth=[
            SampledDepth(
                t,
                int((drawn.lengths > t).sum()),
                max(star.linf[t], mine.linf[t]),
                _positive(sample_interval(star.kl_at[:, t], confidence)),
            )
            for t in range(space.max_length)
        ],
        worst_prefixes=prefixes[:WORST],
    )


def _scalar(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def _shortfall(log_p: Tensor, log_q: Tensor) -> Float[Tensor, "n"]:
    """max(0, 1 - p / q) at samples of q: its mean is the total variation."""
    return -torch.expm1((log_p - log_q).clamp(max=0.0))


def _js(visits: Visits) -> Float[Tensor, "n"]:
    """log 2 - h(w), w = p* / (p* + pi): its mean under (p* + pi) / 2 is the divergence."""
    log_w = torch.nn.functional.logsigmoid(visits.log_star - visits.log_pi)
    log_rest = torch.nn.functional.logsigmoid(visits.log_pi - visits.log_star)
    parts = [(x.exp() * x).masked_fill(torch.isneginf(x), 0.0) for x in (log_w, log_rest)]
    return (math.log(2) + parts[0] + parts[1]).clamp(0.0, math.log(2))


def bounded(x: Float[Tensor, "n"], most: float, confidence: float) -> Interval:
    """Of E x, 0 <= x <= most, by betting on either side: it holds for every n."""
    alpha = 1 - confidence
    log_x, mean = x.log(), float(x.mean())
    low = float(betting_lower(log_x, alpha / 2).exp())
    high = float(betting_upper(log_x, math.log(most), alpha / 2).exp())
    return Interval(mean, min(low, mean), max(min(high, most), mean), confidence, "finite-sample")


def entropy_interval(visits: Visits, confidence: float) -> Interval:
    """Of a law's entropy: no state has more than log A, so the sum of a response is bounded."""
    most = visits.space.num_decisions * math.log(visits.space.vocab_size)
    if most == 0:
        return certain(0.0, confidence)
    return bounded(visits.entropy.clamp(0.0, most), most, confidence)


def certain(x: float, confidence: float) -> Interval:
    """Of what an automaton gives exactly."""
    return Interval(x, x, x, confidence, "finite-sample")


def at_least(x: float, confidence: float) -> Interval:
    """Of a maximum over all states, of which some were visited."""
    return Interval(x, x, math.inf, confidence, "one-sided finite-sample")


def ratio_interval(
    x: Float[Tensor, "n"], weight: Float[Tensor, "n"], confidence: float
) -> Interval:
    """Of E x / E weight, by the delta method."""
    mean = float(x.sum() / weight.sum())
    if not math.isfinite(mean):
        return Interval(mean, mean, mean, confidence, "finite-sample")
    spread = sample_interval((x - mean * weight) / weight.mean(), confidence)
    # The deviations have mean 0 but for rounding.
    low, high = min(spread.low, 0.0), max(spread.high, 0.0)
    return Interval(mean, max(mean + low, 0.0), mean + high, confidence, "asymptotic")


def _positive(interval: Interval) -> Interval:
    """The interval of what cannot be negative."""
    low, high = max(interval.low, 0.0), max(interval.high, 0.0)
    return replace(interval, estimate=max(interval.estimate, 0.0), low=low, high=high)
