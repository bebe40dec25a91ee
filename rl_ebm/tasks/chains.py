"""Rewards of neighbours: tasks that are solved exactly at sizes that nobody can list."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64

from rl_ebm.policies import AutomatonPolicy, fit_ngram
from rl_ebm.rewards.automaton import Automaton
from rl_ebm.tokens import Batch, TokenSpace

SCALE = 1.5
"""standard deviation of a coupling, reward units"""


def potts(space: TokenSpace, task_seed: int) -> Automaton:
    """R(y) = h[y_1] + sum_t J[y_t, y_(t+1)], h and J of 1.5 N(0, 1), J the same everywhere.

    h is drawn first. In EOS mode the EOS is a token of its response like any other.
    """
    a, t = space.vocab_size, space.max_length
    rng = np.random.default_rng(task_seed)
    first, coupling = (
        SCALE * torch.from_numpy(rng.standard_normal(shape)) for shape in ((a,), (a, a))
    )
    fields = torch.cat([first[None], torch.zeros(t - 1, a, dtype=torch.float64)])
    return Automaton.chain(space, fields, coupling.expand(t - 1, a, a) if t > 1 else None)


PAYS, COSTS = 12.0, 8.0
"""for the phrase that is wanted, and off for the one that is not, reward units"""
LINES = 4096
"""of the text that the reference is fitted to"""


def phrases(space: TokenSpace, task_seed: int) -> Automaton:
    """12 where two tokens stand next to each other, -8 where the text's commonest two do.

    The wanted ones are drawn among those that the text has never or hardly ever.
    """
    counts = _pairs(text(space, task_seed), space)
    unwanted = divmod(int(counts.argmax()), space.vocab_size)
    counts[unwanted] = counts.max() + 1
    rare = (counts.flatten() <= np.quantile(counts[counts >= 0], 0.5)) & (counts.flatten() >= 0)
    chosen = np.random.default_rng(task_seed + 1).choice(np.flatnonzero(rare))
    wanted = divmod(int(chosen), space.vocab_size)
    return Automaton.contains(space, wanted, PAYS) + Automaton.contains(space, unwanted, -COSTS)


def fitted(space: TokenSpace, task_seed: int) -> AutomatonPolicy:
    """The bigrams of :func:`text`."""
    return fit_ngram(space, text(space, task_seed), order=2, smoothing=0.1)


def text(space: TokenSpace, task_seed: int) -> Batch:
    """Responses of a Markov chain with logits 2 N(0, 1), the EOS 3 nats likelier than others."""
    a, rng = space.vocab_size, np.random.default_rng(task_seed)
    logits = 2 * rng.standard_normal((a + 1, a))  # the last row is of the text's start
    if space.eos_id is not None:
        logits[:, space.eos_id] += 3
        logits[a, space.eos_id] = -np.inf
    odds = np.exp(logits - logits.max(1, keepdims=True))
    edges = (odds / odds.sum(1, keepdims=True)).cumsum(1)
    tokens = np.zeros((LINES, space.max_length), dtype=np.int64)
    last = np.full(LINES, a)
    for t in range(space.max_length):
        drawn = (edges[last] < rng.random((LINES, 1))).sum(1)
        tokens[:, t] = last = drawn.clip(max=a - 1)
    found = torch.from_numpy(tokens)
    if space.eos_id is not None:
        found[:, -1] = space.eos_id
    lengths = space.find_lengths(found)
    return Batch(found, lengths, torch.zeros(LINES, dtype=torch.int64))


def _pairs(batch: Batch, space: TokenSpace) -> Float64[np.ndarray, "A A"]:
    """How often two tokens stand next to each other; -1 of those with the EOS."""
    counts = np.zeros((space.vocab_size, space.vocab_size))
    real = batch.mask[:, 1:].numpy()
    first, second = batch.tokens[:, :-1].numpy()[real], batch.tokens[:, 1:].numpy()[real]
    np.add.at(counts, (first, second), 1.0)
    if space.eos_id is not None:
        counts[space.eos_id, :] = counts[:, space.eos_id] = -1.0
    return counts
