"""Responses as text: ids with spaces between them, or the symbols of an alphabet."""

from __future__ import annotations

from collections.abc import Sequence

from rl_ebm.messages.numerals import parse_whole
from rl_ebm.tokens import TokenSpace


def with_eos(space: TokenSpace, alphabet: Sequence[str]) -> list[str]:
    """A text for every token; what that of EOS says does not count.

    Raises:
        TypeError: the alphabet is no sequence of strings.
        ValueError: one of another size than the vocabulary.
    """
    found = list(alphabet) if isinstance(alphabet, Sequence) else []
    if not isinstance(alphabet, Sequence) or not all(isinstance(text, str) for text in found):
        raise TypeError("the alphabet must be a list of strings, the text of every token")
    if space.eos_id is not None and len(found) == space.branching:
        found.insert(space.eos_id, "")
    if len(found) != space.vocab_size:
        raise ValueError(
            f"the alphabet has {len(alphabet)} entries, expected one text for each of the "
            f"{space.vocab_size} tokens"
            + (" (EOS may be left out)" if space.eos_id is not None else "")
        )
    return found


class Symbols:
    """How the tokens of a space are written.

    Without an alphabet ids have white space between them. An alphabet of characters is read
    character by character, white space included. Longer symbols have white space between them;
    where one holds white space itself, a text is read as it stands, if there is one way to.

    Args:
        space: the responses.
        alphabet: the symbol of every token (that of EOS may be left out); None for ids.
    """

    def __init__(self, space: TokenSpace, alphabet: Sequence[str] | None) -> None:
        self.names = None if alphabet is None else with_eos(space, alphabet)
        self.places: dict[str, int | None] = {}
        for token, name in enumerate(self.names or ()):
            # None: the symbol of several.
            self.places[name] = None if name in self.places else token
        self.places.pop("", None)
        self.characters = all(len(name) == 1 for name in self.places)
        self.spaced = any(c.isspace() for name in self.places for c in name)

    @property
    def reads_white_space(self) -> bool:
        """Whether white space between symbols counts."""
        return self.names is not None and (self.characters or self.spaced)

    def read(self, text: str) -> list[int]:
        """Token ids.

        Raises:
            ValueError: what is no token, or can be read in several ways.
        """
        if self.names is None:
            return [_id(word) for word in text.split()]
        if self.characters:
            return [self._token(character) for character in text]
        return self._segment(text) if self.spaced else [self._token(w) for w in text.split()]

    def _token(self, symbol: str) -> int:
        if symbol not in self.places:
            raise ValueError(f"{symbol!r} is not in the alphabet")
        token = self.places[symbol]
        if token is None:
            raise ValueError(f"{symbol!r} is the text of several tokens: give ids")
        return token

    def _segment(self, text: str) -> list[int]:
        """The one way to read a text as symbols."""
        longest = max(map(len, self.places), default=0)
        ways, last = [1] + [0] * len(text), [""] * (len(text) + 1)
        for end in range(1, len(text) + 1):
            for start in range(max(0, end - longest), end):
                if ways[start] and text[start:end] in self.places:
                    # Two stand for any larger number.
                    ways[end] = min(2, ways[end] + ways[start])
                    last[end] = text[start:end]
        if ways[-1] != 1:
            how = "cannot be read as" if ways[-1] == 0 else "is more than one sequence of"
            raise ValueError(f"{text!r} {how} symbols of the alphabet: give ids")
        found, end = [], len(text)
        while end:
            found.append(self._token(last[end]))
            end -= len(last[end])
        return found[::-1]


def _id(word: str) -> int:
    try:
        token = parse_whole(word)
    except ValueError:
        token = -1
    if token < 0:
        shown = repr(word) if len(word) <= 40 else f"{word[:36]!r} ..."
        raise ValueError(f"{shown} is no token id")
    return token
