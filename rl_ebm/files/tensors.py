"""safetensors files, read and written tensor by tensor: no second copy of them in memory.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of a header,
the header (JSON: dtype, shape and place of each tensor), then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rl_ebm.files import RunError, another_policy, check_size, open_existing, write_atomically

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_MAX_HEADER = 2**26
_SAME = "same as "
"""in the header's metadata: a name, and the name under which the same tensor stands"""


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically; a tensor with several names is written once."""
    own, same = _once(tensors)
    write_atomically(path, lambda file: _write(file, own, same))


def holds(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has exactly these tensors; it is compared one tensor at a time."""
    own, same = _once(tensors)
    try:
        with open_existing(path) as file:
            entries, aliases, start = _read_header(path, file)
            if aliases != same or {n: e[:2] for n, e in entries.items()} != {
                name: (x.dtype, tuple(x.shape)) for name, x in own.items()
            }:
                return False
            for name, (dtype, shape, place) in entries.items():
                there = _read(file, start + place, dtype, shape)
                # As bytes: NaN is itself, and -0 is not 0.
                if not torch.equal(_bytes(there), _bytes(own[name])):
                    return False
    except (OSError, RunError):
        return False
    return True


def load_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Args:
        shapes: of the tensors that are expected; compared before any is read.

    Raises:
        RunError: no such file, a damaged one, no regular one, or one with other tensors.
    """
    try:
        with open_existing(path) as file:
            entries, same, start = _read_header(path, file)
            there = {name: entry[1] for name, entry in entries.items()}
            there |= {name: there[other] for name, other in same.items()}
            if shapes is not None and there != shapes:
                raise RunError(another_policy(path, set(there) ^ set(shapes)))
            check_size(path, os.fstat(file.fileno()).st_size)
            found = {n: _read(file, start + at, d, shape) for n, (d, shape, at) in entries.items()}
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the run directory is not whole") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror or error})") from None
    return found | {name: found[other] for name, other in same.items()}


def _once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor under its first name; and its other names, tied embeddings say."""
    first: dict[Any, str] = {}
    own: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for name, x in tensors.items():
        place = (x.device, x.data_ptr(), x.dtype, x.shape, x.stride())
        if x.numel() and place in first:
            same[name] = first[place]
        else:
            first[place], own[name] = name, x.detach()
    return own, same


def _write(file: BinaryIO, own: Mapping[str, Tensor], same: Mapping[str, str]) -> None:
    entries: dict[str, Any] = {}
    if same:
        entries["__metadata__"] = {_SAME + name: other for name, other in same.items()}
    place = 0
    # Wide types first: each tensor then begins at a multiple of its own size.
    order = sorted(own, key=lambda name: (-own[name].element_size(), name))
    for name in order:
        x = own[name]
        if x.dtype not in _NAMES:
            raise RunError(f"{name} is {x.dtype}, which a run's files do not hold")
        end = place + x.numel() * x.element_size()
        entries[name] = {
            "dtype": _NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [place, end]
        }  # fmt: skip
        place = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write(struct.pack("<Q", len(header)) + header)
    for name in order:
        file.write(_bytes(own[name]).numpy().data)


def _bytes(x: Tensor) -> Tensor:
    return x.cpu().contiguous().flatten().view(torch.uint8)


Entries = dict[str, tuple[torch.dtype, tuple[int, ...], int]]


def _read_header(path: Path, file: BinaryIO) -> tuple[Entries, dict[str, str], int]:
    """What is in a file, with the place of each tensor behind ``start``; all of it checked."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    start = 8 + length
    try:
        if size < 8 or start > size or length > _MAX_HEADER:
            raise ValueError("its header is longer than the file")
        header: Any = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        entries = dict(_entries(header, size - start))
        same = {
            name.removeprefix(_SAME): other
            for name, other in metadata.items()
            if name.startswith(_SAME)
        }
        if not all(other in entries for other in same.values()) or same.keys() & entries.keys():
            raise ValueError("its metadata name no tensors")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} is damaged or no safetensors file ({error})") from None
    return entries, same, start


def _entries(header: Mapping[str, Any], size: int) -> Iterator[tuple[str, Any]]:
    """The tensors of a header in the order of their places, which must fill ``size`` bytes."""
    place = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _TYPES.get(entry["dtype"]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"{name} is of the type {entry['dtype']!r}")
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
            raise ValueError(f"the shape of {name} is none")
        if begin != place or end - begin != math.prod(shape) * dtype.itemsize or end > size:
            raise ValueError(f"{name} is not of the size that its shape says")
        place = end
        yield name, (dtype, shape, begin)
    if place != size:
        raise ValueError(f"{size - place} bytes too many")


def _read(file: BinaryIO, place: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    data = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
    file.seek(place)
    if file.readinto(data.numpy().data) != len(data):  # type: ignore[attr-defined]
        raise RunError("the file has become shorter while it was read")
    return data.view(dtype).view(shape)
