"""Files that are either whole or not there, and checkpoints made of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

FORMAT = 1


class RunError(ValueError):
    """A run directory that cannot be used, or a run that had to stop; says what to do."""


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file beside ``path`` and move it there: readers see the old one or the new one.

    Raises:
        OSError: of the file system (a full disk, say); ``path`` is then as it was.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically; a file that holds them already stays."""
    # Copies: safetensors refuses tensors that share memory, such as tied embeddings.
    whole = torch.contiguous_format
    data = save({n: x.detach().cpu().clone(memory_format=whole) for n, x in tensors.items()})
    if path.exists() and path.read_bytes() == data:
        return
    write_atomically(path, lambda file: file.write(data))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        RunError: no such file, or a damaged one.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the run directory is not whole") from None
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged or no safetensors file ({error})") from None


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, atomically."""
    # Through memory: on a full disk torch's writer hides the file system's own error.
    data = BytesIO()
    torch.save({"format": FORMAT, **state}, data)
    write_atomically(path, lambda file: file.write(data.getbuffer()))


def load_state(path: Path, device: torch.device | str) -> dict[str, Any]:
    """A checkpoint. It is data: loading it runs no code.

    Raises:
        RunError: damaged, or not written by this library.
    """
    foreign = f"{path} is damaged or no checkpoint of rl-ebm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are not torch's
            state: Any = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise RunError(f"{foreign} ({reason})") from None
    written = state.get("format") if isinstance(state, dict) else None
    if not isinstance(written, int) or written != FORMAT:
        raise RunError(f"{foreign}: it has another format")
    checked: dict[str, Any] = state
    return checked
