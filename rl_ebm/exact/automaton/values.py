r"""Values of an automaton EBM: one pass over the weights, then T small steps.

With k the deterministic state, h the hidden one, and a the tokens that do not end the response,

    E[h, k -> k'] = log sum_{a : next[k, a] = k'} exp(emission[h, a] + weight[k, a])
    B_t[h, k]     = log( sum_k' exp(E[h, k -> k'] + C_{t+1}[h, k']) + exp(end_t[h, k]) )
    C_t[h, k]     = log sum_h' exp(transition[h, h'] + B_t[h', k]),
    C_T[h, k]     = final[k] + log_end[h]

B is the value before a token, C after it, before the hidden state moves on. E is all that is read
of the K x A and H x A weights; a step costs H (edges + K H), whatever A is. In EOS mode end_t is
the weight of EOS, and at the last position that of the reward alone (log p_ref(EOS) = 0 there).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.automata import (
    Columns,
    Machine,
    in_one,
    log_matmul,
    product,
    segment_logsumexp,
)
from rl_ebm.tokens import TokenSpace

_BLOCK = 2**23
_PER_TARGET = 2**13
"""sums of exponentials that take less time than one product of matrices"""


@dataclass(frozen=True)
class Edges:
    """Pairs (k, k') that some token leads from and to, sorted by k; EOS left out in EOS mode.

    Attributes:
        source, target: the pair of each edge, (M,).
        first: where the edges of each k begin, (K + 1,).
        of_token: the edge of each transition, (K, A); M for EOS in EOS mode.
        log_weight: E, (H, M).
    """

    source: Int64[Tensor, "M"]
    target: Int64[Tensor, "M"]
    first: Int64[Tensor, "K1"]
    of_token: Int64[Tensor, "K A"]
    log_weight: Float[Tensor, "H M"]


@dataclass(frozen=True)
class Values:
    """The machine of an EBM with its values; the attributes are those of the module's docstring.

    Attributes:
        machine: reference and reward / beta, in nats.
        emission: of its hidden states, scaled once for all products.
        edges: E.
        end: log-weight of EOS before the last position, (H, K); ``-inf`` in fixed-length mode.
        end_last: and at the last one.
        before: B, (T, H, K).
        after: C, (T + 1, H, K); entry 0 is not used.
        log_z: (P,).
        of_reference, of_reward: deterministic state of each factor in each state, (K,).
    """

    machine: Machine
    emission: Columns
    edges: Edges
    end: Float[Tensor, "H K"]
    end_last: Float[Tensor, "H K"]
    before: Float[Tensor, "T H K"]
    after: Float[Tensor, "T1 H K"]
    log_z: Float[Tensor, "P"]
    of_reference: Int64[Tensor, "K"]
    of_reward: Int64[Tensor, "K"]


def find_edges(machine: Machine, eos_id: int | None) -> Edges:
    """One pass over the weights."""
    k, a = machine.next.shape
    h, device = machine.num_hidden, machine.device
    keys = machine.next + torch.arange(k, device=device)[:, None] * k
    if eos_id is not None:
        keys[:, eos_id] = keys[:, (eos_id + 1) % a]  # another token's: no edge of its own
    if k * k <= 2**26:
        there = torch.zeros(k * k, dtype=torch.bool, device=device)
        there[keys.flatten()] = True
        found = there.nonzero()[:, 0]
        place = torch.zeros(k * k, dtype=torch.int64, device=device)
        place[found] = torch.arange(len(found), device=device)
        of_token = place[keys]
    else:
        found, of_token = torch.unique(keys, return_inverse=True)
    m = len(found)
    if eos_id is not None:
        of_token[:, eos_id] = m
    source, target = found // k, found % k
    first = torch.searchsorted(source, torch.arange(k + 1, device=device))
    log_weight = torch.empty(h, m, dtype=torch.float64, device=device)
    step = max(1, _BLOCK // (a * h))
    for i in range(0, k, step):
        rows = slice(i, min(i + step, k))
        low, high = int(first[rows.start]), int(first[rows.stop])
        x = machine.log_emission[:, None] + machine.log_weight[rows]
        # One more segment, for EOS.
        segment = (of_token[rows] - low).clamp(max=high - low).flatten()
        log_weight[:, low:high] = segment_logsumexp(x.flatten(1), segment, high - low + 1)[:, :-1]
    return Edges(source, target, first, of_token, log_weight)


def find_values(reference: Machine | None, reward: Machine, space: TokenSpace) -> Values:
    """The values of an EBM whose reference and reward / beta are machines.

    Args:
        reference: of p_ref; None for the counting measure.
        reward: R / beta in nats.
        space: the responses.
    """
    everything = torch.arange(reward.num_states, device=reward.device)
    machine, left, right, hidden = reward, everything, everything, 1
    if reference is not None:
        machine, left, right = product(reference, reward)
        hidden = reference.num_hidden
    h, k, t_max = machine.num_hidden, machine.num_states, space.max_length
    edges = find_edges(machine, space.eos_id)
    end = torch.full((h, k), -torch.inf, dtype=torch.float64, device=machine.device)
    end_last = end
    if space.eos_id is not None:
        end = end_weights(machine, space.eos_id)
        end_last = end_weights(reward, space.eos_id)[:, right].repeat(hidden, 1)
    before = torch.empty(t_max, h, k, dtype=torch.float64, device=machine.device)
    after = torch.empty(t_max + 1, h, k, dtype=torch.float64, device=machine.device)
    after[t_max] = -torch.inf
    if space.eos_id is None:
        after[t_max] = machine.final + machine.log_end[:, None]
    for t in reversed(range(t_max)):
        ends = end_last if t == t_max - 1 else end
        x = edges.log_weight + after[t + 1][:, edges.target]
        before[t] = torch.logaddexp(segment_logsumexp(x, edges.source, k), ends)
        after[t] = before[t] if h == 1 else log_matmul(machine.log_transition, before[t])
    log_z = torch.logsumexp(machine.log_initial + before[0][:, machine.start].T, 1)
    emission = Columns.of(machine.log_emission)
    return Values(machine, emission, edges, end, end_last, before, after, log_z, left, right)


def end_weights(machine: Machine, eos_id: int) -> Float[Tensor, "H K"]:
    """log-weight of ending with EOS from every pair of states."""
    last = machine.log_weight[:, eos_id] + machine.final[machine.next[:, eos_id].long()]
    return (machine.log_emission[:, eos_id] + machine.log_end)[:, None] + last


def q_rows(
    values: Values,
    space: TokenSpace,
    t: Int64[Tensor, "n"],
    k: Int64[Tensor, "n"],
    log_alpha: Float[Tensor, "n H"],
) -> Float[Tensor, "n A"]:
    """log of the weight of every continuation: q* plus log p_ref of the prefix.

    Args:
        t: position of the next token of each row.
        k: deterministic state there.
        log_alpha: log-weight of the prefix and each hidden state.
    """
    machine = values.machine
    if machine.num_hidden == 1:
        following = values.after[t[:, None] + 1, 0, machine.next[k].long()]
        q = log_alpha + machine.log_weight[k] + following
    elif in_one(k.device, len(k), machine.num_hidden, machine.vocab_size):
        q = _each_target(values, machine.next[k].long(), t, log_alpha) + machine.log_weight[k]
    else:
        q = torch.empty(len(k), machine.vocab_size, dtype=torch.float64, device=k.device)
        for state in torch.unique(k).tolist():
            rows = (k == state).nonzero()[:, 0]
            q[rows] = _rows_of_state(values, state, t[rows], log_alpha[rows])
    if space.eos_id is not None:
        last = (t == space.max_length - 1)[:, None]
        ends = torch.where(last, values.end_last[:, k].T, values.end[:, k].T)
        q.masked_fill_(last, -torch.inf)
        q[:, space.eos_id] = torch.logsumexp(log_alpha + ends, 1)
    return q


def _each_target(
    values: Values, target: Tensor, t: Int64[Tensor, "n"], log_alpha: Float[Tensor, "n H"]
) -> Float[Tensor, "n A"]:
    """Token by token: where each leads, (A,) or (n, A), and the sum over hidden states there."""
    x = values.after[t[:, None] + 1, :, target] + values.machine.log_emission.T
    return torch.logsumexp(log_alpha[:, None] + x, 2)


def _rows_of_state(values: Values, state: int, t: Tensor, log_alpha: Tensor) -> Tensor:
    """Columns by where they lead: one product of matrices for each target, if they are few.

    The target of most tokens is taken for all of them first, which copies no columns.
    """
    machine, edges = values.machine, values.edges
    weight = machine.log_weight[state]
    low, high = int(edges.first[state]), int(edges.first[state + 1])
    n, h, a = len(t), machine.num_hidden, machine.vocab_size
    if n * h * a <= _PER_TARGET * (high - low):
        q = torch.empty(n, a, dtype=torch.float64, device=t.device)
        target = machine.next[state].long()
        for rows in torch.arange(n, device=t.device).split(max(1, _BLOCK // (h * a))):
            q[rows] = _each_target(values, target, t[rows], log_alpha[rows]) + weight
        return q
    # EOS in EOS mode is of no edge; the caller fills it in.
    sizes = torch.bincount(edges.of_token[state], minlength=high + 1)[low:high]
    most = low + int(sizes.argmax())
    x = log_alpha + values.after[t + 1, :, edges.target[most]]
    q = log_matmul(x, values.emission).add_(weight)
    for edge in range(low, high):
        if edge == most:
            continue
        tokens = (edges.of_token[state] == edge).nonzero()[:, 0]
        x = log_alpha + values.after[t + 1, :, edges.target[edge]]
        q[:, tokens] = log_matmul(x, values.emission.pick(tokens)) + weight[tokens]
    return q
