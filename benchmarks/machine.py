"""On what something was measured, and how sure a mean over runs is."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

# Two-sided 95% quantiles of Student's t by degrees of freedom.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def describe() -> str:
    """The hardware and torch, in one line."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        device = f"{threads} thread{'s' if threads > 1 else ''} of {_processor()}"
    return f"Measured on {device}; torch {torch.__version__}, Python {platform.python_version()}."


def interval(values: Sequence[float]) -> str:
    """Mean and half-width of the 95% interval of the mean (Student's t), as text."""
    if not values:
        return "not run"
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.2g} (one run)"
    half = _T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.2g} ± {half:.1g}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
