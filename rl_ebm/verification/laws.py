"""Target and policy along samples of both: what every sampled figure is read from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_ebm.exact import AutomatonSolution, Solution, TreeSolution, summarise_automaton
from rl_ebm.exact.figures import Summary
from rl_ebm.policies.base import (
    Policy,
    device_of,
    forbids_of,
    logits_are_values,
    token_pass,
)
from rl_ebm.policies.decoding import sample
from rl_ebm.policies.detours import MOST, all_responses, are_listed, detours, rows_at_once
from rl_ebm.rewards.base import limits_of
from rl_ebm.statistics.expectations import Known
from rl_ebm.tokens import Batch, TokenSpace
from rl_ebm.verification.visits import Visits


@dataclass(frozen=True)
class Law:
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


@dataclass(frozen=True)
class Laws:
    """Target and policy to one prompt.

    Attributes:
        star, mine: samples of the target, and as many of the policy.
        values: whether the policy's raw logits are to be q.
        missing: why the policy may forbid what the target allows; "" where it does not.
        impossible: why the target may forbid what the policy allows; "" where it does not.
        confidence: of every interval by itself.
        memory: about how many bytes the logits of a step may take.
    """

    policy: Policy
    solution: Solution
    prompt: int
    star: Law
    mine: Law
    values: bool
    missing: str
    impossible: str
    confidence: float
    memory: int

    @property
    def space(self) -> TokenSpace:
        return self.solution.space

    @property
    def visits(self) -> tuple[Visits, Visits]:
        """Along samples of the target, and of the policy."""
        return self.star.visits, self.mine.visits

    @property
    def log_z(self) -> float:
        return float(self.solution.log_z[self.prompt])

    @property
    def v_root(self) -> float:
        """The policy's V of the empty prefix, on its raw logits."""
        if isinstance(self.policy, TreeSolution):  # its steps leave out a constant of each row
            return float(self.policy.log_z[self.prompt])
        return self.star.visits.v_root

    @cached_property
    def limits(self) -> tuple[float, float]:
        """(least, largest) R of all responses; infinite where not known."""
        return limits_of(self.solution.ebm.reward_model, self.space, self.prompt)

    @cached_property
    def summary(self) -> Summary | None:
        """What is exact of an automaton's EBM; None for a tree's."""
        if isinstance(self.solution, AutomatonSolution):
            return summarise_automaton(self.solution, 0, self.prompt)
        return None

    def log_ref(self, batch: Batch) -> Float[Tensor, "n"]:
        """log p_ref of whole responses, nats; ``-inf`` where the reference forbids one."""
        ebm, space = self.solution.ebm, self.space
        # Without log_probs of the tokens alone the reference gives all rows, (B, T, A).
        size = max(1, self.memory // (32 * space.max_length * space.vocab_size))
        if ebm.reference is not None and token_pass(ebm.reference) is not None:
            size = rows_at_once(ebm.reference, space, self.memory)
        rows = torch.arange(len(batch), device=batch.tokens.device).split(size)
        parts = [batch.take(some) for some in rows]
        each = [ebm.log_ref(b.tokens, b.lengths, b.prompt_ids).double().sum(1) for b in parts]
        return torch.cat(each).cpu()


def draw(
    policy: Policy,
    solution: Solution,
    prompt: int,
    samples: int,
    confidence: float,
    generator: torch.Generator | None,
    memory: int,
) -> Laws:
    """Samples of the target and of the policy to one prompt, and what is along them."""
    device = device_of(policy)
    ids = torch.full((samples,), prompt, device=solution.device)
    drawn = solution.sample(samples, generator, ids).clean()
    parts = ids.to(device).split(rows_at_once(policy, solution.space, memory))
    own = Batch.cat([sample(policy, solution.space, len(part), generator, part) for part in parts])
    own = own.clean().to(solution.device)
    star = _walk(policy, solution, drawn, True, memory)
    mine = _walk(policy, solution, own, False, memory)
    missing, impossible = _uncovered(policy, solution, star, mine)
    values = star.visits.values
    reasons = missing, impossible
    return Laws(policy, solution, prompt, star, mine, values, *reasons, confidence, memory)


def _walk(policy: Policy, solution: Solution, batch: Batch, of_target: bool, memory: int) -> Law:
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
    return Law(batch, walks[0], rewards[0], walks[1], rewards[1], masses)


def _uncovered(policy: Policy, solution: Solution, of_star: Law, of_mine: Law) -> tuple[str, str]:
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
