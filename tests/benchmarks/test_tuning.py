"""How methods are tuned: what is tried, what smaller tunings would have chosen, what that moves."""

from __future__ import annotations

import json
import math
import random

import pytest

from benchmarks.readme import protocols, tune
from benchmarks.readme.points import BATCHES, RATES, Point, beside, grid, ladders, next_point
from benchmarks.readme.protocols import Protocol
from benchmarks.readme.tried import flat, read_tried
from rl_ebm.agents import AGENTS, entry_of, make_options
from rl_ebm.files import RunError
from rl_ebm.studies.bench_rows import write_rows

SAMPLED = [name for name, entry in AGENTS.items() if not entry.needs_teacher]


def search(agent, score):
    """All that is tried, in order."""
    scores = {}
    while (point := next_point(agent, scores)) is not None:
        assert point not in scores
        scores[point] = score(point)
    return scores


@pytest.mark.parametrize("agent", SAMPLED)
def test_each_agent_begins_with_twelve_points_that_it_takes(agent):
    points = grid(agent)
    assert len(set(points)) >= 12
    assert 32 in {point.batch_size for point in points}
    default = entry_of(agent).config()
    for point in points:
        options = make_options(agent, entry_of(agent), point.options())
        assert (options.lr, options.batch_size) == (point.lr, point.batch_size)
        assert getattr(options, "explore", None) == getattr(default, "explore", None)
        assert not getattr(options, "replay_batch", 0)


def test_exploration_and_replay_are_tried_where_there_are_any():
    assert list(ladders("vargrad")) == ["lr", "batch_size", "explore", "replay"]
    assert list(ladders("ppo")) == ["lr", "batch_size"]
    assert "explore" not in ladders("monte-carlo")  # which learns from the reference alone
    options = make_options("vargrad", entry_of("vargrad"), Point(1e-2, 32, 0.25, 1).options())
    assert (options.explore, options.replay_batch) == (0.25, 32)
    assert options.replay_size >= 32


@pytest.mark.parametrize("agent", ["vargrad", "ppo"])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_is_bracketed(agent, seed):
    has = ladders(agent)
    wanted = {name: random.Random(seed).choice(ladder) for name, ladder in has.items()}

    def score(point):
        told = point.told()
        return sum(abs(x.index(told[name]) - x.index(wanted[name])) for name, x in has.items())

    scores = search(agent, score)
    found = min(scores, key=scores.get)
    assert found.told() == wanted
    assert all(near in scores for near in beside(agent, found))
    assert len(scores) < math.prod(map(len, has.values()))


def test_neighbours_are_a_step_away():
    near = beside("vargrad", Point(RATES[0], BATCHES[1], 0.5, 0))
    assert Point(RATES[1], BATCHES[1], 0.5, 0) in near
    assert Point(RATES[0], BATCHES[2], 0.5, 0) in near
    assert Point(RATES[0], BATCHES[1], 0.75, 0) in near
    assert Point(RATES[0], BATCHES[1], 0.5, 1) in near
    assert len(near) == 1 + 2 + 2 + 1


def test_an_agent_that_always_fails_is_given_up_after_the_grid():
    assert len(search("ppo", lambda point: math.inf)) == 12


def row(agent, seed, kl, task="t"):
    return {"task": task, "agent": agent, "seed": seed, "kl_policy_target": kl}


A, B, FAR = Point(1e-2, 1024), Point(1e-3, 1024), Point(1e-2, 256)


def test_a_protocol_chooses_by_what_it_sees():
    tried = {
        B: [row("a", 1, 0.1), row("a", 2, 9.0), row("a", 1, 1.0, "u"), row("a", 2, 1.0, "u")],
        A: [row("a", 1, 0.2), row("a", 2, 0.1), row("a", 1, 1.0, "u"), row("a", 2, 1.0, "u")],
        FAR: [row("a", 1, 0.3), row("a", 2, 9.0), row("a", 1, 0.1, "u")],  # one failed
    }
    known = protocols.protocols([x for rows in tried.values() for x in rows])
    assert next(iter(known)) == "all"
    runs = {"all": 4, "six points, one seed": 2}
    chosen = {n: protocols.choice("a", tried, p, runs.get(n, 2)) for n, p in known.items()}
    assert chosen == {
        "all": A,
        "seed 1 alone": FAR,
        "seed 2 alone": A,
        "`t` alone": A,
        "`u` alone": B,
        "six points, one seed": FAR,
    }
    rows = [x for of in tried.values() for x in of]
    by = {n: {"a": p.options()} for n, p in chosen.items()}
    assert protocols.choices(rows, {"a": tried}) == by
    explored = Point(1e-2, 1024, 0.25, 0)
    few = Protocol(few=True)
    assert few.tries(explored, explored)
    assert not few.tries(explored, Point(1e-3, 32, 0.5, 0))
    assert Protocol().tries(explored, Point(1e-3, 32, 0.5, 0))


def test_what_failed_is_not_chosen():
    """By what all agents' runs say that there are, not by what one of them has left."""
    tried = {
        "a": {A: [row("a", 1, 0.1), row("a", 2, 0.1)], FAR: [row("a", 1, 0.2), row("a", 2, 0.2)]},
        "b": {A: [row("b", 1, 0.1)], FAR: [row("b", 1, 0.2)]},  # seed 2 failed with each
        "c": {B: [row("c", 1, 0.1), row("c", 2, 0.2)]},  # all of the six points failed
    }
    rows = [x for of in tried.values() for ends in of.values() for x in ends]
    chosen = protocols.choices(rows, tried)
    assert {name: list(of) for name, of in chosen.items()} == {
        "all": ["a", "c"],
        "seed 1 alone": ["a", "b", "c"],
        "seed 2 alone": ["a", "c"],
        "six points, one seed": ["a", "b"],
    }
    assert tune.best("b", tried["b"], 2) is None
    assert tune.best("b", {}, 2) is None
    assert tune.line("b", tried["b"], 2) == "| `b` |  |  |  |  | 2 | failed |  |"


def test_a_conclusion_is_a_difference_that_the_seeds_tell():
    ends = {
        "a": [row("a", s, x) for s, x in enumerate((1e-3, 2e-3, 1.5e-3))],
        "b": [row("b", s, x) for s, x in enumerate((1e-1, 2e-1, 1.5e-1))],
        "c": [row("c", s, x) for s, x in enumerate((1e-3, 1e-1, 1e-2))],
        "d": [row("d", s, 1e-9) for s in range(2)],  # one failed
    }
    assert protocols.conclusions(ends) == {("t", "a", "b")}
    # Paired by their seeds: what is common to a seed says nothing.
    ends["c"] = [row("c", s, x) for s, x in enumerate((2e-3, 4e-3, 3e-3))]
    assert protocols.conclusions(ends) == {("t", "a", "b"), ("t", "a", "c"), ("t", "c", "b")}
    less = {"all": ends, "less": ends | {"a": [row("a", s, 1.0) for s in range(3)]}}
    kept = protocols.moved(less).splitlines()
    assert kept[2] == "| all | 3 | 3 | 0 | 0 | 0 |"
    assert kept[3] == "| less | 3 | 1 | 0 | 2 | 0 |"
    del less["less"]["c"]
    assert protocols.moved(less).splitlines()[3] == "| less | 1 | 0 | 2 | 1 | 0 |"
    assert protocols.closest(ends, "t", 3)[0] == "a"
    assert protocols.closest(less["less"], "t", 3)[0] == "b"
    assert protocols.spread({"all": ends}).splitlines()[-1] == "| `d` | failed |  |"
    with pytest.raises(RunError, match="failed on t"):
        protocols.closest(ends, "t", 4)


def test_a_tuning_is_read_as_it_was_written(tmp_path):
    tried = {
        "vargrad": {Point(1e-2, 32, 0.5, 0): [row("vargrad", 100, 0.25)]},
        "ppo": {Point(3e-3, 128): [row("ppo", 100, 0.5), row("ppo", 101, 0.75)]},
    }
    path = tmp_path / "tuned.csv"
    with pytest.raises(RunError, match="tune writes it"):
        read_tried(path)
    write_rows(path, flat(tried, 64))
    rows, again = read_tried(path)
    assert again == tried
    assert read_tried(path, 64)[1] == tried
    with pytest.raises(RunError, match="64 calls, where 65 are asked for"):
        read_tried(path, 65)
    assert rows == [x for points in tried.values() for ends in points.values() for x in ends]
    path.write_text("task,agent\nt,a\n")
    with pytest.raises(RunError, match="no file of a tuning"):
        read_tried(path)
    write_rows(path, flat(tried, 64))
    with pytest.raises(ValueError, match="held out"):
        protocols.main(protocols.Options(path, tasks="t", out=tmp_path / "runs"))


def test_the_table_says_where_a_best_is_at_an_end():
    tried = {Point(1e-2, 32): [row("ppo", 0, 0.25)], Point(1e-2, 128): [row("ppo", 0, 0.5)]}
    assert tune.line("ppo", tried, 1) == "| `ppo` | 0.01 | 32 |  |  | 2 | 0.25 | batch_size |"
    tried = {Point(1e-2, 128, 0.0, 1): [row("vargrad", 0, 0.5)]}
    assert tune.line("vargrad", tried, 1) == "| `vargrad` | 0.01 | 128 | 0 | 1 | 1 | 0.5 |  |"


@pytest.mark.slow
def test_choices_run_once_each_on_tasks_that_are_held_out(tmp_path, capsys):
    points = [Point(1e-2, 32), Point(1e-2, 256)]
    kl = {points[0]: (0.1, 0.9), points[1]: (0.9, 0.2)}
    tried = {
        agent: {p: [row(agent, 100 + s, x, "random") for s, x in enumerate(kl[p])] for p in points}
        for agent in ("ppo", "policy-gradient")
    }
    path = tmp_path / "tuned.csv"
    write_rows(path, flat(tried, 64))
    options = protocols.Options(path, tasks="lookahead", workers=1, out=tmp_path / "runs")
    protocols.main(protocols.Options(**(vars(options) | {"quick": True, "seeds": 2})))
    said = capsys.readouterr().out
    assert "| defaults, untuned |" in said
    assert "| all, other seeds |" in said
    assert "| `ppo` |" in said
    runs = sorted(path.parent.name for path in (tmp_path / "runs").glob("?/runs/*/*/*"))
    assert runs == ["policy-gradient"] * 6 + ["ppo"] * 6  # three choices, two seeds
    again = {path.name for path in (tmp_path / "runs").glob("again/0/runs/*/*/*")}
    assert again == {"2", "3"}


def test_a_tuning_goes_on_from_what_is_kept(tmp_path, monkeypatch):
    """Agent by agent, another day, another folder of runs: nothing is run twice, a failure too."""
    asked = []

    def bench(plan, out, workers):
        (agent,) = plan.agents
        point = plan.options[agent]
        assert (agent, tuple(point.items())) not in asked
        asked.append((agent, tuple(point.items())))
        off = abs(math.log(point["lr"] / 3e-3)) + abs(math.log(point["batch_size"] / 128))
        seeds = plan.seeds[:-1] if point["batch_size"] == 1024 else plan.seeds  # one fails
        return [row(agent, s, 1 + off, p.label) for p in plan.problems for s in seeds], []

    monkeypatch.setattr(tune, "run", bench)
    for i, agents in enumerate(("ppo", "grpo", "ppo,grpo")):
        tune.main(tune.Options(agents=agents, out=tmp_path / str(i), results=tmp_path))
        if i == 1:
            done = len(asked)
    assert len(asked) == done
    _, tried = read_tried(tmp_path / tune.CSV)
    assert {agent for agent, _ in asked} == set(tried) == {"ppo", "grpo"}
    failed = [rows for point, rows in tried["ppo"].items() if point.batch_size == 1024]
    assert failed
    assert all([x["kl_policy_target"] for x in rows].count(math.inf) == 2 for rows in failed)
    assert json.loads((tmp_path / "tuned.json").read_text())["ppo"] == {
        "lr": 3e-3, "batch_size": 128
    }  # fmt: skip
    assert (tmp_path / "tuned.md").read_text().count("| `ppo` | 0.003 | 128 |") == 1
    with pytest.raises(RunError, match="other tasks or seeds"):
        tune.main(tune.Options(agents="ppo", tasks="random", results=tmp_path))
