"""What the paper's easy data hides: both models on laws that do not come in order.

    python -m benchmarks.paper.harder_data [--quick]

At equal size (the same Transformer, N = 2), and at equal compute: the EBM evaluates A^T (T + 1)
tokens in a step, the ARM one for each prefix.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.machine import interval
from benchmarks.paper import laws
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

LAWS = {
    "zipf": "Zipf in order (the paper's)",
    "permuted": "Zipf, ranks permuted",
    "normal-1": "softmax(N(0, I) / 1)",
    "normal-0.3": "softmax(N(0, I) / 0.3)",
    "normal-0.1": "softmax(N(0, I) / 0.1)",
    "normal-0.05": "softmax(N(0, I) / 0.05)",
    "lookahead": "planted lookahead",
}


@dataclass(frozen=True)
class Fit:
    """One model on one law."""

    model: str
    law: str
    vocab_size: int
    max_length: int
    steps: int
    seed: int


def law(name: str, space: TokenSpace, seed: int) -> Tensor:
    """log rho of a name of :data:`LAWS`."""
    if name.startswith("normal-"):
        return laws.normal(space, float(name.removeprefix("normal-")), seed)
    if name == "zipf":
        return laws.zipf(space)
    make = {"permuted": laws.permuted_zipf, "lookahead": laws.lookahead}[name]
    return make(space, seed)


def measure(job: Fit) -> Rows:
    space = TokenSpace(job.vocab_size, job.max_length)
    log_rho = law(job.law, space, job.seed)
    model = MAKE[job.model](space, SMALL, job.seed)
    started = time.perf_counter()
    return [
        {
            "step": step,
            "gap": gap(log_rho, log_p),
            "wall": round(time.perf_counter() - started, 2),
        }
        for step, log_p in watch(model, log_rho, Schedule(job.steps))
    ]


def floor(space: TokenSpace, names: list[str], seeds: range) -> dict[str, float]:
    """KL(rho, uniform): what a model that learned nothing would have."""
    uniform = torch.full((space.num_sequences,), -1.0).double().log_softmax(0)
    return {
        name: statistics.fmean(gap(law(name, space, seed), uniform) for seed in seeds)
        for name in names
    }


def picture(rows: Rows, names: list[str]) -> Figure:
    figure = Figure(figsize=(3.2 * len(names), 3.4), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    longest = max(r["steps"] for r in rows)
    for name, ax in zip(names, axes, strict=True):
        for colour, model in enumerate(("ARM", "EBM")):
            mine = select(rows, law=name, model=model, steps=longest)
            plot_runs(ax, mine, "step", "gap", model, color=f"C{colour}")
        ax.set(yscale="log", xlabel="steps", title=LAWS[name])
        ax.title.set_fontsize(9)
    axes[0].set_ylabel("KL(law, model) (nats)")
    axes[0].legend()
    return figure


def main(options: Options) -> None:
    space, steps, names = TokenSpace(8, 4), 2000, list(LAWS)
    if options.quick:
        space, steps, names = TokenSpace(3, 3), 60, ["permuted", "lookahead"]
    seeds = range(options.seeds)
    # The EBM may take as many steps as the ARM's tokens allow, and the ARM what the EBM's do not cost.
    arm_tokens = space.num_states
    ebm_tokens = space.num_sequences * (space.max_length + 1)
    short = max(2, steps * arm_tokens // ebm_tokens)
    jobs = [
        Fit(model, name, space.vocab_size, space.max_length, length, seed)
        for name in names
        for model, length in (("ARM", steps), ("EBM", steps), ("EBM", short))
        for seed in seeds
    ]
    rows = collect("harder_data", jobs, measure, options)
    nothing = floor(space, names, seeds)
    lines = []
    lags = []
    for name in names:
        arm = ends(select(rows, law=name, model="ARM"), "gap")
        equal = ends(select(rows, law=name, model="EBM", steps=steps), "gap")
        cheap = ends(select(rows, law=name, model="EBM", steps=short), "gap")
        ratio = [a / e for a, e in zip(arm, equal, strict=True)]
        lines.append(
            (LAWS[name], f"{nothing[name]:.2f}", *map(interval, (arm, equal, ratio, cheap)))
        )
        if min(ratio) > 1:
            lags.append(LAWS[name])
    head = [
        "law",
        "KL(law, uniform)",
        f"ARM, {steps:,} steps",
        f"EBM, {steps:,} steps",
        "ARM over EBM",
        f"EBM at the ARM's compute ({short} steps)",
    ]
    times = {
        model: statistics.median(ends(select(rows, model=model, steps=steps), "wall"))
        for model in ("ARM", "EBM")
    }
    easiest = LAWS[
        min(
            names,
            key=lambda name: sum(
                statistics.fmean(ends(select(rows, law=name, model=m, steps=steps), "gap"))
                for m in ("ARM", "EBM")
            ),
        )
    ]
    text = f"""
V={space.vocab_size}, T={space.max_length}, N=2 (ARM and EBM of the same Transformer), exact risk, learning rate 3e-3. KL(law, model)
in nats at the end:

{table(head, lines)}

**At equal size** the causal model is behind on every seed for: {", ".join(lags) or "no law"}. **At equal compute** (the EBM
evaluates {ebm_tokens:,} tokens in a step, the ARM {arm_tokens:,}: {ebm_tokens / arm_tokens:.0f} times fewer) compare the second column of KLs with
the last: there the EBM has {short} steps. A run of {steps:,} steps took {times["ARM"]:.0f} s for the ARM and {times["EBM"]:.0f} s for the EBM (median, one
thread). The easiest law of all, for both models together, is: {easiest}.
"""
    publish("harder_data", "What easy data hides", text, picture(rows, names), rows, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
