"""Every command and every example of the README runs; its figures are those of the results."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rl_ebm.cli import commands as cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
# These measure nothing; test_the_results_stand_in_the_readme and test_frameworks_page try them.
OTHERS = {"benchmarks.readme", "benchmarks.frameworks"}
SCRIPTS = sorted(set(re.findall(r"python -m (benchmarks\.[\w.]*\w)", README)) - OTHERS)
COMMANDS = [line.split("#")[0] for line in re.findall(r"^    (rl-ebm .*)$", README, flags=re.M)]


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_example_runs(example, capsys, monkeypatch):
    short = re.sub(r"seconds=\d+", "steps=2", example)
    from rl_ebm.agents import AGENTS

    monkeypatch.setattr("rl_ebm.agents.AGENTS", AGENTS)
    before = dict(AGENTS)
    try:
        exec(compile(short, "README.md", "exec"), {})
    finally:
        AGENTS.clear()
        AGENTS.update(before)


def test_a_reward_a_loss_and_an_agent_take_at_most_twenty_lines():
    assert len(EXAMPLES) == 5
    for example in EXAMPLES:
        assert len([line for line in example.splitlines() if line.strip()]) <= 20


@pytest.mark.slow
def test_every_command_runs_in_the_order_in_which_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) == 13
    for command in COMMANDS:
        short = re.sub(r"--steps \d(\d)\d", r"--steps \1", command)
        short = re.sub(r"--calls \d{6}", "--calls 2048", short)
        short = re.sub(r"--samples \d+", "--samples 20", short)
        args = shlex.split(re.sub(r"--steps 0", "--steps 1", short))[1:]
        assert cli.main(args) == 0, command
    assert (tmp_path / "runs/first/report.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_runs(script, tmp_path):
    quick = {
        "benchmarks.readme.curves": ["--quick", "--seeds", "2"],
        "benchmarks.readme.large": ["--quick", "--threads", "1"],
        "benchmarks.readme.objectives": ["--quick"],
        "benchmarks.readme.returns": ["--quick", "--seeds", "2"],
        "benchmarks.readme.scale": ["--quick", "--threads", "1"],
        "benchmarks.steer": ["--quick", "--seeds", "2"],
        "benchmarks.speed": ["--quick", "--no-compile", "--repeat", "1"],
        "benchmarks.readme.tables": [str(tmp_path / "table.tsv"), "--seconds", "1", "--dry"],
    }[script]
    rows = [f"{a}{b}\t{ord(a) * ord(b) % 7}" for a, b in itertools.product("ACGT", repeat=2)]
    (tmp_path / "table.tsv").write_text("\n".join(["sequence\tscore", *rows]) + "\n")
    results = sorted(path.stat().st_mtime_ns for path in ROOT.glob("benchmarks/results/*"))

    done = subprocess.run(
        [sys.executable, "-m", script, *quick], cwd=ROOT, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert "Measured on" in done.stdout
    now = sorted(path.stat().st_mtime_ns for path in ROOT.glob("benchmarks/results/*"))
    assert now == results, "a trial run overwrote the measured results"


def test_the_results_stand_in_the_readme():
    from benchmarks.readme.page import filled

    assert filled(README) == README
    assert "<!-- end -->\n<!-- end -->" not in README


def test_the_sentence_on_random_losses_says_what_their_results_say():
    lines = (ROOT / "benchmarks" / "results" / "losses.md").read_text().splitlines()
    head, everything = (
        [
            x.strip()
            for x in next(line for line in lines if line.startswith(f"| {name} |")).split("|")
        ]
        for name in ("losses", "all")
    )
    count = dict(zip(head, everything, strict=True))
    tried = sum(int(count[x]) for x in head[2 : head.index("not the EBM")])
    assert count["disagree"] == "0"
    said = " ".join(README.split())
    assert f"of {tried} random losses that were trained with on sampled batches none ended" in said
    moving, others = count["still moving"], count["another root"]
    assert f"but for {moving} that were still moving and {others} with several ends" in said
    assert f"which noise chose among; of {count['refused']} no limit was told" in said


def test_pictures_exist():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).is_file(), picture
