"""What an exact solution says of its EBM: entropy, expected reward, the likeliest responses."""

from __future__ import annotations

import math

import torch

from rl_ebm.exact.base import Solution, lists
from rl_ebm.exact.figures import Response, Summary
from rl_ebm.messages.arguments import whole
from rl_ebm.soft_bellman import expectation
from rl_ebm.tokens import TokenSpace

_BLOCK = 2**18
_LARGE = 600.0
"""|log Z| from which on differences of rewards are taken before they are divided by beta"""


@torch.no_grad()
def summarise(solution: Solution, top: int = 10, prompt: int = 0) -> Summary:
    """Exact figures of p*(.|x), and its ``top`` most probable responses, likeliest first.

    Raises:
        TypeError, ValueError: a ``top`` that is no integer >= 0, or a prompt that is not there.
    """
    top = whole("top", top, 0)
    prompt = whole("prompt", prompt, 0)
    if prompt >= solution.ebm.num_prompts:
        raise ValueError(f"prompt must be in [0, {solution.ebm.num_prompts}), got {prompt}")
    if not lists(solution) and (known := solution.summary(top, prompt)) is not None:
        return known
    space, beta = solution.space, solution.ebm.beta
    log_z = float(solution.log_z[prompt])
    # log Z next to a large R / beta lost its digits. So rewards lose what is in all that count,
    # and the sums are divided by their own total.
    shift, base = (beta * log_z, 0.0) if abs(log_z) > _LARGE else (0.0, log_z)
    mass = log_mean = gain = 0.0
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
            log_ref = path[rows, None] + solution.log_ref_rows(t, rows, prompt)
            if t < last:
                children.append(space.gather_children(log_ref))
            if space.eos_id is None and t < last:
                continue
            columns = slice(None) if space.eos_id is None else slice(space.eos_id, space.eos_id + 1)
            score = solution.reward_rows(t, rows, prompt)[:, columns].flatten()
            log_p = log_ref[:, columns].flatten() + ((score - shift) / beta - base)
            mass += float(log_p.exp().sum())
            log_mean += float(expectation(log_p, log_p).sum())
            gain += float(expectation(log_p, score - shift).sum())
            index = _first(space, t, start) + torch.arange(len(log_p), device=log_p.device)
            best_log_p = torch.cat([best_log_p, log_p])
            best_score, best_index = torch.cat([best_score, score]), torch.cat([best_index, index])
            # A stable sort: of equally probable responses the first in enumeration order wins.
            best = best_log_p.sort(descending=True, stable=True).indices[:top]
            best_log_p, best_score, best_index = (
                x[best] for x in (best_log_p, best_score, best_index)
            )
        if t < last:
            path = torch.cat(children)
    probabilities = (best_log_p.exp() / mass).tolist()
    responses = [
        Response(_tokens(solution, i), p, s)
        for i, p, s in zip(best_index.tolist(), probabilities, best_score.tolist(), strict=True)
        if p > 0
    ]
    # An entropy of 0 comes out as what rounding leaves of it, of either sign.
    entropy = max(math.log(mass) - log_mean / mass, 0.0)
    return Summary(log_z, entropy, shift + gain / mass, space.num_sequences, responses)


def _first(space: TokenSpace, t: int, row: int) -> int:
    """Place in the enumeration of the first response that ends at a state of depth t."""
    if space.eos_id is None:
        return row * space.vocab_size
    return space.state_offset(t) + row


def _tokens(solution: Solution, index: int) -> list[int]:
    tokens, lengths = solution.space.sequences(index, index + 1)
    return list(tokens[0, : int(lengths[0])].tolist())
