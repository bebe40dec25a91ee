"""The benchmark beyond enumeration: estimates with their intervals, held against the truth."""

from __future__ import annotations

import csv
import json
import math
from itertools import product

import pytest
import torch

import rl_ebm
from rl_ebm.cli import commands as cli
from rl_ebm.policies import AutomatonPolicy, TransformerConfig, Uniform, log_prob
from rl_ebm.studies import bench_report
from rl_ebm.studies.bench import Plan, Problem, finished, jobs, measure, run
from rl_ebm.studies.bench_report import estimated, frontier, picture, table, targets
from rl_ebm.studies.bench_rows import (
    BENCHED,
    bracket,
    bracket_of_mean,
    last_of,
    samples_of,
    write_rows,
)
from rl_ebm.studies.seeds import between, interval
from rl_ebm.tasks import TASKS, Task, chains, register
from rl_ebm.training import loop
from rl_ebm.training.checkpoint import RunError
from rl_ebm.training.directory import load
from rl_ebm.verification.verify import verify_listed

TINY = TransformerConfig(layers=1, heads=1, dim=8, hidden=8)
BRACKETED = (*(figure.key for figure in BENCHED), "kl_reference")


@pytest.fixture
def chain(monkeypatch):
    """A chain that could be listed, and is taken for one that cannot."""
    register(Task("chain", "neighbours", vocab_size=3, max_length=3, reward=chains.potts))
    monkeypatch.setattr(loop, "MAX_EVALUATED", 0)
    yield Problem("chain", beta=0.8)
    del TASKS["chain"]


def plan(problem, **changes):
    fields = {
        "agents": ("vargrad",),
        "problems": (problem,),
        "seeds": (0,),
        "calls": 64,
        "network": TINY,
        "options": {"vargrad": {"batch_size": 16}},
        "samples": 300,
    }
    return Plan(**(fields | changes))


def test_a_look_holds_what_is_true_of_its_policy(chain, tmp_path):
    job = jobs(plan(chain), tmp_path)[0]
    rows = measure(job)
    assert finished(job)
    last = last_of(rows)[0]
    assert last["step"] == 4
    assert last["samples"] == samples_of(rows) == 300
    policy, ebm = load(job.run)
    # Every prefix, and for the reference a sum over all responses.
    truth = verify_listed(policy, rl_ebm.solve(ebm)).scalars()
    tokens, lengths = ebm.space.sequences()
    with torch.no_grad():
        log_pi = log_prob(policy, ebm.space, tokens, lengths).double()
    truth["kl_reference"] = float((log_pi.exp() * (log_pi + 3 * math.log(3))).sum())
    for key in BRACKETED:
        low, high = bracket(last, key)
        assert low <= truth[key] <= high, key
        assert low < last[key] < high, key
    assert last["kl_policy_target_high"] - last["kl_policy_target_low"] < 0.5
    # The run's own report says the same.
    told = json.loads((job.run / "report.json").read_text())
    for key in (figure.key for figure in BENCHED):
        assert [told[key][end] for end in ("low", "estimate", "high")] == [
            pytest.approx(last[name]) for name in (f"{key}_low", key, f"{key}_high")
        ]
    other = jobs(plan(chain, samples=200), tmp_path)[0]
    with pytest.raises(RunError, match="budget or samples"):
        finished(other)


def look(seed=0, kl=1.0, width=0.1, agent="vargrad", step=4, **more):
    row = {"task": "chain", "agent": agent, "seed": seed, "step": step, "seconds": 1.0}
    row |= {"reward_calls": 64, **dict.fromkeys(BRACKETED, kl)}
    if width is not None:
        row["samples"] = 300
        for key in BRACKETED:
            row |= {f"{key}_low": kl - width, f"{key}_high": kl + width}
    return row | more


def test_a_cell_has_what_seeds_change_and_what_samples_change():
    rows = [look(0, 1.0), look(1, 1.5, 0.3)]
    low, high = bracket_of_mean(rows, "kl_policy_target")
    assert (low, high) == (pytest.approx((0.9 + 1.2) / 2), pytest.approx((1.1 + 1.8) / 2))
    text = table(plan(Problem("potts"), seeds=(0, 1)), Problem("potts"), rows)
    assert f"| {interval([1.0, 1.5])} [1.05, 1.45] |" in text
    rows[1]["kl_policy_target_high"] = math.inf
    assert bracket_of_mean(rows, "kl_policy_target")[1] == math.inf
    one = table(plan(Problem("potts")), Problem("potts"), [look(0, 17.234, 0.2)])
    assert "| 17.23 [17.03, 17.43] (one run) |" in one
    # What is exact has no bracket, of any width.
    exact = [look(0, 1.0, None), look(1, 1.5, None)]
    assert bracket(exact[1], "tv") == (1.5, 1.5)
    assert samples_of(exact) is None
    plain = table(plan(Problem("lookahead"), seeds=(0, 1)), Problem("lookahead"), exact)
    assert f"| {interval([1.0, 1.5])} |" in plain
    assert "[" not in plain


def test_the_section_says_which_uncertainty_is_which():
    (told,) = estimated(Problem("potts"), [look()])
    for part in ("300 exact samples", "10^29 responses", "other seeds", "other samples"):
        assert part in told
    assert estimated(Problem("lookahead"), [look(width=None)]) == []


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ((0.2213, 0.2261), "[0.2213, 0.2261]"),
        ((0.9, 1.8), "[0.9, 1.8]"),
        ((19.04, 20.66), "[19, 20.7]"),
        ((1e-5, 0.3), "[1e-05, 0.3]"),
        ((0.5, math.inf), "[0.5, ∞]"),
        ((-math.inf, 2.0), "[-∞, 2]"),
        ((1.0, 1.0), "[1, 1]"),
        ((math.inf, math.inf), "[∞, ∞]"),
    ],
)
def test_an_interval_by_its_ends(ends, text):
    assert between(*ends) == text
    if text[1] != "-" and math.isfinite(sum(ends)):
        assert between(*ends, ends[0]) == f"{text[1:].split(',')[0]} {text}"
    assert between(0.2, 0.25, math.inf) == "∞ [0.2, 0.25]"


def test_the_legend_has_the_closest_first_and_what_has_no_run_last():
    ends = {"vargrad": (0.1, 0.9, 5.0), "soft-q": (0.7, 0.8, 0.6), "ppo": (3.0, 3.0, 3.0)}
    rows = [look(s, kl=kl, agent=a) for a, kls in ends.items() for s, kl in enumerate(kls)]
    found = bench_report.by_end(("ppo", "dpg", "vargrad", "soft-q"), rows)
    assert found == ["soft-q", "vargrad", "ppo", "dpg"]


def test_digits_end_where_runs_differ_and_after_four_where_none_does():
    assert interval([1.0, 1.5]) == "1 ± 3"
    assert interval([0.0596226888, 0.0596226889]) == "0.05962 (all alike)"
    assert interval([0.0596, 0.0597]) == "0.0597 ± 0.0006"
    assert interval([0.5, 0.5]) == "0.5 ± 0"


def test_the_file_has_intervals_only_where_there_are_any(tmp_path):
    exact, sampled = look(width=None), look()
    write_rows(tmp_path / "exact.csv", [exact])
    assert (tmp_path / "exact.csv").read_text().splitlines()[0] == ",".join(exact)
    write_rows(tmp_path / "both.csv", [exact, sampled])
    with open(tmp_path / "both.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == list(sampled)
    assert first["samples"] == first["tv_low"] == ""
    assert (second["samples"], float(second["tv_high"])) == ("300", 1.1)


def heights(axes, x):
    """Of the one band, at x."""
    (band,) = axes.collections
    (path,) = band.get_paths()
    return sorted({y for at, y in path.vertices.tolist() if at == x})


def test_the_picture_has_the_interval_of_the_run_in_the_middle(chain):
    both = product((0, 1, 2), (0, 4))
    rows = [look(seed, step=step, kl=2.0 - step / 4 + seed / 8) for seed, step in both]
    for row in rows:
        row["seconds"] = row["reward_calls"] = row["step"]
        row["kl_policy_target_low"] = row["kl_policy_target"] - 0.01
        row["kl_policy_target_high"] = row["kl_policy_target"] + 0.01
    rows[2]["kl_policy_target_high"] = math.inf
    sheet = picture(plan(chain, seeds=(0, 1, 2)), chain, rows)
    for axes in sheet.axes[:2]:
        (line,) = axes.lines
        assert list(line.get_ydata()) == [2.125, 1.125]
        assert heights(axes, line.get_xdata()[1]) == pytest.approx([1.115, 1.135])
    assert "95% interval" in sheet.axes[1].get_title()
    assert len(sheet.axes[2].lines) == 1 + 2 * 3, "the frontier, and two bars for each run's end"


def test_the_picture_has_a_band_over_all_seeds_where_kl_is_exact(chain):
    """Between two looks of a run it is on the line that is drawn between them."""
    rows = [
        look(0, step=step, kl=1.5 - step / 8, width=None, reward_calls=step) for step in (0, 2, 4)
    ]
    rows += [
        look(1, step=step, kl=2.0 - step / 8, width=None, reward_calls=step) for step in (0, 4)
    ]
    sheet = picture(plan(chain, seeds=(0, 1)), chain, rows)
    (line,) = sheet.axes[0].lines
    at = line.get_xdata().tolist()
    assert list(line.get_ydata()) == [1.5, 1.25, 1.0], "of two the one that ends closer"
    for x, low, high in zip(at, (1.5, 1.25, 1.0), (2.0, 1.75, 1.5), strict=True):
        assert heights(sheet.axes[0], x) == pytest.approx([low, high])
    assert sheet.axes[0].get_ylabel() == "exact KL(policy, target) (nats)"
    assert len(sheet.axes[2].lines) == 1
    assert [text.get_text() for text in sheet.legends[0].get_texts()][-1] == "exact frontier"


def test_the_frontier_is_drawn_through_fewer_points_of_itself(chain, monkeypatch):
    ebm, _ = chain.make()
    few = frontier(ebm)
    monkeypatch.setattr(loop, "MAX_EVALUATED", 2**17)
    every = frontier(ebm)
    assert len(few[0]) == len(every[0][::3]) < len(every[0])
    for mine, all_of_it in zip(few, every, strict=True):
        assert mine == pytest.approx(all_of_it[::3])
    monkeypatch.setattr(bench_report, "solve", _too_large)
    assert frontier(ebm) == ([], [])


def _too_large(ebm):
    raise rl_ebm.TooLargeError("no")


def test_objectives_that_state_their_end_are_told_where_nothing_is_listed():
    agents = ("vargrad", "policy-gradient", "best-of-n")
    known = targets(plan(Problem("potts"), agents=agents, calls=4096), Problem("potts"))
    assert known == {"vargrad": True, "policy-gradient": None, "best-of-n": None}


def test_a_task_keeps_its_own_reference():
    assert isinstance(Problem("phrases").make()[0].reference, AutomatonPolicy)
    assert isinstance(Problem("potts").make()[0].reference, Uniform)


@pytest.mark.parametrize("samples", [1, 0, -3])
def test_so_few_samples_have_no_spread(samples):
    with pytest.raises(ValueError, match=f"at least 2, got {samples}: one has no spread"):
        plan(Problem("potts"), samples=samples)
    with pytest.raises(ValueError, match=f"at least 2, got {samples}: one has no spread"):
        rl_ebm.TrainConfig(steps=1, samples=samples)


def test_what_neither_fits_nor_is_listed_is_refused_at_once(chain, tmp_path, monkeypatch):
    monkeypatch.setattr("rl_ebm.studies.bench.solve", _too_large)
    with pytest.raises(rl_ebm.TooLargeError):
        run(plan(chain), tmp_path / "out")
    with pytest.raises(ValueError, match=r"lookahead has .* states, .* or those of an automaton"):
        run(plan(Problem("lookahead")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_on_a_task_that_nobody_can_list(tmp_path, capsys):
    out, options = tmp_path / "out", tmp_path / "options.json"
    options.write_text(json.dumps({"vargrad": {"batch_size": 32}}))
    args = ["bench", "--out", str(out), "--agents", "vargrad,exact", "--tasks", "potts,lookahead"]
    args += ["--seeds", "1", "--calls", "64", "--options", str(options), "--dim", "8", "--heads"]
    args += ["1", "--layers", "1", "--hidden", "8", "--samples", "20", "--workers", "1"]
    assert cli.main(args) == 0
    said = capsys.readouterr()
    assert "Estimated from 20 exact samples" in said.out
    assert "potts, exact, seed 0: exact lists the logits of all prefixes" in said.out
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["task"], row["samples"]) for row in rows} == {("potts", "20"), ("lookahead", "")}
    ends = [row for row in rows if row["task"] == "potts"][-1]
    low, high = float(ends["kl_policy_target_low"]), float(ends["kl_policy_target_high"])
    assert between(low, high) in said.out
    assert between(low, high) in said.err
    assert (out / "potts.png").stat().st_size > 10_000
