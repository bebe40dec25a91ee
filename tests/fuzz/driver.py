"""Hands cases to worker processes; one that dies or hangs is a finding of the case it was at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 10.0
"""longer than this is a hang, where a core is free for each process"""


class Worker:
    """A process of :mod:`worker`."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fuzz")
        self.log = Path(self.folder.name) / "log"
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", str(self.log), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(
                    [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
                ),
                "TMPDIR": self.folder.name,
                "CUDA_VISIBLE_DEVICES": "",
            },
        )

    def ask(self, kind: str, seed: int) -> dict[str, Any]:
        """How a case ended; ``end`` is hang or death where the process did not live to say."""
        self.process.stdin.write(f"{kind} {seed}\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if reply:
            found: dict[str, Any] = json.loads(reply)
            return found
        code, log = self.process.wait(), self.log.read_text()
        hang = log.startswith("Timeout (")
        text = "hang" if hang else f"the process died, exit code {code}"
        trace = log + self.process.stderr.read()
        return {
            "kind": kind,
            "seed": seed,
            "end": "hang" if hang else "death",
            "text": text,
            "place": f"{text} at {_frame(trace)}",
            "trace": trace[-6000:],
        }

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()
        self.process.wait()
        self.folder.cleanup()


def _frame(trace: str) -> str:
    """The innermost line of the library in a stack that faulthandler wrote, innermost first."""
    lines = [line for line in trace.splitlines() if line.startswith("  File ")]
    ours = [
        line for line in lines if any(f"/{room}/" in line for room in ("rl_ebm", "agents", "envs"))
    ]
    return (ours or lines or ["no known place"])[0].strip()


@dataclass
class Found:
    """What became of all cases."""

    ends: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    def add(self, reply: dict[str, Any]) -> None:
        self.ends[reply["end"]] += 1
        took = (reply.get("seconds", 0.0), f"{reply['kind']} {reply['seed']}")
        self.slowest = max(self.slowest, took)
        if reply["end"] not in ("success", "sentence"):
            self.findings.append(reply)

    def text(self) -> str:
        """One paragraph for each place, with what shows it again."""
        places: dict[str, list[dict[str, Any]]] = {}
        for finding in self.findings:
            places.setdefault(finding["place"], []).append(finding)
        parts = [f"{dict(self.ends)}; slowest {self.slowest[0]:.1f} s ({self.slowest[1]})"]
        for place, found in sorted(places.items(), key=lambda item: -len(item[1])):
            first = found[0]
            again = f"python -m tests.fuzz {first['kind']} {first['seed']}"
            parts.append(f"{len(found)} x {place}\n    {first['text']}\n    {again}")
        return "\n".join(parts)


def run(
    cases: Iterable[tuple[str, int]],
    workers: int = 1,
    seconds: float = SECONDS,
    tell: Callable[[str], object] | None = None,
) -> Found:
    """Try cases with so many processes at a time; ``tell`` hears of findings as they come."""
    found, lock, rest = Found(), threading.Lock(), iter(cases)

    def attend() -> None:
        for reply in _replies(_locked(rest, lock), seconds):
            with lock:
                found.add(reply)
                if tell is not None and reply["end"] not in ("success", "sentence"):
                    tell(f"{reply['kind']} {reply['seed']}: {reply['place']}")

    threads = [threading.Thread(target=attend) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _locked(rest: Iterator[tuple[str, int]], lock: threading.Lock) -> Iterator[tuple[str, int]]:
    while True:
        with lock:
            case = next(rest, None)
        if case is None:
            return
        yield case


def _replies(cases: Iterator[tuple[str, int]], seconds: float) -> Iterator[dict[str, Any]]:
    worker = Worker(seconds)
    try:
        for kind, seed in cases:
            reply = worker.ask(kind, seed)
            if reply["end"] in ("hang", "death"):
                worker.close()
                worker = Worker(seconds)
            yield reply
    finally:
        worker.close()
