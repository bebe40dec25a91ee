"""Finite data instead of the exact risk: which model needs fewer samples?

    python -m benchmarks.paper.samples [--quick]

n responses are drawn from a law; ARM and EBM of equal size fit their empirical risk, and stop
where the likelihood of n / 4 further responses is best. The KL to the law is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.machine import interval
from benchmarks.paper import laws
from benchmarks.paper.common import Options, Rows, collect, publish, select, table
from benchmarks.paper.fit import MAKE, SMALL, Schedule, gap, watch
from rl_ebm import TokenSpace

LAWS = {
    "parity": "easy R, hard q: parity",
    "lookahead": "easy R, hard q: lookahead",
    "additive": "hard R, easy q: additive logits",
    "normal": "both random: softmax(N(0, I))",
}


@dataclass(frozen=True)
class Samples:
    """One model on n responses of one law."""

    model: str
    law: str
    vocab_size: int
    max_length: int
    n: int
    steps: int
    seed: int


def law(name: str, space: TokenSpace, seed: int) -> Tensor:
    """log rho of a name of :data:`LAWS`."""
    if name == "normal":
        return laws.normal(space, 1.0, seed)
    make = {
        "parity": laws.parity,
        "lookahead": laws.lookahead,
        "additive": laws.additive_logits,
    }[name]
    return make(space, seed)


def empirical(log_rho: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """log of the shares of n draws; -inf at what was not drawn."""
    draws = torch.multinomial(log_rho.exp(), n, replacement=True, generator=generator)
    return (torch.bincount(draws, minlength=len(log_rho)).double() / n).log()


def likelihood(log_p: Tensor, log_share: Tensor) -> float:
    """Mean log-likelihood of the draws behind some shares."""
    return float((log_share.exp() * log_p).sum())


def measure(job: Samples) -> Rows:
    space = TokenSpace(job.vocab_size, job.max_length)
    log_rho = law(job.law, space, job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    train, held = (empirical(log_rho, n, generator) for n in (job.n, max(25, job.n // 4)))
    model = MAKE[job.model](space, SMALL, job.seed)
    best: dict[str, float] = {}
    last = math.nan
    for step, log_p in watch(model, train, Schedule(job.steps)):
        nll, last = -likelihood(log_p, held), gap(log_rho, log_p)
        if not best or nll < best["held_out"]:
            best = {"step": step, "held_out": nll, "kl": last}
    uniform = torch.full_like(log_rho, -math.log(len(log_rho)))
    entropy = -likelihood(log_rho, log_rho)
    return [best | {"kl_at_end": last, "kl_uniform": gap(log_rho, uniform), "entropy": entropy}]


def slope(ns: list[int], kls: list[float]) -> float:
    """Exponent of KL = c n^-k by least squares on the logarithms."""
    x, y = (torch.tensor([math.log(v) for v in values]) for values in (ns, kls))
    return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def picture(rows: Rows, names: list[str]) -> Figure:
    figure = Figure(figsize=(3.4 * len(names), 3.5), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for name, ax in zip(names, axes, strict=True):
        for colour, model in enumerate(("ARM", "EBM")):
            mine = select(rows, law=name, model=model)
            ax.scatter([r["n"] for r in mine], [r["kl"] for r in mine], s=14, color=f"C{colour}")
            ns = sorted({r["n"] for r in mine})
            means = [
                math.exp(sum(math.log(r["kl"]) for r in select(mine, n=n)) / len(select(mine, n=n)))
                for n in ns
            ]
            ax.plot(ns, means, color=f"C{colour}", label=model, linewidth=1)
        nothing = select(rows, law=name)[0]["kl_uniform"]
        ax.axhline(nothing, color="0.5", linestyle=":", label="uniform")
        ax.set(xscale="log", yscale="log", xlabel="training samples", title=LAWS[name])
        ax.title.set_fontsize(9)
    axes[0].set_ylabel("exact KL(law, model) (nats)")
    axes[0].legend(fontsize=8)
    return figure


def main(options: Options) -> None:
    space, steps, names, sizes = TokenSpace(4, 5), 1500, list(LAWS), [100, 1000, 10_000, 100_000]
    if options.quick:
        space, steps, names, sizes = TokenSpace(3, 3), 60, ["parity", "additive"], [100, 1000]
    seeds = range(options.seeds)
    jobs = [
        Samples(model, name, space.vocab_size, space.max_length, n, steps, seed)
        for name in names
        for n in sizes
        for model in ("ARM", "EBM")
        for seed in seeds
    ]
    rows = collect("samples", jobs, measure, options)
    lines, exponents = [], []
    for name in names:
        found = {}
        for model in ("ARM", "EBM"):
            mine = select(rows, law=name, model=model)
            kls = [[float(r["kl"]) for r in select(mine, n=n)] for n in sizes]
            lines.append((LAWS[name], model, *map(interval, kls)))
            found[model] = [
                slope(sizes, [float(select(mine, n=n, seed=s)[0]["kl"]) for n in sizes])
                for s in seeds
            ]
        ratio = [
            math.exp(
                sum(
                    math.log(select(rows, law=name, model="ARM", n=n, seed=s)[0]["kl"])
                    - math.log(select(rows, law=name, model="EBM", n=n, seed=s)[0]["kl"])
                    for n in sizes
                )
                / len(sizes)
            )
            for s in seeds
        ]
        exponents.append(
            (LAWS[name], *(interval(found[m]) for m in ("ARM", "EBM")), interval(ratio))
        )
    held = [
        (
            LAWS[name],
            model,
            *(
                interval(
                    [r["held_out"] - r["entropy"] for r in select(rows, law=name, model=model, n=n)]
                )
                for n in sizes
            ),
        )
        for name in names
        for model in ("ARM", "EBM")
    ]
    counts = [f"{n:,}" for n in sizes]
    text = f"""
V={space.vocab_size}, T={space.max_length} ({space.num_sequences:,} sequences), N=2, {steps:,} steps on the empirical risk of n samples, stopped where
the likelihood of n/4 further samples is best. Exact KL(law, model) in nats:

{table(["law", "model", *(f"n = {c}" for c in counts)], lines)}

Held-out NLL less the entropy of the law (an estimate of the same KL; it is negative where the held-out sample is lucky):

{table(["law", "model", *(f"n = {c}" for c in counts)], held)}

**Which is easier to learn, R or q** (open question 1 of the paper)? The exponent k of KL = c/n^k over the whole range, and the geometric mean
over n of the ARM's KL over the EBM's, above 1 where the EBM needs fewer samples:

{table(["law", "k, ARM", "k, EBM", "ARM over EBM"], exponents)}
"""
    publish("samples", "Generalisation and data", text, picture(rows, names), rows, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
