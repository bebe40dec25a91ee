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

A phrase is token ids with spaces between them, or with an alphabet its symbols (see
:class:`rl_ebm.automata.symbols.Symbols`). An argument without quotes loses the white space around
it and ends at `` + ``; in double quotes it is what stands between them, white space, ``+`` and
``*`` included, and a double quote is written twice. A number in front multiplies the reward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rl_ebm.automata.symbols import Symbols
from rl_ebm.messages.arguments import shown
from rl_ebm.messages.numerals import parse_real
from rl_ebm.messages.words import nearest
from rl_ebm.packages.plugins import Registry
from rl_ebm.rewards.automaton import Automaton, total
from rl_ebm.tokens import TokenSpace

_HEAD = re.compile(r"\s*(?:(?P<factor>[^\s:*\"]+)\s*\*\s*)?(?P<kind>[a-z]+)\s*:", re.IGNORECASE)
_QUOTED = re.compile(r"\s*\"(?P<text>(?:[^\"]|\"\")*)\"(?P<rest>\s*(?:\+|\Z))?")
_END = re.compile(r"\s\+(?:\s|\Z)|\Z")
MAX_TERMS = 1000


@dataclass(frozen=True)
class Words:
    """In what the arguments of an expression are written.

    Attributes:
        space: the responses.
        alphabet: the symbol of every token id; None for ids.
        phrase: text to the token ids of a phrase.
    """

    space: TokenSpace
    alphabet: Sequence[str] | None
    phrase: Callable[[str], list[int]]


Kind = Callable[[str, float, Words], Automaton]
"""(argument, the number in front or 1, words) to a reward; ValueError where it cannot be read"""


def _avoids(text: str, factor: float, words: Words) -> Automaton:
    if factor != 1:
        raise ValueError("avoids is -inf: a factor says nothing")
    return Automaton.avoids(words.space, words.phrase(text))


def _parity(text: str, score: float, words: Words) -> Automaton:
    if text.strip() not in ("0", "1"):
        raise ValueError(f"parity is 0 or 1, got {shown(text.strip())}")
    scores = [0.0, score] if text.strip() == "1" else [score, 0.0]
    return Automaton.modular(words.space, scores)


def _regex(text: str, score: float, words: Words) -> Automaton:
    alphabet = None if words.alphabet is None else list(words.alphabet)
    return Automaton.regex(words.space, text, score, alphabet)


def register(name: str, kind: Any) -> Kind:
    """Make a kind known to :func:`parse_reward`, and to ``--reward "name:argument"``.

    In this process alone. An installed package does it for every process, the command line's too,
    by an entry point ``name = "module:function"`` in the group ``rl_ebm.rewards``.

    Args:
        name: letters a to z.
        kind: ``(argument, factor, words) -> Automaton``, the factor being the number in front, or
            1, and ``words`` having the ``space``, the ``alphabet`` and ``phrase(text)``, the ids of
            a phrase. A ValueError of its own is told with its position in the expression.

    Raises:
        ValueError: a name that is taken, or no name.
        TypeError: no function.
    """
    return KINDS.add(name, _read(name, kind))


def _read(name: object, kind: Any) -> Kind:
    """A kind that is registered or referred to; raises as :func:`register` does."""
    if not isinstance(name, str) or not re.fullmatch("[a-z]+", name):
        raise ValueError(f"the name of a kind of reward is letters a to z, got {shown(name)}")
    if not callable(kind):
        raise TypeError(
            f"a kind of reward is a function (argument, factor, words) -> Automaton, got "
            f"{shown(kind)}"
        )
    found: Kind = kind
    return found


KINDS: Registry[Kind] = Registry("kind of reward", "rl_ebm.rewards", _read)
"""what makes a reward of each kind"""
KINDS.update(
    {
        "contains": lambda text, x, w: Automaton.contains(w.space, w.phrase(text), x),
        "avoids": _avoids,
        "avoid": _avoids,
        "counts": lambda text, x, w: Automaton.counts(w.space, w.phrase(text), x),
        "regex": _regex,
        "hamming": lambda text, x, w: Automaton.hamming(w.space, w.phrase(text), x),
        "edit": lambda text, x, w: Automaton.edit_distance(w.space, w.phrase(text), x),
        "parity": _parity,
    }
)


def parse_reward(
    expression: str, space: TokenSpace, alphabet: Sequence[str] | None = None
) -> Automaton:
    """The reward of an expression; see the module's docstring.

    Args:
        alphabet: the symbol of every token id; None for phrases of ids.

    Raises:
        TypeError: no text, no space, or an alphabet that is no list of strings.
        ValueError: what cannot be read, with its position in the expression.
    """
    if not isinstance(expression, str):
        raise TypeError(f"a reward expression is text, got {shown(expression)}")
    if not isinstance(space, TokenSpace):
        raise TypeError(f"space must be a TokenSpace, got {type(space).__name__}")
    words = Words(space, alphabet, Symbols(space, alphabet).read)
    parts = []
    for term in _terms(expression):
        if term.kind not in KINDS:
            what = f"there is no {shown(term.kind)}{nearest(term.kind.lower(), KINDS)}"
            raise _fault(expression, term.kind_at, KINDS.fault(term.kind) or what)
        try:
            parts.append(_made(KINDS[term.kind](term.argument, _factor(term.factor), words), term))
        except _FactorError as error:
            raise _fault(expression, term.factor_at, str(error)) from None
        except ValueError as error:
            raise _fault(expression, term.argument_at, str(error)) from None
        except TypeError as error:  # of a kind of others
            raise TypeError(f"the reward {shown(term.kind)} at {term.kind_at}: {error}") from error
    return total(parts)


@dataclass(frozen=True)
class _Term:
    """One term as it is written, and where its parts stand."""

    factor: str | None
    factor_at: int
    kind: str
    kind_at: int
    argument: str
    argument_at: int


def _made(reward: object, term: _Term) -> Automaton:
    """Raise TypeError unless a kind has made what can be added to the other terms."""
    if not isinstance(reward, Automaton):
        raise TypeError(f"the kind {term.kind!r} must make an Automaton, got {shown(reward)}")
    return reward


def _terms(expression: str) -> list[_Term]:
    """The terms of an expression, none of them read."""
    found: list[_Term] = []
    at: int | None = 0
    while at is not None:
        head = _HEAD.match(expression, at)
        if head is None:
            raise _fault(expression, at, "expected KIND:ARGUMENT, for example contains:3 1")
        argument, argument_at, at = _argument(expression, head.end())
        parts = head["factor"], head.start("factor"), head["kind"], head.start("kind")
        found.append(_Term(*parts, argument, argument_at))
        if len(found) > MAX_TERMS:
            raise _fault(expression, argument_at, f"more than {MAX_TERMS:,} terms")
    return found


def _argument(expression: str, at: int) -> tuple[str, int, int | None]:
    """The argument at a position, where it stands, and where the next term does."""
    text = expression[at:]
    if text.lstrip().startswith('"'):
        match = _QUOTED.match(expression, at)
        if match is None:
            raise _fault(expression, at, "the quotes are not closed")
        if match["rest"] is None:
            what = 'expected " + " or the end after the quotes (a quote in them is written twice)'
            raise _fault(expression, match.end(), what)
        more = match["rest"].endswith("+")
        argument = match["text"].replace('""', '"')
        return argument, match.start("text"), match.end() if more else None
    end = _END.search(expression, at)
    assert end is not None, "the end is always found"
    argument = expression[at : end.start()]
    plus = expression.find("+", *end.span())
    return argument.strip(), at, None if plus < 0 else plus + 1


class _FactorError(ValueError):
    pass


def _factor(text: str | None) -> float:
    """The number in front of a term, 1 without one."""
    if text is None:
        return 1.0
    if text.lower() in ("nan", "inf", "+inf"):
        return float(text)  # no score, as the reward says
    try:
        return parse_real(text)
    except ValueError as error:
        raise _FactorError(str(error)) from None


def _fault(expression: str, position: int, what: str) -> ValueError:
    return ValueError(f"reward {shown(expression)}, position {position}: {what}")
