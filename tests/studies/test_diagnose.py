"""The diagnosis: parts that add up to the exact KL, and advice from the largest."""

from __future__ import annotations

import json
import math

import pytest
import torch
from toy_policies import seeded

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.cli import commands as cli
from rl_ebm.policies import Tabular, Transformer, TransformerConfig
from rl_ebm.rewards import Table
from rl_ebm.studies.diagnose import diagnose, laws, policy_of
from rl_ebm.studies.problems import problems

SPACE = rl_ebm.TokenSpace(3, 3)


def run_of(tmp_path, agent, steps=300, network="tabular", seed=1, beta=1.0, space=SPACE, **options):
    scores = 2 * torch.randn(space.num_sequences, generator=seeded(seed), dtype=torch.float64)
    ebm = rl_ebm.EBM(space, scores, beta, rl_ebm.policies.Uniform(space))
    assert isinstance(ebm.reward_model, Table)
    size = {} if agent == "exact" else {"batch_size": 512}
    config = AGENTS[agent].config(lr=0.05, **(size | options))
    rl_ebm.train(
        ebm, agent, tmp_path / "run", options=config, network=network, steps=steps, progress=False
    )
    return tmp_path / "run", ebm


@pytest.mark.slow
def test_a_wrong_objective_is_told_from_a_run_that_is_not_over(tmp_path):
    run, ebm = run_of(tmp_path / "wrong", "policy-gradient", kl_estimator="k3", kl_in="loss")
    found = diagnose(run, seconds=0.5)
    (case,) = problems(rl_ebm.solve(ebm))
    policy, _ = rl_ebm.load(run)
    total = float(rl_ebm.divergences.kl(case.log_target, laws(policy, ebm)[0]))
    assert found.total == pytest.approx(total, abs=1e-9)
    parts = (found.objective, found.capacity, found.optimisation)
    assert sum(parts) == pytest.approx(found.total, abs=1e-9)
    assert found.objective > 0.05
    assert found.capacity == 0  # a table can be any law
    assert found.fit_steps == 0
    assert abs(found.optimisation) < 0.02
    assert "objective is the problem" in found.advice

    run, _ = run_of(tmp_path / "short", "policy-gradient", steps=20)
    found = diagnose(run, seconds=0.5)
    assert found.objective == 0
    assert found.optimisation > 0.05
    assert found.optimisation == pytest.approx(found.total, abs=1e-9)
    assert "Optimisation is the problem" in found.advice

    run, _ = run_of(tmp_path / "right", "exact", steps=900)
    found = diagnose(run, seconds=0.5)
    assert found.total < 1e-3
    assert "Nothing to mend" in found.advice


@pytest.mark.slow
def test_a_network_that_is_too_small_is_told(tmp_path):
    # 256 random scores are far beyond two dimensions: local optima differ by 0.3 nats, all lose 1.
    small = TransformerConfig(layers=1, heads=1, dim=2, hidden=1)
    run, _ = run_of(tmp_path, "exact", 400, small, space=rl_ebm.TokenSpace(4, 4))
    found = diagnose(run, seconds=2.0)
    assert found.capacity > 0.7
    assert found.capacity > abs(found.optimisation)
    assert "network is the problem" in found.advice


@pytest.mark.slow
def test_an_objective_that_ends_on_the_boundary_has_no_further_parts(tmp_path):
    run, _ = run_of(tmp_path, "best-of-n", steps=200)
    found = diagnose(run, seconds=1.0)
    assert found.objective == math.inf
    assert found.capacity is None
    assert found.to_dict()["objective"] == "Infinity"
    assert "objective is the problem" in found.advice
    assert found.missing_mass > 0.1
    assert found.missing[0].target > 10 * found.missing[0].policy
    assert len(found.missing[0].sequence.split()) == 3
    assert "missing" in str(found)


@pytest.mark.slow
def test_the_learned_log_z_is_held_against_the_exact_one(tmp_path):
    run, ebm = run_of(tmp_path / "a", "trajectory-balance", steps=600)
    assert diagnose(run, 1.0).log_z_error < 0.02
    run, _ = run_of(tmp_path / "b", "soft-q", steps=600)
    assert diagnose(run, 1.0).log_z_error < 0.02
    run, _ = run_of(tmp_path / "c", "trajectory-balance", steps=1)
    log_z = float(rl_ebm.solve(ebm).log_z)
    assert diagnose(run, 1.0).log_z_error == pytest.approx(abs(log_z), abs=0.2)
    run, _ = run_of(tmp_path / "d", "policy-gradient", steps=1)
    assert diagnose(run, 1.0).log_z_error is None


def test_what_was_hardly_drawn_is_said(tmp_path):
    run, _ = run_of(tmp_path, "policy-gradient", steps=1, batch_size=8, group_size=4)
    found = diagnose(run, 1.0)
    assert found.starved_mass > 0.9  # 8 draws, 27 responses of about equal chance
    run, _ = run_of(tmp_path / "more", "policy-gradient", steps=20)
    assert diagnose(run, 1.0).starved_mass < 0.05


@pytest.mark.slow
def test_what_the_reference_draws_is_not_starved_by_a_policy_that_narrows(tmp_path):
    run, _ = run_of(tmp_path, "best-of-n", steps=150, source="reference", n=64)
    found = diagnose(run, 1.0)
    assert found.starved_mass == 0.0  # 27 responses, 2,800 draws of each
    assert found.missing_mass > 0.2


@pytest.mark.slow
def test_the_moving_average_of_dpg_is_its_log_z(tmp_path):
    run, _ = run_of(tmp_path, "dpg", steps=400)
    assert diagnose(run, 1.0).log_z_error < 0.05


def test_the_policy_of_a_law_has_that_law():
    for shape, prompts in (((3, 3, None), None), ((3, 3, 1), [[0], [1]])):
        space = rl_ebm.TokenSpace(*shape)
        scores = torch.randn(2 if prompts else 1, space.num_sequences, generator=seeded())

        def reward(tokens, lengths, ids=None, space=space, scores=scores):
            row = torch.zeros_like(lengths) if ids is None else ids
            return scores[row, space.sequence_indices(tokens, lengths)]

        ebm = rl_ebm.EBM(space, reward, 1.0, prompts=prompts)
        cases = problems(rl_ebm.solve(ebm))
        want = torch.stack([case.log_target for case in cases])
        policy = policy_of(want, cases, ebm)
        assert isinstance(policy, Tabular)
        torch.testing.assert_close(laws(policy, ebm), want)
        torch.manual_seed(0)
        network = Transformer(space, TransformerConfig(1, 1, 4, 4), prompts)
        torch.testing.assert_close(
            laws(network, ebm).exp().sum(1), torch.ones(len(cases)).double(), atol=1e-5, rtol=0
        )


@pytest.mark.slow
def test_a_network_is_fitted_to_the_fixed_point(tmp_path):
    network = TransformerConfig(layers=1, heads=1, dim=16, hidden=16)
    run, _ = run_of(tmp_path, "policy-gradient", steps=5, network=network)
    found = diagnose(run, seconds=3.0)
    assert found.fit_steps > 20
    assert found.capacity < 0.5 * found.total  # the fit is far better than the run
    parts = (found.objective, found.capacity, found.optimisation)
    assert sum(parts) == pytest.approx(found.total, abs=1e-9)


def test_the_command_prints_the_parts(tmp_path, capsys):
    run, _ = run_of(tmp_path, "teacher-forcing", steps=20)
    assert cli.main(["diagnose", str(run), "--seconds", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agent"] == "teacher-forcing"
    assert found["total"] == pytest.approx(
        found["objective"] + found["capacity"] + found["optimisation"], abs=1e-9
    )
    assert cli.main(["diagnose", str(run), "--seconds", "0.5"]) == 0
    assert "optimisation and sampling" in capsys.readouterr().out
    assert cli.main(["diagnose", str(run), "--seconds", "0"]) == 2
    assert cli.main(["diagnose", str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("arguments", [{"seconds": -1.0}, {"examples": -1}])
def test_numbers_out_of_range_are_told_before_any_work(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be"):
        diagnose("nowhere", **arguments)
