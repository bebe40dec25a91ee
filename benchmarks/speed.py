"""One table of speed, every figure a ratio of two things measured in the same run.

    python -m benchmarks.speed             # about 4 minutes on 2 cores
    python -m benchmarks.speed --quick     # small sizes: only to see that it works

Writes ``benchmarks/results/speed_DEVICE.md``. Times are medians over repetitions, after a
warm-up, the two sides of a ratio in turn.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

import rl_ebm
from benchmarks.support.machine import describe
from benchmarks.support.runs import FOUR
from rl_ebm.agents import AGENTS
from rl_ebm.envs import make_task
from rl_ebm.policies import MLP, MLPConfig, Transformer, TransformerConfig, log_prob, sample
from rl_ebm.policies.walk import walk
from rl_ebm.training.config import TrainConfig
from rl_ebm.training.loop import Trainer

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda"""
    repeat: int = 7
    """measurements of each figure"""
    quick: bool = False
    """small sizes; writes nothing into the results"""
    compile: bool = True
    """measure torch.compile as well"""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    ours: str
    other: str
    ratio: str


class NoCache:
    """A policy without its cache and its tree pass: decoding evaluates the prefix anew."""

    def __init__(self, policy: Transformer) -> None:
        self.policy, self.prompts = policy, policy.prompts

    def logits(self, tokens: torch.Tensor, prompt_ids: Any = None) -> torch.Tensor:
        return self.policy.logits(tokens, prompt_ids)


class CacheOnly(NoCache):
    """A policy without its tree pass: decoding uses the cache."""

    def start(self, prompt_ids: torch.Tensor) -> Any:
        return self.policy.start(prompt_ids)

    def step(self, state: Any, tokens: torch.Tensor | None) -> torch.Tensor:
        return self.policy.step(state, tokens)


def compare(
    a: Callable[[], object], b: Callable[[], object], options: Options
) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the ratios pair by pair."""
    pairs = []
    for i in range(options.repeat + 1):
        pair = [seconds(f, options.device) for f in (a, b)]
        if i:  # the first pair warms up
            pairs.append(pair)
    left, right = zip(*pairs, strict=True)
    ratio = statistics.median(x / y for x, y in pairs)
    return statistics.median(left), statistics.median(right), ratio


def seconds(f: Callable[[], object], device: str) -> float:
    """Wall time of one call, device work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def solve_rows(options: Options) -> list[Row]:
    """solve against exp().sum() of the same scores."""
    rows = []
    for a, t in ((4, 12), (64, 4)) if not options.quick else ((4, 6), (16, 3)):
        scores = torch.randn(a**t, generator=torch.Generator().manual_seed(0)).to(options.device)
        ebm = rl_ebm.EBM(rl_ebm.TokenSpace(a, t), scores)
        x, y, ratio = compare(
            lambda e=ebm: rl_ebm.solve(e), lambda s=scores: s.exp().sum().item(), options
        )
        rows.append(
            Row(
                f"`solve`, A={a}, T={t}, float32, against `scores.exp().sum()`",
                f"{x * 1e3:.3g} ms",
                f"{y * 1e3:.3g} ms",
                f"{ratio:.2f} x the time",
            )
        )
    return rows


@torch.no_grad()
def sampling_row(options: Options) -> Row:
    """Decoding with the cache against decoding without it."""
    length = 8 if options.quick else 64
    space = rl_ebm.TokenSpace(32, length)
    policy = Transformer(space).to(options.device)
    n = 64 if options.quick else 256
    ids = torch.zeros(n, dtype=torch.int64, device=options.device)
    x, y, ratio = compare(
        lambda: sample(CacheOnly(policy), space, n, prompt_ids=ids),
        lambda: sample(NoCache(policy), space, n, prompt_ids=ids),
        options,
    )
    return Row(
        f"sampling {n} x {length} tokens, with the cache against without",
        f"{n * length / x:,.0f} tokens/s",
        f"{n * length / y:,.0f} tokens/s",
        f"{1 / ratio:.1f} x the speed",
    )


@torch.no_grad()
def verifier_row(options: Options) -> Row:
    """The verifier's walk over the prefixes against scoring every sequence."""
    space = rl_ebm.TokenSpace(4, 4 if options.quick else 8)
    policy = Transformer(space).to(options.device)
    tokens, lengths = space.sequences(device=options.device)

    def score() -> None:
        for part in range(0, len(tokens), 4096):
            log_prob(
                NoCache(policy), space, tokens[part : part + 4096], lengths[part : part + 4096]
            )

    x, y, ratio = compare(lambda: list(walk(policy, space)), score, options)
    states = space.num_states
    return Row(
        f"all {states:,} prefixes (A=4, T={space.max_length}): the verifier's walk against "
        f"scoring all {space.num_sequences:,} sequences",
        f"{states / x:,.0f} prefixes/s",
        f"{states / y:,.0f} prefixes/s",
        f"{1 / ratio:.1f} x the speed",
    )


def training_rows(options: Options) -> list[Row]:
    """Steps of one agent of each kind on the task random, eager and compiled."""
    rows = []
    for name in FOUR:
        steps = {c: stepper(name, AGENTS[name], options, c) for c in (False, True)}
        if not options.compile:
            x = statistics.median(seconds(steps[False], options.device) for _ in range(9))
            rows.append(Row(f"`{name}`, 10 training steps", f"{10 / x:.1f} steps/s", "", ""))
            continue
        for _ in range(3):  # compiles
            steps[True]()
        x, y, ratio = compare(steps[True], steps[False], options)
        rows.append(steps_row(name, "compiled against eager", x, y, ratio))
    return rows


def steps_row(name: str, how: str, x: float, y: float, ratio: float) -> Row:
    """Ten steps of an agent in x seconds, against y."""
    return Row(
        f"`{name}`, 10 training steps, {how}",
        f"{10 / x:.1f} steps/s",
        f"{10 / y:.1f} steps/s",
        f"{1 / ratio:.2f} x the speed",
    )


def thread_rows(options: Options) -> list[Row]:
    """The same steps on one thread and on all."""
    threads = torch.get_num_threads()
    if options.device != "cpu" or threads == 1:
        return []
    rows = []
    for name in FOUR:
        step = stepper(name, AGENTS[name], options, compiled=False)

        def on(count: int, step: Callable[[], None] = step) -> None:
            torch.set_num_threads(count)
            step()

        x, y, ratio = compare(partial(on, 1), partial(on, threads), options)
        rows.append(steps_row(name, f"on one thread against {threads}", x, y, ratio))
    torch.set_num_threads(threads)
    return rows


def stepper(name: str, entry: Any, options: Options, compiled: bool) -> Callable[[], None]:
    """Ten steps of an agent: sample, score, update."""
    ebm = make_task("random").to(options.device)
    torch.manual_seed(0)
    network = TransformerConfig()
    policy = Transformer(ebm.space, network).to(options.device)
    policy.compiled = compiled
    generator = torch.Generator(options.device).manual_seed(0)
    agent = entry.agent(ebm, policy, None, generator, rl_ebm.solve(ebm))

    def ten_steps() -> None:
        for _ in range(10):
            batch = agent.sample()
            agent.update(None if batch is None else ebm.score(batch), 0.5)

    return ten_steps


def small_steps_row(options: Options) -> Row:
    """A whole run's steps of 16 responses of an MLP, against what no step can do without.

    That is the network forward and backward at tokens that are given, and Adam; not drawing the
    responses, nor scoring them, nor anything that is kept of a step.
    """
    count = 20 if options.quick else 300
    ebm = make_task("random").to(options.device)
    entry, steps = AGENTS["vargrad"], TrainConfig(steps=count, log_every=10 * count)
    policies = [MLP(ebm.space, MLPConfig()).to(options.device) for _ in range(2)]
    generator = torch.Generator(options.device).manual_seed(0)
    agent = entry.agent(ebm, policies[0], entry.config(batch_size=16), generator, None)
    trainer = Trainer(ebm, agent, generator, steps, progress=False)
    batch = sample(policies[1], ebm.space, 16, generator)
    adam = torch.optim.Adam(policies[1].parameters(), fused=True)

    def run() -> None:
        trainer.config = replace(steps, steps=trainer.step + count)
        trainer.train()

    def bare() -> None:
        for _ in range(count):
            adam.zero_grad()
            log_prob(policies[1], ebm.space, batch.tokens, batch.lengths).square().mean().backward()
            adam.step()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of steps as small as these two threads make longer ones
    x, y, ratio = compare(run, bare, options)
    torch.set_num_threads(threads)
    return Row(
        "`vargrad`, 16 responses, MLP: a run's steps against forward, backward and Adam alone, "
        "one thread",
        f"{count / x:.0f} steps/s",
        f"{count / y:.0f} steps/s",
        f"{ratio:.2f} x the time",
    )


def main(options: Options) -> None:
    if options.device == "cpu":
        torch.set_num_threads(2)
    rows = []
    for measure in (
        solve_rows,
        sampling_row,
        verifier_row,
        training_rows,
        thread_rows,
        small_steps_row,
    ):
        found = measure(options)
        rows += found if isinstance(found, list) else [found]
        print(rows[-1], file=sys.stderr, flush=True)
    lines = ["| what | ours | the other | ratio |", "|---|---|---|---|"]
    lines += [f"| {r.what} | {r.ours} | {r.other} | {r.ratio} |" for r in rows]
    text = "\n".join(lines) + f"\n\n{describe()}\n"
    print(text)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"speed_{options.device}.md").write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
