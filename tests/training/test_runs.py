"""Run directories: rebuilt without running code, and damage that is told in one sentence."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil

import pytest
import torch
from run_cases import (
    NETWORK,
    load_state,
    refused,
    small_options,
    snapshot,
    train_args,
)
from safetensors.torch import load_file, save_file

import rl_ebm
from rl_ebm.cli import main
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.training import checkpoint
from rl_ebm.training.directory import RunError, load, write_config
from rl_ebm.training.run import resume, train

SPACE = rl_ebm.TokenSpace(3, 3)


def scores(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def score_by_sum(tokens, lengths):
    return tokens.sum(1).double() / 2


EBMS = {
    "table": lambda: rl_ebm.EBM(SPACE, scores(27), 0.5),
    "float32 table": lambda: rl_ebm.EBM(SPACE, scores(27).float(), 0.5, Uniform(SPACE)),
    "prompts": lambda: rl_ebm.EBM(SPACE, scores(2, 27), 2.0, None, [[1, 2], []]),
    "EOS": lambda: rl_ebm.EBM(rl_ebm.TokenSpace(3, 3, 1), scores(7), 1, None, [[]]),
}


@pytest.mark.parametrize("network", [NETWORK, "tabular"], ids=["transformer", "tabular"])
@pytest.mark.parametrize("name", EBMS)
def test_load_rebuilds_policy_and_ebm(name, network, tmp_path):
    ebm = EBMS[name]()
    trained, _ = train(
        ebm, out=tmp_path / "r", options=small_options("soft-q"), network=network, steps=2
    )
    policy, again = load(tmp_path / "r")
    assert (again.space, again.beta, again.prompts) == (ebm.space, ebm.beta, ebm.prompts)
    assert (again.reference is None) == (ebm.reference is None)
    assert again.reward_model.scores.dtype == ebm.reward_model.scores.dtype
    assert torch.equal(again.reward_model.scores, ebm.reward_model.scores)
    assert policy.logits_are_values
    n = ebm.num_prompts
    ids = torch.arange(6) % n
    batch = rl_ebm.solve(ebm).sample(6, torch.Generator().manual_seed(0), ids)
    with torch.no_grad():
        assert torch.equal(policy.logits(batch.tokens, ids), trained.logits(batch.tokens, ids))
    assert torch.equal(
        again.log_weight(batch.tokens, batch.lengths, ids),
        ebm.log_weight(batch.tokens, batch.lengths, ids),
    )


@pytest.mark.parametrize("task", ["random", "pairwise", "prompts"])
def test_tasks_are_drawn_again(task, tmp_path):
    run = tmp_path / "r"
    args = [*train_args(steps=1, task_seed=3, beta=0.7), "--task", task, "--out", str(run)]
    assert main([*args, "--reference", "uniform"]) == 0
    want = rl_ebm.envs.make_task(
        task, vocab_size=3, max_length=3, beta=0.7, reference="uniform", task_seed=3
    )
    _, ebm = load(run)
    assert torch.equal(rl_ebm.solve(ebm).log_z, rl_ebm.solve(want).log_z)
    assert not (run / "task.safetensors").exists()


def test_the_scores_of_a_table_file_are_copied(tmp_path):
    table = tmp_path / "t.tsv"
    table.write_text("sequence\tscore\nCA\t1\nAA\t2\nAC\t-inf\nCC\t4\n")
    run = tmp_path / "r"
    args = ["train", "--table", str(table), "--agent", "exact", "--policy", "tabular"]
    assert main([*args, "--normalise", "minmax", "--steps", "1", "--out", str(run)]) == 0
    table.unlink()
    _, ebm = load(run)
    want = [1 / 3, -torch.inf, 0, 1]  # AA AC CA CC
    assert ebm.reward_model.scores.tolist() == [pytest.approx(want)]
    assert json.loads((run / "config.json").read_text())["ebm"]["alphabet"] == ["A", "C"]


def test_a_python_reward_is_asked_for_again(tmp_path):
    run = tmp_path / "r"
    reference = Tabular(SPACE)
    ebm = rl_ebm.EBM(SPACE, score_by_sum, 1.0, reference)
    train(ebm, out=run, options=small_options("soft-q"), network=NETWORK, steps=1)
    with pytest.raises(RunError, match=r"load\(run, reference=\.\.\.\)"):
        load(run, reward=score_by_sum)
    with pytest.raises(RunError, match=r"load\(run, reward=\.\.\.\)"):
        load(run, reference=reference)
    _, again = load(run, reward=score_by_sum, reference=reference)
    assert torch.equal(rl_ebm.solve(again).log_z, rl_ebm.solve(ebm).log_z)
    _, _, more = resume(run, steps=2, reward=score_by_sum, reference=reference)
    assert more
    assert load_state(run)["step"] == 2
    assert main(["verify", str(run)]) == 2


# Damage -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run on a table."""
    run = tmp_path_factory.mktemp("runs") / "run"
    ebm = rl_ebm.EBM(SPACE, scores(27))
    train(ebm, out=run, options=small_options("soft-q"), network=NETWORK, steps=3)
    return run


def test_a_foreign_or_damaged_checkpoint(run, capsys):
    good = (run / "state.pt").read_bytes()
    middle = bytearray(good)
    middle[len(good) // 2 : len(good) // 2 + 4000] = bytes(4000)
    cases = [good[:n] for n in (0, 1, 2, 4, 100, len(good) // 2, len(good) - 1)]
    cases += [b"\x80", b"\x80\x02", b"hello", b"\0" * 50, b"PK\3\4", b"G", b"X\1\0", bytes(middle)]
    cases += [pickle.dumps(x, 2) for x in (1, [], {"format": 1}, {"format": 1, "step": 3})]
    cases += [pickle.dumps({}, 4), pickle.dumps(print, 2)]
    for data in cases:
        (run / "state.pt").write_bytes(data)
        before = snapshot(run)
        assert "state.pt" in refused(capsys, "train", "--resume", run, "--steps", 9), data[:9]
        assert snapshot(run) == before


@pytest.mark.parametrize("key", ["policy", "agent", "generator", "step", "tokens", "event_sizes"])
@pytest.mark.parametrize("value", [None, "x", 3.5, [], {}, torch.zeros(2)], ids=str)
def test_a_checkpoint_whose_parts_are_of_another_kind(key, value, run, capsys):
    state = load_state(run) | {key: value}
    if key == "event_sizes" and value == {}:
        pytest.skip("that is a dictionary")
    torch.save(state, run / "state.pt")
    assert "state.pt" in refused(capsys, "train", "--resume", run, "--steps", 9)


def test_a_checkpoint_of_another_agent_or_size(run, capsys, tmp_path):
    other = tmp_path / "other"
    ebm = rl_ebm.EBM(SPACE, scores(27))
    train(ebm, "policy-gradient", other, options=small_options("policy-gradient"),
          network=NETWORK, steps=1)  # fmt: skip
    for source in (other, run):
        shutil.copy(source / "state.pt", tmp_path / f"{source.name}.pt")
    shutil.copy(tmp_path / "other.pt", run / "state.pt")
    assert "does not fit" in refused(capsys, "train", "--resume", run, "--steps", 9)
    shutil.copy(tmp_path / "run.pt", other / "state.pt")
    assert "state.pt" in refused(capsys, "train", "--resume", other, "--steps", 9)
    config = json.loads((run / "config.json").read_text())
    config["policy"]["dim"] = 16
    shutil.copy(tmp_path / "run.pt", run / "state.pt")
    (run / "config.json").write_text(json.dumps(config))
    assert "another agent or network" in refused(capsys, "train", "--resume", run, "--steps", 9)
    assert "another policy" in refused(capsys, "verify", run)


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_bomb_executes_nothing(run, tmp_path, capsys):
    bomb = Bomb(str(tmp_path / "executed"))
    (run / "state.pt").write_bytes(pickle.dumps(bomb, 2))
    refused(capsys, "train", "--resume", run, "--steps", 9)
    torch.save({"format": 1, "policy": bomb}, run / "state.pt")
    refused(capsys, "train", "--resume", run, "--steps", 9)
    for name in ("policy.safetensors", "task.safetensors"):
        (run / name).write_bytes(pickle.dumps(bomb))
        assert name in refused(capsys, "verify", run)
    assert not (tmp_path / "executed").exists()


CONFIGS = ["", "{", "[]", "1", "null", '{"ebm": 1}', "\0", "[" * 100_000, '"\\ud800"']
CONFIGS += [f'{{"ebm": {x}, "policy": {x}, "agent": {x}, "train": {x}}}' for x in ("1", "{}", "[]")]


@pytest.mark.parametrize("command", ["train", "verify", "sample"])
@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text[:16])
def test_a_damaged_configuration(command, text, run, capsys):
    (run / "config.json").write_text(text)
    args = ["train", "--resume", run, "--steps", 9] if command == "train" else [command, run]
    assert "config.json" in refused(capsys, *args)


def parts(config: dict, path: tuple[str, ...] = ()):
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from parts(value, (*path, key))


@pytest.mark.slow
def test_a_configuration_that_lacks_an_entry(run, capsys):
    text = (run / "config.json").read_text()
    for path in parts(json.loads(text)):
        config = json.loads(text)
        inner = config
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        (run / "config.json").write_text(json.dumps(config))
        for args in (("train", "--resume", run, "--steps", 3), ("verify", run)):
            code = main(list(map(str, args)))  # an entry may have a default, none ends badly
            assert code in (0, 2), (path, args)
            assert capsys.readouterr().err.count("\n") == code / 2


@pytest.mark.parametrize("name", ["policy.safetensors", "task.safetensors"])
def test_damaged_tensors(name, run, capsys):
    good = (run / name).read_bytes()
    for data in (b"", b"x", good[:20], good[:-1], good + b"x", b"\xff" * 64):
        (run / name).write_bytes(data)
        assert name in refused(capsys, "verify", run)
    (run / name).unlink()
    assert "missing" in refused(capsys, "verify", run)
    (run / name).mkdir()
    assert name in refused(capsys, "verify", run)
    (run / name).rmdir()
    save_file({"other": torch.zeros(2)}, run / name)
    for command in ("verify", "sample"):
        assert name in refused(capsys, command, run)
    if name == "task.safetensors":
        assert name in refused(capsys, "train", "--resume", run, "--steps", 9)


def test_resuming_needs_no_policy_file(run):
    (run / "policy.safetensors").unlink()
    assert main(["train", "--resume", str(run), "--steps", "4"]) == 0
    assert torch.equal(
        load_state(run)["policy"]["backbone.token.weight"],
        load_file(run / "policy.safetensors")["backbone.token.weight"],
    )


# Atomic files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(broken, tmp_path, monkeypatch):
    path = tmp_path / "f"
    checkpoint.write_text(path, "old")

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if broken != "write":
        monkeypatch.setattr(checkpoint.os, broken, fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_atomically(path, fail if broken == "write" else lambda f: f.write(b"new"))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            checkpoint.os, name, lambda *a, n=name, f=real: (calls.append(n), f(*a))[1]
        )
    checkpoint.write_text(tmp_path / "f", "text")
    assert calls == ["fsync", "replace"]


def test_the_table_is_written_before_the_configuration(tmp_path, monkeypatch, made):
    """A folder with a config.json is a whole run."""
    written = []
    real = os.replace
    monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (written.append(b.name), real(a, b)))
    config = json.loads((made / "config.json").read_text())
    write_config(tmp_path / "r", config, rl_ebm.EBM(SPACE, scores(27)))
    assert written == ["task.safetensors", "config.json"]
