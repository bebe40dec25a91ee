"""Automata by their matrices, against products of matrices."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from automaton_cases import lse, random_law, random_machine

import rl_ebm
from rl_ebm.automata import hidden, matrices, row_sums, store
from rl_ebm.policies import AutomatonPolicy
from rl_ebm.rewards import Automaton

SPACES = [rl_ebm.TokenSpace(3, 4), rl_ebm.TokenSpace(3, 4, eos_id=1), rl_ebm.TokenSpace(3, 1)]


def tables(seed, a, s, zeros):
    g = torch.Generator().manual_seed(seed)
    initial, weight, end = (torch.randn(n, generator=g).double() for n in ((s,), (a, s, s), (s,)))
    for x in (initial, weight, end):
        x[torch.rand(x.shape, generator=g) < zeros] = -math.inf
    return initial, weight, end


def by_matrices(tokens, initial, weight, end):
    x = initial.exp()
    for token in tokens:
        x = x @ weight[token].exp()
    total = float(x @ end.exp())
    return math.log(total) if total > 0 else -math.inf


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("s", [1, 2, 4])
def test_products_of_matrices(space, zeros, s):
    for seed in range(5):
        initial, weight, end = tables(seed, 3, s, zeros)
        reward = Automaton.weighted(space, initial, weight, end)
        tokens, lengths = space.sequences()
        ids = torch.zeros_like(lengths)
        want = [
            by_matrices(y[:n], initial, weight, end)
            for y, n in zip(tokens.tolist(), lengths.tolist(), strict=True)
        ]
        assert reward(tokens, lengths, ids).tolist() == pytest.approx(want, abs=1e-12)
        log_z = lse(want)
        if log_z == -math.inf:
            continue
        found = rl_ebm.solve(rl_ebm.EBM(space, reward))
        assert found.mode == "exact-automaton"
        assert float(found.log_z) == pytest.approx(log_z, abs=1e-10)
        got = found.log_prob(tokens, lengths)
        assert got.tolist() == pytest.approx([x - log_z for x in want], abs=1e-10)
        assert bool(torch.isfinite(found.log_prob(*_rows(found.sample(50)))).all())


def _rows(batch):
    return batch.tokens, batch.lengths


def test_with_a_reference_and_in_a_sum():
    space = SPACES[1]
    law = random_law(torch.Generator().manual_seed(0), 3, 2, 2, 1, 0.2)
    reference = AutomatonPolicy(space, law)
    initial, weight, end = tables(7, 3, 3, 0.2)
    reward = Automaton.weighted(space, initial, weight, end) + Automaton.counts(space, [2, 2], 0.7)
    ebm = rl_ebm.EBM(space, reward, reference=reference)
    tokens, lengths = space.sequences()
    log_ref = ebm.log_ref(tokens, lengths, torch.zeros_like(lengths)).sum(1).tolist()
    want = []
    for y, n, ref in zip(tokens.tolist(), lengths.tolist(), log_ref, strict=True):
        y = y[:n]
        pairs = sum(a == b == 2 for a, b in itertools.pairwise(y))
        want.append(by_matrices(y, initial, weight, end) + 0.7 * pairs + ref)
    found = rl_ebm.solve(ebm)
    assert float(found.log_z) == pytest.approx(lse(want), abs=1e-10)
    report = rl_ebm.verify(found, found)
    assert report.kl_target_policy == pytest.approx(0.0, abs=1e-12)
    assert report.bellman_residual_max == pytest.approx(0.0, abs=1e-9)


def test_the_form_is_chosen():
    space = SPACES[0]
    # Each token leads from each state to one other: no hidden part, and any beta.
    weight = torch.full((3, 4, 4), -math.inf).double()
    for a in range(3):
        for i in range(4):
            weight[a, i, (i + a) % 4] = 0.1 * a + i
    initial = torch.tensor([-math.inf, 0.4, -math.inf, -math.inf]).double()
    reward = Automaton.weighted(space, initial, weight)
    assert reward.machine.num_hidden == 1
    assert rl_ebm.solve(rl_ebm.EBM(space, reward, 0.3)).mode == "exact-automaton"
    # One token more that may lead elsewhere: only the pairs that are joined count.
    weight[0, 0, 3] = 0.0
    reward = Automaton.weighted(space, initial, weight)
    assert reward.machine.num_hidden == int((~torch.isneginf(weight)).any(0).sum()) < 16
    # And without a weight for the end it is 0.
    tokens, lengths = space.sequences()
    got = reward(tokens, lengths, torch.zeros_like(lengths)).tolist()
    end = torch.zeros(4).double()
    assert got == pytest.approx([by_matrices(y, initial, weight, end) for y in tokens.tolist()])


def test_wrong_tables(monkeypatch):
    space = SPACES[0]
    initial, weight, end = tables(0, 3, 2, 0.0)
    with pytest.raises(ValueError, match=r"log_weight has shape \(2, 2, 2\), expected \(3, 2, 2\)"):
        Automaton.weighted(space, initial, weight[:2], end)
    with pytest.raises(ValueError, match="log_end has shape"):
        Automaton.weighted(space, initial, weight, end[:1])
    with pytest.raises(ValueError, match=r"NaN or \+inf|nan"):
        Automaton.weighted(space, initial, weight * math.nan, end)
    monkeypatch.setattr(matrices, "MAX_PAIRS", 3)
    with pytest.raises(ValueError, match="join 4 pairs of states, at most 3"):
        Automaton.weighted(space, initial, weight, end)


def test_an_older_file_has_no_weight_of_the_end():
    machine = Automaton.weighted(SPACES[0], *tables(1, 3, 2, 0.0)).machine
    tensors = store.to_tensors(machine, "reward")
    assert torch.equal(store.from_tensors(tensors, "reward").log_end, machine.log_end)
    del tensors["reward.log_end"]
    assert torch.equal(store.from_tensors(tensors, "reward").log_end, torch.zeros(4).double())


def test_a_policy_has_no_weight_of_the_end():
    law = random_law(torch.Generator().manual_seed(0), 3, 1, 2, 1, 0.0)
    with pytest.raises(ValueError, match="final weights of a policy must be 0"):
        AutomatonPolicy(SPACES[0], replace(law, log_end=law.log_end - 1.0))


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_sum_of_two(space):
    parts = [tables(seed, 3, s, 0.1) for seed, s in ((3, 2), (4, 3))]
    reward = sum(Automaton.weighted(space, *part) for part in parts)
    tokens, lengths = space.sequences()
    want = [
        sum(by_matrices(y[:n], *part) for part in parts)
        for y, n in zip(tokens.tolist(), lengths.tolist(), strict=True)
    ]
    assert reward(tokens, lengths, torch.zeros_like(lengths)).tolist() == pytest.approx(want)
    assert float(rl_ebm.solve(rl_ebm.EBM(space, reward)).log_z) == pytest.approx(lse(want))


@pytest.mark.parametrize("s", [1, 2, 4])
def test_tables_without_zeros_forbid_nothing(s):
    initial, weight, end = tables(0, 3, s, 0.0)
    reward = Automaton.weighted(SPACES[1], initial, weight, end)
    assert not reward.forbids
    assert not rl_ebm.solve(rl_ebm.EBM(SPACES[1], reward)).forbids
    end[0] = -math.inf
    assert Automaton.weighted(SPACES[1], initial, weight, end).forbids


@pytest.mark.parametrize("zeros", [0.0, 0.1, 0.3])
def test_what_forbids_nothing_says_so_only_then(zeros):
    space, said = rl_ebm.TokenSpace(2, 4), []
    tokens, lengths = space.sequences()
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        machine = random_machine(g, 2, 1 + seed % 2, 1 + seed % 4, 1, zeros)
        if zeros:  # zeros of the deterministic part are seen at once
            machine = replace(
                machine,
                log_weight=torch.zeros_like(machine.log_weight),
                final=torch.zeros_like(machine.final),
                log_end=torch.zeros_like(machine.log_end),
            )
        reward = Automaton(space, machine)
        some = bool(torch.isneginf(reward(tokens, lengths, torch.zeros_like(lengths))).any())
        assert reward.forbids or not some
        said.append((reward.forbids, some))
    assert (False, False) in said
    if zeros == 0:
        assert set(said) == {(False, False)}
    else:
        assert (True, True) in said


def test_one_pair_of_states():
    space = SPACES[1]
    initial, weight, end = tables(5, 3, 2, 0.0)
    weight[:, 0, 1] = weight[:, 1] = -math.inf
    reward = Automaton.weighted(space, initial, weight, end)
    assert reward.machine.num_hidden == 1
    tokens, lengths = space.sequences()
    want = [
        by_matrices(y[:n], initial, weight, end)
        for y, n in zip(tokens.tolist(), lengths.tolist(), strict=True)
    ]
    assert reward(tokens, lengths, torch.zeros_like(lengths)).tolist() == pytest.approx(want)


def test_a_solution_forbids_what_its_reference_forbids():
    space = SPACES[0]
    reward = Automaton.counts(space, [1])
    for zero, forbids in ((0.0, True), (0.3, False)):
        row = torch.tensor([[zero, 0.6, 0.4 - zero]]).double().log()
        machine = rl_ebm.automata.deterministic(torch.zeros(1, 3).long(), row)
        reference = AutomatonPolicy(space, machine)
        assert reference.forbids == forbids
        assert rl_ebm.solve(rl_ebm.EBM(space, reward, reference=reference)).forbids == forbids


def test_the_sum_of_a_row_has_the_next_states_in_it():
    machine = random_machine(torch.Generator().manual_seed(4), 3, 2, 3, 1, 0.2)
    got = row_sums(machine)
    for k, h in itertools.product(range(2), range(3)):
        weights = [
            float(machine.log_weight[k, a] + machine.log_emission[h, a] + after)
            for a in range(3)
            for after in machine.log_transition[h]
        ]
        assert float(got[k, h]) == pytest.approx(lse(weights))


@pytest.mark.parametrize("part", ["next", "start"])
def test_a_file_names_states_that_there_are(part):
    machine = random_machine(torch.Generator().manual_seed(0), 3, 2, 1, 1, 0.0)
    tensors = store.to_tensors(machine, "x")
    tensors[f"x.{part}"] = torch.full_like(tensors[f"x.{part}"], 1)
    store.from_tensors(tensors, "x")
    tensors[f"x.{part}"] = torch.full_like(tensors[f"x.{part}"], 2)
    with pytest.raises(ValueError, match=rf"{part} names a state that is not in \[0, 2\)"):
        store.from_tensors(tensors, "x")


def test_hidden_starts_tell_prompts_apart():
    g = torch.Generator().manual_seed(0)
    laws = (torch.randn(n, generator=g).double().log_softmax(-1) for n in ((3, 2), (2, 2), (2, 3)))
    machine = hidden(*laws)
    assert machine.num_prompts == 3
    with pytest.raises(ValueError, match="tells 3 prompts apart, there are 2"):
        AutomatonPolicy(SPACES[0], machine, [[0], [1]])
