"""What a hostile user gives automata: ties, infinities, other spaces, machines of their own."""

from __future__ import annotations

import itertools
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from automaton_cases import lse, random_law, weight_of

import rl_ebm
from rl_ebm.agents import ExactAgent
from rl_ebm.automata import deterministic, hidden, log_matmul, minimise, product, row_sums
from rl_ebm.automata.regex import nfa
from rl_ebm.exact.automaton.sampling import _pick
from rl_ebm.exact.automaton.summary import summarise_automaton
from rl_ebm.exact.automaton.values import find_edges, q_rows
from rl_ebm.policies import AutomatonPolicy, Uniform, fit_hmm
from rl_ebm.policies.hmm import _normalised
from rl_ebm.rewards import Automaton
from rl_ebm.studies.problems import problems
from rl_ebm.training.directory import describe_ebm, rebuild_ebm, write_config

SPACE = rl_ebm.TokenSpace(3, 4)


def law_of(*rows, **others):
    weights = torch.tensor(rows, dtype=torch.float64).log()
    return deterministic(torch.zeros(weights.shape).long(), weights, **others)


def rewards(reward, space, prompt=0):
    tokens, lengths = space.sequences()
    return reward(tokens, lengths, torch.full_like(lengths, prompt)).tolist()


@pytest.mark.parametrize("eos", [None, 0])
def test_responses_that_tie_do_not_widen_the_search(eos):
    # All of 3^200 responses but those with the phrase are as likely: sums differ by rounding.
    space = rl_ebm.TokenSpace(3, 200, eos)
    reward = Automaton.avoids(space, [1, 2])
    law = deterministic(torch.zeros(1, 3).long(), torch.tensor([[0.1, 0.45, 0.45]]).double().log())
    ebm = rl_ebm.EBM(space, reward, reference=AutomatonPolicy(space, law))
    solution = rl_ebm.solve(ebm)
    top = summarise_automaton(solution, 5).top
    if eos is None:
        # No 1 before a 2, and a 0 costs: 2 ... 2 1 ... 1, in enumeration order.
        assert [r.tokens for r in top] == [[2] * i + [1] * (200 - i) for i in range(5)]
    else:
        assert [r.tokens for r in top[:1]] == [[0]]
        assert top[0].probability == pytest.approx(0.1 / math.exp(float(solution.log_z)))


@pytest.mark.parametrize(("score", "beta"), [(1e10, 1e-300), (1e308, 1e-3)])
def test_rewards_beyond_floats_are_refused(score, beta):
    ebm = rl_ebm.EBM(SPACE, Automaton.counts(SPACE, [1], score), beta)
    with pytest.raises(ValueError, match="too large"):
        rl_ebm.solve(ebm)


@pytest.mark.parametrize("score", [1e4, 1e6, -1e6])
def test_huge_rewards(score):
    ebm = rl_ebm.EBM(SPACE, Automaton.counts(SPACE, [1, 1], score), 1e-3)
    weights = [
        score / 1e-3 * sum(pair == (1, 1) for pair in itertools.pairwise(y))
        for y in itertools.product(range(3), repeat=4)
    ]
    assert float(rl_ebm.solve(ebm).log_z) == pytest.approx(lse(weights), rel=1e-12)


@pytest.mark.parametrize(
    "other", [rl_ebm.TokenSpace(3, 3), rl_ebm.TokenSpace(3, 5), rl_ebm.TokenSpace(3, 4, eos_id=0)]
)
def test_policies_for_other_spaces_are_refused(other):
    reward = Automaton.counts(SPACE, [1])
    for policy in (AutomatonPolicy(other, law_of([0.2, 0.3, 0.5])), Uniform(other)):
        with pytest.raises(ValueError, match="the reference is for TokenSpace"):
            rl_ebm.EBM(SPACE, reward, reference=policy)
        with pytest.raises(ValueError, match="the policy is for TokenSpace"):
            rl_ebm.verify(policy, rl_ebm.solve(rl_ebm.EBM(SPACE, reward)), samples=5)


def test_laws_that_are_none_are_refused():
    with pytest.raises(ValueError, match="final"):
        AutomatonPolicy(SPACE, law_of([0.2, 0.3, 0.5], final=torch.tensor([2.0])))
    half = torch.full((2, 2), 0.25).double().log()
    twice = torch.full((2, 3), 2 / 3).double().log()
    with pytest.raises(ValueError, match="sum to 1"):
        AutomatonPolicy(SPACE, hidden(torch.zeros(2).double().log_softmax(0), half, twice))
    with pytest.raises(ValueError, match="sum to 1"):
        AutomatonPolicy(SPACE, hidden(torch.zeros(2).double(), half * 0.5, twice - math.log(2)))


@pytest.mark.parametrize("part", ["log_weight", "final"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_no_reward_has_are_refused(part, value):
    parts = {"log_weight": torch.zeros(1, 3), "final": torch.zeros(1)}
    parts[part][..., 0] = value
    with pytest.raises(ValueError, match="a weight of the machine is"):
        Automaton(SPACE, deterministic(torch.zeros(1, 3).long(), **parts))


@pytest.mark.parametrize("part", range(4))
def test_hidden_weights_that_no_reward_has_are_refused(part):
    parts = [torch.zeros(shape) for shape in ((2,), (2, 2), (2, 3), (2,))]
    parts[part][..., 0] = math.nan
    with pytest.raises(ValueError, match="a weight of the machine is"):
        Automaton(SPACE, hidden(*parts))


def test_a_reward_may_start_otherwise_for_each_prompt():
    g = torch.Generator().manual_seed(0)
    next_ = torch.randint(3, (3, 3), generator=g)
    weight = torch.randn(3, 3, generator=g, dtype=torch.float64)
    machine = deterministic(next_, weight, start=torch.tensor([1, 0, 2]))
    law = random_law(g, 3, 2, 1, 3, 0.0)
    prompts = [[0], [], [1, 2]]
    reward = Automaton(SPACE, machine)
    policy = AutomatonPolicy(SPACE, law, prompts)
    solution = rl_ebm.solve(rl_ebm.EBM(SPACE, reward, 0.5, policy, prompts))
    for p in range(3):
        want = [weight_of(machine, list(y), p) for y in itertools.product(range(3), repeat=4)]
        assert rewards(reward, SPACE, p) == pytest.approx(want)
        total = [
            2 * x + weight_of(law, list(y), p)
            for x, y in zip(want, itertools.product(range(3), repeat=4), strict=True)
        ]
        assert float(solution.log_z[p]) == pytest.approx(lse(total), rel=1e-12)
    with pytest.raises(ValueError, match="tells 3 prompts apart, there are 1"):
        rl_ebm.EBM(SPACE, reward)


@pytest.mark.parametrize("make", [list, tuple])
def test_numbers_of_any_kind(make):
    space = SPACE
    want = rewards(Automaton.contains(space, [1, 2], 2.0), space)
    for score in (2, np.float64(2), True):
        got = rewards(Automaton.contains(space, make([1, 2]), score), space)
        assert got == [x * score / 2 for x in want]
    parity = [float(sum(y) % 2) for y in itertools.product((0, 1, 1), repeat=4)]
    assert rewards(Automaton.modular(space, make([0.0, 1.0]), make([0, 1, 1])), space) == parity
    asked = torch.tensor([0.0, 1.0], requires_grad=True)
    assert not Automaton.modular(space, asked).machine.final.requires_grad


@pytest.mark.parametrize(
    "pattern", [r"\d+", r"\w{4}", r"\s*", r"\D*", r"[\d]1.\w", r"(\S2)*", "\\d"]
)
def test_a_token_id_is_a_digit(pattern):
    want = [
        float(re.fullmatch(pattern, "".join(map(str, y))) is not None)
        for y in itertools.product(range(3), repeat=4)
    ]
    if not any(want):
        with pytest.raises(ValueError, match="no match has exactly 4 tokens"):
            Automaton.regex(SPACE, pattern)
        return
    assert rewards(Automaton.regex(SPACE, pattern), SPACE) == want
    wide = rl_ebm.TokenSpace(12, 2)
    assert set(rewards(Automaton.regex(wide, r"\d\d"), wide)) == {1.0}


def test_eos_may_be_left_out_whatever_its_id():
    for eos in (0, 2):
        with pytest.raises(ValueError, match=r"\(EOS may be left out\)"):
            Automaton.regex(rl_ebm.TokenSpace(3, 4, eos), "a", 1.0, ["a"])


def test_characters_that_no_set_tells_apart_are_read_once(monkeypatch):
    calls = []
    closure = nfa._NFA.closure
    monkeypatch.setattr(
        nfa._NFA, "closure", lambda self, *around: calls.append(1) or closure(self, *around)
    )
    space = rl_ebm.TokenSpace(5000, 3)
    reward = Automaton.regex(space, ".*17 [5-9].*")
    assert len(calls) < 50
    tokens = torch.tensor([[17, 7, 1], [1, 17, 5], [1, 17, 4], [17, 1, 7]])
    lengths = torch.full((4,), 3)
    assert reward(tokens, lengths, lengths * 0).tolist() == [1, 1, 0, 0]


def test_what_cannot_be_listed_has_no_audit():
    space = rl_ebm.TokenSpace(50, 40, 0)
    solution = rl_ebm.solve(rl_ebm.EBM(space, Automaton.counts(space, [1])))
    with pytest.raises(rl_ebm.exact.TooLargeError, match="sequences are too many to list"):
        problems(solution)


def test_what_cannot_be_listed_is_not_fitted_exactly():
    space = rl_ebm.TokenSpace(12, 12, 0)
    ebm = rl_ebm.EBM(space, Automaton.counts(space, [1]))
    with pytest.raises(ValueError, match="exact lists the logits of all prefixes"):
        ExactAgent(ebm, rl_ebm.policies.Transformer(space), teacher=rl_ebm.solve(ebm))


def test_a_model_is_fitted_to_responses_that_are_all_short():
    space = rl_ebm.TokenSpace(3, 5, 0)
    tokens = torch.tensor([[1, 0, 0, 0, 0], [2, 1, 0, 0, 0]])
    batch = rl_ebm.Batch(tokens, torch.tensor([2, 3]), torch.zeros(2).long())
    policy, likelihood = fit_hmm(space, batch, 2, 3, 0.1, torch.Generator().manual_seed(0))
    want = [weight_of(policy.machine, y, 0) for y in ([1, 0], [2, 1, 0])]
    assert likelihood[-1] == pytest.approx(sum(want) / 2)


def test_a_product_with_nothing_in_common_is_not_done_twice(monkeypatch):
    a = torch.tensor([[0.0, -math.inf], [-math.inf, 1.0], [-400.0, 400.0]]).double()
    b = torch.tensor([[0.5, -math.inf, -1e6], [-math.inf, 2.0, -2e6]]).double()
    want = [[lse([float(x) + float(y) for x, y in zip(r, c, strict=True)]) for c in b.T] for r in a]
    sizes = []
    logsumexp = torch.logsumexp
    monkeypatch.setattr(torch, "logsumexp", lambda x, d: sizes.append(len(x)) or logsumexp(x, d))
    got = log_matmul(a, b)
    monkeypatch.undo()
    assert got.tolist() == want
    # Three sums underflow; the other two that are 0 are so for certain.
    assert sum(sizes) == 3


def test_rows_of_states_with_many_targets(monkeypatch):
    space = rl_ebm.TokenSpace(12, 5, 3)
    g = torch.Generator().manual_seed(0)
    law = random_law(g, 12, 1, 3, 1, 0.2)
    reward = Automaton.ngram(space, torch.randn(12, 12, generator=g))
    ebm = rl_ebm.EBM(space, reward, reference=AutomatonPolicy(space, law))
    solution = rl_ebm.solve(ebm)
    tokens = solution.sample(20, g).tokens
    found = solution.prefixes(tokens, torch.zeros(20).long()).whole
    t = torch.arange(5).repeat(20)
    rows = []
    for limit in (0, 2**13):
        monkeypatch.setattr("rl_ebm.exact.automaton.values._PER_TARGET", limit)
        rows.append(q_rows(solution.values, space, t, found.k, found.log_alpha))
    torch.testing.assert_close(*rows, rtol=1e-12, atol=1e-12)


def test_sums_of_rows_by_blocks(monkeypatch):
    machine = random_law(torch.Generator().manual_seed(0), 4, 5, 1, 1, 0.3)
    weight = machine.log_weight.exp().tolist()
    for block in (1, 2**24):
        monkeypatch.setattr(sys.modules["rl_ebm.automata.products"], "_BLOCK", block)
        got = row_sums(machine)[:, 0].exp().tolist()
        assert got == pytest.approx([math.fsum(row) for row in weight])


def test_what_is_too_large_is_refused(monkeypatch):
    one, two = Automaton.counts(SPACE, [1, 2]), Automaton.counts(SPACE, [2, 1, 1])
    with pytest.raises(rl_ebm.exact.TooLargeError, match="may be used"):
        rl_ebm.solve(rl_ebm.EBM(SPACE, one), memory=10)
    monkeypatch.setattr(sys.modules["rl_ebm.automata.products"], "MAX_STATES", 3)
    with pytest.raises(ValueError, match="more than 3 states"):
        one + two
    monkeypatch.setattr(nfa, "MAX_STATES", 50)
    with pytest.raises(ValueError, match="more than 50 states"):
        Automaton.regex(SPACE, ".*0.{9}")


def test_factors_that_do_not_fit():
    law = deterministic(torch.zeros(1, 3).long(), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="reads 3 tokens, the other 4"):
        product(law, deterministic(torch.zeros(1, 4).long(), torch.zeros(1, 4)))
    starts = [deterministic(law.next, law.log_weight, start=torch.zeros(n).long()) for n in (2, 3)]
    with pytest.raises(ValueError, match="for 2 prompts, the other for 3"):
        product(*starts)


def test_a_final_weight_alone_can_forbid():
    solution = rl_ebm.solve(rl_ebm.EBM(SPACE, Automaton.regex(SPACE, "0*", -math.inf)))
    assert solution.forbids
    assert solution.forbids_responses


def test_a_dot_is_no_new_line():
    alphabet = ["a", "\n", "b\n"]
    want = [
        float(re.fullmatch("a.*", "".join(alphabet[a] for a in y)) is not None)
        for y in itertools.product(range(3), repeat=4)
    ]
    assert rewards(Automaton.regex(SPACE, "a.*", 1.0, alphabet), SPACE) == want


def test_a_state_that_was_never_used_is_uniform():
    counts = torch.tensor([[0.0, 0.0], [1.0, 3.0]]).double()
    assert _normalised(counts).exp().tolist() == [[0.5, 0.5], [0.25, 0.75]]


def test_a_reference_for_prompts_is_rebuilt(tmp_path):
    prompts = [[0], [1]]
    law = random_law(torch.Generator().manual_seed(0), 3, 2, 2, 2, 0.0)
    policy = AutomatonPolicy(SPACE, law, prompts)
    ebm = rl_ebm.EBM(SPACE, Automaton.counts(SPACE, [1]), 0.5, policy, prompts)
    description = describe_ebm(ebm)
    write_config(tmp_path / "run", {"ebm": description}, ebm)
    again = rebuild_ebm(description, tmp_path / "run")
    tokens, lengths = SPACE.sequences()
    for p in range(2):
        ids = torch.full_like(lengths, p)
        want = ebm.log_weight(tokens, lengths, ids)
        assert torch.equal(again.log_weight(tokens, lengths, ids), want)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_a_hidden_reward_at_any_temperature(beta):
    g = torch.Generator().manual_seed(4)
    law = [torch.randn(s, generator=g).double().log_softmax(-1) for s in ((3,), (3, 3), (3, 3))]
    reward = Automaton.hmm(SPACE, *law)
    found = rl_ebm.solve(rl_ebm.EBM(SPACE, reward, beta))
    # A power of a sum over paths is no automaton: it is enumerated.
    assert (found.mode == "exact-automaton") == (beta == 1.0)
    tokens, lengths = SPACE.sequences()
    want = torch.logsumexp(reward(tokens, lengths, torch.zeros_like(lengths)).double() / beta, 0)
    torch.testing.assert_close(found.log_z[0], want)


def test_states_that_differ_in_nothing_that_counts_are_merged():
    # 1 and 2 differ in where a forbidden token leads, and in the sign of a zero.
    next_ = torch.tensor([[1, 2], [3, 0], [3, 3], [3, 3]])
    weight = torch.tensor([[0.0, 1.0], [0.5, -math.inf], [0.5, -math.inf], [-0.0, 0.0]])
    final = torch.tensor([0.0, 0.0, -0.0, 2.0])
    machine = minimise(deterministic(next_, weight.double(), final.double()))
    assert machine.num_states == 3
    two = torch.tensor([[1, 2], [1, 1], [2, 2]])
    zeros = torch.tensor([[1.0, 1.0], [0.0, -0.0], [-0.0, 0.0]]).double()
    assert minimise(deterministic(two, zeros)).num_states == 2


def test_a_draw_at_the_very_end_of_a_segment_stays_in_it(monkeypatch):
    most = 1 - 2.0**-53
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), most, dtype=torch.float64))
    log_weight = torch.tensor([0.0, 0.0, -math.inf, 0.0, 0.0]).double()
    segment, asked = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([1, 2, 0])
    assert _pick(log_weight, segment, 3, asked, None).tolist() == [1, 4, 0]


@pytest.mark.parametrize("eos", [0, 2])
def test_eos_has_no_edge_of_its_own(eos):
    space = rl_ebm.TokenSpace(3, 6, eos)
    # EOS leads where no other token does.
    next_ = torch.tensor([[0, 0, 0], [1, 1, 1]])
    next_[0, eos] = 1
    edges = find_edges(deterministic(next_, torch.zeros(2, 3).double()), space.eos_id)
    assert list(zip(edges.source.tolist(), edges.target.tolist(), strict=True)) == [(0, 0), (1, 1)]
    assert edges.of_token[:, eos].tolist() == [2, 2]


def test_a_policy_may_have_weights_in_both_parts():
    law = random_law(torch.Generator().manual_seed(1), 3, 1, 2, 1, 0.0)
    moved = replace(law, log_emission=law.log_emission - 0.75, log_weight=law.log_weight + 0.75)
    tokens, _ = SPACE.sequences()
    whole, parts = (AutomatonPolicy(SPACE, machine) for machine in (law, moved))
    torch.testing.assert_close(whole.logits(tokens), parts.logits(tokens))
    torch.testing.assert_close(whole.log_probs(tokens), parts.log_probs(tokens))
