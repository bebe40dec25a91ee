"""Ends of every sort, made on purpose: the instrument must tell them apart."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

import rl_ebm
from rl_ebm.tokens import length_mask

from . import judge

ENDS = {
    "success": lambda: None,
    "sentence": lambda: rl_ebm.TokenSpace(1, 3),
    "torch": lambda: rl_ebm.TokenSpace(2, 3).action_mask("no device"),
    "attribute": lambda: length_mask(None, 3),  # type: ignore[arg-type]
    "memory": lambda: bytearray(8 * 2**30),
    "allocator": lambda: torch.zeros(2**31),
    "hang": lambda: time.sleep(60),
    "hang in C": lambda: 9 ** (9**9) % 7,
    "segmentation fault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "abort": os.abort,
    "exit": lambda: os._exit(3),
}
COUNT = len(ENDS)


def case(seed: int) -> str:
    return list(ENDS)[seed]


def attempt(case: str, folder: Path, output: Callable[[], tuple[str, str]]) -> judge.Outcome:
    return judge.call(ENDS[case])
