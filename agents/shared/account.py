"""What an agent can say of itself: the log Z that it learned, who draws, which rewards it knows.

All are methods that an agent may have, used where they are there: nothing is guessed from its
attributes, options or checkpoints.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.ebm import EBM
from rl_ebm.policies.base import Policy
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import soft_value
from rl_ebm.tokens import Batch


class Behaviour(NamedTuple):
    """Who draws the new responses of a step: shares that sum to 1, and how the policy's are drawn.

    Responses of the reference are uniform over the allowed tokens where the EBM has none.
    """

    policy: float = 1.0
    reference: float = 0.0
    teacher: float = 0.0
    temperature: float = 1.0
    """of the policy's own draws"""
    epsilon: float = 0.0
    """chance of each token of the policy's own draws to be a uniform one instead"""


def learned_log_z(agent: Any) -> Float[Tensor, "P"] | None:
    """``agent.learned_log_z()``, the log Z of each prompt; None for an agent that tells none."""
    told = getattr(agent, "learned_log_z", None)
    return None if told is None else told()


def values_apart(options: object) -> bool:
    """Whether an agent with these options learns a V beside the policy's weights; absent: no."""
    return bool(getattr(options, "values_apart", False))


def behaviour(agent: Any) -> Behaviour | None:
    """``agent.behaviour()``; None for an agent that does not tell, or that draws nothing."""
    told = getattr(agent, "behaviour", None)
    return None if told is None else told()


def scored(agent: Any, ebm: EBM, batch: Batch) -> tuple[Batch, int]:
    """Responses with their rewards, and how many rewards had to be asked for.

    ``agent.score(batch)`` says both of an agent that remembers rewards; absent: all are asked for.
    """
    told = getattr(agent, "score", None)
    if told is None:
        return ebm.score(batch), len(batch)
    found: tuple[Batch, int] = told(batch)
    return found


@torch.no_grad()
def root_values(policy: Policy, ebm: EBM) -> Float[Tensor, "P"]:
    """V of the empty response to each prompt: log Z, where raw logits are values."""
    ids = torch.arange(ebm.num_prompts, device=ebm.device)
    tokens = ids.new_zeros(len(ids), ebm.space.max_length)
    return soft_value(q_values(policy, ebm.space, tokens, ids)[:, 0])
