"""Weighted automata in log space: their products, and sums of exponentials."""

from rl_ebm.automata import chains, counters, distances, phrases
from rl_ebm.automata.logspace import Columns, in_one, log_matmul, segment_logsumexp
from rl_ebm.automata.machine import Machine, Reading, check_machine, deterministic, hidden
from rl_ebm.automata.matrices import weighted
from rl_ebm.automata.products import Product, minimise, product, row_sums
from rl_ebm.automata.regex import patterns
from rl_ebm.automata.store import from_tensors, to_tensors
from rl_ebm.automata.windows import MAX_TABLE, check_size, check_window, window

__all__ = [
    "MAX_TABLE",
    "Columns",
    "Machine",
    "Product",
    "Reading",
    "chains",
    "check_machine",
    "check_size",
    "check_window",
    "counters",
    "deterministic",
    "distances",
    "from_tensors",
    "hidden",
    "in_one",
    "log_matmul",
    "minimise",
    "patterns",
    "phrases",
    "product",
    "row_sums",
    "segment_logsumexp",
    "to_tensors",
    "weighted",
    "window",
]
