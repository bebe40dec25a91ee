"""Energy-based models by enumeration: Python loops over every response, in float64.

The ground truth of the tests. It shares no code with ``rl_ebm``: its own order of sequences,
its own log-sum-exp, every quantity by its definition over whole responses.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

INF = math.inf

# (vocab_size, max_length, eos_id): fixed length, EOS first, in the middle, last, small cases.
SPACES = [
    (3, 3, None),
    (2, 4, None),
    (4, 1, None),
    (3, 4, 0),
    (4, 3, 1),
    (3, 4, 2),
    (2, 3, 1),
    (3, 1, 1),
]


def log_sum_exp(values: list[float]) -> float:
    top = max(values, default=-INF)
    if top == -INF:
        return -INF
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def log_softmax(values: list[float]) -> list[float]:
    v = log_sum_exp(values)
    return [-INF if x == -INF else x - v for x in values]


def prefixes(vocab_size: int, depth: int, eos_id: int | None = None) -> list[tuple[int, ...]]:
    """States of one depth, lexicographically."""
    return list(product([a for a in range(vocab_size) if a != eos_id], repeat=depth))


def sequences(vocab_size: int, max_length: int, eos_id: int | None = None) -> list[tuple[int, ...]]:
    """All responses without padding: by length, then lexicographically."""
    if eos_id is None:
        return prefixes(vocab_size, max_length)
    return [(*s, eos_id) for t in range(max_length) for s in prefixes(vocab_size, t, eos_id)]


def padded(
    responses: list[tuple[int, ...]], max_length: int, pad: int = 0
) -> tuple[Tensor, Tensor]:
    """Tokens (n, T) and lengths (n,)."""
    rows = [[*y, *[pad] * (max_length - len(y))] for y in responses]
    return torch.tensor(rows), torch.tensor([len(y) for y in responses])


def random_tables(
    vocab_size: int,
    max_length: int,
    eos_id: int | None = None,
    *,
    seed: int = 0,
    scale: float = 1.0,
    forbid: float = 0.0,
    leading: tuple[int, ...] = (),
) -> list[Tensor]:
    """Per-depth tables of normal numbers, -inf with probability ``forbid``; never zeros."""
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for t in range(max_length):
        shape = (*leading, len(prefixes(vocab_size, t, eos_id)), vocab_size)
        table = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        drop = torch.rand(shape, generator=generator, dtype=torch.float64) < forbid
        tables.append(table.masked_fill(drop, -INF))
    if eos_id is not None:
        tables[-1][..., [a for a in range(vocab_size) if a != eos_id]] = -INF
    return tables


class EnumeratedEBM:
    """p*(y) proportional to exp(sum of r along y): everything about it, the slow way.

    Args:
        r: per-depth tables of one prompt, ``r[t]`` of shape (branching**t, A).
    """

    def __init__(self, r: list[Tensor], eos_id: int | None = None) -> None:
        self.vocab_size, self.max_length, self.eos_id = r[0].shape[-1], len(r), eos_id
        self.states = [prefixes(self.vocab_size, t, eos_id) for t in range(self.max_length)]
        self.r = {
            s: table[i].tolist()
            for table, states in zip(r, self.states, strict=True)
            for i, s in enumerate(states)
        }
        self.sequences = sequences(self.vocab_size, self.max_length, eos_id)
        self.log_weights = [self.weight_after(0, y) for y in self.sequences]
        self.log_z = log_sum_exp(self.log_weights)
        self.log_probs = log_softmax(self.log_weights)

    @staticmethod
    def of_weights(
        log_weights: list[float], vocab_size: int, max_length: int, eos_id: int | None = None
    ) -> EnumeratedEBM:
        """The EBM with one log-weight for each response, all of it paid on the last token."""
        weight = dict(zip(sequences(vocab_size, max_length, eos_id), log_weights, strict=True))
        forced = -INF if eos_id is not None else 0.0
        r = []
        for t in range(max_length):
            other = forced if t == max_length - 1 else 0.0
            states = prefixes(vocab_size, t, eos_id)
            rows = [[weight.get((*s, a), other) for a in range(vocab_size)] for s in states]
            r.append(torch.tensor(rows, dtype=torch.float64))
        return EnumeratedEBM(r, eos_id)

    def weight_after(self, depth: int, y: tuple[int, ...]) -> float:
        """Sum of r over the tokens of y from ``depth`` on."""
        return math.fsum(self.r[y[:t]][y[t]] for t in range(depth, len(y)))

    def completions(self, prefix: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [y for y in self.sequences if y[: len(prefix)] == prefix]

    def q(self, state: tuple[int, ...]) -> list[float]:
        """q*(s, a): log-sum over all completions of s a of what is paid from a on."""
        return [
            log_sum_exp([self.weight_after(len(state), y) for y in self.completions((*state, a))])
            for a in range(self.vocab_size)
        ]

    def value(self, state: tuple[int, ...]) -> float:
        """V*(s): log-sum over all completions of s of what is paid after s."""
        return log_sum_exp([self.weight_after(len(state), y) for y in self.completions(state)])

    def prefix_log_prob(self, prefix: tuple[int, ...]) -> float:
        """log of the probability that a response begins with ``prefix``."""
        return log_sum_exp(
            [self.log_probs[self.sequences.index(y)] for y in self.completions(prefix)]
        )

    def q_tables(self) -> list[Tensor]:
        return [
            torch.tensor([self.q(s) for s in states], dtype=torch.float64) for states in self.states
        ]

    def entropy(self) -> float:
        return entropy(self.log_probs)

    def expectation(self, values: list[float]) -> float:
        """E of one number for each response; impossible responses do not count."""
        return math.fsum(
            math.exp(lp) * x for lp, x in zip(self.log_probs, values, strict=True) if lp > -INF
        )


def sequence_log_probs(log_pi: list[Tensor], eos_id: int | None = None) -> Tensor:
    """(..., N): log pi of every response, token by token; leading dimensions pass through."""
    vocab_size, max_length = log_pi[0].shape[-1], len(log_pi)
    place = [
        {s: i for i, s in enumerate(prefixes(vocab_size, t, eos_id))} for t in range(max_length)
    ]
    return torch.stack(
        [
            sum(log_pi[t][..., place[t][y[:t]], y[t]] for t in range(len(y)))
            for y in sequences(vocab_size, max_length, eos_id)
        ],
        dim=-1,
    )


# Divergences between two lists of log-probabilities ------------------------------------------


def entropy(log_p: list[float]) -> float:
    return -math.fsum(math.exp(a) * a for a in log_p if a > -INF)


def kl(log_p: list[float], log_q: list[float]) -> float:
    terms = [(a, b) for a, b in zip(log_p, log_q, strict=True) if a > -INF]
    if any(b == -INF for _, b in terms):
        return INF
    return math.fsum(math.exp(a) * (a - b) for a, b in terms)


def tv(log_p: list[float], log_q: list[float]) -> float:
    """The most that the two probabilities of one event can differ: sum of p - q where p > q."""
    return math.fsum(max(math.exp(a) - math.exp(b), 0.0) for a, b in zip(log_p, log_q, strict=True))


def js(log_p: list[float], log_q: list[float]) -> float:
    """By entropies: H((p + q) / 2) - (H(p) + H(q)) / 2."""
    log_m = [log_sum_exp([a, b]) - math.log(2) for a, b in zip(log_p, log_q, strict=True)]
    return entropy(log_m) - (entropy(log_p) + entropy(log_q)) / 2
