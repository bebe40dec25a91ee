"""Responses that are compared: groups of the size that is given, however many prompts there are."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from agent_cases import KINDS, case, gradient
from fixed_point_cases import problem_of, small_ebm
from toy_policies import close, seeded

import rl_ebm
from rl_ebm.agents import AGENTS, PolicyGradientConfig
from rl_ebm.agents.policy_gradient import policy_gradient_loss
from rl_ebm.agents.sampled_teacher import resample
from rl_ebm.agents.shared.kl_penalty import advantages
from rl_ebm.agents.shared.learner import group_ids
from rl_ebm.agents.shared.on_policy import OnPolicyAgent
from rl_ebm.agents.shared.replay import Replay
from rl_ebm.divergences import kl, tv
from rl_ebm.fixed_points import target
from rl_ebm.policies import Tabular, Transformer, TransformerConfig, Uniform
from rl_ebm.soft_bellman import log_policy
from rl_ebm.studies.diagnose import laws
from rl_ebm.studies.problems import problems
from rl_ebm.tokens import Batch, length_mask

WITH_SIZE = sorted(n for n, e in AGENTS.items() if "group_size" in e.config.__dataclass_fields__)
# Every agent that compares responses to a prompt, with the options by which it does.
COMPARES = {name: {} for name in WITH_SIZE} | {"trajectory-balance": {"log_z": "batch"}}


def many_prompts(count=24, vocab_size=3):
    """Responses of two tokens, whose rewards are nearly the same for every prompt."""
    space = rl_ebm.TokenSpace(vocab_size, 2)
    prompts = [[i // 5, 3 + i % 5] for i in range(count)]
    n = space.num_sequences
    scores = 1.5 * torch.randn(n, generator=seeded(1)) + 0.3 * torch.randn(
        count, n, generator=seeded(2)
    )
    return rl_ebm.EBM(space, scores, 1.0, Uniform(space), prompts)


def test_those_that_learn_from_their_own_responses_or_compare_them_take_a_group_size():
    own = {name for name, entry in AGENTS.items() if issubclass(entry.agent, OnPolicyAgent)}
    assert own | {"vargrad", "trajectory-balance", "sampled-teacher"} <= set(WITH_SIZE)


OTHERS = [name for name in AGENTS if name not in COMPARES and name != "best-of-n"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in COMPARES),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in OTHERS),
        ("best-of-n", {"source": "reference", "n": 2}),
        ("trajectory-balance", {"log_z": "batch"}),
        ("sampled-teacher", {"method": "mcmc"}),
        ("vargrad", {"replay_size": 64, "replay_batch": 16}),
        ("vargrad", {"group_size": 2}),
        ("grpo", {"group_size": 4}),
    ],
    ids=str,
)
def test_with_more_prompts_than_responses_in_a_batch_every_agent_learns(name, options):
    ebm = many_prompts()
    solution, entry = rl_ebm.solve(ebm), AGENTS[name]
    options = options if name == "exact" else {"batch_size": 16} | options
    config = entry.config(lr=0.02, **options)
    # Best-of-n goes elsewhere; the others towards the EBM, or near it (GRPO).
    toward = entry.fixed_point if name == "best-of-n" else target
    limit = torch.stack([toward(config, c).log_law for c in problems(solution)])
    network = TransformerConfig(layers=1, heads=2, dim=16, hidden=16)
    torch.manual_seed(0)
    policy = Transformer(ebm.space, network, ebm.prompts, entry.agent.logits_are_values)
    before = float(kl(limit, laws(policy, ebm)).mean())
    agent = entry.agent(ebm, policy, config, seeded(4), solution)
    steps = 160 if name == "dpo" else 40  # the label of a pair says less than two rewards
    for k in range(steps):
        batch = agent.sample()
        assert batch is None or len(batch) <= 16
        agent.update(None if batch is None else ebm.score(batch), k / steps)
    assert float(kl(limit, laws(policy, ebm)).mean()) < 0.5 * before


@pytest.mark.parametrize("name", COMPARES)
@pytest.mark.parametrize("prompts", [1, 3, 8, 16, 40])
@pytest.mark.parametrize("size", [None, 2, 3, 5, 16])
def test_each_prompt_of_a_step_has_whole_groups(name, prompts, size):
    entry, ebm = AGENTS[name], many_prompts(prompts)
    config = entry.config(batch_size=16, group_size=size, **COMPARES[name])
    policy = Tabular(ebm.space, ebm.prompts, scale=1.0, generator=seeded())
    batch = entry.agent(ebm, policy, config, seeded(3), None).sample()
    counts = torch.bincount(batch.prompt_ids, minlength=prompts)
    drawn = counts[counts > 0]
    if size is None:
        assert len(batch) == 16
        assert int(drawn.min()) >= max(4, 16 // prompts)
        return
    assert len(batch) == 16 // size * size
    assert bool((drawn % size == 0).all())
    ids, count = group_ids(batch.prompt_ids, prompts, size)
    assert int(ids.max()) < count
    sizes = torch.bincount(ids)
    assert set(sizes[sizes > 0].tolist()) == {size}
    for group in set(ids.tolist()):  # of one prompt
        assert len(set(batch.prompt_ids[ids == group].tolist())) == 1


def test_rows_from_elsewhere_are_dealt_out_to_groups_of_at_least_the_size():
    ids = torch.randint(6, (50,), generator=seeded(1))
    ids = ids[ids != 4]
    ids = torch.cat([ids, torch.tensor([4])])  # alone
    for size in (2, 3, 7):
        groups, count = group_ids(ids, 7, size)
        assert int(groups.max()) < count
        for p in range(7):
            mine = groups[ids == p].tolist()
            sizes = [mine.count(x) for x in set(mine)]
            if len(mine) >= size:
                assert all(size <= n < 2 * size for n in sizes)
            elif mine:
                assert sizes == [len(mine)]
        pairs = {(int(g), int(p)) for g, p in zip(groups, ids, strict=True)}
        assert len({g for g, _ in pairs}) == len(pairs)  # no group of two prompts
    same, count = group_ids(ids, 7, None)
    assert torch.equal(same, ids)
    assert count == 7


@pytest.mark.parametrize("advantage", ["none", "group-std"])
@pytest.mark.parametrize("prompts", [1, 2])
def test_advantages_are_those_of_groups_of_the_size_also_with_one_prompt(advantage, prompts):
    size, n, beta = 3, 12, 0.5
    returns = torch.randn(n, generator=seeded(), dtype=torch.float64)
    prompt_ids = torch.arange(n) % prompts
    options = PolicyGradientConfig(batch_size=n, group_size=size, advantage=advantage)
    got = advantages(returns, prompt_ids, prompts, options, beta)
    groups, _ = group_ids(prompt_ids, prompts, size)
    for i in range(n):
        mine = [float(returns[j]) for j in range(n) if groups[j] == groups[i]]
        assert len(mine) == size
        mean = math.fsum(mine) / size
        if advantage == "none":
            want = float(returns[i]) - (math.fsum(mine) - float(returns[i])) / (size - 1)
        else:
            spread = math.sqrt(math.fsum((x - mean) ** 2 for x in mine) / (size - 1))
            want = (float(returns[i]) - mean) / (spread + 1e-6) / beta
        assert float(got[i]) == pytest.approx(want, abs=1e-12)
    without = PolicyGradientConfig(advantage=advantage)
    whole = advantages(returns, prompt_ids, prompts, without, beta)
    assert float((whole - got).abs().max()) > 0.05


@pytest.mark.parametrize("name", ["policy-gradient", "grpo", "ppo", "dpg", "vargrad"])
def test_sizes_give_other_gradients_with_one_prompt(name):
    problem = case(KINDS[1])
    batch = problem.batch([(0, y) for y in (0, 3, 1, 5, 2, 6, 4, 1, 0, 2, 5, 3)])
    found = []
    for size in (2, 3, 6, 12, None):
        config = AGENTS[name].config(batch_size=12, group_size=size, max_grad_norm=1e12)
        policy = problem.table()
        agent = AGENTS[name].agent(problem.ebm, policy, config, seeded(), None)
        found.append(gradient(agent, batch))
    close(found[3], found[4], 1e-12)  # all of them is the default
    for a, b in pairwise(found[:4]):
        assert float((a - b).abs().max()) > 1e-4


def test_the_log_z_of_a_batch_is_that_of_each_group():
    problem = case(KINDS[1])
    rows = [0, 3, 1, 5, 2, 6, 4, 1, 0]
    batch = problem.batch([(0, y) for y in rows])
    config = AGENTS["vargrad"].config(batch_size=9, group_size=3)
    policy = problem.table()
    agent = AGENTS["vargrad"].agent(problem.ebm, policy, config, seeded(), None)
    loss, _ = agent.loss(batch, agent.log_weights(batch))
    log_pi = rl_ebm.policies.log_prob(policy, problem.space, batch.tokens, batch.lengths)
    gap = (agent.log_weights(batch).sum(1) - log_pi).detach().tolist()
    groups, _ = group_ids(batch.prompt_ids, 1, 3)
    total = 0.0
    for g in set(groups.tolist()):
        mine = [x for x, other in zip(gap, groups.tolist(), strict=True) if other == g]
        mean = math.fsum(mine) / len(mine)
        total += math.fsum((x - mean) ** 2 for x in mine)
    assert float(loss.detach()) == pytest.approx(total / 9 / 2, rel=1e-5)


# What cannot be a size ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_SIZE)
def test_a_size_is_an_integer_that_a_batch_holds(name):
    config = AGENTS[name].config
    options = COMPARES[name] | {"batch_size": 8}
    for size in (2.5, True, "4", 4.0, math.nan):
        with pytest.raises(TypeError, match="group_size must be an integer, or None, got"):
            config(group_size=size, **options)
    for size in (1, 0, -2, 9):
        with pytest.raises(ValueError, match=r"group_size must be in \[2, batch_size=8\], got"):
            config(group_size=size, **options)
    with pytest.raises(ValueError, match="batch_size must be >= 2, got 1"):
        config(**(options | {"batch_size": 1}))
    assert config(group_size=8, **options).group_size == 8


def test_a_size_that_nothing_would_read_is_refused():
    with pytest.raises(ValueError, match="group_size is for log_z='batch'"):
        AGENTS["trajectory-balance"].config(group_size=4)
    with pytest.raises(ValueError, match="group_size is for method='sir'"):
        AGENTS["sampled-teacher"].config(method="mcmc", group_size=4)


# Where groups of a size end -----------------------------------------------------------------------


def expected_slope(ebm, problem, log_law, options, size):
    """The largest entry of the gradient, over all groups of a size drawn from a law."""
    space = ebm.space
    tokens, lengths = space.sequences()
    policy = Tabular.from_tables(rl_ebm.q_from_r(problem.at_ends(log_law), space), space)
    log_ref = ebm.log_ref(tokens, lengths, torch.zeros_like(lengths)).double()
    mask = length_mask(lengths, space.max_length)
    total = torch.zeros_like(policy.table)
    for group in product(range(len(tokens)), repeat=size):
        rows = torch.tensor(group)
        logits = policy.logits(tokens[rows]).masked_fill(~space.action_mask(), -math.inf)
        log_pi = log_policy(logits).gather(2, tokens[rows][..., None])[..., 0]
        loss = policy_gradient_loss(
            log_pi.masked_fill(~mask[rows], 0.0),
            log_ref[rows],
            problem.g_responses[rows],
            lengths[rows],
            torch.zeros(size, dtype=torch.int64),
            1,
            options,
            ebm.beta,
        )
        weight = math.exp(math.fsum(log_law[rows].tolist()))
        total += weight * torch.autograd.grad(loss, policy.table)[0]
    return float(total.abs().max())


@pytest.mark.parametrize(
    "options",
    [
        {"kl_estimator": "k3", "advantage": "group-std"},
        {"kl_estimator": "k2", "advantage": "group-std", "kl_level": "sequence"},
        {"kl_estimator": "k3", "advantage": "group-std", "kl_level": "sequence"},
        {"kl_estimator": "k3", "advantage": "group-std", "reduce_tokens": "mean"},
        {"kl_estimator": "k2", "baseline": "group-mean", "kl_level": "sequence"},
        {"kl_estimator": "k3", "baseline": "group-mean"},
        {"kl_estimator": "k3", "baseline": "group-mean", "reduce_tokens": "mean"},
    ],
    ids=lambda o: "-".join(o.values()),
)
@pytest.mark.parametrize(
    "shape", [(2, 2, None), pytest.param((3, 2, 0), marks=pytest.mark.slow)], ids=str
)
def test_at_the_limit_of_a_size_its_expected_gradient_vanishes(options, shape):
    ebm = small_ebm(shape, beta=1.5)
    problem, size = problem_of(ebm), 3
    entry = AGENTS["policy-gradient"]
    sized = entry.config(kl_in="loss", group_size=size, **options)
    without = entry.config(kl_in="loss", **options)
    law = entry.fixed_point(sized, problem).log_law
    assert expected_slope(ebm, problem, law, sized, size) < 1e-9
    other = entry.fixed_point(without, problem)
    assert float(tv(law, other.log_law)) > 1e-3
    if not other.degenerate:
        assert expected_slope(ebm, problem, other.log_law, sized, size) > 1e-4


def test_a_size_moves_nothing_where_the_kl_is_paid_as_a_reward():
    problem = problem_of(small_ebm((3, 2, 0)))
    for name in ("policy-gradient", "ppo"):
        for advantage in ("none", "group-std"):
            config = AGENTS[name].config(group_size=2, advantage=advantage)
            point = AGENTS[name].fixed_point(config, problem)
            close(point.log_law, problem.log_target, 1e-12)


def test_what_is_not_computed_for_small_groups_is_not_known():
    problem = problem_of(small_ebm((3, 2, None)))
    config = AGENTS["policy-gradient"].config(
        kl_estimator="k2", advantage="group-std", group_size=2
    )
    point = AGENTS["policy-gradient"].fixed_point(config, problem)
    assert (point.log_law, point.degenerate) == (None, None)
    assert point.how == "not computed for groups of 2"


@pytest.mark.parametrize("size", [2, 3])
def test_resampled_proposals_end_at_the_law_of_all_groups(size):
    problem = problem_of(small_ebm((2, 2, None)))
    entry = AGENTS["sampled-teacher"]
    law = entry.fixed_point(entry.config(group_size=size), problem).log_law
    start = problem.start_law.exp().tolist()
    weight = (problem.log_target - problem.start_law).exp().tolist()
    want = [0.0] * 4
    for group in product(range(4), repeat=size):
        p = math.prod(start[i] for i in group)
        total = math.fsum(weight[i] for i in group)
        for i in group:
            want[i] += p * weight[i] / total
    close(law.exp(), torch.tensor(want, dtype=torch.float64), 1e-9)
    assert float(tv(law, problem.log_target)) > 0.02
    own = entry.fixed_point(entry.config(group_size=size, source="policy"), problem)
    close(own.log_law, problem.log_target, 1e-12)


# Nothing to imitate, chains of many prompts, replay ----------------------------------------------


def test_a_resampled_row_is_never_one_of_weight_zero_beside_others():
    ids = torch.arange(4000) // 4
    log_w = torch.randn(4000, generator=seeded()) * 40  # far apart: many are 0 beside the best
    log_w[::3] = -math.inf
    log_w[:4] = torch.tensor([-math.inf, -math.inf, -math.inf, 2.0])
    for seed in range(5):
        rows = resample(log_w, ids, 1000, seeded(seed))
        assert torch.equal(ids[rows], ids)
        assert not bool(torch.isneginf(log_w[rows]).any())


@pytest.mark.parametrize("name", ["sampled-teacher", "best-of-n"])
@pytest.mark.parametrize("options", [{}, {"method": "mcmc"}], ids=["", "mcmc"])
def test_where_every_proposal_is_impossible_none_is_imitated(name, options):
    if name == "best-of-n" and options:
        return
    space = rl_ebm.TokenSpace(2, 2)
    scores = torch.tensor([[0.0, 1.0, -math.inf, -math.inf]] * 2)
    ebm = rl_ebm.EBM(space, scores, 1.0, Uniform(space), [[0], [1]])
    config = AGENTS[name].config(batch_size=4, **options)
    policy = Tabular(space, ebm.prompts, scale=1.0, generator=seeded())
    agent = AGENTS[name].agent(ebm, policy, config, seeded(), None)
    tokens = torch.tensor([[1, 0], [1, 1], [1, 1], [1, 0]])  # all impossible
    dead = ebm.score(Batch(tokens, torch.full((4,), 2), torch.zeros(4).long()))
    assert float(gradient(agent, dead).abs().max()) == 0
    agent = AGENTS[name].agent(ebm, policy, config, seeded(), None)
    mixed = ebm.score(
        Batch(torch.tensor([[1, 0], [0, 1], [0, 1], [1, 0]]), torch.full((4,), 2), dead.prompt_ids)
    )
    found = gradient(agent, mixed)
    assert float(found[0].abs().max()) > 0.01
    assert bool((found[0, 0] * torch.tensor([-1.0, 1.0]) > 0).all())  # 0 comes first more often


def test_chains_of_more_prompts_than_a_step_has_all_begin():
    ebm = many_prompts(11)
    entry = AGENTS["sampled-teacher"]
    policy = Tabular(ebm.space, ebm.prompts, scale=1.0, generator=seeded())
    config = entry.config(method="mcmc", batch_size=4)
    agent = entry.agent(ebm, policy, config, seeded(2), None)
    for _ in range(25):
        batch = ebm.score(agent.sample())
        assert len(set(batch.prompt_ids.tolist())) == 4
        agent.update(batch)
    assert torch.equal(agent.chains.prompt_ids, torch.arange(11))
    assert bool((agent.chains.lengths == 2).all())
    other = entry.agent(ebm, policy, config, seeded(2), None)
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.chains.tokens, agent.chains.tokens)
    want = ebm.reward(agent.chains.tokens, agent.chains.lengths, agent.chains.prompt_ids)
    close(agent.chains.rewards(), want.double(), 1e-12)


def test_what_is_replayed_to_a_prompt_has_company():
    replay = Replay(64, 2)
    ids = torch.randint(8, (32,), generator=seeded())
    rows = Batch(torch.zeros(32, 2).long(), torch.full((32,), 2), ids, torch.arange(32.0).double())
    replay.add(rows)
    kept = replay.rows
    assert torch.equal(kept.prompt_ids[:32], ids.sort().values)
    again = replay.sample(12, seeded(1), 4)
    assert len(again) == 12
    for i in range(0, 12, 4):
        places = again.rewards()[i : i + 4].tolist()
        order = kept.rewards()[:32].tolist()
        first = order.index(places[0])
        assert places == [order[(first + k) % 32] for k in range(4)]
    small = Replay(8, 2)
    small.add(rows)  # the newest rows, whatever their prompts
    assert sorted(small.rows.rewards().tolist()) == [float(i) for i in range(24, 32)]
