"""The audit: every objective's fixed point against the EBM, in numbers that can be summed up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from agent_cases import KIND_IDS, KINDS, case
from toy_policies import close, seeded

import rl_ebm
from rl_ebm import divergences
from rl_ebm.agents import AGENTS
from rl_ebm.cli import commands as cli
from rl_ebm.envs import make_task
from rl_ebm.fixed_points import boundary
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.soft_bellman import log_policy, sequence_log_probs
from rl_ebm.studies.audit import MEASURES, any_of, audit, to_json, to_text
from rl_ebm.studies.problems import problems

SIX6 = Path(__file__).parents[3] / "shared" / "data" / "six6_ref_r1.tsv"
SOMETIMES = {"policy-gradient", "grpo", "best-of-n", "on-policy-distillation", "dpo", "ipo"}
ALWAYS_TARGET = set(AGENTS) - SOMETIMES
REPLAY = {"batch_size": 512, "replay_size": 8192, "replay_batch": 512}
WITH_REPLAY = ("soft-q", "vargrad")  # of values and of laws: the others share their replay


@pytest.fixture(autouse=True)
def short_flows(monkeypatch):
    monkeypatch.setattr(boundary, "STEPS", 60)


@pytest.fixture
def policy_gradients(monkeypatch):
    """The audit of these alone, with the options that the test asks for."""

    def keep(**options):
        entry = AGENTS["policy-gradient"]._replace(variants=(options,))
        monkeypatch.setattr("rl_ebm.studies.audit.AGENTS", {"policy-gradient": entry})

    return keep


def line_of(lines, objective, **options):
    (found,) = [
        x for x in lines if x["objective"] == objective and options.items() <= x["options"].items()
    ]
    return found


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=name, marks=[pytest.mark.slow] if name != "fixed" else [])
        for kind, name in zip(KINDS, KIND_IDS, strict=True)
    ],
)
def test_every_objective_is_audited_with_every_option_that_moves_it(kind):
    problem = case(kind)
    lines = audit(rl_ebm.solve(problem.ebm))
    assert {x["objective"] for x in lines} == set(AGENTS)
    assert len(lines) == sum(len(entry.variants) for entry in AGENTS.values())
    for x in lines:
        if x["objective"] in ALWAYS_TARGET:
            assert x["is_target"], x
        if x["is_target"]:
            assert max(abs(x[k]) for k in ("tv", "kl_fixed_point_target")) < 1e-8
            assert not x["degenerate"]
        if x["degenerate"] and x["tv"] is not None:
            assert x["kl_target_fixed_point"] == math.inf
            assert not x["is_target"]
    targets = {
        tuple(x["options"].values())[:3]
        for x in lines
        if x["objective"] == "policy-gradient" and x["is_target"]
    }
    assert targets == {
        ("k1", "reward", "token"),
        ("k1", "reward", "sequence"),
        ("k2", "loss", "sequence"),
    }
    assert json.loads(json.dumps(to_json(lines)))
    assert len(to_text(lines).splitlines()) == len(lines) + 1


@pytest.mark.slow
def test_the_best_response_alone_is_not_the_ebm_however_peaked_that_is():
    lines = audit(rl_ebm.solve(make_task("random", vocab_size=3, max_length=2, beta=1e-3)))
    end = line_of(lines, "best-of-n", source="policy")
    assert end["tv"] < 1e-8
    assert end["degenerate"]
    assert not end["is_target"]
    assert line_of(lines, "soft-q")["is_target"]


def test_a_verdict_is_known_where_one_says_yes_or_all_say_no():
    assert any_of([False, None, True]) is True
    assert any_of([False, None]) is None
    assert any_of([False, False]) is False


def test_the_measures_are_sums_over_the_responses(policy_gradients):
    policy_gradients(kl_estimator="k3", kl_in="loss", kl_level="token", advantage="none")
    problem = case(((3, 3, 1), None, True))
    (state,) = problems(rl_ebm.solve(problem.ebm))
    (truth,) = problem.truth
    found = line_of(
        audit(rl_ebm.solve(problem.ebm)),
        "policy-gradient",
        kl_estimator="k3",
        kl_in="loss",
        kl_level="token",
        advantage="none",
    )
    config = AGENTS["policy-gradient"].config(kl_estimator="k3", kl_in="loss")
    law = AGENTS["policy-gradient"].fixed_point(config, state).log_law.tolist()
    target = truth.log_probs
    ref = state.log_ref_responses.tolist()
    reward = (state.g_responses * problem.ebm.beta).tolist()
    rows = list(zip(law, target, ref, reward, strict=True))
    want = {
        "tv": math.fsum(abs(math.exp(a) - math.exp(b)) for a, b, _, _ in rows) / 2,
        "kl_fixed_point_target": math.fsum(math.exp(a) * (a - b) for a, b, _, _ in rows),
        "kl_target_fixed_point": math.fsum(math.exp(b) * (b - a) for a, b, _, _ in rows),
        "expected_reward": math.fsum(math.exp(a) * r for a, _, _, r in rows),
        "kl_reference": math.fsum(math.exp(a) * (a - c) for a, _, c, _ in rows),
    }
    assert set(want) == set(MEASURES)
    for key, value in want.items():
        assert found[key] == pytest.approx(value, abs=1e-9), key
    assert found["tv"] > 0.01
    # Rewards are those of the EBM, in enumeration order.
    tokens, lengths = problem.space.sequences()
    ids = torch.zeros_like(lengths)
    reward = torch.tensor(reward, dtype=torch.float64)
    close(reward, problem.ebm.reward(tokens, lengths, ids).double(), 1e-9)


@pytest.mark.slow
def test_with_prompts_the_measures_are_means(policy_gradients):
    space = rl_ebm.TokenSpace(2, 2)
    scores = torch.randn(2, 4, generator=seeded(3), dtype=torch.float64)
    options = {"kl_estimator": "k2", "kl_in": "loss", "kl_level": "token", "advantage": "none"}
    policy_gradients(**options)

    def found(rows, prompts):
        ebm = rl_ebm.EBM(space, rows, 0.5, Uniform(space), prompts)
        return line_of(audit(rl_ebm.solve(ebm)), "policy-gradient", **options)

    both, parts = found(scores, [[0], [1]]), [found(scores[i], None) for i in (0, 1)]
    for key in MEASURES:
        assert both[key] == pytest.approx((parts[0][key] + parts[1][key]) / 2, abs=1e-12)
    assert abs(parts[0]["tv"] - parts[1]["tv"]) > 1e-3


@pytest.mark.slow
def test_the_command_prints_a_table_or_json(capsys):
    args = ["audit", "--task", "random", "--vocab-size", "2", "--max-length", "2", "--beta", "0.5"]
    assert cli.main([*args, "--reference", "uniform", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    keys = {"objective", "options", "degenerate", "is_target", *MEASURES}
    assert all(keys <= set(x) for x in lines)
    grpo, weighed = (x for x in lines if x["objective"] == "grpo")
    assert weighed["options"] == grpo["options"] | {"kl_weight": "ratio"}
    assert weighed["tv"] != grpo["tv"]
    assert grpo["options"] == {
        "kl_estimator": "k3",
        "kl_in": "loss",
        "kl_level": "token",
        "advantage": "group-std",
    }
    assert line_of(lines, "best-of-n", source="policy")["kl_target_fixed_point"] == "Infinity"
    assert cli.main([*args, "--reference", "uniform"]) == 0
    text = capsys.readouterr().out
    assert "the EBM" in text
    assert "degenerate" in text


@pytest.mark.slow
@pytest.mark.skipif(not SIX6.exists(), reason="needs the table six6_ref_r1.tsv of shared/data")
def test_a_table_of_65536_sequences_is_audited(capsys):
    args = ["--normalise", "minmax", "--beta", "0.1", "--reference", "uniform", "--json"]
    assert cli.main(["audit", "--table", str(SIX6), *args]) == 0
    lines = json.loads(capsys.readouterr().out)
    soft_q = line_of(lines, "soft-q")
    assert soft_q["is_target"]
    hyperbolic = line_of(
        lines,
        "policy-gradient",
        kl_estimator="k3",
        kl_in="loss",
        kl_level="token",
        advantage="none",
    )
    # By another route: numpy, one state after the other, lambda by bisection.
    import csv

    import numpy as np

    with open(SIX6, newline="") as file:
        rows = sorted(
            (r["sequence"], float(r["score"])) for r in csv.DictReader(file, delimiter="\t")
        )
    q = np.array([score for _, score in rows])
    q = (q - q.min()) / (q.max() - q.min()) / 0.1
    log_law = np.zeros(len(q))
    value, width = q, 1
    while len(value) > 1:
        value = value.reshape(-1, 4)
        best = value.max(1, keepdims=True)
        low, high = np.zeros_like(best), np.ones_like(best)
        for _ in range(80):
            middle = (low + high) / 2
            over = (0.25 / (middle + best - value)).sum(1, keepdims=True) > 1
            low, high = np.where(over, middle, low), np.where(over, high, middle)
        pi = 0.25 / (low + best - value)
        log_law += np.repeat(np.log(pi).ravel(), width)
        value, width = (pi * value).sum(1), 4 * width
    p, star = np.exp(log_law), np.exp(q - q.max())
    star /= star.sum()
    assert p.sum() == pytest.approx(1, abs=1e-9)
    assert hyperbolic["tv"] == pytest.approx(np.abs(p - star).sum() / 2, abs=1e-8)


# The real agents ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("policy-gradient", {"kl_estimator": "k2", "kl_in": "loss"}),
        ("policy-gradient", {"kl_estimator": "k3", "kl_in": "loss"}),
        ("policy-gradient", {"kl_estimator": "k3", "kl_in": "loss", "kl_level": "sequence"}),
        ("policy-gradient", {"kl_estimator": "k1", "kl_in": "loss"}),
        ("grpo", {"batch_size": 1024}),
        ("grpo", {"batch_size": 1024, "kl_weight": "ratio"}),
        ("best-of-n", {"source": "reference"}),
        ("on-policy-distillation", {"support": "token", "kl_in": "loss", "kl_estimator": "k2"}),
        *((name, {}) for name in ("on-policy-distillation", "dpo")),
        ("ipo", {}),
        *((name, {}) for name in sorted(ALWAYS_TARGET)),
        *((name, REPLAY) for name in WITH_REPLAY),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())),
)
def test_the_agent_with_a_table_ends_at_its_fixed_point(name, options):
    entry, space = AGENTS[name], rl_ebm.TokenSpace(3, 3)
    reference = Tabular(space, scale=0.7, generator=seeded(0))
    ebm = rl_ebm.EBM(space, torch.randn(27, generator=seeded(1)), 1.0, reference)
    solution = rl_ebm.solve(ebm)
    (problem,) = problems(solution)
    size = {} if name == "exact" else {"batch_size": 1024}
    config = entry.config(**(size | options), lr=0.05)
    policy = Tabular.from_tables([t[0].detach() for t in reference.tables()], space)
    agent = entry.agent(ebm, policy, config, seeded(2), solution)
    steps = 500
    for k in range(steps):
        batch = agent.sample()
        agent.update(None if batch is None else ebm.score(batch), k / steps)
    with torch.no_grad():
        log_law = sequence_log_probs([log_policy(t[0].double()) for t in policy.tables()], space)
    point = entry.fixed_point(config, problem)
    tv = 0.5 * float((log_law.exp() - point.log_law.exp()).abs().sum())
    away = 0.5 * float((log_law.exp() - problem.log_target.exp()).abs().sum())
    assert tv < 0.02
    if point.log_law is not problem.log_target:
        assert away > 0.04


@pytest.mark.slow
def test_with_responses_that_end_early_grpo_ends_at_its_own_fixed_point():
    space = rl_ebm.TokenSpace(3, 4, 0)
    reference = Tabular(space, scale=0.7, generator=seeded(0))
    weights = torch.randn(space.num_sequences, generator=seeded(1))

    def reward(tokens, lengths):
        return weights[space.sequence_indices(tokens, lengths)] + lengths

    ebm = rl_ebm.EBM(space, reward, 1.0, reference)
    (problem,) = problems(rl_ebm.solve(ebm))
    entry = AGENTS["grpo"]
    laws = {}
    for reduce_tokens in ("mean", "sum"):
        config = entry.config(batch_size=1024, lr=0.05, epochs=1, reduce_tokens=reduce_tokens)
        laws[reduce_tokens] = entry.fixed_point(config, problem).log_law
    policy = Tabular.from_tables([t[0].detach() for t in reference.tables()], space)
    config = entry.config(batch_size=1024, lr=0.05, epochs=1)
    agent = entry.agent(ebm, policy, config, seeded(2), None)
    for k in range(800):
        agent.update(ebm.score(agent.sample()), k / 800)
    with torch.no_grad():
        tables = [t[0].double() for t in policy.tables()]
        mask = space.action_mask()
        rows = [log_policy(t.masked_fill(~mask[d], -math.inf)) for d, t in enumerate(tables)]
        log_law = sequence_log_probs(rows, space)
    assert float(divergences.tv(log_law, laws["mean"])) < 0.012
    assert float(divergences.tv(log_law, laws["sum"])) > 0.025
    assert float(divergences.tv(log_law, problem.log_target)) > 0.04
