"""Steer a small language model: this word, never that one; held against the truth.

    python -m benchmarks.steer            # about 5 minutes on one core
    python -m benchmarks.steer --quick    # small sizes: only to see that it works

A GPT-2 of two layers is fitted to sentences of a small grammar (:mod:`benchmarks.steer.text`).

1. With an n-gram as the reference the EBM is solved exactly, at any vocabulary, and its solution
   teaches the GPT-2. For objectives that see nothing but rewards the GPT-2 is first taught the
   n-gram, so that they start where their reference is; each gets as many tokens from there.
2. With the GPT-2 itself as the reference nothing is exact: policies are certified instead.

Needs the extra ``hf``. Writes ``benchmarks/results/steer.md`` and ``steer.png``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import tyro

import rl_ebm
from benchmarks.steer import text
from benchmarks.steer.models import (
    FORBIDDEN,
    PROMPTS,
    QUICK,
    SCORE,
    WANTED,
    Guided,
    Size,
    Steered,
    language_model,
    make,
    surprise,
)
from benchmarks.steer.report import Look, Run, page, picture
from benchmarks.support.machine import describe
from rl_ebm.agents import AGENTS
from rl_ebm.policies import HuggingFace
from rl_ebm.policies.base import Policy
from rl_ebm.policies.decoding import sample
from rl_ebm.rewards import Automaton
from rl_ebm.statistics.expectations import bounded
from rl_ebm.statistics.interval import Interval
from rl_ebm.training.checkpoint import write_text

RESULTS = Path(__file__).parents[1] / "results"
STAND_IN: dict[str, Any] = {"forbidden_log_weight": -10.0}
METHODS: dict[str, dict[str, Any]] = {
    "on-policy-distillation": {"lr": 1e-2, "divergence": "forward", "on_policy": 0.5},
    "teacher-forcing": {"lr": 3e-3},
    "vargrad": {"lr": 1e-3, **STAND_IN},
    "policy-gradient": {"lr": 1e-3, **STAND_IN},
}
"""the first two learn from the exact solution, the others from rewards alone"""
LORA_RATE = 5e-3


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    seeds: int = 3
    """runs of each method, from the same policy"""
    threads: int = 1
    """processor cores"""
    quick: bool = False
    """small sizes; writes nothing into the results"""


def taught(judge: HuggingFace, task: Steered, size: Size) -> HuggingFace:
    """The GPT-2 after lessons from the n-gram, without any reward: where a method starts."""
    ebm = rl_ebm.EBM(task.space, Automaton.contains(task.space, [1], 0.0), 1.0, task.ngram, PROMPTS)
    policy, agent = copy.deepcopy(judge), AGENTS["on-policy-distillation"]
    config = agent.config(size.batch_size, **METHODS["on-policy-distillation"] | {"on_policy": 0.0})
    generator = torch.Generator().manual_seed(0)
    for _ in learn(agent.agent(ebm, policy, config, generator, task.ngram), ebm, size.taught):
        pass
    return policy


def learn(agent: Any, ebm: rl_ebm.EBM, budget: int) -> Iterator[tuple[int, float]]:
    """Train until so many tokens are read, as ``rl_ebm.train`` does by steps or seconds.

    Yields:
        Tokens so far, and processor seconds in training, after every step.
    """
    tokens, seconds = 0, 0.0
    while tokens < budget:
        start = time.process_time()
        batch = ebm.score(agent.sample())
        agent.update(batch, tokens / budget)
        seconds += time.process_time() - start
        tokens += int(batch.lengths.sum())
        yield tokens, seconds


@dataclass(frozen=True)
class Observer:
    """Looks at policies."""

    task: Steered
    size: Size
    solution: Any
    judge: HuggingFace

    def look(self, name: str, policy: Policy) -> Look:
        """Everything that is reported of one policy, with intervals."""
        task, n = self.task, self.size.samples
        g = torch.Generator().manual_seed(1)
        report = rl_ebm.verify(policy, self.solution, samples=n, generator=g)
        batch = sample(policy, task.space, n, g, torch.zeros(n).long())
        wanted, forbidden = (bounded(x, 1.0, 0.95) for x in task.shares(batch))
        return Look(
            name=name,
            kl=report.kl_target_policy,
            reverse=report.kl_policy_target,
            tv=report.tv,
            wanted=wanted,
            forbidden=forbidden,
            surprise=surprise(self.judge, task, batch),
            depths=[depth.mean_kl for depth in report.per_depth],
            texts=text.decode(task.tokenizer, batch.take(torch.arange(6))),
        )

    def run(self, name: str, seed: int, start: HuggingFace, title: str) -> tuple[Run, Look]:
        """One method from a policy on."""
        policy, size, ebm = copy.deepcopy(start), self.size, self.solution.ebm
        config = AGENTS[name].config(batch_size=size.batch_size, **METHODS[name])
        generator = torch.Generator().manual_seed(seed)
        agent = AGENTS[name].agent(ebm, policy, config, generator, self.solution)
        marks = [mark * size.tokens for mark in size.marks] if seed == 0 else []
        curve: list[tuple[int, Interval]] = []
        tokens, seconds = 0, 0.0
        for done in learn(agent, ebm, size.tokens):
            tokens, seconds = done
            if marks and tokens >= marks[0]:
                g = torch.Generator().manual_seed(2)
                report = rl_ebm.verify(policy, self.solution, samples=size.glance, generator=g)
                curve.append((tokens, report.kl_target_policy))
                marks.pop(0)
        found = self.look(title, policy)
        curve.append((tokens, found.kl))
        print(f"{title}, seed {seed}, {seconds:.0f} s: {found.kl} {found.wanted}", flush=True)
        return Run(name, seed, seconds, curve), found


def neural(
    judge: HuggingFace, solution: Any, task: Steered, size: Size
) -> Iterator[tuple[str, Any, list[str]]]:
    """The GPT-2 as the reference: certificates of four policies, and texts of each."""
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=8, fan_in_fan_out=True
    )
    torch.manual_seed(0)
    policy = HuggingFace(peft.get_peft_model(copy.deepcopy(judge.model), lora), task.space, PROMPTS)
    ebm = rl_ebm.EBM(task.space, task.reward, 1.0, policy.reference(), PROMPTS)
    policies: list[tuple[str, Any]] = [
        ("the GPT-2 itself, the reference", judge),
        ("the n-gram's exact solution", solution),
        (
            "the GPT-2 with the n-gram's exact values, untrained",
            Guided(judge, solution, task.ngram),
        ),
    ]
    config = METHODS["vargrad"] | {"lr": LORA_RATE}
    options = AGENTS["vargrad"].config(batch_size=size.batch_size, **config)
    rl_ebm.train(
        ebm, "vargrad", policy=policy, options=options, steps=size.neural_steps, progress=False
    )
    policies.append((f"LoRA, `vargrad`, {size.neural_steps} steps", policy))
    for name, one in policies:
        g = torch.Generator().manual_seed(3)
        found = rl_ebm.certify(one, ebm, samples=size.certified, reward_max=SCORE, generator=g)
        batch = sample(one, task.space, 8, g, torch.zeros(8).long())
        print(f"{name}\n{found}", flush=True)
        yield name, found, text.decode(task.tokenizer, batch)


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else Size()
    began = time.process_time()
    task = make(size)
    judge = language_model(task, size)
    ebm = rl_ebm.EBM(task.space, task.reward, 1.0, task.ngram, PROMPTS)
    solution = rl_ebm.solve(ebm)
    fits = {
        "GPT-2": surprise(judge, task, task.held_out),
        "n-gram": surprise(task.ngram, task, task.held_out),
    }
    print(f"{time.process_time() - began:.0f} s, nats per held-out token: {fits}", flush=True)
    observer = Observer(task, size, solution, judge)
    start = taught(judge, task, size)
    looks = {
        "target": observer.look("exact solution, the target", solution),
        "ngram": observer.look("n-gram, the reference", task.ngram),
        "before": observer.look("GPT-2 before", judge),
        "after": observer.run("on-policy-distillation", 0, judge, "GPT-2 distilled")[1],
        "start": observer.look("GPT-2 taught the n-gram", start),
    }
    found = [
        observer.run(name, seed, start, f"`{name}`")
        for name in METHODS
        for seed in range(options.seeds)
    ]
    certificates = list(neural(judge, solution, task, size))
    facts = asdict(size) | {
        "wanted": WANTED,
        "forbidden": FORBIDDEN,
        "score": SCORE,
        "lora_rate": LORA_RATE,
        "vocab_size": task.space.vocab_size,
        "states": solution.values.machine.num_states,
        "log_z": float(solution.log_z),
        "minutes": (time.process_time() - began) / 60,
        "rates": ", ".join(f"`{name}` {o['lr']:g}" for name, o in METHODS.items()),
    }
    text = page(facts, fits, looks, found, certificates) + f"\n{describe()}\n"
    print(text)
    if options.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / "steer.md", text)
    picture(looks, found).savefig(RESULTS / "steer.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
