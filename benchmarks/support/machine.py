"""On what something was measured."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def describe() -> str:
    """The hardware and torch, in one line."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        device = f"{threads} thread{'s' if threads > 1 else ''} of {_processor()}"
    return f"Measured on {device}; torch {torch.__version__}, Python {platform.python_version()}."


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
