"""Adapters of peft: the model without its adapter as the reference, and what is checkpointed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rl_ebm.policies.base import device_of, evaluating
from rl_ebm.policies.hf.base import ModelPolicy


@contextmanager
def without_adapter(policy: ModelPolicy) -> Iterator[None]:
    """The policy's model with its adapter off, without dropout; afterwards as it was."""
    # Enabling an adapter again makes all of it trainable, what was frozen too.
    trainable = [(p, p.requires_grad) for p in policy.parameters()]
    try:
        with evaluating(policy), policy.model.disable_adapter():
            yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


class AdapterFree:
    """A ``PeftModel`` without its adapter: a policy that never changes, for the EBM's reference.

    It is the policy's own model, with the adapter switched off for each pass and on again after
    it. So it costs no memory, and follows the policy to another device.

    Args:
        policy: the policy with the adapter.

    Raises:
        ValueError: no adapter, or one that trains weights of the model itself.
    """

    def __init__(self, policy: ModelPolicy) -> None:
        if not policy.has_adapter:
            raise ValueError(
                "the model has no adapter, so there is nothing to leave out: wrap it by "
                "peft.get_peft_model, or give a second model as the reference"
            )
        with without_adapter(policy):
            moving = [
                name
                for name, parameter in policy.model.named_parameters()
                # Older peft marks what modules_to_save keeps; it stays as it was.
                if parameter.requires_grad and "original_module" not in name
            ]
        if moving:
            raise ValueError(
                f"{moving[0]} of the model itself is trained too, and the reference would move "
                "with it: freeze it (of LoRA: bias='none')"
            )
        self.policy = policy
        self.frozen = [p for p in policy.parameters() if not p.requires_grad]
        self.space, self.prompts = policy.space, policy.prompts
        self.tree_bytes_per_node = policy.tree_bytes_per_node

    @property
    def device(self) -> torch.device:
        """The policy's."""
        return device_of(self.policy)

    def read_tensors(self) -> list[Tensor]:
        """The weights that its numbers are made of: those of the model itself, which are frozen."""
        return list[Tensor](self.frozen)

    @torch.no_grad()
    def logits(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T A"]:
        """The model's logits before every token, without the adapter and without gradient."""
        with without_adapter(self.policy):
            return self.policy.logits(tokens, prompt_ids)

    def start(self, prompt_ids: Int64[Tensor, "B"]) -> Any:
        """A state for :meth:`step`, of this reference alone."""
        return self.policy.start(prompt_ids)

    @torch.no_grad()
    def step(self, state: Any, tokens: Int64[Tensor, "B"] | None) -> Float[Tensor, "B A"]:
        """Logits at the next position, as :meth:`HuggingFace.step`."""
        with without_adapter(self.policy):
            return self.policy.step(state, tokens)

    def to(self, device: torch.device | str) -> AdapterFree:
        """Itself, where the policy is.

        Raises:
            ValueError: another device than the policy's.
        """
        wanted, here = torch.device(device), self.device
        if wanted.type != here.type or wanted.index not in (None, here.index):
            raise ValueError(
                f"the reference is the policy's own model, on {here}: move the policy to {wanted}"
            )
        return self


def keep_adapter_alone(policy: Any) -> None:
    """Leave the model's frozen weights out of ``state_dict``: checkpoints hold the adapter."""
    # Under all their names: tied weights have two.
    named = policy.model.named_parameters(remove_duplicate=False)
    frozen = {f"model.{name}" for name, parameter in named if not parameter.requires_grad}

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in frozen:
            state.pop(prefix + name, None)

    def excuse(module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]

    policy.register_state_dict_post_hook(drop)
    policy.register_load_state_dict_post_hook(excuse)
