"""Training with somebody's loss on sampled batches, several runs at once, and where it ends.

A run is a :class:`rl_ebm.policies.Tabular`, and the runs are its prompts, so that one call of the
library's sampler draws the batches of all; the loss is mapped over them. Half of the runs have half
the rate: what that moves is what steps of a length leave of a bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.support.random_losses import Drawn, combined
from rl_ebm import solve
from rl_ebm.policies import Tabular, sample, tree_q_values
from rl_ebm.statistics.interval import student_quantile
from rl_ebm.tokens import Batch

FORBIDDEN = -1e4
"""logit of what the reference forbids, as a loss is given it"""
FINITE = 3e-3
"""of every statistic, in its scale: what a batch of hundreds adds to a limit of endless ones"""
CONFIDENCE = 0.999


@dataclass(frozen=True)
class Plan:
    """How long the runs are.

    Attributes:
        seeds: runs of each of two rates.
        first: updates on the way, of batches of ``small``; then
        last: over which logits are averaged, of ``large``.
        rate: Adam's, of the first updates; it falls to a tenth in the last.
    """

    seeds: int = 6
    first: int = 350
    last: int = 300
    small: int = 128
    large: int = 448
    rate: float = 0.06


@dataclass(frozen=True)
class Ended:
    """log-laws of the runs, (runs, N), of the higher rate first: of the averaged logits, of the
    averages of both halves, after the first updates and after the last; averaged logits, and those
    after the first updates."""

    mean: Tensor
    early: Tensor
    late: Tensor
    before: Tensor
    last: Tensor
    logits: Tensor
    halfway: Tensor


class Runs:
    """The tables, the batches and the loss of all runs of a case."""

    def __init__(self, case: Drawn, plan: Plan, seed: int) -> None:
        space, ebm = case.ebm.space, case.ebm
        self.case, self.space, self.count = case, space, 2 * plan.seeds
        self.generator = torch.Generator().manual_seed(seed)
        allowed = space.state_action_mask()
        reference = ebm.reference
        assert isinstance(reference, Tabular)
        rows = reference.table.detach()[0].masked_fill(~allowed, -torch.inf)
        self.log_ref = torch.log_softmax(rows, 1).float()
        teacher = tree_q_values(solve(ebm), space, 1)[0].double()
        self.teacher = torch.log_softmax(teacher, 1).float().masked_fill(rows == -torch.inf, -1e30)
        self.policy = Tabular(space, [[i] for i in range(self.count)], scale=0.0)
        start = reference.table.detach()[0].float()
        self.policy.table.data.copy_(start.expand_as(self.policy.table))
        self.fixed = Tabular(space, scale=0.0)

    def draw(self, size: int, who: str) -> Batch:
        """So many responses of each run, by the library's sampler, with rewards."""
        ids = torch.arange(self.count).repeat_interleave(size)
        source = self.policy
        if who != "policy":
            source = self.fixed
            table = self.log_ref if who == "reference" else self.teacher
            source.table.data.copy_(table.nan_to_num(neginf=-1e30)[None])
        with torch.no_grad():
            drawn = sample(source, self.space, len(ids), self.generator, ids)
            reward = self.case.ebm.reward(drawn.tokens, drawn.lengths, torch.zeros_like(ids))
        return drawn.clean().with_reward(reward.float())

    def mixed(self, size: int, share: float) -> Batch:
        """A share of each run's from the student, the rest from the teacher."""
        own = round(size * share)
        parts = [("policy", own), ("teacher", size - own)]
        batches = [(self.draw(n, who), n) for who, n in parts if n]
        if len(batches) == 1:
            return batches[0][0]

        def joined(name: str) -> Tensor:
            found = [getattr(b, name).unflatten(0, (self.count, n)) for b, n in batches]
            return torch.cat(found, 1).flatten(0, 1)

        return Batch(joined("tokens"), joined("lengths"), joined("prompt_ids"), joined("reward"))

    def rows(self, table: Tensor, batch: Batch) -> Tensor:
        """Logits before each token, (runs, B, T, A); of a table (runs, S, A)."""
        ids = self.space.state_ids(batch.tokens).masked_fill(~batch.mask, 0)
        ids = ids + batch.prompt_ids[:, None] * self.space.num_states
        return F.embedding(ids, table.flatten(0, 1)).unflatten(0, (self.count, -1))

    def log_probs(self, table: Tensor, batch: Batch) -> Tensor:
        """Of the tokens, (runs, B, T); 0 past the end."""
        table = table.masked_fill(~self.space.state_action_mask(), -torch.inf)
        rows = self.rows(torch.log_softmax(table, -1), batch)
        tokens, mask = (self.split(x) for x in (batch.tokens, batch.mask))
        return rows.gather(-1, tokens[..., None])[..., 0].masked_fill(~mask, 0.0)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.count, -1))

    def everywhere(self, table: Tensor) -> Tensor:
        return table.expand(self.count, *table.shape)

    def gradient(self, size: int) -> Tensor:
        """Of the loss on a new batch, by the table, (runs, S, A)."""
        of = {
            "policy-gradient": self._policy_gradient,
            "distillation": self._distillation,
            "preference": self._preference,
        }
        return of[self.case.kind](size)

    def _of(self, table: Tensor, value: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(value.sum(), table)
        return found.nan_to_num()

    def _policy_gradient(self, size: int) -> Tensor:
        case, given = self.case, self.case.arguments
        who = given["sampler"] or "policy"
        batch = self.draw(size, who)
        mask, reward = self.split(batch.mask), self.split(batch.rewards())
        held = {"policy": self.policy.table.detach()}.get(
            who, self.everywhere(self.log_ref if who == "reference" else self.teacher)
        )
        old = self.log_probs(held, batch)
        ref = self.log_probs(self.everywhere(self.log_ref), batch)
        advantages = given["advantages"]
        if isinstance(advantages, str):
            gain = torch.stack([combined(advantages, x) for x in reward])
        else:
            gain = torch.stack([advantages(*x) for x in zip(reward, old, ref, mask, strict=True)])
        gain = gain if gain.ndim == 3 else gain[..., None] * torch.ones_like(old)
        gain = gain.masked_fill(~mask, 0.0)
        table = self.policy.table.detach()
        inner, rate = given.get("inner_steps", 1), given.get("lr", 0.0)
        moved, total = table, torch.zeros_like(table)
        # A loss that is a sum has B times the gradient of a mean over responses.
        scale = size if "sum over" in case.words else 1
        for _ in range(inner):
            leaf = moved.clone().requires_grad_()
            inputs = (self.log_probs(leaf, batch), old, ref, gain, mask)
            step = self._of(leaf, torch.func.vmap(case.loss)(*inputs)) / scale
            total = total + step
            moved = moved - rate * step
        return total

    def _distillation(self, size: int) -> Tensor:
        batch = self.mixed(size, float(self.case.arguments["sampler"]))
        mask = self.split(batch.mask)
        leaf = self.policy.table.detach().clone().requires_grad_()
        forbidden = torch.isneginf(self.log_ref)

        def given(table: Tensor) -> Tensor:
            table = table.masked_fill(forbidden, FORBIDDEN)
            return self.rows(table, batch).masked_fill(~mask[..., None], 0.0)

        inputs = (given(leaf), given(self.everywhere(self.teacher)), self.split(batch.tokens), mask)
        return self._of(leaf, torch.func.vmap(self.case.loss)(*inputs))

    def _preference(self, size: int) -> Tensor:
        who = self.case.arguments["sampler"]
        pair = [self.draw(size, who) for _ in range(2)]
        first, second = (self.split(b.rewards()) for b in pair)
        wins = torch.sigmoid(first - second)
        first_wins = torch.rand(wins.shape, generator=self.generator) < wins
        leaf = self.policy.table.detach().clone().requires_grad_()

        def chosen(table: Tensor) -> tuple[Tensor, Tensor]:
            x, y = (self.log_probs(table, b).sum(-1) for b in pair)
            return torch.where(first_wins, x, y), torch.where(first_wins, y, x)

        inputs = (*chosen(leaf), *chosen(self.everywhere(self.log_ref)))
        return self._of(leaf, torch.func.vmap(self.case.loss)(*inputs))

    def log_laws(self, table: Tensor) -> Tensor:
        """Of all responses, (runs, N), float64."""
        tokens, lengths = self.space.sequences()
        n = len(tokens)
        batch = Batch(
            tokens.repeat(self.count, 1),
            lengths.repeat(self.count),
            torch.arange(self.count).repeat_interleave(n),
        )
        return self.log_probs(table.double(), batch).sum(-1)


def train(case: Drawn, plan: Plan, seed: int) -> Ended:
    """All runs of a case, from the reference: Adam, at a rate that falls, then averaged."""
    runs = Runs(case, plan, seed)
    table = runs.policy.table.data
    rates = torch.tensor([1.0] * plan.seeds + [0.5] * plan.seeds)[:, None, None] * plan.rate
    m, v = torch.zeros_like(table), torch.zeros_like(table)
    totals = [torch.zeros_like(table), torch.zeros_like(table)]
    halfway = table.clone()
    for i in range(plan.first + plan.last):
        late = i >= plan.first
        if i == plan.first:
            halfway = table.clone()
        g = runs.gradient(plan.large if late else plan.small)
        m = 0.9 * m + 0.1 * g
        v = 0.99 * v + 0.01 * g.square() if not late else 0.999 * v + 0.001 * g.square()
        c, d = 1 - 0.9 ** (i + 1), 1 - 0.99 ** (i + 1)
        share = 0.1 ** (min(i, plan.first) / plan.first)
        table -= rates * share * (m / c) / ((v / d).sqrt() + 1e-9)
        if late:
            totals[(i - plan.first) * 2 // plan.last] += table
    means = [x / plan.last for x in (totals[0] + totals[1], 2 * totals[0], 2 * totals[1])]
    return Ended(*(runs.log_laws(x) for x in (*means, halfway, table)), means[0], halfway)


@dataclass(frozen=True)
class Statistic:
    """One of the numbers that are compared.

    Attributes:
        found: the mean over the runs of the lower rate; the prediction may be ``off`` by no more
            than ``noise`` (the interval's half width) and ``allowance`` (what the rate moves).
    """

    name: str
    found: float
    predicted: float
    noise: float
    allowance: float

    @property
    def off(self) -> float:
        return abs(self.found - self.predicted)

    @property
    def agrees(self) -> bool:
        return self.off <= self.noise + self.allowance


def statistics(case: Drawn, end: Ended, predicted: Tensor) -> list[Statistic]:
    """E[R], and the probabilities of the three responses that the reference likes best.

    Args:
        predicted: the law, (N,).
    """
    law = end.mean.exp()
    seeds = len(law) // 2
    tokens, lengths = case.ebm.space.sequences()
    reward = case.ebm.reward(tokens, lengths, torch.zeros_like(lengths)).double()
    reward = reward.masked_fill(predicted.isnan(), 0.0)
    spread = float(reward.std())
    best = law.mean(0).topk(min(3, len(reward))).indices.tolist()
    t = student_quantile(1 - (1 - CONFIDENCE) / (1 + len(best)), seeds - 1)
    found = []
    weights = [("E[R]", reward, spread)]
    weights += [(f"p[{i}]", F.one_hot(torch.tensor(i), len(reward)).double(), 1.0) for i in best]
    for name, weight, scale in weights:
        x = law @ weight
        fast, slow = x[:seeds], x[seeds:]
        noise = t * float(slow.std()) / seeds**0.5
        moved = 2 * abs(float(fast.mean() - slow.mean()))
        guess = float(predicted @ weight)
        found.append(Statistic(name, float(slow.mean()), guess, noise, moved + FINITE * scale))
    return found
