"""What :mod:`benchmarks.steer` steers: sentences, a reward, an n-gram, a GPT-2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.steer import text
from rl_ebm.agents.shared.imitation import teacher_forcing_loss
from rl_ebm.agents.shared.learner import Learner
from rl_ebm.policies import AutomatonPolicy, HuggingFace, fit_ngram
from rl_ebm.policies.base import Policy
from rl_ebm.policies.scoring import log_prob, q_values
from rl_ebm.rewards import Automaton
from rl_ebm.statistics.expectations import ratio_interval
from rl_ebm.statistics.interval import Interval
from rl_ebm.tokens import Batch, TokenSpace

WANTED, FORBIDDEN = "letter", "river"
SCORE = 6.5  # nats at beta = 1
PROMPTS = [[0]]  # EOS: what stands before every sentence


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    sentences: int = 40_000
    held_out: int = 1_000
    vocab_size: int = 1_280
    max_length: int = 16
    width: int = 64
    fit_steps: int = 600
    """of 64 sentences"""
    batch_size: int = 64
    """responses in a step of a method"""
    taught: int = 60_000
    """tokens from which the GPT-2 is taught the n-gram"""
    tokens: int = 30_000
    """that each method learns from"""
    marks: tuple[float, ...] = (0.1, 0.4)
    """shares of them after which the first seed is looked at"""
    glance: int = 150
    """samples for that"""
    samples: int = 500
    """at the end"""
    neural_steps: int = 100
    certified: int = 2_000


QUICK = Size(2_000, 100, 300, 8, 32, 10, 32, 400, 400, (0.5,), 20, 50, 2, 50)


@dataclass(frozen=True)
class Steered:
    """What is steered, and where to."""

    space: TokenSpace
    tokenizer: Tokenizer
    data: Batch
    held_out: Batch
    reward: Automaton
    ngram: AutomatonPolicy

    def shares(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which texts have a word that begins with the wanted, and with the forbidden one."""
        texts = text.decode(self.tokenizer, batch)
        found = [[f" {word}" in f" {text}" for text in texts] for word in (WANTED, FORBIDDEN)]
        wanted, forbidden = torch.tensor(found).double()
        return wanted, forbidden


def make(size: Size) -> Steered:
    """Sentences, tokens, the reward and the n-gram."""
    texts = text.sentences(size.sentences)
    tokenizer = text.train_tokenizer(texts, size.vocab_size)
    space = TokenSpace(tokenizer.get_vocab_size(), size.max_length, eos_id=0)
    batch = text.encode(tokenizer, texts, space)
    rows = torch.arange(len(batch))
    held_out, data = batch.take(rows[: size.held_out]), batch.take(rows[size.held_out :])
    reward = Automaton.contains(space, tokenizer.encode(WANTED).ids, SCORE)
    for word in (FORBIDDEN, text.plural(FORBIDDEN)):
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


def surprise(judge: Policy, task: Steered, batch: Batch) -> Interval:
    """Nats per token of some responses under a language model."""
    with torch.no_grad():
        nats = -log_prob(judge, task.space, batch.tokens, batch.lengths, batch.prompt_ids).double()
    return ratio_interval(nats, batch.lengths.double(), 0.95)


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
