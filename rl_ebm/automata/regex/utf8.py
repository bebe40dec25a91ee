"""Automata over characters, read byte by byte: UTF-8 whose faults become U+FFFD.

What is no UTF-8 is read as Python's ``bytes.decode("utf-8", "replace")`` and the decoders of
tokenizers read it: each longest beginning of a character that goes wrong is one U+FFFD.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from rl_ebm.automata.regex.charsets import UNICODE

Ints = npt.NDArray[np.int64]
REPLACEMENT = 0xFFFD
CODES: Ints = np.arange(UNICODE)
"""all code points"""


class Utf8:
    """What a byte means after the bytes of an unfinished character.

    A node is what is known of an unfinished character; node 0: nothing is open. Beginnings that end
    in the same kinds of characters whatever follows are one node.

    Args:
        kinds: the kind of every code point.

    Attributes:
        node: the next node, (nodes, 256); -1 where the byte does not fit.
        kind: the kind of the character that a byte completes, (nodes, 256); -1 where it does not.
    """

    def __init__(self, kinds: Ints) -> None:
        # Rows of 64 characters that share all bytes but the last.
        rows, of_row = _unique(kinds.reshape(-1, 64))
        one = 1 + of_row  # nodes with one byte to come
        wide = one.reshape(-1, 64).copy()
        wide[0, :0x20] = -1  # too long a form
        wide[0xD, 0x20:] = -1  # surrogates
        pairs, of_pair = _unique(wide)
        two = 1 + len(rows) + of_pair
        widest = np.full((5, 64), -1, dtype=np.int64)
        widest.reshape(-1)[: len(two)] = two
        widest[0, :0x10] = -1
        three = 1 + len(rows) + len(pairs) + np.arange(5)
        count = 1 + len(rows) + len(pairs) + 5
        self.node = np.full((count, 256), -1, dtype=np.int64)
        self.kind = np.full((count, 256), -1, dtype=np.int64)
        self.kind[0, :0x80] = kinds[:0x80]
        self.node[0, :0x80] = 0
        self.node[0, 0xC2:0xE0] = one[2:0x20]
        self.node[0, 0xE0:0xF0] = two[:0x10]
        self.node[0, 0xF0:0xF5] = three
        self.kind[1 : 1 + len(rows), 0x80:0xC0] = rows
        self.node[1 : 1 + len(rows), 0x80:0xC0] = 0
        self.node[1 + len(rows) : 1 + len(rows) + len(pairs), 0x80:0xC0] = pairs
        self.node[three, 0x80:0xC0] = widest
        self.bad = int(kinds[REPLACEMENT])

    @property
    def num_nodes(self) -> int:
        return len(self.node)

    @cached_property
    def again(self) -> Ints:
        """Node after a byte that is read as the first of a character; 0 where it cannot be."""
        return np.where(self.node[0] < 0, 0, self.node[0])

    def step(self, table: Ints, states: Ints, byte: Ints) -> Ints:
        """States ``q * nodes + node`` after one more byte each.

        Args:
            table: of the automaton over kinds, (K, kinds).
        """
        q, n = np.divmod(states, self.num_nodes)
        node, kind = self.node[n, byte], self.kind[n, byte]
        fits = node >= 0
        # What was open is a fault, and so is a byte that cannot begin a character.
        fault = table[q, self.bad]
        q_again = np.where(n == 0, q, fault)
        first = self.kind[0, byte]
        lost = (self.node[0, byte] < 0) | (first >= 0)
        q_again = np.where(lost, table[q_again, np.where(first >= 0, first, self.bad)], q_again)
        q_fits = np.where(kind >= 0, table[q, np.maximum(kind, 0)], q)
        q = np.where(fits, q_fits, q_again)
        node = np.where(fits, node, self.again[byte])
        return q * self.num_nodes + node

    def finish(self, table: Ints, states: Ints) -> Ints:
        """The automaton's states where the text ends: what is open is a fault."""
        q, n = np.divmod(states, self.num_nodes)
        return np.where(n == 0, q, table[q, self.bad])


def _unique(rows: Ints) -> tuple[Ints, Ints]:
    """The different rows of a table, and which of them each row is."""
    known: dict[bytes, int] = {}
    # Few differ, and none need be sorted.
    which = [known.setdefault(row.tobytes(), len(known)) for row in rows]
    found = np.frombuffer(b"".join(known), dtype=rows.dtype).reshape(-1, rows.shape[1])
    return found, np.array(which)
