"""Thinking traces: latent tokens before the answer, which the reward does not see.

    python -m benchmarks.paper.traces [--quick]

A trace z of k tokens, then an answer y of T. What counts is the policy's law of the answer,

    pi(y) = sum_z pi(z) pi(y|z),

exact by enumeration here, against p*(y), proportional to exp R(y). Two losses on samples of
(z, y), both zero in expectation only where pi(y) = p*(y):

    policy gradient:   - A log pi(z, y),  A = G - mean G,  G = R(y) - log pi(y)
    path consistency:  half the variance of R(y) - log pi(y) over the batch

with log pi(y) the exact marginal (without gradient in G).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.paper import laws
from benchmarks.paper.common import (
    Options,
    Rows,
    collect,
    curve,
    ends,
    legend_below,
    publish,
    select,
    spread,
    table,
)
from benchmarks.paper.fit import Schedule, fit, gap, make_arm, marks
from rl_ebm import TokenSpace
from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.policies import Transformer
from rl_ebm.policies.scoring import tree_q_values
from rl_ebm.soft_bellman import log_policy, sequence_log_probs
from rl_ebm.studies.seeds import interval

TINY = TransformerConfig(layers=1, heads=2, dim=8, hidden=8)
LAWS = {"parity": "parity of the answer", "normal": "softmax(N(0, I) / 0.5)"}
LOSSES = ("policy gradient", "path consistency")
BATCH = 1024


@dataclass(frozen=True)
class Trace:
    """One tiny ARM with k latent tokens."""

    law: str
    loss: str
    trace: int
    vocab_size: int
    max_length: int
    steps: int
    lr: float
    seed: int


def law(name: str, space: TokenSpace, seed: int) -> Tensor:
    """log p* of a name of :data:`LAWS`."""
    return laws.parity(space, seed) if name == "parity" else laws.normal(space, 0.5, seed)


def joint(policy: Transformer) -> Tensor:
    """log pi(z, y), (A^k, A^T): traces by answers, both in enumeration order."""
    space = policy.space
    sizes = [space.num_prefixes(t) for t in range(space.max_length)]
    log_pi = list(log_policy(tree_q_values(policy, space)[0]).split(sizes))
    return sequence_log_probs(log_pi, space)


def loss(log_joint: Tensor, log_star: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """One of :data:`LOSSES` on a batch drawn from the policy."""
    flat = log_joint.flatten()
    answers = len(log_star)
    draws = torch.multinomial(flat.detach().exp(), BATCH, replacement=True, generator=generator)
    marginal = torch.logsumexp(log_joint, 0)
    y = draws % answers
    if kind == "path consistency":
        return 0.5 * (log_star[y] - marginal[y]).var()
    returns = (log_star[y] - marginal[y]).detach()
    advantage = (returns - returns.mean()) * BATCH / (BATCH - 1)  # leave-one-out
    return -(advantage * flat[draws]).mean()


def measure(job: Trace) -> Rows:
    answers = TokenSpace(job.vocab_size, job.max_length)
    space = TokenSpace(job.vocab_size, job.trace + job.max_length)
    log_star = law(job.law, answers, job.seed)
    policy = make_arm(space, TINY, job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    target = log_star.float()

    def risk() -> Tensor:
        value = loss(joint(policy).view(-1, answers.num_sequences), target, job.loss, generator)
        value.backward()
        return value.detach()

    # The gradients are noisy: Adam's own beta2.
    schedule = Schedule(job.steps, job.lr, beta2=0.999)
    rows, look = [], marks(job.steps, 25)
    for step in fit(policy, risk, schedule):
        if step in look:
            with torch.no_grad():
                log_joint = joint(policy).view(-1, answers.num_sequences).double()
                log_p = torch.logsumexp(log_joint, 0)
            log_trace = torch.logsumexp(log_joint, 1)
            rows.append(
                {
                    "step": step,
                    "kl": gap(log_star, log_p),
                    "kl_policy_target": gap(log_p, log_star),
                    "trace_entropy": -float((log_trace.exp() * log_trace).sum()),
                }
            )
    return rows


def picture(rows: Rows, names: list[str]) -> Figure:
    figure = Figure(figsize=(5 * len(names), 4.2), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for name, ax in zip(names, axes, strict=True):
        mine = select(rows, law=name)
        for colour, k in enumerate(sorted({r["trace"] for r in mine})):
            width = 4.0 - 3.0 * colour / 3  # thinner on thicker: where they are one all are seen
            for kind, style in zip(LOSSES, ("-", "--"), strict=True):
                xs, ys = curve(select(mine, trace=k, loss=kind), "step", "kl_policy_target")
                label = f"{k} trace tokens" if style == "-" else None
                ax.plot(xs, ys, style, color=f"C{colour}", linewidth=width, label=label)
        ax.set(
            yscale="log",
            xlabel="steps (solid: policy gradient; dashed: path consistency)",
            ylabel="exact KL(answer, p*) (nats), median",
            title=LAWS[name],
        )
        legend_below(ax, 2, 0.2)
    return figure


def at_end(
    rows: Rows,
    names: Sequence[str],
    traces: Sequence[int],
    key: str,
    show: Callable[[Sequence[float]], str] = spread,
) -> list[tuple[str, ...]]:
    """Lines of a table: a column at the end of the runs, by law, loss and trace tokens."""
    return [
        (LAWS[name], kind, *(
            show(ends(select(rows, law=name, loss=kind, trace=k), key)) for k in traces
        ))
        for name in names
        for kind in LOSSES
    ]  # fmt: skip


def helped(rows: Rows, names: Sequence[str], none: int, most: int) -> list[tuple[str, ...]]:
    """Lines of a table: KL(answer, p*) of the shortest trace over that of the longest."""
    lines: list[tuple[str, ...]] = []
    for name in names:
        for kind in LOSSES:
            mine = select(rows, law=name, loss=kind)
            plain, traced = (ends(select(mine, trace=k), "kl_policy_target") for k in (none, most))
            ratio = [a / b for a, b in zip(plain, traced, strict=True)]
            better = f"{sum(r > 1 for r in ratio)} of {len(ratio)}"
            lines.append((LAWS[name], kind, spread(ratio), better))
    return lines


def floor(name: str, space: TokenSpace, seeds: Sequence[int]) -> str:
    """KL(p*, uniform), over the seeds of a law."""
    uniform = torch.full((space.num_sequences,), -math.log(space.num_sequences)).double()
    return interval([gap(law(name, space, seed), uniform) for seed in seeds])


def main(options: Options) -> None:
    space, steps, names, traces = TokenSpace(4, 4), 2000, list(LAWS), (0, 1, 2, 4)
    if options.quick:
        space, steps, names, traces = TokenSpace(3, 2), 60, ["normal"], (0, 1)
    rate, seeds = 1e-2, range(options.seeds)
    jobs = [
        Trace(name, kind, k, space.vocab_size, space.max_length, steps, rate, seed)
        for name in names
        for kind in LOSSES
        for k in traces
        for seed in seeds
    ]
    rows = collect("traces", jobs, measure, options)
    head = ["target", "trained by", *(f"{k} trace tokens" for k in traces)]
    floors = "; ".join(f"{LAWS[name]}: {floor(name, space, seeds)}" for name in names)
    entropies = at_end(rows, names, traces[1:], "trace_entropy", interval)
    text = f"""
V={space.vocab_size}, answers of T={space.max_length} tokens ({space.num_sequences:,} of them), a Transformer of one block of width {TINY.dim}, {steps:,} steps of
{BATCH:,} responses from the policy itself, learning rate {rate:g}. The trace is not scored; the answer's law is the sum over all traces,
exactly. Training on the policy's own responses lowers KL(answer, p*); in nats at the end, median of {options.seeds} seeds (smallest to largest):

{table(head, at_end(rows, names, traces, "kl_policy_target"))}

The other direction, KL(p*, answer), is where dropped answers show (uniform policy: {floors}):

{table(head, at_end(rows, names, traces, "kl"))}

KL(answer, p*) without a trace over that with {traces[-1]} tokens, by seed, and in how many seeds the trace helped:

{table(["target", "trained by", "ratio", "helped"], helped(rows, names, traces[0], traces[-1]))}

Entropy of the trace in nats (at most k log V); 0 would be a trace that says nothing:

{table([*head[:2], *head[3:]], entropies)}
"""
    publish("traces", "Thinking traces", text, picture(rows, names), rows, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
