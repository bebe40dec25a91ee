"""Files of preferences between two responses to one prompt.

A file has one preference a line, JSON: ``{"chosen": [ids], "rejected": [ids]}``, with ``"prompt"``,
the place of its prompt, where there are several. With the ending ``.safetensors`` it holds the
tensors ``chosen`` and ``rejected``, (N, T) int64, and maybe ``prompt_ids``, (N,). In EOS mode a
response ends with its EOS, and what stands behind it in a tensor is not read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from rl_ebm.files import RunError, read_text, write_text
from rl_ebm.files.tensors import load_tensors, save_tensors
from rl_ebm.messages.arguments import is_whole, shown, whole
from rl_ebm.tokens import Batch, TokenSpace, check_space

LARGEST = 2**30
"""bytes of a file of lines"""
TENSORS = ".safetensors"


def read_pairs(
    path: str | os.PathLike[str], space: TokenSpace, num_prompts: int = 1
) -> tuple[Batch, Batch]:
    """The preferences of a file: what was chosen, and what was rejected, row by row.

    Raises:
        TypeError: no path, or no space.
        ValueError: nothing there, no such file, or a line that is none; the sentence says where.
    """
    path, num_prompts = _path(path), whole("num_prompts", num_prompts, 1)
    check_space(space)
    try:
        chosen, rejected = (_of_tensors if path.suffix == TENSORS else _of_lines)(path, space)
    except FileNotFoundError:
        raise RunError(f"there is no file of pairs {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read as text ({error})") from None
    if not len(chosen):
        raise RunError(f"{path} holds no pairs")
    ids = chosen.prompt_ids
    wrong = (ids < 0) | (ids >= num_prompts)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise RunError(
            f"{path}, pair {row + 1}: prompt {int(ids[row])} is none of the {num_prompts}, which "
            "are counted from 0"
        )
    return chosen, rejected


def write_pairs(path: str | os.PathLike[str], chosen: Batch, rejected: Batch) -> None:
    """Write preferences, atomically, in the form that the path's ending says.

    Args:
        chosen: of each pair the response that was preferred; its prompts are the pairs'.
        rejected: the other one, row by row.

    Raises:
        TypeError: no path, or no batches.
        ValueError: batches of different sizes.
    """
    path = _path(path)
    for name, batch in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(batch, Batch):
            raise TypeError(f"{name} must be an rl_ebm.Batch of responses, got {shown(batch)}")
    if chosen.tokens.shape != rejected.tokens.shape:
        raise ValueError(
            f"chosen has shape {tuple(chosen.tokens.shape)}, rejected "
            f"{tuple(rejected.tokens.shape)}: a pair is a row of both"
        )
    if path.suffix == TENSORS:
        tokens = {"chosen": chosen.tokens, "rejected": rejected.tokens}
        save_tensors(path, tokens | {"prompt_ids": chosen.prompt_ids})
        return
    lines = []
    for i, prompt in enumerate(chosen.prompt_ids.tolist()):
        one = {
            name: batch.tokens[i, : int(batch.lengths[i])].tolist()
            for name, batch in (("chosen", chosen), ("rejected", rejected))
        }
        lines.append(json.dumps({"prompt": prompt} | one))
    write_text(path, "".join(f"{line}\n" for line in lines))


def _path(path: object) -> Path:
    """A path, through its links."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be the path of a file of pairs, got {shown(path)}")
    try:
        return Path(path).resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a NUL, or links in a circle
        raise RunError(f"{str(path)!r} is no path ({error})") from None


def _of_tensors(path: Path, space: TokenSpace) -> tuple[Batch, Batch]:
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
    return batches[0], batches[1]


def _of_lines(path: Path, space: TokenSpace) -> tuple[Batch, Batch]:
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
    return batches[0], batches[1]


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
