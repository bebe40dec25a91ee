"""A row of the table: a loss as a framework ships it, and the settings that it is asked with."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from rl_ebm.studies.losses.advantages import Advantages
from rl_ebm.studies.losses.preference import Pairs

Kind = Literal["policy-gradient", "distillation", "preference"]


class FrameworkError(ValueError):
    """A framework that is not installed, too old, or changed inside: one sentence."""


@dataclass(frozen=True)
class Case:
    """What the rows depend on of an EBM.

    Attributes:
        beta: reward units per nat; what each framework calls its KL coefficient.
        max_length: tokens of the longest response.
        fixed_length: whether all responses have that many.
        prompts: how many there are.
    """

    beta: float
    max_length: int
    fixed_length: bool = True
    prompts: int = 1


@dataclass(frozen=True)
class Instead:
    """What to set for the limit to be the EBM: another row, and how one says it there."""

    name: str
    options: dict[str, Any]
    sentence: str


@dataclass(frozen=True)
class Row:
    """A loss of the contract of :func:`rl_ebm.audit_loss`, and what it is.

    Attributes:
        name: qualified name of what is called.
        options: of the framework, by its names; its KL coefficient is the EBM's beta.
        kind: policy-gradient, distillation or preference.
        pairs: of preferences, how they are made; None as usual.
        default: whether the options, beta apart, are those that the framework ships.
        instead: for rows that do not end at the EBM.
        unknown: why there is no limit to look for; None where there is.
    """

    name: str
    options: dict[str, Any]
    kind: Kind
    loss: Callable[..., Tensor]
    advantages: str | Advantages = "centred"
    sampler: str | float | None = None
    default: bool = False
    instead: Instead | None = None
    unknown: str | None = field(default=None)
    pairs: Pairs | None = None


Rows = Callable[[Case], list[Row]]


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings of other packages are not ours, nor is what they print what the command prints."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def version_of(package: str) -> str:
    """What is installed.

    Raises:
        FrameworkError: nothing is.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise FrameworkError(f"{package} is not installed: pip install {package}") from None


def has(module: str) -> bool:
    """Whether a release has the file of a module, without importing it: some come and go."""
    package, *rest = module.split(".")
    spec = util.find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return any(Path(folder, *rest).with_suffix(".py").is_file() for folder in folders)


def family(module: str, rows: Callable[[], list[Row]], kind: Kind = "distillation") -> list[Row]:
    """The rows of a module that not every release has: none where there is no such file.

    Where it is there and does not import, as without an extra of its own, or is not what is known
    of it, one row of this kind says so.
    """
    if not has(module):
        return []
    try:
        return rows()
    except FrameworkError as error:
        return [Row(module, {}, kind, nothing, unknown=str(error))]


def nothing(*_: Tensor) -> Tensor:
    """The loss of a row without a limit."""
    raise AssertionError("a row without a limit is not called")


def part(module: str, name: str) -> Any:
    """A member of a module of a framework.

    Raises:
        FrameworkError: there is none, or the module cannot be imported.
    """
    package = module.split(".")[0]
    version = version_of(package)
    try:
        with quiet():
            found = importlib.import_module(module)
    except Exception as error:
        raise FrameworkError(
            f"{package} {version} cannot be imported here: {module} was expected, and gives "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    return member(found, name, package, module)


def member(found: Any, name: str, package: str, module: str) -> Any:
    """Of a module or class, down a dotted name.

    Raises:
        FrameworkError: there is none.
    """
    for key in name.split("."):
        if not hasattr(found, key):
            raise FrameworkError(
                f"{package} {version_of(package)} is not the release that this adapter knows: "
                f"{name} was expected in {module}"
            )
        found = getattr(found, key)
    return found
