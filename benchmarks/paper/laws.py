"""Laws of data over all sequences of a space, as log-probabilities in enumeration order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from rl_ebm import TokenSpace
from rl_ebm.tasks import drawn as scores
from rl_ebm.tasks import planted


def zipf(space: TokenSpace) -> Float64[Tensor, "N"]:
    """p of rank k proportional to 1 / k, ranks in enumeration order: close sequences, close p.

    The exponent and the order are what the paper's curves point to; it states neither.
    """
    return torch.log_softmax(scores.zipf(space), 0)


def permuted_zipf(space: TokenSpace, seed: int) -> Float64[Tensor, "N"]:
    """The same probabilities on sequences in random order: nothing to generalise."""
    order = np.random.default_rng(seed).permutation(space.num_sequences)
    return zipf(space)[torch.from_numpy(order)]


def normal(space: TokenSpace, temperature: float, seed: int) -> Float64[Tensor, "N"]:
    """softmax(z / temperature) with z ~ N(0, I): arXiv 2512.15605, App. C (temperature 0.1)."""
    return torch.log_softmax(scores.peaked(space, seed, temperature), 0)


def lookahead(space: TokenSpace, seed: int, penalty: float = 8.0) -> Float64[Tensor, "N"]:
    """The first token decides what the last may be: a random set, of 1 to A - 1 tokens.

    All else is uniform; the last tokens that it rules out lose ``penalty`` nats. After the first
    token V depends on it alone.
    """
    return torch.log_softmax(planted.lookahead(space, seed, penalty), 0)


def parity(space: TokenSpace, seed: int, strength: float = 3.0) -> Float64[Tensor, "N"]:
    """R = +-strength by the parity of the sum of tokens that a random map sends to 0 or 1.

    With as many tokens of either bit, V(s) is the same at every prefix of a depth: M has nothing
    to add, and both models must learn a parity, the EBM of T tokens, the ARM of the T - 1 before
    the last.
    """
    bits = np.random.default_rng(seed).permutation(space.vocab_size) % 2
    tokens, _ = space.sequences()
    odd = torch.from_numpy(bits)[tokens].sum(1) % 2
    return torch.log_softmax(strength * (1 - 2 * odd).double(), 0)


def pairwise(space: TokenSpace, seed: int, scale: float = 1.5) -> Float64[Tensor, "N"]:
    """R(y) = sum_t h_t[y_t] + sum_{i<t} J_it[y_i, y_t]: a sum over pairs of tokens.

    An easy R; its q adds V(s), a log-sum-exp over all completions of the whole prefix.
    """
    tokens, _ = space.sequences()
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for t, terms in enumerate(_pairs(space, seed, scale)):
        total += terms.gather(1, tokens[:, t : t + 1])[:, 0]
    return torch.log_softmax(total, 0)


def additive_logits(space: TokenSpace, seed: int, scale: float = 1.5) -> Float64[Tensor, "N"]:
    """An ARM with the terms of :func:`pairwise` as logits: q(s, a) = h_t[a] + sum_i J_it[s_i, a].

    An easy q; its R subtracts V(s), a log-sum-exp of the whole prefix, at every position.
    """
    tokens, _ = space.sequences()
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for t, terms in enumerate(_pairs(space, seed, scale)):
        total += torch.log_softmax(terms, 1).gather(1, tokens[:, t : t + 1])[:, 0]
    return total


def _pairs(space: TokenSpace, seed: int, scale: float) -> Iterator[Float64[Tensor, "N A"]]:
    """At each position t, h_t[a] + sum_{i<t} J_it[y_i, a] for every sequence y and token a."""
    rng = np.random.default_rng(seed)
    tokens, _ = space.sequences()
    a = space.vocab_size
    for t in range(space.max_length):
        terms = torch.from_numpy(scale * rng.standard_normal(a)).expand(len(tokens), -1).clone()
        for i in range(t):
            terms += torch.from_numpy(scale / t**0.5 * rng.standard_normal((a, a)))[tokens[:, i]]
        yield terms
