"""A policy that is to be trained: weights that can move, and that nothing else is made of.

Where the reference, the teacher or the network of the reward has a weight of the policy's own, the
target moves with every step, and what was solved or verified is another EBM than the one that is
left at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from inspect import getclosurevars, isfunction, ismethod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rl_ebm.ebm import EBM, check_ebm
from rl_ebm.messages.arguments import check_generator, shown
from rl_ebm.policies.base import Policy, Trainable, device_of, parameters_of, tensors_read_by
from rl_ebm.policies.outputs import check_kind

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, torch.dtype)
_CALLED = ("logits", "forward", "__call__", "start", "step")
"""methods of an object that may read a policy which is a global of its module"""
_LIBRARIES = ("rl_ebm", "torch", "transformers", "peft", "numpy")
"""whose functions read no global of a user's"""
_MOST = 100_000
"""objects that are looked at, at most"""


def check_trained(ebm: EBM, policy: Trainable, teacher: Policy | None = None) -> None:
    """Check a policy before the first step: see :meth:`EBM.check_policy` and the two below.

    Raises:
        TypeError: no policy.
        ValueError: logits that are none of a policy or have no gradient, weights that cannot be
            trained, or that the target is made of.
    """
    ebm.check_policy(policy)
    check_weights(policy)
    check_apart(ebm, policy, teacher)
    _check_gradient(ebm, policy)


def check_given(
    ebm: EBM,
    kind: type[Any],
    config: Any,
    generator: torch.Generator | None,
    teacher: Policy | None,
) -> Any:
    """Check the kinds of what an agent is made of, before anything; its options.

    Args:
        kind: of its options; ``config`` None stands for their defaults.

    Raises:
        TypeError: no EBM, options of another agent, no generator, or no policy for a teacher.
    """
    check_ebm(ebm)
    check_generator(generator, ebm.device)
    if teacher is not None:
        check_kind(teacher, "the teacher")
    if config is None:
        return kind()
    names = [f.name for f in fields(kind)]
    if isinstance(config, type) or not all(hasattr(config, name) for name in names):
        raise TypeError(
            f"config must be a {kind.__name__}, or None for the default, got {shown(config)}"
        )
    return config


def check_weights(policy: Trainable) -> None:
    """Check that there are weights to train, of a precision in which small steps count.

    Raises:
        ValueError: no weights, all of them frozen, or in half precision.
    """
    weights = dict(_named(policy))
    if not weights:
        raise ValueError(f"the policy ({type(policy).__name__}) has no weights: nothing to train")
    trained = {name: w for name, w in weights.items() if w.requires_grad}
    if not trained:
        raise ValueError(
            f"all {len(weights)} weight tensors of the policy are frozen (requires_grad is "
            "False, as in quantised models): call policy.requires_grad_(True), or train an adapter"
        )
    for name, weight in trained.items():
        if weight.dtype not in (torch.float32, torch.float64):
            kind = str(weight.dtype).removeprefix("torch.")
            raise ValueError(
                f"the policy's weights are {kind} ({name}), in which small steps are rounded away: "
                "train float32 weights, policy.float(), or load the model with dtype=torch.float32"
            )


def check_apart(ebm: EBM, policy: Trainable, teacher: Policy | None = None) -> None:
    """Check that the target is made of no weight that is trained.

    Raises:
        ValueError: a trained weight is the reference's, the teacher's, or the reward's.
    """
    mine = {_place(w): name for name, w in _named(policy) if w.requires_grad and not w.is_meta}
    for what, others in (
        ("reference", tensors_of(ebm.reference)),
        ("teacher", tensors_of(teacher)),
        ("reward", _tensors_of_reward(ebm.reward_model)),
    ):
        for tensor in others:
            name = None if tensor.is_meta else mine.get(_place(tensor))
            if name is not None:
                way = (
                    ""
                    if what != "reference"
                    else ("; with a LoRA adapter policy.reference() is one for no memory")
                )
                raise ValueError(
                    f"the policy shares a weight that is trained ({name}) with the {what}, so that "
                    f"the target would move with it: give the {what} a copy, "
                    f"copy.deepcopy(policy){way}"
                )


def tensors_of(thing: object, deep: bool = True) -> Iterator[Tensor]:
    """The tensors that an object is made of: its attributes', its containers', its closures'.

    An object with a method ``read_tensors`` says itself which it reads.

    Args:
        deep: whether to look into objects of any kind, or into modules and functions alone.
    """
    seen: dict[int, Any] = {}
    left: list[Any] = [thing]
    while left and len(seen) < _MOST:
        x = left.pop()
        if isinstance(x, _PLAIN) or id(x) in seen:
            continue
        seen[id(x)] = x  # kept alive: an id is of one object only while it lives
        if isinstance(x, Tensor):
            yield x
        else:
            left.extend(_parts(x, deep))


def _parts(x: Any, deep: bool) -> list[Any]:
    """What an object holds, one level down."""
    if isinstance(x, EBM):
        return []
    if (own := tensors_read_by(x)) is not None:
        return list[Any](own)
    if isinstance(x, dict):
        return list(x.values())
    if isinstance(x, (list, tuple, set, frozenset)):
        return list(x)
    if isinstance(x, partial):
        return [x.func, x.args, x.keywords]
    if ismethod(x):
        inner = [x.__self__] if deep or isinstance(x.__self__, nn.Module) else []
        return [*inner, x.__func__]
    if isfunction(x):
        return _read_by(x)
    if deep or isinstance(x, nn.Module):
        slots = [getattr(x, n, None) for n in getattr(type(x), "__slots__", ())]
        methods = [getattr(type(x), name, None) for name in _CALLED]
        return [*getattr(x, "__dict__", {}).values(), *slots, *filter(isfunction, methods)]
    return []


def _read_by(function: Any) -> list[Any]:
    """What a function reads that is not passed: closure, defaults, and globals of a script's."""
    names = getclosurevars(function)
    own = str(function.__module__).split(".")[0] not in _LIBRARIES
    found = names.globals.values() if own else ()
    return [*names.nonlocals.values(), *found, function.__defaults__, function.__kwdefaults__]


def _tensors_of_reward(reward: Any) -> Iterator[Tensor]:
    """Of what a reward is made; a function's other objects may know the policy for other ends."""
    for part in (reward, *getattr(reward, "__dict__", {}).values()):
        yield from tensors_of(part, deep=False)


def _named(policy: Trainable) -> list[tuple[str, nn.Parameter]]:
    if isinstance(policy, nn.Module):
        return list(policy.named_parameters())
    return [(f"number {i}", p) for i, p in enumerate(parameters_of(policy))]


def _place(tensor: Tensor) -> tuple[str, int]:
    """Where a tensor's memory is: the same for views and for tied weights."""
    if tensor.layout != torch.strided:  # a sparse one has several
        return "object", id(tensor)
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def _check_gradient(ebm: EBM, policy: Trainable) -> None:
    """Raise ValueError where logits have no gradient, as of a policy under no_grad."""
    if device_of(policy).type == "meta":
        return
    tokens = torch.zeros(1, ebm.space.max_length, dtype=torch.int64, device=device_of(policy))
    with torch.enable_grad():
        logits = policy.logits(tokens, torch.zeros_like(tokens[:, 0]))
    if not logits.requires_grad:
        raise ValueError(
            "the policy's logits have no gradient (they are computed under torch.no_grad(), or "
            "detached): nothing can be learned"
        )
