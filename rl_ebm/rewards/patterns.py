"""Regular expressions over the text of tokens, as deterministic automata.

The parser is the standard library's; its tree is built into states by the constructions of
Thompson (1968), and of subsets. What no automaton can do (back-references, look-around) is told
with its position.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rl_ebm.automata import Machine, deterministic
from rl_ebm.rewards.phrases import check_score
from rl_ebm.rewards.regex_ids import FIRST, MOST, decode, encode
from rl_ebm.tokens import TokenSpace

MAX_STATES = 20_000
"""of the automata that a pattern may become"""

# The tree of `re.compile`, under the name that it has since Python 3.11.
_parser: Any = importlib.import_module("re._parser")
_CATEGORIES = {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w"}


def regex(
    space: TokenSpace, pattern: str, score: float | int, alphabet: Sequence[str] | None
) -> Machine:
    """``score`` where all of the text of a response's tokens matches.

    Raises:
        ValueError: a pattern that is not valid or not regular, with the position; an alphabet
            that has another size than the vocabulary; too many states.
    """
    check_score(score)
    places = list(range(len(pattern) + 1))
    if alphabet is None:
        alphabet, (text, places) = decode(space.vocab_size), encode(pattern, space.vocab_size)
    else:
        alphabet, text = _with_eos(space, alphabet), pattern
    try:
        re.compile(text)
        tree = _parser.parse(text)
    except re.error as error:
        where = "" if error.pos is None else f" at position {places[error.pos]}"
        raise ValueError(f"the pattern {pattern!r} is not valid{where}: {error.msg}") from None
    if tree.state.flags & ~re.UNICODE.value:
        raise ValueError(f"the pattern {pattern!r} sets flags, which are not supported")
    characters = sorted(set("".join(alphabet)))
    nfa = _NFA(characters, pattern)
    end = nfa.build(_strip_anchors(list(tree)), 0)
    table, accepting = nfa.determinise(end)
    next_ = _over_tokens(table, characters, alphabet)
    if space.eos_id is not None:
        next_[:, space.eos_id] = torch.arange(len(next_))
    final = torch.zeros(len(next_), dtype=torch.float64)
    final[accepting] = float(score)
    return deterministic(next_, torch.zeros(next_.shape), final)


def _with_eos(space: TokenSpace, alphabet: Sequence[str]) -> list[str]:
    """A text for every token; what that of EOS says does not count."""
    found = list(alphabet)
    if space.eos_id is not None and len(found) == space.branching:
        found.insert(space.eos_id, "")
    if len(found) != space.vocab_size or not all(isinstance(text, str) for text in found):
        raise ValueError(
            f"the alphabet has {len(alphabet)} entries, expected one text for each of the "
            f"{space.vocab_size} tokens"
            + (" (EOS may be left out)" if space.eos_id is not None else "")
        )
    return found


def _strip_anchors(items: list[Any]) -> list[Any]:
    """The whole response is matched anyway: ^ in front and $ at the end say nothing."""
    name = [str(op) for op, _ in items]
    first = int(bool(items) and name[0] == "AT" and "BEGINNING" in str(items[0][1]))
    last = len(items) - int(len(items) > first and name[-1] == "AT" and "END" in str(items[-1][1]))
    return items[first:last]


class _NFA:
    """States with transitions by sets of characters (None: without reading)."""

    def __init__(self, characters: Sequence[str], pattern: str) -> None:
        self.characters, self.pattern = characters, pattern
        self.sets: dict[tuple[str, str], frozenset[int]] = {}
        self.edges: list[list[tuple[frozenset[int] | None, int]]] = [[]]

    def new(self) -> int:
        self.edges.append([])
        if len(self.edges) > MAX_STATES:
            raise ValueError(f"the pattern {self.pattern!r} needs too many states: repeat less")
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
                raise ValueError(f"the pattern {self.pattern!r} sets flags: not supported")
            return self.build(value[3], start)
        if op == "BRANCH":
            ends = [self.build(branch, start) for branch in value[1]]
            end = self.new()
            for state in ends:
                self.edges[state].append((None, end))
            return end
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            return self.repeat(value[0], value[1], value[2], start)
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            end = self.new()
            self.edges[start].append((self.matching(op, value), end))
            return end
        raise ValueError(
            f"the pattern {self.pattern!r} uses {op.lower().replace('_', ' ')}, which no "
            "automaton can do: only alternatives, sets and repetitions are supported"
        )

    def repeat(self, least: int, most: Any, items: Any, start: int) -> int:
        """A part again and again."""
        for _ in range(least):
            start = self.build(items, start)
        end = self.new()
        if str(most) == "MAXREPEAT":
            loop = self.new()
            self.edges[start].append((None, loop))
            self.edges[self.build(items, loop)].append((None, loop))
            self.edges[loop].append((None, end))
            return end
        for _ in range(int(most) - least):
            self.edges[start].append((None, end))
            after = self.new()
            self.edges[start].append((None, after))
            start = self.build(items, after)
        self.edges[start].append((None, end))
        return end

    def matching(self, op: str, value: Any) -> frozenset[int]:
        """Places of the characters that one item matches."""
        key = (op, str(value))
        if key not in self.sets:
            places = enumerate(self.characters)
            self.sets[key] = frozenset(i for i, c in places if _matches(op, value, c))
        return self.sets[key]

    def kinds(self) -> tuple[list[int], dict[frozenset[int], list[int]]]:
        """The kind of each character, alike where no set tells them apart; those of each set."""
        sets = list({read for edges in self.edges for read, _ in edges if read})
        inside: list[list[int]] = [[] for _ in self.characters]
        for i, read in enumerate(sets):
            for c in read:
                inside[c].append(i)
        known: dict[tuple[int, ...], int] = {}
        kind_of = [known.setdefault(tuple(x), len(known)) for x in inside]
        found: dict[frozenset[int], list[int]] = {read: [] for read in sets}
        for signature, kind in known.items():
            for i in signature:
                found[sets[i]].append(kind)
        return kind_of, found

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        """All states that are reached without reading."""
        found, todo = set(states), list(states)
        while todo:
            for read, state in self.edges[todo.pop()]:
                if read is None and state not in found:
                    found.add(state)
                    todo.append(state)
        return frozenset(found)

    def determinise(self, end: int) -> tuple[Tensor, list[int]]:
        """Transitions (K, characters), the last state being lost, and the accepting states."""
        kind_of, kinds = self.kinds()
        first = self.closure([0])
        known = {first: 0}
        order, lines = [first], []
        i = 0
        while i < len(order):
            reached: dict[int, set[int]] = {}
            for state in order[i]:
                for read, after in self.edges[state]:
                    for c in kinds[read] if read else ():
                        reached.setdefault(c, set()).add(after)
            line = [-1] * (max(kind_of, default=-1) + 1)
            for c, states in reached.items():
                target = self.closure(states)
                if target not in known:
                    known[target] = len(order)
                    order.append(target)
                line[c] = known[target]
            lines.append(line)
            i += 1
            if len(order) > MAX_STATES:
                raise ValueError(
                    f"the pattern {self.pattern!r} needs more than {MAX_STATES:,} states: repeat "
                    "less"
                )
        lost = len(order)
        table = torch.full((lost + 1, len(self.characters)), lost)
        if self.characters:
            rows = torch.tensor(lines)
            table[:lost] = torch.where(rows < 0, lost, rows)[:, torch.tensor(kind_of)]
        return table, [i for i, states in enumerate(order) if end in states]


def _matches(op: str, value: Any, character: str) -> bool:
    code = ord(character)
    if op == "ANY":
        return character != "\n"
    if op == "LITERAL":
        return bool(value == code)
    if op == "NOT_LITERAL":
        return bool(value != code)
    if op == "RANGE":
        return bool(value[0] <= code <= value[1])
    if op == "CATEGORY":
        name = str(value).removeprefix("CATEGORY_")
        # The character of a token id is a digit.
        text = "0" if FIRST <= code < FIRST + MOST else character
        positive = re.match(_CATEGORIES[name.removeprefix("NOT_")], text) is not None
        return positive != name.startswith("NOT_")
    negated = str(value[0][0]) == "NEGATE"
    return negated != any(_matches(str(o), v, character) for o, v in value[negated:])


def _over_tokens(table: Tensor, characters: Sequence[str], alphabet: Sequence[str]) -> Tensor:
    """Transitions of whole tokens, (K, A): their characters one after the other."""
    place = {c: i for i, c in enumerate(characters)}
    states = torch.arange(len(table))
    next_ = states[:, None].repeat(1, len(alphabet))
    longest = max(map(len, alphabet), default=0)
    for i in range(longest):
        tokens = [a for a, text in enumerate(alphabet) if len(text) > i]
        read = torch.tensor([place[alphabet[a][i]] for a in tokens])
        next_[:, tokens] = table[next_[:, tokens], read]
    return next_
