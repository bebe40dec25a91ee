"""What has a name: the library's own, what is registered, and what installed packages bring.

A package brings something by an entry point (https://packaging.python.org/specifications/entry-points/)
in its pyproject.toml, here an agent::

    [project.entry-points."rl_ebm.agents"]
    theirs = "their_package.agent:ENTRY"

The groups are ``rl_ebm.agents``, ``rl_ebm.tasks`` and ``rl_ebm.rewards``; the entry point's name is
the thing's. Nothing of this is read when rl_ebm is imported: what is installed is looked through
when a name is none of those that are known, or when all are listed, and a package is imported
when its name is asked for, or all are.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from rl_ebm.messages.arguments import shown

T = TypeVar("T")
LONGEST = 300
"""characters that are kept of what a package says when it fails"""


class PluginWarning(UserWarning):
    """An entry point that is left out of a list: it cannot be loaded, or its name is taken."""


class Registry(MutableMapping[str, T]):
    """Things by their names, in the order in which they came.

    One that cannot be loaded is none: ``in`` says no, lists leave it out with a
    :class:`PluginWarning`, and :meth:`fault` has the sentence that says why.

    Args:
        what: the word for one, ``agent`` say.
        group: of the entry points that bring more.
        read: ``(name, what the entry point refers to)`` to the thing; raises what is wrong with it.
    """

    def __init__(self, what: str, group: str, read: Callable[[str, Any], T]) -> None:
        self.what, self.group, self.read = what, group, read
        self._known: dict[str, T] = {}
        self._faults: dict[str, str] = {}

    def add(self, name: str, thing: T, advice: str = "") -> T:
        """Take up a thing by a name that is free.

        Raises:
            ValueError: it is taken, also by an installed package that was not imported yet.
        """
        if name in self._known:
            raise ValueError(f"there is {self._named(name)} already: give another name{advice}")
        for point in self._installed.get(name, []):
            if point.module not in sys.modules:  # a package may register its own by itself
                raise ValueError(
                    f"there is {self._named(name)} already, of the distribution {_source(point)}: "
                    "give another name, or uninstall it"
                )
        self._known[name] = thing
        return thing

    def names(self) -> list[str]:
        """All names, also of what cannot be loaded: no package is imported for them."""
        return list(dict.fromkeys([*self._known, *self._installed, *self._faults]))

    def fault(self, name: object) -> str | None:
        """Why an installed package's thing of that name is none; None where there is nothing."""
        return self._faults.get(name) if isinstance(name, str) else None

    def __getitem__(self, name: str) -> T:
        if name not in self._known:
            self._load(name)
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        if isinstance(name, str) and name not in self._known:
            self._load(name)
        return name in self._known

    def __setitem__(self, name: str, thing: T) -> None:
        self._known[name] = thing

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __iter__(self) -> Iterator[str]:
        for name in list(self._installed):
            self._load(name)
            if name in self._faults:
                warnings.warn(self._faults[name], PluginWarning, stacklevel=2)
        return iter(list(self._known))

    def __len__(self) -> int:
        return len(list(iter(self)))

    @cached_property
    def _installed(self) -> dict[str, list[EntryPoint]]:
        """The entry points by name that were not loaded yet."""
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            found.setdefault(point.name, []).append(point)
        return found

    def _load(self, name: str) -> None:
        """Take up an installed package's thing, once; what is wrong with it is its fault."""
        points = self._installed.pop(name, [])
        if not points:
            return
        sources = " and of ".join(map(_source, points))
        one = f"the {self.what} {shown(name)} of the distribution {sources}"
        if len(points) > 1:
            self._faults[name] = f"{one} cannot be told apart: uninstall all but one"
            return
        before = self._known.get(name)
        try:
            thing = self.read(name, points[0].load())
        except Exception as error:  # whatever another's code raises
            said = " ".join(f"{type(error).__name__}: {error}".split())
            self._faults[name] = f"{one} cannot be loaded: {said[:LONGEST]}"
            return
        if before is not None and before is not thing:
            self._faults[name] = f"{one} is left out: there is {self._named(name)} already"
            return
        self._known[name] = thing

    def _named(self, name: str) -> str:
        return f"{'an' if self.what[0] in 'aeiou' else 'a'} {self.what} {shown(name)}"


def call_installed(group: str, name: str) -> str | None:
    """Call what installed packages have under a name, functions that register something.

    Returns:
        The sentence that says which of them failed, and how; None where none did.
    """
    for point in entry_points(group=group, name=name):
        try:
            point.load()()
        except Exception as error:  # whatever another's code raises
            said = " ".join(f"{type(error).__name__}: {error}".split())
            return (
                f"the entry point {shown(name)} in {group} of the distribution {_source(point)} "
                f"fails: {said[:LONGEST]}"
            )
    return None


def _source(point: EntryPoint) -> str:
    """The distribution that an entry point is of, and its version."""
    return "that is not named" if point.dist is None else f"{point.dist.name} {point.dist.version}"
