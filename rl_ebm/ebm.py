r"""The energy-based model: p*(y|x) = p_ref(y|x) exp(R(x, y) / beta) / Z(x)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from rl_ebm.messages.arguments import Number, as_device, finite, flag, whole
from rl_ebm.policies.base import (
    Policy,
    device_of,
    forbids_of,
    on_device,
    prompts_of,
    resolve_prompt_ids,
    space_of,
    steps_of,
    token_pass,
)
from rl_ebm.policies.checks import ROWS, check_rows
from rl_ebm.policies.outputs import check_kind
from rl_ebm.policies.scoring import mask_logits, row_logits
from rl_ebm.rewards.base import Reward, is_anywhere
from rl_ebm.rewards.convert import as_reward
from rl_ebm.soft_bellman import gather_tokens, log_policy
from rl_ebm.tokens import Batch, TokenSpace, check_space
from rl_ebm.tokens.batches import check_batch
from rl_ebm.tokens.prompts import GivenPrompts, check_prompts


class EBM:
    """A reward, a temperature and a reference over a token space: it scores.

    Args:
        space: the responses.
        reward: a tensor with one score for each sequence in enumeration order ((P, N) with
            prompts); or a callable ``(tokens, lengths) -> (B,)`` on tensors, with prompts
            ``(tokens, lengths, prompt_ids)``; or one of :mod:`rl_ebm.rewards`.
        beta: temperature of the KL penalty, > 0, in reward units per nat.
        reference: p_ref, any policy; None for the counting measure (plain MaxEnt RL). In EOS
            mode log p_ref(EOS) is 0 at the last position, whatever the reference says.
        prompts: the P prompts of a conditional EBM, int sequences, empty ones allowed; or what a
            tokenizer returned, ``input_ids`` with their ``attention_mask``.

    Raises:
        ValueError: a beta, table or prompt that is out of range, prompts that are not those
            of the reference, or a reference whose logits are no policy's (see
            :func:`rl_ebm.policies.checks.check_rows`).
        TypeError: a reward or reference of no known kind.
    """

    def __init__(
        self,
        space: TokenSpace,
        reward: Tensor | Callable[..., Any] | Reward,
        beta: Number = 1.0,
        reference: Policy | None = None,
        prompts: GivenPrompts | None = None,
    ) -> None:
        check_space(space)
        self.space = space
        self.beta = finite("beta", beta, 0.0, above=True)
        if self.beta < 1e-300:
            raise ValueError(f"beta must be at least 1e-300, got {beta!r}: R / beta overflows")
        self.prompts = None if prompts is None else check_prompts(prompts)
        self.reference = reference
        if reference is not None:
            # An assertion of its own is no verdict: it comes again where it is first asked.
            with suppress(AssertionError):
                self.check_policy(reference, "the reference")
        self.reward_model = as_reward(reward, space, self.prompts)
        self.device = device_of(self.reward_model)
        if is_anywhere(self.reward_model) and reference is not None:
            self.device = device_of(reference)

    @property
    def num_prompts(self) -> int:
        """P; 1 without prompts."""
        return 1 if self.prompts is None else len(self.prompts)

    @property
    def forbids(self) -> bool:
        """Whether some response or token is known to have log-weight ``-inf``."""
        return self.reward_model.forbids or bool(forbids_of(self.reference))

    def check_policy(
        self, policy: object, name: str = "the policy", rows: int = ROWS, steps: bool = False
    ) -> None:
        """Check that something is a policy of this EBM's space and prompts, in the mode it is in.

        Args:
            name: what a sentence calls it.
            rows: sequences on which it is tried, at most.
            steps: try its ``step``, where it has one, in the place of its ``logits``.

        Raises:
            TypeError: no policy, or logits that are no tensor.
            ValueError: it is for another space, reads other prompts, or its logits are none of
                a policy; see :func:`rl_ebm.policies.checks.check_rows`.
        """
        check_kind(policy, name)
        rows = whole("rows", rows, 1)
        flag("steps", steps)
        space = space_of(policy)
        if space not in (None, self.space):
            raise ValueError(f"{name} is for {space}, the EBM is over {self.space}")
        theirs = prompts_of(policy)
        if theirs is not None and [list(p) for p in theirs] != [
            list(p) for p in (self.prompts or [[]])
        ]:
            raise ValueError(
                f"{name} was made for other prompts than the EBM's: give both the same list"
            )
        steps = steps and steps_of(policy) is not None
        check_rows(policy, self.space, self.num_prompts, name, rows, steps)

    # Scores -------------------------------------------------------------------------------

    def reward(
        self,
        tokens: Int64[Tensor, "B T"],
        lengths: Int64[Tensor, "B"],
        prompt_ids: Int64[Tensor, "B"],
    ) -> Shaped[Tensor, "B"]:
        """R(x, y) in reward units, its own dtype; rows as the sampler makes them, unchecked."""
        batch = Batch(tokens, lengths, prompt_ids).clean()
        return self.reward_model(batch.tokens, batch.lengths, batch.prompt_ids)

    def score(self, batch: Batch) -> Batch:
        """The batch with its rewards, and token 0 past the end of each response."""
        check_batch(batch, self.space)
        batch = batch.clean()
        with torch.no_grad():
            reward = self.reward(batch.tokens, batch.lengths, batch.prompt_ids)
        return batch.with_reward(reward)

    @torch.no_grad()
    def log_ref_rows(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"]
    ) -> Float[Tensor, "B T A"]:
        """log p_ref(.|s) before every token, float64; without a reference 0 where allowed."""
        mask = self.space.action_mask(tokens.device)
        if self.reference is None:
            zero = torch.zeros(mask.shape, device=tokens.device).masked_fill(~mask, -torch.inf)
            return zero.expand(len(tokens), -1, -1)
        rows = row_logits(self.reference, self.space, tokens, prompt_ids)
        log_ref = log_policy(mask_logits(rows, self.space).double())
        return end_reference(log_ref, self.space)

    def log_ref(
        self,
        tokens: Int64[Tensor, "B T"],
        lengths: Int64[Tensor, "B"],
        prompt_ids: Int64[Tensor, "B"],
    ) -> Float[Tensor, "B T"]:
        """log p_ref of each token, 0 past the end."""
        batch = Batch(tokens, lengths, prompt_ids)
        mask = batch.mask
        if self.reference is None:
            return torch.zeros(mask.shape, device=tokens.device)
        tokens, prompt_ids = batch.clean().tokens, batch.prompt_ids
        own = token_pass(self.reference)
        if own is not None:
            log_ref = own(tokens, prompt_ids).double()
            if self.space.eos_id is not None:
                last = torch.zeros_like(log_ref[:, -1])
                last = last.masked_fill(tokens[:, -1] != self.space.eos_id, -torch.inf)
                log_ref = torch.cat([log_ref[:, :-1], last[:, None]], dim=1)
            return log_ref.masked_fill(~mask, 0.0)
        rows = self.log_ref_rows(tokens, prompt_ids)
        return gather_tokens(rows, tokens).masked_fill(~mask, 0.0)

    def log_weight(
        self,
        tokens: Int64[Tensor, "B T"],
        lengths: Int64[Tensor, "B"] | None = None,
        prompt_ids: Int64[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B"]:
        """log p_ref(y|x) + R(x, y) / beta: the log of the unnormalised p*, in nats, float64.

        Args:
            tokens: responses, right-padded.
            lengths: real tokens of each; None for up to the first EOS (T without one).
            prompt_ids: may be left out only where there is one prompt.

        Raises:
            ValueError: tokens, lengths or prompt ids that are none of the space's.
        """
        lengths = self.space.check(tokens, lengths)
        prompt_ids = resolve_prompt_ids(len(tokens), prompt_ids, self.num_prompts, tokens.device)
        reward = self.reward(tokens, lengths, prompt_ids).double()
        return self.log_ref(tokens, lengths, prompt_ids).double().sum(1) + reward / self.beta

    # Copies ---------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> EBM:
        """The same EBM with its reward and reference on another device."""
        device = as_device(device)
        moved = EBM.__new__(EBM)
        moved.__dict__.update(
            self.__dict__,
            reference=on_device(self.reference, device),
            reward_model=on_device(self.reward_model, device),
            device=device,
        )
        return moved

    def __deepcopy__(self, memo: dict[int, Any]) -> EBM:
        """Shares its tensors: environments are copied often, and an EBM never changes."""
        copy = EBM.__new__(EBM)
        copy.__dict__.update(self.__dict__)
        return copy


def check_ebm(ebm: object, hint: str = "rl_ebm.EBM(space, reward) makes one") -> EBM:
    """The EBM that something is; TypeError where it is none."""
    if not isinstance(ebm, EBM):
        raise TypeError(f"ebm must be an rl_ebm.EBM, got {type(ebm).__name__}: {hint}")
    return ebm


def end_reference(log_ref: Float[Tensor, "... T A"], space: TokenSpace) -> Float[Tensor, "... T A"]:
    """log p_ref with its last position of EOS mode set: 0 at EOS, ``-inf`` elsewhere."""
    if space.eos_id is None:
        return log_ref
    last = torch.full_like(log_ref[..., -1:, :], -torch.inf)
    last[..., space.eos_id] = 0.0
    return torch.cat([log_ref[..., :-1, :], last], dim=-2)
