"""Machines as named tensors, for files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from torch import Tensor

from rl_ebm.automata.machine import Machine

_NAMES = tuple(f.name for f in fields(Machine))


def to_tensors(machine: Machine, prefix: str) -> dict[str, Tensor]:
    """The parts of a machine, each of them called ``prefix.part``."""
    return {f"{prefix}.{name}": getattr(machine, name) for name in _NAMES}


def from_tensors(tensors: Mapping[str, Tensor], prefix: str) -> Machine:
    """The machine of :func:`to_tensors`.

    Raises:
        KeyError: a part is missing.
    """
    parts = {name: tensors[f"{prefix}.{name}"] for name in _NAMES if name != "log_end"}
    # Older files lack it: it was 0.
    zeros = parts["log_transition"].new_zeros(len(parts["log_transition"]))
    return Machine(**parts, log_end=tensors.get(f"{prefix}.log_end", zeros))
