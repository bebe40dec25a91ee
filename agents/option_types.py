"""One check of the options of every agent: each value is of the type that its field declares."""

from __future__ import annotations

from functools import cache
from numbers import Integral, Real
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_types(options: Any) -> None:
    """Check a dataclass of options, and make its numbers Python's own: they are written as JSON.

    Fields of ``int``, ``float``, ``None`` and ``Literal`` are looked at. numpy's numbers are
    numbers; a bool is none, and 2.0 is no integer.

    Raises:
        TypeError: a value of another type than its field's.
        ValueError: a value that is none of a ``Literal``'s, or a number beyond a float's range.
    """
    kind: Any = type(options)
    for name, hint in _hints(kind).items():
        object.__setattr__(options, name, _checked(name, getattr(options, name), hint))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _checked(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if not isinstance(value, str) or value not in choices:
            allowed = f"one of {', '.join(choices)}"
            if len(choices) == 2:
                allowed = "{!r} or {!r}".format(*choices)
            raise ValueError(f"{name} must be {allowed}, got {_shown(value)}")
        return value
    kinds = set(get_args(hint) or (hint,))
    if not kinds & {int, float} or (value is None and NoneType in kinds):
        return value
    if _is(Integral, value):
        return _in_range(name, int(value), float in kinds)
    if float in kinds and _is(Real, value):
        return float(value)
    wanted = "a number" if float in kinds else "an integer"
    rest = ", or None" if NoneType in kinds else ""
    raise TypeError(f"{name} must be {wanted}{rest}, got {_shown(value)}")


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _in_range(name: str, value: int, is_float: bool) -> int:
    """An int, where a float is meant one that a float can hold."""
    if is_float and abs(value) > 10**300:
        raise ValueError(f"{name} must be a finite number, got one of {len(str(value))} digits")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
