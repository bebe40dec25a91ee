"""The comparison with other libraries: its stopwatch, its table, and runs of who is here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peer_cases import Clock, contender, look_of, row, run_of

from benchmarks.peers import watch as watch_module
from benchmarks.peers.__main__ import Options, main
from benchmarks.peers.crossings import crossed, crossing, look_at, speed, winner
from benchmarks.peers.entries import CONTENDERS, find
from benchmarks.peers.files import Results, assemble, read_rows
from benchmarks.peers.policies import PrefixPolicy
from benchmarks.peers.processes import Run, start
from benchmarks.peers.report import picture, remarks, settings, table
from benchmarks.peers.trial import fastest
from benchmarks.peers.watch import TimeUp, Watch, grid
from benchmarks.peers.with_sb3 import flat_observations
from rl_ebm import solve, verify
from rl_ebm.envs import make_task
from rl_ebm.policies import Tabular
from rl_ebm.studies.bench import Problem

ROOT = Path(__file__).parents[2]
EBM = make_task("random", vocab_size=2, max_length=3, reference="uniform")
SOLUTION = solve(EBM)


def test_the_stopwatch_stands_still_while_it_looks(monkeypatch):
    clock = Clock()

    def slow_verify(policy, solution, **known):
        clock.now += 100.0
        return verify(policy, solution, **known)

    monkeypatch.setattr(watch_module, "verify", slow_verify)
    watch = Watch(SOLUTION, limit=10.0, looks=4, clock=clock)
    clock.now = 50.0  # before the start nothing counts
    watch.start(14)

    def train():
        for updates in range(1, 100):
            clock.now += 1.0
            watch(SOLUTION, updates, 16 * updates)

    with pytest.raises(TimeUp):
        train()
    assert watch.seconds == 10.0
    assert [r["seconds"] for r in watch.rows][-1] == 10.0
    assert [r["updates"] for r in watch.rows][-1] == 10
    assert watch.rows[0]["seconds"] == 1.0, "the first update is always looked at"
    assert all(r["reward_calls"] == 16 * r["updates"] for r in watch.rows)
    assert all(abs(r["kl_policy_target"]) < 1e-9 for r in watch.rows)


def test_looking_moves_no_generator():
    watch = Watch(SOLUTION, limit=1.0)
    watch.start(0)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    watch(SOLUTION, 1, 1)
    assert torch.equal(torch.rand(3), expected)


def test_the_grid_ends_at_the_limit_and_has_its_third():
    times = grid(180.0, 50)
    assert times == sorted(times)
    assert times[-1] == 180.0
    assert 60.0 in times
    assert 0.5 < times[0] < 1.0
    assert len(times) <= 60
    assert max(np.diff([0.0, *times])) <= 180.0 / 25 + 1e-9


def test_a_policy_of_prefixes_is_the_policy_of_their_logits():
    generator = torch.Generator().manual_seed(0)
    tabular = Tabular(EBM.space, generator=generator)

    def rows(prefixes):
        depth = (prefixes >= 0).sum(1)
        assert depth.unique(return_counts=True)[1].max() <= 4  # each prefix once
        return tabular.logits(prefixes.clamp(min=0))[torch.arange(len(prefixes)), depth]

    policy = PrefixPolicy(EBM.space, rows)
    tokens, _ = EBM.space.sequences()
    assert torch.equal(policy.logits(tokens), tabular.logits(tokens))
    ours, theirs = verify(tabular, SOLUTION), verify(policy, SOLUTION)
    assert ours.kl_policy_target == theirs.kl_policy_target


def test_prefixes_are_observed_as_the_environment_shows_them():
    import gymnasium

    from rl_ebm.envs import ENV_ID, FlatObservation

    env = FlatObservation(gymnasium.make(ENV_ID, ebm=EBM, reward_mode="soft"))
    seen = [env.reset(seed=0)[0], env.step(1)[0], env.step(0)[0]]
    prefixes = torch.tensor([[-1, -1, -1], [1, -1, -1], [1, 0, -1]])
    assert torch.equal(flat_observations(prefixes, EBM.space), torch.from_numpy(np.stack(seen)))


def test_crossings():
    run = run_of([1.0, 0.2, 0.05, 0.2, 0.005])
    assert crossed(run, 0.1, "seconds") == (3.0, 3.0)
    assert crossed(run, 0.1, "reward_calls") == (300, 300)
    assert crossed(run, 0.01, "seconds") == (5.0, 5.0)
    assert crossed(run, 0.001, "seconds") == (None, None)
    assert look_at(run, 2.2)["kl_policy_target"] == 0.2
    assert look_at(run, 60.0) == run[-1], "a run that was shorter ended there"
    assert speed(run) == 10.0


def test_cells_say_not_reached_or_cannot():
    high, low = run_of([1.0, 0.5]), run_of([1.0, 0.05], seed=1)
    elsewhere = contender(fixed_point="the best response")
    assert crossing([high], 0.1, "seconds", contender()) == "not reached"
    assert crossing([high], 0.1, "seconds", elsewhere) == "cannot"
    assert crossing([low], 0.1, "seconds", elsewhere) == "2"
    assert crossing([high, low], 0.1, "seconds", contender()) == "2 (1 of 2 runs)"
    assert crossing([low, low], 0.1, "reward_calls", contender()) == "200 ± 0"


def test_the_winner_reached_it_in_every_run():
    rows = run_of([0.05, 0.05], "fast") + run_of([1.0, 1.0], "fast", seed=1)
    rows += run_of([1.0, 0.05], "sure") + run_of([0.05, 0.01], "sure", seed=1)
    assert winner(rows, 0.1, "seconds") == ("sure", 1.5)
    assert winner(rows, 0.001, "seconds") is None


def test_the_report():
    a, b = contender(), contender(name="b", fixed_point="the best response, not p*")
    c = contender(name="c")
    rows = run_of([1.0, 0.05, 0.005]) + run_of([1.0, 0.9], "b")
    text = table(rows, [a, b, c], {"c": "not installed: pip install '.[peers-c]'"}, 180.0)
    lines = text.splitlines()
    assert "| KL after 60 s | KL after 180 s |" in lines[0]
    expected = "| a | a table | 5 | 1 | p* | 0.005 | 0.005 | 2 | 3 | 200 | 300 | 10 | 1 |"
    assert lines[2] == expected
    assert "another" in lines[3]
    assert lines[3].count("cannot") == 4
    assert lines[-1] == "- c: not installed: pip install '.[peers-c]'"
    said = remarks(rows)
    assert "First below 0.1 by seconds: a (2 s)." in said
    assert "First below 0.01 by reward calls: a (300 reward calls)." in said
    assert "One run each, so no interval." in said
    assert "Nobody came below" in remarks(run_of([1.0]))
    listed = settings(rows, [a, b, c]).splitlines()
    assert listed[0].endswith("Fixed point: p*.")
    assert listed[1].endswith("Cannot reach p*: the best response, not p*.")
    assert len(listed) == 2
    assert len(picture(rows, [a, b, c], "random").axes[0].lines) == 4


def test_several_runs_have_an_interval():
    rows = run_of([1.0, 0.05]) + run_of([1.0, 0.07], seed=1)
    assert "0.06 ± 0.1" in table(rows, [contender()], {}, 2.0)
    assert "2 runs each" in remarks(rows)
    said = remarks(rows + run_of([1.0, 0.9], "b"))
    assert "1 to 2 runs each: mean ± half-width" in said


def test_results_are_kept_and_not_repeated(tmp_path):
    results = Results(tmp_path, "random")
    run = Run("a", Problem("random"), 0, 60.0, 4, 2)
    assert results.threads("a") is None
    results.note("a", "not installed")
    assert results.last("a") == "a: not installed"
    look = look_of(row(kl=0.5))
    results.add(run, 60.0, {"version": "v 1", "parameters": 5, "rows": [look]})
    again = Results(tmp_path, "random")
    assert again.rows == results.rows == read_rows(tmp_path / "random.csv")
    assert again.has("a", 0, 60.0)
    assert not again.has("a", 1, 60.0)
    assert not again.has("a", 0, 30.0)
    assert again.threads("a") == 2
    assert again.notes == {}
    again.add(replace(run, threads=1), 30.0, {"version": "v 1", "parameters": 5, "rows": [look]})
    assert not again.has("a", 0, 60.0), "another limit takes its place"
    assert again.threads("a") == 1
    again.write("a table", picture(again.rows, [contender()], "random"))
    (tmp_path / "why.md").write_text("## Why\n\nbecause\n")
    text = assemble(tmp_path, [contender()], "results/")
    for part in ("## Task random", "a table", "(results/random.png)", "because", "- **a** (v 1)"):
        assert part in text


def test_contenders_say_who_they_are():
    assert len(find(())) == len(CONTENDERS)
    assert [c.name for c in find(("rl-ebm soft-q",))] == ["rl-ebm soft-q"]
    assert {c.package for c in find(("torchgfn", "gfnx"))} == {"torchgfn", "gfnx"}
    with pytest.raises(ValueError, match=r"no contender 'rl-ebm soft-r'.*soft-q"):
        find(("rl-ebm soft-r",))
    project = (ROOT / "pyproject.toml").read_text()
    for c in CONTENDERS.values():
        assert c.settings
        assert c.source
        assert c.extra is None or f"\n{c.extra} = [" in project
        assert c.ends_at_target or len(c.fixed_point) > 20
    assert CONTENDERS["rl-ebm soft-q, 30 s"].seconds(180.0) == 30.0
    assert CONTENDERS["rl-ebm soft-q, 30 s"].seconds(3.0) == 3.0


def test_who_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    missing = contender(name="a peer", module="no_such_library", extra="peers-none")
    assert not missing.installed
    monkeypatch.setitem(CONTENDERS, "a peer", missing)

    def no_worker(run, interpreter):
        return missing.how_to_install

    monkeypatch.setattr("benchmarks.peers.__main__.start", no_worker)
    main(Options(tasks=("random",), contenders=("a peer",), out=tmp_path, threads=1))
    assert "a peer: not installed: pip install '.[peers-none]'" in capsys.readouterr().out


def test_a_trial_decides_how_many_threads(tmp_path, monkeypatch):
    updates, started = {1: 20, 2: 50}, []

    def worker(run, interpreter):
        started.append(run)
        assert interpreter == sys.executable
        rows = run_of([1.0, 0.5])
        rows[1]["updates"] = rows[0]["updates"] + updates[run.threads]
        return {"version": "v 1", "parameters": 5, "rows": [look_of(r) for r in rows]}

    monkeypatch.setattr("benchmarks.peers.trial.start", worker)
    monkeypatch.setattr("benchmarks.peers.__main__.start", worker)
    name, problem = "rl-ebm soft-q", Problem("random")
    run = Run(name, problem, 0, 180.0, 50, 2)
    assert fastest(run, sys.executable) == 2
    assert [(r.threads, r.seconds, r.looks) for r in started] == [(1, 5.0, 2), (2, 5.0, 2)]
    updates[1] = 60
    assert fastest(run, sys.executable) == 1
    started.clear()
    assert fastest(replace(run, threads=1), sys.executable) == 1
    assert fastest(replace(run, contender="gfnx DB (its MLP)"), sys.executable) == 2
    assert not started, "nothing to try"

    main(Options(tasks=("random",), contenders=(name,), out=tmp_path, seeds=2))
    assert [(r.seed, r.threads) for r in started] == [(0, 1), (0, 2), (0, 1), (1, 1)], "one trial"
    assert {r["threads"] for r in read_rows(tmp_path / "random.csv")} == {1}
    monkeypatch.setattr("benchmarks.peers.trial.start", lambda *_: "failed: no such")
    assert fastest(run, sys.executable) == "failed: no such"


def test_an_interpreter_that_does_not_start_is_no_crash(tmp_path):
    run = Run("rl-ebm soft-q", Problem("random"), 0, 1.0, 4, 1)
    assert start(run, str(tmp_path / "python")).startswith("failed: ")


def test_wrong_flags_are_told():
    with pytest.raises(ValueError, match="--threads must be >= 1, got 0"):
        Options(threads=0)
    with pytest.raises(ValueError, match="--seeds must be >= 1, got 0"):
        Options(seeds=0)
    with pytest.raises(ValueError, match="NAME=PATH"):
        Options(python=("torchgfn",))
    with pytest.raises(ValueError, match=r"no task 'randon'.*random"):
        main(Options(tasks=("randon",)))
    with pytest.raises(ValueError, match="no table"):
        main(Options(table=Path("no_such.tsv")))


@pytest.mark.parametrize("name", ["rl-ebm soft-q", "rl-ebm policy-gradient", "rl-ebm vargrad"])
def test_ours_trains(name):
    clock, looks = Clock(), []

    class Ticking(Watch):
        def __call__(self, policy, updates, reward_calls):
            clock.now += 1.0
            looks.append(reward_calls)
            super().__call__(policy, updates, reward_calls)

    watch = Ticking(SOLUTION, limit=2.0, looks=2, clock=clock)
    with pytest.raises(TimeUp):
        CONTENDERS[name].train(EBM, 0, watch)
    assert [r["updates"] for r in watch.rows] == [1, 2]
    assert looks[1] == 2 * looks[0] > 0
    assert watch.parameters > 90_000
    assert 0 < watch.rows[-1]["kl_policy_target"] < 5


@pytest.mark.slow
def test_quick(tmp_path):
    """Ours and Stable-Baselines3, each in a process of its own, end to end."""
    command = [sys.executable, "-m", "benchmarks.peers", "--quick", "--threads", "1"]
    command += ["--tasks", "random", "--out", str(tmp_path), "--contenders", "rl-ebm soft-q"]
    command += ["stable-baselines3 PPO", "torchgfn TB (its MLP)"]
    environment = os.environ | {"SB3_LOGDIR": str(tmp_path / "sb3")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "random.csv")
    names = {r["contender"] for r in rows}
    assert {"rl-ebm soft-q", "stable-baselines3 PPO"} <= names
    assert all(0 < r["kl_policy_target"] < 5 for r in rows)
    text = (tmp_path / "random.md").read_text()
    assert "cannot" in text
    if "torchgfn TB (its MLP)" not in names:
        assert "not installed: pip install '.[peers-torchgfn]'" in text
    assert re.search(r"Measured on 1 thread", text)
    assert (tmp_path / "random.png").stat().st_size > 10_000
    assert "# Our methods and other libraries" in (tmp_path / "README.md").read_text()
