"""Responses that a policy hardly gives: its own, turned off at one decision.

A sample of size n misses what has probability 1 / n and less. Where such responses may matter is
seen best one decision away from those that were drawn: the policy goes on as ever after a token
that it is not likely to choose, and how likely it is to choose one like it is known.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.policies.base import Policy, steps_of
from rl_ebm.policies.decoding import along, sample
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import Batch, TokenSpace

MOST = 256
"""detours that are taken at most"""
LISTED = 1024
"""so many responses are all looked at, be the samples ever so few"""
_BYTES_PER_LOGIT = 160


def rows_at_once(policy: Policy, space: TokenSpace, memory: int) -> int:
    """How many responses are looked at together, so that memory is about kept."""
    per_row = _BYTES_PER_LOGIT * space.vocab_size
    if steps_of(policy) is None:
        per_row += 16 * space.vocab_size * space.max_length
    return max(1, memory // per_row)


def are_listed(space: TokenSpace, samples: int) -> bool:
    """Whether all responses are looked at in place of detours; never beside a single sample."""
    return samples > 1 and space.num_sequences <= max(samples, LISTED)


def all_responses(space: TokenSpace, prompt: int, device: torch.device | str) -> Batch:
    """Every response to a prompt."""
    tokens, lengths = space.sequences()
    return Batch(tokens, lengths, torch.full_like(lengths, prompt)).to(device)


@torch.no_grad()
def detours(
    policy: Policy, space: TokenSpace, batch: Batch, at_once: int, keep_rest: bool = False
) -> tuple[Batch, Float[Tensor, "B"]]:
    """One detour from each response of a batch, and how probable ones like it are.

    At one of a response's decisions, each as often, the token is drawn anew: for every other
    response uniformly from those that the policy allows, else from the square root of its
    probabilities; what follows is the policy's. The draws are the same in every call, and none
    is taken from another generator.

    Args:
        batch: responses of the policy, or of another law, on the policy's device.
        at_once: how many of them are looked at together.
        keep_rest: what follows is not the policy's but what followed before.

    Returns:
        The responses, and for each the policy's probability, at the state that it turns off at,
        of all tokens that are no likelier than the one it takes.
    """
    generator = torch.Generator(batch.tokens.device).manual_seed(0)
    rows = torch.arange(len(batch), device=batch.tokens.device)
    parts = [
        _detours(policy, space, batch.take(some).clean(), generator, keep_rest)
        for some in rows.split(at_once)
    ]
    return Batch.cat([b for b, _ in parts]), torch.cat([m for _, m in parts])


def _detours(
    policy: Policy,
    space: TokenSpace,
    batch: Batch,
    generator: torch.Generator,
    keep_rest: bool,
) -> tuple[Batch, Tensor]:
    n, device = len(batch), batch.tokens.device
    mask, tokens = space.action_mask(device), batch.tokens.clone()
    # In EOS mode the last position is no decision.
    choices = batch.lengths.clamp(max=max(space.num_decisions, 1))
    at = (torch.rand(n, generator=generator, device=device) * choices).long()
    mass = torch.ones(n, dtype=torch.float64, device=device)
    for t, logits in enumerate(along(policy, space, batch)):
        rows = (at == t).nonzero()[:, 0]
        if len(rows):
            log_p = log_policy(logits[rows].double().masked_fill(~mask[t], -torch.inf))
            tokens[rows, t], mass[rows] = _turn(log_p, rows % 2 == 0, generator)
        if t >= int(at.max()):
            break
    if keep_rest:
        # Where the end itself was turned off there is no rest.
        at = torch.where(at < batch.lengths - 1, batch.lengths - 1, at)
    make = _Forced if steps_of(policy) is None else _ForcedSteps
    forced = make(policy, space, tokens, at)
    return sample(forced, space, n, generator, batch.prompt_ids), mass


def _turn(
    log_p: Float[Tensor, "m A"], evenly: Tensor, generator: torch.Generator
) -> tuple[Int64[Tensor, "m"], Float[Tensor, "m"]]:
    """A token for each row, and the probability of all that are no likelier."""
    flat = torch.where(evenly[:, None], torch.zeros_like(log_p), log_p / 2)
    flat = flat.masked_fill(torch.isneginf(log_p), -torch.inf)
    noise = torch.empty_like(flat).exponential_(generator=generator).log_()
    token = (flat - noise).argmax(-1)
    rarer = log_p <= log_p.gather(-1, token[:, None])
    return token, (log_p.exp() * rarer).sum(-1)


class _Forced:
    """A policy that gives certain tokens first, up to a position of each row, and then its own."""

    def __init__(self, policy: Any, space: TokenSpace, tokens: Tensor, until: Tensor) -> None:
        self.policy, self.space, self.tokens, self.until = policy, space, tokens, until
        self.device = tokens.device

    def logits(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T A"]:
        """Those of the policy; at forced positions 0 at the token, ``-inf`` elsewhere."""
        rows = self.policy.logits(tokens, prompt_ids).unbind(1)
        return torch.stack([self._force(q, t) for t, q in enumerate(rows)], 1)

    def _force(self, q: Float[Tensor, "B A"], t: int) -> Float[Tensor, "B A"]:
        forced = (self.until >= t)[:, None]
        only = torch.full_like(q, -torch.inf).scatter(1, self.tokens[:, t : t + 1], 0.0)
        return torch.where(forced, only, q)


class _ForcedSteps(_Forced):
    """The same of a policy with a cache."""

    def start(self, prompt_ids: Int64[Tensor, "B"]) -> list[Any]:
        """The policy's state, and how many tokens it has read."""
        return [self.policy.start(prompt_ids), 0]

    def step(self, state: list[Any], tokens: Int64[Tensor, "B"] | None) -> Float[Tensor, "B A"]:
        """Logits of the next token."""
        q = self.policy.step(state[0], tokens)
        state[1] += 1
        return self._force(q, state[1] - 1)
