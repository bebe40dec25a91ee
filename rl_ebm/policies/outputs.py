"""What is a policy, and what its logits have to be: by kind and shape, without reading a number."""

from __future__ import annotations

import torch
from torch import Tensor

from rl_ebm.messages.arguments import shown
from rl_ebm.policies.base import is_policy
from rl_ebm.tokens import TokenSpace, check_space


def check_kind(policy: object, name: str = "the policy") -> None:
    """Check that something has the method of a policy.

    Raises:
        TypeError: it has none.
    """
    if is_policy(policy):
        return
    hint = ""
    if hasattr(policy, "get_output_embeddings"):
        hint = ": wrap it, rl_ebm.policies.HuggingFace(model, space)"
    elif isinstance(policy, type):
        hint = f": make one, {policy.__name__}(...)"
    what = "a class" if isinstance(policy, type) else type(policy).__name__
    raise TypeError(
        f"{name} must be a policy, with a method logits(tokens, prompt_ids=None) -> (B, T, A), "
        f"got {what}{hint}"
    )


def check_output(logits: object, rows: int, space: TokenSpace, name: str = "the policy") -> None:
    """Check what a policy's ``logits`` returned.

    Raises:
        TypeError: no tensor.
        ValueError: another shape than (rows, T, A), or complex numbers.
    """
    wanted = (rows, space.max_length, space.vocab_size)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{name}'s logits are no tensor but {type(logits).__name__}, expected a tensor of "
            f"shape {wanted}"
        )
    if logits.is_complex() or logits.dtype == torch.bool:
        kind = str(logits.dtype).removeprefix("torch.")
        raise ValueError(f"{name}'s logits are {kind}, expected real numbers")
    if logits.ndim == 3 and len(logits) != rows and logits.shape[1:] == wanted[1:]:
        raise ValueError(
            f"{name}'s logits have shape {tuple(logits.shape)}, expected {wanted}: one entry for "
            "each row of tokens"
        )
    check_shape(logits, space, name)


def check_shape(logits: Tensor, space: TokenSpace, name: str = "the policy") -> None:
    """Check that logits are (B, T, A) of the space.

    Raises:
        TypeError: no tensor, or no space.
        ValueError: another shape.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}'s logits must be a tensor, got {shown(logits)}")
    check_space(space)
    if logits.ndim != 3 or logits.shape[1:] != (space.max_length, space.vocab_size):
        raise ValueError(
            f"{name}'s logits have shape {tuple(logits.shape)}, expected (B, "
            f"{space.max_length}, {space.vocab_size}): it is a policy for another space"
        )
