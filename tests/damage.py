"""Ways to damage a run's folder, by a seeded generator; and a command that cannot harm the test."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rl_ebm.cli import main

JUNK: list[Any] = [
    None, True, -1, 0, 2.5, 1e300, float("nan"), 10**12, 2**70, "", "x", "\0", [], [[]], [1, 2.5],
    {}, {"kind": "x"}, [[-1]], [["a"]], "function", "custom", "automaton",
]  # fmt: skip


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything below the root."""
    found = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, (dict, list, tuple)):
            found += nodes(value, (*path, key))
    return found


def put(tree: Any, path: tuple[Any, ...], value: Any, delete: bool = False) -> None:
    for key in path[:-1]:
        tree = tree[key]
    if isinstance(tree, tuple):
        return
    if delete:
        del tree[path[-1]]
    else:
        tree[path[-1]] = value


def get(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def strange(x: torch.Tensor, rng: random.Random) -> Any:
    """Something in the place of a tensor."""
    flat = x.detach().clone()
    kinds: list[Callable[[], Any]] = [
        lambda: flat.flatten()[:-1],
        lambda: torch.zeros(8),
        lambda: flat[None],
        lambda: torch.zeros(0),
        lambda: flat.double() if flat.dtype != torch.float64 else flat.float(),
        lambda: flat.to(torch.complex64),
        lambda: flat.bool(),
        lambda: flat.float().to_sparse(),
        lambda: torch.quantize_per_tensor(flat.float(), 0.1, 0, torch.qint8),
        lambda: flat.to("meta"),
        lambda: torch.zeros(()).expand(x.shape),
        lambda: torch.full_like(flat, 127),
        lambda: -torch.ones_like(flat) if flat.dtype != torch.bool else flat,
        lambda: torch.zeros(1).expand(2**40),
        lambda: rng.choice(JUNK),
    ]
    return rng.choice(kinds)()


def flip(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut off, added or made zero."""
    out = bytearray(data)
    how = rng.randrange(6)
    if how == 0:
        return bytes(out[: rng.randrange(len(out) + 1)])
    if how == 1:
        return bytes(out) + rng.randbytes(rng.randrange(1, 200))
    if how == 2 and out:
        at = rng.randrange(len(out))
        out[at : at + rng.randrange(1, 500)] = bytes(rng.randrange(1, 500))
        return bytes(out)
    for _ in range(rng.randrange(1, 9)):
        if out:
            out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def damage_bytes(run: Path, rng: random.Random) -> str:
    names = ["config.json", "state.pt", "policy.safetensors", "task.safetensors", "metrics.csv"]
    path = run / rng.choice([n for n in names if (run / n).exists()])
    path.write_bytes(flip(path.read_bytes(), rng))
    return f"bytes of {path.name}"


def damage_config(run: Path, rng: random.Random) -> str:
    path = run / "config.json"
    config = json.loads(path.read_text())
    where = rng.choice(nodes(config))
    value, delete = rng.choice(JUNK), rng.random() < 0.3
    put(config, where, value, delete)
    path.write_text(json.dumps(config))
    return f"config {where} = {'nothing' if delete else repr(value)}"


def damage_state(run: Path, rng: random.Random) -> str:
    path = run / "state.pt"
    state = torch.load(path, weights_only=True)
    where = rng.choice(nodes(state))
    old = get(state, where)
    value = strange(old, rng) if isinstance(old, torch.Tensor) else rng.choice(JUNK)
    delete = rng.random() < 0.2
    put(state, where, value, delete)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(state, path)
    return f"state {where} = {'nothing' if delete else repr(value)[:60]}"


def damage_pickle(run: Path, rng: random.Random) -> str:
    """The outline of a checkpoint, in a file whose checksums are right."""
    path = run / "state.pt"
    old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                changed = bytearray(data)
                for _ in range(rng.randrange(1, 4)):
                    changed[rng.randrange(len(changed))] = rng.randrange(256)
                data = bytes(changed)
            new.writestr(name, data)
    return "outline of state.pt"


def damage_tensors(run: Path, rng: random.Random) -> str:
    """The header or the numbers of a safetensors file."""
    names = [n for n in ("policy.safetensors", "task.safetensors") if (run / n).exists()]
    path = run / rng.choice(names)
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + n]), data[8 + n :]
    if rng.random() < 0.5:
        name = rng.choice(list(header))
        where = rng.choice(nodes(header[name], (name,)))
        value = rng.choice([*JUNK, "I64", "F32", "BF16", "C64", 2**62, [2**31, 2**31], [0]])
        put(header, where, value, rng.random() < 0.2)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        return f"{path.name} {where} = {value!r}"
    at = rng.randrange(len(body) - 8)
    number = rng.choice([b"\xff" * 8, (1000).to_bytes(8, "little"), rng.randbytes(8)])
    path.write_bytes(data[: 8 + n] + body[:at] + number + body[at + 8 :])
    return f"{path.name} at {at}"


def damage_metrics(run: Path, rng: random.Random) -> str:
    path = run / "metrics.csv"
    text = path.read_text()
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    cells = lines[at].split(",")
    cells[rng.randrange(len(cells))] = rng.choice(["x", "", '"', "\0", "nan", "1,2", "9" * 5000])
    lines[at] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")
    return f"metrics.csv line {at}"


def damage_kind(run: Path, rng: random.Random, outside: Path) -> str:
    """Something else than a file under a file's name."""
    path = run / rng.choice([p.name for p in sorted(run.iterdir())])
    data = path.read_bytes()
    path.unlink()
    how = rng.choice(["link", "dangling", "fifo", "folder", "zero", "hard"])
    if how == "link":
        outside.write_bytes(data)
        path.symlink_to(outside)
    elif how == "dangling":
        path.symlink_to(outside.with_name("nothing"))
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "zero":
        path.symlink_to("/dev/zero")
    else:
        outside.write_bytes(data)
        os.link(outside, path)
    return f"{path.name} is a {how}"


class Result:
    """How a command ended that ran in a process of its own."""

    def __init__(self, status: int, err: str) -> None:
        self.killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        self.code = None if self.killed else os.waitstatus_to_exitcode(status)
        self.err = err

    def fault(self) -> str | None:
        """What is wrong with an end that is neither success nor one sentence."""
        if self.killed:
            return f"killed by {signal.Signals(self.killed).name}"
        if self.code == 0:
            return None
        lines = self.err.count("\n")
        good = self.code == 2 and self.err.startswith("rl-ebm: ") and lines == 1
        return None if good else f"exit code {self.code}: {self.err[-1500:]}"


def run_limited(args: list[str], log: Path, seconds: int = 10, memory: int = 4 * 2**30) -> Result:
    """A command in a forked child, with limits of time and memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking where threads are
        pid = os.fork()
    if pid == 0:
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            # Not pytest's: these are the child's own.
            sys.stdout, sys.stderr = (
                os.fdopen(n, "w", errors="backslashreplace", closefd=False) for n in (1, 2)
            )
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
            # Of the processor: others may use it. What waits for ever uses none.
            spent = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(spent.ru_utime + spent.ru_stime) + seconds + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(6 * seconds)
            code = main(args)
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    return Result(status, log.read_text(errors="replace"))
