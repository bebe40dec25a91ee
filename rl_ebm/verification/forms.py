"""How figures are read off samples of target and policy: the variables, and what is known of them.

log p* is exact at every response, and p* can be sampled. So both divergences come from the chain
rule with the exact divergence at every visited state (Rao-Blackwell: the next token is never
drawn to know the KL there), and distances that are bounded from variables that are, with
intervals that hold for every number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_ebm.policies.base import forbids_of
from rl_ebm.statistics.expectations import (
    Found,
    Known,
    bounded,
    certain,
    expectation,
    ratio_expectation,
)
from rl_ebm.statistics.interval import Interval, affine, nonnegative
from rl_ebm.verification.laws import Law, Laws
from rl_ebm.verification.visits import Visits


def at_least(x: float, confidence: float) -> Interval:
    """Of a maximum over all states, of which some were visited."""
    return Interval(x, x, math.inf, confidence, "one-sided finite-sample")


def entropy_interval(visits: Visits, confidence: float) -> Interval:
    """Of a law's entropy: no state has more than log A, so the sum of a response is bounded."""
    most = visits.space.num_decisions * math.log(visits.space.vocab_size)
    if most == 0:
        return certain(0.0, confidence)
    return bounded(visits.entropy.clamp(0.0, most), most, confidence)


@dataclass(frozen=True)
class OverStates:
    """A mean over the states that samples of a law visit: E of a sum over E of their number."""

    of: Literal["star", "mine"]
    total: Callable[[Visits], Tensor]
    """the sum along each response, >= 0"""
    count: Callable[[Visits], Tensor]
    above: Callable[[Laws], str]
    """why it may be infinite; "" where it cannot"""
    of_values: bool = False
    """whether there is none unless the policy's logits are values"""

    def __call__(self, laws: Laws) -> Found | None:
        if self.of_values and not laws.values:
            return None
        law: Law = getattr(laws, self.of)
        return ratio_expectation(
            self.total(law.visits),
            self.count(law.visits),
            float(laws.space.max_length),
            laws.confidence,
            law.error(self.total(law.beyond), self.above(laws)),
            self.count(law.beyond)[law.here],
        )


def num_tokens(visits: Visits) -> Float[Tensor, "n"]:
    return visits.batch.lengths.double().cpu()


def largest(laws: Laws, of: Callable[[Visits], float]) -> Interval:
    return at_least(max(map(of, laws.visits)), laws.confidence)


def visited_span(laws: Laws) -> Tensor:
    return torch.tensor(max(v.max_span for v in laws.visits), dtype=torch.float64)


def _lost(visits: Visits, x: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """x along samples of the policy, infinite where the response is impossible."""
    return x.masked_fill(torch.isneginf(visits.log_star), math.inf)


def of_target(laws: Laws, x: Callable[[Visits], Tensor], above: str) -> Found:
    """The mean along samples of the target of what is at least 0."""
    law = laws.star
    return expectation(x(law.visits), laws.confidence, law.error(x(law.beyond), above))


def of_policy(laws: Laws, x: Callable[[Visits], Tensor], above: str) -> Found:
    """The mean along samples of the policy, infinite where it gives what is impossible."""
    law = laws.mine
    others = law.error(_lost(law.beyond, x(law.beyond)), above)
    return expectation(_lost(law.visits, x(law.visits)), laws.confidence, others)


def halves(laws: Laws, x: Callable[[Visits], Tensor]) -> Float[Tensor, "n"]:
    """A variable whose mean is taken under (p* + pi) / 2: a pair of samples at a time."""
    star, mine = laws.visits
    return (x(star) + x(mine)) / 2


def tv(laws: Laws) -> Interval:
    """max(0, 1 - p / q) at samples of q: its mean is the total variation."""
    star, mine = laws.visits
    ratios = star.log_pi - star.log_star, mine.log_star - mine.log_pi
    return bounded(-torch.expm1(torch.cat(ratios).clamp(max=0.0)), 1.0, laws.confidence)


def js(visits: Visits) -> Float[Tensor, "n"]:
    """log 2 - h(w), w = p* / (p* + pi): its mean under (p* + pi) / 2 is the divergence."""
    log_w = torch.nn.functional.logsigmoid(visits.log_star - visits.log_pi)
    log_rest = torch.nn.functional.logsigmoid(visits.log_pi - visits.log_star)
    parts = [(x.exp() * x).masked_fill(torch.isneginf(x), 0.0) for x in (log_w, log_rest)]
    return (math.log(2) + parts[0] + parts[1]).clamp(0.0, math.log(2))


def hellinger2(visits: Visits) -> Float[Tensor, "n"]:
    """1 - 2 sqrt(p* pi) / (p* + pi): its mean under (p* + pi) / 2 is 1 - sum sqrt(p* pi)."""
    ratio = torch.exp(-(visits.log_star - visits.log_pi).abs() / 2)
    return (1 - ratio).square() / (1 + ratio.square())


def log_ratio_span(laws: Laws) -> Interval:
    star, mine = laws.visits
    if bool(torch.isneginf(mine.log_star).any()):
        return at_least(math.inf, laws.confidence)
    ratio = torch.cat([(v.log_pi - v.log_star)[~torch.isneginf(v.log_star)] for v in (star, mine)])
    return at_least(float(ratio.max() - ratio.min()), laws.confidence)


def entropy_target(laws: Laws) -> Interval:
    if laws.summary is not None and laws.summary.entropy is not None:
        return certain(laws.summary.entropy, laws.confidence)
    return entropy_interval(laws.star.visits, laws.confidence)


def reward_target(laws: Laws) -> Found | Interval:
    if laws.summary is not None and laws.summary.expected_reward is not None:
        return certain(laws.summary.expected_reward, laws.confidence)
    # What has reward -inf is impossible under the target.
    known = laws.star.known(laws.star.beyond_reward, Known(*laws.limits))
    return expectation(laws.star.reward, laws.confidence, known)


def _seen(laws: Laws, by_reference: bool) -> Bool[Tensor, "n"]:
    """Samples of the policy with a state that shows it to give what the reference, or the reward,
    forbids; where both may forbid it cannot be told which."""
    if by_reference:
        alone = not laws.solution.forbids_responses
    else:
        alone = not forbids_of(laws.solution.ebm.reference)
        alone = alone and laws.solution.forbids_responses
    return torch.isinf(laws.mine.visits.kl) & alone


def reward_policy(laws: Laws) -> Found:
    """Rewards of the policy's samples; ``-inf`` where a state shows that it gives mass to such."""
    below = laws.impossible if laws.solution.forbids_responses else ""
    known = laws.mine.known(laws.mine.beyond_reward, Known(*laws.limits, below=below))
    reward = laws.mine.reward.masked_fill(_seen(laws, by_reference=False), -math.inf)
    return expectation(reward, laws.confidence, known)


def kl_target_reference(laws: Laws) -> Found | Interval:
    """E log p* / p_ref = E R / beta - log Z; without a reference less the entropy."""
    ebm, law, log_z = laws.solution.ebm, laws.star, laws.log_z
    if ebm.reference is None:
        return affine(entropy_target(laws), -1.0)
    if laws.summary is not None and laws.summary.expected_reward is not None:
        exact = laws.summary.expected_reward / ebm.beta - log_z
        return certain(max(exact, 0.0), laws.confidence)
    least, most = (x / ebm.beta - log_z for x in laws.limits)
    # P(log p* / p_ref <= -d) <= exp(-d) by Markov's inequality.
    known = law.known(
        law.beyond_reward / ebm.beta - log_z, Known(least, most, unit=1.0, light_below=0.0)
    )
    interval, why = expectation(law.reward / ebm.beta - log_z, laws.confidence, known)
    return Found(nonnegative(interval), why)


def kl_policy_reference(laws: Laws) -> Found | Interval:
    """E log pi / p_ref by samples of the policy; without a reference less the entropy."""
    law, reference = laws.mine, laws.solution.ebm.reference
    if reference is None:
        return affine(entropy_interval(law.visits, laws.confidence), -1.0)
    above = ""
    if laws.impossible and forbids_of(reference) is not False:
        above = "the reference may forbid responses, and the policy was not seen to do so"
    known = Known(above=above, unit=1.0, light_below=0.0)
    x, others = (v.log_pi - laws.log_ref(v.batch) for v in (law.visits, law.beyond))
    # What the policy never gives has no part in it, whatever the reference says.
    known = law.known(others, known)
    x = x.masked_fill(_seen(laws, by_reference=True), math.inf)
    interval, why = expectation(x, laws.confidence, known)
    return Found(nonnegative(interval), why)
