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

from rl_ebm.agents.imitation import ImitationAgent, ImitationOptions
from rl_ebm.agents.learner import token_values
from rl_ebm.agents.replay import check_rows
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import Batch


@dataclass(frozen=True)
class SampledTeacherConfig(ImitationOptions):
    """Options of the agent ``sampled-teacher``."""

    method: Literal["sir", "mcmc"] = "sir"
    """how proposals become samples of the EBM"""
    source: Literal["reference", "policy"] = "reference"
    """who proposes: the reference (uniform without one), or the policy"""

    def __post_init__(self) -> None:
        super().__post_init__()
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


class SampledTeacherAgent(ImitationAgent):
    """Fits samples of the EBM that it makes itself from scored proposals."""

    Config = SampledTeacherConfig
    chains: Batch | None = None

    def prompts(self) -> Int64[Tensor, "B"]:
        """For the chains the same prompts in the same rows at every step."""
        if self.config.method == "mcmc" and self.chains is not None:
            return self.chains.prompt_ids
        return super().prompts()

    def chosen(self, batch: Batch) -> Batch:
        """What the proposals become."""
        return self._sir(batch) if self.config.method == "sir" else self._mcmc(batch)

    def log_w(self, batch: Batch) -> Float[Tensor, "B"]:
        """log of the weights, with the proposal as it is now."""
        log_ref = self.ebm.log_ref(batch.tokens, batch.lengths, batch.prompt_ids).sum(1)
        q = q_values(self.source, self.ebm.space, batch.tokens, batch.prompt_ids)
        log_b = token_values(log_policy(q), batch).sum(1)
        return (batch.rewards() / self.ebm.beta).float() + log_ref.float() - log_b.float()

    def _sir(self, batch: Batch) -> Batch:
        p = self.ebm.num_prompts
        rows = resample(self.log_w(batch), batch.prompt_ids, p, self.generator)
        return batch.take(rows)

    def _mcmc(self, batch: Batch) -> Batch:
        chains = self.chains
        if chains is None or len(chains) != len(batch):
            self.chains = batch
            return batch
        # Both are weighed anew: a proposal that is the policy has moved since. A row with
        # another prompt is a new chain.
        move = accepts(self.log_w(batch), self.log_w(chains), self.generator)
        move = move | (chains.prompt_ids != batch.prompt_ids)
        self.chains = Batch(
            torch.where(move[:, None], batch.tokens, chains.tokens),
            torch.where(move, batch.lengths, chains.lengths),
            batch.prompt_ids,
            torch.where(move, batch.rewards(), chains.rewards()),
        )
        return self.chains

    def state_dict(self) -> dict[str, Any]:
        c = self.chains
        columns = None if c is None else [c.tokens, c.lengths, c.prompt_ids, c.reward]
        return super().state_dict() | {"chains": columns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        columns = state["chains"]
        self.chains = None if columns is None else Batch(*columns)
        if self.chains is not None:
            check_rows(self.chains, self.ebm.space, self.ebm.num_prompts)
