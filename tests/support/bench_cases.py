"""Small benchmarks."""

from __future__ import annotations

from rl_ebm.policies import TransformerConfig
from rl_ebm.studies.bench import Plan, Problem

TINY = TransformerConfig(layers=1, heads=1, dim=8, hidden=8)
OPTIONS = {"soft-q": {"batch_size": 64}, "grpo": {"batch_size": 32, "group_size": 4}}


def plan(**changes):
    fields = {
        "agents": ("soft-q", "grpo"),
        "problems": (Problem("lookahead"), Problem("star", beta=0.5)),
        "seeds": (0, 1),
        "calls": 256,
        "network": TINY,
        "options": OPTIONS,
    }
    return Plan(**(fields | changes))
