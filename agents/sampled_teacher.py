r"""Teacher forcing on samples of the EBM that were made without solving it: SIR or MCMC.

Proposals y' ~ b come from the reference or from the policy itself, with weights

    w(y) = p_ref(y|x) exp(R(x, y) / beta) / b(y|x).

* ``sir``: as many responses are drawn again from each group of proposals to a prompt, with
  probability w / sum w (sampling-importance-resampling, Rubin 1987; a particle filter of one
  step). Its bias is of order 1 / n in the n proposals of a group.
* ``mcmc``: chains, as many as a step has rows, or one for each prompt where there are more prompts.
  A step moves those of its prompts from y to y' with probability min(1, w(y') / w(y)) (an
  independence sampler, Metropolis-Hastings; Hastings 1970): no bias once they have mixed.

    loss = - mean log pi(y|x) over the responses that came out (impossible ones, w = 0, left out)

With proposals of the policy ``sir`` is reweighted wake-sleep (Bornschein and Bengio 2015, arXiv
1406.2751). With particles, or steps of the chain, without end, both are teacher forcing on p*.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl_ebm.agents.registry import AgentEntry
from rl_ebm.agents.shared.imitation import ImitationAgent, ImitationOptions
from rl_ebm.agents.shared.learner import check_group_size, draw_groups, group_ids, token_values
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.agents.shared.replay import check_rows, columns
from rl_ebm.fixed_points import FixedPoint, Problem, resampled_law, target
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import Batch

GROUP = 8
"""proposals to a prompt in a step, at least, where no size of the groups is given"""


@checked_options
class SampledTeacherConfig(ImitationOptions):
    """Options of the agent ``sampled-teacher``."""

    method: Literal["sir", "mcmc"] = "sir"
    """how proposals become samples of the EBM"""
    source: Literal["reference", "policy"] = "reference"
    """who proposes: the reference (uniform without one), or the policy"""
    group_size: int | None = None
    """with sir: proposals to a prompt that are resampled together; a step has as many whole groups
    as fit. None, the least bias: all proposals to a prompt in the step, at least 8"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "sir":
            check_group_size(self.group_size, self.batch_size)
        elif self.group_size is not None:
            raise ValueError(
                "group_size is for method='sir': the chains of 'mcmc' do not compare proposals of "
                "a step; leave group_size out"
            )


def fixed_point(config: SampledTeacherConfig, problem: Problem) -> FixedPoint:
    """The EBM, of proposals without end; of groups of a given size what resampling them gives."""
    if config.method == "mcmc" or config.group_size is None or config.source == "policy":
        # A policy that is the EBM proposes it with equal weights: any size of groups keeps it.
        return target(config, problem)
    weight = problem.log_target - problem.start_law
    weight = weight.masked_fill(~problem.allowed, -torch.inf)
    law = resampled_law(problem.start_law, weight, config.group_size)
    return FixedPoint(law, how="quadrature", sampler=True)


def resample(
    log_w: Float[Tensor, "B"],
    prompt_ids: Int64[Tensor, "B"],
    num_prompts: int,
    generator: torch.Generator,
) -> Int64[Tensor, "B"]:
    """For each row, a row of the same prompt (or group), drawn with probability w / sum w.

    By the inverse of each group's distribution function, all of them side by side on one line.
    Where all weights of a group are 0, any of its rows.
    """
    order = prompt_ids.argsort(stable=True)
    top = log_w.new_zeros(num_prompts).scatter_reduce(
        0, prompt_ids, log_w, "amax", include_self=False
    )[prompt_ids]
    dead = torch.isneginf(top)
    weight = (log_w - top.masked_fill(dead, 0.0)).double().exp().masked_fill(dead, 1.0)
    line = weight[order].cumsum(0)
    count = prompt_ids.new_zeros(num_prompts).index_add(0, prompt_ids, torch.ones_like(prompt_ids))
    last = count.cumsum(0) - 1
    ends = torch.cat([line.new_zeros(1), line])
    low, high = ends[last - count + 1][prompt_ids], ends[last + 1][prompt_ids]
    u = torch.rand(high.shape, generator=generator, dtype=high.dtype, device=high.device)
    # Below the end, whatever rounding does: the first row above has a weight, in this group.
    point = torch.minimum(low + u * (high - low), high.nextafter(low))
    return order[torch.searchsorted(line, point, right=True)]


def accepts(
    log_w_new: Float[Tensor, "B"], log_w_old: Float[Tensor, "B"], generator: torch.Generator
) -> Tensor:
    """Whether each chain moves: with probability min(1, w_new / w_old); from w = 0 always."""
    u = torch.rand(log_w_new.shape, generator=generator, device=log_w_new.device)
    impossible = torch.isneginf(log_w_old)
    ratio = log_w_new - log_w_old.masked_fill(impossible, 0.0)
    return impossible | (u.log() < ratio)


def marked(batch: Batch, log_w: Float[Tensor, "B"]) -> Batch:
    """The batch, where what has weight 0 pays -inf: nobody imitates it."""
    return batch.with_reward(
        batch.rewards().double().masked_fill(torch.isneginf(log_w), -torch.inf)
    )


class SampledTeacherAgent(ImitationAgent):
    """Fits samples of the EBM that it makes itself from scored proposals."""

    Config = SampledTeacherConfig
    chains: Batch | None = None

    def prompts(self) -> Int64[Tensor, "B"]:
        """Groups that share a prompt, or the prompts of the chains that move next."""
        cfg, p = self.config, self.ebm.num_prompts
        if cfg.method == "sir":
            return draw_groups(cfg.batch_size, p, cfg.group_size, GROUP, self.generator)
        if self.chains is not None and len(self.chains) == cfg.batch_size:
            return self.chains.prompt_ids  # the same prompts in the same rows at every step
        return super().prompts()

    def chosen(self, batch: Batch) -> Batch:
        """What the proposals become; the reward of those of weight 0 is -inf."""
        return self._sir(batch) if self.config.method == "sir" else self._mcmc(batch)

    def counts(self, batch: Batch) -> Bool[Tensor, "B"] | None:
        """Where all proposals were impossible, nothing is imitated."""
        return ~torch.isneginf(batch.rewards())

    def log_w(self, batch: Batch) -> Float[Tensor, "B"]:
        """log of the weights, with the proposal as it is now."""
        log_ref = self.ebm.log_ref(batch.tokens, batch.lengths, batch.prompt_ids).sum(1)
        q = q_values(self.source, self.ebm.space, batch.tokens, batch.prompt_ids)
        log_b = token_values(log_policy(q), batch).sum(1)
        return (batch.rewards() / self.ebm.beta).float() + log_ref.float() - log_b.float()

    def _sir(self, batch: Batch) -> Batch:
        ids, count = group_ids(batch.prompt_ids, self.ebm.num_prompts, self.config.group_size)
        log_w = self.log_w(batch)
        return marked(batch, log_w).take(resample(log_w, ids, count, self.generator))

    def _mcmc(self, batch: Batch) -> Batch:
        one_each = self.ebm.num_prompts > len(batch)
        if self.chains is None or (not one_each and len(self.chains) != len(batch)):
            self.chains = self._unbegun(one_each, batch)
        # Chains of all prompts, of which a step has some; or those of its own rows.
        rows = batch.prompt_ids if one_each else torch.arange(len(batch), device=self.ebm.device)
        mine = self.chains.take(rows)
        # Both are weighed anew: a proposal that is the policy has moved since. A row with
        # another prompt is a new chain.
        new, old = self.log_w(batch), self.log_w(mine)
        begun = (mine.lengths > 0) & (mine.prompt_ids == batch.prompt_ids)
        move = accepts(new, old.masked_fill(~begun, -torch.inf), self.generator)
        pairs = zip(columns(marked(batch, new)), columns(mine), strict=True)
        moved = Batch(*(torch.where(move.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))
        for column, value in zip(columns(self.chains), columns(moved), strict=True):
            column[rows] = value
        return moved

    def _unbegun(self, one_each: bool, batch: Batch) -> Batch:
        """Chains that have no response yet: their first proposal is taken."""
        n = self.ebm.num_prompts if one_each else len(batch)
        ids = torch.arange(n, device=self.ebm.device) if one_each else batch.prompt_ids.clone()
        tokens = ids.new_zeros(n, self.ebm.space.max_length)
        return Batch(tokens, torch.zeros_like(ids), ids, torch.zeros_like(ids).double())

    def state_dict(self) -> dict[str, Any]:
        c = self.chains
        return super().state_dict() | {"chains": None if c is None else columns(c)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        found = state["chains"]
        self.chains = None if found is None else Batch(*found)
        if self.chains is not None:
            check_rows(self.chains, self.ebm.space, self.ebm.num_prompts)


ENTRIES = {
    "sampled-teacher": AgentEntry(
        SampledTeacherAgent,
        SampledTeacherConfig,
        "teacher forcing on samples made without a solution: resampled proposals, or MCMC",
        "Bornschein and Bengio 2015, arXiv 1406.2751",
        fixed_point=fixed_point,
        variants=({"method": "sir"}, {"method": "mcmc"}),
    ),
}
