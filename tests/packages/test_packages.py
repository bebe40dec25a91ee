"""Another distribution's agent, task and kind of reward work wherever a name is given."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from distributions import install

import rl_ebm
from rl_ebm import agents, rewards, tasks

THEIRS = '''
import torch
from rl_ebm.agents import AgentEntry, VarGradAgent
from rl_ebm.agents.trajectory_balance import VarGradConfig
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.fixed_points import target
from rl_ebm.rewards import Automaton
from rl_ebm.tasks import Task

@checked_options
class Config(VarGradConfig):
    """Options of theirs."""

    batch_size: int = 8
    """responses in a step"""
    push: float | int = 1.0
    """factor of the loss"""

class Agent(VarGradAgent):
    Config = Config

    def loss(self, batch, r):
        loss, metrics = super().loss(batch, r)
        push = torch.tensor(self.config.push)
        return push * loss, metrics | {"losses/push": push}

def entry():
    return AgentEntry(Agent, Config, "vargrad, pushed", "nobody 2026", fixed_point=target)

TASK = Task("theirs", "scores 0, 1, 2, ...", 3, 2,
            lambda space, seed: torch.arange(space.num_sequences).double() / 4 + seed)

def kind(text, factor, words):
    if not text:
        raise ValueError("say what is wanted")
    return Automaton.contains(words.space, words.phrase(text), 3 * factor)

class Ones:
    """A score for each token 1."""

    forbids = False

    def __init__(self, score):
        self.score = score

    def bind(self, space, prompts):
        return self

    def to(self, device):
        return self

    def __call__(self, tokens, lengths, prompt_ids):
        return self.score * (tokens == 1).double().sum(1)

def kinds():
    from rl_ebm.training import kinds

    kinds.register("reward", "ones", Ones, lambda x: {"score": x.score},
                   lambda parts, space, prompts: Ones(parts["score"]))

def no_kinds():
    raise OSError("no such thing")
'''
POINTS = {
    "rl_ebm.agents": {"theirs": "their_package:entry", "wrong": "their_package:TASK"},
    "rl_ebm.tasks": {"theirs": "their_package:TASK"},
    "rl_ebm.rewards": {"theirs": "their_package:kind"},
    "rl_ebm.kinds": {"ones": "their_package:kinds", "broken": "their_package:no_kinds"},
}
WRONG = (
    "rl-ebm: the agent 'wrong' of the distribution their_package 1.2 cannot be loaded: TypeError: "
    "an entry point of rl_ebm.agents refers to an AgentEntry"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return install(tmp_path_factory.mktemp("theirs") / "site", "their_package", THEIRS, POINTS)


def python(site: Path, at: Path, source: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (site, ROOT)))
    env = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-c", source], cwd=at, env=env, capture_output=True, text=True
    )


def commands(
    site: Path, at: Path, *lines: str, to_the_end: bool = False
) -> subprocess.CompletedProcess[str]:
    """Several commands in one process, up to the first that fails; or all, and their codes."""
    source = f"""
import shlex, sys
from rl_ebm.cli import main
if __name__ == "__main__":
    for line in {list(lines)!r}:
        code = main(shlex.split(line))
        if {to_the_end}:
            print(code)
        elif code:
            sys.exit(code)
"""
    (at / "lines.py").write_text(source)  # a file: workers import what started them
    return python(site, at, "import runpy; runpy.run_path('lines.py', run_name='__main__')")


SMALL = "--policy tabular --device cpu --reference uniform"


@pytest.fixture(scope="module")
def trained(site, tmp_path_factory):
    """Runs on their task and on their reward, each by a process of its own."""
    at = tmp_path_factory.mktemp("runs")
    done = commands(
        site,
        at,
        f"train --agent theirs --push 0.5 --task theirs {SMALL} --steps 3 --out task",
        f"train --agent theirs --reward '2*theirs:1' --vocab-size 3 --max-length 2 {SMALL} "
        "--steps 3 --out reward",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return at


def test_import_rl_ebm_looks_at_no_package(site, tmp_path):
    source = """
import sys, rl_ebm
tables = (rl_ebm.agents.AGENTS, rl_ebm.envs.TASKS, rl_ebm.rewards.KINDS)
assert not any("_installed" in vars(table) for table in tables)
assert "their_package" not in sys.modules
rl_ebm.agents.entry_of("soft-q"), rl_ebm.envs.make_task("random")
assert "their_package" not in sys.modules
assert rl_ebm.envs.make_task("theirs").space.vocab_size == 3
assert "their_package" in sys.modules
"""
    done = python(site, tmp_path, source)
    assert done.returncode == 0, done.stderr


def test_their_run_is_stored_as_every_run(trained):
    config = json.loads((trained / "task/config.json").read_text())
    assert config["agent"]["name"] == "theirs"
    assert config["agent"]["options"]["push"] == 0.5
    assert config["ebm"]["reward"] == {"task": "theirs", "task_seed": 0}
    assert json.loads((trained / "reward/config.json").read_text())["ebm"]["reward"] == "automaton"
    # Their reward is stored as what it made: this process does not know their package.
    _, ebm = rl_ebm.load(trained / "reward", device="cpu")
    # Five of nine responses hold token 1 and pay 2 * 3; the reference is uniform.
    log_z = math.log((5 * math.exp(6) + 4) / 9)
    assert rl_ebm.solve(ebm).log_z.item() == pytest.approx(log_z, abs=1e-12)


@pytest.mark.slow
def test_their_run_goes_on_and_is_diagnosed_in_another_process(site, trained):
    done = commands(
        site,
        trained,
        "train --resume task --steps 5 --device cpu",
        "verify task --device cpu",
        "diagnose task --seconds 0.2",
        "solve --task theirs --json",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (trained / "task/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["step"]) == 5
    assert {float(row["losses/push"]) for row in rows if row["losses/push"]} == {0.5}
    assert "optimisation and sampling" in done.stdout
    solved = json.loads(done.stdout[done.stdout.rindex('{\n "log_z"') :])
    want = math.log(sum(math.exp(i / 4) for i in range(9)))
    assert solved["log_z"] == pytest.approx(want, abs=1e-12)


def test_without_their_package_a_run_says_what_is_missing(trained, tmp_path):
    lines = [f"train --resume {run} --steps 9 --device cpu" for run in ("task", "reward")]
    done = commands(tmp_path, trained, *lines, to_the_end=True)
    task, agent = done.stderr.splitlines()
    assert task.startswith(
        "rl-ebm: the run's task is of no package that is installed here: unknown task 'theirs'"
    )
    assert agent.startswith("rl-ebm: the run's agent 'theirs' is unknown")


@pytest.mark.slow
def test_they_are_listed_and_what_is_broken_is_one_sentence(site, tmp_path):
    done = commands(site, tmp_path, "agents", "audit --task theirs --reference uniform --json")
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names[: len(agents.AGENTS)] == list(agents.AGENTS)
    assert "theirs           vargrad, pushed (nobody 2026)" in done.stdout.splitlines()
    audited = json.loads(done.stdout[done.stdout.index("[\n") :])
    line = next(x for x in audited if x["objective"] == "theirs")
    assert line["is_target"] is True
    assert [x.startswith(WRONG) for x in done.stderr.splitlines()] == [True]


@pytest.mark.slow
def test_a_benchmark_of_theirs_in_workers(site, tmp_path):
    done = commands(
        site,
        tmp_path,
        "bench --out out --agents theirs,exact --tasks theirs --seeds 1 --calls 16 --workers 2 "
        "--dim 8 --heads 1 --layers 1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "out/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["task"], row["agent"]) for row in rows} == {
        ("theirs", "theirs"),
        ("theirs", "exact"),
    }


def test_wrong_names_and_arguments_of_theirs_are_one_sentence_each(site, tmp_path):
    wrong = {
        "train --agent wrong --out x": WRONG,
        "bench --out x --agents wrong": WRONG,
        "solve --task theirz": "there is no task 'theirz': did you mean 'theirs'?",
        'solve --reward "theirs:" --vocab-size 3 --max-length 2': "position 7: say what is wanted",
    }
    done = commands(site, tmp_path, *wrong, to_the_end=True)
    told = done.stderr.splitlines()
    assert all(map(str.__contains__, told, wrong.values())), told
    assert len(told) == len(wrong)
    assert done.stdout.split() == ["2"] * len(wrong)


# Registered in this process -----------------------------------------------------------------------


def test_a_task_is_registered_once():
    task = tasks.Task("mine", "", 3, 2, lambda space, seed: rl_ebm.rewards.Automaton.uniform)
    try:
        assert tasks.register(task) is task
        assert tasks.TASKS["mine"] is task
        with pytest.raises(ValueError, match="there is a task 'mine' already"):
            tasks.register(task)
    finally:
        del tasks.TASKS["mine"]
    with pytest.raises(ValueError, match="a task's name is lower case"):
        tasks.register(tasks.Task("My Own", "", 3, 2, print))
    for wrong in (None, "random"):
        with pytest.raises(TypeError, match="a task is an"):
            tasks.register(wrong)


def test_a_kind_of_reward_is_registered_once():
    def mine(text, factor, words):
        return rewards.Automaton.counts(words.space, words.phrase(text), factor)

    space = rl_ebm.TokenSpace(3, 3)
    try:
        assert rewards.register("mine", mine) is mine
        both = rewards.parse_reward("2*mine:1 + -2*counts:1", space)
        tokens, lengths = space.sequences(0, space.num_sequences)
        assert not both(tokens, lengths, lengths * 0).any()
        rewards.KINDS["wrong"] = lambda text, factor, words: text
        with pytest.raises(TypeError, match="'wrong' must make an Automaton, got 'x'"):
            rewards.parse_reward("wrong:x", space)
    finally:
        for name in ("mine", "wrong"):
            rewards.KINDS.pop(name, None)
    with pytest.raises(ValueError, match="a kind of reward 'contains' already"):
        rewards.register("contains", mine)
    with pytest.raises(ValueError, match="letters a to z, got 'my-own'"):
        rewards.register("my-own", mine)
    with pytest.raises(TypeError, match="a kind of reward is a function"):
        rewards.register("mine", None)


@pytest.mark.slow
def test_a_kind_of_theirs_is_made_again_by_the_command_line(site, tmp_path):
    source = """
import rl_ebm, their_package
their_package.kinds()
ebm = rl_ebm.EBM(rl_ebm.TokenSpace(3, 2), their_package.Ones(2.0))
rl_ebm.train(ebm, out="run", steps=1, network="tabular", progress=False, solve=True)
"""
    done = python(site, tmp_path, source)
    assert done.returncode == 0, done.stderr
    done = commands(site, tmp_path, "verify run")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["log_z"] == pytest.approx(2 * math.log(2 + math.exp(2)), abs=1e-9)
    config = (tmp_path / "run/config.json").read_text()
    (tmp_path / "run/config.json").write_text(config.replace('"ones"', '"broken"'))
    done = commands(site, tmp_path, "verify run")
    assert done.returncode == 2
    assert (
        "'broken' in rl_ebm.kinds of the distribution their_package 1.2 fails: OSError"
        in done.stderr
    )
