"""What the agents share: descending a loss, immediate log-weights, which prompts to answer."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rl_ebm.agents.shared.batch_size import MOST
from rl_ebm.ebm import EBM
from rl_ebm.policies.base import Policy, Trainable, forbids_of, value_head
from rl_ebm.soft_bellman import gather_tokens
from rl_ebm.tokens import Batch

WARMUP = 0.02
"""share of a run in which the learning rate rises to its peak"""
MOST_NATS = 1e15
"""of what is squared in float32"""
EXTRA = 10.0
"""rate of what is learned beside the policy, over the policy's: log Z is no small number"""


def learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up, then a cosine to zero; ``progress`` runs from 0 to 1."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < WARMUP:
        # Not from exactly zero: the first step should move.
        return peak * (0.1 + 0.9 * progress / WARMUP)
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def check_rates(lr: float | int, max_grad_norm: float | int) -> None:
    """Raise ValueError unless both are finite and > 0."""
    for name, value in (("lr", lr), ("max_grad_norm", max_grad_norm)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number > 0, got {value}")


def check_nats(name: str, value: float | int) -> None:
    """Raise ValueError unless its square is far within float32."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if abs(value) > MOST_NATS:
        raise ValueError(f"{name} must be within {MOST_NATS:g} nats of 0, got {value}")


def check_batch_size(name: str, value: int) -> None:
    """Raise ValueError unless a number of responses is in [1, 2**24]."""
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    if value > 2**24:
        raise ValueError(f"{name} must be at most {2**24}, got {value}: no memory would do")


def check_group_size(group_size: int | None, batch_size: int | None) -> None:
    """Raise ValueError unless a batch holds a group, and a group two responses."""
    if batch_size is None:
        if group_size is not None and not 2 <= group_size <= MOST:
            raise ValueError(
                f"group_size must be in [2, {MOST}], what a batch grows to by itself, got "
                f"{group_size}: each response is compared with the others of its group; None makes "
                "one group of all responses to a prompt in the step"
            )
        return
    if batch_size < 2:
        raise ValueError(
            f"batch_size must be >= 2, got {batch_size}: responses to a prompt are compared, and "
            "group_size must be in [2, batch_size]"
        )
    if group_size is not None and not 2 <= group_size <= batch_size:
        raise ValueError(
            f"group_size must be in [2, batch_size={batch_size}], got {group_size}: each response "
            "is compared with the others of its group; None makes one group of all responses to "
            "a prompt in the step"
        )


class Learner:
    """Adam with a schedule and gradient clipping, of a policy's V apart. It never waits.

    Args:
        extra: parameters that are learned beside the policy's, faster, and never clipped.
    """

    def __init__(
        self,
        policy: Trainable,
        lr: float | int,
        max_grad_norm: float | int,
        extra: tuple[nn.Parameter, ...] = (),
    ) -> None:
        head = value_head(policy)
        self.values = [] if head is None else list(head.parameters())
        apart = {id(p) for p in self.values}
        self.parameters = [p for p in policy.parameters() if p.requires_grad and id(p) not in apart]
        self.peak, self.max_grad_norm = lr, max_grad_norm
        groups: list[dict[str, Any]] = [{"params": self.parameters, "factor": 1.0}]
        if self.values:
            groups.append({"params": self.values, "factor": 1.0})
        if extra:
            groups.append({"params": list(extra), "factor": EXTRA})
        self.optimizer = torch.optim.Adam(groups, lr=lr, fused=True)
        self.lr = lr

    @property
    def started(self) -> bool:
        """Whether a step has been made, by this learner or by the one whose state it was given."""
        return bool(self.optimizer.state)

    def descend(self, loss: Tensor, progress: float) -> dict[str, Tensor]:
        """One gradient step; the gradient's norm before clipping, detached."""
        self.lr = learning_rate(self.peak, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["factor"]
        for group in self.optimizer.param_groups:  # zero_grad takes ten times as long
            for parameter in group["params"]:
                parameter.grad = None
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if self.values:  # by themselves: what V is off by shortens no step of the policy
            nn.utils.clip_grad_norm_(self.values, self.max_grad_norm)
        self.optimizer.step()
        return {"losses/grad_norm": norm.detach()}

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def log_ref_and_gain(
    ebm: EBM,
    batch: Batch,
    forbidden_log_weight: float | int | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B"]]:
    """log p_ref of each token, 0 past the end, and R / beta of each response.

    Args:
        batch: responses with their rewards.
        forbidden_log_weight: what stands for ``-inf``, nats; None to keep it.
    """
    log_ref = ebm.log_ref(batch.tokens, batch.lengths, batch.prompt_ids).to(dtype)
    gain = (batch.rewards() / ebm.beta).to(dtype)
    if forbidden_log_weight is None:
        return log_ref, gain
    return (
        log_ref.masked_fill(torch.isneginf(log_ref), forbidden_log_weight),
        gain.masked_fill(torch.isneginf(gain), forbidden_log_weight),
    )


def immediate_log_weights(
    ebm: EBM,
    batch: Batch,
    forbidden_log_weight: float | int | None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B T"]:
    """r of each token: log p_ref, plus R / beta on the last; 0 past the end.

    Arguments as :func:`log_ref_and_gain`; a last token whose r is ``-inf`` gets the stand-in once.
    """
    log_ref, gain = log_ref_and_gain(ebm, batch, None, dtype)
    rows = torch.arange(len(batch), device=batch.tokens.device)
    last = batch.lengths - 1
    r = log_ref.index_put((rows, last), log_ref[rows, last] + gain)
    if forbidden_log_weight is None:
        return r
    return r.masked_fill(torch.isneginf(r), forbidden_log_weight)


def check_finite_weights(
    ebm: EBM, forbidden_log_weight: float | int | None, teacher: Policy | None = None
) -> None:
    """Raise ValueError where a loss would be infinite: -inf weights without a stand-in.

    Args:
        teacher: the exact solution, where there is one: it knows more than the EBM.
    """
    if forbidden_log_weight is not None:
        check_nats("forbidden_log_weight", forbidden_log_weight)
    forbids = ebm.forbids or bool(forbids_of(teacher))
    if forbids and forbidden_log_weight is None:
        raise ValueError(
            "some responses have log-weight -inf, and this agent's loss would be infinite there: "
            "give forbidden_log_weight (nats, for example -30) to train on in their place, or "
            "use the agent 'exact' or 'teacher-forcing'"
        )


def draw_prompts(
    n: int, num_prompts: int, group: int, generator: torch.Generator
) -> Int64[Tensor, "n"]:
    """Prompts for n responses, at least ``group`` for each: all of them where they fit."""
    device = generator.device
    if num_prompts * group <= n:
        return torch.arange(n, device=device) % num_prompts
    order = torch.randperm(num_prompts, generator=generator, device=device)
    chosen = order[: max(1, n // group)]
    return chosen[torch.arange(n, device=device) % len(chosen)]


def draw_groups(
    n: int, num_prompts: int, size: int | None, least: int, generator: torch.Generator
) -> Int64[Tensor, "m"]:
    """Prompts for at most n responses that are compared with others to the same prompt.

    Args:
        size: of the groups: as many whole ones as n holds, one after the other. None for one
            group of all responses to a prompt.
        least: responses to a prompt in that case (all n where there are fewer): where not all
            prompts have so many, some prompts are drawn.
    """
    if size is None:
        return draw_prompts(n, num_prompts, min(least, n), generator)
    return draw_prompts(n // size, num_prompts, 1, generator).repeat_interleave(size)


def group_ids(
    prompt_ids: Int64[Tensor, "B"], num_prompts: int, size: int | None
) -> tuple[Int64[Tensor, "B"], int]:
    """The group of each row, and a number that no group's reaches.

    The rows of a prompt, wherever they stand, are dealt out to groups of ``size``; where they do
    not divide, groups are larger by some, never smaller unless there are too few for one. None:
    all rows of a prompt are one group.
    """
    if size is None:
        return prompt_ids, num_prompts
    rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
    zero = prompt_ids.new_zeros(num_prompts)
    count = zero.index_add(0, prompt_ids, torch.ones_like(prompt_ids))
    order = prompt_ids.argsort(stable=True)
    # How many rows of the same prompt stand before each.
    place = torch.empty_like(rows).scatter(0, order, rows) - (count.cumsum(0) - count)[prompt_ids]
    groups = (count // size).clamp(min=1)
    first = groups.cumsum(0) - groups
    return first[prompt_ids] + place % groups[prompt_ids], len(rows) + num_prompts


def prompt_means(
    x: Float[Tensor, "B"], prompt_ids: Int64[Tensor, "B"], num_prompts: int
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Of each row, the mean of x over its prompt's rows, and how many these are."""
    total = x.new_zeros(num_prompts).index_add(0, prompt_ids, x)
    count = x.new_zeros(num_prompts).index_add(0, prompt_ids, torch.ones_like(x))
    return (total / count.clamp(min=1))[prompt_ids], count[prompt_ids]


def log_mean_exp(
    x: Float[Tensor, "B"], prompt_ids: Int64[Tensor, "B"], num_prompts: int
) -> Float[Tensor, "P"]:
    """log of the mean of exp x over each prompt's rows; -inf for a prompt without rows."""
    zero = x.new_zeros(num_prompts)
    # Each prompt's own largest: what is nothing beside another prompt's is no zero.
    top = zero.scatter_reduce(0, prompt_ids, x, "amax", include_self=False)
    total = zero.index_add(0, prompt_ids, (x - top[prompt_ids]).exp())
    count = zero.index_add(0, prompt_ids, torch.ones_like(x))
    return (total / count.clamp(min=1)).log() + top


def token_values(rows: Float[Tensor, "B T A"], batch: Batch) -> Float[Tensor, "B T"]:
    """The entries of rows at the batch's tokens, 0 past the end."""
    return gather_tokens(rows, batch.tokens).masked_fill(~batch.mask, 0.0)
