"""The dataclasses of options: frozen, and every value is of the type that its field declares."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from types import NoneType
from typing import Any, Literal, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from rl_ebm.messages.arguments import WrongTypeError, is_number, is_whole, shown

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def checked_options(kind: type[T]) -> type[T]:
    """Make a class a frozen dataclass of options, which checks what it is given before anything.

    Fields of ``int``, ``float``, ``None`` and ``Literal`` are looked at. numpy's numbers are
    numbers, and become Python's own, as they are written as JSON; a bool is none, and 2.0 is no
    integer. Making one raises WrongTypeError for a value of another type than its field's,
    ValueError for one that is none of a ``Literal``'s.
    """
    made: Any = dataclass(frozen=True)(kind)  # the same class
    init, parameters = made.__init__, signature(made.__init__)
    hints = get_type_hints(made)

    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        given = parameters.bind(self, *args, **kwargs).arguments
        del given["self"]
        init(self, **{name: _checked(name, value, hints[name]) for name, value in given.items()})

    made.__init__ = checked
    made.__signature__ = signature(init).replace(
        parameters=list(parameters.parameters.values())[1:], return_annotation=None
    )
    return kind


def _checked(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if isinstance(value, str) and value in choices:
            return value
        allowed = f"one of {', '.join(choices)}"
        if len(choices) == 2:
            allowed = "{!r} or {!r}".format(*choices)
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    kinds = set(get_args(hint) or (hint,))
    if not kinds & {int, float} or (value is None and NoneType in kinds):
        return value
    if is_whole(value):
        return _in_range(name, int(value)) if float in kinds else int(value)
    if float in kinds and is_number(value):
        return float(value)
    wanted = "a number" if float in kinds else "an integer"
    rest = ", or None" if NoneType in kinds else ""
    raise WrongTypeError(f"{name} must be {wanted}{rest}, got {shown(value)}")


def _in_range(name: str, value: int) -> int:
    """An int that a float can hold."""
    if abs(value) > 10**300:
        raise ValueError(f"{name} must be a finite number, got one of more than 300 digits")
    return value
