"""What solving is said to take, against the tensors that are alive while it does."""

from __future__ import annotations

import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rl_ebm
from rl_ebm.automata import hidden
from rl_ebm.policies import AutomatonPolicy, Uniform
from rl_ebm.rewards import Automaton
from rl_ebm.verification.along_samples import SAMPLES, samples_at


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations have made, while they are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.enter(x.untyped_storage())
        return out

    def enter(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.leave, key, size)

    def leave(self, key, size):
        self.known.discard(key)
        self.now -= size


def law(h, a):
    g = torch.Generator().manual_seed(0)
    shapes = ((h,), (h, h), (h, a))
    return hidden(*(torch.randn(s, generator=g).double().log_softmax(-1) for s in shapes))


def phrases(space):
    return Automaton.contains(space, [1, 2, 3], 20.0) + Automaton.avoids(space, [5, 5])


def language_model():
    space = rl_ebm.TokenSpace(20_000, 32, 0)
    return rl_ebm.EBM(space, phrases(space), 0.5, Uniform(space))


def hidden_markov():
    space = rl_ebm.TokenSpace(3000, 32, 0)
    return rl_ebm.EBM(space, phrases(space), 1.0, AutomatonPolicy(space, law(32, 3000)))


def long():
    space = rl_ebm.TokenSpace(20, 4096, 0)
    reward = Automaton.contains(space, [1, 2, 3])
    return rl_ebm.EBM(space, reward, 1.0, AutomatonPolicy(space, law(16, 20)))


def dense():
    space = rl_ebm.TokenSpace(300, 16)
    table = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    return rl_ebm.EBM(space, Automaton.ngram(space, table), 0.5)


def bigram():
    space = rl_ebm.TokenSpace(300, 32, 0)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 300, (100, 32), generator=g)
    tokens[:, -1] = 0
    batch = rl_ebm.Batch(tokens, torch.full((100,), 32), torch.zeros(100).long())
    reference = rl_ebm.policies.fit_ngram(space, batch)
    return rl_ebm.EBM(space, Automaton.contains(space, [1, 2, 3]), 1.0, reference)


@pytest.mark.parametrize("make", [language_model, hidden_markov, long, dense, bigram])
def test_the_bytes_are_those_that_are_taken(make):
    ebm = make()
    with pytest.raises(rl_ebm.TooLargeError) as error:
        rl_ebm.solve(ebm, memory=1)
    number, unit = re.search(r"needs up to ([\d.e+]+) (\w+)", str(error.value)).groups()
    said = float(number) * {"KB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    with Alive() as alive:
        solution = rl_ebm.solve(ebm)
    assert solution.mode == "exact-automaton"
    # Not all of the pairs of states that are counted are reached.
    assert alive.peak < said < 2.6 * alive.peak, (alive.peak, said)


def test_verification_while_training_stays_cheap_at_any_length():
    assert samples_at(64) == samples_at(512) == SAMPLES
    for length in (1024, 4096, 2**20):
        assert 8 <= samples_at(length) <= max(8, SAMPLES * (512 / length) ** 2 * 1.3)
