"""Training the bidirectional EBM where its partition function cannot be summed.

    python -m benchmarks.paper.sampled_ebm [--quick]

The gradient of the risk is E_p grad R - E_data grad R; each method has another way to the first
term, or around it. Checked where the truth is known (V = 8, T = 4), at equal wall time.

    exact       the sum over all sequences
    gibbs       persistent chains, one sweep of Gibbs a step
    metropolis  persistent chains, proposals from an ARM that is fitted to the same data
    nce         noise-contrastive estimation against that ARM, log Z a parameter
                (Gutmann and Hyvarinen 2010)
    min-max     a policy as the sampler, trained to the EBM by RLOO (arXiv 2512.15605, App. A.8)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import interval
from benchmarks.paper import laws
from benchmarks.paper.common import Options, Rows, collect, ends, plot_runs, publish, select, table
from benchmarks.paper.fit import SMALL, descend_ebm, gap, log_law, make_arm, make_ebm, scores
from rl_ebm import TokenSpace
from rl_ebm.agents.policy_gradient import policy_gradient_loss
from rl_ebm.policies import Transformer, log_prob
from rl_ebm.policies.scoring import sample
from rl_ebm.rewards import TransformerReward
from rl_ebm.tokens import Batch

METHODS = ("exact", "gibbs", "metropolis", "nce", "min-max")
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

    def draw(self, policy: Transformer) -> Batch:
        """Responses of a policy."""
        ids = torch.zeros(BATCH, dtype=torch.int64)
        return sample(policy, self.space, BATCH, self.generator, ids)

    def log_q(self, policy: Transformer, tokens: Tensor) -> Tensor:
        """log-probability of responses under a policy, with gradient."""
        lengths = torch.full((len(tokens),), self.space.max_length)
        return log_prob(policy, self.space, tokens, lengths)

    def contrast(self, negatives: Tensor) -> None:
        """One step on E_negatives R - E_data R."""
        optimizer = self.optimizers[0]
        optimizer.zero_grad()
        r = self.r(torch.cat([negatives, self.data()]))
        (r[: len(negatives)].mean() - r[len(negatives) :].mean()).backward()
        optimizer.step()


Step = Callable[[], Tensor | None]
"""One step of a method; responses that stand for the EBM's own, where it has some."""


def exact(s: Setting) -> Step:
    risk = descend_ebm(s.reward, s.log_rho)

    def step() -> None:
        s.optimizers[0].zero_grad()
        risk()
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


def fitted_arm(s: Setting, seed: int) -> tuple[Transformer, Callable[[], None]]:
    """An ARM, and a step that fits it to the data."""
    policy = make_arm(s.space, SMALL, seed)
    optimizer = s.adam(policy.parameters())

    def step() -> None:
        optimizer.zero_grad()
        (-s.log_q(policy, s.data()).mean()).backward()
        optimizer.step()

    return policy, step


def metropolis(s: Setting) -> Step:
    policy, improve = fitted_arm(s, 1)
    chains = s.draw(policy).tokens

    def step() -> Tensor:
        improve()
        proposals = s.draw(policy).tokens
        with torch.no_grad():
            both = torch.cat([chains, proposals])
            # Both are weighed anew: the EBM and the proposal have moved since the last step.
            weight = s.r(both) - s.log_q(policy, both)
        accept = torch.rand(BATCH, generator=s.generator).log() < weight[BATCH:] - weight[:BATCH]
        chains[accept] = proposals[accept]
        s.contrast(chains)
        return chains.clone()

    return step


def nce(s: Setting, log_z: Tensor) -> Step:
    policy, improve = fitted_arm(s, 1)
    optimizer = s.adam([log_z])

    def step() -> None:
        improve()
        both = torch.cat([s.draw(policy).tokens, s.data()])
        with torch.no_grad():
            log_q = s.log_q(policy, both)
        logit = s.r(both) - log_z - log_q
        is_data = (torch.arange(2 * BATCH) >= BATCH).float()
        s.optimizers[0].zero_grad()
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logit, is_data).backward()
        s.optimizers[0].step()
        optimizer.step()

    return step


def min_max(s: Setting, policy: Transformer) -> Step:
    optimizer = s.adam(policy.parameters())

    def step() -> Tensor:
        tokens = s.draw(policy).tokens
        with torch.no_grad():
            log_weight = s.r(tokens)
        optimizer.zero_grad()
        log_pi = s.log_q(policy, tokens)
        policy_gradient_loss(log_pi, log_weight, torch.zeros(BATCH, dtype=torch.int64)).backward()
        optimizer.step()
        s.contrast(tokens)
        return tokens

    return step


def timed(step: Step, s: Setting, seconds: float) -> Iterator[tuple[float, int, Tensor | None]]:
    """Steps until the time is over: time spent in them, their number, what they drew.

    What the caller does between two steps costs nothing.
    """
    spent, count = 0.0, 0
    while spent < seconds:
        s.set_rate(spent / seconds)
        start = time.perf_counter()
        drawn = step()
        spent += time.perf_counter() - start
        count += 1
        yield spent, count, drawn


def measure(job: Sampled) -> Rows:
    s = Setting(job)
    log_z = torch.tensor(math.log(s.space.num_sequences), requires_grad=True)
    policy = make_arm(s.space, SMALL, 2)
    step = {
        "exact": lambda: exact(s),
        "gibbs": lambda: gibbs(s),
        "metropolis": lambda: metropolis(s),
        "nce": lambda: nce(s, log_z),
        "min-max": lambda: min_max(s, policy),
    }[job.method]()
    rows: Rows = []
    count, due = 0, 0.0
    for spent, count, _ in timed(step, s, job.seconds):
        if spent < due and spent < job.seconds:
            continue
        due += job.seconds / 25
        rows.append(
            {
                "spent": round(min(spent, job.seconds), 3),
                "count": count,
                "kl": gap(s.log_rho, log_law(s.reward)),
            }
        )
    rows[-1] |= bias(s, step, log_z if job.method == "nce" else None)
    return rows


def bias(s: Setting, step: Step, log_z: Tensor | None) -> dict[str, float]:
    """Error of what stands for the intractable term, with the EBM held where it is.

    The mean of R over what the method draws less E_p R, and its standard error over batches;
    for nce the learned log Z less the exact one.
    """
    r = scores(s.reward)
    if log_z is not None:
        return {"log_z_error": float(log_z.detach()) - float(torch.logsumexp(r, 0))}
    expected = float((torch.softmax(r, 0) * r).sum())
    s.set_rate(1.0)  # steps of rate 0 draw, and change nothing
    means = []
    for _ in range(100):
        drawn = step()
        if drawn is None:
            return {}
        means.append(float(s.r(drawn).detach().mean()) - expected)
    # Chains go on from batch to batch: blocks of ten for the error.
    blocks = torch.tensor(means).view(10, 10).mean(1)
    return {
        "bias": float(blocks.mean()),
        "bias_error": float(blocks.std() / math.sqrt(len(blocks))),
    }


def picture(rows: Rows, names: list[str]) -> Figure:
    figure = Figure(figsize=(5.2 * len(names), 3.8), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for name, ax in zip(names, axes, strict=True):
        for colour, method in enumerate(METHODS):
            mine = select(rows, law=name, method=method)
            plot_runs(ax, mine, "spent", "kl", method, color=f"C{colour}")
        ax.set(
            yscale="log",
            xlabel="seconds on one thread",
            ylabel="exact KL(law, EBM) (nats)",
            title=LAWS[name],
        )
        ax.legend(fontsize=8)
    return figure


def main(options: Options) -> None:
    space, seconds, names = TokenSpace(8, 4), 60.0, list(LAWS)
    if options.quick:
        space, seconds, names = TokenSpace(3, 3), 1.0, ["zipf"]
    jobs = [
        Sampled(method, name, space.vocab_size, space.max_length, seconds, seed)
        for name in names
        for method in METHODS
        for seed in range(options.seeds)
    ]
    rows = collect("sampled_ebm", jobs, measure, options)
    lines = []
    for name in names:
        for method in METHODS:
            mine = select(rows, law=name, method=method)
            steps = ends(mine, "count")
            errors = [r for r in mine if r.get("bias", "") != ""]
            z = [float(r["log_z_error"]) for r in mine if r.get("log_z_error", "") != ""]
            shown = "none: exact"
            if errors:
                sampling = max(1.96 * float(r["bias_error"]) for r in errors)
                shown = f"{interval([float(r['bias']) for r in errors])} ({sampling:.1g})"
            elif z:
                shown = f"log Z: {interval(z)}"
            kls = interval(ends(mine, "kl"))
            lines.append((LAWS[name], method, f"{min(steps):,.0f}", kls, shown))
    head = ["law", "method", "steps", "KL(law, EBM)", "bias"]
    text = f"""
V={space.vocab_size}, T={space.max_length}, N=2, {seconds:.0f} s of one thread for each method and seed (two runs at a time), batches of {BATCH}. KL in nats is exact.
*Bias* is the mean of R over what a method draws in the place of the EBM's own responses, less the exact E R, in nats, with the
EBM held where it ended (in brackets the half-width of the largest 95% interval over 100 batches, asymptotic); for `nce` the
learned log Z less the exact one.

{table(head, lines)}

`exact` sums over all {space.num_sequences:,} sequences at each step, which is what the others avoid. `gibbs` pays {space.vocab_size} evaluations for each token it
redraws; `metropolis` and `nce` pay for an ARM that is fitted to the same data (by teacher forcing), and `min-max` for one
that chases the EBM.
"""
    publish("sampled_ebm", "The EBM beyond enumeration", text, picture(rows, names), rows, options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
