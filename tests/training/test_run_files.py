"""Files of a run: nothing outside of its folder is written, cut, deleted, read or waited for."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
from pathlib import Path

import damage
import pytest
import torch
from run_cases import (
    finished_run,
    load_state,
    refused,
    train_args,
)

import rl_ebm
from rl_ebm.cli import main
from rl_ebm.files import RunError
from rl_ebm.files import opening as files
from rl_ebm.files.tensors import holds, load_tensors, save_tensors
from rl_ebm.messages import memory
from rl_ebm.training import checkpoint
from rl_ebm.training.checkpoint import load_state as read_state
from rl_ebm.training.checkpoint import save_state
from rl_ebm.training.metrics_csv import MetricsFile, read_rows

SPACE = rl_ebm.TokenSpace(3, 3)
NAMES = ("config.json", "state.pt", "policy.safetensors", "task.safetensors", "metrics.csv",
         "report.json", "events", "certificate.json", "run.lock", "state.pt.part")  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("files") / "run")


def file_of(run: Path, name: str) -> Path:
    return next(run.glob("events.*")) if name == "events" else run / name


@pytest.mark.parametrize("name", NAMES)
def test_a_link_is_refused_and_what_it_points_to_stays(name, run, tmp_path, capsys):
    path, outside = file_of(run, name), tmp_path / "outside"
    data = path.read_bytes() + b"and more" if path.exists() else b"mine"
    outside.write_bytes(data)
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    before = outside.stat()
    for args in (
        ["train", "--resume", run, "--steps", 5],
        [*train_args(steps=1), "--out", run, "--overwrite"],
        ["verify", run],
        ["sample", run],
    ):
        assert "is a symbolic link" in refused(capsys, *args), args
        assert path.is_symlink()
        assert (outside.read_bytes(), outside.stat().st_mtime_ns) == (data, before.st_mtime_ns)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["FIFO", "socket", "folder"])
def test_what_is_no_file_is_refused_at_once(name, kind, run, capsys, monkeypatch):
    path = file_of(run, name)
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(run)  # their names are short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    else:
        path.mkdir()
    for args in (["train", "--resume", run, "--steps", 5], ["verify", run]):
        assert f"is a {kind}" in refused(capsys, *args)


def test_a_device_takes_no_memory(run, tmp_path):
    for name in ("config.json", "state.pt", "task.safetensors", "policy.safetensors"):
        other = tmp_path / f"{name}-run"
        shutil.copytree(run, other)
        (other / name).unlink()
        (other / name).symlink_to("/dev/zero")
        result = damage.run_limited(["verify", str(other)], tmp_path / "log", memory=2**30)
        assert result.code == 2
        assert "link" in result.err
    with pytest.raises(RunError, match="is a device"):
        files.open_existing(Path("/dev/zero"))


def test_a_hard_link_keeps_what_it_had(run, tmp_path):
    """Files are replaced, and an event file with a second name is not cut in place."""
    kept = {}
    for path in sorted(run.iterdir()):
        other = tmp_path / f"other {path.name}"
        os.link(path, other)
        kept[other] = other.read_bytes()
    for name in load_state(run)["event_sizes"]:
        with open(tmp_path / f"other {name}", "ab") as file:
            file.write(b"more")
        kept[tmp_path / f"other {name}"] += b"more"
    assert main(["train", "--resume", str(run), "--steps", "5"]) == 0
    assert {path: path.read_bytes() for path in kept} == kept
    assert load_state(run)["step"] == 5


def test_the_part_of_a_file_is_not_followed(tmp_path, monkeypatch):
    outside, path = tmp_path / "outside", tmp_path / "f"
    outside.write_text("mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "known")
    (tmp_path / "f.known.part").symlink_to(outside)
    with pytest.raises(OSError, match="exists"):
        files.write_text(path, "new")
    assert outside.read_text() == "mine"
    assert (tmp_path / "f.known.part").is_symlink()
    assert not path.exists()


def test_nobody_knows_the_part_of_a_file_before_it_is_there(tmp_path):
    names = []
    for _ in range(2):
        files.write_atomically(tmp_path / "f", lambda file: names.append(file.name))
    assert names[0] != names[1]
    assert all(Path(name).match(f"{tmp_path}/f.*.part") for name in names)


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "f"

    def outer(file):
        file.write(b"outer")
        files.write_text(path, "inner")  # begins and ends while the other is written

    files.write_atomically(path, outer)
    assert path.read_text() == "outer"
    assert os.listdir(tmp_path) == ["f"]


def test_only_parts_of_a_runs_own_files_are_deleted(run):
    ours = ["state.pt.part", "state.pt.0a1b2c3d.part"]
    ours.append(f"{file_of(run, 'events').name}.0a1b2c3d.part")
    theirs = ["thesis.part", "notes.state.pt.part", "state.part", "state.pt.old.part"]
    for name in ours + theirs:
        (run / name).write_text("x")
    assert main(["train", "--resume", str(run), "--steps", "5"]) == 0
    assert not any((run / name).exists() for name in ours)
    assert all((run / name).read_text() == "x" for name in theirs)


def test_a_link_that_appears_between_the_look_and_the_opening(tmp_path, monkeypatch):
    path, outside = tmp_path / "f", tmp_path / "outside"
    path.write_text("x")
    outside.write_text("mine")
    real = files.check_regular

    def look(p: Path, alone: bool = False) -> None:
        real(p, alone)
        if not path.is_symlink():
            path.unlink()
            path.symlink_to(outside)

    monkeypatch.setattr(files, "check_regular", look)
    with pytest.raises((RunError, OSError)):
        files.open_existing(path, "r+b")
    assert outside.read_text() == "mine"


def test_events_are_never_grown(run):
    """A size beyond the file's end would be filled with zeros."""
    state = load_state(run)
    (name,) = state["event_sizes"]
    size = (run / name).stat().st_size
    state["event_sizes"][name] = 2**40
    torch.save(state, run / "state.pt")
    assert main(["train", "--resume", str(run), "--steps", "4"]) == 0
    assert (run / name).stat().st_size == size


def test_folders_of_a_benchmark_do_not_lead_out(tmp_path, capsys):
    out, outside = tmp_path / "bench", tmp_path / "outside"
    outside.mkdir()
    out.mkdir()
    (out / "runs").symlink_to(outside)
    args = ["bench", "--out", out, "--agents", "exact", "--tasks", "random", "--seeds", 1]
    assert "is a symbolic link" in refused(capsys, *args, "--calls", 8192)
    assert os.listdir(outside) == []


# Sizes before memory ------------------------------------------------------------------------------


def test_sizes_are_checked_before_memory_is_taken(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    cases = []
    for part, key, value in (
        ("policy", "layers", 10**9),
        ("policy", "dim", 4 * 10**9),
        ("policy", "hidden", 10**15),
    ):
        cases.append(json.loads(json.dumps(config)))
        cases[-1][part][key] = value
    cases.append(json.loads(json.dumps(config)))
    cases[-1]["ebm"]["space"]["vocab_size"] = 10**12
    cases.append(json.loads(json.dumps(config)))
    cases[-1]["ebm"]["space"] = {"vocab_size": 2**31, "max_length": 2**20, "eos_id": None}
    for changed in cases:
        (run / "config.json").write_text(json.dumps(changed))
        for args in (["verify", str(run)], ["train", "--resume", str(run), "--steps", "9"]):
            result = damage.run_limited(args, tmp_path / "log", memory=2**30)
            assert result.fault() is None
            assert result.code == 2


@pytest.mark.parametrize(
    "name", ["state.pt", "policy.safetensors", "task.safetensors", "metrics.csv"]
)
def test_a_file_with_a_hole_of_a_hundred_gigabytes(name, run, tmp_path):
    os.truncate(run / name, 10**11)
    read = "verify" if name.endswith(".safetensors") else "resume"
    args = {"verify": ["verify", run], "resume": ["train", "--resume", run, "--steps", 9]}[read]
    result = damage.run_limited([str(x) for x in args], tmp_path / "log", memory=2**29)
    assert (result.code, result.fault()) == (2, None)
    assert name in result.err


def test_a_header_that_claims_more_than_the_file_has(run, tmp_path, capsys):
    for shape, size in (([2**40], 2**42), ([2**31, 2**31], 2**64), ([3], 12)):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}})
        data = len(header).to_bytes(8, "little") + header.encode() + bytes(8)
        (run / "policy.safetensors").write_bytes(data)
        assert "policy.safetensors" in refused(capsys, "verify", run)


def test_a_tensor_that_is_named_again_and_again(tmp_path):
    big = torch.zeros(2**16)
    torch.save({"format": 1, "x": [big.view(2**16) for _ in range(5000)]}, tmp_path / "s")
    with pytest.raises(RunError, match="again and again"):
        read_state(tmp_path / "s")


# What is written is what is read ------------------------------------------------------------------


def some_state() -> dict[str, object]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=g)
    dtypes = (torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    return {
        "all": [x.to(dtype) for dtype in dtypes], "t": x.t(), "part": x[:, 1:3], "tied": [x, x],
        "numbers": [1, -2.5, True, None, 2**70, "text", (1, (2,))], "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0), "weights": torch.nn.Linear(2, 2).state_dict(),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
    }  # fmt: skip


def test_a_checkpoint_reads_as_torch_reads_it(tmp_path):
    """The reader of this library against torch's."""
    path = tmp_path / "s"
    save_state(path, some_state())
    mine, theirs = read_state(path), torch.load(path, weights_only=True)

    def same(a, b) -> bool:
        if isinstance(a, torch.Tensor):
            whole = torch.contiguous_format
            raw = [x.clone(memory_format=whole).flatten().view(torch.uint8) for x in (a, b)]
            return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
        if isinstance(a, dict):
            return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)):
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        return type(a) is type(b) and a == b

    assert same(mine, theirs)
    mine["tied"][0].zero_()
    assert not torch.equal(*mine["tied"])  # tensors of a checkpoint share nothing


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.zeros(1).expand(3),
        torch.zeros(2, dtype=torch.complex64),
        {1, 2},
        b"bytes",
        object(),
    ],
    ids=lambda x: str(x)[:20],
)
def test_what_could_not_be_read_again_is_not_written(value, tmp_path):
    with pytest.raises(RunError, match="a checkpoint cannot hold it"):
        save_state(tmp_path / "s", {"x": [value]})
    assert os.listdir(tmp_path) == []


def test_safetensors_are_those_of_the_library(tmp_path):
    from safetensors.torch import load_file, save_file

    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=g)
    tensors = {"a": x, "b": x.double().t(), "c": x > 0, "d": torch.tensor(3), "e": x.bfloat16(),
               "f": torch.zeros(0, 2)}  # fmt: skip
    save_tensors(tmp_path / "mine", tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs")
    for found in (load_file(tmp_path / "mine"), load_tensors(tmp_path / "theirs")):
        assert found.keys() == tensors.keys()
        for name, want in tensors.items():
            assert found[name].dtype == want.dtype
            assert torch.equal(found[name], want)
    assert holds(tmp_path / "theirs", tensors)
    assert not holds(tmp_path / "theirs", tensors | {"d": torch.tensor(4)})
    assert not holds(tmp_path / "none", tensors)


def test_tied_weights_are_written_once(tmp_path):
    x = torch.randn(1000)
    save_tensors(tmp_path / "f", {"wte": x, "head": x, "other": x + 1})
    assert (tmp_path / "f").stat().st_size < 2 * 4000 + 400
    found = load_tensors(tmp_path / "f")
    assert torch.equal(found["wte"], x)
    assert torch.equal(found["head"], x)
    assert holds(tmp_path / "f", {"wte": x, "head": x, "other": x + 1})
    assert not holds(tmp_path / "f", {"wte": x, "head": x + 0, "other": x + 1})


def test_a_full_disk_is_told_and_leaves_the_old_checkpoint(run, tmp_path):
    """Under a limit of the file size, torch's writer hides the file system's error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = (run / "state.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"state\.pt"):
            save_state(run / "state.pt", {"x": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / "state.pt").read_bytes() == before
    assert not list(run.glob("*.part"))


# metrics.csv --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"step,a\n1,2,3\n", b"step,a\n1\n", b'step,a\n"1,2\n', b"a,a\n1,2\n", b"a\n\xff\n"]
)
def test_a_damaged_table_of_metrics(data, tmp_path):
    (tmp_path / "m.csv").write_bytes(data)
    with pytest.raises(RunError, match=r"m\.csv is damaged"):
        read_rows(tmp_path / "m.csv")
    with pytest.raises(RunError, match=r"m\.csv is damaged"):
        MetricsFile(tmp_path / "m.csv", 3)


def test_a_line_of_metrics_that_does_not_end_is_not_read_to_its_end(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"step\n1\n" + b"1" * 2**23)
    with pytest.raises(RunError, match="line 3 has 4,194,304 characters or more"):
        read_rows(tmp_path / "m.csv")


# Memory -------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_told_with_both_numbers(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    memory.check_fits(1000, "it", "make it smaller")
    with pytest.raises(ValueError, match="it needs 1 KB and 1 KB are free; make it smaller"):
        memory.check_fits(1001, "it", "make it smaller")


def test_the_predicted_parameters_are_those_that_are_made():
    from rl_ebm.networks.backbone import Backbone, TransformerConfig, num_parameters

    config = TransformerConfig(layers=3, heads=2, dim=6, hidden=10)
    made = Backbone(7, 5, config)
    assert num_parameters(config, 7, 5) == sum(p.numel() for p in made.parameters())


def test_checkpoint_names_stay():
    assert checkpoint.write_text is files.write_text
