"""What an exact solution says of its EBM: entropy, expected reward, the likeliest responses."""

from __future__ import annotations

import torch

from rl_ebm.exact.automaton import AutomatonSolution
from rl_ebm.exact.automaton_summary import summarise_automaton
from rl_ebm.exact.base import Solution, lists
from rl_ebm.exact.figures import Response, Summary
from rl_ebm.soft_bellman import expectation

_BLOCK = 2**18


@torch.no_grad()
def summarise(solution: Solution, top: int = 10, prompt: int = 0) -> Summary:
    """Exact figures of p*(.|x), and its ``top`` most probable responses, likeliest first."""
    if isinstance(solution, AutomatonSolution) and not lists(solution):
        return summarise_automaton(solution, top, prompt)
    space = solution.space
    entropy = expected_reward = 0.0
    best_log_p = torch.empty(0, dtype=torch.float64, device=solution.device)
    best_score, best_index = best_log_p, best_log_p.long()
    last = space.max_length - 1
    # Sums of r from the root on: equally probable responses tie exactly, as sums of log pi do not.
    path = torch.zeros(1, dtype=torch.float64, device=solution.device)
    for t in range(space.max_length):
        children = []
        block = max(1, _BLOCK // space.vocab_size)
        for start in range(0, len(path), block):
            rows = slice(start, min(start + block, len(path)))
            log_weight = path[rows, None] + solution.r_rows(t, rows, prompt)
            if t < last:
                children.append(space.gather_children(log_weight))
            if space.eos_id is None and t < last:
                continue
            columns = slice(None) if space.eos_id is None else slice(space.eos_id, space.eos_id + 1)
            log_p = log_weight[:, columns].flatten() - solution.log_z[prompt]
            score = solution.reward_rows(t, rows, prompt)[:, columns].flatten()
            entropy -= float(expectation(log_p, log_p).sum())
            expected_reward += float(expectation(log_p, score).sum())
            first = (
                start * space.vocab_size
                if space.eos_id is None
                else (space.state_offset(t) + start)
            )
            index = torch.arange(first, first + len(log_p), device=log_p.device)
            best_log_p = torch.cat([best_log_p, log_p])
            best_score, best_index = torch.cat([best_score, score]), torch.cat([best_index, index])
            # A stable sort: of equally probable responses the first in enumeration order wins.
            best = best_log_p.sort(descending=True, stable=True).indices[:top]
            best_log_p, best_score, best_index = (
                x[best] for x in (best_log_p, best_score, best_index)
            )
        if t < last:
            path = torch.cat(children)
    responses = [
        Response(_tokens(solution, i), p, s)
        for i, p, s in zip(
            best_index.tolist(), best_log_p.exp().tolist(), best_score.tolist(), strict=True
        )
        if p > 0
    ]
    return Summary(
        float(solution.log_z[prompt]), entropy, expected_reward, space.num_sequences, responses
    )


def _tokens(solution: Solution, index: int) -> list[int]:
    tokens, lengths = solution.space.sequences(index, index + 1)
    return list(tokens[0, : int(lengths[0])].tolist())
