"""Rewards as the command line writes them: ``2*contains:3 1 + avoids:7 7``.

    expression  =  term { " + " term }
    term        =  [number "*"] kind ":" argument

=====================  =======================================================================
kind and argument      reward
=====================  =======================================================================
``contains:PHRASE``    1 where the phrase occurs
``avoids:PHRASE``      -inf where it occurs; ``avoid`` is the same
``counts:PHRASE``      1 for each occurrence
``regex:PATTERN``      1 where the whole response, without its EOS, matches
``hamming:PHRASE``     number of positions that differ from the phrase
``edit:PHRASE``        edit distance to the phrase
``parity:1``           1 where the ids of all tokens sum to this, modulo 2
=====================  =======================================================================

A phrase is token ids with spaces between them, or with an alphabet its symbols. Double quotes
around an argument keep a `` + `` in it. A number in front multiplies the reward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rl_ebm.names import nearest
from rl_ebm.rewards.automaton import Automaton, total
from rl_ebm.tokens import TokenSpace

_TERM = re.compile(
    r"\s*(?:(?P<factor>[^\s:*\"]+)\s*\*\s*)?(?P<kind>[a-z]+)\s*:"
    r"(?:\s*\"(?P<quoted>[^\"]*)\"\s*|(?P<plain>.*?))(?=\s\+\s|$)",
    re.DOTALL,
)
Symbols = Sequence[str] | None


class _Reader:
    """Arguments of one expression, with the positions of their faults."""

    def __init__(self, space: TokenSpace, alphabet: Symbols) -> None:
        self.space, self.alphabet = space, alphabet

    def phrase(self, text: str) -> list[int]:
        """Token ids of a phrase; ValueError for what is no token."""
        if self.alphabet is None:
            words = text.split()
            wrong = next((word for word in words if not word.isdecimal()), None)
            if wrong is not None:
                raise ValueError(f"{wrong!r} is no token id")
            return [int(word) for word in words]
        symbols = text.split() if any(len(s) != 1 for s in self.alphabet) else text.strip()
        places = {symbol: i for i, symbol in enumerate(self.alphabet)}
        missing = next((symbol for symbol in symbols if symbol not in places), None)
        if missing is not None:
            raise ValueError(f"{missing!r} is not in the alphabet")
        return [places[symbol] for symbol in symbols]

    def parity(self, text: str, score: float) -> Automaton:
        if text.strip() not in ("0", "1"):
            raise ValueError(f"parity is 0 or 1, got {text.strip()!r}")
        scores = [0.0, score] if text.strip() == "1" else [score, 0.0]
        return Automaton.modular(self.space, scores)

    def kinds(self) -> dict[str, Callable[[str, float], Automaton]]:
        """What makes a reward of each kind from its argument and its factor."""
        space, phrase = self.space, self.phrase
        alphabet = None if self.alphabet is None else list(self.alphabet)

        def avoids(text: str, factor: float) -> Automaton:
            if factor != 1:
                raise ValueError("avoids is -inf: a factor says nothing")
            return Automaton.avoids(space, phrase(text))

        return {
            "contains": lambda text, x: Automaton.contains(space, phrase(text), x),
            "avoids": avoids,
            "avoid": avoids,
            "counts": lambda text, x: Automaton.counts(space, phrase(text), x),
            "regex": lambda text, x: Automaton.regex(space, text.strip(), x, alphabet),
            "hamming": lambda text, x: Automaton.hamming(space, phrase(text), x),
            "edit": lambda text, x: Automaton.edit_distance(space, phrase(text), x),
            "parity": self.parity,
        }


def parse_reward(expression: str, space: TokenSpace, alphabet: Symbols = None) -> Automaton:
    """The reward of an expression; see the module's docstring.

    Args:
        alphabet: the symbol of every token id; None for phrases of ids.

    Raises:
        ValueError: what cannot be read, with its position in the expression.
    """
    kinds = _Reader(space, alphabet).kinds()
    parts, at = [], 0
    while True:
        match = _TERM.match(expression, at)
        if match is None:
            raise _fault(expression, at, "expected KIND:ARGUMENT, for example contains:3 1")
        factor, kind = match["factor"], match["kind"]
        if kind not in kinds:
            where = match.start("kind")
            raise _fault(expression, where, f"there is no {kind!r}{nearest(kind, kinds)}")
        try:
            score = 1.0 if factor is None else float(factor)
        except ValueError:
            raise _fault(expression, match.start("factor"), f"{factor!r} is no number") from None
        group = "plain" if match["quoted"] is None else "quoted"
        try:
            parts.append(kinds[kind](match[group], score))
        except ValueError as error:
            raise _fault(expression, match.start(group), str(error)) from None
        rest = expression[match.end() :]
        if not rest.strip():
            return total(parts)
        at = match.end() + rest.index("+") + 1


def _fault(expression: str, position: int, what: str) -> ValueError:
    return ValueError(f"reward {expression!r}, position {position}: {what}")
