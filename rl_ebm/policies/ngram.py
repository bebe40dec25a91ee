"""n-gram policies fitted to responses: references with finitely many states."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.automata import deterministic
from rl_ebm.policies.automaton import AutomatonPolicy
from rl_ebm.tokens import Batch, TokenSpace, length_mask

MAX_TABLE = 2**28
"""probabilities that a policy may list"""


def fit_ngram(
    space: TokenSpace,
    responses: Batch,
    order: int = 2,
    smoothing: float | int = 1.0,
    prompts: Sequence[Sequence[int]] | None = None,
) -> AutomatonPolicy:
    """p(a | last order - 1 tokens) from counts, backed off to shorter histories.

        p_n(a|h) = (count(h, a) + smoothing A p_{n-1}(a|h')) / (count(h) + smoothing A)

    with h' the history without its oldest token, and p_0 uniform: MacKay and Peto (1995), "A
    hierarchical Dirichlet language model". A prompt's last tokens are the first history.

    Args:
        responses: what to fit; their prompts are ``prompts[prompt_ids]``.
        order: n, at least 1; 2 for bigrams.
        smoothing: weight of the shorter history for each token; 0 for plain frequencies, with
            probability 0 for what was not seen (a history that was not seen is the shorter one).
        prompts: those of the EBM.

    Raises:
        ValueError: an order or smoothing out of range, no responses, or tokens that are none.
    """
    if order < 1:
        raise ValueError(f"order must be >= 1, got {order}")
    if not 0 <= smoothing < float("inf"):
        raise ValueError(f"smoothing must be a finite number >= 0, got {smoothing}")
    a = space.vocab_size
    # The second condition alone takes long to find out at a very large order.
    if order > math.log2(MAX_TABLE) or sum(a**i for i in range(order)) * a > MAX_TABLE:
        raise ValueError(
            f"{order}-grams over {a} tokens have too many histories: use a smaller order, or "
            "fit_hmm"
        )
    histories = [a**i for i in range(order)]
    if len(responses) == 0:
        raise ValueError("there are no responses to fit")
    space.check(responses.tokens, responses.lengths)
    log_p = _backed_off(_counts(space, responses, order, prompts), float(smoothing))
    offsets = [sum(histories[:i]) for i in range(order)]
    next_ = []
    for i, count in enumerate(histories):
        following = torch.arange(count * a).view(count, a)
        if i < order - 1:
            next_.append(following + offsets[i + 1])
        else:
            next_.append(following % histories[-1] + offsets[-1])
    start = None
    if prompts is not None:
        start = torch.tensor([offsets[len(h)] + _index(h, a) for h in _tails(prompts, order, a)])
    machine = deterministic(torch.cat(next_), torch.cat(log_p), start=start)
    return AutomatonPolicy(space, machine, prompts)


def _tails(prompts: Sequence[Sequence[int]], order: int, a: int) -> list[list[int]]:
    """The last order - 1 tokens of every prompt."""
    tails = [list(prompt)[max(0, len(prompt) - order + 1) :] for prompt in prompts]
    wrong = [token for tail in tails for token in tail if not 0 <= token < a]
    if wrong:
        raise ValueError(f"a prompt ends with token {wrong[0]}, ids are in [0, {a})")
    return tails


def _index(history: Sequence[int], a: int) -> int:
    index = 0
    for token in history:
        index = index * a + token
    return index


def _counts(
    space: TokenSpace, responses: Batch, order: int, prompts: Sequence[Sequence[int]] | None
) -> list[Float[Tensor, "H A"]]:
    """How often each token follows each history, of every length below the order."""
    a, t_max = space.vocab_size, space.max_length
    tails = _tails(prompts or [[]], order, a)
    width = max(map(len, tails))
    # Prompts stand in front, right-aligned; what is before one is no token.
    front = torch.full((len(tails), width), -1)
    for row, tail in enumerate(tails):
        front[row, width - len(tail) :] = torch.tensor(tail, dtype=torch.int64)
    ids = responses.prompt_ids.cpu() if prompts is not None else torch.zeros(len(responses)).long()
    lengths = responses.lengths.cpu()
    tokens = torch.cat([front[ids], responses.clean().tokens.cpu()], 1)
    real = length_mask(lengths, t_max)
    counts = []
    for n in range(order):
        table = torch.zeros(a**n * a, dtype=torch.float64)
        history = torch.zeros(len(tokens), t_max, dtype=torch.int64)
        known = real.clone()
        for i in range(n, 0, -1):
            shifted = torch.full((len(tokens), t_max), -1)
            first = max(0, i - width)
            shifted[:, first:] = tokens[:, width + first - i : width + t_max - i]
            known &= shifted >= 0
            history = history * a + shifted.clamp(min=0)
        cell = history * a + tokens[:, width:]
        counts.append(table.index_add(0, cell[known], torch.ones(int(known.sum())).double()))
    return [table.view(-1, a) for table in counts]


def _backed_off(counts: list[Tensor], smoothing: float) -> list[Float[Tensor, "H A"]]:
    """log p of every history, shorter ones first."""
    a = counts[0].shape[1]
    shorter = torch.full((1, a), 1.0 / a, dtype=torch.float64)
    out = []
    for table in counts:
        # The oldest token is the first digit of an index.
        below = shorter.repeat(table.shape[0] // shorter.shape[0], 1)
        total = table.sum(1, keepdim=True) + smoothing * a
        p = (table + smoothing * a * below) / total.clamp(min=1e-300)
        shorter = torch.where(total > 0, p, below)
        out.append(shorter.log())
    return out
