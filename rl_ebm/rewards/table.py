"""A reward that is a table: one score for each response, in enumeration order."""

from __future__ import annotations

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from rl_ebm.automata.weights import check_tensor, check_values
from rl_ebm.rewards.base import Prompts
from rl_ebm.tokens import TokenSpace


class Table:
    """R(x, y) looked up.

    Args:
        scores: (N,), or (P, N) with prompts, N = ``space.num_sequences``, in the enumeration
            order of :mod:`rl_ebm.tokens.space`. float32 or float64; other numbers become float64.
            Never copied where its dtype fits.
    """

    called = False

    def __init__(self, scores: Shaped[Tensor, "*P N"]) -> None:
        check_tensor(scores, "scores")
        if scores.ndim not in (1, 2):
            raise ValueError(f"scores has shape {tuple(scores.shape)}, expected (N,) or (P, N)")
        if scores.dtype not in (torch.float32, torch.float64):
            scores = scores.double()
        self.scores = scores.detach() if scores.ndim == 2 else scores.detach()[None]
        self.space: TokenSpace | None = None
        self.forbids = False

    @property
    def device(self) -> torch.device:
        return self.scores.device

    def limits(self, space: TokenSpace, prompt: int = 0) -> tuple[float, float]:
        """(least, largest) R of a prompt's responses."""
        low, high = torch.aminmax(self.scores[prompt])
        return float(low), float(high)

    def bind(self, space: TokenSpace, prompts: Prompts | None) -> Table:
        num_prompts = 1 if prompts is None else len(prompts)
        want = (num_prompts, space.num_sequences)
        if tuple(self.scores.shape) != want:
            shape = f"({want[1]},)" if prompts is None else f"({want[0]}, {want[1]})"
            raise ValueError(
                f"the reward table has shape {tuple(self.scores.shape)}, expected {shape}: one "
                "score for each sequence, in enumeration order"
            )
        low, high = torch.aminmax(self.scores, dim=1)
        if bool((torch.isnan(high) | torch.isposinf(high)).any()):
            check_values(self.scores, "the reward table")
        if bool(torch.isneginf(high).any()):
            raise ValueError(
                "every response of a prompt has reward -inf, so there is no distribution: give "
                "at least one response a finite reward"
            )
        bound = Table(self.scores)
        bound.space, bound.forbids = space, bool(torch.isneginf(low).any())
        return bound

    def __call__(
        self,
        tokens: Int64[Tensor, "B T"],
        lengths: Int64[Tensor, "B"],
        prompt_ids: Int64[Tensor, "B"],
    ) -> Shaped[Tensor, "B"]:
        assert self.space is not None, "a table is bound to its space by the EBM"
        return self.scores[prompt_ids.long(), self.space.sequence_indices(tokens, lengths)]

    def to(self, device: torch.device | str) -> Table:
        moved = Table(self.scores.to(device))
        moved.space, moved.forbids = self.space, self.forbids
        return moved
