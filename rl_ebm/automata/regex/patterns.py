"""Regular expressions over the text of tokens, as deterministic automata.

The pattern's automaton (:mod:`nfa`) reads characters; here whole tokens drive it, whose texts may
be parts of characters (:mod:`utf8`) and depend on where they stand (:mod:`pieces`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rl_ebm.automata.machine import Machine, deterministic
from rl_ebm.automata.phrases import check_score
from rl_ebm.automata.regex.charsets import CharacterSet
from rl_ebm.automata.regex.endings import endings, shortest
from rl_ebm.automata.regex.ids import decode, encode
from rl_ebm.automata.regex.nfa import (
    MAX_STATES,
    Automaton,
    compile_tree,
    literals,
    parse,
    too_large,
)
from rl_ebm.automata.regex.pieces import Pieces, pieces_of
from rl_ebm.automata.regex.utf8 import CODES, Utf8
from rl_ebm.automata.symbols import with_eos
from rl_ebm.automata.windows import check_size
from rl_ebm.messages.arguments import shown
from rl_ebm.tokens import TokenSpace, check_space

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
_BLANK: CharacterSet = ("LITERAL", 0x20)


def regex(
    space: TokenSpace,
    pattern: str,
    score: float | int,
    alphabet: Sequence[str] | None = None,
    tokenizer: Any = None,
) -> Machine:
    """``score`` where all of the text of a response's tokens matches.

    Raises:
        TypeError: a pattern or an alphabet that is no text.
        ValueError: a pattern that is not valid or not supported, with the position; one that no
            response can match, with the reason; an alphabet of another size than the vocabulary;
            too many states.
    """
    check_space(space)
    check_score(score)
    next_, accepting, missing = token_automaton(space, pattern, alphabet, tokenizer)
    if space.eos_id is not None:
        next_[:, space.eos_id] = np.arange(len(next_))
    _check_possible(space, pattern, next_, accepting, missing)
    final = torch.zeros(len(next_), dtype=torch.float64)
    final[torch.from_numpy(accepting)] = float(score)
    weight = torch.zeros(next_.shape, dtype=torch.float64)
    return deterministic(torch.from_numpy(next_), weight, final)


def containing(text: str) -> str:
    """The pattern of all texts in which a text occurs."""
    return rf"[\s\S]*{re.escape(text)}[\s\S]*"


def token_automaton(
    space: TokenSpace, pattern: str, alphabet: Sequence[str] | None, tokenizer: Any
) -> tuple[Ints, Mask, str]:
    """Transitions (K, A) from state 0 on, accepting states, and what hinders a match, or ''."""
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern is text, got {shown(pattern)}")
    if alphabet is not None and tokenizer is not None:
        raise ValueError("give alphabet or tokenizer: the tokenizer has the text of every token")
    if tokenizer is not None:
        return _of_pieces(pattern, _fitting(pieces_of(tokenizer), space))
    if alphabet is None:
        texts, (text, places) = decode(space.vocab_size), encode(pattern, space.vocab_size)
        return _of_characters(pattern, text, places, texts, ids=True)
    texts = with_eos(space, alphabet)
    if any(_holds_bytes(text) for text in texts):
        return _of_pieces(pattern, Pieces(texts, texts, False, frozenset(), {}))
    return _of_characters(pattern, pattern, range(len(pattern) + 1), texts, ids=False)


def _holds_bytes(text: str) -> bool:
    return any("\udc80" <= c <= "\udcff" for c in text)


def _fitting(pieces: Pieces, space: TokenSpace) -> Pieces:
    """A text for every token of the space: a model may have more ids than its tokenizer."""
    more = space.vocab_size - len(pieces.texts)
    if more < 0:
        raise ValueError(
            f"the tokenizer has {len(pieces.texts):,} tokens, the space {space.vocab_size:,}: "
            "vocab_size must be len(tokenizer) at least"
        )
    skipped = pieces.skipped | frozenset(range(len(pieces.texts), space.vocab_size))
    empty = [""] * more
    return Pieces(pieces.texts + empty, pieces.first + empty, pieces.strips, skipped, pieces.runs)


def _of_characters(
    pattern: str, text: str, places: Sequence[int], texts: list[str], ids: bool
) -> tuple[Ints, Mask, str]:
    """Where every token is whole characters: those of all tokens are all that there are."""
    tree = parse(pattern, text, places)
    characters = sorted(set("".join(texts)))
    codes = np.array([ord(c) for c in characters], dtype=np.int64)
    found = compile_tree(tree, pattern, codes, ids)
    _check_size(len(found.table), len(texts), pattern)
    spelling = _Spelling([found.kinds.of_text(text) for text in texts])
    next_ = spelling.read(np.arange(len(found.table)), lambda q, kind: found.table[q, kind])
    missing = _missing(tree, set(characters), texts) if not ids else ""
    return next_, found.accepting, missing


def _of_pieces(pattern: str, pieces: Pieces) -> tuple[Ints, Mask, str]:
    """Where tokens may be parts of characters, and a text may begin otherwise than it goes on."""
    tree = parse(pattern, pattern, range(len(pattern) + 1))
    apart = [_BLANK] if pieces.strips else []
    found = compile_tree(tree, pattern, CODES, False, apart)
    if pieces.strips:
        found = _stripped(found)
    run = _Runs(pattern, found, pieces) if pieces.runs else _Bytes(pattern, found, pieces)
    next_ = run.explore()
    characters = set("".join(pieces.texts))
    missing = "" if pieces.runs else _missing(tree, characters, pieces.texts)
    # A character may be made of bytes of several tokens.
    missing = "" if missing and any(map(_holds_bytes, pieces.texts)) else missing
    return next_, np.array([run.accepts(state) for state in run.states], dtype=np.bool_), missing


def _check_size(states: int, tokens: int, pattern: str) -> None:
    check_size(states, tokens, f"the pattern {shown(pattern)}", "use a simpler pattern")


def _missing(tree: Any, characters: set[str], texts: list[str]) -> str:
    """Which of the characters that a pattern names no token has, as the reason for no match."""
    absent = sorted(literals(tree) - characters)
    if not absent:
        return ""
    reason = f"no token's text has {', '.join(map(repr, absent[:5]))}"
    if any(c in "\u0120\u2581" for text in texts for c in text):
        reason += (
            " (the alphabet holds a tokenizer's pieces, which are no text: "
            "rl_ebm.rewards.alphabet_of(tokenizer) has the texts, or pass tokenizer=)"
        )
    return reason


def _check_possible(
    space: TokenSpace, pattern: str, next_: Ints, accepting: Mask, missing: str
) -> None:
    """Raise ValueError where no response of the space can match."""
    ends = endings(next_, space)
    if ends is None or bool((ends & accepting).any()):
        return
    least = shortest(next_, accepting)
    limit = space.max_length - (space.eos_id is not None)
    if least is None:
        reason = missing or "no sequence of tokens is such a text"
    elif space.eos_id is None and least <= limit:
        reason = f"no match has exactly {limit} tokens, the shortest has {least}"
    else:
        reason = f"the shortest match has {least:,} tokens, and a response at most {limit:,}"
        reason += " beside its EOS" if space.eos_id is not None else ""
    raise ValueError(f"no response can match the pattern {shown(pattern)}: {reason}")


class _Spelling:
    """Texts as columns: what is read at each place of those that are so long."""

    def __init__(self, spelled: Sequence[Sequence[int]]) -> None:
        self.count = len(spelled)
        lengths = np.array([len(text) for text in spelled], dtype=np.int64)
        self.columns = []
        for i in range(int(lengths.max(initial=0))):
            longer = (lengths > i).nonzero()[0]
            self.columns.append((longer, np.array([spelled[int(a)][i] for a in longer])))

    def read(self, states: Ints, step: Callable[[Ints, Ints], Ints]) -> Ints:
        """Where each of some states is after each of the texts, (states, texts)."""
        out = np.repeat(states[:, None], self.count, axis=1)
        for longer, read in self.columns:
            out[:, longer] = step(out[:, longer], read)
        return out


def _stripped(found: Automaton) -> Automaton:
    """The automaton of texts that lose a blank in front before they are read."""
    (blank,) = found.kinds.of_text(" ")
    # A state of its own in front: all others move up by one.
    first = found.table[0] + 1
    first[blank] = 1
    table = np.concatenate([first[None], found.table + 1])
    return Automaton(table, np.concatenate([found.accepting[:1], found.accepting]), found.kinds)


class _Explorer:
    """States of a token automaton, numbered as they are found; state 0 has read nothing."""

    def __init__(self, pattern: str, found: Automaton, pieces: Pieces) -> None:
        self.pattern, self.found, self.pieces = pattern, found, pieces
        self.states: list[Any] = []
        self.place: dict[Any, int] = {}

    def number(self, state: Any) -> int:
        if state not in self.place:
            if len(self.states) == MAX_STATES:
                raise too_large(self.pattern)
            self.place[state] = len(self.states)
            self.states.append(state)
        return self.place[state]

    def check_size(self) -> None:
        _check_size(len(self.states), len(self.pieces.texts), self.pattern)


class _Bytes(_Explorer):
    """Texts whose bytes are read as UTF-8: states of characters, and what is open of one.

    A state is (whether nothing was read yet, number of :meth:`Utf8.step`).
    """

    def __init__(self, pattern: str, found: Automaton, pieces: Pieces) -> None:
        super().__init__(pattern, found, pieces)
        self.utf8 = Utf8(found.kinds.of)

    def accepts(self, state: tuple[bool, int]) -> bool:
        end = self.utf8.finish(self.found.table, np.array([state[1]]))
        return bool(self.found.accepting[end[0]])

    def step(self, states: Ints, byte: Ints) -> Ints:
        return self.utf8.step(self.found.table, states, byte)

    def explore(self) -> Ints:
        pieces = self.pieces
        real = [a for a in range(len(pieces.texts)) if a not in pieces.skipped]
        begins = pieces.first is not pieces.texts
        spelled = {
            first: _Spelling([texts[a].encode("utf-8", "surrogateescape") for a in real])
            for first, texts in ((False, pieces.texts), (True, pieces.first))
        }
        self.number((begins, 0))
        rows: list[Ints] = []
        while len(rows) < len(self.states):
            first, state = self.states[len(rows)]
            row = np.full(len(pieces.texts), len(rows))
            after = spelled[first].read(np.array([state]), self.step)[0]
            values, place = np.unique(after, return_inverse=True)
            numbers = [self.number((False, int(value))) for value in values]
            row[real] = np.array(numbers, dtype=np.int64)[place.reshape(-1)]
            rows.append(row.astype(np.int32))
            self.check_size()
        return np.stack(rows).astype(np.int64)


class _Runs(_Explorer):
    """Texts with tokens of one byte, whose runs are valid as a whole or so many faults.

    A state is (begins, q, None), or in a run (False, faulty q, (q, node) or None where it is no
    UTF-8 any more).
    """

    def __init__(self, pattern: str, found: Automaton, pieces: Pieces) -> None:
        super().__init__(pattern, found, pieces)
        self.utf8 = Utf8(found.kinds.of)

    def ended(self, state: Any) -> int:
        """The automaton's state where a run ends."""
        _, q, run = state
        return int(run[0] if run not in (None, "lost") and run[1] == 0 else q)

    def accepts(self, state: Any) -> bool:
        return bool(self.found.accepting[self.ended(state)])

    def read_byte(self, state: Any, byte: int) -> Any:
        _, q, run = state
        table, utf8 = self.found.table, self.utf8
        fault = int(table[q, utf8.bad])
        if run == "lost":
            return False, fault, "lost"
        good, node = (q, 0) if run is None else run
        after = int(utf8.node[node, byte])
        if after < 0:
            return False, fault, "lost"
        kind = int(utf8.kind[node, byte])
        return False, fault, (int(table[good, kind]) if kind >= 0 else good, after)

    def explore(self) -> Ints:
        pieces, table = self.pieces, self.found.table
        inert = pieces.skipped | set(pieces.runs)
        real = [a for a in range(len(pieces.texts)) if a not in inert]
        spelled = {
            first: _Spelling([self.found.kinds.of_text(texts[a]) for a in real])
            for first, texts in ((False, pieces.texts), (True, pieces.first))
        }
        self.number((pieces.first is not pieces.texts, 0, None))
        rows: list[Ints] = []
        while len(rows) < len(self.states):
            state = self.states[len(rows)]
            row = np.full(len(pieces.texts), len(rows))
            begin = np.array([self.ended(state)])
            after = spelled[state[0]].read(begin, lambda q, kind: table[q, kind])[0]
            values, place = np.unique(after, return_inverse=True)
            numbers = [self.number((False, int(value), None)) for value in values]
            row[real] = np.array(numbers, dtype=np.int64)[place.reshape(-1)]
            for token, byte in pieces.runs.items():
                row[token] = self.number(self.read_byte(state, byte))
            rows.append(row.astype(np.int32))
            self.check_size()
        return np.stack(rows).astype(np.int64)
