"""The benchmark: one budget, runs that are not repeated, a report whose numbers can be summed."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from bench_cases import OPTIONS, plan
from toy_policies import seeded

import rl_ebm
from benchmarks.readme import methods, tune
from rl_ebm.agents import AGENTS
from rl_ebm.cli import commands as cli
from rl_ebm.fixed_points import boundary
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.studies import seeds as intervals
from rl_ebm.studies.bench import Problem, finished, jobs, measure, rows_of, run
from rl_ebm.studies.bench_report import frontier, targets, write_report
from rl_ebm.studies.bench_rows import last_of
from rl_ebm.training.checkpoint import RunError
from rl_ebm.training.directory import load

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def short_flows(monkeypatch):
    monkeypatch.setattr(boundary, "STEPS", 60)


@pytest.mark.slow
def test_every_run_scores_the_same_number_of_responses(tmp_path):
    todo = jobs(plan(), tmp_path)
    assert len(todo) == 8
    assert len({job.run for job in todo}) == 8
    rows = [row for job in todo for row in measure(job)]
    assert {row["reward_calls"] for row in last_of(rows)} == {256}
    assert {row["step"] for row in last_of(rows, agent="soft-q")} == {4}
    assert {row["step"] for row in last_of(rows, agent="grpo")} == {8}
    first = {}
    for job in todo:  # the same weights before the first step, for each task and seed
        start = rows_of(job)[0]
        assert start["step"] == 0
        first.setdefault((start["task"], start["seed"]), []).append(start["kl_target_policy"])
    for values in first.values():  # up to rounding: q is log pi + V, with a V beside it
        assert max(values) - min(values) < 1e-6 * max(values)
    assert len({min(v) for v in first.values()}) == 4
    # KL(policy, reference), by another route.
    job = todo[-1]
    policy, ebm = load(job.run)
    tokens, lengths = ebm.space.sequences()
    total = 0.0
    for p in range(ebm.num_prompts):
        ids = torch.full_like(lengths, p)
        with torch.no_grad():
            log_pi = rl_ebm.policies.log_prob(policy, ebm.space, tokens, lengths, ids).double()
        log_ref = -ebm.space.max_length * math.log(ebm.space.vocab_size)
        total += float((log_pi.exp() * (log_pi - log_ref)).sum()) / ebm.num_prompts
    assert last_of(rows_of(job))[0]["kl_reference"] == pytest.approx(total, abs=1e-5)


def test_what_is_finished_is_not_run_again_and_another_plan_is_refused(tmp_path):
    job = jobs(plan(agents=("soft-q",), options={"soft-q": {"batch_size": 64}}), tmp_path)[0]
    assert not finished(job)
    rows = measure(job)
    assert finished(job)
    before = (job.run / "state.pt").stat().st_mtime_ns
    assert measure(job) == rows
    assert (job.run / "state.pt").stat().st_mtime_ns == before
    other = jobs(plan(agents=("soft-q",), options={"soft-q": {"batch_size": 32}}), tmp_path)[0]
    with pytest.raises(RunError, match="another --out"):
        measure(other)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"agents": ("soft_q",), "options": {}}, "soft-q"),
        ({"agents": ()}, "at least one"),
        ({"problems": (Problem("randon"),)}, "random"),
        ({"calls": 0}, "calls"),
        ({"options": {"dpg": {}}}, "takes no part"),
        ({"options": {"soft-q": {"batchsize": 3}}}, "batchsize: did you mean 'batch_size'"),
        ({"options": {"soft-q": {"lr": "x"}}}, "of the wrong kind"),
        ({"calls": 40}, "less than one step of soft-q, which scores 64"),
        ({"agents": ("soft-q", "grpo", "soft-q")}, "each agent can be given once, soft-q"),
        ({"seeds": (0, 1, 1)}, "each seed can be given once, 1"),
        ({"problems": (Problem("star"), Problem("star", task_seed=1))}, "each task .* star"),
    ],
)
def test_a_wrong_plan_is_one_sentence(changes, word):
    with pytest.raises(ValueError, match=word):
        plan(**changes)


def test_the_report_says_which_objective_ends_at_the_ebm():
    found = targets(plan(), Problem("star", beta=0.5))
    assert found == {"soft-q": True, "grpo": False}
    one = plan(agents=("policy-gradient",), options={}, calls=4096)
    assert targets(one, Problem("lookahead")) == {"policy-gradient": True}
    for options, want in (({"kl_in": "loss"}, False), ({"kl_estimator": "k2"}, False)):
        changed = plan(
            agents=("policy-gradient",), options={"policy-gradient": options}, calls=4096
        )
        assert targets(changed, Problem("lookahead")) == {"policy-gradient": want}


def test_no_policy_is_above_the_frontier():
    space = rl_ebm.TokenSpace(3, 2)
    scores = torch.randn(9, generator=seeded(), dtype=torch.float64)
    ebm = rl_ebm.EBM(space, scores, 0.7, Uniform(space))
    kls, rewards = frontier(ebm)
    assert len(kls) > 10
    own = rl_ebm.solve(ebm)
    tokens, _ = space.sequences()
    p = own.log_prob(tokens).exp()
    mine = (float((p * (p.log() + 2 * math.log(3))).sum()), float((p * scores).sum()))
    pairs = sorted([*zip(kls, rewards, strict=True), mine])
    # On the same rising curve, up to rounding where a point of it is its neighbour.
    assert all(after - before > -1e-12 for (_, before), (_, after) in pairwise(pairs))
    for seed in range(200):
        policy = Tabular(space, scale=2.0, generator=seeded(seed), dtype=torch.float64)
        with torch.no_grad():
            log_pi = rl_ebm.policies.log_prob(policy, space, tokens, torch.full((9,), 2))
        kl = float((log_pi.exp() * (log_pi + 2 * math.log(3))).sum())
        reward = float((log_pi.exp() * scores).sum())
        # Lagrangian bound at every point of the frontier: E[R] - beta KL is largest there.
        for factor, k, r in zip(rl_ebm.studies.bench_report.SWEEP, kls, rewards, strict=True):
            beta = 0.7 * factor
            assert reward - beta * kl <= r - beta * k + 1e-9


def test_intervals_are_students():
    values = [1.0, 2.0, 6.0]
    half = 4.303 * math.sqrt(7.0) / math.sqrt(3)
    assert intervals.half_width(values) == pytest.approx(half, rel=2e-4)
    assert intervals.interval(values) == f"3 ± {half:.1g}"
    # The mean ends where the half-width does: 0.0038, 0.00026, 124,000.
    assert intervals.interval([0.104, 0.103, 0.106]) == "0.104 ± 0.004"
    assert intervals.interval([4.7e-5, 2.1e-4, 2.4e-4]) == "0.0002 ± 0.0003"
    assert intervals.interval([600_000.0, 500_000.0, 550_000.0]) == "600,000 ± 100,000"
    assert intervals.interval([65_536.0, 65_536.0]) == "65536 ± 0"
    assert intervals.interval([0.0, 0.0]) == "0 ± 0"
    assert intervals.interval([]) == "not run"
    assert intervals.half_width([1.0]) == math.inf
    many = torch.randn(40, generator=seeded()).tolist()
    spread = torch.tensor(many).std().item() / math.sqrt(40)
    assert intervals.half_width(many) == pytest.approx(2.023 * spread, rel=0.01)


@pytest.mark.slow
def test_the_command_writes_results_and_a_report(tmp_path, capsys):
    out, options = tmp_path / "bench", tmp_path / "options.json"
    options.write_text(json.dumps(OPTIONS))
    args = ["bench", "--out", str(out), "--agents", "soft-q,grpo", "--tasks", "lookahead"]
    args += ["--seeds", "2", "--calls", "256", "--options", str(options), "--dim", "8"]
    args += ["--heads", "1", "--layers", "1", "--hidden", "8"]
    assert cli.main(args) == 0
    text = capsys.readouterr().out
    assert "| `soft-q` | yes | 256 |" in text
    assert "| `grpo` | no | 256 |" in text
    assert (out / "report.md").read_text() in text + "\n"
    assert (out / "lookahead.png").stat().st_size > 10_000
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["agent"], r["seed"]) for r in rows} == {
        (a, s) for a in ("soft-q", "grpo") for s in ("0", "1")
    }
    assert cli.main(args) == 0  # nothing is run again
    assert cli.main([*args, "--calls", "512"]) == 2
    assert "another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_report_has_a_line_for_each_agent(tmp_path):
    small = plan(problems=(Problem("lookahead"),))
    rows = [row for job in jobs(small, tmp_path) for row in measure(job)]
    text = write_report(small, rows, tmp_path)
    ends = [r["kl_policy_target"] for r in last_of(rows, agent="grpo")]
    assert intervals.interval(ends) in text
    assert set(AGENTS) >= set(small.agents)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [("tune", ["--agents", "vargrad,dpg"]), ("methods", ["--seeds", "2"])],
    ids=["tune", "methods"],
)
def test_the_scripts_that_tune_and_compare_run(script, flags, tmp_path):
    results = sorted(path.stat().st_mtime_ns for path in ROOT.glob("benchmarks/results/*"))
    command = [sys.executable, "-m", f"benchmarks.readme.{script}", "--quick", *flags]
    done = subprocess.run(
        [*command, "--workers", "1", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "| `vargrad` |" in done.stdout
    assert "Measured on" in done.stdout
    now = sorted(path.stat().st_mtime_ns for path in ROOT.glob("benchmarks/results/*"))
    assert now == results, "a trial run overwrote the measured results"


def test_the_smallest_geometric_mean_of_a_task_wins():
    def row(agent, seed, kl):
        return {"task": "t", "agent": agent, "seed": seed, "kl_policy_target": kl}

    rows = [row("a", 0, 9.0), row("a", 0, 1e-3), row("a", 1, 1.0), row("b", 0, 0.1)]
    rows += [row("b", 1, 0.1), row("c", 0, 1e-9), row("c", 1, math.inf)]
    rows.append(row("d", 0, 1e-9))
    assert methods.best(rows, ("a", "b", "c", "d"), 2) == {"a"}  # sqrt(1e-3) < 0.1, d failed once
    assert methods.best(rows, ("b", "c"), 2) == {"b"}
    shown = {a: methods.cell(methods.ends(rows, a), 2) for a in "bcd"}
    assert shown["b"].startswith("0.1 (0.1 to")
    assert (shown["c"], shown["d"]) == ("∞", "failed")
    assert tune.score(rows, "a", 2) == pytest.approx(math.sqrt(1e-3))
    assert tune.score(rows, "d", 2) == math.inf


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys):
    options = tmp_path / "options.json"
    options.write_text(json.dumps(OPTIONS | {"soft-q": {"batch_size": 64, "lr": 1e30}}))
    args = ["bench", "--out", str(tmp_path / "out"), "--agents", "soft-q,grpo", "--seeds", "1"]
    args += ["--tasks", "lookahead", "--calls", "256", "--options", str(options), "--dim", "8"]
    args += ["--heads", "1", "--layers", "1", "--hidden", "8", "--workers", "1"]
    assert cli.main(args) == 0
    text = capsys.readouterr().out
    assert "| `grpo` | no | 256 |" in text
    assert "| `soft-q` |" not in text
    assert "Failed runs" in text
    assert "lookahead, soft-q, seed 0:" in text
    assert cli.main([*args, "--agents", "soft-q", "--options", str(options)]) == 2


def test_another_problem_in_the_place_of_a_run_is_refused(tmp_path):
    def first(problem):
        return jobs(plan(problems=(problem,)), tmp_path / "out")[0]

    measure(first(Problem("lookahead")))
    assert finished(first(Problem("lookahead")))
    for other in (Problem("lookahead", task_seed=1), Problem("lookahead", beta=2.0)):
        with pytest.raises(RunError, match="another problem"):
            finished(first(other))
    table = tmp_path / "table.tsv"
    table.write_text("sequence\tscore\n0 0\t1\n0 1\t2\n1 0\t0.5\n1 1\t0\n")
    measure(first(Problem(str(table))))
    assert finished(first(Problem(str(table))))
    table.write_text("sequence\tscore\n0 0\t1\n0 1\t2\n1 0\t0.6\n1 1\t0\n")
    with pytest.raises(RunError, match="another problem"):
        finished(first(Problem(str(table))))


@pytest.mark.slow
def test_what_cannot_be_verified_is_refused_before_anything_is_trained(tmp_path):
    table = tmp_path / "large.tsv"
    rows = [f"{i:018b}\t{i % 2}\n" for i in range(2**18)]
    table.write_text("sequence\tscore\n" + "".join(rows))
    with pytest.raises(ValueError, match="262,143 states"):
        run(plan(problems=(Problem("lookahead"), Problem(str(table)))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_with_impossible_responses_is_reported(tmp_path):
    table = tmp_path / "t.tsv"
    table.write_text("sequence\tscore\n0 0\t1\n0 1\t2\n1 0\t-inf\n1 1\t0\n")
    known = targets(
        plan(agents=("best-of-n", "vargrad"), options={}, calls=4096), Problem(str(table))
    )
    assert known == {"best-of-n": None, "vargrad": True}
    assert intervals.interval([math.inf, 1.0]) == "∞"
    assert intervals.half_width([math.inf, 1.0]) == math.inf
