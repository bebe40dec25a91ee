"""Exact samples of an automaton EBM: first the path of states, then the tokens on it.

Given the states, the tokens are independent, so tokens of all rows and positions are drawn
together, once for each pair of a hidden state and an edge: the cost is that of one pass over the
weights, and not of one for each position.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.exact.automaton.values import Values
from rl_ebm.tokens import Batch, TokenSpace

_BLOCK = 2**23


def draw(log_weight: Float[Tensor, "n m"], generator: torch.Generator | None) -> Int64[Tensor, "n"]:
    """One column of each row, by Gumbel-max: a column of ``-inf`` is never drawn."""
    noise = torch.empty_like(log_weight).exponential_(generator=generator).log_()
    return (log_weight - noise).argmax(1)


@torch.no_grad()
def sample_paths(
    values: Values,
    space: TokenSpace,
    prompt_ids: Int64[Tensor, "n"],
    generator: torch.Generator | None,
) -> Batch:
    """Responses of p*."""
    machine, edges = values.machine, values.edges
    n, device, t_max = len(prompt_ids), prompt_ids.device, space.max_length
    begin = machine.begin(prompt_ids)
    k = begin.k
    h = draw(begin.log_alpha + values.before[0][:, k].T, generator)
    lengths = torch.full((n,), t_max, device=device)
    hidden = torch.zeros(n, t_max, dtype=torch.int64, device=device)
    # -1: no token here, the response has ended or ends with EOS.
    edge = torch.full((n, t_max), -1, device=device)
    running = torch.ones(n, dtype=torch.bool, device=device)
    widest = int((edges.first[1:] - edges.first[:-1]).max()) if len(edges.source) else 0
    offsets = torch.arange(widest, device=device)
    for t in range(t_max):
        choice = edges.first[k][:, None] + offsets
        legal = choice < edges.first[k + 1][:, None]
        choice = choice.clamp(max=len(edges.source) - 1)
        x = edges.log_weight[h[:, None], choice]
        x = x + values.after[t + 1][h[:, None], edges.target[choice]]
        ends = (values.end_last if t == t_max - 1 else values.end)[h, k]
        x = torch.cat([x.masked_fill(~legal, -torch.inf), ends[:, None]], 1)
        column = draw(x, generator)
        goes_on = running & (column < widest)
        ended = running & ~goes_on
        lengths = torch.where(ended, t + 1, lengths)
        running = goes_on
        if not bool(running.any()):
            break
        chosen = choice.gather(1, column.clamp(max=widest - 1)[:, None])[:, 0]
        hidden[:, t], edge[:, t] = h, torch.where(running, chosen, -1)
        k = torch.where(running, edges.target[chosen], k)
        if machine.num_hidden > 1 and t < t_max - 1:
            h = draw(machine.log_transition[h] + values.before[t + 1][:, k].T, generator)
    tokens = _tokens(values, hidden, edge, generator)
    if space.eos_id is not None:
        tokens.scatter_(1, (lengths - 1)[:, None], space.eos_id)
    return Batch(tokens, lengths, prompt_ids)


def _tokens(
    values: Values, hidden: Tensor, edge: Tensor, generator: torch.Generator | None
) -> Tensor:
    """A token for each hidden state and edge; 0 where the edge is -1."""
    machine, edges = values.machine, values.edges
    tokens = torch.zeros_like(edge)
    there = edge >= 0
    count = len(edges.source)
    pairs, which = torch.unique(hidden[there] * count + edge[there], return_inverse=True)
    # Transitions by edge, in order.
    order = edges.of_token.flatten().argsort(stable=True)
    sizes = edges.of_token.flatten().bincount(minlength=count)[:count]
    starts = sizes.cumsum(0) - sizes
    h, e = pairs // max(count, 1), pairs % max(count, 1)
    drawn = torch.empty(len(which), dtype=torch.int64, device=edge.device)
    by_pair = which.argsort(stable=True)
    bounds = [0, *which.bincount(minlength=len(pairs)).cumsum(0).tolist()]
    i = 0
    while i < len(pairs):
        # Pairs whose tokens fit into a block, one at least.
        total = sizes[e[i:]].cumsum(0)
        j = i + max(1, int((total <= _BLOCK).sum()))
        rows = by_pair[bounds[i] : bounds[j]]
        width = sizes[e[i:j]]
        pair = torch.arange(j - i, device=edge.device).repeat_interleave(width)
        inside = torch.arange(len(pair), device=edge.device) - (width.cumsum(0) - width)[pair]
        transition = order[starts[e[i:j]][pair] + inside]
        token = transition % machine.vocab_size
        log_weight = machine.log_weight.flatten()[transition]
        log_weight = log_weight + machine.log_emission[h[i:j][pair], token]
        drawn[rows] = token[_pick(log_weight, pair, j - i, which[rows] - i, generator)]
        i = j
    tokens[there] = drawn
    return tokens


def _pick(
    log_weight: Tensor,
    segment: Tensor,
    count: int,
    asked: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """For each segment asked for, one of its entries, by inverting cumulative weights."""
    top = log_weight.new_full((count,), -torch.inf)
    top = top.scatter_reduce_(0, segment, log_weight, "amax")
    weight = (log_weight - top[segment]).exp()
    total = weight.new_zeros(count).index_add_(0, segment, weight)
    # Every segment has the total 1, so that none drowns another.
    cumulative = (weight / total[segment]).cumsum(0)
    last = torch.arange(len(weight), device=weight.device).masked_fill(weight == 0, -1)
    final = last.new_full((count,), -1).scatter_reduce_(0, segment, last, "amax")
    ends = cumulative[final]
    first = torch.cat([ends.new_zeros(1), ends[:-1]])
    u = torch.rand(len(asked), dtype=torch.float64, device=weight.device, generator=generator)
    target = first[asked] + u * (ends - first)[asked]
    place = torch.searchsorted(cumulative, target, right=True)
    return torch.minimum(place, final[asked])
