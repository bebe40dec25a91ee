"""Training the bidirectional EBM where its partition function cannot be summed.

    python -m benchmarks.paper.sampled_ebm [--quick]

First where the truth is known (V = 8, T = 4), at equal time of one core; then beyond enumeration,
on data from a chain whose probabilities and exact samples dynamic programming gives.

    risk        both terms by enumeration: no sampling at all
    exact       the sum over all sequences, data sampled
    gibbs       persistent chains, one sweep of Gibbs a step
    metropolis  persistent chains, proposals from an ARM that is fitted to the same data
    nce         noise-contrastive estimation against that ARM, log Z a parameter
    min-max     a policy as the sampler, trained to the EBM by RLOO (arXiv 2512.15605, App. A.8)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.paper import laws
from benchmarks.paper.chain import Chain
from benchmarks.paper.common import Options, Rows, collect, ends, plot_runs, publish, select, table
from benchmarks.paper.contrast import (
    INNER,
    METHODS,
    POLICY_RATE,
    ChainLaw,
    Enumerated,
    Law,
    Setting,
    Step,
    evaluations,
    timed,
)
from benchmarks.paper.fit import SMALL, gap, log_law, scores
from rl_ebm import TokenSpace
from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.studies.seeds import geometric_interval, interval

LAWS = {"zipf": "Zipf in order", "normal": "softmax(N(0, I) / 0.3)", "chain": "a chain"}
SIZES = {"zipf": SMALL, "normal": SMALL, "chain": TransformerConfig(2, 4, 64, 64)}
BATCH = {"zipf": 512, "normal": 512, "chain": 256}
RATES = (1e-2, 3e-3, 1e-3, 3e-4)
"""of the EBM; each method has the one that a shorter run on another seed ends best with"""
TRIAL_SEED = 100
POLICIES = ("metropolis", "nce", "min-max")
"""methods that keep an ARM beside the EBM"""
CHUNK = 4096


@dataclass(frozen=True)
class Sampled:
    """One method on one law, for some seconds."""

    method: str
    law: str
    vocab_size: int
    max_length: int
    seconds: float
    lr: float
    seed: int
    samples: int = 0
    """of each kind for an estimate, beyond enumeration"""


def make_law(job: Sampled) -> Law:
    space = TokenSpace(job.vocab_size, job.max_length)
    if job.law == "chain":
        return ChainLaw(Chain.random(space, 1.5, job.seed, shared=True))
    zipf = job.law == "zipf"
    return Enumerated(space, laws.zipf(space) if zipf else laws.normal(space, 0.3, job.seed))


def make_setting(job: Sampled) -> Setting:
    return Setting(make_law(job), SIZES[job.law], BATCH[job.law], job.lr, job.seed)


def bias(s: Setting, step: Step, method: str) -> dict[str, float]:
    """Error of what stands for the intractable term, as training meets it.

    The mean of R over what the method draws for the EBM as it is, less E_p R; for nce the
    learned log Z less the exact one.
    """
    r = scores(s.reward)
    if method == "nce":
        return {"log_z_error": float(s.log_z.detach()) - float(torch.logsumexp(r, 0))}
    s.set_rate(1.0)  # a step of rate 0 draws, and changes nothing
    drawn = step()
    if drawn is None:
        return {}
    return {"bias": float(s.r(drawn).detach().mean()) - float((torch.softmax(r, 0) * r).sum())}


@torch.no_grad()
def estimate(s: Setting, n: int, seed: int) -> dict[str, float]:
    """KL(law, EBM) and KL(law, policy) from exact samples of the law, with standard errors.

    log Z is the mean weight exp(R) / m of n draws each of the law, of the ARM beside the EBM and of
    the uniform one, m their mixture: what any of them finds counts, and no weight is larger than
    three times that under the law alone.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = -s.space.max_length * math.log(s.space.vocab_size)

    def look(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [
            (s.law.log_p(x).double(), s.log_q(x).double(), s.r(x).double())
            for x in tokens.split(CHUNK)
        ]
        log_p, log_q, r = (torch.cat(column) for column in zip(*parts, strict=True))
        return log_p, log_q, r

    draws = [s.law.draw(n, generator), s.draw(n, generator)]
    draws.append(torch.randint(s.space.vocab_size, draws[0].shape, generator=generator))
    log_w = []
    for tokens in draws:
        log_p, log_q, r = look(tokens)
        mixture = torch.stack([log_p, log_q, torch.full_like(r, uniform)])
        log_w.append(r - (torch.logsumexp(mixture, 0) - math.log(3)))
    stacked = torch.stack(log_w)
    log_z = torch.logsumexp(stacked.flatten(), 0) - math.log(3 * n)
    relative = (stacked - log_z).exp()
    # The three kinds are strata: their own variances count, not those between them.
    variance_z = relative.var(1).sum() / (9 * n)
    log_p, log_q, r = look(s.law.draw(n, generator))
    own, other = log_p - r, log_p - log_q
    return {
        "kl": float(own.mean() + log_z),
        "kl_error": float((own.var() / n + variance_z).sqrt()),
        "policy_kl": float(other.mean()),
        "policy_kl_error": float((other.var() / n).sqrt()),
        "ess": float(relative.sum().square() / relative.square().sum() / (3 * n)),
    }


def measure(job: Sampled) -> Rows:
    s = make_setting(job)
    step = METHODS[job.method](s)
    rows: Rows = []
    due = 0.0
    for spent, count in timed(step, s, job.seconds):
        if spent < due and spent < job.seconds:
            continue
        due += job.seconds / (8 if job.samples else 25)
        row = {"spent": round(min(spent, job.seconds), 3), "count": count}
        if isinstance(s.law, Enumerated):
            row["kl"] = gap(s.law.log_rho, log_law(s.reward))
            row |= bias(s, step, job.method)
        else:
            n = job.samples if spent >= job.seconds else min(CHUNK, job.samples)
            row |= estimate(s, n, job.seed + 1000)
        rows.append(row)
    if isinstance(s.law, Enumerated) and job.method in POLICIES:
        rows[-1]["policy_kl"] = gap(s.law.log_rho, log_law(s.policy))
    return rows


def best_rate(rows: Rows) -> float:
    """The rate whose trial ends at the smallest KL."""
    found = {r["lr"]: r["kl"] for r in rows}  # the last row of each
    return min(found, key=lambda lr: found[lr])


def starts(rows: Rows) -> Rows:
    """The first row of each run."""
    first: dict[str, dict[str, object]] = {}
    for row in rows:
        first.setdefault(row["run"], row)
    return list(first.values())


def along(rows: Rows, key: str) -> list[float]:
    """The mean of a column over each run, its first and last fifth left out."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.get(key, "") != "" and 0.2 <= row["spent"] / row["seconds"] <= 0.8:
            found.setdefault(row["run"], []).append(float(row[key]))
    return [statistics.fmean(values) for values in found.values()]


def picture(rows: Rows, names: list[str]) -> Figure:
    figure = Figure(figsize=(5.0 * len(names), 3.8), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for name, ax in zip(names, axes, strict=True):
        mine = select(rows, law=name)
        for colour, method in enumerate(METHODS):
            if runs := select(mine, method=method):
                plot_runs(ax, runs, "spent", "kl", method, color=f"C{colour}")
        where = "V={vocab_size}, T={max_length}".format(**mine[0])
        kind = "exact" if name != "chain" else "estimated"
        ax.set(
            yscale="log",
            xlabel="seconds of one core",
            ylabel=f"{kind} KL(law, EBM) (nats)",
            title=f"{LAWS[name]}, {where}",
        )
        ax.legend(fontsize=8)
    return figure


def checked(rows: Rows, name: str) -> list[tuple[str, ...]]:
    """Lines of the table where the truth is known."""
    lines = []
    for method in METHODS:
        mine = select(rows, law=name, method=method)
        space = TokenSpace(mine[0]["vocab_size"], mine[0]["max_length"])
        biases, log_z = along(mine, "bias"), along(mine, "log_z_error")
        shown = f"log Z: {interval(log_z)}" if log_z else interval(biases) if biases else "none"
        policy = ends([r for r in mine if r.get("policy_kl", "") != ""], "policy_kl")
        kls = ends(mine, "kl")
        # A run starts near uniform: what ends above its start has learned less than nothing.
        worse = sum(r["kl"] < end for r, end in zip(starts(mine), kls, strict=True))
        lines.append(
            (
                LAWS[name],
                method,
                f"{mine[0]['lr']:g}",
                f"{evaluations(space, BATCH[name])[method]:,}",
                f"{min(ends(mine, 'count')):,.0f}",
                geometric_interval(kls),
                f"{worse} of {len(kls)}",
                shown,
                geometric_interval(policy) if policy else "",
            )
        )
    return lines


def beyond(rows: Rows) -> list[tuple[str, ...]]:
    """Lines of the table beyond enumeration."""

    def shown(mine: Rows, key: str) -> str:
        widest = statistics.NormalDist().inv_cdf(0.975) * max(ends(mine, f"{key}_error"))
        return f"{interval(ends(mine, key))} ({widest:.1g})"

    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = select(rows, method=method)
        space = TokenSpace(mine[0]["vocab_size"], mine[0]["max_length"])
        lines.append(
            (
                method,
                f"{mine[0]['lr']:g}",
                f"{evaluations(space, BATCH['chain'])[method]:,}",
                f"{min(ends(mine, 'count')):,.0f}",
                shown(mine, "kl"),
                f"{100 * min(ends(mine, 'ess')):.2g} %",
                shown(mine, "policy_kl") if method in POLICIES else "",
            )
        )
    return lines


def runs_of(
    name: str,
    size: tuple[int, int, float, int],
    rates: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
) -> list[Sampled]:
    """Runs on a law, of every method that has rates and can be had there."""
    v, t, seconds, samples = size
    return [
        Sampled(method, name, v, t, seconds, lr, seed, samples)
        for method in METHODS
        if name != "chain" or method not in ("risk", "exact")
        for lr in rates.get(method, [])
        for seed in seeds
    ]


def best_rates(tried: Rows, name: str) -> dict[str, list[float]]:
    """The best rate of each method that was tried on a law."""
    found = {method: select(tried, law=name, method=method) for method in METHODS}
    return {method: [best_rate(rows)] for method, rows in found.items() if rows}


def closer(rows: Rows, names: list[str]) -> list[str]:
    """Where the ARM beside the EBM ends closer to the law than the EBM, with every seed."""
    found = []
    for name in names:
        for method in ("metropolis", "nce"):
            mine = select(rows, law=name, method=method)
            policy = ends([r for r in mine if r["policy_kl"] != ""], "policy_kl")
            if all(a < b for a, b in zip(policy, ends(mine, "kl"), strict=True)):
                found.append(f"`{method}` on {LAWS[name]}")
    return found


def main(options: Options) -> None:
    sizes = {"zipf": (8, 4, 20.0, 0), "normal": (8, 4, 20.0, 0), "chain": (32, 8, 60.0, 20_480)}
    rates, share = RATES, 0.3
    if options.quick:
        sizes = {"zipf": (3, 3, 1.0, 0), "chain": (4, 3, 1.0, 512)}
        rates = RATES[1:2]
    names = list(sizes)
    trials, runs = [], []
    for name, (v, t, seconds, samples) in sizes.items():
        short = (v, t, share * seconds, samples)
        trials += runs_of(name, short, dict.fromkeys(METHODS, rates), [TRIAL_SEED])
    tried = collect("sampled_ebm_rates", trials, measure, options)
    for name, size in sizes.items():
        runs += runs_of(name, size, best_rates(tried, name), range(options.seeds))
    rows = collect("sampled_ebm", runs, measure, options)
    lines = [line for name in names if name != "chain" for line in checked(rows, name)]
    head = [
        "law", "method", "rate", "R evaluations a step", "steps", "KL(law, EBM)",
        "ends above its start", "bias", "KL(law, its policy)",
    ]  # fmt: skip
    far = [*head[1:6], "smallest ESS", head[-1]]
    v, t, seconds, _ = sizes["zipf"]
    v2, t2, seconds2, samples = sizes["chain"]
    space = TokenSpace(v, t)
    text = f"""
**Where the truth is known.** V={v}, T={t}, N=2, {seconds:.0f} s of processor time for each method and seed, on one core; batches of {BATCH["zipf"]}; the EBM's learning rate is, of
{", ".join(f"{x:g}" for x in rates)}, that with which a run of {share * seconds:g} s on another seed ends best, that of an ARM beside it {POLICY_RATE:g}; both fall to 0 over the last fifth. The
KLs are exact, in nats at the end: the gap of the log-likelihood; geometric mean over seeds (95% interval). *Bias* is the mean of R over what a method draws in the
place of the EBM's own responses, less the exact E R of the EBM as it stands there, in nats, mean over training between a fifth and four fifths of the time; for `nce`
the learned log Z less the exact one:

{table(head, lines)}

`risk` enumerates both terms of the gradient, `exact` the partition function alone, with data drawn as for the others. At {space.num_sequences:,} sequences
a sweep of Gibbs costs more than this sum: beyond enumeration the comparison is that of the last four. `metropolis` and `nce` also train an ARM
on the same data (teacher forcing), `min-max` one that chases the EBM, {INNER} steps to each of its own: its own KL is the last column.

**Beyond enumeration.** V={v2}, T={t2}, {float(v2) ** t2:.0e} sequences: data from the EBM of a chain reward (1.5 N(0, 1) couplings, one J for all positions), whose probabilities and exact samples
are at hand. A Transformer of 2 layers of width 64 for both models, batches of {BATCH["chain"]}, {seconds2:.0f} s of processor time, rates chosen as above. KL(law, EBM) is E_law[log p - R] + log Z, its log Z by importance
sampling from a mixture of the law, the ARM and the uniform one, {samples:,} draws each: mean over seeds ± 95% interval, in brackets the half-width of the largest 95% interval of one estimate (asymptotic;
*ESS*, the share of draws that the weights leave, says how far to believe it: where few are left, log Z and the KL come out too small rather than too large; an
ARM's KL needs no log Z):

{table(far, beyond(select(rows, law="chain")))}

On every seed the ARM is closer to the law than the EBM it serves for: {", ".join(closer(rows, names)) or "none"}.
"""
    publish("sampled_ebm", "The EBM beyond enumeration", text, picture(rows, names), rows, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
