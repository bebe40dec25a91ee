"""A policy at the size of a language model, verified along samples, beside what is exactly true.

    python -m benchmarks.readme.large             # about 20 minutes
    python -m benchmarks.readme.large --quick     # small sizes: only to see that it works

The target pays for a phrase, over a hidden Markov reference with 448 states in the product; the
policy is the EBM of another pay. Given that the phrase occurs, or that it does not, both have the
same law: what is between them is between two coins, of chances that two numbers log Z give.
Verification knows nothing of that. Writes ``benchmarks/results/large.md``
and the whole report, ``large_report.txt``.
"""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

import rl_ebm
from benchmarks.readme.scale import hidden_reference
from benchmarks.support.machine import describe
from rl_ebm.policies import AutomatonPolicy
from rl_ebm.rewards import Automaton
from rl_ebm.training.checkpoint import write_text
from rl_ebm.verification.sampled_report import SampledReport

RESULTS = Path(__file__).parents[1] / "results"
PHRASE, FORBIDDEN = [5, 17, 17, 9], [7, 8]
FIGURES = ("kl_target_policy", "kl_policy_target", "tv", "js")
HIGH = 80.0
"""a pay at which nearly every response has the phrase"""


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    vocab_size: int = 50_257
    """A, EOS included"""
    max_length: int = 128
    """T"""
    hidden: int = 64
    """states of the reference"""
    samples: int = 1000
    """of target and policy each"""
    confidence: float = 0.95
    """of every interval by itself"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda"""
    threads: int = 2
    """processor cores"""
    seed: int = 0
    """of the reference and the samples"""
    repeats: int = 300
    """verifications of a small EBM of the kind, to count how often its intervals miss"""
    quick: bool = False
    """small sizes; writes nothing into the results"""


@dataclass(frozen=True)
class Truth:
    """What two coins say: the chance of the phrase under target and policy."""

    target: float
    policy: float

    @property
    def tv(self) -> float:
        return abs(self.target - self.policy)

    @property
    def kl_target_policy(self) -> float:
        return coin_kl(self.target, self.policy)

    @property
    def kl_policy_target(self) -> float:
        return coin_kl(self.policy, self.target)

    @property
    def js(self) -> float:
        middle = (self.target + self.policy) / 2
        return (coin_kl(self.target, middle) + coin_kl(self.policy, middle)) / 2


def coin_kl(p: float, q: float) -> float:
    """KL between two coins, nats; both in (0, 1)."""
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def target(space: rl_ebm.TokenSpace, reference: AutomatonPolicy, pay: float | None) -> rl_ebm.EBM:
    """A phrase that pays, or where None never occurs, and another that never occurs."""
    wanted = (
        Automaton.avoids(space, PHRASE) if pay is None else Automaton.contains(space, PHRASE, pay)
    )
    return rl_ebm.EBM(space, wanted + Automaton.avoids(space, FORBIDDEN), 1.0, reference)


def balance(without: float, with_pay: float, pay: float) -> float:
    """The pay at which the phrase occurs every other time: Z(pay) = Z_without + exp(pay) Z_with.

    Args:
        without: log Z_without.
        with_pay: log Z(pay), well above it.
    """
    log_with = with_pay + math.log(-math.expm1(without - with_pay)) - pay
    return without - log_with


@dataclass(frozen=True)
class Found:
    """What was measured: seconds, and bytes beyond what the imports take."""

    solve: float
    verify: float
    memory: int
    states: int
    truth: Truth
    report: SampledReport


def measure(options: Options) -> Found:
    """Solve target and policy, and verify."""
    torch.set_num_threads(options.threads)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    space = rl_ebm.TokenSpace(options.vocab_size, options.max_length, eos_id=0)
    reference = hidden_reference(space, options.hidden, options.seed)

    def solved(pay: float | None) -> rl_ebm.AutomatonSolution:
        found = rl_ebm.solve(target(space, reference, pay).to(options.device))
        assert isinstance(found, rl_ebm.AutomatonSolution)
        return found

    even = balance(float(solved(None).log_z), float(solved(HIGH).log_z), HIGH)
    start = time.perf_counter()
    solution = solved(even + 1.0)
    seconds = time.perf_counter() - start
    policy = solved(even)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    start = time.perf_counter()
    report = rl_ebm.verify(
        policy,
        solution,
        samples=options.samples,
        confidence=options.confidence,
        generator=generator,
    )
    assert isinstance(report, SampledReport)
    machine = solution.values.machine
    return Found(
        solve=seconds,
        verify=time.perf_counter() - start,
        memory=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024
        if options.device == "cpu"
        else torch.cuda.max_memory_allocated(),
        states=machine.num_states * machine.num_hidden,
        truth=Truth(1 / (1 + math.exp(-1.0)), 0.5),
        report=report,
    )


def coverage(options: Options) -> str:
    """How often the intervals of a small EBM of this kind do not hold the truth, in a sentence."""
    missed = dict.fromkeys(FIGURES, 0)
    small = replace(options, vocab_size=30, max_length=12, hidden=3, samples=200)
    for seed in range(options.repeats):
        found = measure(replace(small, seed=seed))
        for name in FIGURES:
            interval = getattr(found.report, name)
            missed[name] += not interval.low <= getattr(found.truth, name) <= interval.high
    counts = ", ".join(f"`{name}` {count}" for name, count in missed.items())
    return (
        f"With A = {small.vocab_size}, T = {small.max_length}, {small.hidden} hidden states and "
        f"{small.samples} samples, in {options.repeats} verifications of as many references, the "
        f"{100 * options.confidence:g}% interval did not hold the truth: {counts} times."
    )


def text_of(found: Found, options: Options) -> str:
    """Markdown: what is true beside its interval."""
    report, truth = found.report, found.truth
    lines = [
        f"A = {options.vocab_size:,}, T = {options.max_length}, {found.states:,} states: solved in "
        f"{found.solve:.2g} s; {report.num_samples:,} sequences of the target and as many of the "
        f"policy verified in {found.verify:.0f} s; {found.memory / 1e9:.2g} GB.",
        "",
        "| figure | exactly | estimate | interval | its kind |",
        "|---|---|---|---|---|",
    ]
    for name in FIGURES:
        x = getattr(report, name)
        lines.append(
            f"| `{name}` | {getattr(truth, name):.4f} | {x.estimate:.4f} | "
            f"[{x.low:.4f}, {x.high:.4f}] | {100 * x.confidence:g}%, {x.kind} |"
        )
    return "\n".join(lines) + "\n"


def main(options: Options) -> None:
    if options.quick:
        options = replace(options, vocab_size=300, max_length=12, hidden=4, samples=20, repeats=2)
    found = measure(options)
    text = f"{text_of(found, options)}\n{coverage(options)}\n\n{describe()}\n"
    print(text, found.report, sep="\n")
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        write_text(RESULTS / "large.md", text)
        write_text(RESULTS / "large_report.txt", f"{found.report}\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
