r"""Expectations under p* of an automaton EBM, by forward and backward vectors.

    F_t[h, k] = log P*(state (h, k) before token t),     F_0 from the initial weights and B_0

and what follows a state has the weight exp(weight + C_{t+1} - B_t). Sums over the tokens of an
edge are taken once, so that the expectation of what an automaton adds up costs T small steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.automata import Machine, segment_logsumexp
from rl_ebm.exact.automaton_values import Values, end_weights
from rl_ebm.soft_bellman import expectation
from rl_ebm.tokens import TokenSpace

_BLOCK = 2**23


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
    state[0, :, start] = (
        begin.log_alpha[0]
        + values.before[0][:, start]
        - values.log_z[prompt if len(values.log_z) > 1 else 0]
    )
    edge = state.new_empty(t_max, h, len(edges.source))
    end = torch.empty_like(state)
    for t in range(t_max):
        # -inf - (-inf): a state of no value is never reached.
        back = values.before[t].masked_fill(torch.isneginf(values.before[t]), torch.inf)
        share = state[t] - back
        following = edges.log_weight + values.after[t + 1][:, edges.target]
        edge[t] = share[:, edges.source] + following
        end[t] = share + (values.end_last if t == t_max - 1 else values.end)
        if t + 1 == t_max:
            break
        arrived = segment_logsumexp(edge[t], edges.target, k)
        if h == 1:
            state[t + 1] = arrived
            continue
        # From the hidden state that spoke to the next one: by the share of its value.
        after = values.after[t + 1].masked_fill(torch.isneginf(values.after[t + 1]), torch.inf)
        x = (arrived - after)[:, None] + machine.log_transition[..., None]
        state[t + 1] = torch.logsumexp(x, 0) + values.before[t + 1]
    return Flow(state, edge, end)


def expected_weight(
    values: Values,
    flow: Flow,
    space: TokenSpace,
    factor: Machine,
    states: Int64[Tensor, "K"],
    last_eos_is_free: bool = False,
) -> float:
    """E* of the log-weight that a deterministic factor gives a response.

    Args:
        factor: the reference, or the reward.
        states: its state in each state of the product.
        last_eos_is_free: whether EOS at the last position pays nothing.
    """
    edges = values.edges
    mean = _edge_means(values, factor.log_weight[states])
    total = float(expectation(flow.edge.flatten(0, 1), mean.repeat(space.max_length, 1)).sum())
    if space.eos_id is None:
        total += float(expectation(flow.edge[-1], factor.final[states][edges.target]).sum())
        return total
    # The product has no transition where another factor forbids EOS, which may be forced yet.
    paid = end_weights(factor, space.eos_id)[0][states]
    positions = space.max_length - int(last_eos_is_free)
    for t in range(positions):
        total += float(expectation(flow.end[t], paid).sum())
    return total


def _edge_means(values: Values, weight: Tensor) -> Float[Tensor, "H M"]:
    """Mean payment of the tokens of each edge, as each hidden state draws them."""
    machine, edges = values.machine, values.edges
    m, h = len(edges.source), machine.num_hidden
    out = torch.zeros(h, m, dtype=torch.float64, device=machine.device)
    for k in range(machine.num_states):
        low, high = int(edges.first[k]), int(edges.first[k + 1])
        place = edges.of_token[k]
        here = (place < m).nonzero()[:, 0]
        place = place[here]
        log_p = machine.log_emission[:, here] + machine.log_weight[k, here]
        log_p = log_p - edges.log_weight[:, place].nan_to_num(neginf=torch.inf)
        paid = expectation(log_p, weight[k, here].expand(h, -1))
        out[:, low:high] += torch.zeros_like(out[:, low:high]).index_add(1, place - low, paid)
    return out


def token_log_marginals(
    values: Values, flow: Flow, space: TokenSpace, t: int
) -> Float[Tensor, "A"]:
    """log P*(y_t = a) of every token; their total is the probability to get so far."""
    machine = values.machine
    parts = []
    back = values.before[t].masked_fill(torch.isneginf(values.before[t]), torch.inf)
    share = flow.state[t] - back
    for k in range(machine.num_states):
        x = machine.log_emission + machine.log_weight[k]
        x = x + values.after[t + 1][:, machine.next[k].long()] + share[:, k, None]
        if space.eos_id is not None:
            x[:, space.eos_id] = flow.end[t][:, k]
        parts.append(torch.logsumexp(x, 0))
    return torch.logsumexp(torch.stack(parts), 0)
