"""Exact solutions beyond enumeration: time and memory against vocabulary, states and length.

    python -m benchmarks.readme.scale             # about 10 minutes on 2 cores
    python -m benchmarks.readme.scale --quick     # small sizes: only to see that it works

The target is a phrase that pays and one that is forbidden, over a hidden Markov reference; each
setting in a process of its own. Times are medians, and stand beside one pass over the weights: the
logsumexp of every emission. Writes ``benchmarks/results/scale_DEVICE.md``, ``.csv`` and ``.png``.
"""

from __future__ import annotations

import csv
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import rl_ebm
from benchmarks.support.machine import describe
from rl_ebm.automata import hidden
from rl_ebm.policies import AutomatonPolicy
from rl_ebm.rewards import Automaton
from rl_ebm.training.checkpoint import write_text

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda"""
    threads: int = 2
    """processor cores of each setting"""
    repeat: int = 3
    """measurements of each figure"""
    quick: bool = False
    """small sizes; writes nothing into the results"""


@dataclass(frozen=True)
class Setting:
    """One size."""

    vocab_size: int
    hidden: int
    max_length: int
    verified: int
    """samples of target and policy each that are verified along; 0 to leave it out"""


@dataclass(frozen=True)
class Row:
    """What was measured there; seconds, and bytes beyond what the imports take."""

    vocab_size: int
    states: int
    """of the product: deterministic times hidden"""
    max_length: int
    one_pass: float
    """logsumexp of the weights, once"""
    solve: float
    sample: float
    """1,000 exact samples"""
    verify: float | None
    verified: int
    memory: int
    log_z: float


def settings(quick: bool) -> list[Setting]:
    """Each size by itself, around A = 50,257, H = 64, T = 128."""
    if quick:
        return [Setting(100, 4, 8, 4), Setting(1000, 4, 16, 0)]
    sizes = [Setting(a, 64, 128, 20) for a in (100, 1_000, 10_000, 50_257)]
    sizes += [Setting(50_257, h, 128, 0) for h in (16, 256)]
    return sizes + [Setting(1_000, 64, t, 20) for t in (16, 512, 1024, 4096)]


def hidden_reference(space: rl_ebm.TokenSpace, h: int, seed: int = 0) -> AutomatonPolicy:
    """A hidden Markov model of h states, drawn."""
    g = torch.Generator().manual_seed(seed)
    law = [
        (2 * torch.randn(shape, generator=g, dtype=torch.float64)).log_softmax(-1)
        for shape in ((h,), (h, h), (h, space.vocab_size))
    ]
    return AutomatonPolicy(space, hidden(*law))


def make(setting: Setting, device: str) -> rl_ebm.EBM:
    """The EBM of a size."""
    space = rl_ebm.TokenSpace(setting.vocab_size, setting.max_length, eos_id=0)
    reference = hidden_reference(space, setting.hidden)
    reward = Automaton.contains(space, [5, 17, 17, 9], 12.0) + Automaton.avoids(space, [7, 8])
    return rl_ebm.EBM(space, reward, 1.0, reference).to(device)


def measure(setting: Setting, device: str, threads: int, repeat: int) -> Row:
    """All figures of a size, in this process."""
    torch.set_num_threads(threads)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ebm = make(setting, device)
    solution = rl_ebm.solve(ebm)
    generator = torch.Generator(device).manual_seed(0)
    emission = solution.values.machine.log_emission

    def timed(f: Callable[[], object]) -> float:
        f()
        found = []
        for _ in range(repeat):
            _wait(device)
            start = time.perf_counter()
            f()
            _wait(device)
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    one_pass = timed(lambda: torch.logsumexp(emission, 1))
    solved = timed(lambda: rl_ebm.solve(ebm))
    sampled = timed(lambda: solution.sample(1000, generator))
    verified = None
    if setting.verified:
        start = time.perf_counter()
        rl_ebm.verify(ebm.reference, solution, samples=setting.verified, generator=generator)
        _wait(device)
        verified = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = (peak - base) * 1024
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    machine = solution.values.machine
    return Row(
        vocab_size=setting.vocab_size,
        states=machine.num_states * machine.num_hidden,
        max_length=setting.max_length,
        one_pass=one_pass,
        solve=solved,
        sample=sampled,
        verify=verified,
        verified=setting.verified,
        memory=memory,
        log_z=float(solution.log_z),
    )


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def table(rows: list[Row]) -> str:
    """Markdown, times as multiples of one pass."""
    lines = [
        "| A | states | T | one pass | `solve` | 1,000 samples | verified | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        verified = (
            "not measured"
            if row.verify is None
            else f"{row.verify:.2g} s for {2 * row.verified} sequences"
        )
        one_pass = f"{1e3 * row.one_pass:{'.0f' if row.one_pass >= 0.1 else '.2g'}}"
        lines.append(
            f"| {row.vocab_size:,} | {row.states:,} | {row.max_length:,} | "
            f"{one_pass} ms | {row.solve:.2g} s ({row.solve / row.one_pass:.0f} x) | "
            f"{row.sample:.2g} s ({row.sample / row.one_pass:.0f} x) | {verified} | "
            f"{row.memory / 1e9:.2g} GB |"
        )
    return "\n".join(lines)


def picture(rows: list[Row]) -> Figure:
    """Seconds against length, at one vocabulary and number of states: straight lines."""
    chosen = [row for row in rows if row.vocab_size == 1_000 and row.states == rows[1].states]
    chosen.sort(key=lambda row: row.max_length)
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in (
        ("solve", [row.solve for row in chosen]),
        ("1,000 exact samples", [row.sample for row in chosen]),
    ):
        axes.loglog([row.max_length for row in chosen], values, "o-", label=name)
    if chosen:
        ends = chosen[0].max_length, chosen[-1].max_length
        scale = chosen[-1].solve / ends[1]
        axes.loglog(ends, [scale * t for t in ends], "k:", label="linear in T")
    axes.set_xlabel("T, tokens of a response at most")
    axes.set_ylabel("seconds")
    axes.set_title("A = 1,000, hidden Markov reference, phrase rewards")
    axes.legend()
    return figure


def main(options: Options) -> None:
    rows = []
    repeat = 1 if options.quick else options.repeat
    for setting in settings(options.quick):
        # A process each, so that memory is that of one size.
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            work = process.submit(measure, setting, options.device, options.threads, repeat)
            rows.append(work.result())
        print(rows[-1], flush=True)
    torch.set_num_threads(options.threads)
    text = f"{table(rows)}\n\n{describe()}\n"
    print(text)
    if options.quick:
        return
    name = f"scale_{options.device}"
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / f"{name}.md", text)
    buffer = StringIO()
    writer = csv.DictWriter(buffer, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, rows))
    write_text(RESULTS / f"{name}.csv", buffer.getvalue())
    picture(rows).savefig(RESULTS / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
