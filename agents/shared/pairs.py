"""Pairs of responses to one prompt: rows of a batch side by side, or a file of them.

A file has one preference a line, JSON: ``{"chosen": [ids], "rejected": [ids]}``, with ``"prompt"``,
the place of its prompt, where there are several. With the ending ``.safetensors`` it holds the
tensors ``chosen`` and ``rejected``, (N, T) int64, and maybe ``prompt_ids``, (N,). In EOS mode a
response ends with its EOS, and what stands behind it in a tensor is not read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from rl_ebm.files import RunError, read_text, write_atomically
from rl_ebm.files.tensors import load_tensors, save_tensors
from rl_ebm.messages.arguments import is_whole, shown
from rl_ebm.tokens import Batch, TokenSpace

LARGEST = 2**30
"""bytes of a file of lines"""
TENSORS = ".safetensors"


class Pairs(NamedTuple):
    """Preferences: row i of one batch was chosen over row i of the other, of the same prompt."""

    chosen: Batch
    rejected: Batch


def neighbours(
    prompt_ids: Int64[Tensor, "B"],
) -> tuple[Int64[Tensor, "N"], Int64[Tensor, "N"], Bool[Tensor, "N"]]:
    """Rows that answer one prompt, two by two in their order, wherever they stand.

    Returns:
        first and second row of N = B - 1 neighbours, and which of these are pairs. (Their number
        is not known without waiting for the device.)
    """
    order = prompt_ids.argsort(stable=True)
    ids = prompt_ids[order]
    rows = torch.arange(len(ids), device=ids.device)
    place = rows - torch.searchsorted(ids, ids)
    return order[:-1], order[1:], (place[:-1] % 2 == 0) & (ids[:-1] == ids[1:])


def read_pairs(path: str | Path, space: TokenSpace, num_prompts: int = 1) -> Pairs:
    """The preferences of a file.

    Raises:
        ValueError: nothing there, no such file, or a line that is none; the sentence says where.
    """
    path = Path(path)
    try:
        pairs = (_of_tensors if path.suffix == TENSORS else _of_lines)(path, space)
    except FileNotFoundError:
        raise RunError(f"there is no file of pairs {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read as text ({error})") from None
    if not len(pairs.chosen):
        raise RunError(f"{path} holds no pairs")
    ids = pairs.chosen.prompt_ids
    wrong = (ids < 0) | (ids >= num_prompts)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise RunError(
            f"{path}, pair {row + 1}: prompt {int(ids[row])} is none of the {num_prompts}, which "
            "are counted from 0"
        )
    return pairs


def write_pairs(path: str | Path, pairs: Pairs) -> None:
    """Write preferences, atomically, in the form that the path's ending says."""
    path, ids = Path(path), pairs.chosen.prompt_ids
    if path.suffix == TENSORS:
        tokens = {"chosen": pairs.chosen.tokens, "rejected": pairs.rejected.tokens}
        save_tensors(path, tokens | {"prompt_ids": ids})
        return
    lines = []
    for i, prompt in enumerate(ids.tolist()):
        one = {
            name: batch.tokens[i, : int(batch.lengths[i])].tolist()
            for name, batch in zip(("chosen", "rejected"), pairs, strict=True)
        }
        lines.append(json.dumps({"prompt": prompt} | one))
    text = "".join(f"{line}\n" for line in lines).encode()
    write_atomically(path, lambda file: file.write(text))


def _of_tensors(path: Path, space: TokenSpace) -> Pairs:
    found = load_tensors(path)
    if not {"chosen", "rejected"} <= set(found):
        raise RunError(f"{path} must hold the tensors chosen and rejected, it has {[*found]}")
    n = len(found["chosen"]) if found["chosen"].ndim else 0
    ids = found.get("prompt_ids", torch.zeros(n, dtype=torch.int64))
    if ids.dtype != torch.int64 or ids.shape != (n,) or found["rejected"].shape[:1] != (n,):
        raise RunError(f"{path} must have one chosen, one rejected and one prompt for each pair")
    batches = []
    for name in ("chosen", "rejected"):
        try:
            lengths = space.check(found[name])
        except (TypeError, ValueError) as error:
            raise RunError(f"{path}, {name}: {error}") from None
        batches.append(Batch(found[name].long(), lengths, ids).clean())
    return Pairs(*batches)


def _of_lines(path: Path, space: TokenSpace) -> Pairs:
    rows: dict[str, list[list[int]]] = {"chosen": [], "rejected": []}
    prompts = []
    for number, line in enumerate(read_text(path, LARGEST).splitlines(), 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
            if not isinstance(one, dict):
                raise ValueError("it is no object with chosen and rejected")
            prompts.append(_prompt(one))
            for name, column in rows.items():
                column.append(_response(one, name, space))
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path}, line {number}: {error}") from None
    ids = torch.tensor(prompts, dtype=torch.int64)
    batches = []
    for column in rows.values():
        lengths = torch.tensor([len(y) for y in column], dtype=torch.int64)
        tokens = torch.zeros(len(column), space.max_length, dtype=torch.int64)
        for row, y in zip(tokens, column, strict=True):
            row[: len(y)] = torch.tensor(y)
        batches.append(Batch(tokens, lengths, ids))
    return Pairs(*batches)


def _prompt(one: dict[str, Any]) -> int:
    """The place of a line's prompt; ValueError for what is none."""
    prompt = one.get("prompt", 0)
    if not is_whole(prompt) or abs(prompt) > 2**31:
        raise ValueError(f"prompt must be the place of one, an integer, got {shown(prompt)}")
    return int(prompt)


def _response(one: dict[str, Any], name: str, space: TokenSpace) -> list[int]:
    """The ids of a line's response; ValueError for what is none of the space."""
    if name not in one:
        raise ValueError(f"it has no {name}")
    y = one[name]
    if not isinstance(y, list) or not all(is_whole(a) and 0 <= a < space.vocab_size for a in y):
        raise ValueError(f"{name} must be a list of ids in [0, {space.vocab_size}), got {shown(y)}")
    if space.eos_id is None:
        if len(y) != space.max_length:
            raise ValueError(f"{name} has {len(y)} tokens, expected {space.max_length}")
    elif len(y) > space.max_length or space.eos_id not in y[-1:] or space.eos_id in y[:-1]:
        raise ValueError(
            f"{name} must end with its only EOS (id {space.eos_id}), after at most "
            f"{space.max_length} tokens with it, got {shown(y)}"
        )
    return y
