"""Beyond enumeration: vocabularies of 32 and 64, 8 and 16 tokens, against an exact solution.

    python -m benchmarks.paper.scale [--quick]

The reward is a chain, so that log Z, q* and exact samples cost O(T A^2). The KL is estimated
from exact samples, with the sum over the next token exact at every sampled state.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from matplotlib.figure import Figure

from benchmarks.paper.chain import Chain, kl_terms
from benchmarks.paper.common import Options, Rows, collect, curve, ends, publish, select, table
from benchmarks.paper.fit import marks
from rl_ebm import EBM, TokenSpace
from rl_ebm.agents import AGENTS
from rl_ebm.agents.shared.account import learned_log_z, values_apart
from rl_ebm.policies import Transformer
from rl_ebm.policies.decoding import sample
from rl_ebm.policies.scoring import log_pi_rows
from rl_ebm.studies.seeds import interval

SCALE = 1.5
"""standard deviation of the couplings, nats"""
CHUNK = 1024
FROM_REWARDS = ("ppo", "vargrad", "policy-gradient", "soft-q")
"""agents that know the reward of what they draw, and no more"""
KINDS = {True: "one J", False: "a J for each t"}


@dataclass(frozen=True)
class Scale:
    """One agent on one chain; ``samples`` for each estimate."""

    vocab_size: int
    max_length: int
    shared: bool
    agent: str
    steps: int
    batch_size: int
    samples: int
    seed: int


def estimate(policy: Transformer, chain: Chain, n: int, seed: int) -> dict[str, float]:
    """Both KLs with the standard errors of their means."""
    space, found = chain.space, {}
    generator = torch.Generator().manual_seed(seed)
    pairs = {"kl_target_policy": (chain, policy), "kl_policy_target": (policy, chain)}
    for name, (p, q) in pairs.items():
        parts = []
        for start in range(0, n, CHUNK):
            ids = torch.zeros(min(CHUNK, n - start), dtype=torch.int64)
            batch = sample(p, space, len(ids), generator, ids)
            with torch.no_grad():
                log_p, log_q = (log_pi_rows(x, space, batch.tokens, ids).double() for x in (p, q))
            parts.append(kl_terms(log_p, log_q, batch.lengths))
        terms = torch.cat(parts)
        found[name] = float(terms.mean())
        found[f"{name}_error"] = float(terms.std() / math.sqrt(n))
    return found


def measure(job: Scale) -> Rows:
    space = TokenSpace(job.vocab_size, job.max_length)
    chain = Chain.random(space, SCALE, job.seed, job.shared)
    ebm = EBM(space, chain.reward)
    torch.manual_seed(job.seed)
    entry = AGENTS[job.agent]
    config = entry.config(batch_size=job.batch_size, lr=3e-3)
    policy = Transformer(space, value_head=values_apart(config))
    policy.logits_are_values = entry.agent.logits_are_values
    generator = torch.Generator().manual_seed(job.seed + 2000)
    agent = entry.agent(ebm, policy, config, generator, chain if entry.needs_teacher else None)
    uniform = space.max_length * math.log(space.vocab_size) - chain.entropy()
    rows, look, spent = [], marks(job.steps, 10), 0.0
    for step in range(job.steps + 1):
        if step in look:
            n = job.samples if step == job.steps else min(job.samples, 2 * CHUNK)
            told = learned_log_z(agent)
            off = None if told is None else float(told.mean()) - float(chain.log_z)
            row = {"step": step, "seconds": round(spent, 1), "uniform": uniform, "log_z_off": off}
            rows.append(row | estimate(policy, chain, n, job.seed + 1000))
        if step < job.steps:
            started = time.process_time()
            batch = agent.sample()
            assert batch is not None
            agent.update(batch if entry.needs_teacher else ebm.score(batch), step / job.steps)
            spent += time.process_time() - started
    return rows


def picture(rows: Rows, settings: list[tuple[int, int, bool]]) -> Figure:
    figure = Figure(figsize=(3.3 * len(settings), 3.6), layout="constrained")
    axes = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    agents = list(dict.fromkeys(r["agent"] for r in rows))  # of one colour everywhere
    for (v, t, shared), ax in zip(settings, axes, strict=True):
        mine = select(rows, vocab_size=v, max_length=t, shared=shared)
        for agent in dict.fromkeys(r["agent"] for r in mine):
            colour = agents.index(agent)
            runs = select(mine, agent=agent)
            for i, run in enumerate(dict.fromkeys(r["run"] for r in runs)):
                line = select(runs, run=run)
                xs, ys = curve(line, "step", "kl_target_policy")
                errors = [1.96 * r["kl_target_policy_error"] for r in line]
                ax.errorbar(
                    xs,
                    ys,
                    yerr=errors,
                    color=f"C{colour}",
                    linewidth=1,
                    capsize=2,
                    label=agent if i == 0 else None,
                )
        uniform = statistics.fmean(row["uniform"] for row in mine)
        ax.axhline(uniform, color="0.5", linestyle=":", label="uniform policy")
        ax.set(yscale="log", xlabel="steps", title=f"V={v}, T={t}, {KINDS[shared]}")
        ax.title.set_fontsize(9)
    axes[0].set_ylabel("KL(target, policy) (nats, 95% intervals)")
    named = max(axes, key=lambda ax: len(ax.get_legend_handles_labels()[1]))
    figure.legend(
        *named.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=6
    )
    return figure


def final(rows: Rows, name: str) -> str:
    """Mean over the seeds, and the largest sampling error of one of them."""
    last = [r for r in rows if r["step"] == r["steps"]]
    half = max(1.96 * r[f"{name}_error"] for r in last)
    return f"{interval([r[name] for r in last])} ({half:.1g})"


def told_apart(rows: Rows) -> tuple[list[str], list[str]]:
    """Settings where soft-q ends nearer than teacher-forcing with every seed; all others."""
    last = [r for r in rows if r["step"] == r["steps"]]
    found: tuple[list[str], list[str]] = ([], [])
    for v, t, shared in dict.fromkeys(
        (r["vocab_size"], r["max_length"], r["shared"]) for r in last
    ):
        mine, exact = (
            [
                r["kl_target_policy"]
                for r in select(last, vocab_size=v, max_length=t, shared=shared, agent=agent)
            ]
            for agent in ("soft-q", "teacher-forcing")
        )
        found[max(mine) >= min(exact)].append(f"{v}, {t}, {KINDS[shared]}")
    return found


def asked(vocab_size: int, max_length: int) -> tuple[str, ...]:
    """The agents at these sizes: one that samples rewards everywhere, all at the largest."""
    small = (vocab_size, max_length) in ((32, 8), (32, 16), (64, 8))
    return ("teacher-forcing", *(("soft-q",) if small else FROM_REWARDS))


def main(options: Options) -> None:
    settings = [(32, 8, True), (32, 16, True), (64, 8, True), (64, 16, True), (32, 8, False)]
    steps, batch_size, samples = 800, 256, 20 * CHUNK
    if options.quick:
        settings, steps, batch_size, samples = [(16, 6, True)], 30, 64, CHUNK
    jobs = [
        Scale(v, t, shared, agent, steps, batch_size, samples, seed)
        for v, t, shared in settings
        for agent in asked(v, t)
        for seed in range(options.seeds)
    ]
    rows = collect("scale", jobs, measure, options)
    lines = []
    shares: dict[str, list[float]] = {}
    for v, t, shared in settings:
        for agent in asked(v, t):
            mine = select(rows, vocab_size=v, max_length=t, shared=shared, agent=agent)
            uniform = interval([r["uniform"] for r in mine if r["step"] == 0])
            seconds = statistics.median(ends(mine, "seconds"))
            kls = [final(mine, name) for name in ("kl_target_policy", "kl_policy_target")]
            left = [
                100 * r["kl_target_policy"] / r["uniform"] for r in mine if r["step"] == r["steps"]
            ]
            shares.setdefault(agent, []).extend(left)
            setting = (f"{v}, {t}", f"{v**t:.0e}", KINDS[shared])
            off = [r["log_z_off"] for r in mine if r["step"] == r["steps"]]
            told = interval(off) if all(isinstance(x, float) for x in off) else ""
            lines.append((*setting, f"`{agent}`", uniform, *kls, told, f"{seconds:.0f}"))
    head = [
        "V, T",
        "sequences",
        "couplings",
        "agent",
        "KL(target, uniform)",
        "KL(target, policy)",
        "KL(policy, target)",
        "learned log Z - log Z",
        "seconds of one core",
    ]
    nearer, farther = (
        "where V, T and couplings are " + "; ".join(x) if x else "nowhere" for x in told_apart(rows)
    )
    text = f"""
R(y) = h[y_1] + sum_t J_t[y_t, y_(t+1)] with h and J of {SCALE} N(0, 1), one J for all t or one for each, so that V of every prefix is exact by dynamic
programming over the last token. A 2-layer Transformer of width 64, {steps:,} steps of {batch_size} responses, rate 3e-3, all else
at its defaults: `teacher-forcing` on exact samples, which knows the target, and agents that know the rewards of what they draw and
nothing else, the same number of them each (`ppo` makes four passes over each batch, `vargrad` and `soft-q` draw half of their
responses uniformly). Mean over seeds ± 95% interval, in brackets the half-width of the largest 95% interval of one estimate
({samples:,} exact samples, asymptotic):

{table(head, lines)}

**Does the ARM still reach the EBM?** At the end {"; ".join(f"`{agent}` leaves {min(x):.2g} to {max(x):.2g} % of KL(target, uniform)" for agent, x in shares.items())}, over all
settings and seeds (where a curve flattens at its end, the learning rate falls to 0). Rewards alone are no worse than exact samples as
such: of the same number of responses `soft-q` ends nearer to the EBM than `teacher-forcing` {nearer} and farther {farther}, and takes
longer for a step. KL in nats for a whole response; seconds are those of training. The EBM here is the solved chain itself, no trained network. In a chain the future enters
q* as one number for each next token, V of the state that it leads to, whatever came before it: this scales the alphabet, the length
and the number of sequences, and asks for no planning that depends on the whole prefix.
"""
    publish(
        "scale", "Scale: V = 32 and 64, T = 8 and 16", text, picture(rows, settings), rows, options
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
