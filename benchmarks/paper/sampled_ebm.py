"""Training the bidirectional EBM where its partition function cannot be summed.

    python -m benchmarks.paper.sampled_ebm [--quick]

The gradient of the risk is E_p grad R - E_data grad R; each method has another way to the first
term, or around it. Checked where the truth is known (V = 8, T = 4), at equal time of one core.

    risk        both terms by enumeration: no sampling at all
    exact       the sum over all sequences, data sampled
    gibbs       persistent chains, one sweep of Gibbs a step
    metropolis  persistent chains, proposals from an ARM that is fitted to the same data
    nce         noise-contrastive estimation against that ARM, log Z a parameter
                (Gutmann and Hyvarinen 2010)
    min-max     a policy as the sampler, trained to the EBM by RLOO (arXiv 2512.15605, App. A.8)
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from benchmarks.paper import laws
from benchmarks.paper.common import Options, Rows, collect, ends, plot_runs, publish, select, table
from benchmarks.paper.fit import SMALL, descend_ebm, gap, log_law, make_arm, make_ebm, scores
from rl_ebm import TokenSpace
from rl_ebm.agents.policy_gradient import policy_gradient_loss
from rl_ebm.intervals import geometric_interval, interval
from rl_ebm.policies import log_prob
from rl_ebm.policies.scoring import sample
from rl_ebm.rewards import TransformerReward

LAWS = {"zipf": "Zipf in order", "normal": "softmax(N(0, I) / 0.3)"}
BATCH = 512
LR = 3e-3


@dataclass(frozen=True)
class Sampled:
    """One method on one law, for some seconds."""

    method: str
    law: str
    vocab_size: int
    max_length: int
    seconds: float
    seed: int


class Setting:
    """What every method shares: the data, the EBM, its optimiser."""

    def __init__(self, job: Sampled) -> None:
        self.space = TokenSpace(job.vocab_size, job.max_length)
        self.log_rho = (
            laws.zipf(self.space) if job.law == "zipf" else laws.normal(self.space, 0.3, job.seed)
        )
        self.reward = make_ebm(self.space, SMALL, job.seed)
        self.generator = torch.Generator().manual_seed(job.seed)
        self.tokens, self.lengths = self.space.sequences()
        self.optimizers: list[torch.optim.Optimizer] = []
        self.adam(self.reward.parameters())
        self.policy = make_arm(self.space, SMALL, job.seed + 100)
        self.log_z = torch.tensor(math.log(self.space.num_sequences), requires_grad=True)

    def adam(self, parameters: object) -> torch.optim.Optimizer:
        """An Adam whose rate follows the run's schedule."""
        self.optimizers.append(torch.optim.Adam(parameters, lr=LR))  # type: ignore[arg-type]
        return self.optimizers[-1]

    def set_rate(self, progress: float) -> None:
        """A constant rate that falls to 0 over the last fifth."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1.0, 5 * (1 - progress))

    def data(self) -> Tensor:
        """Responses drawn from the law."""
        draws = torch.multinomial(
            self.log_rho.exp(), BATCH, replacement=True, generator=self.generator
        )
        return self.tokens[draws]

    def r(self, tokens: Tensor, reward: TransformerReward | None = None) -> Tensor:
        """R of responses, with gradient."""
        lengths = torch.full((len(tokens),), self.space.max_length)
        model = self.reward if reward is None else reward
        out: Tensor = model(tokens, lengths, torch.zeros_like(lengths))
        return out

    def draw(self) -> Tensor:
        """Responses of the policy."""
        ids = torch.zeros(BATCH, dtype=torch.int64)
        return sample(self.policy, self.space, BATCH, self.generator, ids).tokens

    def log_q(self, tokens: Tensor) -> Tensor:
        """log-probability of responses under the policy, with gradient."""
        lengths = torch.full((len(tokens),), self.space.max_length)
        return log_prob(self.policy, self.space, tokens, lengths)

    def teach(self) -> Callable[[], None]:
        """A step of teacher forcing of the policy on the data."""
        optimizer = self.adam(self.policy.parameters())

        def step() -> None:
            optimizer.zero_grad()
            (-self.log_q(self.data()).mean()).backward()
            optimizer.step()

        return step

    def contrast(self, negatives: Tensor) -> None:
        """One step on E_negatives R - E_data R."""
        optimizer = self.optimizers[0]
        optimizer.zero_grad()
        r = self.r(torch.cat([negatives, self.data()]))
        (r[: len(negatives)].mean() - r[len(negatives) :].mean()).backward()
        optimizer.step()


Step = Callable[[], Tensor | None]
"""One step of a method; responses that stand for the EBM's own, where it has some."""


def risk(s: Setting) -> Step:
    descend = descend_ebm(s.reward, s.log_rho)

    def step() -> None:
        s.optimizers[0].zero_grad()
        descend()
        s.optimizers[0].step()

    return step


def exact(s: Setting) -> Step:
    def step() -> None:
        s.optimizers[0].zero_grad()
        r = s.r(torch.cat([s.tokens, s.data()]))
        log_z = torch.logsumexp(r[: len(s.tokens)], 0)
        (log_z - r[len(s.tokens) :].mean()).backward()
        s.optimizers[0].step()

    return step


def gibbs(s: Setting) -> Step:
    a, t = s.space.vocab_size, s.space.max_length
    chains = torch.randint(a, (BATCH, t), generator=s.generator)

    def step() -> Tensor:
        for place in torch.randperm(t, generator=s.generator).tolist():
            candidates = chains[:, None].repeat(1, a, 1)
            candidates[:, :, place] = torch.arange(a)
            with torch.no_grad():
                r = s.r(candidates.flatten(0, 1)).view(BATCH, a)
            noise = torch.empty_like(r).exponential_(generator=s.generator).log_()
            chains[:, place] = (r - noise).argmax(1)
        s.contrast(chains)
        return chains.clone()

    return step


def metropolis(s: Setting) -> Step:
    improve, chains = s.teach(), s.draw()

    def step() -> Tensor:
        improve()
        proposals = s.draw()
        with torch.no_grad():
            both = torch.cat([chains, proposals])
            # Both are weighed anew: the EBM and the proposal have moved since the last step.
            weight = s.r(both) - s.log_q(both)
        accept = torch.rand(BATCH, generator=s.generator).log() < weight[BATCH:] - weight[:BATCH]
        chains[accept] = proposals[accept]
        s.contrast(chains)
        return chains.clone()

    return step


def nce(s: Setting) -> Step:
    improve, optimizer = s.teach(), s.adam([s.log_z])

    def step() -> None:
        improve()
        both = torch.cat([s.draw(), s.data()])
        with torch.no_grad():
            log_q = s.log_q(both)
        logit = s.r(both) - s.log_z - log_q
        is_data = (torch.arange(2 * BATCH) >= BATCH).float()
        s.optimizers[0].zero_grad()
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logit, is_data).backward()
        s.optimizers[0].step()
        optimizer.step()

    return step


def min_max(s: Setting) -> Step:
    optimizer = s.adam(s.policy.parameters())

    def step() -> Tensor:
        tokens = s.draw()
        with torch.no_grad():
            log_weight = s.r(tokens)
        optimizer.zero_grad()
        log_pi = s.log_q(tokens)
        ids = torch.zeros(BATCH, dtype=torch.int64)
        loss = policy_gradient_loss(
            log_pi[:, None], torch.zeros(BATCH, 1), log_weight, ids + 1, ids
        )
        loss.backward()
        optimizer.step()
        s.contrast(tokens)
        return tokens

    return step


METHODS: dict[str, Callable[[Setting], Step]] = {
    "risk": risk,
    "exact": exact,
    "gibbs": gibbs,
    "metropolis": metropolis,
    "nce": nce,
    "min-max": min_max,
}


def evaluations(space: TokenSpace) -> dict[str, int]:
    """Responses that each method scores by R in a step."""
    return {
        "risk": space.num_sequences,
        "exact": space.num_sequences + BATCH,
        "gibbs": BATCH * space.max_length * space.vocab_size + 2 * BATCH,
        "metropolis": 4 * BATCH,
        "nce": 2 * BATCH,
        "min-max": 3 * BATCH,
    }


def timed(step: Step, s: Setting, seconds: float) -> Iterator[tuple[float, int]]:
    """Steps until the time is over: processor time spent in them, and their number.

    What the caller does between two steps costs nothing.
    """
    spent, count = 0.0, 0
    while spent < seconds:
        s.set_rate(spent / seconds)
        start = time.process_time()
        step()
        spent += time.process_time() - start
        count += 1
        yield spent, count


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


def measure(job: Sampled) -> Rows:
    s = Setting(job)
    step = METHODS[job.method](s)
    rows: Rows = []
    due = 0.0
    for spent, count in timed(step, s, job.seconds):
        if spent < due and spent < job.seconds:
            continue
        due += job.seconds / 25
        kl = gap(s.log_rho, log_law(s.reward))
        row = {"spent": round(min(spent, job.seconds), 3), "count": count, "kl": kl}
        rows.append(row | bias(s, step, job.method))
    if job.method in ("metropolis", "nce", "min-max"):
        rows[-1]["policy_kl"] = gap(s.log_rho, log_law(s.policy))
    return rows


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
    figure = Figure(figsize=(5.2 * len(names), 3.8), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for name, ax in zip(names, axes, strict=True):
        for colour, method in enumerate(METHODS):
            mine = select(rows, law=name, method=method)
            plot_runs(ax, mine, "spent", "kl", method, color=f"C{colour}")
        ax.set(
            yscale="log",
            xlabel="seconds of one core",
            ylabel="exact KL(law, EBM) (nats)",
            title=LAWS[name],
        )
        ax.legend(fontsize=8)
    return figure


def main(options: Options) -> None:
    space, seconds, names = TokenSpace(8, 4), 20.0, list(LAWS)
    if options.quick:
        space, seconds, names = TokenSpace(3, 3), 1.0, ["zipf"]
    jobs = [
        Sampled(method, name, space.vocab_size, space.max_length, seconds, seed)
        for name in names
        for method in METHODS
        for seed in range(options.seeds)
    ]
    rows = collect("sampled_ebm", jobs, measure, options)
    cost, lines, closer = evaluations(space), [], []
    for name in names:
        for method in METHODS:
            mine = select(rows, law=name, method=method)
            biases, log_z = along(mine, "bias"), along(mine, "log_z_error")
            shown = f"log Z: {interval(log_z)}" if log_z else interval(biases) if biases else "none"
            policy = [float(r["policy_kl"]) for r in mine if r.get("policy_kl", "") != ""]
            kls = ends(mine, "kl")
            # A run starts near uniform: what ends above its start has learned less than nothing.
            worse = sum(r["kl"] < end for r, end in zip(starts(mine), kls, strict=True))
            if (
                policy
                and method != "min-max"
                and all(a < b for a, b in zip(policy, kls, strict=True))
            ):
                closer.append(f"`{method}` on {LAWS[name]}")
            lines.append(
                (
                    LAWS[name],
                    method,
                    f"{cost[method]:,}",
                    f"{min(ends(mine, 'count')):,.0f}",
                    geometric_interval(kls),
                    f"{worse} of {len(kls)}",
                    shown,
                    geometric_interval(policy) if policy else "",
                )
            )
    head = [
        "law",
        "method",
        "R evaluations a step",
        "steps",
        "KL(law, EBM)",
        "ends above its start",
        "bias",
        "KL(law, its policy)",
    ]
    text = f"""
V={space.vocab_size}, T={space.max_length}, N=2, {seconds:.0f} s of processor time for each method and seed, on one core; batches of {BATCH}, one learning rate for all ({LR:g},
falling to 0 over the last fifth), so that a ranking is one at this rate. The KLs are exact, in nats at the end: the gap of the
log-likelihood; geometric mean over seeds (95% interval). *Bias* is the mean of R over what a method draws in the place of the EBM's own responses, less the exact
E R of the EBM as it stands there, in nats, mean over training between a fifth and four fifths of the time; for `nce` the learned log Z less the exact one:

{table(head, lines)}

`risk` enumerates both terms of the gradient, `exact` the partition function alone, with data drawn as for the others. At {space.num_sequences:,} sequences
a sweep of Gibbs costs more than this sum: beyond enumeration the comparison is that of the last four. `metropolis` and `nce` also train an ARM
on the same data (teacher forcing), `min-max` one that chases the EBM: its own KL is the last column. On every seed that ARM is closer to the law than the EBM it serves for: {", ".join(closer) or "none"}.
"""
    publish("sampled_ebm", "The EBM beyond enumeration", text, picture(rows, names), rows, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
