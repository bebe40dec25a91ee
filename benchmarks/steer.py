"""Steer a small language model: this word, never that one, fluent otherwise; held against the truth.

    python -m benchmarks.steer            # about 15 minutes on one core
    python -m benchmarks.steer --quick    # small sizes: only to see that it works

A GPT-2 of two layers is fitted to sentences of a small grammar (:mod:`benchmarks.steer_text`).

1. With an n-gram as the reference the EBM is solved exactly, at any vocabulary. The exact solution
   teaches the GPT-2, and objectives that see nothing but rewards get as many tokens.
2. With the GPT-2 itself as the reference nothing is exact: policies are certified instead.

Needs the extra ``hf``. Writes ``benchmarks/results/steer.md`` and ``steer.png``.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import tyro
from tokenizers import Tokenizer
from torch import Tensor

import rl_ebm
from benchmarks import steer_text
from benchmarks.machine import describe
from benchmarks.steer_report import Look, Run, page, picture
from rl_ebm.agents import AGENTS
from rl_ebm.agents.imitation import teacher_forcing_loss
from rl_ebm.agents.learner import Learner
from rl_ebm.checkpoint import write_text
from rl_ebm.policies import AutomatonPolicy, HuggingFace, fit_ngram
from rl_ebm.policies.scoring import Policy, log_prob, q_values, sample
from rl_ebm.rewards import Automaton
from rl_ebm.tokens import Batch
from rl_ebm.verify_sampled import bounded, ratio_interval

RESULTS = Path(__file__).parent / "results"
WANTED, FORBIDDEN = "candle", "river"
SCORE = 8.0  # nats at beta = 1
PROMPTS = [[0]]  # EOS: what stands before every sentence
STAND_IN: dict[str, Any] = {"forbidden_log_weight": -10.0}
METHODS: dict[str, dict[str, Any]] = {
    "on-policy-distillation": {"lr": 3e-3, "divergence": "forward", "on_policy": 0.5},
    "teacher-forcing": {"lr": 3e-3},
    "vargrad": {"lr": 1e-3, **STAND_IN},
    "policy-gradient": {"lr": 1e-3, **STAND_IN},
}
"""the first two learn from the exact solution, the others from rewards alone"""


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    seeds: int = 3
    """runs of each method, from the same language model"""
    quick: bool = False
    """small sizes; writes nothing into the results"""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    sentences: int = 40_000
    held_out: int = 1_000
    vocab_size: int = 1_280
    max_length: int = 16
    width: int = 64
    fit_steps: int = 1_000
    """of 64 sentences"""
    batch_size: int = 64
    """responses in a step of a method"""
    tokens: int = 120_000
    """that each method learns from"""
    marks: tuple[float, ...] = (0.0, 0.05, 0.15, 0.4)
    """shares of them after which it is looked at"""
    glance: int = 150
    """samples for that"""
    samples: int = 2_000
    """at the end"""
    neural_steps: int = 150
    certified: int = 4_000


QUICK = Size(2_000, 100, 300, 8, 32, 20, 32, 600, (0.0, 0.5), 20, 60, 2, 60)


@dataclass(frozen=True)
class Steered:
    """What is steered, and where to."""

    space: rl_ebm.TokenSpace
    tokenizer: Tokenizer
    data: Batch
    held_out: Batch
    reward: Automaton
    ngram: AutomatonPolicy

    def shares(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which texts have a word that begins with the wanted, and with the forbidden one."""
        texts = steer_text.decode(self.tokenizer, batch)
        found = [[f" {word}" in f" {text}" for text in texts] for word in (WANTED, FORBIDDEN)]
        wanted, forbidden = torch.tensor(found).double()
        return wanted, forbidden


def make(size: Size) -> Steered:
    """Sentences, tokens, the reward and the n-gram."""
    texts = steer_text.sentences(size.sentences)
    tokenizer = steer_text.train_tokenizer(texts, size.vocab_size)
    space = rl_ebm.TokenSpace(tokenizer.get_vocab_size(), size.max_length, eos_id=0)
    batch = steer_text.encode(tokenizer, texts, space)
    rows = torch.arange(len(batch))
    held_out, data = batch.take(rows[: size.held_out]), batch.take(rows[size.held_out :])
    reward = Automaton.contains(space, tokenizer.encode(WANTED).ids, SCORE)
    for word in (FORBIDDEN, steer_text.plural(FORBIDDEN)):
        reward += Automaton.avoids(space, tokenizer.encode(word).ids)
    # Smoothing far below 1: of 1,280 tokens few can follow another.
    ngram = fit_ngram(space, data, order=2, smoothing=0.01, prompts=PROMPTS)
    return Steered(space, tokenizer, data, held_out, reward, ngram)


def language_model(task: Steered, size: Size) -> HuggingFace:
    """A GPT-2 with random weights, fitted to the sentences by their likelihood."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=task.space.vocab_size,
        n_positions=size.max_length,
        n_embd=size.width,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    policy = HuggingFace(transformers.GPT2LMHeadModel(config), task.space, PROMPTS)
    learner, generator = Learner(policy, 5e-3, 1.0), torch.Generator().manual_seed(0)
    for step in range(size.fit_steps):
        batch = task.data.take(torch.randint(len(task.data), (64,), generator=generator))
        q = q_values(policy, task.space, batch.tokens, batch.prompt_ids)
        loss = teacher_forcing_loss(q, batch.tokens, batch.lengths)
        learner.descend(loss, step / size.fit_steps)
    return policy


def surprise(judge: Policy, task: Steered, batch: Batch) -> rl_ebm.estimates.Interval:
    """Nats per token of some responses under a language model."""
    with torch.no_grad():
        nats = -log_prob(judge, task.space, batch.tokens, batch.lengths, batch.prompt_ids).double()
    return ratio_interval(nats, batch.lengths.double(), 0.95)


def look(
    name: str, policy: Policy, solution: Any, judge: Policy, task: Steered, size: Size
) -> Look:
    """Everything that is reported of one policy, with intervals."""
    g = torch.Generator().manual_seed(1)
    report = rl_ebm.verify(policy, solution, samples=size.samples, generator=g)
    batch = sample(policy, task.space, size.samples, g, torch.zeros(size.samples).long())
    wanted, forbidden = (bounded(x, 1.0, 0.95) for x in task.shares(batch))
    return Look(
        name=name,
        kl=report.kl_target_policy,
        reverse=report.kl_policy_target,
        tv=report.tv,
        wanted=wanted,
        forbidden=forbidden,
        surprise=surprise(judge, task, batch),
        depths=[depth.mean_kl for depth in report.per_depth],
        texts=steer_text.decode(task.tokenizer, batch.take(torch.arange(8))),
    )


def run(
    name: str, seed: int, judge: HuggingFace, solution: Any, task: Steered, size: Size
) -> tuple[Run, Look]:
    """One method from the language model on: as ``rl_ebm.train`` does, but by tokens."""
    policy = copy.deepcopy(judge)
    config = AGENTS[name].config(batch_size=size.batch_size, **METHODS[name])
    generator = torch.Generator().manual_seed(seed)
    agent = AGENTS[name].agent(solution.ebm, policy, config, generator, solution)
    marks = [mark * size.tokens for mark in size.marks]
    curve, tokens, seconds = [], 0, 0.0
    while tokens < size.tokens:
        if marks and tokens >= marks[0]:
            g = torch.Generator().manual_seed(2)
            report = rl_ebm.verify(policy, solution, samples=size.glance, generator=g)
            curve.append((tokens, report.kl_target_policy.estimate))
            marks.pop(0)
        start = time.perf_counter()
        batch = solution.ebm.score(agent.sample())
        agent.update(batch, tokens / size.tokens)
        seconds += time.perf_counter() - start
        tokens += int(batch.lengths.sum())
    found = look(f"`{name}`", policy, solution, judge, task, size)
    curve.append((tokens, found.kl.estimate))
    print(f"{name}, seed {seed}, {seconds:.0f} s: KL(target, policy) {found.kl}", flush=True)
    return Run(name, seed, tokens, seconds, curve), found


class Guided:
    """A language model's logits plus the values of an EBM with another reference.

    What q* adds to log p_ref is log E_ref[exp(R) | s, a]; here it is added to another model than
    the one it was computed for, as Zhang et al. 2024 (arXiv 2406.13892) do. Nothing is trained.
    """

    def __init__(self, model: HuggingFace, solution: Any, ngram: AutomatonPolicy) -> None:
        self.parts = (model, solution, ngram)
        self.space, self.prompts = model.space, model.prompts

    def logits(self, tokens: Tensor, prompt_ids: Tensor | None = None) -> Tensor:
        """All positions at once."""
        return self.combine(*(part.logits(tokens, prompt_ids) for part in self.parts))

    def start(self, prompt_ids: Tensor) -> list[Any]:
        """Decoding states of the three."""
        return [part.start(prompt_ids) for part in self.parts]

    @torch.no_grad()
    def step(self, state: list[Any], tokens: Tensor | None) -> Tensor:
        """The next position, by the caches of the three."""
        steps = zip(self.parts, state, strict=True)
        return self.combine(*(part.step(one, tokens) for part, one in steps))

    @staticmethod
    def combine(model: Tensor, q: Tensor, log_ref: Tensor) -> Tensor:
        """Logits of the model, moved by q* - log p_ref; ``-inf`` where q* is."""
        dead = torch.isneginf(q)
        added = q.masked_fill(dead, 0.0) - log_ref.masked_fill(dead, 0.0)
        return (model.double() + added).masked_fill(dead, -math.inf)


def neural(
    judge: HuggingFace, solution: Any, task: Steered, size: Size
) -> Iterator[tuple[str, Any, list[str]]]:
    """The GPT-2 as the reference: certificates of four policies, and texts of each."""
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=8, fan_in_fan_out=True
    )
    torch.manual_seed(0)
    policy = HuggingFace(
        peft.get_peft_model(copy.deepcopy(judge.model), lora), task.space, PROMPTS
    )
    ebm = rl_ebm.EBM(task.space, task.reward, 1.0, policy.reference(), PROMPTS)
    policies: list[tuple[str, Any]] = [
        ("the GPT-2 itself, the reference", judge),
        ("the n-gram's exact solution", solution),
        ("the GPT-2 with the n-gram's exact values, untrained", Guided(judge, solution, task.ngram)),
    ]
    options = AGENTS["vargrad"].config(batch_size=size.batch_size, **METHODS["vargrad"])
    rl_ebm.train(
        ebm, "vargrad", policy=policy, options=options, steps=size.neural_steps, progress=False
    )
    policies.append((f"LoRA, `vargrad`, {size.neural_steps} steps", policy))
    for name, one in policies:
        g = torch.Generator().manual_seed(3)
        found = rl_ebm.certify(one, ebm, samples=size.certified, reward_max=SCORE, generator=g)
        batch = sample(one, task.space, 8, g, torch.zeros(8).long())
        print(f"{name}\n{found}", flush=True)
        yield name, found, steer_text.decode(task.tokenizer, batch)


def main(options: Options) -> None:
    transformers.utils.logging.disable_progress_bar()
    size = QUICK if options.quick else Size()
    began = time.perf_counter()
    task = make(size)
    judge = language_model(task, size)
    ebm = rl_ebm.EBM(task.space, task.reward, 1.0, task.ngram, PROMPTS)
    solution = rl_ebm.solve(ebm)
    fits = {
        "GPT-2": surprise(judge, task, task.held_out),
        "n-gram": surprise(task.ngram, task, task.held_out),
    }
    print(f"{time.perf_counter() - began:.0f} s, nats per held-out token: {fits}", flush=True)
    policies = {
        "exact solution, the target": solution,
        "n-gram, the reference": task.ngram,
        "GPT-2 before": judge,
    }
    looks = [look(name, one, solution, judge, task, size) for name, one in policies.items()]
    runs, ends = [], []
    for name in METHODS:
        for seed in range(options.seeds):
            one, found = run(name, seed, judge, solution, task, size)
            runs.append(one)
            ends.append(found)
    certificates = list(neural(judge, solution, task, size))
    facts = asdict(size) | {
        "wanted": WANTED,
        "forbidden": FORBIDDEN,
        "score": SCORE,
        "vocab_size": task.space.vocab_size,
        "states": solution.values.machine.num_states,
        "log_z": float(solution.log_z),
        "minutes": (time.perf_counter() - began) / 60,
        "rates": ", ".join(f"`{name}` {o['lr']:g}" for name, o in METHODS.items()),
    }
    text = page(facts, fits, looks, runs, ends, certificates) + f"\n{describe()}\n"
    print(text)
    if options.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / "steer.md", text)
    picture(looks, runs, ends).savefig(RESULTS / "steer.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
