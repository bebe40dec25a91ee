r"""Teacher forcing on samples of the EBM that were made without solving it: SIR or MCMC.

Proposals y' ~ b come from the reference or from the policy itself, with weights

    w(y) = p_ref(y|x) exp(R(x, y) / beta) / b(y|x).

* ``sir``: as many responses are drawn again from the batch with probability w / sum w, prompt by
  prompt (sampling-importance-resampling, Rubin 1987; a particle filter of one step). Its bias is
  of order 1 / n in the n proposals to a prompt.
* ``mcmc``: a chain for each row, which moves from y to y' with probability min(1, w(y') / w(y))
  (an independence sampler, Metropolis-Hastings; Hastings 1970): no bias once it has mixed.

    loss = - mean log pi(y|x) over the responses that came out

With proposals of the policy ``sir`` is reweighted wake-sleep (Bornschein and Bengio 2015, arXiv
1406.2751). With particles, or steps of the chain, without end, both are teacher forcing on p*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.agents.learner import (
    Learner,
    check_batch_size,
    check_rates,
    draw_prompts,
    token_values,
)
from rl_ebm.ebm import EBM
from rl_ebm.policies.scoring import Policy, Trainable, q_values, sample
from rl_ebm.policies.tabular import Uniform
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import Batch


@dataclass(frozen=True)
class SampledTeacherConfig:
    """Options of the agent ``sampled-teacher``."""

    method: Literal["sir", "mcmc"] = "sir"
    """how proposals become samples of the EBM"""
    source: Literal["reference", "policy"] = "reference"
    """who proposes: the reference (uniform without one), or the policy"""
    batch_size: int = 4096
    """proposals in a step, and samples"""
    lr: float | int = 1e-2
    """peak learning rate of Adam"""
    max_grad_norm: float | int = 1.0
    """gradients are clipped to this norm"""

    def __post_init__(self) -> None:
        check_rates(self.lr, self.max_grad_norm)
        check_batch_size("batch_size", self.batch_size)
        for name, allowed in (("method", ("sir", "mcmc")), ("source", ("reference", "policy"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )


def resample(
    log_w: Float[Tensor, "B"],
    prompt_ids: Int64[Tensor, "B"],
    num_prompts: int,
    generator: torch.Generator,
) -> Int64[Tensor, "B"]:
    """For each row, a row with the same prompt, drawn with probability w / sum w."""
    mine = prompt_ids == torch.arange(num_prompts, device=log_w.device)[:, None]
    rows = log_w.masked_fill(~mine, -torch.inf)
    top = rows.amax(1, keepdim=True)
    # Where all weights of a prompt are 0, or it has no row, any row will do: it is not read.
    weight = (rows - top.masked_fill(torch.isneginf(top), 0.0)).exp()
    weight = torch.where(torch.isneginf(top), mine.to(weight) + 1e-30, weight)
    drawn = torch.multinomial(weight, len(log_w), replacement=True, generator=generator)
    found: Tensor = drawn[prompt_ids, torch.arange(len(log_w), device=log_w.device)]
    return found


def accepts(
    log_w_new: Float[Tensor, "B"], log_w_old: Float[Tensor, "B"], generator: torch.Generator
) -> Tensor:
    """Whether each chain moves: with probability min(1, w_new / w_old); from w = 0 always."""
    u = torch.rand(log_w_new.shape, generator=generator, device=log_w_new.device)
    impossible = torch.isneginf(log_w_old)
    ratio = log_w_new - log_w_old.masked_fill(impossible, 0.0)
    return impossible | (u.log() < ratio)


class SampledTeacherAgent:
    """Fits samples of the EBM that it makes itself from scored proposals."""

    logits_are_values = False

    def __init__(
        self,
        ebm: EBM,
        policy: Trainable,
        config: SampledTeacherConfig | None = None,
        generator: torch.Generator | None = None,
        teacher: Policy | None = None,
    ) -> None:
        self.config = SampledTeacherConfig() if config is None else config
        ebm.check_policy(policy)
        self.ebm, self.policy = ebm, policy
        reference: Policy = Uniform(ebm.space) if ebm.reference is None else ebm.reference
        self.source: Policy = policy if self.config.source == "policy" else reference
        self.generator = torch.Generator(ebm.device) if generator is None else generator
        self.learner = Learner(policy, self.config.lr, self.config.max_grad_norm)
        self.chains: Batch | None = None

    def sample(self) -> Batch | None:
        """Proposals, to the same prompts in the same rows at every step for the chains."""
        n, p = self.config.batch_size, self.ebm.num_prompts
        if self.config.method == "mcmc" and self.chains is not None:
            prompt_ids = self.chains.prompt_ids
        else:
            prompt_ids = draw_prompts(n, p, 1, self.generator)
        return sample(self.source, self.ebm.space, len(prompt_ids), self.generator, prompt_ids)

    def update(self, batch: Batch, progress: float = 0.0) -> dict[str, Tensor]:
        """One gradient step on what proposals, with their rewards, become."""
        batch = batch.clean()
        with torch.no_grad():
            found = self._sir(batch) if self.config.method == "sir" else self._mcmc(batch)
        q = q_values(self.policy, self.ebm.space, found.tokens, found.prompt_ids)
        loss = -token_values(log_policy(q), found).sum(1).mean()
        return {"losses/loss": loss.detach()} | self.learner.descend(loss, progress)

    def log_w(self, batch: Batch) -> Float[Tensor, "B"]:
        """log of the weights, with the proposal as it is now."""
        if batch.reward is None:
            raise ValueError("the batch has no rewards: call ebm.score(batch) first")
        log_ref = self.ebm.log_ref(batch.tokens, batch.lengths, batch.prompt_ids).sum(1)
        q = q_values(self.source, self.ebm.space, batch.tokens, batch.prompt_ids)
        log_b = token_values(log_policy(q), batch).sum(1)
        return (batch.reward / self.ebm.beta).float() + log_ref.float() - log_b.float()

    def _sir(self, batch: Batch) -> Batch:
        p = self.ebm.num_prompts
        rows = resample(self.log_w(batch), batch.prompt_ids, p, self.generator)
        return Batch(batch.tokens[rows], batch.lengths[rows], batch.prompt_ids[rows])

    def _mcmc(self, batch: Batch) -> Batch:
        chains = self.chains
        if chains is None or len(chains) != len(batch):
            self.chains = batch
            return batch
        # Both are weighed anew: a proposal that is the policy has moved since. A row with
        # another prompt is a new chain.
        move = accepts(self.log_w(batch), self.log_w(chains), self.generator)
        move = move | (chains.prompt_ids != batch.prompt_ids)
        assert batch.reward is not None
        assert chains.reward is not None
        self.chains = Batch(
            torch.where(move[:, None], batch.tokens, chains.tokens),
            torch.where(move, batch.lengths, chains.lengths),
            batch.prompt_ids,
            torch.where(move, batch.reward, chains.reward),
        )
        return self.chains

    def state_dict(self) -> dict[str, Any]:
        c = self.chains
        columns = None if c is None else [c.tokens, c.lengths, c.prompt_ids, c.reward]
        return {"learner": self.learner.state_dict(), "chains": columns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        columns = state["chains"]
        self.chains = None if columns is None else Batch(*columns)
