"""Patterns over token ids: every id becomes one character."""

from __future__ import annotations

import re

FIRST = 0xF0000
"""of two private planes, where no text of a user's is"""
MOST = 0x10FFFE - FIRST
_VERBATIM = re.compile(r"\\.|\{\d*,?\d*\}", re.DOTALL)
_NUMBER = re.compile(r"\d+")


def decode(vocab_size: int) -> list[str]:
    """The character of every token id.

    Raises:
        ValueError: too many ids.
    """
    if vocab_size > MOST:
        raise ValueError(
            f"patterns over ids are for at most {MOST:,} tokens, here are {vocab_size:,}: give "
            "an alphabet"
        )
    return [chr(FIRST + token) for token in range(vocab_size)]


def encode(pattern: str, vocab_size: int) -> tuple[str, list[int]]:
    """The pattern with ids as characters, and where each of its characters was.

    With ten tokens at most each digit is an id, else each number is; white space is left out.

    Raises:
        ValueError: an id out of range, with its position.
    """
    text, i = "", 0
    places: list[int] = []
    while i < len(pattern):
        if match := _VERBATIM.match(pattern, i):
            part = match.group()
        elif match := _NUMBER.match(pattern, i):
            number = match.group() if vocab_size > 10 else pattern[i]
            if int(number) >= vocab_size:
                raise ValueError(
                    f"the pattern {pattern!r} names token {number} at position {i}, ids are in "
                    f"[0, {vocab_size})"
                )
            text, places, i = text + chr(FIRST + int(number)), [*places, i], i + len(number)
            continue
        else:
            part = pattern[i]
        if not part.isspace():
            text, places = text + part, [*places, *range(i, i + len(part))]
        i += len(part)
    return text, [*places, len(pattern)]
