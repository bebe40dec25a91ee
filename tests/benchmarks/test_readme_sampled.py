"""The README's tables and tuning on tasks beyond enumeration: estimates keep their intervals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.readme import methods, tables, tune
from benchmarks.support.runs import geometric_bracket
from rl_ebm import solve, verify
from rl_ebm.envs import TASKS, make_task
from rl_ebm.policies import Uniform
from rl_ebm.statistics.interval import Interval
from rl_ebm.studies.bench import Plan, Problem

KEY = "kl_policy_target"


def look(agent, seed, kl, half=None):
    row = {"task": "potts", "agent": agent, "seed": seed, KEY: kl}
    if half is not None:
        row |= {"samples": 50, f"{KEY}_low": kl - half, f"{KEY}_high": kl + half}
    return row


def test_the_bracket_of_a_geometric_mean():
    looks = [look("a", 0, 1.0, 0.5), look("a", 1, 4.0, 1.0)]
    low, high = geometric_bracket(looks, KEY, 1e-9)
    assert (low, high) == (pytest.approx(math.sqrt(1.5)), pytest.approx(math.sqrt(7.5)))
    assert geometric_bracket([look("a", 0, 0.1, 0.2)], KEY, 1e-4)[0] == pytest.approx(1e-4)
    assert geometric_bracket([look("a", 0, 0.5)], KEY, 1e-4) == (0.5, 0.5)


def test_what_samples_do_not_tell_apart_has_no_single_winner():
    rows = [look("a", 0, 1.0, 0.1), look("b", 0, 1.15, 0.1), look("c", 0, 1.5, 0.1)]
    assert methods.best(rows, ("a", "b", "c"), 1) == {"a", "b"}
    assert methods.best([look("a", 0, 1.0), look("b", 0, 1.0001)], ("a", "b"), 1) == {"a"}
    assert methods.shown(rows, "a", 1).endswith("[0.9, 1.1]")
    assert methods.shown(rows, "a", 2) == "failed"
    plan = Plan(("vargrad", "ppo"), (Problem("potts"),), (0,))
    mine = [look("vargrad", 0, 1.0, 0.1), look("ppo", 0, 1.15, 0.1)]
    assert methods.table(plan, mine).count("**") == 4
    assert "[1.05, 1.25]" in methods.when(plan, mine)
    assert set(methods.TASKS) >= {"potts", "phrases"}
    assert set(methods.TASKS) == set(TASKS)


def test_tuning_shows_what_it_chose_by():
    rows = [look("a", 0, 1.0, 0.1)]
    assert tune.shown(rows, "a", 1) == "1 [0.9, 1.1]"
    assert tune.shown(rows, "a", 2) == "inf"
    assert tune.shown([look("a", 0, 1.0)], "a", 1) == "1"


def test_a_table_takes_a_named_task():
    ebm, told = tables.problem(tables.Options(Path("phrases")))
    assert (ebm.beta, told) == (1.0, "a named task")
    assert ebm.space.eos_id == 0
    assert tables.cell(0.25) == 0.25
    assert tables.cell(Interval(0.25, 0.2, 0.3, 0.95, "asymptotic")) == "0.25 [0.2, 0.3]"


def test_a_table_of_estimates(capsys, monkeypatch):
    def untrained(ebm, agent, *, config, seed):
        assert agent != "exact"
        return None, verify(Uniform(ebm.space), solve(ebm), samples=config.samples)

    small = make_task("potts", vocab_size=4, max_length=12)  # 2e7 states
    monkeypatch.setattr(tables, "problem", lambda options: (small, "a named task"))
    monkeypatch.setattr(tables, "FOUR", ("policy-gradient", "exact"))
    monkeypatch.setattr("rl_ebm.train", untrained)
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    tables.main(tables.Options(Path("potts"), samples=10, dry=True))
    said = capsys.readouterr().out
    assert "| policy-gradient |" in said
    assert "| exact |" not in said
    assert "linf visited, depth 11" in said
    assert "estimates from 10 exact samples" in said
