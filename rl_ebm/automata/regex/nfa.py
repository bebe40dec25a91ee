"""Regular expressions as automata over characters.

The parser is the standard library's; its tree is built into states by the constructions of
Thompson (1968), and of subsets. Anchors and word boundaries are edges that may be taken where the
characters before and after allow it. What no automaton can do (back-references) or what is not
done here (look-around, flags) is named.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_ebm.automata.regex.charsets import LINE_FEED, WORD, CharacterSet, Codes, Kinds
from rl_ebm.messages.arguments import shown

MAX_STATES = 20_000
"""of the automata that a pattern may become"""
MAX_WORK = 4_000_000
"""states of states that may be listed on the way"""
MAX_DEPTH = 100
"""groups inside groups"""

# The tree of `re.compile`, under the name that it has since Python 3.11.
_parser: Any = importlib.import_module("re._parser")
_NAMES = {
    "GROUPREF": "a back-reference (groupref)",
    "GROUPREF_EXISTS": "a condition on a group (groupref exists)",
    "ASSERT": "look-ahead or look-behind (assert)",
    "ASSERT_NOT": "negative look-ahead or look-behind (assert not)",
    "POSSESSIVE_REPEAT": "a possessive repetition (possessive repeat)",
    "ATOMIC_GROUP": "an atomic group",
}
_FREE, _BEFORE_LAST_FEED, _MUST_END = range(3)
START, END, FEED, IN_WORD, OTHER = range(5)
"""what stands before or after a place"""
# Since Python 3.14 it does.
_EMPTY_IS_NO_BOUNDARY = re.fullmatch(r"\B", "") is not None


@dataclass(frozen=True)
class Automaton:
    """A deterministic automaton over kinds of characters; it starts in state 0.

    Attributes:
        table: the next state, (K, kinds).
        accepting: whether a text may end in a state, (K,).
        kinds: of the characters.
    """

    table: npt.NDArray[np.int64]
    accepting: npt.NDArray[np.bool_]
    kinds: Kinds


def parse(pattern: str, text: str, places: Sequence[int]) -> list[Any]:
    """The tree of a pattern.

    Args:
        pattern: for messages.
        text: what is parsed.
        places: where in the pattern each character of the text was.

    Raises:
        ValueError: not valid, nested too deeply, or with flags.
    """
    if _depth(text) > MAX_DEPTH:
        raise ValueError(f"the pattern {shown(pattern)} nests more than {MAX_DEPTH} groups")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of sets that may mean more one day
            tree = _parser.parse(text)
    except re.error as error:
        where = "" if error.pos is None else f" at position {places[error.pos]}"
        raise ValueError(f"the pattern {shown(pattern)} is not valid{where}: {error.msg}") from None
    except OverflowError:
        raise too_large(pattern) from None
    except RecursionError:
        raise ValueError(f"the pattern {shown(pattern)} nests too many groups") from None
    if tree.state.flags & ~re.UNICODE.value:
        raise ValueError(f"the pattern {shown(pattern)} sets flags, which are not supported")
    return list(tree)


def _depth(text: str) -> int:
    """How deep the groups of a pattern go; escaped brackets and those in sets are none."""
    depth = most = i = 0
    in_set = False
    while i < len(text):
        character = text[i]
        if character == "\\":
            i += 1
        elif in_set:
            in_set = character != "]"
        elif character == "[":
            in_set = True
            # A bracket that comes first stands for itself.
            i += text.startswith("^", i + 1)
            i += text.startswith("]", i + 1)
        else:
            depth += (character == "(") - (character == ")")
            most = max(most, depth)
        i += 1
    return most


def too_large(pattern: str) -> ValueError:
    """The error of a pattern that would take too much."""
    return ValueError(f"the pattern {shown(pattern)} needs too many states: repeat less")


def literals(items: Any) -> set[str]:
    """The characters that a tree names, alone or in sets."""
    found = set()
    todo = list(items)
    while todo:
        op, value = todo.pop()
        name = str(op)
        if name == "LITERAL":
            found.add(chr(value))
        elif name == "BRANCH":
            todo += [item for branch in value[1] for item in branch]
        elif name in ("SUBPATTERN", "MAX_REPEAT", "MIN_REPEAT"):
            todo += list(value[-1])
        elif name == "IN" and str(value[0][0]) != "NEGATE":
            todo += [item for item in value if str(item[0]) == "LITERAL"]
    return found


def compile_tree(
    tree: Sequence[Any], pattern: str, codes: Codes, ids: bool, apart: Sequence[CharacterSet] = ()
) -> Automaton:
    """The automaton of a tree over some characters.

    Args:
        pattern: for messages.
        codes: the characters, sorted.
        ids: whether they are token ids.
        apart: sets that kinds have to tell apart beside those of the pattern.

    Raises:
        ValueError: something that is not supported, or too many states.
    """
    nfa = _NFA(pattern)
    if _size(tree) > MAX_STATES:
        raise too_large(pattern)
    end = nfa.build(tree, 0)
    sets = [*nfa.sets.values(), *apart, *((WORD, LINE_FEED) if nfa.looks_around else ())]
    return nfa.determinise(end, Kinds(codes, sets, ids))


def _size(items: Any) -> int:
    """About how many states a tree becomes; at least one for each time round."""
    total = 0
    for op, value in items:
        name = str(op)
        if name == "SUBPATTERN":
            total += _size(value[3])
        elif name == "BRANCH":
            total += 1 + sum(map(_size, value[1]))
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            times = value[0] + 1 if str(value[1]) == "MAXREPEAT" else int(value[1])
            total += (int(times) + 1) * (1 + _size(value[2]))
        else:
            total += 1
    return total


class _NFA:
    """States with edges: by a set of characters, by a place (AT), or None, without reading."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.sets: dict[str, CharacterSet] = {}
        self.edges: list[list[tuple[str | None, int]]] = [[]]
        self.contexts: dict[tuple[int, int], list[list[int]]] = {}
        self.matter: set[int] = set()
        self.looks_around = False
        self.work = 0

    def new(self) -> int:
        self.edges.append([])
        return len(self.edges) - 1

    def build(self, items: Any, start: int) -> int:
        """Add a sequence of parts after a state; the state after them."""
        for op, value in items:
            start = self.part(str(op), value, start)
        return start

    def part(self, op: str, value: Any, start: int) -> int:
        """Add one part."""
        if op == "SUBPATTERN":
            if value[1] or value[2]:
                raise ValueError(
                    f"the pattern {shown(self.pattern)} sets flags, which are not supported"
                )
            return self.build(value[3], start)
        if op == "BRANCH":
            ends = [self.build(branch, start) for branch in value[1]]
            end = self.new()
            for state in ends:
                self.edges[state].append((None, end))
            return end
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            return self.repeat(value[0], value[1], value[2], start)
        if op == "AT":
            self.looks_around = True
            return self.after(start, str(value))
        if op == "FAILURE" or (op == "ASSERT_NOT" and not len(value[1])):
            return self.new()  # from nowhere: "(?!)" matches nothing
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            key = f"{op} {value}"
            self.sets[key] = (op, value)
            return self.after(start, key)
        name = _NAMES.get(op, op.lower().replace("_", " "))
        raise ValueError(
            f"the pattern {shown(self.pattern)} uses {name}, which is not supported: "
            "alternatives, sets, repetitions, anchors and word boundaries are"
        )

    def after(self, start: int, edge: str | None) -> int:
        end = self.new()
        self.edges[start].append((edge, end))
        return end

    def repeat(self, least: int, most: Any, items: Any, start: int) -> int:
        """A part again and again."""
        for _ in range(least):
            start = self.build(items, start)
        end = self.new()
        if str(most) == "MAXREPEAT":
            loop = self.after(start, None)
            self.edges[self.build(items, loop)].append((None, loop))
            self.edges[loop].append((None, end))
            return end
        for _ in range(int(most) - least):
            self.edges[start].append((None, end))
            start = self.build(items, self.after(start, None))
        self.edges[start].append((None, end))
        return end

    # Subsets: an item is 3 * state + duty, whether the text may go on -----------------------------

    def free(self, before: int, after: int) -> list[list[int]]:
        """Items that are reached from each without reading, between two characters."""
        if (before, after) not in self.contexts:
            found: list[list[int]] = []
            for edges in self.edges:
                for duty in (_FREE, _BEFORE_LAST_FEED, _MUST_END):
                    found.append([])
                    for edge, target in edges:
                        if edge is None:
                            found[-1].append(3 * target + duty)
                        elif edge.startswith("AT_") and _holds(edge, before, after):
                            # "$" is also before a last line feed.
                            ahead = edge == "AT_END" and after == FEED and duty == _FREE
                            found[-1].append(3 * target + (_BEFORE_LAST_FEED if ahead else duty))
            self.contexts[before, after] = found
        return self.contexts[before, after]

    def closure(self, items: Iterable[int], before: int, after: int) -> frozenset[int]:
        """All items that are reached without reading and matter: they read, or are the end."""
        free = self.free(before, after)
        found = set(items)
        todo = list(found)
        while todo:
            for item in free[todo.pop()]:
                if item not in found:
                    found.add(item)
                    todo.append(item)
        self.work += len(found)
        if self.work > MAX_WORK:
            raise too_large(self.pattern)
        return frozenset(item for item in found if item // 3 in self.matter)

    def determinise(self, end: int, kinds: Kinds) -> Automaton:
        """By subsets; the last state is lost."""
        place = _places(kinds) if self.looks_around else [OTHER] * kinds.count
        moves = {after: self.moves(kinds, place, after) for after in set(place)}
        self.matter = {end} | {s for x in moves.values() for s, read in enumerate(x) if read}
        begin = self.key({3 * 0 + _FREE}, START)
        known, order = {begin: 0}, [begin]
        lines, accepting = [], []
        for items, before in order:  # it grows
            line = [-1] * kinds.count
            for after, of_state in moves.items():
                closed = self.closure(items, before, after) if self.looks_around else items
                for kind, found in _read(closed, of_state).items():
                    key = self.key(found, IN_WORD if place[kind] == IN_WORD else OTHER)
                    if key not in known:
                        known[key] = len(order)
                        order.append(key)
                    line[kind] = known[key]
            lines.append(line)
            last = self.closure(items, before, END) if self.looks_around else items
            accepting.append(any(item // 3 == end for item in last))
            if len(order) > MAX_STATES:
                raise ValueError(
                    f"the pattern {shown(self.pattern)} needs more than {MAX_STATES:,} states: "
                    "repeat less"
                )
        lost = len(order)
        table = np.array([*lines, [lost] * kinds.count], dtype=np.int64)
        return Automaton(np.where(table < 0, lost, table), np.array([*accepting, False]), kinds)

    def key(self, items: set[int], before: int) -> tuple[frozenset[int], int]:
        """A state of the automaton: what stands before counts where a pattern looks around."""
        if self.looks_around:
            return frozenset(items), before
        return self.closure(items, OTHER, OTHER), OTHER

    def moves(
        self, kinds: Kinds, place: Sequence[int], after: int
    ) -> list[list[tuple[int, list[int]]]]:
        """For each state the kinds of one place that it reads, with the states behind them."""
        inside = {
            key: [kind for kind in kinds.inside(item) if place[kind] == after]
            for key, item in self.sets.items()
        }
        found = []
        for edges in self.edges:
            targets: dict[int, list[int]] = {}
            for edge, target in edges:
                for kind in inside.get(edge, ()) if edge else ():
                    targets.setdefault(kind, []).append(target)
            found.append(list(targets.items()))
        return found


def _read(
    items: Iterable[int], moves: Sequence[Sequence[tuple[int, list[int]]]]
) -> dict[int, set[int]]:
    """Items after one character of each kind."""
    reached: dict[int, set[int]] = {}
    for item in items:
        state, duty = divmod(item, 3)
        if duty == _MUST_END:
            continue
        then = _MUST_END if duty == _BEFORE_LAST_FEED else _FREE
        for kind, targets in moves[state]:
            reached.setdefault(kind, set()).update([3 * target + then for target in targets])
    return reached


def _places(kinds: Kinds) -> list[int]:
    """What each kind of character is to anchors and boundaries."""
    place = [OTHER] * kinds.count
    for kind in kinds.inside(WORD):
        place[kind] = IN_WORD
    for kind in kinds.inside(LINE_FEED):
        place[kind] = FEED
    return place


def _holds(edge: str, before: int, after: int) -> bool:
    """Whether a place is one that an anchor or a boundary asks for."""
    if edge in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return before == START
    if edge == "AT_END":
        return after in (END, FEED)
    if edge == "AT_END_STRING":
        return after == END
    boundary = (before == IN_WORD) != (after == IN_WORD)
    if edge == "AT_BOUNDARY":
        return boundary
    return not boundary and (_EMPTY_IS_NO_BOUNDARY or (before, after) != (START, END))
