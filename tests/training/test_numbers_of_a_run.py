"""Numbers in a run's files that no training leaves are refused, and nothing is changed by then."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rl_ebm
from rl_ebm.agents import AGENTS as AGENTS_KNOWN
from rl_ebm.agents import make_options
from rl_ebm.cli import main
from rl_ebm.files import RunError
from rl_ebm.training import board
from rl_ebm.training.checkpoint import load_state

SPACE = rl_ebm.TokenSpace(3, 2)
AGENTS = ("soft-q", "tree-backup", "trajectory-balance", "dpg", "ppo")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each agent, with rows of replay where it has one."""
    folder = tmp_path_factory.mktemp("numbers")
    reward = torch.randn(9, generator=torch.Generator().manual_seed(0))
    for agent in AGENTS:
        options = None
        if agent == "soft-q":
            options = rl_ebm.agents.SoftQConfig(replay_size=8, replay_batch=4, tau=0.5)
        policy = rl_ebm.policies.Tabular(SPACE)
        ebm = rl_ebm.EBM(SPACE, reward)
        rl_ebm.train(ebm, agent, folder / agent, options=options, policy=policy, steps=3)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    shutil.copytree(made / request.param, tmp_path / "run")
    return tmp_path / "run"


def floats(state: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every floating tensor of a checkpoint, by where it stands."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from floats(value, f"{name}.{key}")
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            yield from floats(value, f"{name}[{i}]")
    elif isinstance(state, Tensor) and state.is_floating_point() and state.numel():
        yield name, state


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir() if path.name != "run.lock"}


def resumed(run: Path, steps: int) -> None:
    policy = rl_ebm.policies.Tabular(SPACE)
    rl_ebm.resume(run, steps=steps, policy=policy)


@pytest.mark.parametrize("run", AGENTS, indirect=True)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_every_number_of_a_checkpoint_is_looked_at(run: Path, value: float) -> None:
    good = (run / "state.pt").read_bytes()
    names = [name for name, _ in floats(load_state(run / "state.pt"))]
    assert len(names) > 3
    for name in names:
        (run / "state.pt").write_bytes(good)
        state = load_state(run / "state.pt")
        dict(floats(state))[name].flatten()[-1] = value
        torch.save(state, run / "state.pt")
        before = contents(run)
        with pytest.raises(RunError, match="damaged"):
            resumed(run, 6)
        assert contents(run) == before, name


@pytest.mark.parametrize("run", ["soft-q"], indirect=True)
def test_a_count_of_no_steps(run: Path) -> None:
    state = load_state(run / "state.pt")
    for name, value in floats(state):
        if name.endswith(".step"):
            value.zero_()
    torch.save(state, run / "state.pt")
    with pytest.raises(RunError, match="step of its optimiser is"):
        resumed(run, 6)


@pytest.mark.parametrize("run", AGENTS, indirect=True)
def test_what_training_left_goes_on(run: Path) -> None:
    resumed(run, 6)
    assert load_state(run / "state.pt")["step"] == 6


@pytest.fixture
def tabular(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    reward = torch.randn(9, generator=torch.Generator().manual_seed(0))
    rl_ebm.train(rl_ebm.EBM(SPACE, reward), "soft-q", run, network="tabular", steps=2)
    return run


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_finished_run_keeps_its_weights(
    tabular: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_state(tabular / "state.pt")
    next(iter(state["policy"].values())).fill_(value)
    torch.save(state, tabular / "state.pt")
    before = contents(tabular)
    assert main(["train", "--resume", str(tabular)]) == 2
    assert "weights that are NaN or infinite" in capsys.readouterr().err
    assert contents(tabular) == before


def test_trained_weights_are_not_lost_with_their_checkpoint(
    tabular: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (tabular / "policy.safetensors").read_bytes()
    for name in ("policy.safetensors.before", "policy.safetensors.before.1"):
        (tabular / "state.pt").unlink()
        assert main(["train", "--resume", str(tabular), "--steps", "9"]) == 0
        err = capsys.readouterr().err
        assert "state.pt is missing, so the run begins again at step 0" in err
        assert f"kept in {tabular / name}" in err
        assert ((tabular / name).read_bytes() == weights) == (name[-1] != "1")
    assert main(["verify", str(tabular)]) == 0


def test_what_was_said_of_a_policy_stays_where_a_resume_cannot_begin(
    tabular: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    before = (tabular / "report.json").read_bytes()
    monkeypatch.setattr(board, "create", full)
    with pytest.raises(OSError, match="No space left"):
        rl_ebm.resume(tabular, steps=4)
    assert (tabular / "report.json").read_bytes() == before
    monkeypatch.undo()
    rl_ebm.resume(tabular, steps=4)
    assert (tabular / "report.json").read_bytes() != before


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("command", ["verify", "sample", "diagnose"])
def test_weights_that_are_no_numbers(
    tabular: Path, value: float, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(tabular / "policy.safetensors")
    next(iter(weights.values())).flatten()[0] = value
    save_file(weights, tabular / "policy.safetensors")
    assert main([command, str(tabular)]) == 2
    assert "weights that are NaN or infinite" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize("name", ["policy.safetensors", "task.safetensors"])
def test_numbers_of_another_kind(
    tabular: Path, kind: torch.dtype, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = load_file(tabular / name)
    save_file({key: value.to(kind) for key, value in stored.items()}, tabular / name)
    assert main(["verify", str(tabular)]) == 2
    assert "are floats" in capsys.readouterr().err


@pytest.mark.parametrize("confidence", [math.nan, -1.0, 0.0, 1.0, math.inf])
def test_a_confidence_is_looked_at_where_nothing_is_sampled(
    tabular: Path, confidence: float
) -> None:
    policy, ebm = rl_ebm.load(tabular)
    with pytest.raises(ValueError, match="confidence must be a number in"):
        rl_ebm.verify(policy, rl_ebm.solve(ebm), confidence=confidence)


@pytest.mark.parametrize("value", [-1e39, math.nan, -math.inf])
def test_a_stand_in_is_an_option_in_range(value: float) -> None:
    """Said before a benchmark makes a folder for its runs."""
    for name in ("soft-q", "policy-gradient", "dpo"):
        with pytest.raises(ValueError, match=f"{name}: forbidden_log_weight must be"):
            make_options(name, AGENTS_KNOWN[name], {"forbidden_log_weight": value})
