"""A card that is not there: tensors that say they are on one, computed on the CPU.

Everything that PyTorch dispatches while a :class:`Card` is entered is looked at. What mixes devices
fails, as it does on a GPU. What a GPU would be waited for is counted: a value that is read, a shape
that hangs on values, a copy between the two memories. The numbers are those of the CPU.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
NAME = "card"
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""whether PyTorch can be told of one: a private function, of the newer releases"""
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "_unique",
    "unique_consecutive", "is_nonzero", "equal", "repeat_interleave", "bincount", "nonzero_static",
    "argwhere",
}  # fmt: skip
"""operations whose results the host needs before it can go on"""
COPIES = {"_to_copy", "copy_"}


class DeviceError(RuntimeError):
    """Tensors of two devices in one operation."""


class OnCard(torch.Tensor):
    """A tensor of the card; ``raw`` holds its numbers."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> OnCard:
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, layout=raw.layout, device=torch.device(NAME, 0),
        )  # fmt: skip

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of the numbers: what two tensors share, they share."""
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        _waits("tolist")
        return self.raw.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.raw!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Card(TorchDispatchMode):
    """While it is entered there is a card; where it was waited for stands in ``waits``."""

    current: Card | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.operations = 0

    def __enter__(self) -> Card:
        Card.current = self
        self.lists = Lists()
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Card.current = None
        super().__exit__(*error)
        self.lists.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if OnCard not in types and not is_card(kwargs.get("device")):
            return func(*args, **kwargs)  # the CPU's own: statistics of numbers that were copied
        return computed(func, args, kwargs)

    @contextmanager
    def no_waits(self) -> Iterator[None]:
        """Fail where the card is waited for inside."""
        before = len(self.waits)
        yield
        assert self.waits[before:] == []


class Lists(TorchFunctionMode):
    """Tensors of Python's numbers are made on the CPU and copied: below this nobody is asked."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and is_card(kwargs.get("device")):
            return func(*args, **kwargs | {"device": "cpu"}).to(NAME)
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """A generator that says it is on the card."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self._device


def is_card(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the numbers, with its devices checked."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_card = [x for x in tensors if isinstance(x, OnCard)]
    name = func.overloadpacket.__name__
    device = kwargs.get("device")
    to_card = is_card(device) or (device is None and bool(on_card))
    if Card.current is not None and (on_card or to_card):
        Card.current.operations += 1
    if name in COPIES:
        here = isinstance(args[0], OnCard)
        there = isinstance(args[1], OnCard) if name == "copy_" else to_card
        # A number that the host has is an argument of a kernel.
        if here != there and not (name == "copy_" and args[1].ndim == 0 and not there):
            _waits(f"a copy {'to' if (here if name == 'copy_' else there) else 'from'} it")
    elif on_card:
        others = [x for x in tensors if not isinstance(x, OnCard) and x.ndim > 0]
        if others:
            raise DeviceError(f"{name} of tensors on the card and {others[0].device}: {_place()}")
        if name in WAITS:
            _waits(name)
        elif name in ("index", "index_put", "index_put_", "_unsafe_index"):
            given = args[1] or []
            if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in given):
                _waits(f"{name} with a mask")
    wrapped: dict[int, OnCard] = {id(x.raw): x for x in on_card}

    def down(x: Any) -> Any:
        return x.raw if isinstance(x, OnCard) else x

    inner = kwargs | ({"device": torch.device("cpu")} if is_card(device) else {})
    args_, kwargs_ = pytree.tree_map(down, (args, inner))
    found = func(*args_, **kwargs_)
    if not to_card or name == "_local_scalar_dense":
        return found

    def up(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, OnCard):
            return x
        return wrapped[id(x)] if id(x) in wrapped else OnCard(x)

    out = pytree.tree_map(up, found)
    return return_and_correct_aliasing(func, args, kwargs, out) if on_card else out


def _waits(what: str) -> None:
    if Card.current is not None:
        Card.current.waits.append(f"{what}: {_place()}")


def _place() -> str:
    """Where in the library."""
    ours = [
        f"{frame.filename.split('rl_ebm/')[-1]}:{frame.lineno} {frame.line}"
        for frame in traceback.extract_stack()
        if "/rl_ebm/" in frame.filename and "site-packages" not in frame.filename
    ]
    return ours[-1] if ours else "outside of the library"


def register() -> None:
    """Let PyTorch know a device of this name; once in a process."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        backend_registration._setup_privateuseone_for_python_backend(NAME)
