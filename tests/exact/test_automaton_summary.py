"""Marginals, entropies and the likeliest responses of automata, against listing everything."""

from __future__ import annotations

import math

import pytest
import torch
from automaton_cases import random_case

import rl_ebm
from rl_ebm.automata import deterministic
from rl_ebm.exact import lists, summarise
from rl_ebm.exact.automaton.marginals import find_flow, token_log_marginals
from rl_ebm.exact.automaton.summary import summarise_automaton
from rl_ebm.policies import AutomatonPolicy, Uniform
from rl_ebm.rewards import Automaton


def solvable(seeds):
    for seed in seeds:
        ebm, truth = random_case(seed)
        if all(truth.log_z(p) > -math.inf for p in range(ebm.num_prompts)):
            yield ebm, truth, rl_ebm.solve(ebm)


def test_token_marginals():
    for ebm, truth, solution in solvable(range(60)):
        space = ebm.space
        for p in range(ebm.num_prompts):
            weights = torch.tensor(truth.log_weight[p], dtype=torch.float64)
            probability = (weights - truth.log_z(p)).exp()
            flow = find_flow(solution.values, space, p)
            for t in range(space.max_length):
                want = torch.zeros(space.vocab_size, dtype=torch.float64)
                here = truth.lengths > t
                want.index_add_(0, truth.tokens[here, t], probability[here])
                got = token_log_marginals(solution.values, flow, space, t).exp()
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_figures_and_likeliest_responses():
    known = {"entropy": 0, "expected_reward": 0, "top": 0}
    for ebm, truth, solution in solvable(range(120)):
        for p in range(ebm.num_prompts):
            got = summarise_automaton(solution, 4, p)
            log_p = [w - truth.log_z(p) for w in truth.log_weight[p]]
            reward = ebm.reward(truth.tokens, truth.lengths, torch.full_like(truth.lengths, p))
            possible = [(x, float(r)) for x, r in zip(log_p, reward, strict=True) if x > -math.inf]
            assert got.log_z == pytest.approx(truth.log_z(p))
            assert got.num_sequences == len(log_p)
            if got.entropy is not None:
                known["entropy"] += 1
                want = -math.fsum(math.exp(x) * x for x, _ in possible)
                assert got.entropy == pytest.approx(want, rel=1e-9, abs=1e-9)
            if got.expected_reward is not None:
                known["expected_reward"] += 1
                want = math.fsum(math.exp(x) * r for x, r in possible)
                assert got.expected_reward == pytest.approx(want, rel=1e-9, abs=1e-9)
            if solution.values.machine.num_hidden == 1:
                known["top"] += 1
                best = sorted((math.exp(x) for x, _ in possible), reverse=True)[:4]
                assert [r.probability for r in got.top] == pytest.approx(best, rel=1e-9)
                for r in got.top:
                    tokens = torch.tensor([r.tokens + [0] * (ebm.space.max_length - len(r.tokens))])
                    lengths, ids = torch.tensor([len(r.tokens)]), torch.tensor([p])
                    assert torch.equal(ebm.space.check(tokens, lengths), lengths)
                    log_prob = float(solution.log_prob(tokens, lengths, ids))
                    assert math.exp(log_prob) == pytest.approx(r.probability, rel=1e-9)
                    assert r.score == pytest.approx(float(ebm.reward(tokens, lengths, ids)))
    assert min(known.values()) > 20


def test_what_cannot_be_listed_is_summarised_by_its_automaton():
    space = rl_ebm.TokenSpace(100, 40, eos_id=0)
    reward = Automaton.contains(space, [1, 2, 3], 25.0)
    solution = rl_ebm.solve(rl_ebm.EBM(space, reward, reference=Uniform(space)))
    assert not lists(solution)
    summary = summarise(solution, 3)
    # From samples, whose log-probabilities are exact.
    batch = solution.sample(4000, torch.Generator().manual_seed(0))
    log_p = solution.log_prob(batch.tokens, batch.lengths)
    spread = 4 * float(log_p.std()) / math.sqrt(len(batch))
    assert summary.entropy == pytest.approx(-float(log_p.mean()), abs=spread)
    paid = reward(batch.tokens, batch.lengths, batch.prompt_ids)
    spread = 4 * float(paid.std()) / math.sqrt(len(batch))
    assert summary.expected_reward == pytest.approx(float(paid.mean()), abs=max(spread, 0.01))
    assert summary.top[0].tokens == [1, 2, 3, 0]
    # Thousands of responses are equally good, and sums of their logarithms round differently.
    ties = rl_ebm.EBM(space, Automaton.contains(space, [1], 9.0), 0.3, Uniform(space))
    assert len({r.probability for r in summarise(rl_ebm.solve(ties), 20).top}) <= 20
    h, a = 2, space.vocab_size
    law = rl_ebm.automata.hidden(
        torch.zeros(h).log_softmax(0),
        torch.zeros(h, h).log_softmax(1),
        torch.randn(h, a, generator=torch.Generator().manual_seed(0)).log_softmax(1),
    )
    hidden = rl_ebm.solve(rl_ebm.EBM(space, reward, reference=AutomatonPolicy(space, law)))
    summary = summarise(hidden, 3)
    assert summary.entropy is None
    assert summary.top == []
    batch = hidden.sample(2000, torch.Generator().manual_seed(0))
    mean = float(reward(batch.tokens, batch.lengths, batch.prompt_ids).mean())
    assert summary.expected_reward == pytest.approx(mean, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize("seed", [3, 5, 6, 8])
def test_ties_that_rounding_parts_come_in_enumeration_order(eos, seed):
    g = torch.Generator().manual_seed(seed)
    space = rl_ebm.TokenSpace(4, 3, eos)
    tenths = torch.randint(-9, 1, (3, 4), generator=g)
    reward = Automaton.chain(space, tenths.double() / 10)
    solution = rl_ebm.solve(rl_ebm.EBM(space, reward, 0.3))
    tokens, lengths = space.sequences()
    # Sums of tenths as integers: what ties does so exactly.
    found = [
        (-sum(int(tenths[t, a]) for t, a in enumerate(y[:n])), y[:n])
        for y, n in zip(tokens.tolist(), lengths.tolist(), strict=True)
    ]
    want = [y for _, y in sorted(found)]
    for top in range(1, len(want) + 1):
        assert [r.tokens for r in summarise_automaton(solution, top).top] == want[:top], top


def test_the_likeliest_of_each_prompt_begin_where_its_prompt_does():
    space = rl_ebm.TokenSpace(3, 30)
    weight = torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 3.0]], dtype=torch.float64)
    stay = torch.tensor([[0, 0, 0], [1, 1, 1]])
    machine = deterministic(stay, weight, start=torch.tensor([0, 1]))
    ebm = rl_ebm.EBM(space, Automaton(space, machine), 1.0, prompts=[[0], [1]])
    solution = rl_ebm.solve(ebm)
    assert not lists(solution)
    for prompt, best in enumerate(([1] * 30, [2] * 30)):
        (first,) = summarise(solution, 1, prompt).top
        row = weight[prompt]
        assert first.tokens == best
        share = 30 * float(row.max() - row.logsumexp(0))
        assert first.probability == pytest.approx(math.exp(share), rel=1e-9)
