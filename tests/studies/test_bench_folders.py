"""What is in a benchmark's folder, or in its file of options, from whomever."""

from __future__ import annotations

import math
import os

import pytest
from bench_cases import OPTIONS, plan

from rl_ebm.policies import TransformerConfig
from rl_ebm.studies import bench
from rl_ebm.studies.bench import Problem, jobs, measure, run
from rl_ebm.studies.bench_options import read_options
from rl_ebm.studies.bench_report import write_report
from rl_ebm.training.checkpoint import RunError


def test_what_a_killed_benchmark_was_writing_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_run_all", lambda plan, out, todo, workers: ([], []))
    (tmp_path / "results.csv.0a1b2c3d.part").write_text("x")
    (tmp_path / "thesis.part").write_text("x")
    bench.run(plan(problems=(Problem("lookahead"),)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.part"]


@pytest.mark.parametrize("spoilt", ["state.pt", "config.json", "metrics.csv"])
def test_a_damaged_run_is_refused_before_anything_is_trained(spoilt, tmp_path, monkeypatch):
    small = plan(agents=("grpo", "soft-q"), problems=(Problem("lookahead"),))
    first = jobs(small, tmp_path)[0]
    measure(first)
    whole = (first.run / spoilt).read_bytes()
    (first.run / spoilt).write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(bench, "Workers", lambda *_: pytest.fail("something was trained"))
    with pytest.raises(RunError, match=spoilt):
        run(small, tmp_path)


def test_what_no_run_could_have_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "Workers", lambda *_: pytest.fail("something was trained"))
    given = {
        "seconds must be": {"seconds": math.nan},
        "calls must be": {"calls": 2**63},
        "grpo: lr must be": {"options": {"grpo": {"lr": math.nan}}},
        "batch_size must be an integer": {"options": {"grpo": {"batch_size": 1.5}}},
        "not enough memory": {"network": TransformerConfig(dim=2**24)},
    }
    for said, changed in given.items():
        with pytest.raises(ValueError, match=said):
            run(plan(agents=("grpo",), **({"options": {}} | changed)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["plan.json", "results.csv", "report.md", "lookahead.png"])
@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_what_stands_in_a_files_place_is_refused_before_anything_is_trained(
    name, kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(bench, "Workers", lambda *_: pytest.fail("something was trained"))
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.write_text("precious")
    make = {
        "link": lambda: (out / name).symlink_to(outside),
        "folder": (out / name).mkdir,
        "fifo": lambda: os.mkfifo(out / name),
    }
    make[kind]()
    with pytest.raises(RunError, match=name):
        run(plan(problems=(Problem("lookahead"),)), out)
    assert outside.read_text() == "precious"


@pytest.mark.slow
def test_a_picture_is_written_beside_what_has_another_name(tmp_path):
    """A hard link to it keeps what it had."""
    small = plan(
        agents=("grpo",),
        options={"grpo": OPTIONS["grpo"]},
        problems=(Problem("lookahead"),),
        seeds=(0,),
    )
    rows = [row for job in jobs(small, tmp_path) for row in measure(job)]
    outside = tmp_path / "outside"
    outside.write_text("precious")
    os.link(outside, tmp_path / "lookahead.png")
    write_report(small, rows, tmp_path)
    assert outside.read_text() == "precious"
    assert (tmp_path / "lookahead.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("config.json", lambda path: path.symlink_to("/nonexistent")),
        ("run.lock", lambda path: path.symlink_to("/etc/hostname")),
        ("policy.safetensors", lambda path: path.write_text("x")),
        ("metrics.csv", os.mkfifo),
    ],
)
def test_what_was_begun_is_looked_at_before_anything_is_trained(name, spoil, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "Workers", lambda *_: pytest.fail("something was trained"))
    small = plan(
        agents=("grpo",), options={"grpo": OPTIONS["grpo"]}, problems=(Problem("lookahead"),)
    )
    second = jobs(small, tmp_path)[1]
    second.run.mkdir(parents=True)
    spoil(second.run / name)
    with pytest.raises(RunError, match=name):
        run(small, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"grpo": {"lr": 1, "lr": 2}}', "'lr' is there twice"),
        ('{"grpo": {}, "grpo": {}}', "'grpo' is there twice"),
        ("[1]", "must hold"),
        ("{", "no JSON"),
    ],
)
def test_a_file_of_options_is_one_sentence(text, said, tmp_path):
    (tmp_path / "o.json").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        read_options(tmp_path / "o.json")
    assert "\n" not in str(caught.value)


def test_a_name_of_a_table_writes_no_escapes(tmp_path):
    table = tmp_path / "a\033[31mEVIL\007.tsv"
    table.write_text("sequence\tscore\n0 0\t1\n0 1\t2\n1 0\t0.5\n1 1\t0\n")
    small = plan(
        agents=("grpo",),
        options={"grpo": OPTIONS["grpo"]},
        problems=(Problem(str(table)),),
        seeds=(0,),
    )
    rows = [row for job in jobs(small, tmp_path / "out") for row in measure(job)]
    text = write_report(small, rows, tmp_path / "out", ["a\033[31mEVIL, grpo: no"])
    assert "EVIL" in text
    assert not any(sign in text for sign in "\033\007")
