r"""Expectations under p* of an automaton EBM, by forward and backward vectors.

    F_t[h, k] = log P*(state (h, k) before token t),     F_0 from the initial weights and B_0

and what follows a state has the probability exp(weight + C_{t+1} - B_t). Next to a large R / beta
these weights are rounded, and so is B_t: what follows each state is normalised by its own sum, so
that the probabilities always sum to 1. Sums over the tokens of an edge are taken once, so that the
expectation of what an automaton adds up costs T small steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.automata import Machine, segment_logsumexp
from rl_ebm.automata.logspace import finite
from rl_ebm.exact.automaton.values import Values, end_weights
from rl_ebm.soft_bellman import expectation, log_policy
from rl_ebm.tokens import TokenSpace


@dataclass(frozen=True)
class Flow:
    """Where p* goes.

    Attributes:
        state: F, (T, H, K).
        edge: log P* of taking an edge at a position, (T, H, M).
        end: of ending with EOS there, (T, H, K); ``-inf`` in fixed-length mode.
    """

    state: Float[Tensor, "T H K"]
    edge: Float[Tensor, "T H M"]
    end: Float[Tensor, "T H K"]


def find_flow(values: Values, space: TokenSpace, prompt: int) -> Flow:
    """Forward from the root, for one prompt."""
    machine, edges, t_max = values.machine, values.edges, space.max_length
    h, k = machine.num_hidden, machine.num_states
    state = torch.full((t_max, h, k), -torch.inf, dtype=torch.float64, device=machine.device)
    ids = torch.full((1,), prompt, device=machine.device)
    begin = machine.begin(ids)
    start = int(begin.k)
    state[0, :, start] = log_policy(begin.log_alpha[0] + values.before[0][:, start])
    edge = state.new_empty(t_max, h, len(edges.source))
    end = torch.empty_like(state)
    segment = torch.cat([edges.source, torch.arange(k, device=machine.device)])
    for t in range(t_max):
        following = edges.log_weight + values.after[t + 1][:, edges.target]
        ends = values.end_last if t == t_max - 1 else values.end
        share = _segment_log_softmax(torch.cat([following, ends], 1), segment, k)
        edge[t] = state[t][:, edges.source] + share[:, :-k]
        end[t] = state[t] + share[:, -k:]
        if t + 1 == t_max:
            break
        arrived = segment_logsumexp(edge[t], edges.target, k)
        if h == 1:
            state[t + 1] = arrived
            continue
        # From the hidden state that spoke to the next one.
        onward = log_policy(
            (machine.log_transition[..., None] + values.before[t + 1]).movedim(1, -1)
        )
        state[t + 1] = torch.logsumexp(arrived[..., None] + onward, 0).T
    return Flow(state, edge, end)


def expected_weight(
    values: Values,
    flow: Flow,
    space: TokenSpace,
    factor: Machine,
    states: Int64[Tensor, "K"],
) -> float:
    """E* of what a deterministic factor gives a response, in the units of its weights.

    Args:
        factor: the reward.
        states: its state in each state of the product.
    """
    edges = values.edges
    mean = _edge_means(values, factor.log_weight[states])
    total = float(expectation(flow.edge, mean.expand_as(flow.edge)).sum())
    if space.eos_id is None:
        total += float(expectation(flow.edge[-1], factor.final[states][edges.target]).sum())
        return total
    # The product has no transition where another factor forbids EOS, which may be forced yet.
    paid = end_weights(factor, space.eos_id)[0][states]
    return total + float(expectation(flow.end, paid.expand_as(flow.end)).sum())


def entropy(values: Values, flow: Flow) -> float:
    """Shannon entropy of the responses, by the chain rule; for a machine without a hidden part."""
    edges = values.edges
    total = float(expectation(flow.edge, _edge_means(values, None).expand_as(flow.edge)).sum())
    for log_p, before in ((flow.edge, flow.state[:, :, edges.source]), (flow.end, flow.state)):
        total -= float(expectation(log_p, log_p - before).sum())
    # An entropy of 0 comes out as what rounding leaves of it, of either sign.
    return max(total, 0.0)


def _edge_means(values: Values, weight: Tensor | None) -> Float[Tensor, "H M"]:
    """Mean payment of the tokens of each edge, as each hidden state draws them.

    Args:
        weight: of every transition, (K, A); None for -log p of the token: the mean is its entropy.
    """
    machine, edges = values.machine, values.edges
    m, h = len(edges.source), machine.num_hidden
    out = torch.zeros(h, m, dtype=torch.float64, device=machine.device)
    for k in range(machine.num_states):
        low, high = int(edges.first[k]), int(edges.first[k + 1])
        place = edges.of_token[k]
        here = (place < m).nonzero()[:, 0]
        log_p = token_shares(values, k)[:, here]
        paid = expectation(log_p, -log_p if weight is None else weight[k, here].expand(h, -1))
        out[:, low:high] += torch.zeros_like(out[:, low:high]).index_add(1, place[here] - low, paid)
    return out


def token_shares(values: Values, k: int) -> Float[Tensor, "H A"]:
    """log-probability of each token given the edge from k that it is on; of EOS, on none, 0."""
    machine, edges = values.machine, values.edges
    low, high = int(edges.first[k]), int(edges.first[k + 1])
    x = machine.log_emission + machine.log_weight[k]
    # One more segment, for EOS.
    segment = (edges.of_token[k] - low).clamp(max=high - low)
    return _segment_log_softmax(x, segment, high - low + 1)


def _segment_log_softmax(
    x: Float[Tensor, "n m"], segment: Int64[Tensor, "m"], count: int
) -> Float[Tensor, "n m"]:
    """log-softmax over the columns of each segment; ``-inf`` where all of one are."""
    index = segment.expand(x.shape[0], -1)
    top = x.new_full((x.shape[0], count), -torch.inf).scatter_reduce_(1, index, x, "amax")
    x = x - finite(top).gather(1, index)
    total = torch.zeros_like(top).index_add_(1, segment, x.exp())
    return x - finite(total.log()).gather(1, index)


def token_log_marginals(
    values: Values, flow: Flow, space: TokenSpace, t: int
) -> Float[Tensor, "A"]:
    """log P*(y_t = a) of every token; their total is the probability to get so far."""
    parts, edges = [], values.edges
    nowhere = torch.full_like(flow.edge[t][:, :1], -torch.inf)
    edge = torch.cat([flow.edge[t], nowhere], 1)  # EOS is on no edge
    for k in range(values.machine.num_states):
        x = edge[:, edges.of_token[k]] + token_shares(values, k)
        if space.eos_id is not None:
            x[:, space.eos_id] = flow.end[t][:, k]
        parts.append(torch.logsumexp(x, 0))
    return torch.logsumexp(torch.stack(parts), 0)
