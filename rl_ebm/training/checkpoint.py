"""Checkpoints: torch's files of nested numbers and tensors, read without running what is in them.

``torch.load`` rebuilds whatever a file says: sparse and quantised tensors, strides that leave
their storage, storages that are unpacked to any size. A damaged file then ends in a crash, or in
all of the memory. Here a file is read in two steps: its outline, in which each tensor is a
:class:`Stored` that is known to lie within the file; and then, once whoever asked has found the
shapes to be those that it expects, the tensors.
"""

from __future__ import annotations

import math
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rl_ebm.files import (
    RunError,
    check_size,
    open_existing,
    write_atomically,
    write_text,
)
from rl_ebm.files.tensors import load_tensors, save_tensors
from rl_ebm.training.outlines import check_outline, is_key

__all__ = [
    "RunError",
    "Stored",
    "load_state",
    "load_tensors",
    "outline",
    "save_state",
    "save_tensors",
    "write_atomically",
    "write_text",
]

FORMAT = 1
_MAX_PICKLE = 2**26
_MAX_DIMENSIONS = 64
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_PLAIN = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class Stored:
    """A tensor of a file that has not been read: a plain one, within its storage."""

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: int
    """elements of the storage"""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    size: int


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, atomically.

    Raises:
        RunError: it holds something else than numbers, text, lists, dicts and plain tensors, or
            a key that is neither text nor a whole number, which would not be read again.
    """
    _check_plain(state, "state")

    def write(file: BinaryIO) -> None:
        # On a full disk torch's writer hides the file system's own error.
        teller = _Teller(file)
        try:
            torch.save({"format": FORMAT, **state}, teller)  # type: ignore[arg-type]
        except RuntimeError:
            if teller.error is None:
                raise
            raise teller.error from None

    write_atomically(path, write)


def load_state(
    path: Path,
    device: torch.device | str = "cpu",
    check: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """A checkpoint. It is data: loading it runs no code.

    Args:
        device: where to put its tensors.
        check: is given the checkpoint with a :class:`Stored` in the place of each tensor, and
            raises where it is not as expected; no tensor has been read then.

    Raises:
        RunError: damaged, not written by this library, or no regular file.
    """
    with _opened(path) as (file, archive):
        state, sizes = _outline(archive)
        if check is not None:
            check(state)
        found: dict[str, Any] = _Materials(archive, sizes, device, file).read(state)
    return found


def outline(path: Path) -> dict[str, Any]:
    """A checkpoint with a :class:`Stored` in the place of each tensor: quick at any size.

    Raises:
        RunError: as :func:`load_state`.
    """
    with _opened(path) as (_, archive):
        return _outline(archive)[0]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, zipfile.ZipFile]]:
    foreign = f"{path} is damaged or no checkpoint of rl-ebm"
    with open_existing(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                check_size(path, sum(x.file_size for x in archive.infolist()))
                yield file, archive
        except (RunError, MemoryError):
            raise
        except Exception as error:  # a damaged file can fail anywhere in its readers
            reason = (str(error) or type(error).__name__).splitlines()[0][:80]
            raise RunError(f"{foreign} ({reason})") from None


# Writing ------------------------------------------------------------------------------------------


class _Teller:
    """A file that remembers the error of its file system."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _check_plain(x: Any, path: str) -> None:
    if isinstance(x, dict):
        for key, value in x.items():
            if type(key) not in (str, bool, int) or not is_key(key):
                raise RunError(
                    f"{path} has a key that is neither text nor a whole number below 2^60: a "
                    "checkpoint cannot hold it"
                )
            _check_plain(value, f"{path}[{key!r}]")
    elif type(x) in (list, tuple):
        for i, value in enumerate(x):
            _check_plain(value, f"{path}[{i}]")
    elif isinstance(x, Tensor):
        plain = x.layout == torch.strided and not x.is_meta and x.dtype in _DTYPES.values()
        if not plain or _reach(x.shape, x.stride()) is None:
            raise RunError(f"{path} is no plain tensor: a checkpoint cannot hold it")
    elif type(x) not in _PLAIN:
        raise RunError(f"{path} is a {type(x).__name__}: a checkpoint cannot hold it")


def _reach(shape: Sequence[int], stride: Sequence[int]) -> int | None:
    """Where the last element of a tensor is; None where it has an element twice."""
    reach = 0
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1 and step <= reach:
            return None
        reach += (size - 1) * step
    return reach


# Reading ------------------------------------------------------------------------------------------


def _outline(archive: zipfile.ZipFile) -> tuple[dict[str, Any], dict[str, zipfile.ZipInfo]]:
    """The nested state, and the entry of each storage."""
    entries = {}
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError("it is compressed")
        entries[entry.filename.partition("/")[2]] = entry
    if entries["data.pkl"].file_size > _MAX_PICKLE:
        raise ValueError("its outline is too large")
    if "byteorder" in entries and archive.read(entries["byteorder"]).decode() != sys.byteorder:
        raise ValueError("it was written on a machine of another byte order")
    data = archive.read(entries["data.pkl"])
    check_outline(data)
    sizes = {k.removeprefix("data/"): v for k, v in entries.items() if k.startswith("data/")}
    state: Any = _Unpickler(BytesIO(data), sizes).load()
    written = state.get("format") if isinstance(state, dict) else None
    if type(written) is not int or written != FORMAT:
        raise ValueError("it has another format")
    return state, sizes


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BytesIO, sizes: dict[str, zipfile.ZipInfo]) -> None:
        super().__init__(file)
        self.sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = {
            "collections OrderedDict": OrderedDict,
            "torch._utils _rebuild_tensor_v2": _rebuild,
            "torch._utils _rebuild_parameter": _rebuild_parameter,
        }
        if f"{module} {name}" not in known:
            raise ValueError(f"it holds {module}.{name}"[:80])
        return known[f"{module} {name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid
        entry = self.sizes.get(key) if isinstance(key, str) else None
        good = kind == "storage" and isinstance(dtype, torch.dtype) and type(size) is int
        if not good or entry is None or size * dtype.itemsize != entry.file_size:
            raise ValueError("a storage is not of the size that it says")
        return _Storage(dtype, key, size)


def _rebuild(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any = False, *_: Any
) -> Stored:
    """A tensor that lies within its storage, no element of which it has twice."""
    if not isinstance(storage, _Storage) or not isinstance(grad, bool):
        raise ValueError("a tensor has no storage")
    if max(len(shape), len(stride)) > _MAX_DIMENSIONS:  # one shape can be that of many tensors
        raise ValueError("a tensor has too many dimensions")
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise ValueError("a tensor has a shape that is none")
    if math.prod(shape):
        reach = _reach(shape, stride)
        if reach is None or offset + reach >= storage.size:
            raise ValueError("a tensor overlaps itself, or leaves its storage")
    return Stored(storage.key, storage.dtype, offset, tuple(shape), tuple(stride), storage.size)


def _rebuild_parameter(stored: Any, *_: Any) -> Any:
    return stored


class _Materials:
    """Reads the tensors of an outline."""

    def __init__(
        self,
        archive: zipfile.ZipFile,
        sizes: dict[str, zipfile.ZipInfo],
        device: torch.device | str,
        file: BinaryIO,
    ) -> None:
        self.archive, self.sizes, self.device = archive, sizes, device
        # Two names of one tensor are two tensors here: twice the file is enough for tied weights.
        self.left = 2 * os.fstat(file.fileno()).st_size + 2**20
        self.values = _MAX_PICKLE  # however much else is in the file

    def read(self, state: Any) -> Any:
        self._count(state)
        return self._walk(state)

    def _count(self, x: Any) -> None:
        if isinstance(x, Stored):
            self.left -= x.bytes + 64
        else:
            self.left -= 1
            self.values -= 1
            for value in dict.values(x) if isinstance(x, dict) else x if _is_list(x) else ():
                self._count(value)
        if min(self.left, self.values) < 0:
            raise ValueError("it names its tensors again and again")

    def _walk(self, x: Any) -> Any:
        if isinstance(x, Stored):
            return self._tensor(x)
        if isinstance(x, dict):
            found: dict[Any, Any] = type(x)((k, self._walk(v)) for k, v in dict.items(x))
            if isinstance(metadata := getattr(x, "_metadata", None), dict):
                found._metadata = metadata  # type: ignore[attr-defined]
            return found
        if _is_list(x):
            return type(x)(self._walk(value) for value in x)
        if type(x) not in _PLAIN:
            raise ValueError(f"it holds a {type(x).__name__}")
        return x

    def _tensor(self, x: Stored) -> Tensor:
        if not math.prod(x.shape):
            return torch.empty(x.shape, dtype=x.dtype, device=self.device)
        data = torch.empty(x.storage * x.dtype.itemsize, dtype=torch.uint8)
        with self.archive.open(self.sizes[x.key]) as entry:
            place, view = 0, data.numpy().data
            while chunk := entry.read(2**20):  # the last one compares the checksum
                view[place : place + len(chunk)] = chunk
                place += len(chunk)
        if place != len(data):
            raise ValueError("a storage is cut short")
        found = data.view(x.dtype).as_strided(x.shape, x.stride, x.offset)
        # Of a part of a storage the part alone is kept.
        return (found if math.prod(x.shape) == x.storage else found.clone()).to(self.device)


def _is_list(x: Any) -> bool:
    return type(x) in (list, tuple)
