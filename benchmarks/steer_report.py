"""The page and the picture of :mod:`benchmarks.steer`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from rl_ebm.certificates.certificate import Certificate
from rl_ebm.estimates import Interval
from rl_ebm.intervals import half_width, interval


@dataclass(frozen=True)
class Look:
    """What is reported of a policy beside the exact solution."""

    name: str
    kl: Interval
    """KL(target, policy)"""
    reverse: Interval
    """KL(policy, target)"""
    tv: Interval
    wanted: Interval
    """share of the texts with the wanted word"""
    forbidden: Interval
    surprise: Interval
    """nats per token under the fitted GPT-2"""
    depths: list[Interval]
    """the terms of ``kl`` by position"""
    texts: list[str]


@dataclass(frozen=True)
class Run:
    """How one method got there."""

    method: str
    seed: int
    tokens: int
    seconds: float
    curve: list[tuple[int, float]]
    """tokens, KL(target, policy)"""


def shown(x: Interval) -> str:
    """An estimate with its interval, short."""
    if x.low == x.high == float("inf"):
        return "∞"
    return f"{x.estimate:.3g} [{x.low:.3g}, {x.high:.3g}]".replace("inf]", "∞)")


def table(head: str, rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    columns = head.split(" | ")
    lines = [f"| {head} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def looks_table(looks: Sequence[Look]) -> str:
    """Policies with the intervals of their samples."""
    return table(
        "policy | KL(target, policy) | KL(policy, target) | total variation | wanted | forbidden "
        "| nats per token",
        [
            [
                x.name,
                "0" if x.kl.high < 1e-9 else shown(x.kl),
                "0" if x.reverse.high < 1e-9 else shown(x.reverse),
                "0" if x.kl.high < 1e-9 else shown(x.tv),
                shown(x.wanted),
                shown(x.forbidden),
                shown(x.surprise),
            ]
            for x in looks
        ],
    )


def methods_table(runs: Sequence[Run], ends: Sequence[Look]) -> str:
    """Methods at equal tokens: means over the seeds."""
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        found = [(r, e) for r, e in zip(runs, ends, strict=True) if r.method == method]
        columns = [
            [e.kl.estimate for _, e in found],
            [e.tv.estimate for _, e in found],
            [e.wanted.estimate for _, e in found],
            [e.forbidden.estimate for _, e in found],
            [e.surprise.estimate for _, e in found],
        ]
        seconds = statistics.fmean(r.seconds for r, _ in found)
        low, high = min(e.kl.low for _, e in found), max(e.kl.high for _, e in found)
        cells = [interval(c) for c in columns]
        cells.insert(1, f"{low:.3g} to {high:.3g}")
        rows.append([f"`{method}`", *cells, f"{seconds:.0f}"])
    return table(
        "method | KL(target, policy) | its samples' intervals, all runs | total variation | wanted "
        "| forbidden | nats per token | seconds",
        rows,
    )


def texts(title: str, lines: Sequence[str]) -> str:
    """Some texts under a title."""
    return "\n".join([f"{title}:", "", *(f"    {line}" for line in lines)])


def page(
    facts: dict[str, Any],
    fits: dict[str, Interval],
    looks: Sequence[Look],
    runs: Sequence[Run],
    ends: Sequence[Look],
    certificates: Sequence[tuple[str, Certificate, list[str]]],
) -> str:
    """All of the results."""
    seeds = len({run.seed for run in runs})
    fitted = "; ".join(f"{name} {shown(x)}" for name, x in fits.items())
    methods = list(dict.fromkeys(run.method for run in runs))
    firsts = [e for r, e in zip(runs, ends, strict=True) if r.seed == runs[0].seed]
    return "\n\n".join(
        [
            "# A small language model, steered",
            f"{facts['sentences']:,} sentences of a made grammar; a byte-pair encoding of "
            f"{facts['vocab_size']:,} tokens; responses of at most {facts['max_length']}, EOS "
            f"included. A GPT-2 of 2 layers, {facts['width']} wide, fitted to them by likelihood; "
            f"nats per held-out token: {fitted}.\n"
            f"Reward: {facts['score']:g} where \"{facts['wanted']}\" occurs, -inf where "
            f"\"{facts['forbidden']}\" or its plural does; beta = 1. Shares count texts with a "
            "word that begins so, however it was split into tokens. \"Nats per token\" is under "
            "the fitted GPT-2. Intervals are 95 %, of the samples; ± is over the seeds "
            "(Student's t).",
            "## An n-gram as the reference: the truth is known",
            f"log Z = {facts['log_z']:.4f}, exact: {facts['states']:,} states of reward and "
            f"bigram. All figures from {facts['samples']:,} samples of target and policy each, "
            "with the exact divergence at every state that they visit.",
            looks_table([*looks, firsts[0]]),
            "KL(policy, target) is infinite for every softmax: it gives the forbidden word some "
            "probability, the target none. So the table to read is KL(target, policy).",
            f"At equal tokens ({facts['tokens']:,} from which each learns, batches of "
            f"{facts['batch_size']} responses), each from the fitted GPT-2, {seeds} seeds; Adam, "
            f"learning rates {facts['rates']}; responses with the forbidden word count as -10 nats "
            "for the methods that see rewards alone:",
            methods_table(runs, ends),
            "![KL against tokens, and by position](steer.png)",
            *(texts(x.name, x.texts) for x in [*looks, *firsts]),
            "## The GPT-2 itself as the reference: certificates",
            "Nothing is exact here: the prefix's whole text is the state. The largest reward is "
            "known, and bounds log Z from above. As printed:",
            *(
                f"**{name}**\n\n```\n{found}\n```\n\n{texts('Samples', lines)}"
                for name, found, lines in certificates
            ),
            f"All of it took {facts['minutes']:.0f} minutes; methods: {', '.join(methods)}.",
        ]
    )


def picture(looks: Sequence[Look], runs: Sequence[Run], ends: Sequence[Look]) -> Figure:
    """KL against tokens of the methods; KL by position before and after."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, method in enumerate(dict.fromkeys(run.method for run in runs)):
        curves = [run.curve for run in runs if run.method == method]
        x = [statistics.fmean(p[0] for p in points) for points in zip(*curves, strict=True)]
        values = [[p[1] for p in points] for points in zip(*curves, strict=True)]
        means = [statistics.fmean(v) for v in values]
        half = [0.0 if len(v) < 2 else half_width(v) for v in values]
        low = [max(m - h, min(v) / 2) for m, h, v in zip(means, half, values, strict=True)]
        high = [m + h for m, h in zip(means, half, strict=True)]
        left.plot(x, means, "o-", color=f"C{i}", markersize=3, label=method)
        left.fill_between(x, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
    left.set_yscale("log")
    left.set_xlabel("tokens that a method learned from")
    left.set_ylabel("KL(target, policy), nats")
    left.set_title("mean and 95 % interval over the seeds")
    left.legend()
    after = next(e for r, e in zip(runs, ends, strict=True) if r.seed == runs[0].seed)
    before = next(x for x in looks if x.name == "GPT-2 before")
    for x, label in ((before, "GPT-2 before"), (after, "after distillation")):
        middle = [d.estimate for d in x.depths]
        ends_of = [
            [max(d.estimate - d.low, 0.0) for d in x.depths],
            [max(d.high - d.estimate, 0.0) for d in x.depths],
        ]
        right.errorbar(range(len(middle)), middle, yerr=ends_of, fmt="o-", ms=3, label=label)
    right.set_xlabel("position of the token")
    right.set_ylabel("E KL(target, policy) there, nats")
    right.set_title("by position, 95 % of the samples")
    right.legend()
    return figure
