"""Small EBMs for the tests of agents, their truth by enumeration, and gradients by Python loops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import brute_force
import torch
from brute_force import EnumeratedEBM, log_softmax
from toy_policies import logits_by_prefix, responses, scores_of, seeded

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.policies import Tabular, Transformer, TransformerConfig
from rl_ebm.tokens import Batch

# Ids that no response has come first: a prompt is not another one with a response begun.
PROMPTS = [[], [5, 0, 6], [7]]
NETWORK = TransformerConfig(layers=2, heads=2, dim=32, hidden=64)

# (vocab_size, max_length, eos_id), prompts, whether there is a reference
KINDS = [
    ((3, 3, None), None, False),
    ((3, 3, 1), None, True),
    ((2, 3, None), PROMPTS, True),
    ((3, 3, 0), PROMPTS, False),
]
WIDE = {"max_grad_norm": 1e12}  # no clipping
KIND_IDS = ["fixed", "eos-reference", "fixed-prompts-reference", "eos-prompts"]


@dataclass
class Case:
    """An EBM, and the same one for each prompt as Python loops see it."""

    ebm: rl_ebm.EBM
    truth: list[EnumeratedEBM]

    @property
    def space(self):
        return self.ebm.space

    def table(self, seed=0, dtype=torch.float64):
        """A tabular policy with large random logits: zeros would hide a forgotten terminal."""
        prompts = self.ebm.prompts
        return Tabular(self.space, prompts, scale=1.0, generator=seeded(seed + 50), dtype=dtype)

    def star(self):
        """The tabular policy whose raw logits are q*, by brute force."""
        per_prompt = [t.q_tables() for t in self.truth]
        q = [torch.stack(tables) for tables in zip(*per_prompt, strict=True)]
        return Tabular.from_tables(q, self.space, self.ebm.prompts, logits_are_values=True)

    def network(self, seed=0):
        torch.manual_seed(seed)
        return Transformer(self.space, NETWORK, self.ebm.prompts)

    def star_log_probs(self):
        """log p* of every response to every prompt, (P, N)."""
        return torch.tensor([t.log_probs for t in self.truth], dtype=torch.float64)

    def kl(self, policy):
        """KL(p*, pi), mean over prompts."""
        return self._mean_kl(policy, lambda star, pi: brute_force.kl(star, pi))

    def reverse_kl(self, policy):
        """KL(pi, p*), mean over prompts."""
        return self._mean_kl(policy, lambda star, pi: brute_force.kl(pi, star))

    def _mean_kl(self, policy, kl):
        found = log_probs(policy, self.space, len(self.truth))
        terms = [kl(t.log_probs, pi) for t, pi in zip(self.truth, found, strict=True)]
        return math.fsum(terms) / len(terms)

    def log_z(self):
        """log Z, mean over prompts."""
        return math.fsum(t.log_z for t in self.truth) / len(self.truth)

    def batch(self, rows=None, pad=0):
        """Scored responses: ``rows`` are (prompt, place in the enumeration); None for all."""
        if rows is None:
            n = len(responses(self.space))
            rows = [(p, k) for p in range(len(self.truth)) for k in range(n)]
        tokens, lengths = brute_force.padded(
            [responses(self.space)[k] for _, k in rows], self.space.max_length, pad
        )
        ids = torch.tensor([p for p, _ in rows])
        return self.ebm.score(Batch(tokens, lengths, ids))


def case(kind, beta=0.7, seed=0, scores=None, reference=None, floor=-math.inf):
    """The EBM of one of KINDS; ``floor`` replaces -inf among the immediate weights of the truth."""
    shape, prompts, with_reference = kind
    space = rl_ebm.TokenSpace(*shape)
    count = None if prompts is None else len(prompts)
    scores = scores_of(space, count, seed=seed) if scores is None else scores
    if with_reference and reference is None:
        reference = Tabular(space, prompts, 0.7, seeded(seed + 1), torch.float64)
    ebm = rl_ebm.EBM(space, scores, beta, reference, prompts)
    per_prompt = scores[None] if scores.ndim == 1 else scores
    log_ref = {}
    if reference is not None:
        rows = logits_by_prefix(reference, space, count or 1)
        log_ref = {state: log_softmax(row) for state, row in rows.items()}
    truth = [
        EnumeratedEBM(weights(space, row.tolist(), beta, log_ref, p, floor), space.eos_id)
        for p, row in enumerate(per_prompt)
    ]
    return Case(ebm, truth)


def weights(space, scores, beta, log_ref, prompt, floor):
    """Per-depth tables of r: log p_ref of each token, R / beta on the last."""
    score, tables = dict(zip(responses(space), scores, strict=True)), []
    for t in range(space.max_length):
        rows = []
        for s in brute_force.prefixes(space.vocab_size, t, space.eos_id):
            row = list(log_ref.get((prompt, s), [0.0] * space.vocab_size))
            for a in range(space.vocab_size):
                forced = space.eos_id not in (None, a) and t == space.max_length - 1
                row[a] += score.get((*s, a), 0.0) / beta
                row[a] = -math.inf if forced else floor if row[a] == -math.inf else row[a]
            rows.append(row)
        tables.append(torch.tensor(rows, dtype=torch.float64))
    return tables


def states(space):
    """All states in the order of a table's rows."""
    return [
        s
        for t in range(space.max_length)
        for s in brute_force.prefixes(space.vocab_size, t, space.eos_id)
    ]


def log_probs(policy, space, num_prompts=1):
    """log pi of every response, for each prompt, by the chain rule in Python."""
    rows = {s: log_softmax(row) for s, row in logits_by_prefix(policy, space, num_prompts).items()}
    return [
        [math.fsum(rows[p, y[:t]][a] for t, a in enumerate(y)) for y in responses(space)]
        for p in range(num_prompts)
    ]


def differentiable_log_probs(table, space):
    """log pi of every response to every prompt, (P, N), from a table of logits with gradient."""
    counts = [
        len(brute_force.prefixes(space.vocab_size, t, space.eos_id))
        for t in range(space.max_length)
    ]
    parts = list(table.split(counts, dim=1))
    if space.eos_id is not None:
        off = torch.arange(space.vocab_size) != space.eos_id
        parts[-1] = parts[-1].masked_fill(off, -math.inf)
    return brute_force.sequence_log_probs([p.log_softmax(-1) for p in parts], space.eos_id)


def kl_of(log_p, log_q):
    """KL of rows, mean over them, with gradient; places with p = 0 do not count."""
    real = ~torch.isneginf(log_p)
    p, q = log_p.masked_fill(~real, 0.0), log_q.masked_fill(~real, 0.0)
    return (p.exp() * (p - q)).masked_fill(~real, 0.0).sum(-1).mean()


def gradient(agent, batch):
    """The gradient that one update of an agent with a table descends; the table is put back."""
    table = agent.policy.table
    before = table.detach().clone()
    agent.update(batch)
    found = table.grad.clone()
    with torch.no_grad():
        table.copy_(before)
    return found


def make(name, problem, policy=None, generator=None, **options):
    """An agent of a case by its name, by default with a table of its own that starts at random."""
    entry = AGENTS[name]
    teacher = problem.star() if entry.needs_teacher else None
    policy = problem.table() if policy is None else policy
    generator = seeded() if generator is None else generator
    return entry.agent(problem.ebm, policy, entry.config(**options), generator, teacher)


def unclipped(name, problem, policy=None, **options):
    """The same whose gradient is that of its loss, however large."""
    return make(name, problem, policy, **WIDE, **options)


def train(agent, ebm, steps):
    """What the training loop does, without its files."""
    for step in range(steps):
        batch = agent.sample()
        metrics = agent.update(None if batch is None else ebm.score(batch), progress=step / steps)
        assert torch.isfinite(metrics["losses/loss"])
    return agent.policy
