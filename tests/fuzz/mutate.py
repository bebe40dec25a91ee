"""Values that go wrong, and ways to spoil a text."""

from __future__ import annotations

import random
import re

NUMBERS = (
    "0", "-1", "1", "2", "7", "-0", "+1", "01", "1.5", "1e3", "-2.5", "nan", "-nan", "inf",
    "-inf",
    "Infinity", "1e400", "-1e400", "1e308", "-1e308", "1e-400", "5e-324", "9" * 30,
    "-" + "9" * 30,
    "2147483647", "2147483648", "4294967295", "9223372036854775807", "9223372036854775808",
    "18446744073709551616", "0x10", "1_000", "1,5", "1e", "--1", "+", "-", "1/2", "½", "²", "٣",
    "１",
    "None", "true", "0b1", "1j", "9" * 5000,
)  # fmt: skip
TEXTS = (
    "", " ", "\t", "\n", "\r", "\r\n", "\0", "\v", "\x1b[31m", "\x85", "\u2028", "\ufeff",
    "\xa0",
    "\u202e", "é", "e\u0301", "ß", "Ġ", "😀", "👩‍👩‍👧", "\U0010ffff", "\ufffd", '"', '""', "'",
    "\\", "\\\\", "/",
    "..", "%s", "%", "{}", "{0}", "$HOME", "`", ";", "#", "*", "+", "|", "(", ")", "[", "]",
    "{", "}",
    "^", "$", "?", "&", "=", ":", ",", "~", "a" * 5000, "(" * 300, "[" * 300, "<|endoftext|>",
    "None",
)  # fmt: skip
NUMBER = re.compile(r"\d+(\.\d+)?")


def spoil(rng: random.Random, text: str, times: int) -> str:
    """A text with so many small or large faults."""
    for _ in range(times):
        text = rng.choice(_WAYS)(rng, text)
    return text


def _span(rng: random.Random, text: str) -> tuple[int, int]:
    start = rng.randrange(len(text) + 1)
    return start, min(len(text), start + rng.choice((0, 1, 1, 1, 2, 3, 8)))


def _delete(rng: random.Random, text: str) -> str:
    a, b = _span(rng, text)
    return text[:a] + text[b:]


def _duplicate(rng: random.Random, text: str) -> str:
    a, b = _span(rng, text)
    return text[:b] + text[a:b] * rng.choice((1, 1, 2, 50)) + text[b:]


def _insert(rng: random.Random, text: str) -> str:
    a, _ = _span(rng, text)
    return text[:a] + rng.choice(TEXTS) + text[a:]


def _replace(rng: random.Random, text: str) -> str:
    a, b = _span(rng, text)
    return text[:a] + rng.choice(TEXTS) + text[b:]


def _swap(rng: random.Random, text: str) -> str:
    a, b = sorted((_span(rng, text)[0], _span(rng, text)[0]))
    return text[:a] + text[b:] + text[a:b]


def _number(rng: random.Random, text: str) -> str:
    found = list(NUMBER.finditer(text))
    if not found:
        return text + rng.choice(NUMBERS)
    match = rng.choice(found)
    return text[: match.start()] + rng.choice(NUMBERS) + text[match.end() :]


def _blank(rng: random.Random, text: str) -> str:
    a, _ = _span(rng, text)
    return text[:a] + rng.choice((" ", "  ", "\t", "\n", "\xa0")) + text[a:]


def _case(rng: random.Random, text: str) -> str:
    a, b = _span(rng, text)
    return text[:a] + text[a:b].swapcase() + text[b:]


def _cut(rng: random.Random, text: str) -> str:
    return text[: _span(rng, text)[0]]


_WAYS = (
    _delete, _duplicate, _insert, _replace, _swap, _number, _number, _number, _blank, _case, _cut
)  # fmt: skip


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
    """Data of which some bytes are flipped, cut off, doubled, or replaced."""
    way, at = rng.randrange(6), rng.randrange(len(data) + 1)
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    if way == 2:
        return data[:at] + data[at + rng.randrange(1, 64) :]
    if way == 3:
        return rng.choice((b"", b"\0" * 64, b"\xff" * 64, b"PK\x03\x04", b"{}", rng.randbytes(200)))
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if data else 0):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)
