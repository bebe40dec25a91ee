"""Exact solutions against Python loops over every response: values, samples, summaries."""

from __future__ import annotations

import importlib
import itertools
import math

import brute_force
import pytest
import torch
from brute_force import INF, log_sum_exp
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from toy_policies import GARBAGE, PROMPTS, SMALL, close, randomised, responses, seeded
from verify_cases import ALL_SPACES, REFERENCES, case, check_solution, truth

import rl_ebm
from rl_ebm.exact import summarise
from rl_ebm.exact.tree import backup
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.rewards import from_trl
from rl_ebm.rewards.transformer import TransformerReward
from rl_ebm.tokens import TokenSpace

solve_module = importlib.import_module(
    "rl_ebm.exact.dispatch"
)  # its package shows a function there
summary_module = importlib.import_module("rl_ebm.exact.summary")

in_all_spaces = pytest.mark.parametrize("shape", ALL_SPACES, ids=str)


@in_all_spaces
@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("reference", REFERENCES)
def test_a_solution_is_the_enumerated_ebm(shape, reference, prompted):
    exact = case(shape, 0.7, reference, prompted, forbid=0.3, seed=5)
    check_solution(rl_ebm.solve(exact.ebm), exact.truths)


@settings(deadline=None, max_examples=50)
@example(shape=(2, 1, 0), beta=0.1, reference="endless", prompted=True, forbid=0.0, seed=1)
@given(
    shape=st.tuples(st.integers(2, 4), st.integers(1, 4)).flatmap(
        lambda s: st.tuples(
            st.just(s[0]), st.just(s[1]), st.one_of(st.none(), st.integers(0, s[0] - 1))
        )
    ),
    beta=st.sampled_from([0.1, 1.0, 1, 2.5, 7.0]),
    reference=st.sampled_from(REFERENCES),
    prompted=st.booleans(),
    forbid=st.sampled_from([0.0, 0.2, 0.6]),
    seed=st.integers(0, 10**6),
)
def test_a_solution_is_the_enumerated_ebm_in_any_space(
    shape, beta, reference, prompted, forbid, seed
):
    assume(TokenSpace(*shape).num_sequences <= (27 if prompted else 81))
    exact = case(shape, beta, reference, prompted, forbid, seed)
    check_solution(rl_ebm.solve(exact.ebm), exact.truths)


@pytest.mark.parametrize("shape", [(4, 4, None), (2, 7, None), (4, 4, 1)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 60.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("forbid", [0.0, 0.3])
def test_the_precision_is_that_of_the_scores(shape, scale, dtype, forbid):
    space = TokenSpace(*shape)
    scores = scale * torch.randn(space.num_sequences, generator=seeded(3), dtype=torch.float64)
    scores = scores.to(dtype)
    scores[torch.rand(len(scores), generator=seeded(4)) < forbid] = -INF
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    for reference in (None, Uniform(space)):
        solution = rl_ebm.solve(rl_ebm.EBM(space, scores, 1.0, reference))
        zeros = [torch.zeros(space.num_prefixes(t), space.vocab_size) for t in range(shape[1])]
        want = truth(space, scores.tolist(), 1.0, reference and zeros)
        close(solution.log_z, torch.tensor([want.log_z], dtype=torch.float64), tolerance)
        for v, q, q_star in zip(solution.v, solution.tables(), want.q_tables(), strict=True):
            assert v.dtype == dtype
            close(q[0], q_star, tolerance)


# Kinds of reward -------------------------------------------------------------------------------


@in_all_spaces
@pytest.mark.parametrize("prompted", [False, True])
def test_a_function_is_asked_once_for_every_response_and_solves_like_its_table(
    monkeypatch, shape, prompted
):
    monkeypatch.setattr(solve_module, "_REWARD_BATCH", 5)
    exact = case(shape, 0.5, "tabular", prompted, forbid=0.3, seed=8)
    space, asked, sizes = exact.ebm.space, [], []

    def reward(tokens, lengths, prompt_ids=None):
        assert (prompt_ids is not None) == prompted
        ids = [0] * len(tokens) if prompt_ids is None else prompt_ids.tolist()
        sizes.append(len(tokens))
        out = []
        for row, n, i in zip(tokens.tolist(), lengths.tolist(), ids, strict=True):
            assert row[n:] == [0] * (space.max_length - n)
            asked.append((i, tuple(row[:n])))
            out.append(exact.scores[i][responses(space).index(tuple(row[:n]))])
        return torch.tensor(out, dtype=torch.float64)

    ebm = rl_ebm.EBM(space, reward, 0.5, exact.ebm.reference, exact.ebm.prompts)
    solution = rl_ebm.solve(ebm, progress=False)
    assert sorted(asked) == sorted(
        (i, y) for i in range(len(exact.scores)) for y in responses(space)
    )
    assert max(sizes) <= 5
    assert len(sizes) == math.ceil(space.num_sequences / 5) * len(exact.scores)
    check_solution(solution, exact.truths)
    for got, want in zip(solution.tables(), rl_ebm.solve(exact.ebm).tables(), strict=True):
        close(got, want, 1e-14)


@pytest.mark.parametrize("shape", [(3, 3, None), (3, 3, 1)], ids=str)
def test_a_trl_reward_solves_like_its_table(shape):
    space = TokenSpace(*shape)

    def value(prompt, completion, bonus):
        first = 0 if completion == "" else int(completion[0])
        return 0.3 * len(prompt) * first - 0.7 * len(completion) + bonus * completion.count("2")

    def reward(prompts, completions, bonus):
        return [value(*each) for each in zip(prompts, completions, bonus, strict=True)]

    model = from_trl(reward, lambda ids: "".join(map(str, ids)), {"bonus": [0.5, -2.0, 1.5]})
    solution = rl_ebm.solve(rl_ebm.EBM(space, model, 0.4, prompts=PROMPTS))
    truths = []
    for prompt, bonus in zip(PROMPTS, [0.5, -2.0, 1.5], strict=True):
        texts = ["".join(map(str, y if space.eos_id is None else y[:-1])) for y in responses(space)]
        scores = [value("".join(map(str, prompt)), text, bonus) for text in texts]
        truths.append(truth(space, scores, 0.4))
    check_solution(solution, truths)


@pytest.mark.parametrize("shape", [(3, 3, None), (3, 3, 1)], ids=str)
@pytest.mark.parametrize("prompts", [None, PROMPTS])
def test_a_transformer_reward_solves_like_its_values_one_by_one(shape, prompts):
    space = TokenSpace(*shape)
    reward = randomised(TransformerReward(space, SMALL, prompts))
    solution = rl_ebm.solve(rl_ebm.EBM(space, reward, 0.2, prompts=prompts))
    assert not any(x.requires_grad for x in (solution.scores, solution.log_z, *solution.v))
    truths = []
    for i in range(len(prompts or [0])):
        scores = []
        for y in responses(space):
            tokens, lengths = brute_force.padded([y], space.max_length)
            with torch.no_grad():
                scores.append(float(reward(tokens, lengths, torch.tensor([i]))))
        truths.append(truth(space, scores, 0.2))
    check_solution(solution, truths)


def test_a_table_is_neither_copied_nor_written():
    for prompts, reference in itertools.product((None, PROMPTS), (None, Uniform(TokenSpace(3, 4)))):
        scores = torch.randn(3, 81, generator=seeded(1))
        scores = scores if prompts else scores[0]
        before = scores.clone()
        solution = rl_ebm.solve(rl_ebm.EBM(TokenSpace(3, 4), scores, 0.3, reference, prompts))
        assert solution.scores.data_ptr() == scores.data_ptr()
        assert torch.equal(scores, before)
        assert solution.device == scores.device


# Chunks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 8, 10, 27, 64, 100, 2**20])
@pytest.mark.parametrize(("a", "t"), [(2, 6), (3, 4), (9, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_a_backup_in_chunks_is_that_of_enumeration(monkeypatch, chunk, a, t, dtype, beta):
    monkeypatch.setattr(backup, "_CHUNK", chunk)
    taken = []
    for name in ("_sum_up", "_logsumexp_up"):
        original = getattr(backup, name)
        monkeypatch.setattr(
            backup, name, lambda *args, o=original, n=name: (taken.append(n), o(*args))
        )
    for peaked in (None, 900.0, -900.0, 50.0, 500.0, -INF):  # in one place
        scores = torch.randn(a**t, generator=seeded(2), dtype=torch.float64).to(dtype)
        scores[::7] = -INF
        if peaked is not None:
            first = a**t // 2 // a * a
            scores[first : first + (a if peaked == -INF and t > 1 else 1)] = peaked
        taken.clear()
        solution = rl_ebm.solve(rl_ebm.EBM(TokenSpace(a, t), scores, beta))
        weights, tolerance = (
            (scores.double() / beta).tolist(),
            1e-10 if scores.itemsize == 8 else 2e-6,
        )
        for depth, v in enumerate(solution.v):
            n = a ** (t - depth)  # leaves below each state
            want = [log_sum_exp(weights[i : i + n]) for i in range(0, a**t, n)]
            close(v[0].double(), torch.tensor(want, dtype=torch.float64), tolerance)
        assert float(solution.log_z) == pytest.approx(log_sum_exp(weights), rel=tolerance)
        assert (len(taken) == 1) == (chunk >= a**t or t == 1)
        if peaked is None and chunk >= 8:
            assert "_logsumexp_up" not in taken
        if peaked in (900.0, -900.0):
            assert taken.count("_logsumexp_up") >= 1
            assert chunk < 8 or taken.count("_logsumexp_up") == 1


@pytest.mark.parametrize("shape", [(3, 4, 1), (4, 3, None)], ids=str)
def test_values_in_blocks_of_states_are_those_of_enumeration(monkeypatch, shape):
    exact = case(shape, 0.6, "tabular", True, forbid=0.2, seed=3)
    for block in (1, 8, 11):
        monkeypatch.setattr(solve_module, "_BLOCK", block)
        check_solution(rl_ebm.solve(exact.ebm), exact.truths)


# Samples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 2, None), (3, 3, 0), (4, 2, 1), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("prompted", [False, True])
def test_samples_have_the_exact_frequencies(shape, prompted):
    exact = case(shape, 0.8, "tabular", prompted, forbid=0.3, seed=11)
    space, n = exact.ebm.space, 6000
    solution = rl_ebm.solve(exact.ebm)
    ids = torch.arange(n * len(exact.truths)) % len(exact.truths) if prompted else None
    total = n * len(exact.truths)
    batch = solution.sample(total, seeded(4), ids)
    again = solution.sample(total, seeded(4), ids)
    assert torch.equal(batch.tokens, again.tokens)
    assert torch.equal(batch.prompt_ids, torch.zeros(n).long() if ids is None else ids)
    assert not torch.equal(batch.tokens, solution.sample(total, seeded(5), ids).tokens) or all(
        max(t.log_probs) > -1e-9 for t in exact.truths
    )
    counts = [dict.fromkeys(responses(space), 0) for _ in exact.truths]
    rows = zip(
        batch.tokens.tolist(), batch.lengths.tolist(), batch.prompt_ids.tolist(), strict=True
    )
    for row, length, i in rows:
        counts[i][tuple(row[:length])] += 1
    for t, count in zip(exact.truths, counts, strict=True):
        for y, log_p in zip(t.sequences, t.log_probs, strict=True):
            p = math.exp(log_p)
            assert count[y] == 0 or log_p > -INF
            assert abs(count[y] - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1e-6 * n


def test_solving_leaves_the_global_generator_alone_and_sampling_may_use_it():
    exact = case((3, 3, 1), 1.0, "plain", seed=2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    solution = rl_ebm.solve(exact.ebm)
    summarise(solution)
    solution.sample(4, seeded())
    assert torch.equal(torch.get_rng_state(), before)
    solution.sample(4)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_solution_knows_that_it_forbids():
    space = TokenSpace(3, 2)
    assert not rl_ebm.solve(rl_ebm.EBM(space, torch.zeros(9))).forbids
    scores = torch.zeros(9).index_fill(0, torch.tensor([4]), -INF)
    assert rl_ebm.solve(rl_ebm.EBM(space, scores)).forbids
    function = lambda tokens, lengths: scores[tokens @ torch.tensor([3, 1])]  # noqa: E731
    assert rl_ebm.solve(rl_ebm.EBM(space, function)).forbids


def test_a_forced_end_forbids_nothing():
    space = TokenSpace(3, 3, eos_id=1)
    reference = Tabular(space, generator=seeded(), dtype=torch.float64)
    function = lambda tokens, lengths: lengths.double()  # noqa: E731
    assert not rl_ebm.solve(rl_ebm.EBM(space, function, 1.0, reference)).forbids
    with torch.no_grad():
        reference.table[0, 0, 0] = -INF
    assert rl_ebm.solve(rl_ebm.EBM(space, function, 1.0, reference)).forbids


def test_a_beta_beyond_float32_is_divided_by_as_it_is():
    scores = torch.tensor([3e38, 1e38, -2e38, 0.0])
    for beta, unit in ((4e38, 1.0), (4e-42, 1e-80)):
        table = (scores.double() * unit).float()  # 0, or what is next to it, where that underflows
        want = log_sum_exp([x / beta for x in table.tolist()])
        solution = rl_ebm.solve(rl_ebm.EBM(TokenSpace(2, 2), table, beta))
        assert float(solution.log_z[0]) == pytest.approx(want, rel=1e-6)


def test_a_chunk_whose_best_is_0_keeps_its_digits():
    # float32 rewards divided by beta in float32 would be off by 1e-5 here.
    scores = torch.linspace(-29.7, 0.0, 16)
    space, beta = TokenSpace(2, 4), 0.1
    v = [torch.empty(2**t, dtype=torch.float64) for t in range(4)]
    paid = [torch.empty(2**t) for t in range(4)]
    backup.backup_leaves(scores, beta, space.branching, v, paid)
    weights = [x / beta for x in scores.tolist()]
    for t in range(4):
        whole = v[t] + paid[t].double() / beta
        size = 2 ** (4 - t)
        want = [log_sum_exp(weights[i * size : (i + 1) * size]) for i in range(2**t)]
        close(whole, torch.tensor(want, dtype=torch.float64), 1e-12)


def test_rewards_whose_difference_leaves_float64_are_refused():
    space = TokenSpace(2, 1)
    for low in (0.0, -0.4e300):
        scores = torch.tensor([0.6e300, low], dtype=torch.float64)
        assert math.isfinite(float(rl_ebm.solve(rl_ebm.EBM(space, scores)).log_z[0]))
    scores = torch.tensor([0.6e300, -0.6e300], dtype=torch.float64)
    with pytest.raises(ValueError, match="R / beta is too large for float64"):
        rl_ebm.solve(rl_ebm.EBM(space, scores))


def test_arguments_of_a_solution_are_checked():
    solution = rl_ebm.solve(case((3, 2, 0), prompted=True).ebm)
    tokens, _ = solution.space.sequences()
    for method in (solution.logits, solution.log_prob):
        with pytest.raises(ValueError, match="there are 3 prompts: give prompt_ids"):
            method(tokens)
    with pytest.raises(ValueError, match="there are 3 prompts: give prompt_ids"):
        solution.sample(2)
    with pytest.raises(ValueError, match=r"prompt_ids must be in \[0, 3\)"):
        solution.sample(1, prompt_ids=torch.tensor([3]))
    with pytest.raises(ValueError, match="row 0 has no EOS"):
        solution.log_prob(torch.tensor([[1, GARBAGE]]), prompt_ids=torch.tensor([0]))


# Summaries ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    shape=st.sampled_from(ALL_SPACES),
    reference=st.sampled_from([None, "uniform", "tabular"]),
    forbid=st.sampled_from([0.0, 0.4]),
    block=st.sampled_from([1, 7, 2**18]),
    top=st.sampled_from([0, 1, 3, 1000]),
    seed=st.integers(0, 10**6),
)
def test_a_summary_has_the_likeliest_responses_in_order(shape, reference, forbid, block, top, seed):
    exact = case(shape, 0.5, reference, True, forbid, seed)
    solution = rl_ebm.solve(exact.ebm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary_module, "_BLOCK", block)
        for i, (t, scores) in enumerate(zip(exact.truths, exact.scores, strict=True)):
            got = summarise(solution, top, i)
            assert got.log_z == pytest.approx(t.log_z, rel=1e-10)
            assert got.entropy == pytest.approx(t.entropy(), rel=1e-10, abs=1e-12)
            assert got.expected_reward == pytest.approx(t.expectation(scores), rel=1e-9, abs=1e-10)
            assert got.num_sequences == len(t.sequences)
            order = sorted(range(len(scores)), key=lambda n: -t.log_probs[n])
            order = [n for n in order if t.log_probs[n] > -INF][:top]
            assert [r.tokens for r in got.top] == [list(t.sequences[n]) for n in order]
            assert [r.score for r in got.top] == [scores[n] for n in order]
            for response, n in zip(got.top, order, strict=True):
                assert response.probability == pytest.approx(math.exp(t.log_probs[n]), rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 4, None), (4, 4, 1)], ids=str)
def test_of_equally_probable_responses_the_first_comes_first(shape):
    space = TokenSpace(*shape)
    scores = torch.randint(0, 3, (space.num_sequences,), generator=seeded(1)).double()
    top = summarise(rl_ebm.solve(rl_ebm.EBM(space, scores)), 30).top
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], n))
    assert [tuple(r.tokens) for r in top] == [responses(space)[n] for n in order[:30]]
