"""Contenders, clocks and rows of the comparison with other libraries."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.peers import watch as watch_module
from benchmarks.peers.contender import TARGET, Contender


class Clock:
    """Tells a time that only moves when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def contender(**changes) -> Contender:
    known = Contender("a", "rl-ebm", "rl_ebm", None, "a table", "b", "c", TARGET, lambda *_: None)
    return replace(known, **changes)


def row(name="a", seed=0, seconds=1.0, updates=10, calls=100, kl=1.0, **more):
    figures = {"kl_policy_target": kl, "kl_target_policy": kl, "tv": 0.5}
    run = {"task": "random", "contender": name, "version": "v 1", "parameters": 5, "limit": 60.0}
    at_look = {
        "seed": seed,
        "threads": 1,
        "seconds": seconds,
        "updates": updates,
        "reward_calls": calls,
    }
    return run | at_look | figures | more


def look_of(whole):
    """What a worker writes of a row."""
    return {k: whole[k] for k in ("seconds", "updates", "reward_calls", *watch_module.FIGURES)}


def run_of(kls, name="a", seed=0):
    return [
        row(name, seed, seconds=float(i + 1), updates=10 * (i + 1), calls=100 * (i + 1), kl=kl)
        for i, kl in enumerate(kls)
    ]
