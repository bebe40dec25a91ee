"""Machines as named tensors, for files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from rl_ebm.automata.machine import Machine

_NAMES = tuple(f.name for f in fields(Machine))
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def to_tensors(machine: Machine, prefix: str) -> dict[str, Tensor]:
    """The parts of a machine, each called ``prefix.part``, or ``part`` where it is empty."""
    front = f"{prefix}." if prefix else ""
    return {front + name: getattr(machine, name) for name in _NAMES}


def from_tensors(tensors: Mapping[str, Tensor], prefix: str) -> Machine:
    """The machine of :func:`to_tensors`, checked: files may hold anything.

    Raises:
        KeyError: a part is missing.
        ValueError: parts that make no machine: another type or shape than the others ask for, a
            state that there is not, or a weight that is NaN or +inf.
    """
    front = f"{prefix}." if prefix else ""
    parts = {name: tensors[front + name] for name in _NAMES if name != "log_end"}
    _check_sizes(parts, ("next", "log_transition", "log_emission", "start", "log_initial"))
    # Older files lack it: it was 0.
    zeros = parts["log_transition"].new_zeros(len(parts["log_transition"]))
    parts["log_end"] = tensors.get(f"{front}log_end", zeros)
    _check(parts)
    return Machine(**parts)


def _check_sizes(parts: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    for name in names:
        ndim = 1 if name == "start" else 2
        if parts[name].ndim != ndim or not parts[name].numel():
            raise ValueError(f"{name} has the shape {tuple(parts[name].shape)}")


def _check(parts: Mapping[str, Tensor]) -> None:
    states, tokens = parts["next"].shape
    hidden, prompts = len(parts["log_transition"]), len(parts["log_initial"])
    shapes = {
        "log_weight": (states, tokens),
        "final": (states,),
        "log_initial": (prompts, hidden),
        "log_transition": (hidden, hidden),
        "log_emission": (hidden, tokens),
        "log_end": (hidden,),
    }
    for name, shape in shapes.items():
        x = parts[name]
        if x.dtype != torch.float64 or tuple(x.shape) != shape:
            raise ValueError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)}, expected float64 {shape}"
            )
        if bool((torch.isnan(x) | torch.isposinf(x)).any()):
            raise ValueError(f"{name} has a weight that is NaN or +inf")
    for name in ("next", "start"):
        x = parts[name]
        if x.dtype not in _INTEGERS or (name == "start" and x.dtype != torch.int64):
            raise ValueError(f"{name} is {x.dtype}, expected integers")
        if int(x.min()) < 0 or int(x.max()) >= states:
            raise ValueError(f"{name} names a state that is not in [0, {states})")
    if len({len(parts["start"]), prompts} - {1}) > 1:
        raise ValueError(f"start is for {len(parts['start'])} prompts, log_initial for {prompts}")
