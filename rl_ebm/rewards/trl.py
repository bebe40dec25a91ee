"""Rewards as TRL's trainers take them (GRPO, RLOO; the interface of TRL 1.16).

A function gets lists under the names ``prompts``, ``completions``, ``completion_ids`` (EOS
included), the columns of the data set, ``trainer_state``, ``log_extra`` and ``log_metric``, as far
as it takes them, and returns a float for each completion, or None where it does not apply. It may
be a coroutine function. Several are added with weights, those that do not apply left out.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from numbers import Real
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor, nn

from rl_ebm.automata.weights import check_values
from rl_ebm.messages.arguments import finite, shown
from rl_ebm.rewards.base import Prompts
from rl_ebm.tokens import TokenSpace

_OWN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")

RewardFunction = Callable[..., Any]


def from_trl(
    function: RewardFunction | Sequence[RewardFunction],
    decode: Callable[[list[int]], Any],
    columns: Mapping[str, Sequence[Any]] | None = None,
    weights: Sequence[float | int] | None = None,
    prompts: Sequence[Any] | None = None,
) -> TRLFunction:
    """A reward written for TRL, ``f(prompts, completions, **columns) -> list[float]``.

    Args:
        function: the reward function, unchanged; or several.
        decode: token ids, without the EOS, to what the function takes (usually text); used for
            prompts and completions.
        columns: further data-set columns, one entry for each prompt of the EBM.
        weights: of several functions, TRL's ``reward_weights``; None for 1 each.
        prompts: the data set's prompts, one for each prompt of the EBM, handed on as they are; None
            for decoded ones. Where they are lists of messages, a completion is a message of the
            assistant.

    Raises:
        TypeError: no function, or columns that are no lists.
        ValueError: another number of weights than of functions, or a column with a name of TRL's.
    """
    return TRLFunction(function, decode, columns, weights, prompts)


def _listed(prompts: object) -> list[Any]:
    """Raise TypeError unless these are the prompts of a data set, one after the other."""
    try:
        if isinstance(prompts, (str, bytes)):
            raise TypeError
        return list(prompts)  # type: ignore[call-overload,no-any-return]
    except TypeError:  # a tensor without rows has an iterator, too
        raise TypeError(
            f"prompts must be a list, one for each of the EBM's, got {shown(prompts)}"
        ) from None


class TRLFunction:
    """See :func:`from_trl`. The EBM tells it the prompts when it takes it.

    Attributes:
        extra, metrics: what the functions logged last with ``log_extra`` and ``log_metric``.
        trainer_state: what the functions get: the state of a trainer before its first step, as the
            EBM of a reward that changed while training would not be one.
    """

    forbids = False
    called = True

    def __init__(
        self,
        function: RewardFunction | Sequence[RewardFunction],
        decode: Callable[[list[int]], Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
        weights: Sequence[float | int] | None = None,
        prompts: Sequence[Any] | None = None,
    ) -> None:
        functions = [function] if callable(function) else function
        self.functions = _check_functions(functions)
        if not callable(decode):
            raise TypeError(f"decode must be a function of token ids, got {shown(decode)}")
        self.decode = decode
        self.columns = _check_columns(columns)
        self.weights = _check_weights(weights, len(self.functions))
        self.given = None if prompts is None else _listed(prompts)
        self.prompts: list[Any] = []
        self.eos_id: int | None = None
        self.extra: dict[str, list[Any]] = {}
        self.metrics: dict[str, float] = {}
        self.trainer_state = SimpleNamespace(
            global_step=0, max_steps=0, epoch=0.0, num_train_epochs=0, log_history=[]
        )

    def bind(self, space: TokenSpace, prompts: Prompts | None) -> TRLFunction:
        lists = [[]] if prompts is None else [list(p) for p in prompts]
        named = {f"column {name!r}": column for name, column in self.columns.items()}
        if self.given is not None:
            named["prompts"] = self.given
        for name, column in named.items():
            if len(column) != len(lists):
                raise ValueError(
                    f"{name} has {len(column)} entries, expected one for each of the "
                    f"{len(lists)} prompts"
                )
        bound = TRLFunction(self.functions, self.decode, self.columns, self.weights, self.given)
        bound.prompts = [self.decode(p) for p in lists] if self.given is None else self.given
        bound.eos_id = space.eos_id
        # What is logged is found where the user looks for it.
        bound.extra, bound.metrics = self.extra, self.metrics
        return bound

    def __call__(
        self,
        tokens: Int64[Tensor, "B T"],
        lengths: Int64[Tensor, "B"],
        prompt_ids: Int64[Tensor, "B"],
    ) -> Shaped[Tensor, "B"]:
        rows = prompt_ids.tolist()
        if not rows:
            return torch.zeros(0, dtype=torch.float64, device=tokens.device)
        ids = [y[:n] for y, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        stop = 0 if self.eos_id is None else 1
        completions = [self.decode(row[: len(row) - stop]) for row in ids]
        if _is_conversation(self.prompts[0]):
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        arguments = {
            "prompts": [self.prompts[i] for i in rows],
            "completions": completions,
            "completion_ids": ids,
            "trainer_state": self.trainer_state,
            "log_extra": self._log_extra,
            "log_metric": self._log_metric,
        }
        arguments |= {name: [column[i] for i in rows] for name, column in self.columns.items()}
        results = [f(**_accepted(f, arguments, self.columns)) for f in self.functions]
        values = [_numbers(result, len(rows)) for result in _awaited(results)]
        reward = _weighted(torch.stack(values), self.weights)
        check_values(reward, "the TRL reward's value")
        return reward.to(tokens.device)

    def to(self, device: torch.device | str) -> TRLFunction:
        return self

    def _log_extra(self, column: str, values: Any) -> None:
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise TypeError(f"log_extra({column!r}, ...) takes a list, got {shown(values)}")
        self.extra[column] = list(values)

    def _log_metric(self, name: str, value: Any) -> None:
        number = value.item() if getattr(value, "ndim", None) == 0 else value
        if not isinstance(number, Real):
            raise TypeError(f"log_metric({name!r}, ...) takes a number, got {shown(value)}")
        self.metrics[name] = float(number)


def _check_functions(functions: Any) -> list[RewardFunction]:
    if not isinstance(functions, Sequence) or isinstance(functions, str) or not functions:
        raise TypeError(f"give a TRL reward function or a list of them, got {shown(functions)}")
    for f in functions:
        if isinstance(f, nn.Module) or not callable(f):
            raise TypeError(
                f"a TRL reward here is a function of prompts and completions, got "
                f"{type(f).__name__}: wrap a reward model in one"
            )
    return list(functions)


def _check_columns(columns: Any) -> dict[str, Sequence[Any]]:
    if columns is None:
        return {}
    if not isinstance(columns, Mapping):
        raise TypeError(f"columns must be a dict of lists, got {shown(columns)}")
    for name, column in columns.items():
        if isinstance(column, str) or not hasattr(column, "__len__"):
            raise TypeError(f"column {name!r} must be a list, got {shown(column)}")
        if name in _OWN:
            raise ValueError(f"column {name!r} has a name under which TRL passes something else")
    return dict(columns)


def _check_weights(weights: Any, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    try:
        found = [finite("a weight", weight) for weight in weights]
    except TypeError:
        raise TypeError(f"weights must be a list of numbers, got {shown(weights)}") from None
    if len(found) != count:
        raise ValueError(f"there are {len(found)} weights for {count} reward functions")
    return found


def _is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], Mapping)


def _accepted(
    function: RewardFunction, arguments: dict[str, Any], columns: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments that a function takes; columns were asked for, and are passed always."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return arguments
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {k: v for k, v in arguments.items() if k in parameters or k in columns}


def _awaited(results: Sequence[Any]) -> list[Any]:
    """Results, those of coroutine functions awaited together."""
    waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    out = list(results)
    if waiting:
        found = asyncio.run_coroutine_threadsafe(
            _gather([results[i] for i in waiting]), _loop()
        ).result()
        for i, value in zip(waiting, found, strict=True):
            out[i] = value
    return out


async def _gather(waiting: Iterable[Awaitable[Any]]) -> list[Any]:
    return list(await asyncio.gather(*waiting))


@lru_cache(maxsize=1)
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls, as TRL has: clients of services belong to the loop they are made in.

    It runs in a thread of its own, so that rewards can be called where another loop runs.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rl-ebm-rewards", daemon=True).start()
    return loop


def _numbers(result: Any, count: int) -> Tensor:
    """What one function returned, float64, NaN where it does not apply.

    Raises:
        TypeError: no list of numbers.
        ValueError: another number of values than completions, or NaN.
    """
    if isinstance(result, Tensor) or hasattr(result, "__array__"):
        # An array of objects holds numbers beside None, which no tensor does.
        result = result if isinstance(result, Tensor) else np.asarray(result)
        if result.shape != (count,):
            raise ValueError(
                f"the TRL reward returned shape {tuple(result.shape)}, expected ({count},): one "
                "number for each completion"
            )
        result = result.tolist()
    if isinstance(result, str | Mapping) or not isinstance(result, Iterable):
        raise TypeError(f"the TRL reward returned {shown(result)}, expected a list of numbers")
    values = list(result)
    if len(values) != count:
        raise ValueError(f"the TRL reward returned {len(values)} values for {count} completions")
    found = []
    for i, value in enumerate(values):
        number = value.item() if getattr(value, "ndim", None) == 0 else value
        if number is not None and not isinstance(number, Real):
            raise TypeError(
                f"the TRL reward's value is {shown(value)} at index {i}, expected a number or None"
            )
        if number is not None and math.isnan(number):
            raise ValueError(
                f"the TRL reward's value is nan at index {i}: a reward must be a number below +inf "
                "(-inf marks an impossible response), or None where it does not apply"
            )
        found.append(math.nan if number is None else float(number))
    return torch.tensor(found, dtype=torch.float64)


def _weighted(values: Shaped[Tensor, "F B"], weights: Sequence[float]) -> Shaped[Tensor, "B"]:
    """The weighted sum over the functions that apply.

    Raises:
        ValueError: none applies to some completion.
    """
    nothing = values.isnan().all(0)
    if bool(nothing.any()):
        who = "the TRL reward" if len(values) == 1 else "every TRL reward"
        raise ValueError(
            f"{who} returned None: rl-ebm has one reward for every response, so return a number "
            f"(-inf for an impossible response); it was for completion {int(nothing.nonzero()[0])}"
        )
    factor = torch.tensor(weights, dtype=torch.float64)[:, None]
    # 0 times -inf is 0.
    terms = torch.where(values.isnan() | (factor == 0), 0.0, values) * factor
    return terms.sum(0)
