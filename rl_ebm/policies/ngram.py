"""n-gram policies fitted to responses: references with finitely many states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.automata import check_window, window
from rl_ebm.messages.arguments import finite, whole
from rl_ebm.messages.words import count_text
from rl_ebm.policies.automaton import AutomatonPolicy
from rl_ebm.tokens import Batch, TokenSpace, check_space, length_mask
from rl_ebm.tokens.batches import check_batch
from rl_ebm.tokens.prompts import check_prompts

MAX_SMOOTHING = 1e100
"""far beyond any count, far below where its products overflow"""


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
    hierarchical Dirichlet language model". A prompt's last tokens are the first history. Where
    fewer than order - 1 tokens stand in front, the mark of the text's start is the oldest of the
    history: what begins a text is counted by itself, and backed off to what follows anywhere.

    Args:
        responses: what to fit; their prompts are ``prompts[prompt_ids]``.
        order: n, at least 1; 2 for bigrams.
        smoothing: weight of the shorter history for each token; 0 for plain frequencies, with
            probability 0 for what was not seen (a history that was not seen is the shorter one).
        prompts: those of the EBM.

    Raises:
        ValueError: an order or smoothing out of range, no responses, or tokens that are none.
    """
    order = whole("order", order, 1)
    smoothing = finite("smoothing", smoothing, 0.0, MAX_SMOOTHING)
    check_space(space)
    check_batch(responses, space, "responses")
    prompts = None if prompts is None else check_prompts(prompts)
    a = space.vocab_size
    check_window(
        order, a, f"an n-gram of order {count_text(order)}", "use a smaller order, or fit_hmm"
    )
    histories = [a**i for i in range(order)]
    if len(responses) == 0:
        raise ValueError("there are no responses to fit")
    space.check(responses.tokens, responses.lengths)
    marked, plain = _counts(space, responses, order, prompts)
    shorter = _backed_off(plain, smoothing)
    # Histories shorter than order - 1 are those of the start.
    log_p = [_posterior(c, x, smoothing) for c, x in zip(marked, shorter[:-1], strict=True)]
    machine = window(a, [*log_p, shorter[-1]])
    if prompts is not None:
        offsets = [sum(histories[:i]) for i in range(order)]
        start = torch.tensor([offsets[len(h)] + _index(h, a) for h in _tails(prompts, order, a)])
        machine = replace(machine, start=start)
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
) -> tuple[list[Tensor], list[Tensor]]:
    """How often each token follows each history, shorter histories first.

    Returns:
        Counts after histories of 0 to order - 2 tokens that the mark of the start stands before;
        and after 0 to order - 1 tokens wherever they stand.
    """
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
    # A tail that fills the history may go on in front: no start is seen there.
    before = torch.tensor([len(tail) for tail in tails])[ids, None] + torch.arange(t_max)
    marked, plain = [], []
    for n in range(order):
        history = torch.zeros(len(tokens), t_max, dtype=torch.int64)
        known = real.clone()
        for i in range(n, 0, -1):
            shifted = torch.full((len(tokens), t_max), -1)
            first = min(t_max, max(0, i - width))
            shifted[:, first:] = tokens[:, max(0, width + first - i) : max(0, width + t_max - i)]
            known &= shifted >= 0
            history = history * a + shifted.clamp(min=0)
        cell = history * a + tokens[:, width:]
        plain.append(torch.bincount(cell[known], minlength=a ** (n + 1)).double().view(-1, a))
        if n < order - 1:
            first_ones = cell[known & (before == n)]
            marked.append(torch.bincount(first_ones, minlength=a ** (n + 1)).double().view(-1, a))
    return marked, plain


def _backed_off(counts: list[Tensor], smoothing: float) -> list[Tensor]:
    """log p of every history, shorter ones first."""
    a = counts[0].shape[1]
    out = [torch.full((1, a), 1.0 / a, dtype=torch.float64).log()]
    for table in counts:
        # The oldest token is the first digit of an index.
        below = out[-1].repeat(table.shape[0] // out[-1].shape[0], 1)
        out.append(_posterior(table, below, smoothing))
    return out[1:]


def _posterior(
    counts: Float[Tensor, "H A"], below: Float[Tensor, "H A"], smoothing: float
) -> Float[Tensor, "H A"]:
    """log p of histories from their counts and the log p of shorter ones."""
    a = counts.shape[1]
    seen = counts.sum(1, keepdim=True)
    p = (counts + smoothing * a * below.exp()) / (seen + smoothing * a)
    return torch.where(seen > 0, p.log(), below)
