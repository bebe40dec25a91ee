"""Whether the outline of a checkpoint is that of the run that it is to go on with.

Everything is compared with what the run has made anew from its configuration: the same names, the
same kinds of values, the same shapes. Only what grows with training has room: moments of an
optimiser that has not stepped yet, rows of a replay that is empty yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_ebm.files import STATE, RunError, only_one
from rl_ebm.training.checkpoint import Stored, load_state
from rl_ebm.training.directory import load_weights

_ADAM = {"step", "exp_avg", "exp_avg_sq"}
_FILLED_IN = {
    "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused",
    "decoupled_weight_decay",
}  # fmt: skip
"""of a group of parameters: what torch fills in where an older version had not saved it"""


class MisfitError(ValueError):
    """What of a checkpoint is not as the run has it."""


_STATE = {
    "step": int,
    "seconds": (int, float),
    "tokens": int,
    "reward_calls": int,
    "complete": bool,
    "kind": str,
    "policy": dict,
    "agent": dict,
    "generator": Stored,
    "metrics_rows": int,
    "event_sizes": dict,
}


def restored(path: Path, run: Any) -> dict[str, Any]:
    """A checkpoint, with a run's policy, agent and generator as it says; all of it checked.

    Args:
        path: of the checkpoint.
        run: the Trainer that is to go on with it, before its first step.

    Raises:
        RunError: it is damaged, or of another run.
    """
    agent = run.agent
    try:
        state = load_state(path, run.ebm.device, partial(check_state, run=run))
        _check_numbers(state["agent"], agent.state_dict(), path)
        load_weights(agent.policy, state["policy"], path)
        agent.load_state_dict(state["agent"])
        check_moments(agent.learner.optimizer, state["step"], path)
        # A generator's state lives on the CPU, whatever its device.
        run.generator.set_state(state["generator"].cpu())
    except RunError:
        raise
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError, IndexError) as error:
        reason = str(error) or repr(error)
        raise RunError(f"{path} does not fit the run's configuration: {reason}") from None
    return state


def check_state(saved: dict[str, Any], run: Any) -> None:
    """Check a whole checkpoint.

    Args:
        saved: the checkpoint, with a :class:`Stored` in the place of each tensor.
        run: the Trainer that is to go on with it, before its first step.

    Raises:
        RunError: it is damaged, or of another run.
    """
    try:
        _check_parts(saved, run.generator.get_state())
        if saved["kind"] != run.kind():
            own = run.agent.policy.state_dict()
            raise MisfitError(
                f"it is of another agent or network{only_one(set(saved['policy']) ^ set(own))}"
            )
        _check_like(saved["policy"], dict(run.agent.policy.state_dict()), "policy", None)
        optimizer = getattr(run.agent.learner, "optimizer", None)
        _check_like(saved["agent"], dict(run.agent.state_dict()), "agent", optimizer)
    except MisfitError as error:
        raise RunError(
            f"{run.run / STATE} is damaged or does not fit the run's configuration: {error}"
        ) from None


def _check_parts(saved: Mapping[str, Any], generator: Tensor) -> None:
    for name, kind in (_STATE | ({"looked_up": int} if "looked_up" in saved else {})).items():
        value: Any = saved.get(name)
        number = isinstance(value, (int, float)) and kind is not bool
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)  # type: ignore[arg-type]
        if wrong or (number and not 0 <= value < 2**62):
            raise MisfitError(f"its {name} is missing")
    sizes = saved["event_sizes"].items()
    if not all(isinstance(n, str) and type(size) is int and size >= 0 for n, size in sizes):
        raise MisfitError("its event_sizes are wrong")
    _check_tensor(saved["generator"], generator, tuple(generator.shape), "generator")


def _check_like(saved: Any, fresh: Any, path: str, optimizer: Any) -> None:
    if isinstance(fresh, dict) and fresh:
        _check_dict(saved, fresh, path, optimizer)
    elif isinstance(fresh, (list, tuple)) and fresh:
        if not isinstance(saved, (list, tuple)) or len(saved) != len(fresh):
            raise MisfitError(f"{path} is no list of {len(fresh)}")
        for i, (x, y) in enumerate(zip(saved, fresh, strict=True)):
            _check_like(x, y, f"{path}[{i}]", optimizer)
    elif isinstance(fresh, Tensor):
        rows = saved.shape[:1] if isinstance(saved, Stored) and fresh.shape[:1] == (0,) else ()
        _check_tensor(saved, fresh, (*rows, *fresh.shape[len(rows) :]), path)
    elif isinstance(fresh, (dict, list, tuple)):  # empty: what it will hold is not known
        if type(saved) is not type(fresh):
            raise MisfitError(f"{path} is of the wrong kind")
    elif fresh is not None and not _same_kind(saved, fresh):
        raise MisfitError(f"{path} is of the wrong kind")


def _check_dict(saved: Any, fresh: dict[Any, Any], path: str, optimizer: Any) -> None:
    if not isinstance(saved, dict) or saved.keys() != fresh.keys():
        others = set(map(str, saved)) ^ set(map(str, fresh)) if isinstance(saved, dict) else {"all"}
        raise MisfitError(f"of {path} these are missing or too many: {', '.join(sorted(others))}")
    if fresh.keys() == {"state", "param_groups"}:
        _check_optimizer(saved, fresh, path, optimizer)
        return
    for name, value in fresh.items():
        _check_like(saved[name], value, f"{path}.{name}", optimizer)


def _check_tensor(saved: Any, like: Tensor, shape: tuple[int, ...], path: str) -> None:
    if not isinstance(saved, Stored) or saved.dtype != like.dtype or saved.shape != shape:
        what = f"{saved.dtype} {saved.shape}" if isinstance(saved, Stored) else "no tensor"
        raise MisfitError(f"{path} is {what}, expected {like.dtype} {tuple(shape)}")


def _same_kind(saved: Any, fresh: Any) -> bool:
    if isinstance(fresh, bool) or isinstance(saved, bool) or not isinstance(fresh, (int, float)):
        return type(saved) is type(fresh)
    if isinstance(fresh, int):
        return isinstance(saved, int) and abs(saved) < 2**63
    return isinstance(saved, (int, float))


# Optimisers ---------------------------------------------------------------------------------------


def _check_optimizer(
    saved: dict[str, Any], fresh: dict[str, Any], path: str, optimizer: Any
) -> None:
    groups = saved["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(fresh["param_groups"]):
        raise MisfitError(f"{path}.param_groups is no list of {len(fresh['param_groups'])}")
    for i, (x, y) in enumerate(zip(groups, fresh["param_groups"], strict=True)):
        _check_group(x, y, f"{path}.param_groups[{i}]")
    if not isinstance(saved["state"], dict):
        raise MisfitError(f"{path}.state is of the wrong kind")
    numbers = [number for group in fresh["param_groups"] for number in group["params"]]
    groups = [] if optimizer is None else optimizer.param_groups
    parameters = [p for group in groups for p in group["params"]]
    known = len(parameters) == len(numbers)
    for number, moments in saved["state"].items():
        where = f"{path}.state[{number!r}]"
        if number not in numbers or not isinstance(moments, dict):
            raise MisfitError(f"{where} belongs to no parameter")
        if isinstance(optimizer, torch.optim.Adam) and moments.keys() != _ADAM:
            raise MisfitError(f"{where} has {sorted(map(str, moments))}, expected {sorted(_ADAM)}")
        if known:
            _check_moments(moments, parameters[numbers.index(number)], where)


def _check_group(saved: Any, fresh: dict[str, Any], path: str) -> None:
    """Only the learning rate moves; what another version of torch adds or lacks may differ."""
    if not isinstance(saved, dict) or saved.get("params") != fresh["params"]:
        raise MisfitError(f"{path} has other parameters")
    lr = saved.get("lr")
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 <= lr < math.inf:
        raise MisfitError(f"{path} has no learning rate")
    for name in fresh.keys() - {"params", "lr"}:
        if name not in saved and name not in _FILLED_IN:
            raise MisfitError(f"{path} has no {name}")
        if name in saved and (isinstance(saved[name], Stored) or saved[name] != fresh[name]):
            raise MisfitError(f"{path} has another {name}")


def _check_moments(moments: dict[Any, Any], parameter: Tensor, path: str) -> None:
    for name, value in moments.items():
        if name == "step":
            _check_tensor(value, torch.zeros(()), (), f"{path}.step")
        elif isinstance(value, Stored):
            _check_tensor(value, parameter, tuple(parameter.shape), f"{path}.{name}")
            if _strides(value) != _strides(parameter):  # fused Adam walks over both as over one
                raise MisfitError(f"{path}.{name} is laid out otherwise than its parameter")
        elif name in _ADAM:
            raise MisfitError(f"{path}.{name} is no tensor")


def _strides(x: Stored | Tensor) -> list[int]:
    """Of the dimensions that have more than one entry: the others' mean nothing."""
    strides = x.stride if isinstance(x, Stored) else x.stride()
    return [stride for stride, size in zip(strides, x.shape, strict=True) if size > 1]


def check_moments(optimizer: torch.optim.Optimizer, step: int, path: Path) -> None:
    """Check the numbers of an optimiser that was loaded: some no training leaves.

    Args:
        step: how many its run has made.
        path: of the checkpoint.

    Raises:
        RunError: there are no moments, one is NaN or infinite, a second one is negative, or a
            count is no positive number.
    """
    if step and not optimizer.state:
        raise RunError(f"{path} is damaged: after {step:,} steps its optimiser has no moments")
    for moments in optimizer.state.values():
        for name, value in moments.items():
            least = {"exp_avg": -math.inf, "step": 1.0}.get(name, 0.0)
            if isinstance(value, Tensor) and not bool(((value >= least) & value.isfinite()).all()):
                raise RunError(
                    f"{path} is damaged: {name} of its optimiser is NaN, infinite or too small"
                )


def _check_numbers(saved: Any, fresh: Any, path: Path) -> None:
    """Check that no number of an agent is one that no training leaves.

    NaN and inf are none. -inf is a legal log-weight: of rows that were drawn, and where the agent
    begins with it.

    Raises:
        RunError: one is there.
    """
    for name, value, like in _numbers(saved, fresh, ""):
        rows = like is None or like.shape[:1] == (0,) or bool(torch.isneginf(like).any())
        bad = value.isnan() | (value.isinf() if not rows else torch.isposinf(value))
        if bool(bad.any()):
            raise RunError(f"{path} is damaged: its agent's {name[1:]} is NaN or infinite")


def _numbers(saved: Any, fresh: Any, name: str) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Every floating tensor but an optimiser's, each with the one that the agent has made anew."""
    if isinstance(saved, Mapping) and saved.keys() != {"state", "param_groups"}:
        for key, value in saved.items():
            like = fresh.get(key) if isinstance(fresh, Mapping) else None
            yield from _numbers(value, like, f"{name}.{key}")
    elif isinstance(saved, (list, tuple)):
        others = fresh if isinstance(fresh, (list, tuple)) and fresh else [None] * len(saved)
        for i, (value, like) in enumerate(zip(saved, others, strict=True)):
            yield from _numbers(value, like, f"{name}[{i}]")
    elif isinstance(saved, (Tensor, float)):
        found = torch.as_tensor(saved)
        if found.is_floating_point():
            yield name, found, fresh if isinstance(fresh, Tensor) else None
