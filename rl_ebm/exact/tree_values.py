"""Values of all states of a prefix tree, with the digits that extreme temperatures need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.ebm import EBM
from rl_ebm.exact.backup import PLAIN, backup_leaves, finite_range
from rl_ebm.exact.solution import TreeSolution
from rl_ebm.soft_bellman import soft_value

_LARGEST = 1e300
"""|R / beta| beyond which sums over a response could leave float64"""
_FAR = -600.0
"""log Z, less the shift, below which the shift is that of a response that hardly counts"""


def find_shift(
    scores: Float[Tensor, "P N"], beta: float, listed: bool
) -> tuple[Float[Tensor, "P"], torch.dtype]:
    """What to take off the rewards of every prompt, and the dtype that V needs.

    Args:
        listed: whether log p_ref is a table of float64: V in float64 is small beside it.

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
    plain = peak / beta <= PLAIN[scores.dtype]
    best = [0.0 if plain or high == -torch.inf else high for _, high in ends]
    dtype = scores.dtype if plain and not listed else torch.float64
    return torch.tensor(best, dtype=torch.float64, device=scores.device), dtype


def fill_tree(
    ebm: EBM,
    scores: Float[Tensor, "P N"],
    log_ref: Sequence[float] | Sequence[Tensor],
    shift: Float[Tensor, "P"],
    dtype: torch.dtype,
    block: int,
) -> TreeSolution:
    """The solution of every prompt, by Eq. (1) of :mod:`rl_ebm.soft_bellman`.

    Args:
        shift, dtype: of :func:`find_shift`.
        block: logits to look at at a time.
    """
    space, device, p = ebm.space, ebm.device, ebm.num_prompts
    v = [
        torch.empty(p, space.num_prefixes(t), dtype=dtype, device=device)
        for t in range(space.max_length)
    ]
    log_z = torch.empty(p, dtype=torch.float64, device=device)
    solution = TreeSolution(ebm, scores, v, log_ref, log_z, shift)
    constants = [c for c in log_ref if isinstance(c, float)]
    for prompt in range(p):
        if space.eos_id is None and constants:
            levels = [level[prompt] for level in v]
            log_z[prompt] = backup_leaves(
                scores[prompt], ebm.beta, space.branching, levels, float(shift[prompt])
            )
            for t, level in enumerate(levels):
                if any(constants[t:]):
                    level += sum(constants[t:])
            log_z[prompt] += sum(constants)
            continue
        log_z[prompt] = _by_level(solution, prompt, block)
        if shift[prompt] and -torch.inf < float(log_z[prompt]) < _FAR:
            # The best reward is one that the reference all but forbids.
            shift[prompt] = _likely_reward(solution, prompt)
            log_z[prompt] = _by_level(solution, prompt, block)
    log_z += shift / ebm.beta
    return solution


def _by_level(solution: TreeSolution, prompt: int, block: int) -> Tensor:
    """Values, a block of states at a time, from the last depth up."""
    space, v = solution.space, solution.reduced_v
    block = max(1, block // space.vocab_size)
    value = torch.empty(0)
    for t in reversed(range(space.max_length)):
        for start in range(0, space.num_prefixes(t), block):
            rows = slice(start, min(start + block, space.num_prefixes(t)))
            value = soft_value(solution.reduced_q_rows(t, rows, prompt))
            v[t][prompt, rows] = value.to(v[t].dtype)
    return value[0]


def _likely_reward(solution: TreeSolution, prompt: int) -> Tensor:
    """R of the response that takes the likeliest action everywhere: of weight Z / A**T at least."""
    space = solution.space
    index = 0
    for t in range(space.max_length):
        rows = slice(index, index + 1)
        action = int(solution.reduced_q_rows(t, rows, prompt)[0].argmax())
        if action == space.eos_id or t == space.max_length - 1:
            break
        index = index * space.branching + int(space.rank(torch.tensor(action)))
    return solution.reward_rows(t, rows, prompt)[0, action]
