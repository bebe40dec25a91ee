"""Run folders that were damaged in every way: success or one sentence, and nothing outside."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import damage
import pytest
import torch
from run_cases import NETWORK, NETWORK_FLAGS, REPLAY, TASK_FLAGS, small_options

import rl_ebm
from rl_ebm.cli import main
from rl_ebm.train import train

MAKERS = {
    "soft-q": ["--agent", "soft-q", *TASK_FLAGS, "--batch-size", "16", *REPLAY],
    "dpg": ["--agent", "dpg", "--task", "prompts", "--vocab-size", "3", "--max-length", "3",
            "--batch-size", "16"],
    "sampled-teacher": ["--agent", "sampled-teacher", *TASK_FLAGS, "--batch-size", "16"],
    "automata": ["--agent", "trajectory-balance", "--reward", "2*contains:1 2 + 3*contains:0 0",
                 "--vocab-size", "3", "--max-length", "4", "--batch-size", "16"],
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of each kind."""
    folder = tmp_path_factory.mktemp("damaged")
    for name, args in MAKERS.items():
        out = ["--steps", "3", "--log-every", "1", "--out", str(folder / name)]
        assert main(["train", *args, *NETWORK_FLAGS, *out]) == 0
    corpus = folder / "corpus"
    corpus.write_text("0 1 2\n1 1 0\n2 0 1\n")
    args = ["train", "--agent", "exact", "--reward", "2*contains:1 2", "--vocab-size", "3"]
    args += ["--max-length", "3", "--reference", f"hmm:{corpus}?states=2", *NETWORK_FLAGS]
    assert main([*args, "--steps", "2", "--out", str(folder / "hmm")]) == 0
    space = rl_ebm.TokenSpace(3, 3)
    ebm = rl_ebm.EBM(space, torch.randn(2, 27), 1.0, None, [[1], []])
    train(ebm, out=folder / "table", options=small_options("soft-q"), network=NETWORK, steps=2)
    return folder


def commands(run: Path, rng: random.Random) -> list[str]:
    return rng.choice(
        [
            ["train", "--resume", str(run), "--steps", "5"],
            ["train", "--resume", str(run), "--steps", "5"],
            ["train", "--resume", str(run)],
            ["verify", str(run)],
            ["sample", str(run), "-n", "3"],
        ]
    )


def one_case(made: Path, tmp_path: Path, seed: int) -> str | None:
    """A damaged folder and a command; what is wrong with its end."""
    rng = random.Random(seed)
    source = rng.choice(sorted(p for p in made.iterdir() if p.is_dir()))
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(source, run)
    kind = rng.choice(
        [damage.damage_bytes, damage.damage_config, damage.damage_state, damage.damage_state,
         damage.damage_pickle, damage.damage_tensors, damage.damage_metrics, damage.damage_kind]
    )  # fmt: skip
    what = kind(run, rng, outside) if kind is damage.damage_kind else kind(run, rng)
    before = outside.read_bytes() if outside.exists() else None
    args = commands(run, rng)
    result = damage.run_limited(args, tmp_path / "log")
    fault = result.fault()
    if before is not None and outside.read_bytes() != before:
        fault = "a file outside the run was changed"
    shutil.rmtree(run)
    outside.unlink(missing_ok=True)
    return fault and f"seed {seed}, {source.name}, {what}, {args[:2]}: {fault}"


@pytest.mark.slow
def test_damaged_folders(made, tmp_path):
    faults = [fault for seed in range(2500) if (fault := one_case(made, tmp_path, seed))]
    assert faults == []


def test_some_damaged_folders(made, tmp_path):
    faults = [fault for seed in range(10_000, 10_040) if (fault := one_case(made, tmp_path, seed))]
    assert faults == []
