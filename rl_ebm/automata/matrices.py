"""Weighted automata by their matrices, one for each token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.automata.machine import Machine, deterministic, hidden
from rl_ebm.automata.weights import check_table, check_tensor
from rl_ebm.tokens import TokenSpace, check_space

MAX_PAIRS = 2**12
"""pairs of states that some token joins, at most: all pairs of them are tables"""


def weighted(
    space: TokenSpace,
    log_initial: Float[Tensor, "S"],
    log_weight: Float[Tensor, "A S1 S2"],
    log_end: Float[Tensor, "S3"] | None = None,
) -> Machine:
    """Deterministic where it is; else the pairs of states that some token joins are hidden states.

    A pair gives its token with the weight of the transition, and is followed by the pairs that
    begin where it ends.
    """
    check_space(space)
    s = max(1, check_tensor(log_initial, "log_initial").numel())
    if log_end is None:
        log_end = torch.zeros(s, dtype=torch.float64)
    parts = [
        check_table(table, name, shape).detach().double().cpu()
        for name, table, shape in (
            ("log_initial", log_initial, (s,)),
            ("log_weight", log_weight, (space.vocab_size, s, s)),
            ("log_end", log_end, (s,)),
        )
    ]
    initial, weight, end = parts
    there = ~torch.isneginf(weight)
    begins = (~torch.isneginf(initial)).nonzero()[:, 0]
    if len(begins) == 1 and int(there.sum(2).max()) <= 1:
        best, target = weight.max(2)
        constant = initial[begins[0]]
        return deterministic(target.T.contiguous(), best.T.contiguous(), end + constant, begins)
    pairs = there.any(0).nonzero()
    if len(pairs) > MAX_PAIRS:
        raise ValueError(
            f"the matrices join {len(pairs):,} pairs of states, at most {MAX_PAIRS:,} are allowed: "
            "use fewer states, or more weights of -inf"
        )
    if len(pairs) == 0:
        # No token leads anywhere: every response is impossible.
        pairs = torch.zeros(1, 2, dtype=torch.int64)
    i, j = pairs.unbind(1)
    follows = torch.where(j[:, None] == i, 0.0, -torch.inf).double()
    return hidden(initial[i], follows, weight[:, i, j].T.contiguous(), end[j])
