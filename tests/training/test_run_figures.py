"""Figures of a run against enumeration: curves, counts of calls, and what a diagnosis says."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from agent_cases import KINDS, case, log_probs
from toy_policies import responses, seeded

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.studies.diagnose import diagnose
from rl_ebm.training.charts import drawn_charts
from rl_ebm.training.defaults import PRETRAINED, default_options, is_pretrained
from rl_ebm.training.reward_calls import calls_of

SPACE = rl_ebm.TokenSpace(2, 2)
PROMPTS = [[], [5], [6, 7]]


def counted(calls, scores):
    """A reward function of the user's, with one score for each response to each prompt."""

    def reward(tokens, lengths, prompt_ids=None):
        calls.append(len(tokens))
        ids = torch.zeros_like(lengths) if prompt_ids is None else prompt_ids
        return scores[ids, SPACE.sequence_indices(tokens, lengths)]

    return reward


def test_the_bounds_of_log_z_that_are_logged_are_those_of_the_policy(tmp_path):
    problem = case(KINDS[1], beta=0.7)
    policy = problem.table()
    config = AGENTS["policy-gradient"].config(batch_size=64, lr=1e-4)
    rl_ebm.train(
        problem.ebm, "policy-gradient", tmp_path / "run", policy=policy, options=config, steps=1
    )
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("eval/elbo")]
    star, pi = problem.truth[0].log_probs, log_probs(policy, problem.space)[0]
    log_w = [s + problem.truth[0].log_z - p for s, p in zip(star, pi, strict=True)]
    means = {
        "eval/elbo": math.fsum(math.exp(p) * w for p, w in zip(pi, log_w, strict=True)),
        "eval/eubo": math.fsum(math.exp(s) * w for s, w in zip(star, log_w, strict=True)),
    }
    assert means["eval/eubo"] - means["eval/elbo"] > 0.1
    for name, want in means.items():
        assert float(rows[-1][name]) == pytest.approx(want, rel=1e-5), name


def test_no_reward_of_the_users_is_called_for_curves_alone():
    scores = torch.randn(3, 4, generator=seeded(), dtype=torch.float64)
    calls: list[int] = []
    entry = AGENTS["best-of-n"]
    options = entry.config(source="reference", batch_size=12)
    for given in (scores, counted(calls, scores)):
        ebm = rl_ebm.EBM(SPACE, given, 0.5, Uniform(SPACE), PROMPTS)
        calls.clear()
        policy = Tabular(SPACE, PROMPTS, scale=1.0, generator=seeded(1))
        agent = entry.agent(ebm, policy, options, seeded(), None)
        assert agent.own_rows is None
        found = drawn_charts(agent, ebm, 1)
        assert bool(found) == (given is scores)
        assert not calls
        if found:
            pi = torch.tensor(log_probs(policy, SPACE, 3)).exp()
            spread = float(scores.std()) / math.sqrt(256)
            want = float((pi * scores).sum(1).mean())
            assert abs(float(found["charts/episodic_return"]) - want) < 5 * spread


@pytest.mark.parametrize("prompts", [None, PROMPTS])
def test_calls_that_solving_takes_are_those_of_all_prompts(prompts):
    calls: list[int] = []
    ebm = rl_ebm.EBM(SPACE, counted(calls, torch.zeros(3, 4).double()), prompts=prompts)
    calls.clear()
    solution = rl_ebm.solve(ebm)
    assert solution.mode == "exact-tree"
    assert calls_of(solution) == sum(calls) == ebm.num_prompts * len(responses(SPACE))
    table = rl_ebm.EBM(SPACE, torch.zeros(3, 4), prompts=PROMPTS)
    assert calls_of(rl_ebm.solve(table)) == 0


def run_of(tmp_path, agent, **options):
    scores = torch.randn(2, 4, generator=seeded(), dtype=torch.float64)
    ebm = rl_ebm.EBM(SPACE, scores, 1.0, Uniform(SPACE), [[0], [1]])
    config = AGENTS[agent].config(lr=1e-4, **options)
    rl_ebm.train(ebm, agent, tmp_path / "run", options=config, network="tabular", steps=1)
    return tmp_path / "run", ebm


@pytest.mark.parametrize("start", [-5.0, 9.0])
def test_an_error_of_log_z_has_no_sign(tmp_path, start):
    run, ebm = run_of(tmp_path, "trajectory-balance", batch_size=16, log_z_start=start)
    log_z = rl_ebm.solve(ebm).log_z
    want = float((start - log_z).abs().max())
    assert diagnose(run, 0.1).log_z_error == pytest.approx(want, abs=0.01)


def test_a_million_weights_are_those_of_a_trained_model():
    kind = AGENTS["soft-q"].config
    for size in (PRETRAINED - 1, PRETRAINED):
        policy = torch.nn.Linear(size, 1, bias=False)
        assert is_pretrained(policy) == (size == PRETRAINED)
        assert (default_options(kind, policy)[0] == kind()) == (size < PRETRAINED)
        assert default_options(kind, None)[0] == kind()
