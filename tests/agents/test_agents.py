"""What agents share: the registry, the learner, prompts, padding, metrics, exact continuation."""

from __future__ import annotations

import io
import math
from dataclasses import FrozenInstanceError, replace
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
import torch
from agent_cases import KIND_IDS, KINDS, case, gradient, make
from toy_policies import close, responses, seeded

import rl_ebm
from rl_ebm.agents import AGENTS, OBJECTIVES, Agent, SoftQAgent, SoftQConfig
from rl_ebm.agents.shared.learner import (
    WARMUP,
    Learner,
    draw_prompts,
    immediate_log_weights,
    learning_rate,
    token_values,
)
from rl_ebm.agents.shared.on_policy import OnPolicyAgent
from rl_ebm.policies import Tabular
from rl_ebm.tokens import Batch, length_mask

in_all_kinds = pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
all_agents = pytest.mark.parametrize("name", sorted(AGENTS))
SAMPLERS = [name for name in sorted(AGENTS) if name != "exact"]
samplers = pytest.mark.parametrize("name", SAMPLERS)
OFF_POLICY = {"batch_size": 12, "replay_size": 20, "replay_batch": 6}
ON_POLICY = {"batch_size": 12, "group_size": 4}
OPTIONS = {
    "soft-q": {**OFF_POLICY, "tau": 0.5},
    "path-consistency": OFF_POLICY,
    "subtb": OFF_POLICY,
    "detailed-balance": OFF_POLICY,
    "trajectory-balance": OFF_POLICY,
    "vargrad": OFF_POLICY,
    "tree-backup": {k: v for k, v in OFF_POLICY.items() if not k.startswith("replay")},
    "monte-carlo": OFF_POLICY,
    "best-of-n": {"batch_size": 12, "n": 2},
    "sampled-teacher": {"batch_size": 12, "method": "mcmc"},
    "exact": {},
}
ON_POLICY_AGENTS = [name for name in AGENTS if issubclass(AGENTS[name].agent, OnPolicyAgent)]
OPTIONS |= {name: ON_POLICY for name in ON_POLICY_AGENTS if name not in OPTIONS}
OPTIONS |= {name: {"batch_size": 12} for name in AGENTS if name not in OPTIONS}
OTHER_METRICS = {
    "soft-q": {"losses/root_value"},
    "path-consistency": {"losses/root_value"},
    "subtb": {"losses/root_value"},
    "detailed-balance": {"losses/root_value"},
    "trajectory-balance": {"losses/log_z"},
    "vargrad": {"losses/log_z"},
    "tree-backup": {"losses/log_z", "charts/seen_responses", "charts/unseen_mass"},
    "monte-carlo": {"losses/log_mean_weight"},
}
OTHER_METRICS |= {n: {"losses/elbo"} for n in ON_POLICY_AGENTS if n not in OTHER_METRICS}
VALUES = {"soft-q", "path-consistency", "subtb", "detailed-balance", "monte-carlo"}
"""agents whose logits become q*"""


def step(agent, ebm, progress=0.5):
    batch = agent.sample()
    return agent.update(None if batch is None else ebm.score(batch), progress)


# The registry ---------------------------------------------------------------------------------


def test_every_objective_is_in_the_list_of_files_and_every_name_is_taken_once():
    folder = Path(rl_ebm.agents.__file__).parent
    files = [path for path in folder.glob("*.py") if "\nENTRIES = {" in path.read_text()]
    assert sorted(path.stem for path in files) == sorted(OBJECTIVES)
    modules = [import_module(f"rl_ebm.agents.{name}") for name in OBJECTIVES]
    assert list(AGENTS) == [name for module in modules for name in module.ENTRIES]


@all_agents
def test_every_agent_is_registered_with_its_config_and_keeps_the_protocol(name):
    entry, problem = AGENTS[name], case(KINDS[0])
    agent = make(name, problem)
    assert isinstance(agent, Agent)
    assert isinstance(agent.config, entry.config)
    assert isinstance(agent.learner, Learner)
    assert agent.logits_are_values == (name in VALUES)
    assert entry.summary
    assert "arXiv" in entry.paper
    assert list(signature(entry.agent).parameters)[:5] == [
        "ebm",
        "policy",
        "config",
        "generator",
        "teacher",
    ]
    with pytest.raises(FrozenInstanceError):
        agent.config.lr = 1.0
    teacher = problem.star() if entry.needs_teacher else None
    assert entry.agent(problem.ebm, problem.table(), teacher=teacher).config == entry.config()


@all_agents
@in_all_kinds
def test_metrics_are_detached_numbers_with_fixed_names(name, kind):
    problem = case(kind)
    metrics = step(make(name, problem, generator=seeded(), **OPTIONS[name]), problem.ebm)
    assert set(metrics) == {"losses/loss", "losses/grad_norm"} | OTHER_METRICS.get(name, set())
    for value in metrics.values():
        assert value.shape == ()
        assert not value.requires_grad
        assert math.isfinite(float(value))


@samplers
@in_all_kinds
def test_an_update_leaves_the_batch_as_it_was(name, kind):
    problem = case(kind)
    batch = problem.batch(pad=1)
    columns = [batch.tokens, batch.lengths, batch.prompt_ids, batch.reward]
    before = [column.clone() for column in columns]
    agent = make(name, problem, generator=seeded(), **OPTIONS[name])
    for _ in range(2):
        agent.update(batch, 0.5)
    for column, was in zip(columns, before, strict=True):
        close(column, was, 0.0)


# Padding and the size of batches --------------------------------------------------------------


@samplers
@pytest.mark.parametrize("kind", [KINDS[1], KINDS[3]], ids=["eos-reference", "eos-prompts"])
@pytest.mark.parametrize("network", [False, True], ids=["table", "transformer"])
def test_what_stands_past_the_end_changes_neither_loss_nor_gradient(name, kind, network):
    problem = case(kind)
    batch, found = problem.batch(), []
    past = ~length_mask(batch.lengths, problem.space.max_length)
    fills = [torch.full_like(batch.tokens, a) for a in range(3)]
    fills.append(torch.randint(3, batch.tokens.shape, generator=seeded(1)))
    for fill in fills:
        policy = problem.network().double() if network else problem.table()
        tokens = torch.where(past, fill, batch.tokens)
        padded = problem.ebm.score(replace(batch, tokens=tokens))
        metrics = make(name, problem, policy, max_grad_norm=1e12).update(padded, 0.5)
        gradients = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        found.append(torch.cat([*gradients, metrics["losses/loss"][None].double()]))
    for other in found[1:]:
        close(other, found[0], 1e-9)


@pytest.mark.parametrize("name", ["soft-q", "teacher-forcing"])
@in_all_kinds
def test_the_gradient_of_a_batch_is_the_mean_of_those_of_its_parts(name, kind):
    problem = case(kind)
    agent = make(name, problem, max_grad_norm=1e12)
    n = len(responses(problem.space))
    rows = [(p, k) for k in range(n) for p in range(len(problem.truth))]
    a, b = rows[:4], rows[4:]
    whole = gradient(agent, problem.batch(rows))
    parts = [len(x) * gradient(agent, problem.batch(x)) for x in (a, b)]
    close(whole, sum(parts) / len(rows), 1e-9)


# What is drawn --------------------------------------------------------------------------------


def test_prompts_all_take_part_where_they_fit_and_in_groups_where_they_do_not():
    for n, p, group in ((12, 3, 4), (14, 3, 4), (10, 10, 1), (7, 1, 8)):
        ids = draw_prompts(n, p, group, seeded())
        counts = torch.bincount(ids, minlength=p)
        assert len(ids) == n
        assert counts.max() - counts.min() <= 1
        assert counts.min() >= min(group, n)
    seen = set()
    for seed in range(60):
        ids = draw_prompts(11, 9, 3, seeded(seed))
        counts = torch.bincount(ids, minlength=9)
        assert len(ids) == 11
        assert sorted(counts[counts > 0].tolist()) == [3, 4, 4]
        seen |= set(ids.tolist())
    assert seen == set(range(9))
    assert len(set(draw_prompts(2, 5, 4, seeded()).tolist())) == 1


@samplers
@in_all_kinds
def test_every_row_answers_its_own_prompt_and_is_legal(name, kind):
    problem = case(kind)
    batch = make(name, problem, generator=seeded(3), **OPTIONS[name]).sample()
    assert len(batch) == 12
    problem.space.check(batch.tokens, batch.lengths)
    assert batch.reward is None
    assert set(batch.prompt_ids.tolist()) == set(range(len(problem.truth)))


# Immediate weights and errors -----------------------------------------------------------------


@in_all_kinds
def test_immediate_log_weights_are_those_of_the_definition(kind):
    problem = case(kind)
    batch = problem.batch(pad=1)
    r = immediate_log_weights(problem.ebm, batch, None)
    assert r.dtype == torch.float32
    for i, (p, n) in enumerate(zip(batch.prompt_ids.tolist(), batch.lengths.tolist(), strict=True)):
        y = tuple(batch.tokens[i, :n].tolist())
        want = [problem.truth[p].r[y[:t]][a] for t, a in enumerate(y)]
        want += [0.0] * (problem.space.max_length - n)
        close(r[i].double(), torch.tensor(want, dtype=torch.float64), 2e-6)
    bare = Batch(batch.tokens, batch.lengths, batch.prompt_ids)
    with pytest.raises(ValueError, match=r"the batch has no rewards: call ebm\.score\(batch\)"):
        immediate_log_weights(problem.ebm, bare, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"explore": -0.1}, r"explore must be in \[0, 1\], got -0.1"),
        ({"explore": 1.1}, r"explore must be in \[0, 1\], got 1.1"),
        ({"epsilon": 1.1}, r"epsilon must be in \[0, 1\], got 1.1"),
        ({"lam": 1.5}, r"lam must be in \[0, 1\], got 1.5"),
        ({"lam": math.nan}, r"lam must be in \[0, 1\], got nan"),
        ({"tau": 0.0}, r"tau must be in \(0, 1\], got 0.0"),
        ({"tau": 1.01}, r"tau must be in \(0, 1\], got 1.01"),
        ({"n_step": 0}, "n_step must be >= 1, or None for lambda-returns, got 0"),
        ({"replay_size": -1}, "replay_size and replay_batch must be >= 0"),
        ({"replay_size": 4, "replay_batch": -1}, "replay_size and replay_batch must be >= 0"),
        ({"replay_batch": 4}, "replay_batch needs replay_size > 0"),
    ],
)
def test_soft_q_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SoftQConfig(**options)


def test_soft_q_takes_options_at_the_edge_of_their_range():
    for options in (
        {"batch_size": 1, "explore": 0, "lam": 0, "n_step": 1},
        {"explore": 1, "lam": 1, "tau": 1, "replay_size": 1, "replay_batch": 1},
    ):
        problem = case(KINDS[0])
        step(SoftQAgent(problem.ebm, problem.table(), SoftQConfig(**options)), problem.ebm)


def test_values_of_tokens_are_zero_past_the_end_even_where_rows_are_infinite():
    rows = torch.randn(2, 3, 4, generator=seeded())
    rows[1, 1:] = -math.inf
    batch = Batch(torch.tensor([[3, 0, 1], [2, 1, 1]]), torch.tensor([3, 1]), torch.zeros(2).long())
    want = [[float(rows[0, t, a]) for t, a in enumerate((3, 0, 1))], [float(rows[1, 0, 2]), 0, 0]]
    close(token_values(rows, batch), torch.tensor(want), 0.0)


# The learner ----------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_peaks_and_ends_at_zero():
    assert learning_rate(2.0, 0.0) == pytest.approx(0.2)
    assert learning_rate(2.0, WARMUP / 2) == pytest.approx(2 * 0.55)
    assert learning_rate(2.0, WARMUP) == 2.0
    assert learning_rate(2.0, (1 + WARMUP) / 2) == pytest.approx(1.0)  # half of the cosine
    assert learning_rate(2.0, 1.0) == pytest.approx(0.0, abs=1e-15)
    assert learning_rate(2.0, -3.0) == learning_rate(2.0, 0.0)
    assert learning_rate(2.0, 7.0) == learning_rate(2.0, 1.0)
    grid = [learning_rate(1.0, i / 1000) for i in range(1001)]
    peak = round(1000 * WARMUP)
    assert grid[: peak + 1] == sorted(grid[: peak + 1])
    assert grid[peak:] == sorted(grid[peak:], reverse=True)


def test_a_step_is_adams_at_the_scheduled_rate_with_the_gradient_clipped():
    space = rl_ebm.TokenSpace(3, 1)
    policy = Tabular(space, generator=seeded(), dtype=torch.float64)
    x, m, v = policy.table.detach().clone(), 0.0, 0.0
    learner = Learner(policy, 0.3, 2.0)
    for t, (progress, scale) in enumerate(((0.0, 5.0), (0.4, 0.1), (0.9, 1.0)), start=1):
        g = scale * torch.tensor([[[3.0, -4.0, 0.0]]], dtype=torch.float64)
        metrics = learner.descend((g * policy.table).sum(), progress)
        close(float(metrics["losses/grad_norm"]), 5 * scale)
        g = g * min(1.0, 2 / (5 * scale))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        x -= learning_rate(0.3, progress) * step
        assert learner.lr == learning_rate(0.3, progress)
        close(policy.table.detach(), x, 1e-6)


def test_frozen_parameters_stay():
    problem = case(KINDS[0])
    policy = problem.network()
    policy.head.weight.requires_grad_(False)
    before = policy.head.weight.clone()
    for name in SAMPLERS:
        step(make(name, problem, policy, seeded(), batch_size=8), problem.ebm)
    close(policy.head.weight, before, 0.0)


# Continuation ---------------------------------------------------------------------------------


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@all_agents
@pytest.mark.parametrize("network", [False, True], ids=["table", "transformer"])
def test_equal_generators_give_equal_runs_and_a_saved_one_goes_on_exactly(name, network):
    problem = case(KINDS[3])

    def start(seed):
        policy = problem.network(seed) if network else problem.table(seed)
        generator = seeded(seed)
        return make(name, problem, policy, generator, **OPTIONS[name]), generator

    (a, generator), (b, _) = start(1), start(1)
    for i in range(3):
        ours, theirs = (step(x, problem.ebm, i / 6) for x in (a, b))
        assert ours == theirs
    close(weights(a.policy), weights(b.policy), 0.0)

    file = io.BytesIO()
    torch.save([a.policy.state_dict(), a.state_dict(), generator.get_state()], file)
    file.seek(0)
    policy, state, draws = torch.load(file, weights_only=True)
    c, generator = start(2)
    step(c, problem.ebm)
    c.policy.load_state_dict(policy)
    c.load_state_dict(state)
    generator.set_state(draws)
    for i in range(3, 6):
        ours, theirs = (step(x, problem.ebm, i / 6) for x in (b, c))
        assert ours == theirs
    close(weights(b.policy), weights(c.policy), 0.0)
