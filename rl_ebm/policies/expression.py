"""References as the command line writes them: ``uniform``, ``ngram:FILE``, ``hmm:FILE``.

Options follow a question mark: ``ngram:corpus.txt?order=3&smoothing=0.5`` and
``hmm:corpus.txt?states=8&iterations=50&smoothing=0.01&seed=0``. The file has one response a line,
in token ids with spaces between them, or in the symbols of an alphabet, without EOS: see
:func:`read_responses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rl_ebm.automata.symbols import Symbols
from rl_ebm.messages.arguments import has_end, shown
from rl_ebm.messages.numerals import parse_real, parse_whole
from rl_ebm.messages.words import bytes_text, nearest
from rl_ebm.policies.base import Policy
from rl_ebm.policies.hmm import fit_hmm
from rl_ebm.policies.ngram import fit_ngram
from rl_ebm.policies.tabular import Uniform
from rl_ebm.tokens import Batch, TokenSpace

OPTIONS = {
    "ngram": {"order": 2.0, "smoothing": 1.0},
    "hmm": {"states": 8.0, "iterations": 50.0, "smoothing": 0.01, "seed": 0.0},
}
_WHOLE = ("order", "states", "iterations", "seed")


def parse_reference(
    expression: str, space: TokenSpace, alphabet: Sequence[str] | None = None
) -> Policy:
    """The reference of an expression; see the module's docstring.

    Raises:
        ValueError: what cannot be read, with its position in the expression, or a line of the
            file that is no response of the space.
    """
    if not isinstance(expression, str):
        raise TypeError(f"a reference expression is text, got {shown(expression)}")
    if expression == "uniform":
        return Uniform(space)
    kind, colon, rest = expression.partition(":")
    if kind not in OPTIONS or not colon:
        raise ValueError(
            f"reference {shown(expression)}, position 0: give uniform, ngram:FILE or hmm:FILE"
            f"{nearest(kind, ['uniform', *OPTIONS])}"
        )
    name, _, asked = rest.partition("?")
    options = _options(expression, kind, asked, len(kind) + 1 + len(name) + 1)
    responses = read_responses(Path(name), space, alphabet)
    if kind == "ngram":
        return fit_ngram(space, responses, int(options["order"]), options["smoothing"])
    generator = torch.Generator().manual_seed(int(options["seed"]))
    return fit_hmm(
        space,
        responses,
        int(options["states"]),
        int(options["iterations"]),
        options["smoothing"],
        generator,
    )[0]


def _options(expression: str, kind: str, asked: str, at: int) -> dict[str, Any]:
    """The options of a kind, with those that are asked for from a position on."""
    options: dict[str, Any] = dict(OPTIONS[kind])
    given: set[str] = set()
    for pair in asked.split("&") if asked else []:
        key, equals, value = pair.partition("=")
        if key not in options or not equals:
            raise _fault(expression, at, f"there is no option {key!r}{nearest(key, options)}")
        if key in given:
            raise _fault(expression, at, f"{key} is given twice")
        given.add(key)
        try:
            options[key] = parse_whole(value) if key in _WHOLE else parse_real(value)
        except ValueError as error:
            raise _fault(expression, at + len(key) + 1, str(error)) from None
        if key == "seed" and not 0 <= options[key] < 2**63:
            raise _fault(expression, at + len(key) + 1, "seed must be in [0, 2**63)")
        at += len(pair) + 1
    return options


def _fault(expression: str, position: int, what: str) -> ValueError:
    return ValueError(f"reference {shown(expression)}, position {position}: {what}")


MAX_BYTES = 2**28
"""of a file of responses; a device has no end"""


def read_responses(path: Path, space: TokenSpace, alphabet: Sequence[str] | None) -> Batch:
    """Responses of a text file, one a line; EOS is added where there is one.

    A line loses its end alone: white space is a symbol where the alphabet has characters. A line
    without symbols is the empty response in EOS mode; at the end of the file it is none.

    Raises:
        ValueError: no such file, a device, no response in it, or a line that is none, with its
            number.
    """
    has_end(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {bytes_text(MAX_BYTES)}")
        lines = data.decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    symbols, eos = Symbols(space, alphabet), space.eos_id
    rows = []
    for number, line in enumerate(lines, 1):
        row = _tokens(symbols, line.removesuffix("\r"), space, f"{path}, line {number}")
        rows.append((number, row if eos is None else [*row, eos]))
    while rows and rows[-1][1] in ([], [eos]):
        rows.pop()
    found = [(number, row) for number, row in rows if row]
    for number, row in found:
        if len(row) > space.max_length or (eos is None and len(row) < space.max_length):
            limit = "exactly" if eos is None else "at most"
            raise ValueError(
                f"{path}, line {number}: a response of {len(row)} tokens (with EOS), and here one "
                f"has {limit} {space.max_length}"
            )
    if not found:
        raise ValueError(f"{path} holds no response")
    lengths = torch.tensor([len(row) for _, row in found])
    padded = torch.zeros(len(found), space.max_length, dtype=torch.int64)
    for i, (_, row) in enumerate(found):
        padded[i, : len(row)] = torch.tensor(row)
    return Batch(padded, lengths, torch.zeros_like(lengths))


def _tokens(symbols: Symbols, line: str, space: TokenSpace, where: str) -> list[int]:
    """Ids of a line, none of them EOS."""
    try:
        row = symbols.read(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    wrong = [token for token in row if token >= space.vocab_size or token == space.eos_id]
    if wrong:
        shown = wrong[0] if symbols.names is None else symbols.names[wrong[0]]
        raise ValueError(f"{where}: {str(shown)!r} is no token of a response")
    return row
