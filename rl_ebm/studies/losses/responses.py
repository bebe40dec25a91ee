"""Every response to one prompt, token by token: between logits of states and what a loss reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from rl_ebm.fixed_points import Problem
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import TokenSpace, length_mask


@dataclass(frozen=True)
class Responses:
    """The responses that the reference allows, float64; 0 past the end of each.

    Attributes:
        problem: the EBM, of one prompt.
        places: where each response stands in enumeration order.
        states: id of the state before each token.
        log_ref: log p_ref of each token; without a reference 0, of the counting measure.
        reward: R, in reward units.
        start: log p_ref of every action, normalised at each state, -inf where forbidden: (S, A).
    """

    problem: Problem
    places: Int64[Tensor, "N"]
    tokens: Int64[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    states: Int64[Tensor, "N T"]
    log_ref: Float[Tensor, "N T"]
    reward: Float[Tensor, "N"]
    start: Float[Tensor, "S A"]

    @property
    def space(self) -> TokenSpace:
        return self.problem.space

    @property
    def lengths(self) -> Float[Tensor, "N"]:
        return self.mask.sum(1).double()

    def at_tokens(self, table: Float[Tensor, "S A"]) -> Float[Tensor, "N T"]:
        """The entry of each token, 0 past the end."""
        return table[self.states, self.tokens].masked_fill(~self.mask, 0.0)

    def rows(self, table: Shaped[Tensor, "S A"]) -> Shaped[Tensor, "N T A"]:
        """The row of the state before each token."""
        return table[self.states]

    def log_law(self, log_pi: Float[Tensor, "S A"]) -> Float[Tensor, "N"]:
        """log-probability of every response."""
        return self.at_tokens(log_pi).sum(1)

    def whole(self, log_law: Float[Tensor, "N"]) -> Float[Tensor, "M"]:
        """The law on all responses of the space, forbidden ones too, in enumeration order."""
        found = torch.full((self.space.num_sequences,), -torch.inf, dtype=torch.float64)
        found[self.places] = log_law
        return found

    def add_up(self, values: Float[Tensor, "N T"]) -> Float[Tensor, "S A"]:
        """Sum of the values of the tokens that are each action at each state."""
        flat = (self.states * self.space.vocab_size + self.tokens)[self.mask]
        table = torch.zeros(self.start.numel(), dtype=torch.float64)
        return table.index_add(0, flat, values[self.mask]).view_as(self.start)

    def add_rows(self, values: Float[Tensor, "N T A"]) -> Float[Tensor, "S A"]:
        """Sum of the rows of the tokens that stand at each state."""
        table = torch.zeros_like(self.start)
        return table.index_add(0, self.states[self.mask], values[self.mask])

    def logits(self, log_law: Float[Tensor, "N"]) -> Float[Tensor, "S A"]:
        """Logits of the policy with this law; 0 where it never is."""
        mass = self.add_up(log_law.exp()[:, None].expand(self.mask.shape))
        return mass.log().masked_fill(mass == 0, 0.0)

    def mass(self, log_law: Float[Tensor, "N"]) -> Float[Tensor, "S A"]:
        """Probability that a response passes each action of each state."""
        return self.add_up(log_law.exp()[:, None].expand(self.mask.shape))

    def gradient(
        self, values: Float[Tensor, "N T"], log_pi: Float[Tensor, "S A"]
    ) -> Float[Tensor, "S A"]:
        """With respect to the logits, of what has these gradients by the tokens' log pi."""
        table = self.add_up(values)
        return table - log_pi.exp() * table.sum(1, keepdim=True)

    def inner(
        self,
        values: Float[Tensor, "N T"],
        others: Float[Tensor, "N T"],
        log_pi: Float[Tensor, "S A"],
    ) -> Float[Tensor, "N"]:
        """Inner product of two such gradients of each response: its states are all different."""
        collision = log_pi.exp().square().sum(1)[self.states]
        each = 1 - 2 * self.at_tokens(log_pi).exp() + collision
        return (values * others * each.masked_fill(~self.mask, 0.0)).sum(1)

    def against(
        self,
        values: Float[Tensor, "N T"],
        table: Float[Tensor, "S A"],
        log_pi: Float[Tensor, "S A"],
    ) -> Float[Tensor, "N"]:
        """Inner product of the gradient of each response with a table of logits."""
        level = table - (log_pi.exp() * table).sum(1, keepdim=True)
        return (values * self.at_tokens(level)).sum(1)

    def products(
        self, rows: Int64[Tensor, "n"], log_pi: Float[Tensor, "S A"]
    ) -> Float[Tensor, "n N"]:
        """Inner products of the gradients of log pi, of these responses and of all."""
        collision = log_pi.exp().square().sum(1)[self.states]
        chosen = self.at_tokens(log_pi).exp()
        found = torch.zeros(len(rows), len(self.places), dtype=torch.float64)
        for t in range(self.mask.shape[1]):
            state, action = (x[rows, t, None] for x in (self.states, self.tokens))
            both = self.mask[rows, t, None] & self.mask[:, t] & (state == self.states[:, t])
            each = (action == self.tokens[:, t]).double() - chosen[rows, t, None] - chosen[:, t]
            found += (each + collision[:, t]).masked_fill(~both, 0.0)
        return found


def responses_of(problem: Problem) -> Responses:
    """All that the reference allows, of one prompt."""
    space = problem.space
    places = problem.allowed.nonzero()[:, 0]
    tokens, lengths = space.sequences()
    tokens, lengths = tokens[places], lengths[places]
    mask = length_mask(lengths, space.max_length)
    states = space.state_ids(tokens).masked_fill(~mask, 0)
    start = torch.cat(problem.start())
    log_ref = torch.cat(problem.log_ref)[states, tokens].masked_fill(~mask, 0.0)
    reward = problem.beta * problem.g_responses[places]
    return Responses(problem, places, tokens, mask, states, log_ref, reward, start)


def normalised(theta: Float[Tensor, "S A"], like: Float[Tensor, "S A"]) -> Float[Tensor, "S A"]:
    """log pi of logits; what ``like`` forbids stays forbidden."""
    return log_policy(theta.masked_fill(torch.isneginf(like), -torch.inf))
