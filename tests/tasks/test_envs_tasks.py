"""Named tasks are what their descriptions say, drawn in the stated order."""

import itertools
import math

import numpy as np
import pytest
import torch

from rl_ebm import solve
from rl_ebm.envs import TASKS, Task, make_task
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.tasks import chains
from rl_ebm.tasks.named import find_ebm
from rl_ebm.tokens import TokenSpace


def test_every_task_has_its_name_and_one_line():
    assert list(TASKS)[:3] == ["random", "pairwise", "prompts"]
    assert set(TASKS) >= {"zipf", "peaked", "planted", "lookahead", "sparse", "star"}
    for name, task in TASKS.items():
        assert task.name == name
        assert task.description
        assert "\n" not in task.description


@pytest.mark.parametrize(
    ("task_seed", "eos_id", "count"), [(0, None, 8**4), (3, 2, 1 + 7 + 49 + 343)]
)
def test_random_is_a_score_for_each_sequence_in_enumeration_order(task_seed, eos_id, count):
    ebm = make_task("random", eos_id=eos_id, task_seed=task_seed)
    assert ebm.space == TokenSpace(8, 4, eos_id)
    want = 2 * np.random.default_rng(task_seed).standard_normal(count)
    assert ebm.reward_model.scores.dtype == torch.float64
    np.testing.assert_array_equal(ebm.reward_model.scores[0].numpy(), want)
    assert ebm.prompts is None


@pytest.mark.parametrize("eos_id", [None, 1])
def test_the_laws_of_the_paper(eos_id):
    solution = solve(make_task("zipf", vocab_size=3, max_length=3, eos_id=eos_id))
    tokens, lengths = solution.ebm.space.sequences()
    got = solution.log_prob(tokens, lengths).exp().tolist()
    harmonic = math.fsum(1 / k for k in range(1, len(got) + 1))
    assert got == pytest.approx([1 / k / harmonic for k in range(1, len(got) + 1)])

    solution = solve(make_task("peaked", vocab_size=3, max_length=3, eos_id=eos_id, task_seed=4))
    z = np.random.default_rng(4).standard_normal(len(got)).tolist()
    total = math.fsum(math.exp(x / 0.1) for x in z)
    got = solution.log_prob(tokens, lengths).exp().tolist()
    assert got == pytest.approx([math.exp(x / 0.1) / total for x in z])


@pytest.mark.parametrize("name", ["random", "zipf", "peaked", "prompts"])
def test_a_list_of_scores_that_does_not_fit_is_refused(name):
    with pytest.raises(ValueError, match="one score for each response"):
        make_task(name, vocab_size=8, max_length=9)


@pytest.mark.parametrize(("a", "t", "task_seed"), [(4, 8, 0), (3, 4, 2), (2, 2, 0)])
def test_pairwise_is_the_sum_over_pairs(a, t, task_seed):
    ebm = make_task("pairwise", vocab_size=a, max_length=t, task_seed=task_seed)
    rng = np.random.default_rng(task_seed + 1)
    couplings = {pair: rng.standard_normal((a, a)) for pair in itertools.combinations(range(t), 2)}
    tokens = np.random.default_rng(9).integers(a, size=(20, t))
    want = [
        2 / math.sqrt(t * (t - 1) / 2) * sum(j[y[i], y[k]] for (i, k), j in couplings.items())
        for y in tokens
    ]
    lengths, ids = torch.full((20,), t), torch.zeros(20, dtype=torch.int64)
    got = ebm.reward(torch.from_numpy(tokens), lengths, ids)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-12)
    moved = ebm.to("cpu").reward(torch.from_numpy(tokens), lengths, ids)
    assert torch.equal(moved, got)


@pytest.mark.parametrize(("a", "t", "eos_id"), [(3, 4, None), (4, 3, 2), (3, 1, None)])
def test_potts_is_the_sum_over_neighbours_and_is_solved_as_a_list_is(a, t, eos_id):
    ebm = make_task("potts", vocab_size=a, max_length=t, eos_id=eos_id, task_seed=5, beta=0.8)
    rng = np.random.default_rng(5)
    h, j = 1.5 * rng.standard_normal(a), 1.5 * rng.standard_normal((a, a))
    tokens, lengths = ebm.space.sequences()
    want = []
    for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True):
        y = row[:n]
        want.append(h[y[0]] + math.fsum(j[x, z] for x, z in itertools.pairwise(y)))
    got = ebm.reward(tokens, lengths, torch.zeros_like(lengths))
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-12)
    log_z = np.logaddexp.reduce(np.array(want) / 0.8)
    assert float(solve(ebm).log_z) == pytest.approx(log_z, abs=1e-10)


def test_potts_is_solved_where_nothing_can_be_listed():
    """By the transfer matrix, in float64 and log space, without an automaton."""
    rng = np.random.default_rng(0)
    h, j = 1.5 * rng.standard_normal(64), 1.5 * rng.standard_normal((64, 64))
    v = np.zeros(64)
    for _ in range(15):
        v = np.logaddexp.reduce(j + v, 1)
    assert float(solve(make_task("potts")).log_z) == pytest.approx(np.logaddexp.reduce(h + v))


def test_phrases_are_paid_where_they_occur_over_bigrams_of_a_text():
    ebm = make_task("phrases", vocab_size=4, max_length=4, task_seed=2)
    space = ebm.space
    assert space == TokenSpace(4, 4, 0)
    tokens, lengths = space.sequences()
    rewards = ebm.reward(tokens, lengths, torch.zeros_like(lengths))
    text = chains.text(space, 2)
    seen = {}
    for row, n in zip(text.tokens.tolist(), text.lengths.tolist(), strict=True):
        for pair in itertools.pairwise(row[:n]):
            if 0 not in pair:
                seen[pair] = seen.get(pair, 0) + 1
    unwanted = max(seen, key=seen.get)
    paid = set()
    for row, n, r in zip(tokens.tolist(), lengths.tolist(), rewards.tolist(), strict=True):
        pairs = set(itertools.pairwise(row[:n]))
        more = r + 8 * (unwanted in pairs)
        assert more in (0.0, 12.0)
        paid |= {frozenset(pairs)} if more == 12.0 else set()
    (wanted,) = frozenset.intersection(*paid)
    assert 0 not in wanted
    assert seen.get(wanted, 0) <= sorted(seen.values())[len(seen) // 2]
    log_p = ebm.log_ref(tokens, lengths, torch.zeros_like(lengths)).double().sum(1)
    assert float(log_p.logsumexp(0)) == pytest.approx(0.0, abs=1e-6)
    assert float(solve(ebm).log_z) == pytest.approx(float((log_p + rewards).logsumexp(0)), abs=1e-5)
    rows = text.tokens[text.lengths > 1][:, :2].tolist()
    first = [b for a, b in rows if a == 1]
    share = sum(b == 2 for b in first) / len(first)
    one = torch.tensor([[1, 2, 0, 0]])
    told = ebm.log_ref(one, torch.tensor([3]), torch.tensor([0]))[0, 1].exp()
    assert float(told) == pytest.approx(share, abs=0.03)
    other = make_task("phrases", vocab_size=4, max_length=3, reference="uniform")
    assert isinstance(other.reference, Uniform)


def test_phrases_matter_at_their_own_size():
    """KL(target, reference) = E[R] / beta - log Z: neither nothing nor all that can be paid."""
    solution = solve(make_task("phrases"))
    batch = solution.sample(2000, torch.Generator().manual_seed(0))
    mean = float(solution.ebm.score(batch).reward.double().mean())
    assert 2 < mean - float(solution.log_z) < 10


def test_default_sizes():
    assert make_task("potts").space == TokenSpace(64, 16)
    assert make_task("pairwise").space == TokenSpace(4, 8)
    assert make_task("prompts").space == TokenSpace(4, 4)


def test_prompts_is_a_score_for_each_prompt_and_sequence():
    ebm = make_task("prompts", vocab_size=2, max_length=3, task_seed=5)
    assert sorted(len(p) for p in ebm.prompts) == [0, 1, 2]
    assert all(token < 2 for p in ebm.prompts for token in p)
    want = 2 * np.random.default_rng(5).standard_normal((3, 8))
    np.testing.assert_array_equal(ebm.reward_model.scores.numpy(), want)


def test_beta_and_references_reach_the_ebm():
    assert make_task("random", beta=0.3).beta == 0.3
    assert make_task("random").beta == 1.0
    assert make_task("random").reference is None
    assert isinstance(make_task("random", reference="uniform").reference, Uniform)
    policy = Tabular(TokenSpace(2, 2))
    assert make_task("random", vocab_size=2, max_length=2, reference=policy).reference is policy


def test_a_task_of_ones_own():
    task = Task("ones", "always one", 2, 3, lambda space, seed: torch.full((8,), 1.0 + seed))
    ebm = make_task(task, task_seed=4)
    assert ebm.space == TokenSpace(2, 3)
    assert ebm.reward_model.scores.unique().tolist() == [5.0]
    assert find_ebm(None, task, None).space == TokenSpace(2, 3)


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        ("pairwize", {}, "unknown task 'pairwize': did you mean 'pairwise'"),
        ("x", {}, "There are random, pairwise, prompts"),
        ("random", {"max_length": 9}, "134,217,728 here, and at most 67108864 fit"),
        ("prompts", {"max_length": 13}, "201,326,592 here, and at most 67108864 fit"),
        ("pairwise", {"eos_id": 0}, "leave out eos_id"),
        ("pairwise", {"max_length": 1}, "needs max_length >= 2, got 1"),
        ("random", {"reference": "unifrom"}, "unknown reference 'unifrom': give 'uniform'"),
        ("random", {"task_seed": -1}, "task_seed must be an integer >= 0, got -1"),
        ("random", {"vocab_size": 1}, "vocab_size must be an integer >= 2"),
    ],
)
def test_errors(name, kwargs, match):
    with pytest.raises(ValueError, match=match):
        make_task(name, **kwargs)


def test_pairwise_is_of_its_own_space_only():
    reward = make_task("pairwise").reward_model
    with pytest.raises(ValueError, match="the reward was made for"):
        reward.bind(TokenSpace(4, 7), None)


def test_arguments_of_another_kind():
    with pytest.raises(TypeError, match=r"ebm must be an rl_ebm\.EBM, got int"):
        find_ebm(3, None, None)
    with pytest.raises(TypeError, match="task must be a name or a Task, got int"):
        find_ebm(None, 3, None)
