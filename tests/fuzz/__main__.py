"""``python -m tests.fuzz [KIND [SEED ...]]``: all cases, those of a kind, or some, told in full."""

from __future__ import annotations

import sys

from . import KINDS, module_of
from .driver import run


def show(kind: str, seeds: list[int]) -> int:
    """Cases with all of what they do."""
    for seed in seeds:
        print(f"{kind} {seed}:\n{module_of(kind).case(seed)}")
        found = run([(kind, seed)])
        print(found.text())
        for finding in found.findings:
            print(finding["trace"])
        if found.findings:
            return 1
    return 0


def tell(text: str) -> None:
    print(text, flush=True)


def main(args: list[str]) -> int:
    if len(args) > 1 and all(arg.lstrip("-").isdecimal() for arg in args[1:]):
        return show(args[0], [int(arg) for arg in args[1:]])
    bad = 0
    for kind in args or KINDS:
        found = run(((kind, seed) for seed in range(module_of(kind).COUNT)), tell=tell)
        print(f"{kind}: {found.text()}", flush=True)
        bad += len(found.findings)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
