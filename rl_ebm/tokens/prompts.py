"""Prompts at the door: lists of token ids, never text, never padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rl_ebm.messages.arguments import shown

if TYPE_CHECKING:
    GivenPrompts = Sequence[Sequence[int]] | Mapping[str, Any]
else:
    GivenPrompts = object  # what is none gets a sentence of ours

MAX_ID = 2**20 - 1
"""of a prompt's token: a table of embeddings has a row for every id up to the largest"""
_TEXT = (
    "prompts are lists of token ids, and text was given: tokenize it first, for example "
    '[tokenizer(text)["input_ids"] for text in texts]'
)
_PADDED = (
    "prompts are a tensor, and nothing in it tells padding from tokens: give what the tokenizer "
    "returned, with its attention_mask (a BatchEncoding), or lists without padding"
)
_WANTED = "prompts must be a list of int sequences, for example [[0], [1, 2], []]"


def check_prompts(prompts: GivenPrompts, ranged: bool = True) -> list[list[int]]:
    """Prompts as lists of ints.

    Args:
        prompts: int sequences; or a mapping with ``input_ids`` and ``attention_mask``, as a
            tokenizer returns it: what is masked is no part of a prompt, on whichever side.
        ranged: whether to check that ids are in range; else the caller does.

    Raises:
        ValueError: no prompt, text, a padded tensor without its mask, or a token that is no id.
    """
    given: Any = unpadded(prompts) if isinstance(prompts, Mapping) else prompts
    if isinstance(given, (str, bytes)):
        raise ValueError(_TEXT)
    if _is_matrix(given):
        raise ValueError(_PADDED)
    try:
        rows = list(given)
    except TypeError:
        raise ValueError(f"{_WANTED}, got {shown(given)}") from None
    if any(isinstance(row, (str, bytes)) for row in rows):
        raise ValueError(_TEXT)
    if any(isinstance(row, Mapping) for row in rows):
        raise ValueError(
            f"{_WANTED}, got a list of mappings: give their input_ids, or one mapping for all"
        )
    lists = [_ids(row) for row in rows]
    if not lists:
        raise ValueError("prompts is empty: give at least one prompt, or None")
    for token in (token for prompt in lists for token in prompt if ranged):
        if token < 0:
            raise ValueError(
                f"a prompt holds a negative token id ({token}); ids start at 0, and padding is "
                "left out"
            )
        if token > MAX_ID:
            raise ValueError(
                f"a prompt holds the token id {token}, and ids must be in [0, {MAX_ID}]: a policy "
                "that reads prompts has a row for every id up to the largest"
            )
    return lists


def unpadded(encoded: Mapping[str, Any]) -> list[list[int]]:
    """The real tokens of what a tokenizer returned.

    Raises:
        ValueError: no ``input_ids``, padding without a mask, or a mask of another shape or
            with a hole.
    """
    if "input_ids" not in encoded:
        raise ValueError(f"{_WANTED}, or a mapping with input_ids and attention_mask")
    ids, mask = encoded["input_ids"], encoded.get("attention_mask")
    if mask is None:
        if _is_matrix(ids):
            raise ValueError(_PADDED)
        return _rows(ids)
    ids, mask = _rows(ids), _rows(mask)
    if [len(row) for row in ids] != [len(row) for row in mask]:
        raise ValueError("the attention_mask of the prompts has another shape than their input_ids")
    if any(bit not in (0, 1) for row in mask for bit in row):
        raise ValueError("the attention_mask of the prompts must hold 0 and 1 alone")
    for bits in mask:
        real = [i for i, bit in enumerate(bits) if bit]
        if real and real[-1] - real[0] >= len(real):
            raise ValueError(
                "the attention_mask of the prompts masks a token between others, and padding is "
                "at an end of a prompt: leave the token out of input_ids where it is not meant"
            )
    return [
        [token for token, real in zip(row, bits, strict=True) if real]
        for row, bits in zip(ids, mask, strict=True)
    ]


def _rows(matrix: Any) -> list[list[int]]:
    """A matrix, or one row, as lists."""
    rows = matrix.tolist() if hasattr(matrix, "tolist") else list(matrix)
    return [_ids(rows)] if rows and not hasattr(rows[0], "__iter__") else [_ids(r) for r in rows]


def _is_matrix(thing: Any) -> bool:
    """A tensor or array with a row for each prompt; a single row has no padding to hide."""
    return (
        hasattr(thing, "ndim")
        and hasattr(thing, "shape")
        and not (thing.ndim == 2 and thing.shape[0] == 1)
    )


def _ids(row: Sequence[Any] | Tensor) -> list[int]:
    if isinstance(row, Tensor) and (row.is_floating_point() or row.dtype == torch.bool):
        raise ValueError(f"{_WANTED}, got a tensor of {str(row.dtype).removeprefix('torch.')}")
    if hasattr(row, "tolist"):
        row = row.tolist()
    try:
        if any(isinstance(token, bool) for token in row):
            raise TypeError
        return [index(token) for token in row]
    except TypeError:
        raise ValueError(_WANTED) from None
