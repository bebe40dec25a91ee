"""What an automaton solution says of its EBM where responses cannot be listed."""

from __future__ import annotations

import heapq
import math
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.automata import Machine
from rl_ebm.exact.automaton.marginals import Flow, entropy, expected_weight, find_flow, token_shares
from rl_ebm.exact.automaton.values import Values
from rl_ebm.exact.base import Solution
from rl_ebm.exact.figures import Response, Summary

_SPARE = 16
"""responses looked at beyond those asked for, where they are as likely but for rounding"""


class Solved(Solution, Protocol):
    """An automaton solution, by what is read of it here."""

    @property
    def values(self) -> Values:
        """Backward vectors, of reference and reward together."""
        ...

    @property
    def payment(self) -> Machine:
        """What pays R, in reward units."""
        ...


@torch.no_grad()
def summarise_automaton(solution: Solved, top: int = 10, prompt: int = 0) -> Summary:
    """Exact figures of p*(.|x), and its ``top`` most probable responses, likeliest first.

    Where the reference or the reward has a hidden part its log-probability is no sum along the
    response: then the entropy (and of a hidden reward its expectation) is None, and no response
    is listed.
    """
    space, log_z = solution.space, float(solution.log_z[prompt])
    values = solution.values
    flow = find_flow(values, space, prompt)
    gain = None
    if solution.payment.num_hidden == 1:
        gain = expected_weight(values, flow, space, solution.payment, values.of_reward)
    sums = values.machine.num_hidden == 1  # whether log p* is a sum along the response
    return Summary(
        log_z=log_z,
        entropy=entropy(values, flow) if sums else None,
        expected_reward=gain,
        num_sequences=space.num_sequences,
        top=most_probable(solution, flow, top, prompt) if sums else [],
    )


def most_probable(solution: Solved, flow: Flow, top: int, prompt: int) -> list[Response]:
    """The likeliest responses of a machine without a hidden part, by best-first search.

    A prefix is ordered by what its best response loses against the best of all, which is exact
    (Viterbi) and grows by exactly 0 at the best child: among a prefix's children only the ``top``
    best can matter, and ties never widen the search.
    """
    space, values = solution.space, solution.values
    machine = values.machine
    best = _best_after(solution)
    ids = torch.full((1,), prompt, device=machine.device)
    start = int(machine.begin(ids).k)
    # Losses are differences of sums of this size. What they round to one another is set in order
    # afterwards, by the probabilities themselves.
    slack = 1e-14 * space.max_length * abs(float(best[0][start]))
    # Ties are broken by the tokens, as in enumeration order.
    queue: list[tuple[float, list[int], int, bool]] = []
    if float(best[0][start]) > -math.inf:
        queue.append((0.0, [], start, False))
    found: list[tuple[float, list[int]]] = []
    known: dict[tuple[int, int], list[tuple[int, float, bool]]] = {}
    while queue and top > 0 and len(found) < top + _SPARE:
        lost, tokens, k, ended = heapq.heappop(queue)
        if len(found) >= top and lost > found[top - 1][0] + slack:
            break
        if ended:
            found.append((lost, tokens))
            continue
        place = (len(tokens), k)
        if place not in known:
            known[place] = _children(solution, best, *place, top)
        for token, loss, done in known[place]:
            state = int(machine.next[k, token])
            heapq.heappush(queue, (lost + loss, [*tokens, token], state, done))
    return _in_order(solution, flow, [tokens for _, tokens in found], prompt)[:top]


def _in_order(solution: Solved, flow: Flow, found: list[list[int]], prompt: int) -> list[Response]:
    """Responses with their probabilities and rewards, likeliest first; ties by their tokens."""
    if not found:
        return []
    space, device = solution.space, solution.device
    t_max = space.max_length
    tokens = torch.tensor([y + [0] * (t_max - len(y)) for y in found], device=device)
    lengths = torch.tensor([len(y) for y in found], device=device)
    ids = torch.full_like(lengths, prompt)
    scores = solution.ebm.reward(tokens, lengths, ids).double()
    log_ref = solution.ebm.log_ref(tokens, lengths, ids).double().sum(1)
    # Of large R / beta the difference, which is exact, has the digits. Sums of the same numbers
    # in another order are ties as well.
    order = (log_ref - log_ref[0] + (scores - scores[0]) / solution.ebm.beta).tolist()
    probabilities = _probabilities(solution, flow, found)
    responses = [
        Response(y, p, r) for y, p, r in zip(found, probabilities, scores.tolist(), strict=True)
    ]
    ranked = sorted((-round(x, 11), y, r) for x, y, r in zip(order, found, responses, strict=True))
    return [response for _, _, response in ranked]


def _probabilities(solution: Solved, flow: Flow, found: list[list[int]]) -> list[float]:
    """By the chain rule: what each edge takes of its state, each token of its edge."""
    machine, edges, eos = solution.values.machine, solution.values.edges, solution.space.eos_id
    shares: dict[int, Tensor] = {}
    start = int(flow.state[0, 0].argmax())
    out = []
    for tokens in found:
        log_p, k = 0.0, start
        for t, token in enumerate(tokens):
            before = flow.state[t, 0, k]
            if token == eos:
                log_p += float(flow.end[t, 0, k] - before)
                break
            if k not in shares:
                shares[k] = token_shares(solution.values, k)[0]
            edge = flow.edge[t, 0, edges.of_token[k, token]]
            log_p += float(edge - before + shares[k][token])
            k = int(machine.next[k, token])
        out.append(math.exp(log_p))
    return out


def _children(
    solution: Solved, best: Tensor, t: int, k: int, top: int
) -> list[tuple[int, float, bool]]:
    """The best next tokens: token, what is lost, and whether the response ends."""
    space, values, machine = solution.space, solution.values, solution.values.machine
    last = t == space.max_length - 1
    row = machine.log_weight[k].clone()
    rest = best[t + 1][machine.next[k].long()]
    if space.eos_id is not None:
        row[space.eos_id] = (values.end_last if last else values.end)[0, k]
        # At the last position the others are -inf: nothing follows them.
        rest[space.eos_id] = 0.0
    total = row + rest
    order = total.sort(descending=True, stable=True).indices[:top].tolist()
    return [
        (token, float(best[t][k] - total[token]), last or token == space.eos_id)
        for token in order
        if float(total[token]) > -math.inf
    ]


def _best_after(solution: Solved) -> Float[Tensor, "T1 K"]:
    """The largest log-weight of what may follow each state, by position."""
    space, values, machine = solution.space, solution.values, solution.values.machine
    edges, t_max, m = values.edges, space.max_length, len(values.edges.source)
    per_edge = torch.full((m + 1,), -torch.inf, dtype=torch.float64, device=machine.device)
    place, weight = edges.of_token.flatten(), machine.log_weight.flatten()
    per_edge.scatter_reduce_(0, place, weight, "amax")
    best = torch.full(
        (t_max + 1, machine.num_states), -torch.inf, dtype=torch.float64, device=machine.device
    )
    best[t_max] = values.after[t_max, 0]
    for t in reversed(range(t_max)):
        x = per_edge[:m] + best[t + 1][edges.target]
        step = best[t].scatter_reduce(0, edges.source, x, "amax")
        ends = (values.end_last if t == t_max - 1 else values.end)[0]
        best[t] = torch.maximum(step, ends)
    return best
