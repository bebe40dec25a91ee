"""What the paper's easy data hides: both models on laws that do not come in order.

    python -m benchmarks.paper.harder_data [--quick]

At equal size (the same Transformer, N = 2) and equal steps, and at equal compute: a step of the
EBM evaluates A^T (T + 1) tokens, one of the ARM a token for each prefix, so that the ARM may
take more of them in the same time.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from benchmarks.paper import laws
from benchmarks.paper.answers import sides
from benchmarks.paper.common import (
    Options,
    Rows,
    collect,
    ends,
    plot_runs,
    publish,
    select,
    table,
)
from benchmarks.paper.fit import MAKE, SMALL, Schedule, gap, watch
from rl_ebm import TokenSpace
from rl_ebm.studies.seeds import geometric_interval

LAWS = {
    "zipf": "Zipf in order (the paper's)",
    "permuted": "Zipf, ranks permuted",
    "normal-1": "softmax(N(0, I) / 1)",
    "normal-0.3": "softmax(N(0, I) / 0.3)",
    "normal-0.1": "softmax(N(0, I) / 0.1)",
    "normal-0.05": "softmax(N(0, I) / 0.05)",
    "lookahead": "planted lookahead",
    "pairwise": "scores of all pairs",
}
RATES = (1e-2, 3e-3, 1e-3)
TIMES = 8
"""steps of the ARM in the time of one of the EBM's, about; the measured times are reported"""


@dataclass(frozen=True)
class Fit:
    """One model on one law."""

    model: str
    law: str
    vocab_size: int
    max_length: int
    steps: int
    lr: float
    seed: int


def law(name: str, space: TokenSpace, seed: int) -> Tensor:
    """log rho of a name of :data:`LAWS`."""
    if name.startswith("normal-"):
        return laws.normal(space, float(name.removeprefix("normal-")), seed)
    if name == "zipf":
        return laws.zipf(space)
    make = {
        "permuted": laws.permuted_zipf,
        "lookahead": laws.lookahead,
        "pairwise": laws.pairwise,
    }[name]
    return make(space, seed)


def measure(job: Fit) -> Rows:
    space = TokenSpace(job.vocab_size, job.max_length)
    log_rho = law(job.law, space, job.seed)
    model = MAKE[job.model](space, SMALL, job.seed)
    started = time.process_time()
    return [
        {
            "step": step,
            "gap": gap(log_rho, log_p),
            "seconds": round(time.process_time() - started, 2),
        }
        for step, log_p in watch(model, log_rho, Schedule(job.steps, job.lr))
    ]


def best_rate(trials: Rows, model: str, name: str) -> float:
    """That of the smallest gap at the end of the trials of a model on a law."""
    mine = select(trials, model=model, law=name)
    at_end = {lr: ends(select(mine, lr=lr), "gap")[0] for lr in RATES}
    return min(RATES, key=lambda lr: at_end[lr])


def floor(space: TokenSpace, name: str, seeds: range) -> float:
    """KL(rho, uniform): what a model that learned nothing would have."""
    uniform = torch.full((space.num_sequences,), -1.0).double().log_softmax(0)
    return statistics.fmean(gap(law(name, space, seed), uniform) for seed in seeds)


def picture(rows: Rows, names: list[str], steps: int) -> Figure:
    wide = min(4, len(names))
    high = -(-len(names) // wide)
    figure = Figure(figsize=(3.3 * wide, 3.1 * high), layout="constrained")
    axes = figure.subplots(high, wide, sharey=True, squeeze=False)
    for name, ax in zip(names, axes.flat, strict=True):
        mine = select(rows, law=name)
        runs = {"ARM": ("ARM", TIMES * steps, "C0"), "EBM": ("EBM", steps, "C1")}
        for label, (model, length, colour) in runs.items():
            line = [r for r in select(mine, model=model, steps=length) if r["step"] > 0]
            plot_runs(ax, line, "seconds", "gap", label, color=colour)
        short = select(mine, model="ARM", steps=steps)
        ax.plot(
            ends(short, "seconds"),
            ends(short, "gap"),
            "o",
            color="C0",
            markersize=4,
            label=f"ARM, {steps:,} steps",
        )
        ax.set(xscale="log", yscale="log", title=LAWS[name])
        ax.title.set_fontsize(9)
        ax.xaxis.set_minor_formatter(NullFormatter())
    for ax in axes[-1]:
        ax.set_xlabel("seconds of one core")
    for ax in axes[:, 0]:
        ax.set_ylabel("KL(law, model) (nats)")
    axes[0, 0].legend(fontsize=8)
    return figure


def verdict(ratios: dict[str, list[float]]) -> str:
    """Which laws the ARM is behind on, and ahead, where the interval of the ratio excludes 1.

    All of these intervals hold together at 95 %.
    """
    behind, ahead = (", ".join(LAWS[k] for k in side) or "no law" for side in sides(ratios))
    always = [LAWS[k] for k, v in ratios.items() if min(v) > 1]
    return (
        f"behind on {behind}; ahead on {ahead} "
        f"(behind with every seed, whatever the interval: {', '.join(always) or 'no law'})"
    )


def kinds_of(steps: int) -> dict[str, tuple[str, int]]:
    """Model and steps of each kind of run."""
    return {
        "ARM": ("ARM", steps),
        "EBM": ("EBM", steps),
        "long": ("ARM", TIMES * steps),
        "short": ("EBM", max(2, steps // TIMES)),
    }


def at_end(rows: Rows, key: str, kinds: dict[str, tuple[str, int]]) -> dict[str, list[float]]:
    """A column at the end of the runs of each kind."""
    return {
        kind: ends(select(rows, model=model, steps=length), key)
        for kind, (model, length) in kinds.items()
    }


def compared(gaps: dict[str, list[float]]) -> dict[str, list[float]]:
    """ARM over EBM by seed, at equal steps and at equal time."""
    return {
        by: [a / e for a, e in zip(gaps[arm], gaps["EBM"], strict=True)]
        for by, arm in (("steps", "ARM"), ("time", "long"))
    }


def chosen(rates: dict[tuple[str, str], float]) -> str:
    """Which learning rates were taken, of models on laws."""
    smaller = [
        f"{m} on {LAWS[name]} {rate:g}" for (m, name), rate in rates.items() if rate < max(RATES)
    ]
    return f"{max(RATES):g}, the largest, for all but {', '.join(smaller) or 'none'}"


def report(rows: Rows, names: list[str], space: TokenSpace, steps: int, seeds: range) -> str:
    """All that the runs say; how their rates were chosen stands below it."""
    kinds = kinds_of(steps)
    gaps = {name: at_end(select(rows, law=name), "gap", kinds) for name in names}
    ratios = {name: compared(gaps[name]) for name in names}
    lines = [
        (
            LAWS[name],
            f"{floor(space, name, seeds):.2f}",
            *map(geometric_interval, gaps[name].values()),
            *map(geometric_interval, ratios[name].values()),
        )
        for name in names
    ]
    runs = [f"{model}, {length:,} steps" for model, length in kinds.values()]
    of_arm = ("ARM over EBM, equal steps", "ARM over EBM, equal time")
    head = ["law", "KL(law, uniform)", *runs, *of_arm]
    verdicts = {
        by: verdict({x: found[by] for x, found in ratios.items()}) for by in ("steps", "time")
    }
    seconds = at_end(rows, "seconds", kinds)
    times = ", ".join(
        f"{m} {n:,} steps {statistics.median(seconds[kind]):.0f}" for kind, (m, n) in kinds.items()
    )
    tokens = space.num_sequences * (space.max_length + 1)
    return f"""
V={space.vocab_size}, T={space.max_length}, N=2 (ARM and EBM of the same Transformer), exact risk. KL(law, model) in nats at the end,
geometric mean over seeds (its 95% interval, Student's t on the logarithms); laws drawn at random differ from seed to seed:

{table(head, lines)}

Judged by whether a ratio's interval holds 1 (95% for all laws together, Bonferroni; those of the table are 95% each): **at equal size and steps** the ARM is {verdicts["steps"]}. **At equal size and time**
(EBM of {steps:,} steps, ARM of {TIMES * steps:,}): {verdicts["time"]}. Seconds of one core, median: {times}.
A step of the EBM evaluates {tokens:,} tokens, one of the ARM {space.num_states:,}.
"""


def main(options: Options) -> None:
    space, steps, trial, names = TokenSpace(8, 4), 1000, 300, list(LAWS)
    if options.quick:
        space, steps, trial, names = TokenSpace(3, 3), 40, 20, ["permuted", "lookahead"]
    seeds, shape = range(options.seeds), (space.vocab_size, space.max_length)
    tried = [
        Fit(model, name, *shape, trial, lr, 0) for name in names for model in MAKE for lr in RATES
    ]
    trials = collect("harder_data_rates", tried, measure, options)
    rates = {(m, name): best_rate(trials, m, name) for m in MAKE for name in names}
    jobs = [
        Fit(model, name, *shape, length, rates[model, name], seed)
        for name in names
        for model, length in kinds_of(steps).values()
        for seed in seeds
    ]
    rows = collect("harder_data", jobs, measure, options)
    text = f"""{report(rows, names, space, steps, seeds)}
Learning rates: of {", ".join(f"{lr:g}" for lr in RATES)} that with the smallest KL after {trial:,} steps, by law and model, seed 0 alone: {chosen(rates)}.
"""
    figure = picture(rows, names, steps)
    publish("harder_data", "What easy data hides", text, figure, trials + rows, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
