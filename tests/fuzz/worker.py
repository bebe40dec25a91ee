"""A process that tries one case after the other; the driver reads of each how it ended.

A line "KIND SEED" comes in, a line of JSON goes out. A case that takes too long ends the process,
with the stack of where it stood in the log, also where C code holds on to the interpreter.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

MEMORY = 4 * 2**30
"""bytes that a case may take beyond what the imported libraries have mapped"""


def main(log_path: str, seconds: float) -> None:
    """Serve until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    asked = os.fdopen(os.dup(0))
    os.dup2(null, 0)  # a case reads nothing of the driver's
    import torch

    from . import module_of

    torch.set_num_threads(1)
    with open(log_path, "w") as log, tempfile.TemporaryDirectory(prefix="fuzz") as home:
        faulthandler.enable(log)
        output = capture(Path(home))
        limit_memory()
        prepared = set[str]()
        for number, line in enumerate(asked):
            kind, seed = line.split()
            folder = Path(home) / str(number)
            folder.mkdir()
            module = module_of(kind)
            if kind not in prepared and hasattr(module, "prepare"):
                module.prepare(Path(home), output)
            prepared.add(kind)
            case = module.case(int(seed))
            began = time.monotonic()
            faulthandler.dump_traceback_later(seconds * business(), exit=True, file=log)
            outcome = module.attempt(case, folder, output)
            faulthandler.cancel_dump_traceback_later()
            reply = {"kind": kind, "seed": int(seed), "seconds": time.monotonic() - began}
            print(json.dumps(reply | asdict(outcome)), file=replies, flush=True)
            remove(folder)


def business() -> float:
    """How many processes share a core: by so much a case takes longer."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def limit_memory() -> None:
    """Allow so much address space more than there is now: an allocation beyond it fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def capture(home: Path) -> Callable[[], tuple[str, str]]:
    """Send stdout and stderr into files, C code's too; a function that takes out what is there."""
    files = []
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        file = open(home / f"stream{number}", "w+b", buffering=0)  # noqa: SIM115 - until the end
        os.dup2(file.fileno(), number)
        files.append(file)
    sys.stdout.reconfigure(line_buffering=False)  # type: ignore[union-attr]

    def taken() -> tuple[str, str]:
        sys.stdout.flush()
        sys.stderr.flush()
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.seek(0)
            file.truncate()
        return texts[0], texts[1]

    return taken


def remove(folder: Path) -> None:
    """Delete what a case left: links themselves, never what they point to."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    folder.rmdir()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
