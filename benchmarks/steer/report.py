"""The page and the picture of :mod:`benchmarks.steer`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from rl_ebm.certificates.certificate import Certificate
from rl_ebm.statistics.interval import Interval
from rl_ebm.studies.seeds import interval


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
    seconds: float
    curve: list[tuple[int, Interval]]
    """tokens, KL(target, policy)"""


Ran = Sequence[tuple[Run, Look]]


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


def methods_table(ran: Ran, start: Look) -> str:
    """Methods at equal tokens: means over the seeds."""
    rows = []
    for method in dict.fromkeys(run.method for run, _ in ran):
        found = [(run, end) for run, end in ran if run.method == method]
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
    figures = (start.tv, start.wanted, start.forbidden, start.surprise)
    first = [f"{x.estimate:.2g}" for x in figures]
    kl = start.kl
    rows.insert(
        0, ["the start", f"{kl.estimate:.2g}", f"{kl.low:.3g} to {kl.high:.3g}", *first, ""]
    )
    return table(
        "method | KL(target, policy) | its samples' intervals, all runs | total variation | wanted "
        "| forbidden | nats per token | processor seconds",
        rows,
    )


def texts(title: str, lines: Sequence[str]) -> str:
    """Some texts under a title."""
    return "\n".join([f"{title}:", "", *(f"    {line}" for line in lines)])


def page(
    facts: dict[str, Any],
    fits: dict[str, Interval],
    looks: dict[str, Look],
    ran: Ran,
    certificates: Sequence[tuple[str, Certificate, list[str]]],
) -> str:
    """All of the results."""
    seeds = len({run.seed for run, _ in ran})
    fitted = "; ".join(f"{name} {shown(x)}" for name, x in fits.items())
    firsts = [end for run, end in ran if run.seed == 0]
    return "\n\n".join(
        [
            "# A small language model, steered",
            f"{facts['sentences']:,} sentences of a made grammar; a byte-pair encoding of "
            f"{facts['vocab_size']:,} tokens; responses of at most {facts['max_length']}, EOS "
            f"included. A GPT-2 of 2 layers, {facts['width']} wide, fitted to them by likelihood; "
            f"nats per held-out token: {fitted}.",
            f'Reward: {facts["score"]:g} where the tokens of "{facts["wanted"]}" occur, -inf where '
            f'those of "{facts["forbidden"]}" or of its plural do; beta = 1. The shares "wanted" '
            'and "forbidden" are of texts with a word that begins so, however it was split into '
            'tokens. "Nats per token" are under the fitted GPT-2: its own samples show what is '
            "fluent. Intervals are 95 %, of the samples; ± is over the seeds (Student's t).",
            "## An n-gram as the reference: the truth is known",
            f"log Z = {facts['log_z']:.4f}, exact, over {facts['states']:,} states of bigram and "
            f"reward. All figures from {facts['samples']:,} samples of target and policy each, "
            "with the exact divergence at every state that they visit.",
            looks_table([looks[x] for x in ("target", "ngram", "before", "after")]),
            f'"Distilled" is `on-policy-distillation` of the exact solution into the GPT-2: '
            f"{facts['tokens']:,} tokens, half of them the teacher's own. KL(policy, target) is "
            "infinite for every softmax: it gives the forbidden word some probability, and the "
            "target none. KL(target, policy) is what to read. Most of it before is not the word: "
            "the n-gram is the sloppier language model, and the target is as sloppy.",
            "So that every method starts where its reference is, the GPT-2 is first taught the "
            f"n-gram ({facts['taught']:,} tokens, no reward). From there each method learns from "
            f"{facts['tokens']:,} tokens, in batches of {facts['batch_size']} responses; {seeds} "
            f"seeds; Adam, learning rates {facts['rates']}: of 1e-3, 3e-3 and 1e-2 the best after "
            "20,000 tokens of another seed and another, rarer word (`policy-gradient` has that of "
            "`vargrad`). A response with the forbidden word counts as -10 nats for the methods "
            "that see nothing but rewards; no other option of theirs was tuned:",
            methods_table(ran, looks["start"]),
            "![KL against tokens, and by position](steer.png)",
            *(texts(x.name, x.texts) for x in [*looks.values(), *firsts]),
            "## The GPT-2 itself as the reference: certificates",
            "Nothing is exact here: the state is the whole prefix. The largest reward is known, "
            "and bounds log Z from above. The third policy adds q* - log p_ref of the n-gram's "
            "exact solution to the GPT-2's logits; nothing is trained for it. The last is an "
            f"adapter of rank 8, learning rate {facts['lora_rate']:g}, not tuned. As printed:",
            *(
                f"**{name}**\n\n```\n{found}\n```\n\n{texts('Samples', lines)}"
                for name, found, lines in certificates
            ),
            f"All of it took {facts['minutes']:.0f} processor minutes.",
        ]
    )


def picture(looks: dict[str, Look], ran: Ran) -> Figure:
    """KL against tokens of the methods; KL by position before and after."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (run, _) in enumerate((r, e) for r, e in ran if r.seed == 0):
        points = [(0, looks["start"].kl), *run.curve]
        _bars(left, [x for x, _ in points], [k for _, k in points], run.method, f"C{i}")
        others = [r.curve[-1] for r, _ in ran if r.method == run.method and r.seed != 0]
        left.plot([x for x, _ in others], [k.estimate for _, k in others], "x", color=f"C{i}")
    left.set_yscale("log")
    left.set_xlabel("tokens that a method learned from")
    left.set_ylabel("KL(target, policy), nats")
    left.set_title("one seed, 95 % of its samples; crosses: the others")
    left.legend()
    for i, key in enumerate(("before", "after")):
        depths = looks[key].depths
        _bars(right, list(range(len(depths))), depths, looks[key].name, f"C{4 + i}")
    right.set_xlabel("position of the token")
    right.set_ylabel("E KL(target, policy) there, nats")
    right.set_title("by position, 95 % of the samples")
    right.legend()
    return figure


def _bars(axes: Any, x: list[int], y: Sequence[Interval], label: str, color: str) -> None:
    middle = [k.estimate for k in y]
    below = [max(k.estimate - k.low, 0.0) for k in y]
    above = [max(k.high - k.estimate, 0.0) for k in y]
    axes.errorbar(x, middle, yerr=[below, above], fmt="o-", ms=3, color=color, label=label)
