"""Finite data instead of the exact risk: which model needs fewer samples?

    python -m benchmarks.paper.samples [--quick]

n responses are drawn from a law; ARM and EBM of equal size fit their empirical risk, and stop
where the likelihood of n / 4 further responses is best. The KL to the law is exact, and the
exact risk in the place of the empirical one shows what optimisation alone leaves.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.paper import laws
from benchmarks.paper.answers import sides
from benchmarks.paper.common import Options, Rows, collect, publish, select, table
from benchmarks.paper.fit import MAKE, SMALL, Schedule, gap, watch
from rl_ebm import TokenSpace
from rl_ebm.studies.seeds import geometric, geometric_interval, interval

LAWS = {
    "pairwise": "easy R, hard q: R a sum over pairs",
    "additive": "hard R, easy q: logits a sum over pairs",
    "normal": "both random: softmax(N(0, I))",
    "parity": "parity (V constant)",
    "lookahead": "lookahead (V of the first token)",
}
TEST = 10_000
"""responses that neither train a model nor choose its step"""
EXACT = 0
"""n of the exact risk"""


@dataclass(frozen=True)
class Samples:
    """One model on n responses of one law, or on the law itself."""

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
        "pairwise": laws.pairwise,
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
    generator = torch.Generator().manual_seed(job.seed + 1000)
    sizes = [job.n, max(25, job.n // 4), TEST]
    train, held, test = (
        log_rho if n == EXACT or job.n == EXACT else empirical(log_rho, n, generator) for n in sizes
    )
    model = MAKE[job.model](space, SMALL, job.seed)
    best: dict[str, float] = {}
    last = math.nan
    for step, log_p in watch(model, train, Schedule(job.steps)):
        nll, last = -likelihood(log_p, held), gap(log_rho, log_p)
        if not best or nll < best["held_out"]:
            # Less the law's own on the same draws, which takes most of their luck away.
            excess = likelihood(log_rho, test) - likelihood(log_p, test)
            best = {"step": step, "held_out": nll, "kl": last, "test": excess}
    uniform = torch.full_like(log_rho, -math.log(len(log_rho)))
    return [best | {"kl_at_end": last, "kl_uniform": gap(log_rho, uniform)}]


def exponent(small: tuple[int, float], large: tuple[int, float]) -> float:
    """k of KL = c n^-k through two points (n, KL)."""
    return math.log(small[1] / large[1]) / math.log(large[0] / small[0])


def divided(a: list[float], b: list[float]) -> list[float]:
    """a / b, seed by seed."""
    return [x / y for x, y in zip(a, b, strict=True)]


def values(rows: Rows, key: str, **fields: object) -> list[float]:
    """A column of the runs that have these values, by seed."""
    found = sorted(select(rows, **fields), key=lambda row: row["seed"])
    return [float(row[key]) for row in found]


def picture(rows: Rows, names: list[str], sizes: list[int]) -> Figure:
    figure = Figure(figsize=(3.4 * len(names), 3.5), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for name, ax in zip(names, axes, strict=True):
        for colour, model in enumerate(MAKE):
            kls = [values(rows, "kl", law=name, model=model, n=n) for n in sizes]
            points = [(n, kl) for n, found in zip(sizes, kls, strict=True) for kl in found]
            ax.scatter(*zip(*points, strict=True), s=14, color=f"C{colour}")
            middle = [geometric(found)[0] for found in kls]
            ax.plot(sizes, middle, color=f"C{colour}", label=model, linewidth=1)
            exact = geometric(values(rows, "kl", law=name, model=model, n=EXACT))[0]
            ax.axhline(exact, color=f"C{colour}", linestyle="--", linewidth=1)
        nothing = geometric(values(rows, "kl_uniform", law=name, model="ARM", n=EXACT))[0]
        ax.axhline(nothing, color="0.5", linestyle=":", label="uniform")
        ax.set(xscale="log", yscale="log", xlabel="training samples", title=LAWS[name])
        ax.title.set_fontsize(8)
    axes[0].set_ylabel("exact KL(law, model) (nats)\ndashed: fitted to the law itself")
    axes[0].legend(fontsize=8)
    return figure


def by_size(rows: Rows, key: str, name: str, model: str, sizes: list[int]) -> list[list[float]]:
    """A column of the runs of a model on a law, for each n, the exact risk last."""
    return [values(rows, key, law=name, model=model, n=n) for n in [*sizes, EXACT]]


def exponents(kls: list[list[float]], sizes: list[int]) -> list[str]:
    """That of the KL between each n and the next."""
    return [
        interval([exponent((n, a), (k, b)) for a, b in zip(kls[i], kls[i + 1], strict=True)])
        for i, (n, k) in enumerate(itertools.pairwise(sizes))
    ]


def apart(over: dict[str, list[list[float]]], counts: list[str]) -> tuple[list[str], list[str]]:
    """Where the interval of ARM over EBM lies above 1, and where below; all hold together."""
    ratios = {
        f"{LAWS[name].split(':')[0].split(' (')[0]} ({count})": values
        for name, found in over.items()
        for count, values in zip(counts, found, strict=True)
    }
    return sides(ratios)


def main(options: Options) -> None:
    space, steps, names, sizes = TokenSpace(4, 5), 1000, list(LAWS), [100, 1000, 10_000, 100_000]
    if options.quick:
        space, steps, names, sizes = TokenSpace(3, 3), 60, ["pairwise", "additive"], [100, 1000]
    jobs = [
        Samples(model, name, space.vocab_size, space.max_length, n, steps, seed)
        for name in names
        for n in [*sizes, EXACT]
        for model in MAKE
        for seed in range(options.seeds)
    ]
    rows = collect("samples", jobs, measure, options)
    kls, tests = (
        {(x, m): by_size(rows, key, x, m, sizes) for x in names for m in MAKE}
        for key in ("kl", "test")
    )
    kl_lines = [(LAWS[x], m, *map(geometric_interval, found)) for (x, m), found in kls.items()]
    test_lines = [(LAWS[x], m, *map(interval, found[:-1])) for (x, m), found in tests.items()]
    slopes = [(LAWS[x], m, *exponents(found, sizes)) for (x, m), found in kls.items()]
    over = {x: list(map(divided, kls[x, "ARM"], kls[x, "EBM"])) for x in names}
    ratios = [(LAWS[x], *map(geometric_interval, found)) for x, found in over.items()]
    mirrored = map(divided, over["pairwise"], over["additive"])
    ratios.append(("the first over the second", *map(geometric_interval, mirrored)))
    counts = [*(f"n = {n:,}" for n in sizes), "exact risk"]
    fewer, more = apart(over, counts)
    steps_of = [f"{n:,} to {k:,}" for n, k in itertools.pairwise(sizes)]
    text = f"""
V={space.vocab_size}, T={space.max_length} ({space.num_sequences:,} sequences), N=2, {steps:,} steps on the empirical risk of n samples at rate {Schedule.lr:g}, stopped where
the likelihood of n/4 further samples is best. Exact KL(law, model) in nats, geometric mean over seeds (95% interval), each seed with its
own law, data and initial weights; *exact risk* is the same fit to the law itself, what optimisation leaves without any sampling:

{table(["law", "model", *counts], kl_lines)}

On {TEST:,} responses that took no part in this: NLL of the model less that of the law (an estimate of the same KL):

{table(["law", "model", *counts[:-1]], test_lines)}

**Which model needs fewer samples?** KL of the ARM over that of the EBM at the same n; above 1 the EBM has learned more from the same data:

{table(["law", *counts], ratios)}

The intervals, at 95% for all {len(names) * len(counts)} together (Bonferroni; those of the table are 95% each), have the EBM ahead for {", ".join(fewer) or "none"}; the ARM ahead for {", ".join(more) or "none"}.

**Which is easier to learn, R or q** (open question 1 of the paper)? The first two laws mirror each other: the same kind of Gaussian tables over
pairs of tokens, added up as rewards (q must then sum over all completions) or as logits (R must then subtract a log-sum-exp
at every position). Were the simpler function the easier to learn, *the first over the second* would be well above 1. In the third law neither is simple; in the last two M adds little: V is constant, or depends on the first token alone. The
measured exponent k of KL ~ n^-k over each decade (for a well-specified model 1):

{table(["law", "model", *steps_of], slopes)}
"""
    figure = picture(rows, names, sizes)
    publish("samples", "Generalisation and data", text, figure, rows, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
