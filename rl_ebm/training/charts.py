"""Curves of a batch of responses: whose they are, and means over the prompts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rl_ebm.agents import Agent
from rl_ebm.ebm import EBM
from rl_ebm.policies import sample
from rl_ebm.rewards.base import is_called
from rl_ebm.tokens import Batch

DRAWN = 256
"""responses of the policy drawn for its curves where the agent draws none of its own"""


def charts(who: str, batch: Batch, num_prompts: int) -> dict[str, Tensor]:
    """Mean return and length of responses, every prompt among them with the same weight.

    Prompts that a batch answers more often than others, by chance or by remainder, do not count
    for more: the mean over prompts is what the report calls the expected reward.
    """
    values = torch.stack([batch.rewards().double(), batch.lengths.double()])
    total = values.new_zeros(2, num_prompts).index_add(1, batch.prompt_ids, values)
    ones = torch.ones_like(values[0])
    count = values.new_zeros(num_prompts).index_add(0, batch.prompt_ids, ones)
    means = (total / count.clamp(min=1)).sum(1) / (count > 0).sum()
    return {f"charts/{who}_return": means[0], f"charts/{who}_length": means[1]}


class Drawn(NamedTuple):
    """What an agent has drawn in a step, as it is until the next: its curves wait for a log."""

    batch: Batch
    own_rows: slice | None
    """those that the policy drew as it is; None where there are none"""

    @classmethod
    def of(cls, agent: Agent, batch: Batch) -> Drawn:
        """Before the agent learns from it, which may let its next batch grow."""
        return cls(batch, getattr(agent, "own_rows", None))


def batch_charts(drawn: Drawn, num_prompts: int) -> dict[str, Tensor]:
    """Curves of what an agent has drawn: how much, and of all of it and of the policy's alone."""
    batch = drawn.batch
    found = charts("behaviour", batch, num_prompts)
    found["charts/batch_size"] = torch.tensor(float(len(batch)))
    if drawn.own_rows is None:
        return found
    own = torch.arange(len(batch), device=batch.tokens.device)[drawn.own_rows]
    return found | charts("episodic", batch.take(own), num_prompts)


@torch.no_grad()
def drawn_charts(agent: Agent, ebm: EBM, step: int) -> dict[str, Tensor]:
    """The policy's curves where its agent learns from the draws of others.

    From responses drawn for that alone, by a generator of their own; none where each would cost
    a call of the user's reward.
    """
    if getattr(agent, "own_rows", None) is not None or is_called(ebm.reward_model):
        return {}
    generator = torch.Generator(ebm.device).manual_seed(step)
    order = torch.randperm(ebm.num_prompts, generator=generator, device=ebm.device)
    ids = order[torch.arange(DRAWN, device=ebm.device) % ebm.num_prompts]
    batch = ebm.score(sample(agent.policy, ebm.space, DRAWN, generator, ids))
    return charts("episodic", batch, ebm.num_prompts)
