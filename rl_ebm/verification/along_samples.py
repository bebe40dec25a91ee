r"""Verify a policy where prefixes cannot be listed, against a solution that knows each of them.

log p* is exact at every response, and p* can be sampled. So both divergences come from the chain
rule with the exact divergence at every visited state (Rao-Blackwell: the next token is never
drawn to know the KL there), and the total variation and Jensen-Shannon divergence from variables
that are bounded, with intervals that hold for every number of samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_ebm import bounds
from rl_ebm.exact import Solution
from rl_ebm.policies.base import Policy, device_of, evaluating, forbids_of, logits_are_values
from rl_ebm.policies.detours import MOST, all_responses, are_listed, detours, rows_at_once
from rl_ebm.policies.scoring import sample
from rl_ebm.rewards.base import limits_of
from rl_ebm.statistics.expectations import Known, bounded, certain, expectation, ratio_expectation
from rl_ebm.statistics.expectations import ratio_interval as ratio_interval
from rl_ebm.statistics.interval import Interval, check_confidence, check_samples
from rl_ebm.tokens import Batch
from rl_ebm.verification.sampled_report import (
    SampledBounds,
    SampledDepth,
    SampledPrefix,
    SampledReport,
    combine_sampled,
)
from rl_ebm.verification.visits import WORST, Visits

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
    check_samples(samples, 2, ": one has no spread")
    # The means over prompts hold where every prompt's own interval does.
    each = 1 - (1 - confidence) / solution.ebm.num_prompts
    with evaluating(policy):
        rows = rows_at_once(policy, solution.space, memory)
        solution.ebm.check_policy(policy, rows=rows, steps=True)
        reports = [
            _verify_prompt(policy, solution, prompt, samples, each, generator, memory)
            for prompt in range(solution.ebm.num_prompts)
        ]
    return reports[0] if len(reports) == 1 else combine_sampled(reports)


@dataclass(frozen=True)
class _Along:
    """One law's samples, and responses that it hardly gives: figures, and rewards."""

    batch: Batch
    visits: Visits
    reward: Float[Tensor, "n"]
    beyond: Visits
    """along detours, or along all responses that are possible under the law"""
    beyond_reward: Float[Tensor, "e"]
    masses: Float[Tensor, "e"] | None
    """of the tokens that turn the detours off; None where all responses are listed"""

    @property
    def here(self) -> Bool[Tensor, "e"]:
        """Which of the other responses are possible under the law."""
        law = self.beyond.log_star if self.beyond.of_target else self.beyond.log_pi
        return ~torch.isneginf(law)

    def known(self, x: Float[Tensor, "e"], known: Known) -> Known:
        """With the values of a variable along the other responses."""
        x, here = x[self.here], self.here
        if self.masses is not None:
            return replace(known, elsewhere=x, masses=self.masses[here])
        law = self.beyond.log_star if self.beyond.of_target else self.beyond.log_pi
        # All values have been seen: they bound it, and where none is infinite none can be.
        ends = float(x.min()), float(x.max())
        return Known(*ends, x, law[here].exp(), listed=True, unit=known.unit)

    def error(self, x: Float[Tensor, "e"], above: str) -> Known:
        """Of a divergence or an error, in nats, at least 0."""
        return self.known(x, Known(0.0, above=above, unit=1.0))


def _walk(policy: Policy, solution: Solution, batch: Batch, of_target: bool, memory: int) -> _Along:
    """Walk along samples of the target, or of the policy, and along others that it hardly gives."""
    values = logits_are_values(policy)
    law: Policy = solution if of_target else policy
    space, n = solution.space, len(batch)
    masses = None
    if are_listed(space, n):
        others = all_responses(space, int(batch.prompt_ids[0]), solution.device)
    else:
        some = batch.take(torch.arange(min(n, MOST), device=batch.tokens.device))
        at_once = rows_at_once(law, space, memory)
        others, masses = detours(law, space, some.to(device_of(law)), at_once)
        masses = masses.cpu()
    batches = batch, others.clean().to(solution.device)
    walks = [Visits(solution, b, of_target, values) for b in batches]
    rewards = []
    for visits, b in zip(walks, batches, strict=True):
        visits.walk(policy, memory, n)
        rewards.append(solution.ebm.reward(b.tokens, b.lengths, b.prompt_ids).double().cpu())
    return _Along(batch, walks[0], rewards[0], walks[1], rewards[1], masses)


class _Claims:
    """Intervals of one confidence, and the reasons for ends that are open, by name."""

    def __init__(self, confidence: float) -> None:
        self.confidence = confidence
        self.why: dict[str, str] = {}

    def mean(self, name: str, x: Tensor, known: Known) -> Interval:
        """Of E x."""
        interval, why = expectation(x, self.confidence, known)
        return self._noted(name, interval, why)

    def ratio(
        self, name: str, x: Tensor, weight: Tensor, most: float, known: Known, weights: Tensor
    ) -> Interval:
        """Of E x / E weight, 1 <= weight <= most; the weights of what is known of x elsewhere."""
        found = ratio_expectation(x, weight, most, self.confidence, known, weights)
        return self._noted(name, *found)

    def _noted(self, name: str, interval: Interval, why: str) -> Interval:
        if why:
            self.why[name] = why
        return interval

    def warnings(self) -> list[str]:
        """One sentence for each reason."""
        by_reason: dict[str, list[str]] = {}
        for name, why in self.why.items():
            by_reason.setdefault(why, []).append(name)
        return [
            f"no end on one side at least for {', '.join(names)}: {why}"
            for why, names in by_reason.items()
        ]


def _verify_prompt(
    policy: Policy,
    solution: Solution,
    prompt: int,
    samples: int,
    confidence: float,
    generator: torch.Generator | None,
    memory: int,
) -> SampledReport:
    space = solution.space
    values = logits_are_values(policy)
    device = device_of(policy)
    ids = torch.full((samples,), prompt, device=solution.device)
    drawn = solution.sample(samples, generator, ids).clean()
    parts = ids.to(device).split(rows_at_once(policy, space, memory))
    own = Batch.cat([sample(policy, space, len(part), generator, part) for part in parts])
    own = own.clean().to(solution.device)
    of_star = _walk(policy, solution, drawn, True, memory)
    of_mine = _walk(policy, solution, own, False, memory)
    star, mine = of_star.visits, of_mine.visits
    claims = _Claims(confidence)
    tv = torch.cat([_shortfall(star.log_pi, star.log_star), _shortfall(mine.log_star, mine.log_pi)])
    halves = [_js(star), _js(mine)]
    lost = torch.isneginf(mine.log_star)
    span = max(star.max_span, mine.max_span)
    ratio = torch.cat([(v.log_pi - v.log_star)[~torch.isneginf(v.log_star)] for v in (star, mine)])
    log_ratio_span = math.inf if bool(lost.any()) else float(ratio.max() - ratio.min())
    missing, impossible = _uncovered(policy, solution, of_star, of_mine)
    figures = _expectations(solution, prompt, of_star, of_mine, missing, impossible, claims)
    return SampledReport(
        mode="sampled",
        num_samples=samples,
        num_sequences=space.num_sequences,
        log_z=float(solution.log_z[prompt]),
        tv=bounded(tv, 1.0, confidence),
        js=bounded((halves[0] + halves[1]) / 2, math.log(2), confidence),
        mass_impossible=bounded(lost.double(), 1.0, confidence),
        logits_linf=at_least(max(*star.linf, *mine.linf), confidence),
        logits_span=at_least(span, confidence),
        log_ratio_span=at_least(log_ratio_span, confidence),
        bellman_residual_max=at_least(max(star.max_residual, mine.max_residual), confidence)
        if values
        else None,
        bounds=SampledBounds(
            at_least(float(bounds.prop3_bound(_scalar(span), space.max_length)), confidence),
            at_least(float(bounds.span_bound(_scalar(span), space)), confidence),
            figures.pop("occupancy"),
        ),
        per_depth=[
            SampledDepth(
                t,
                int((drawn.lengths > t).sum()),
                max(star.linf[t], mine.linf[t]),
                expectation(
                    star.kl_at[:, t],
                    confidence,
                    of_star.error(of_star.beyond.kl_at[:, t], missing),
                ).interval,
            )
            for t in range(space.max_length)
        ],
        worst_prefixes=_merged(star, mine),
        warnings=claims.warnings(),
        **figures,
    )


def _expectations(
    solution: Solution,
    prompt: int,
    of_star: _Along,
    of_mine: _Along,
    missing: str,
    impossible: str,
    claims: _Claims,
) -> dict[str, Any]:
    """What is a mean over responses, by its key in the report."""
    ebm, space, star, mine = solution.ebm, solution.space, of_star.visits, of_mine.visits
    confidence = claims.confidence
    least, most = limits_of(ebm.reward_model, space, prompt)
    summary = solution.summary(0, prompt)
    figures: dict[str, Any] = {
        "kl_target_policy": claims.mean(
            "kl_target_policy", star.kl, of_star.error(of_star.beyond.kl, missing)
        ),
        "kl_policy_target": claims.mean(
            "kl_policy_target",
            _lost(mine, mine.kl),
            of_mine.error(_lost(of_mine.beyond, of_mine.beyond.kl), impossible),
        ),
        "occupancy": claims.mean(
            "bounds/occupancy",
            _lost(mine, mine.occupancy),
            of_mine.error(_lost(of_mine.beyond, of_mine.beyond.occupancy), impossible or missing),
        ),
        "entropy_target": certain(summary.entropy, confidence)
        if summary is not None and summary.entropy is not None
        else entropy_interval(star, confidence),
        "entropy_policy": entropy_interval(mine, confidence),
        "expected_reward_target": certain(summary.expected_reward, confidence)
        if summary is not None and summary.expected_reward is not None
        else claims.mean(
            "expected_reward_target",
            of_star.reward,
            # What has reward -inf is impossible under the target.
            of_star.known(of_star.beyond_reward, Known(least, most)),
        ),
        "expected_reward_policy": claims.mean(
            "expected_reward_policy",
            _impossible_reward(solution, of_mine),
            of_mine.known(
                of_mine.beyond_reward,
                Known(least, most, below=impossible if solution.forbids_responses else ""),
            ),
        ),
    }
    for law, of, suffix in ((star, of_star, "target"), (mine, of_mine, "policy")):
        figures[f"logits_linf_{suffix}"] = claims.ratio(
            f"logits_linf_{suffix}",
            law.error,
            law.reached,
            float(space.max_length),
            of.error(of.beyond.error, missing),
            of.beyond.reached[of.here],
        )
        name = "bellman_residual_mean" + ("" if of is of_star else "_policy")
        figures[name] = None
        if law.values:
            figures[name] = claims.ratio(
                name,
                law.residual,
                of.batch.lengths.double().cpu(),
                float(space.max_length),
                of.error(of.beyond.residual, missing if of is of_star else impossible),
                of.beyond.batch.lengths.double().cpu()[of.here],
            )
    return figures


def _uncovered(
    policy: Policy, solution: Solution, of_star: _Along, of_mine: _Along
) -> tuple[str, str]:
    """Why the policy may forbid what the target allows, and the other way round; "" where not.

    A law with a softmax of finite logits forbids nothing; one that forbids somewhere was to be
    seen to do so, with the other forbidding the same: else a KL would be infinite at that state.
    """
    missing = impossible = ""
    if forbids_of(policy) and not (of_star.visits.closed or of_star.beyond.closed):
        missing = "the policy forbids some responses, and none that would be possible is known"
    if solution.forbids:
        if forbids_of(policy) is False:
            impossible = "the target forbids some responses, and the policy none"
        elif not (of_mine.visits.closed_star or of_mine.beyond.closed_star):
            impossible = "the target forbids some responses, and the policy was not seen to do so"
    return missing, impossible


def _lost(visits: Visits, x: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """x along samples of the policy, infinite where the response is impossible."""
    return x.masked_fill(torch.isneginf(visits.log_star), math.inf)


def _impossible_reward(solution: Solution, of_mine: _Along) -> Float[Tensor, "n"]:
    """Rewards of the policy's samples; ``-inf`` where a state shows that it gives mass to such."""
    seen = torch.isinf(of_mine.visits.kl)
    by_reward = not forbids_of(solution.ebm.reference)
    if by_reward and solution.forbids_responses and bool(seen.any()):
        return of_mine.reward.masked_fill(seen, -math.inf)
    return of_mine.reward


def _merged(star: Visits, mine: Visits) -> list[SampledPrefix]:
    """The worst prefixes that either visits, each once."""
    worst = sorted([*star.worst, *mine.worst], key=lambda x: x[:2], reverse=True)
    found: dict[tuple[int, ...], SampledPrefix] = {}
    for _, _, prefix in worst:
        found.setdefault(tuple(prefix.prefix), prefix)
    return list(found.values())[:WORST]


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


def entropy_interval(visits: Visits, confidence: float) -> Interval:
    """Of a law's entropy: no state has more than log A, so the sum of a response is bounded."""
    most = visits.space.num_decisions * math.log(visits.space.vocab_size)
    if most == 0:
        return certain(0.0, confidence)
    return bounded(visits.entropy.clamp(0.0, most), most, confidence)


def at_least(x: float, confidence: float) -> Interval:
    """Of a maximum over all states, of which some were visited."""
    return Interval(x, x, math.inf, confidence, "one-sided finite-sample")
