"""Decoding: a policy's logits at one position after the other, and responses drawn from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl_ebm.messages.arguments import Int, Number, check_generator, finite, is_number, shown, whole
from rl_ebm.messages.memory import check_fits
from rl_ebm.policies.base import (
    Policy,
    device_of,
    num_prompts,
    prompts_of,
    resolve_prompt_ids,
    steps_of,
)
from rl_ebm.policies.outputs import check_kind, check_output
from rl_ebm.policies.scoring import tree_is_smaller, tree_q_values
from rl_ebm.tokens import Batch, TokenSpace, check_space


class Positions:
    """A policy's logits before the token at t, (B, A), for t = 0, 1, ...: by its cache if any.

    The tokens before t may have been decoded a moment ago. Where rows change places between two
    positions, as resampling does, :meth:`restart` says so.

    Args:
        policy: any.
        space: of the tokens.
        prompt_ids: of the rows, (B,).
    """

    def __init__(self, policy: Policy, space: TokenSpace, prompt_ids: Int64[Tensor, "B"]) -> None:
        self.policy, self.space, self.prompt_ids = policy, space, prompt_ids
        self.steps, self.state = steps_of(policy), None

    def logits(self, t: int, tokens: Int64[Tensor, "B T"]) -> Float[Tensor, "B A"]:
        """Of the rows that begin with ``tokens[:, :t]``, as the policy gives them.

        Raises:
            TypeError, ValueError: the policy gives no (B, T, A) of real numbers.
        """
        if self.steps is None:
            logits = self.policy.logits(tokens, self.prompt_ids)
            check_output(logits, len(tokens), self.space)
            rows: Tensor = logits[:, t]
            return rows
        if self.state is None:
            self.state = self.steps.start(self.prompt_ids)
            for i in range(t):
                self._step(i, tokens)
        return self._step(t, tokens)

    def _step(self, t: int, tokens: Tensor) -> Tensor:
        assert self.steps is not None
        return self.steps.step(self.state, tokens[:, t - 1] if t else None)

    def restart(self) -> None:
        """Forget the cache: it has no way to be reordered, so the tokens are read again."""
        self.state = None


def along(policy: Policy, space: TokenSpace, batch: Batch) -> Iterator[Float[Tensor, "B A"]]:
    """Logits before every token of some responses, position by position, as the policy gives them.

    By its cache where it has one, so that no (B, T, A) is made; else in one pass.
    """
    tokens = batch.clean().tokens
    if steps_of(policy) is None:
        logits = policy.logits(tokens, batch.prompt_ids)
        check_output(logits, len(tokens), space)
        return iter(logits.unbind(1))
    positions = Positions(policy, space, batch.prompt_ids)
    return (positions.logits(t, tokens) for t in range(space.max_length))


LOOK = 16
"""tokens between two looks at whether all responses have ended, where a look waits"""


@torch.no_grad()
def sample(
    policy: Policy,
    space: TokenSpace,
    n: Int,
    generator: torch.Generator | None = None,
    prompt_ids: Int64[Tensor, "n"] | None = None,
    temperature: Number = 1.0,
    epsilon: Number = 0.0,
) -> Batch:
    """Draw responses, by Gumbel-max on the masked logits: a forbidden token is never drawn.

    Decoding ends with the longest response. Whether all have ended is looked at after every token
    on a CPU, and every 16 tokens elsewhere, where each look would wait for the device.

    Args:
        n: how many.
        generator: on the policy's device; None for the global one.
        prompt_ids: which prompt each row answers, (n,); needed where the policy has several.
        temperature: of the draw; 1 samples the policy itself.
        epsilon: chance of each token to be drawn uniformly from the allowed ones instead.

    Raises:
        TypeError: no policy.
        ValueError: ``prompt_ids`` missing or of another length, or a number out of range.
    """
    check_kind(policy)
    check_space(space)
    temperature = finite("temperature", temperature, 0.0, above=True)
    if not (is_number(epsilon) and 0 <= epsilon <= 1):
        raise ValueError(f"epsilon must be in [0, 1], got {shown(epsilon)}")
    # A policy without prompts answers any the same.
    count = None if prompts_of(policy) is None else num_prompts(policy)
    device = device_of(policy)
    n = check_draws(n, space, device)
    prompt_ids = resolve_prompt_ids(n, prompt_ids, count, device)
    device = prompt_ids.device
    check_generator(generator, device)
    next_logits = _next_logits(policy, space, n, prompt_ids)
    # At fixed length every action is allowed, and nothing is masked.
    forbidden = None if space.eos_id is None else ~space.action_mask(device)
    tokens = torch.zeros(n, space.max_length, dtype=torch.int64, device=device)
    lengths = torch.full((n,), 0 if space.eos_id is not None else space.max_length, device=device)
    running = torch.ones(n, dtype=torch.bool, device=device)
    look = LOOK if device.type != "cpu" else 1
    for t in range(space.max_length):
        if space.eos_id is not None and t and t % look == 0 and not bool(running.any()):
            break
        masked = None if forbidden is None else forbidden[t]
        action = _draw(next_logits(t, tokens), masked, temperature, epsilon, generator)
        if space.eos_id is None:
            tokens[:, t] = action
            continue
        tokens[:, t] = action * running
        lengths += running
        running &= action != space.eos_id
    return Batch(tokens, lengths, prompt_ids)


def _draw(
    logits: Float[Tensor, "n A"],
    forbidden: Bool[Tensor, "A"] | None,
    temperature: float,
    epsilon: float | int,
    generator: torch.Generator | None,
) -> Int64[Tensor, "n"]:
    """The next token of each row."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1:
        logits = logits / temperature
    if epsilon:
        uniform = torch.rand(len(logits), 1, generator=generator, device=logits.device)
        logits = logits.masked_fill(uniform < epsilon, 0.0)
    if forbidden is not None:
        logits = logits.masked_fill(forbidden, -torch.inf)
    # Gumbel noise is -log(Exponential); argmax of logits + noise is a draw from softmax.
    noise = torch.empty_like(logits).exponential_(generator=generator).log_()
    return (logits - noise).argmax(-1)


def check_draws(n: Int, space: TokenSpace, device: torch.device) -> int:
    """How many responses are to be drawn.

    Raises:
        TypeError: no integer.
        ValueError: a negative one, or more than fit into memory at a time.
    """
    n = whole("n", n, 0, 2**31)
    if n > 2**20 and device.type == "cpu":
        need = 8 * n * (space.max_length + space.vocab_size + 2)
        check_fits(need, f"drawing {n:,} responses at a time", "draw fewer")
    return n


def _next_logits(
    policy: Policy, space: TokenSpace, n: int, prompt_ids: Int64[Tensor, "n"]
) -> Callable[[int, Tensor], Tensor]:
    """A function (t, tokens) -> (n, A): the fastest way this policy has."""
    if not tree_is_smaller(policy, space, n):
        return Positions(policy, space, prompt_ids).logits
    rows = tree_q_values(policy, space, num_prompts(policy)).flatten(0, 1)
    row: Any = prompt_ids * space.num_states if num_prompts(policy) > 1 else 0

    def from_tree(t: int, tokens: Tensor) -> Tensor:
        index = torch.zeros_like(prompt_ids)
        for i in range(t):
            index = index * space.branching + space.rank(tokens[:, i])
        return rows[row + space.state_offset(t) + index]

    return from_tree
