"""References as the command line writes them: ``uniform``, ``ngram:FILE``, ``hmm:FILE``.

Options follow a question mark: ``ngram:corpus.txt?order=3&smoothing=0.5`` and
``hmm:corpus.txt?states=8&iterations=50&smoothing=0.01&seed=0``. The file has one response a line,
in token ids with spaces between them, or in the symbols of an alphabet, without EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rl_ebm.names import nearest
from rl_ebm.policies import Policy, Uniform, fit_hmm, fit_ngram
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
    if expression == "uniform":
        return Uniform(space)
    kind, colon, rest = expression.partition(":")
    if kind not in OPTIONS or not colon:
        raise ValueError(
            f"reference {expression!r}, position 0: give uniform, ngram:FILE or hmm:FILE"
            f"{nearest(kind, ['uniform', *OPTIONS])}"
        )
    name, _, asked = rest.partition("?")
    options = dict(OPTIONS[kind])
    at = len(kind) + 1 + len(name) + 1
    for pair in asked.split("&") if asked else []:
        key, equals, value = pair.partition("=")
        if key not in options or not equals:
            raise _fault(expression, at, f"there is no option {key!r}{nearest(key, options)}")
        try:
            options[key] = int(value) if key in _WHOLE else float(value)
        except ValueError:
            raise _fault(expression, at + len(key) + 1, f"{value!r} is no number") from None
        if key == "seed" and not 0 <= options[key] < 2**63:
            raise _fault(expression, at + len(key) + 1, "seed must be in [0, 2**63)")
        at += len(pair) + 1
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


def _fault(expression: str, position: int, what: str) -> ValueError:
    return ValueError(f"reference {expression!r}, position {position}: {what}")


def read_responses(path: Path, space: TokenSpace, alphabet: Sequence[str] | None) -> Batch:
    """Responses of a text file, one a line; EOS is added where there is one.

    Raises:
        ValueError: no such file, no response in it, or a line that is none, with its number.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    places = None if alphabet is None else {symbol: i for i, symbol in enumerate(alphabet)}
    rows = []
    for number, line in enumerate(lines, 1):
        words = line.split() if places is None or any(len(s) > 1 for s in places) else line.strip()
        row = []
        for word in words:
            token = places.get(word) if places is not None else _id(word)
            if token is None or not 0 <= token < space.vocab_size or token == space.eos_id:
                raise ValueError(f"{path}, line {number}: {word!r} is no token of a response")
            row.append(token)
        if space.eos_id is not None:
            row.append(space.eos_id)
        elif not row:
            continue
        fits = len(row) <= space.max_length if space.eos_id is not None else (
            len(row) == space.max_length
        )  # fmt: skip
        if not fits:
            limit = "exactly" if space.eos_id is None else "at most"
            raise ValueError(
                f"{path}, line {number}: a response of {len(row)} tokens (with EOS), and here one "
                f"has {limit} {space.max_length}"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no response")
    lengths = torch.tensor([len(row) for row in rows])
    padded = [row + [0] * (space.max_length - len(row)) for row in rows]
    return Batch(torch.tensor(padded), lengths, torch.zeros_like(lengths))


def _id(word: str) -> int | None:
    return int(word) if word.isdecimal() else None
