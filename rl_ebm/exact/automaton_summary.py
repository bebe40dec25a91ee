"""What an automaton solution says of its EBM where responses cannot be listed."""

from __future__ import annotations

import heapq
import math

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.exact.automaton import AutomatonSolution
from rl_ebm.exact.automaton_marginals import expected_weight, find_flow
from rl_ebm.exact.figures import Response, Summary


@torch.no_grad()
def summarise_automaton(solution: AutomatonSolution, top: int = 10, prompt: int = 0) -> Summary:
    """Exact figures of p*(.|x), and its ``top`` most probable responses, likeliest first.

    Where the reference or the reward has a hidden part its log-probability is no sum along the
    response: then the entropy (and of a hidden reward its expectation) is None, and no response
    is listed.
    """
    space, log_z = solution.space, float(solution.log_z[prompt])
    values, reward, reference = solution.values, solution.reward, solution.reference
    flow = find_flow(values, space, prompt)
    gain = None
    if reward.num_hidden == 1:
        gain = expected_weight(values, flow, space, reward, values.of_reward)
    log_ref: float | None = 0.0
    if reference is not None:
        log_ref = None
        if reference.num_hidden == 1:
            log_ref = expected_weight(
                values, flow, space, reference, values.of_reference, last_eos_is_free=True
            )
    listed = [] if values.machine.num_hidden > 1 else most_probable(solution, top, prompt)
    return Summary(
        log_z=log_z,
        entropy=None if gain is None or log_ref is None else log_z - gain - log_ref,
        expected_reward=None if gain is None else gain * solution.ebm.beta,
        num_sequences=space.num_sequences,
        top=listed,
    )


def most_probable(solution: AutomatonSolution, top: int, prompt: int) -> list[Response]:
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
    log_z = float(solution.log_z[prompt])
    # Ties are broken by the tokens, as in enumeration order.
    queue: list[tuple[float, list[int], int, float, bool]] = []
    if float(best[0][start]) > -math.inf:
        queue.append((0.0, [], start, 0.0, False))
    found: list[Response] = []
    known: dict[tuple[int, int], list[tuple[int, float, float, bool]]] = {}
    while queue and len(found) < top:
        lost, tokens, k, weight, ended = heapq.heappop(queue)
        if ended:
            batch = torch.tensor([tokens + [0] * (space.max_length - len(tokens))])
            batch = batch.to(machine.device)
            lengths = torch.tensor([len(tokens)], device=machine.device)
            score = float(solution.ebm.reward(batch, lengths, ids)[0])
            found.append(Response(tokens, math.exp(weight - log_z), score))
            continue
        place = (len(tokens), k)
        if place not in known:
            known[place] = _children(solution, best, *place, top)
        for token, loss, gain, done in known[place]:
            state = int(machine.next[k, token])
            heapq.heappush(queue, (lost + loss, [*tokens, token], state, weight + gain, done))
    return found


def _children(
    solution: AutomatonSolution, best: Tensor, t: int, k: int, top: int
) -> list[tuple[int, float, float, bool]]:
    """The best next tokens: token, what is lost, what it adds, and whether the response ends."""
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
        (token, float(best[t][k] - total[token]), float(row[token] + (rest[token] if last else 0)),
         last or token == space.eos_id)
        for token in order
        if float(total[token]) > -math.inf
    ]  # fmt: skip


def _best_after(solution: AutomatonSolution) -> Float[Tensor, "T1 K"]:
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
