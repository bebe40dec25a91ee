"""Values of all states of a prefix tree, with the digits that extreme temperatures need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.ebm import EBM
from rl_ebm.exact.tree.backup import PLAIN, backup_leaves, finite_range
from rl_ebm.exact.tree.solution import TreeSolution
from rl_ebm.soft_bellman import soft_value

_LARGEST = 1e300
"""|R / beta| beyond which sums over a response could leave float64"""


def is_plain(scores: Float[Tensor, "P N"], beta: float) -> bool:
    """Whether V has room for R / beta in the dtype of the scores.

    Raises:
        ValueError: an R / beta that float64 has no room for.
    """
    ends = [finite_range(row) for row in scores]
    known = [x for low, high in ends for x in (low, high, high - low) if x > -torch.inf]
    peak = max((abs(x) for x in known), default=0.0)
    if not peak / beta <= _LARGEST:
        raise ValueError(
            f"R / beta is too large for float64: |R| is up to {peak:.3g} and beta is {beta:.3g}; "
            "scale the rewards down, or beta up"
        )
    return peak / beta <= PLAIN[scores.dtype]


def bytes_of_value(scores: Float[Tensor, "P N"], beta: float, listed: bool) -> int:
    """What V of a state takes.

    Args:
        listed: whether log p_ref is a table of float64: V in float64 is small beside it.
    """
    if not is_plain(scores, beta):
        return 8 + scores.element_size()
    return 8 if listed else scores.element_size()


def fill_tree(
    ebm: EBM,
    scores: Float[Tensor, "P N"],
    log_ref: Sequence[float] | Sequence[Tensor],
    block: int,
) -> TreeSolution:
    """The solution of every prompt, by Eq. (1) of :mod:`rl_ebm.soft_bellman`.

    Args:
        block: logits to look at at a time.

    Raises:
        ValueError: an R / beta that float64 has no room for.
    """
    space, p = ebm.space, ebm.num_prompts
    plain = is_plain(scores, ebm.beta)
    dtype = scores.dtype if plain and not isinstance(log_ref[0], Tensor) else torch.float64

    def tables(dtype: torch.dtype) -> list[Tensor]:
        sizes = [space.num_prefixes(t) for t in range(space.max_length)]
        return [torch.empty(p, n, dtype=dtype, device=ebm.device) for n in sizes]

    v, paid = tables(dtype), None if plain else tables(scores.dtype)
    log_z = torch.empty(p, dtype=torch.float64, device=ebm.device)
    solution = TreeSolution(ebm, scores, v, log_ref, log_z, paid)
    constants = [c for c in log_ref if isinstance(c, float)]
    for prompt in range(p):
        if space.eos_id is not None or not constants:
            log_z[prompt] = _by_level(solution, prompt, block)
            continue
        levels = [level[prompt] for level in v]
        bases = None if paid is None else [level[prompt] for level in paid]
        log_z[prompt] = backup_leaves(scores[prompt], ebm.beta, space.branching, levels, bases)
        for t, level in enumerate(levels):
            if any(constants[t:]):
                level += sum(constants[t:])
        log_z[prompt] += sum(constants)
    return solution


def _by_level(solution: TreeSolution, prompt: int, block: int) -> Tensor:
    """Values, a block of states at a time, from the last depth up."""
    space, v, paid = solution.space, solution.reduced_v, solution.paid
    block = max(1, block // space.vocab_size)
    value = torch.empty(0)
    base = torch.zeros(1)
    for t in reversed(range(space.max_length)):
        for start in range(0, space.num_prefixes(t), block):
            rows = slice(start, min(start + block, space.num_prefixes(t)))
            base, q = solution.reduced_rows(t, rows, prompt)
            value = soft_value(q)
            v[t][prompt, rows] = value.to(v[t].dtype)
            if paid is not None:
                paid[t][prompt, rows] = base.to(paid[t].dtype)
    return value[0] + base[0] / solution.ebm.beta
