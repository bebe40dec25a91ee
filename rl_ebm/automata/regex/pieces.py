"""The text of a tokenizer's tokens: byte-level pieces, SentencePiece's, and others that add up.

A token's piece is no text: byte-level tokenizers write a blank as ``Ġ`` and split characters
into bytes, SentencePiece writes it as ``▁`` and drops it where a text begins, so that decoding
tokens one at a time loses it. What is found here is held against the tokenizer's ``decode``.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rl_ebm.messages.arguments import flag

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_TRIALS = 200
"""sequences that are decoded to check"""


@dataclass(frozen=True)
class Pieces:
    """How a tokenizer's text is put together.

    Attributes:
        texts: the text of every token where others stand before it; where that is no whole
            character, its bytes as ``surrogateescape`` writes them.
        first: the text of every token that begins a text.
        strips: whether a blank that begins a text is dropped.
        skipped: tokens that ``decode`` leaves out: the special ones.
        runs: tokens of one byte, whose runs are UTF-8 as a whole, or as many faults as they have
            bytes; none where all of a text is read as bytes.
    """

    texts: list[str]
    first: list[str]
    strips: bool
    skipped: frozenset[int]
    runs: dict[int, int]

    def text(self, tokens: Sequence[int]) -> str:
        """What the tokens say together."""
        real = [token for token in tokens if token not in self.skipped]
        if not self.runs:
            parts = [self.texts[token] for token in real]
            parts[:1] = [self.first[token] for token in real[:1]]
            raw = "".join(parts).encode("utf-8", "surrogateescape")
            text = raw.decode("utf-8", "replace")
        else:
            text = "".join(self._in_runs(real))
        return text.removeprefix(" ") if self.strips else text

    def _in_runs(self, tokens: Sequence[int]) -> Iterator[str]:
        run: list[int] = []
        for i, token in enumerate([*tokens, -1]):
            if token in self.runs:
                run.append(self.runs[token])
                continue
            try:
                yield bytes(run).decode()
            except UnicodeDecodeError:
                yield "\ufffd" * len(run)
            run = []
            if token >= 0:
                yield (self.texts if i else self.first)[token]


def alphabet_of(tokenizer: Any, skip_special_tokens: bool = True) -> list[str]:
    """The text of every token of a tokenizer, as it stands behind others: ``(len(tokenizer),)``.

    ``Ġ`` and ``▁`` are blanks here, and so on; special tokens are empty, as TRL decodes them.
    Where a token is a part of a character, its bytes are written as ``surrogateescape`` writes
    them, and a pattern over such an alphabet reads them as UTF-8. It does not know of the blank
    that SentencePiece drops where a text begins: ``Automaton.regex(..., tokenizer=)`` does.

    Args:
        tokenizer: of transformers, or of tokenizers.
        skip_special_tokens: whether special tokens are empty; False for their names.

    Raises:
        TypeError: no tokenizer, or a flag that is neither True nor False.
        ValueError: one whose text is not that of its tokens one after the other.
    """
    return pieces_of(tokenizer, skip_special_tokens).texts


def pieces_of(tokenizer: Any, skip_special_tokens: bool = True) -> Pieces:
    """See :func:`alphabet_of`."""
    decoder = _Decoder(tokenizer, skip_special_tokens)
    found = _by_bytes(decoder) if "ByteLevel" in decoder.kinds else _by_decoding(decoder)
    _check(decoder, found)
    return found


class _Decoder:
    """What is asked of a tokenizer."""

    def __init__(self, tokenizer: Any, skip: bool) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not callable(getattr(tokenizer, "decode", None)) or not (
            hasattr(backend, "to_str") or hasattr(tokenizer, "convert_ids_to_tokens")
        ):
            raise TypeError(
                "tokenizer must be one of transformers or tokenizers, got "
                f"{type(tokenizer).__name__}"
            )
        flag("skip_special_tokens", skip)
        self.tokenizer, self.skip = tokenizer, skip
        state: dict[str, Any] = json.loads(backend.to_str()) if hasattr(backend, "to_str") else {}
        self.kinds = set(_types(state.get("decoder")))
        if hasattr(tokenizer, "byte_decoder"):  # a byte-level one written in Python
            self.kinds.add("ByteLevel")
        named = hasattr(tokenizer, "convert_ids_to_tokens")
        self.size = len(tokenizer) if named else tokenizer.get_vocab_size()
        of_id = tokenizer.convert_ids_to_tokens if named else tokenizer.id_to_token
        self.names: list[str] = [of_id(token) or "" for token in range(self.size)]
        special = {x["id"] for x in state.get("added_tokens", []) if x["special"]}
        special |= set(getattr(tokenizer, "all_special_ids", ()))
        # An id without a name is decoded as nothing.
        unnamed = {token for token, name in enumerate(self.names) if not name}
        self.skipped = frozenset(special if skip else ()) | unnamed

    def decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=self.skip)
        return text


def _types(decoder: Any) -> Iterator[str]:
    """The names of a decoder's parts."""
    if decoder is not None:
        yield decoder["type"]
        for part in decoder.get("decoders", ()):
            yield from _types(part)


def _by_bytes(decoder: _Decoder) -> Pieces:
    """Every character of a piece is a byte; added tokens that are not written so are themselves."""
    of_character = _byte_of_character()
    texts = []
    for token, name in enumerate(decoder.names):
        if token in decoder.skipped:
            texts.append("")
            continue
        known = all(c in of_character for c in name)
        raw = bytes(of_character[c] for c in name) if known else name.encode()
        texts.append(raw.decode("utf-8", "surrogateescape"))
    return Pieces(texts, texts, False, decoder.skipped, {})


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """How GPT-2 writes bytes: those that can be printed as they are, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _by_decoding(decoder: _Decoder) -> Pieces:
    """What decoding a token adds to the text of another one."""
    runs = {}
    if "ByteFallback" in decoder.kinds:
        for token, name in enumerate(decoder.names):
            if token not in decoder.skipped and (match := _BYTE_PIECE.fullmatch(name)):
                runs[token] = int(match[1], 16)
    front = _anchor(decoder, runs)
    before = decoder.decode([front])
    texts, first = [], []
    for token in range(decoder.size):
        if token in decoder.skipped:
            text = alone = ""
        elif token in runs:
            text = alone = bytes([runs[token]]).decode("utf-8", "surrogateescape")
        else:
            text = decoder.decode([front, token])
            if not text.startswith(before):
                raise _no_sum(decoder)
            text, alone = text.removeprefix(before), decoder.decode([token])
        texts.append(text)
        first.append(alone)
    blank = next((token for token, byte in runs.items() if byte == 0x20), None)
    strips = any(a != b for a, b in zip(texts, first, strict=True)) and all(
        a.removeprefix(" ") == b for a, b in zip(texts, first, strict=True) if not _is_raw(a)
    )
    if strips and blank is not None:
        strips = decoder.decode([blank]) == ""
    return Pieces(texts, texts if strips else first, strips, decoder.skipped, runs)


def _is_raw(text: str) -> bool:
    return text == " " or any("\udc80" <= c <= "\udcff" for c in text)


def _anchor(decoder: _Decoder, runs: dict[int, int]) -> int:
    """A token of letters, to stand in front of others."""
    for token in range(decoder.size):
        if token in decoder.skipped or token in runs:
            continue
        text = decoder.decode([token])
        if text.isalpha() and text.isascii():
            return token
    raise ValueError("the tokenizer has no token of letters: give the alphabet")


def _check(decoder: _Decoder, pieces: Pieces) -> None:
    """Hold what was found against the tokenizer itself, along drawn sequences."""
    draw = random.Random(0)
    odd = [t for t, (a, b) in enumerate(zip(pieces.texts, pieces.first, strict=True)) if a != b]
    odd += [t for t, a in enumerate(pieces.texts) if a.startswith(" ")][:1000]
    pools = [pool for pool in (range(decoder.size), list(pieces.runs), odd) if len(pool)]
    for _ in range(_TRIALS):
        pool = [draw.choice(pools) for _ in range(draw.randint(1, 6))]
        tokens = [draw.choice(p) for p in pool]
        if decoder.decode(tokens) != pieces.text(tokens):
            raise _no_sum(decoder)


def _no_sum(decoder: _Decoder) -> ValueError:
    if getattr(decoder.tokenizer, "clean_up_tokenization_spaces", False):
        return ValueError(
            "the tokenizer cleans up blanks when it decodes, so that its text is not that of its "
            "tokens one after the other: set tokenizer.clean_up_tokenization_spaces = False"
        )
    return ValueError(
        "the text of this tokenizer is not that of its tokens one after the other (its decoder: "
        f"{', '.join(sorted(decoder.kinds)) or 'none'}): give the alphabet, a text for every token"
    )
