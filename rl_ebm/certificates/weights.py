"""Samples of one prompt with their weights, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.certificates.smc import smc
from rl_ebm.ebm import EBM
from rl_ebm.policies.base import Policy, device_of, tree_bytes_per_node
from rl_ebm.policies.decoding import sample
from rl_ebm.policies.detours import MOST, all_responses, are_listed, detours
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import log_policy, sequence_log_prob
from rl_ebm.tokens import Batch, TokenSpace


@dataclass(frozen=True)
class Elsewhere:
    """Responses that the policy hardly gives, or all of them.

    Attributes:
        log_w, log_pi, reward: as of samples.
        turn: log of the policy's probability of a token no likelier than the one that turns a
            response off its way; None where these are all responses.
    """

    log_w: Float[Tensor, "e"]
    log_pi: Float[Tensor, "e"]
    reward: Float[Tensor, "e"]
    turn: Float[Tensor, "e"] | None

    def of_policy(self, x: Float[Tensor, "e"]) -> tuple[Tensor, Tensor]:
        """x where the policy can be, and about how probable responses like these are under it.

        Exactly that, one by one, where these are all responses.
        """
        here = ~torch.isneginf(self.log_pi)
        return x[here], (self.log_pi if self.turn is None else self.turn)[here].exp()

    def of_target(self, log_z: float) -> tuple[Tensor, Tensor]:
        """log W where the target can be, and about how probable responses like these are under it.

        Exactly that, one by one, where these are all responses.

        Args:
            log_z: an estimate.
        """
        here = ~torch.isneginf(self.log_w)
        log_w, finite = self.log_w[here], torch.isfinite(self.log_w[here])
        # p* = pi W / Z; where pi = 0 the divergence is infinite, however probable that is.
        log_pi = (self.log_pi if self.turn is None else self.turn)[here]
        log_p = torch.where(finite, log_pi + log_w - log_z, 0.0)
        return log_w, log_p.clamp(max=0.0).exp() if self.turn is not None else log_p.softmax(0)

    @property
    def log_z_least(self) -> float:
        """The largest log-weight of the target that is known: log Z is not below it."""
        known = (self.log_pi + self.log_w)[torch.isfinite(self.log_pi + self.log_w)]
        return float(known.max()) if len(known) else -math.inf


class Sampler:
    """Samples of one prompt with their weights, drawn and scored in bounded memory."""

    def __init__(
        self,
        policy: Policy,
        ebm: EBM,
        prompt: int,
        generator: torch.Generator | None,
        memory: int,
    ) -> None:
        self.policy, self.ebm, self.prompt, self.generator = policy, ebm, prompt, generator
        self.device = device_of(policy)
        per_token = 48 * ebm.space.vocab_size + tree_bytes_per_node(policy)
        self.rows = max(1, memory // (per_token * ebm.space.max_length))

    def ids(self, n: int) -> Tensor:
        return torch.full((n,), self.prompt, device=self.device)

    def chunks(self, n: int, rows: int) -> Iterator[int]:
        for start in range(0, n, rows):
            yield min(rows, n - start)

    def draw(self, policy: Policy, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """log W, log pi and reward of n samples of a policy, float64 on the CPU."""
        parts = [
            self.score(policy, sample(policy, self.ebm.space, rows, self.generator, self.ids(rows)))
            for rows in self.chunks(n, self.rows)
        ]
        log_w, log_pi, reward = (torch.cat(column) for column in zip(*parts, strict=True))
        return log_w, log_pi, reward

    def elsewhere(self, samples: int, targets: Batch | None = None) -> Elsewhere:
        """All responses where they are few; else detours of the policy, and some from targets.

        They have their own generator: what is drawn by the other does not depend on them.
        """
        space = self.ebm.space
        if are_listed(space, samples):
            batch, turn = all_responses(space, self.prompt, self.device), None
        else:
            n = min(samples, MOST)
            own = torch.Generator(self.device).manual_seed(1)
            drawn = [
                sample(self.policy, space, size, own, self.ids(size))
                for size in self.chunks(n, self.rows)
            ]
            found = [detours(self.policy, space, Batch.cat(drawn), self.rows)]
            if targets is not None and len(rows := self.rows_of(targets)):
                some = targets.take(rows[:MOST]).to(self.device)
                found.append(detours(self.policy, space, some, self.rows, keep_rest=True))
            batch = Batch.cat([b for b, _ in found])
            turn = torch.cat([mass for _, mass in found]).log().cpu()
        chunks = torch.arange(len(batch), device=self.device).split(self.rows)
        parts = [self.score(self.policy, batch.take(chunk)) for chunk in chunks]
        log_w, log_pi, reward = (torch.cat(column) for column in zip(*parts, strict=True))
        return Elsewhere(log_w, log_pi, reward, turn)

    def score(self, policy: Policy, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        space, batch = self.ebm.space, batch.clean()
        rows = log_policy(q_values(policy, space, batch.tokens, batch.prompt_ids).double())
        log_pi = sequence_log_prob(rows, batch.tokens, batch.lengths)
        reward = self.ebm.reward(batch.tokens, batch.lengths, batch.prompt_ids).double()
        log_ref = self.ebm.log_ref(batch.tokens, batch.lengths, batch.prompt_ids).double().sum(1)
        log_target = log_ref + reward / self.ebm.beta
        # Where both are impossible the sample was none of the policy's: it counts as impossible.
        log_w = torch.where(torch.isneginf(log_target), log_target, log_target - log_pi)
        return log_w.cpu(), log_pi.cpu(), reward.cpu()

    def rows_of(self, batch: Batch) -> Int64[Tensor, "m"]:
        """Which rows of a batch answer this prompt."""
        return (batch.prompt_ids == self.prompt).nonzero()[:, 0]

    def score_targets(self, batch: Batch | None) -> Tensor | None:
        """log W of this prompt's target samples; None where there are none."""
        if batch is None:
            return None
        rows = self.rows_of(batch)
        if len(rows) == 0:
            return None
        self.ebm.space.check(batch.tokens, batch.lengths)
        parts = [
            self.score(self.policy, batch.take(some).to(self.device))[0]
            for some in rows.split(self.rows)
        ]
        log_w = torch.cat(parts)
        if bool(torch.isneginf(log_w).any()):
            raise ValueError("a target sample has p* = 0: target_samples are no samples of p*")
        return log_w

    def smc_runs(self, samples: int, particles: int) -> Tensor:
        """log of independent unbiased estimates of Z."""
        per_call = max(1, self.rows // particles)
        return torch.cat(
            [
                smc(
                    self.ebm,
                    self.policy,
                    particles,
                    generator=self.generator,
                    runs=runs,
                    prompt_ids=self.ids(runs),
                ).log_z.cpu()
                for runs in self.chunks(samples // particles, per_call)
            ]
        )

    def base(self, samples: int, reward_max: float) -> tuple[float, Tensor]:
        """A certain bound on W under the reference, or the uniform law, and samples of it."""
        reference = self.ebm.reference
        base: Policy = UniformResponses(self.ebm.space, self.device)
        if reference is not None:
            base = reference
        log_count = base.log_count if isinstance(base, UniformResponses) else 0.0
        _, _, reward = self.draw(base, samples)
        check_reward_max(reward, reward_max)
        # W = exp(R / beta) under the reference; all responses as often in place of it: times N.
        log_w = reward.clamp(max=reward_max) / self.ebm.beta + log_count
        return reward_max / self.ebm.beta + log_count, log_w


class UniformResponses:
    """The uniform law over all responses of a space, as a policy: log of the completions."""

    forbids = False

    def __init__(self, space: TokenSpace, device: torch.device | str = "cpu") -> None:
        self.space, self.device = space, torch.device(device)
        rows = torch.zeros(space.max_length, space.vocab_size, dtype=torch.float64)
        self.log_count = space.max_length * math.log(space.vocab_size)
        """log of the number of responses"""
        if space.eos_id is not None:
            self.log_count = 0.0
            for t in reversed(range(space.max_length - 1)):
                rows[t] = self.log_count
                rows[t, space.eos_id] = 0.0
                self.log_count = float(torch.logsumexp(rows[t], dim=0))
        self.rows = rows.to(device)

    def logits(self, tokens: Tensor, prompt_ids: Tensor | None = None) -> Float[Tensor, "B T A"]:
        """The same rows for every sequence."""
        return self.rows.expand(len(tokens), -1, -1)


def check_reward_max(reward: Float[Tensor, "n"], reward_max: float) -> None:
    """Raise ValueError if a reward is above reward_max by more than float32 rounding."""
    largest = float(reward.max())
    if largest > reward_max + 1e-6 * max(1.0, abs(reward_max)):
        raise ValueError(f"reward_max is {reward_max}, and a response has the reward {largest}")
