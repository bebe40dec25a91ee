"""Sums over neighbouring tokens and positions, and hidden Markov models."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.automata.machine import Machine, deterministic, hidden
from rl_ebm.automata.weights import check_table, check_tensor, check_values
from rl_ebm.automata.windows import check_size, check_window, window
from rl_ebm.tokens import TokenSpace, check_space


def ngram(space: TokenSpace, log_weights: Float[Tensor, "..."]) -> Machine:
    """States are the last n - 1 tokens, or all of them where there are fewer."""
    check_space(space)
    a, n = space.vocab_size, check_tensor(log_weights, "log_weights").ndim
    if n == 0 or set(log_weights.shape) != {a}:
        raise ValueError(
            f"log_weights has shape {tuple(log_weights.shape)}, expected ({a},) * n: one weight "
            "for each n tokens"
        )
    check_window(n, a, f"a table of {n} tokens in a row", "use fewer tokens in a row")
    check_values(log_weights, "log_weights")
    free = [torch.zeros(a**i, a, dtype=torch.float64) for i in range(n - 1)]
    return window(a, [*free, log_weights.detach().double().cpu().reshape(-1, a)])


def chain(
    space: TokenSpace,
    fields: Float[Tensor, "T A"],
    couplings: Float[Tensor, "T1 A A"] | None = None,
) -> Machine:
    """States are the position, and where there are couplings the last token."""
    check_space(space)
    a, t_max = space.vocab_size, space.max_length
    check_table(fields, "fields", (t_max, a))
    states = 1 + a * t_max  # the start, then (position, token) of the last token
    if couplings is not None:
        check_size(states, a, "a chain with couplings", "use fewer tokens or positions")
        check_table(couplings, "couplings", (t_max - 1, a, a))
    fields = fields.detach().double().cpu()
    if couplings is None:
        # One state more than positions: what stands there is never read.
        rows = torch.cat([fields, fields.new_zeros(1, a)])
        following = torch.arange(1, t_max + 2).clamp(max=t_max)
        return deterministic(following[:, None].expand(-1, a).contiguous(), rows)
    next_ = torch.zeros(states, a, dtype=torch.int64)
    weight = torch.zeros(states, a, dtype=torch.float64)
    tokens = torch.arange(a)
    next_[0], weight[0] = 1 + tokens, fields[0]
    for t in range(1, t_max):
        here = slice(1 + (t - 1) * a, 1 + t * a)
        next_[here] = 1 + t * a + tokens
        weight[here] = couplings[t - 1].detach().double().cpu() + fields[t]
    return deterministic(next_, weight)


def hmm(
    space: TokenSpace,
    log_initial: Float[Tensor, "H"],
    log_transition: Float[Tensor, "H H"],
    log_emission: Float[Tensor, "H A"],
) -> Machine:
    """A hidden part alone."""
    check_space(space)
    # At least one hidden state.
    h = max(1, check_tensor(log_initial, "log_initial").numel())
    check_table(log_initial, "log_initial", (h,))
    check_table(log_transition, "log_transition", (h, h))
    check_table(log_emission, "log_emission", (h, space.vocab_size))
    return hidden(log_initial.detach(), log_transition.detach(), log_emission.detach())
