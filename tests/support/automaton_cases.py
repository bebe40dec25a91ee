"""Random automaton EBMs, and the same by listing every response: what tests compare."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_ebm import EBM, TokenSpace
from rl_ebm.automata import Machine, deterministic, hidden
from rl_ebm.policies import AutomatonPolicy
from rl_ebm.rewards import Automaton


def random_machine(g: torch.Generator, a: int, k: int, h: int, prompts: int, zeros: float):
    """Log-weights N(0, 1), some of them -inf; not normalised."""

    def weights(*shape):
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        return x.masked_fill(torch.rand(shape, generator=g) < zeros, -torch.inf)

    base = deterministic(
        torch.randint(k, (k, a), generator=g),
        weights(k, a),
        weights(k),
        torch.randint(k, (prompts,), generator=g),
    )
    if h == 1:
        return base
    part = hidden(weights(prompts, h), weights(h, h), weights(h, a), weights(h))
    return Machine(
        base.next,
        base.log_weight,
        base.final,
        base.start,
        part.log_initial,
        part.log_transition,
        part.log_emission,
        part.log_end,
    )


def random_law(g: torch.Generator, a: int, k: int, h: int, prompts: int, zeros: float) -> Machine:
    """A machine whose tokens have total probability 1 in every state."""

    def law(*shape):
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        out = torch.rand(shape, generator=g) < zeros
        out[..., 0] = False
        return x.masked_fill(out, -torch.inf).log_softmax(-1)

    start = torch.randint(k, (prompts,), generator=g)
    next_ = torch.randint(k, (k, a), generator=g)
    if h == 1:
        return deterministic(next_, law(k, a), start=start)
    return hidden(law(prompts, h), law(h, h), law(h, a))


@dataclass
class Listed:
    """Every response of a space, one by one, in plain Python."""

    space: TokenSpace
    tokens: Tensor
    lengths: Tensor
    log_weight: list[list[float]]
    """of each prompt and response"""

    def log_z(self, prompt: int) -> float:
        return lse(self.log_weight[prompt])


def lse(values: list[float]) -> float:
    top = max(values, default=-math.inf)
    if top == -math.inf:
        return -math.inf
    return top + math.log(math.fsum(math.exp(x - top) for x in values))


def weight_of(machine: Machine, tokens: list[int], prompt: int, last_free: bool = False) -> float:
    """log W of a response by summing over hidden paths, slowly.

    Args:
        last_free: whether the last token costs nothing, as EOS at the last position of p_ref.
    """
    k = int(machine.start[prompt % len(machine.start)])
    total = 0.0
    initial = machine.log_initial[prompt % len(machine.log_initial)].tolist()
    alpha = initial
    h = len(initial)
    for i, a in enumerate(tokens):
        last = i == len(tokens) - 1
        if not (last and last_free):
            total += float(machine.log_weight[k, a])
            alpha = [alpha[z] + float(machine.log_emission[z, a]) for z in range(h)]
            k = int(machine.next[k, a])
        if not last:
            alpha = [
                lse([alpha[y] + float(machine.log_transition[y, z]) for y in range(h)])
                for z in range(h)
            ]
    if last_free:
        return total + lse(alpha)
    alpha = [x + float(end) for x, end in zip(alpha, machine.log_end, strict=True)]
    return total + float(machine.final[k]) + lse(alpha)


def listed(ebm: EBM, reward: Machine, reference: Machine | None) -> Listed:
    """log p_ref + R / beta of everything."""
    space = ebm.space
    tokens, lengths = space.sequences()
    rows = []
    for prompt in range(ebm.num_prompts):
        row = []
        for y, n in zip(tokens.tolist(), lengths.tolist(), strict=True):
            weight = weight_of(reward, y[:n], 0) / ebm.beta
            if reference is not None:
                free = space.eos_id is not None and n == space.max_length
                weight += weight_of(reference, y[:n], prompt, free)
            row.append(weight)
        rows.append(row)
    return Listed(space, tokens, lengths, rows)


def random_case(seed: int, zeros: float = 0.2):
    """A random EBM of a random kind, its machines, and its listing."""
    g = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    a, t_max = pick(2, 3, 4), pick(1, 2, 3, 4)
    eos = pick(None, 0, a - 1)
    space = TokenSpace(a, t_max, eos)
    prompts = pick(None, None, [[0], [1, 0], []])
    hidden_states = pick(1, 1, 2, 3)
    beta = 1.0 if hidden_states > 1 else pick(1.0, 0.3, 2.0)
    reward = random_machine(g, a, pick(1, 2, 3), hidden_states, 1, zeros)
    law, policy = None, None
    if pick(True, True, False):
        count = 1 if prompts is None else pick(1, len(prompts))
        law = random_law(g, a, pick(1, 2, 3), pick(1, 1, 2, 3), count, zeros)
        policy = AutomatonPolicy(space, law, prompts if count > 1 else None)
    ebm = EBM(space, Automaton(space, reward), beta, policy, prompts)
    return ebm, listed(ebm, reward, law)
