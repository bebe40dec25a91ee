"""Damaged run folders: every file with bytes, keys, headers and entries wrong, or no file at all.

Whatever is in a folder, nothing outside it is read, written or cut.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rl_ebm
from rl_ebm.cli import main

from . import judge
from .mutate import NUMBERS, TEXTS, spoil, spoil_bytes

COUNT = 500
TINY = "--layers 1 --heads 1 --dim 4 --hidden 4 --batch-size 8"
RANDOM = "--task random --vocab-size 3 --max-length 3"
BASES = {
    "soft-q": f"--agent soft-q {RANDOM} {TINY} --tau 0.1 --replay-size 16 --replay-batch 4",
    "prompts": f"--agent trajectory-balance --task prompts --vocab-size 3 --max-length 2 {TINY}",
    "automaton": "--agent policy-gradient --batch-size 8 --policy tabular --reward contains:1 "
    "--vocab-size 2 --max-length 3 --reference ngram:corpus.txt",
    "table": "--agent exact --policy tabular --table table.tsv --beta 0.5",
    "chains": f"--agent sampled-teacher --method mcmc {RANDOM} --eos-id 1 {TINY}",
    "ppo": f"--agent ppo {RANDOM} --eos-id 0 {TINY}",
    "dpg": f"--agent dpg {RANDOM} --policy tabular --batch-size 8 --reference uniform",
}
RUNS = ("resume", "finished", "verify", "sample", "load", "diagnose")
READ = {
    "config.json": RUNS,
    "policy.safetensors": ("verify", "sample", "load", "diagnose", "finished"),
    "task.safetensors": ("resume", "verify", "sample", "load"),
    "state.pt": ("resume", "resume", "resume", "finished"),
    "metrics.csv": ("resume",),
    "report.json": ("resume", "verify"),
    "events": ("resume",),
}
DTYPES = (torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8)
STANDS = ("link", "hard", "dangling", "loop", "fifo", "zeros", "folder", "missing", "empty")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2.5, -0.0, 1e308, float("nan"), float("inf"), 10**30, 2**63, 2**31,
    10**9, "", "x", "\ud800", "a" * 5000, [], [0], [[]], [-1], {}, {"x": 1}, [None], "transformer",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run, the file that is damaged, how, and what is done with the run then."""

    base: str
    file: str
    way: str
    number: int
    """seed of the damage"""
    run: str


def case(seed: int) -> Case:
    rng = random.Random(f"damage {seed}")
    base = rng.choice(list(BASES))
    files = [f for f in READ for _ in range({"config.json": 5, "state.pt": 7}.get(f, 2))]
    file = rng.choice(files)
    if file == "task.safetensors":
        base = rng.choice(("automaton", "table"))
    way = rng.choice(("bytes", "inside", "inside", "inside"))
    if rng.random() < 0.15:
        way = rng.choice(STANDS)
    return Case(base, file, way, rng.randrange(2**32), rng.choice(READ[file]))


FILES: dict[str, dict[str, bytes]] = {}
"""of each run, the files"""


def prepare(home: Path, output: Callable[[], tuple[str, str]]) -> None:
    """Make the runs, once in a process: what a case takes has nothing of it."""
    if FILES:
        return
    before = Path.cwd()
    os.chdir(home)
    Path("corpus.txt").write_text("0 1 0\n1 1 1\n")
    Path("table.tsv").write_text("sequence\tscore\naa\t1\nab\t2\nba\t0\nbb\t-1\n")
    for name, words in BASES.items():
        line = f"train {words} --steps 2 --log-every 1 --out {name}"
        assert main(line.split()) == 0, output()
        FILES[name] = {path.name: path.read_bytes() for path in Path(name).iterdir()}
    os.chdir(before)


def place_run(name: str, run: Path) -> dict[str, bytes]:
    """A copy of a run; its files."""
    run.mkdir()
    for file, data in FILES[name].items():
        (run / file).write_bytes(data)
    return FILES[name]


def attempt(case: Case, folder: Path, output: Callable[[], tuple[str, str]]) -> judge.Outcome:
    before = Path.cwd()
    os.chdir(folder)
    try:
        run, outside = folder / "run", folder / "outside"
        files = place_run(case.base, run)
        names = [name for name in files if name.startswith(case.file)]
        path = run / (names[0] if names else case.file)
        data = files.get(path.name, b"")
        outside.write_bytes(data)
        spoilt = put(case, path, data, outside)
        seen = outside.stat()
        outcome = use(case.run, run, output)
        now = outside.stat()
        if outside.read_bytes() != data or now.st_mtime_ns != seen.st_mtime_ns:
            return _escape("a file outside the run was changed", case)
        if spoilt == "link" and outcome.end == "success" and _read(case):
            return _escape("a file was read through a link", case)
        return outcome
    finally:
        os.chdir(before)


def _escape(what: str, case: Case) -> judge.Outcome:
    return judge.Outcome("finding", f"{what}: {case}", f"{what}: {case.file}, {case.run}")


def _read(case: Case) -> bool:
    """Whether the damaged file is read at all: resuming derives the weights and the report."""
    if case.file in ("report.json", "policy.safetensors"):
        return case.file == "policy.safetensors" and case.run != "finished"
    return case.file != "task.safetensors" or case.base in ("automaton", "table")


def use(what: str, run: Path, output: Callable[[], tuple[str, str]]) -> judge.Outcome:
    if what == "load":
        return judge.call(lambda: rl_ebm.load(run))
    commands = {
        "resume": ["train", "--resume", str(run), "--steps", "4"],
        "finished": ["train", "--resume", str(run)],
        "verify": ["verify", str(run)],
        "sample": ["sample", str(run), "-n", "3"],
        "diagnose": ["diagnose", str(run), "--seconds", "0.05"],
    }
    return judge.command(commands[what], output)


def put(case: Case, path: Path, data: bytes, outside: Path) -> str:
    """Damage a file, or put something else where it stands; what stands there now."""
    rng = random.Random(case.number)
    path.unlink(missing_ok=True)
    if case.way == "link":
        path.symlink_to(outside)
    elif case.way == "hard":  # another name of the file, outside of the run
        os.link(outside, path)
    elif case.way == "dangling":
        path.symlink_to(outside.with_name("nothing"))
    elif case.way == "loop":
        path.symlink_to(path)
    elif case.way == "fifo":
        os.mkfifo(path)
    elif case.way == "zeros":
        path.symlink_to("/dev/zero")
    elif case.way == "folder":
        path.mkdir()
    elif case.way == "empty":
        path.write_bytes(b"")
    elif case.way == "bytes":
        path.write_bytes(spoil_bytes(rng, data))
    elif case.way == "inside":
        path.write_bytes(inside(rng, case.file, data))
    return case.way


def inside(rng: random.Random, file: str, data: bytes) -> bytes:
    """A file of the right form that says the wrong thing."""
    if file.endswith(".json"):
        return spoil_json(rng, data)
    if file.endswith(".safetensors"):
        return spoil_safetensors(rng, data)
    if file == "state.pt":
        return spoil_pickle(rng, data) if rng.random() < 0.2 else spoil_state(rng, data)
    if file == "metrics.csv":
        return spoil(rng, data.decode(), rng.choice((1, 2, 5))).encode("utf-8", "replace")
    return spoil_bytes(rng, data)


# Nested values ----------------------------------------------------------------------------------


def spoil_tree(rng: random.Random, tree: Any, change: Callable[[Any], Any]) -> None:
    """Drop, add, move or change one entry somewhere in nested dictionaries and lists."""
    places = [tree]
    for place in places:
        for child in place.values() if isinstance(place, dict) else place:
            if isinstance(child, (dict, list)) and child:
                places.append(child)
    place = rng.choice(places[:1] * 2 + places)
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    if not keys:
        return
    key, way = rng.choice(keys), rng.randrange(6)
    if way == 0:
        del place[key]
    elif way == 1 and isinstance(place, dict):
        place[rng.choice((*TEXTS[:10], "x"))] = rng.choice(VALUES)
    elif way == 2:
        other = rng.choice(keys)
        place[key], place[other] = place[other], place[key]
    else:
        place[key] = change(place[key])


def spoil_json(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.1:
        depth = rng.choice((10, 100_000))
        return rng.choice(
            ("[" * depth + "]" * depth, '{"a":' * depth, "null", "NaN", '"x"')
        ).encode()
    if rng.random() < 0.15:
        return spoil(rng, data.decode(), 2).encode("utf-8", "replace")
    tree = json.loads(data or b"{}")
    for _ in range(rng.choice((1, 1, 1, 2))):
        spoil_tree(rng, tree, lambda old: _near(rng, old))
    return json.dumps(tree).encode()


def _near(rng: random.Random, old: Any) -> Any:
    """Another value, of the same kind every third time."""
    if rng.random() < 0.33 and isinstance(old, (int, float)) and not isinstance(old, bool):
        return rng.choice((-old, old + 1, old * 2, 10**9, 2**63, -1, 0, 10**30, float("nan"), 0.5))
    if rng.random() < 0.33 and isinstance(old, str):
        return spoil(rng, old, 1)
    if rng.random() < 0.1:
        return rng.choice(NUMBERS[:12])
    return rng.choice(VALUES)


def spoil_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Another header: shapes, offsets, dtypes, names; or another length of the header."""
    if len(data) < 8:
        return data
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    if rng.random() < 0.15:
        size = rng.choice((0, 1, size + 1, size - 1, 2**31, 2**63 - 1, 2**64 - 1))
        return size.to_bytes(8, "little") + header + rest
    if rng.random() < 0.4:
        return _other_tensors(rng, data)
    tree = json.loads(header)
    names = [name for name in tree if name != "__metadata__"]
    entry, way = tree[rng.choice(names)], rng.randrange(5)
    if way == 0:
        entry["dtype"] = rng.choice(
            ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "x", 3)
        )
    elif way == 1:
        entry["shape"] = rng.choice(
            ([], [0], [-1], [2**40, 2**40], [1, *entry["shape"]], "x", [1.5])
        )
    elif way == 2:
        entry["data_offsets"] = rng.choice(
            ([0, 0], [-1, 4], [2**62, 2**63], [8, 4], [], None, [0, 4])
        )
    else:
        spoil_tree(rng, tree, lambda old: rng.choice(VALUES[:-1]))
    text = json.dumps(tree).encode()
    return len(text).to_bytes(8, "little") + text + rest


def _other_tensors(rng: random.Random, data: bytes) -> bytes:
    from safetensors.torch import load, save

    tensors = load(data)
    name = rng.choice(list(tensors))
    if rng.random() < 0.2:
        del tensors[name]
    else:
        changed = _other_tensor(rng, tensors[name], stored=True)
        tensors[name] = changed
    return save(tensors)


# Checkpoints ------------------------------------------------------------------------------------


def _other_tensor(rng: random.Random, x: Tensor, stored: bool = False) -> Any:
    """A tensor of another shape, dtype, layout or content; or none at all."""
    plain = x.detach().clone()
    ways: list[Callable[[], Any]] = [
        lambda: plain[None],
        lambda: plain.flatten()[:-1].contiguous(),
        lambda: torch.zeros(0),
        lambda: torch.zeros(8),
        lambda: plain.to(rng.choice(DTYPES)),
        lambda: torch.full_like(plain.double(), rng.choice((math.nan, math.inf, -1e308, -1.0))),
        lambda: torch.full_like(plain.long(), rng.choice((-1, 2**62, 3, -(2**63)))),
        lambda: plain.flip(0) if plain.ndim else plain + 1,
    ]  # fmt: skip
    if not stored:
        ways += [
            lambda: plain.to_sparse() if plain.ndim else torch.zeros(3, 3).to_sparse(),
            lambda: torch.eye(3).to_sparse_csr(),
            lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
            lambda: torch.empty(plain.shape, device="meta"),
            lambda: torch.zeros(1).expand(2**40),
            lambda: plain.to(torch.complex64),
            lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
            lambda: rng.choice(VALUES),
        ]
    return rng.choice(ways)()


def spoil_state(rng: random.Random, data: bytes) -> bytes:
    tree = torch.load(io.BytesIO(data), weights_only=True)

    def change(old: Any) -> Any:
        if isinstance(old, Tensor):
            return _other_tensor(rng, old)
        return torch.zeros(2, 2) if rng.random() < 0.15 else _near(rng, old)

    for _ in range(rng.choice((1, 1, 2))):
        spoil_tree(rng, tree, change)
    out = io.BytesIO()
    torch.save(tree, out)
    return out.getvalue()


def spoil_pickle(rng: random.Random, data: bytes) -> bytes:
    """The archive whole, and within it a file of another length or with other bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = rng.choice((*names, *[n for n in names if n.endswith("data.pkl")] * len(names)))
        for name in names:
            content = old.read(name)
            new.writestr(name, spoil_bytes(rng, content) if name == chosen else content)
    return out.getvalue()
