r"""What agents share whose raw logits become q: where V begins, and how it is learned beside them.

By the soft Bellman equation, along every path

    V(s_t) = V(s_0) + sum_{k < t} (log pi(a_k|s_k) - r_k),    V(s_0) = log Z :

the **carried** value, of one number and of tokens that are known, without the noise of what comes
later. Where V has weights of its own (:class:`rl_ebm.networks.values.ValueHead`) the losses read
q = log pi + the carried value; elsewhere they read q, and move both at once. Residuals between two
states of a response are then 0, and what is left, of those that reach its end, moves log pi alone:

    V(s_0) + sum_t (log pi(a_t|s_t) - r_t),

of every suffix, weighed as the loss weighs it. V(s_0) is there the mean of sum_t (r_t - log pi)
over the prompt's responses, as in VarGrad (Richter et al. 2020). V itself is moved to where the
first batch has it, and then fitted to the carried values, by Huber's loss with 1 nat; its level is
moved to log Z: the log of the mean weight of the policy's own draws, which lies nearer by most of
KL(policy, target). At q* they are all one, without noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from rl_ebm.agents.shared.grouped import GroupedAgent
from rl_ebm.agents.shared.learner import log_mean_exp, prompt_means, token_values
from rl_ebm.networks.values import flow_of
from rl_ebm.policies.base import Policy, prompt_rows, value_head
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import log_policy, soft_value
from rl_ebm.tokens import Batch

TRUSTED = 4.0
"""responses to a prompt whose mean moves its level half of the way"""


class Learned(NamedTuple):
    """What a batch says of V.

    Attributes:
        q: raw logits before every token, with gradient.
        root: V of each row's prompt, to be carried; None where V has no weights of its own.
        loss: by which V's own weights learn; 0 where there are none.
    """

    q: Float[Tensor, "B T A"]
    root: Float[Tensor, "B"] | None
    loss: Float[Tensor, ""]


def carried_values(
    root: Float[Tensor, "B"], log_pi: Float[Tensor, "B T"], r: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """V(s_t) from V of the root, by the tokens between.

    Args:
        root: V of the empty response to each row's prompt.
        log_pi: log pi(a_t|s_t) of the tokens.
        r: immediate log-weights of the tokens.
    """
    return root[:, None] + flow_of(log_pi - r)


def carried_q(
    learned: Learned, batch: Batch, r: Float[Tensor, "B T"], semi: bool = False
) -> Float[Tensor, "B T A"]:
    """log pi + the carried value.

    Args:
        semi: whether the value has no gradient.
    """
    assert learned.root is not None
    rows = log_policy(learned.q)
    v = carried_values(learned.root, token_values(rows, batch), r)
    return rows + (v.detach() if semi else v)[..., None]


class ValueAgent(GroupedAgent):
    """An agent whose loss reads q of the policy as :meth:`learn_values` gives it.

    Its options say by ``values_apart`` whether networks get a V of their own, where they can.
    """

    logits_are_values = True

    @property
    def group_size(self) -> int | None:
        """All responses to a prompt in a step share a level."""
        return None

    @property
    def compares(self) -> bool:
        """Whether there is a level to fit."""
        return value_head(self.policy) is not None

    def begin(self, teacher: Policy | None) -> None:
        """Check that V is where the options want it."""
        super().begin(teacher)
        if self.compares and not self.config.values_apart:
            raise ValueError(
                "the options ask for values that are handed back step by step, and the policy has "
                "a V of its own, made of log pi, with nothing to hand back: make it with "
                "value_head=False, or leave lam and n_step out"
            )

    def learn_values(self, batch: Batch, r: Float[Tensor, "B T"]) -> Learned:
        """What a batch says of V; its level is moved."""
        q = q_values(self.policy, self.ebm.space, batch.tokens, batch.prompt_ids)
        head = value_head(self.policy)
        if head is None:
            return Learned(q, None, q.new_zeros(()))
        v = soft_value(q)
        with torch.no_grad():
            log_pi = token_values(log_policy(q), batch)
            found = (r - log_pi).masked_fill(~batch.mask, 0.0).sum(1)
            mean, rows = prompt_means(found, batch.prompt_ids, self.ebm.num_prompts)
            shift = v.new_zeros(v.shape[1])
            if not self.learner.started:
                off = (carried_values(mean, log_pi, r) - v).masked_fill(~batch.mask, 0.0)
                shift = off.sum(0) / batch.mask.sum(0).clamp(min=1)
                head.place.add_(shift)
            at_root = v[:, 0] + shift[0]
            log_z = self._own_log_z(found, mean, batch)
            # A policy that reads no prompts has one level for all of them.
            levels = prompt_rows(self.policy, len(batch), batch.prompt_ids)
            gap, told = prompt_means(log_z - at_root, levels, len(head.level))
            moved = gap * told / (told + TRUSTED)
            # All rows of a level say the same: whichever writes last.
            head.level[levels] = head.level[levels] + moved
            wanted = carried_values(at_root + moved, log_pi, r)
        off = F.huber_loss(v + shift, wanted, reduction="none").masked_fill(~batch.mask, 0.0)
        return Learned(q, torch.where(rows < 2, at_root, mean), off.sum(1).mean())

    def _own_log_z(
        self, found: Float[Tensor, "B"], mean: Float[Tensor, "B"], batch: Batch
    ) -> Float[Tensor, "B"]:
        """log Z of each row's prompt, by the policy's own draws; the mean where there are none.

        Args:
            found: sum_t (r_t - log pi) of each response, and its
            mean: over the rows of the same prompt.
        """
        own = self.own_rows if len(batch) == self.responses else None
        if own is None:
            return mean
        ids = batch.prompt_ids
        log_mean = log_mean_exp(found[own], ids[own], self.ebm.num_prompts)[ids]
        return torch.where(torch.isneginf(log_mean), mean, log_mean)
