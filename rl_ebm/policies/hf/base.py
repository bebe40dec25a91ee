"""What the helpers of a Hugging Face policy read of it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from rl_ebm.policies.base import Steps, Trainable
from rl_ebm.tokens import TokenSpace


class ModelPolicy(Trainable, Steps, Protocol):
    """A policy around a causal language model; :class:`rl_ebm.policies.HuggingFace` is one."""

    model: Any
    """of transformers, or a ``PeftModel`` of one"""
    space: TokenSpace
    prompts: list[list[int]] | None
    context_ids: Tensor
    """what stands before the response to each prompt, (P, C), padded on the left"""
    context_lengths: Tensor
    """how much of it is real, (P,)"""

    @property
    def has_adapter(self) -> bool:
        """Whether the model is a ``peft.PeftModel``."""
        ...

    @property
    def tree_bytes_per_node(self) -> int:
        """As of any policy."""
        ...
