"""The exact solution on the prefix tree: a policy whose logits are q*."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.ebm import EBM
from rl_ebm.policies.scoring import log_prob, resolve_prompt_ids, sample
from rl_ebm.tokens import Batch

Rows = slice | Tensor
"""Prefixes of one depth: a range, or an index for each row."""


@dataclass
class _Decoding:
    prompt_ids: Tensor
    index: Tensor
    depth: int = 0


class TreeSolution:
    r"""q* = M(r) of an EBM, by table look-up: arXiv 2512.15605, Eq. (6), Prop. 1.

    What it keeps is the scores (the EBM's own table is not copied), V of every state, and
    log p_ref where that is more than a constant for each depth; q* is put together from them.

    Attributes:
        ebm: what was solved.
        log_z: log Z(x) of every prompt, (P,), float64, nats.
        mode: ``"exact-tree"``.
    """

    mode = "exact-tree"
    logits_are_values = True

    def __init__(
        self,
        ebm: EBM,
        scores: Float[Tensor, "P N"],
        v: Sequence[Float[Tensor, "P n"]],
        log_ref: Sequence[float] | Sequence[Float[Tensor, "P n A"]],
        log_z: Float[Tensor, "P"],
    ) -> None:
        self.ebm, self.space, self.prompts = ebm, ebm.space, ebm.prompts
        self.scores, self.v, self.log_ref = scores, list(v), list(log_ref)
        self.log_z = log_z

    @property
    def device(self) -> torch.device:
        return self.scores.device

    @property
    def forbids(self) -> bool:
        """Whether some action has q* = -inf (where the space allows it)."""
        return self.ebm.forbids

    # By rows of a depth ---------------------------------------------------------------------

    def q_rows(self, depth: int, rows: Rows, prompt: int | Tensor = 0) -> Float[Tensor, "n A"]:
        """q* of some prefixes of one depth, float64; ``prompt`` one for all, or one each."""
        space = self.space
        if depth == space.max_length - 1:
            q = self._ending(depth, rows, prompt)
        else:
            children = _below(rows, space.branching)
            each = prompt
            if isinstance(prompt, Tensor):
                each = prompt.repeat_interleave(space.branching)
            q = space.spread(self.v[depth + 1][each, children].double(), fill=0.0)
            if space.eos_id is not None:
                q[:, space.eos_id] = self._ending(depth, rows, prompt)[:, space.eos_id]
        log_ref = self.log_ref[depth]
        if isinstance(log_ref, Tensor):
            return q + log_ref[prompt, rows].double()
        return q + log_ref

    def reward_rows(self, depth: int, rows: Rows, prompt: int = 0) -> Float[Tensor, "n A"]:
        """R of the responses that end with each action at some prefixes; 0 where none ends."""
        space = self.space
        if space.eos_id is None:
            if depth < space.max_length - 1:
                return torch.zeros(1, 1, device=self.device, dtype=torch.float64)
            return self.scores[prompt, _below(rows, space.vocab_size)].double().view(
                -1, space.vocab_size
            )
        offset = space.state_offset(depth)
        if isinstance(rows, slice):
            rows = slice(rows.start + offset, rows.stop + offset)
        else:
            rows = rows + offset
        end = self.scores[prompt, rows].double()
        table = torch.zeros(len(end), space.vocab_size, dtype=torch.float64, device=end.device)
        table[:, space.eos_id] = end
        return table

    def _ending(self, depth: int, rows: Rows, prompt: int | Tensor) -> Tensor:
        """R / beta of ending actions at a depth; -inf off EOS at the last one of EOS mode."""
        space = self.space
        if space.eos_id is None:
            each = prompt
            if isinstance(prompt, Tensor):
                each = prompt.repeat_interleave(space.vocab_size)
            scores = self.scores[each, _below(rows, space.vocab_size)]
            return scores.double().view(-1, space.vocab_size) / self.ebm.beta
        offset = space.state_offset(depth)
        if isinstance(rows, slice):
            index: Rows = slice(rows.start + offset, rows.stop + offset)
        else:
            index = rows + offset
        end = self.scores[prompt, index].double() / self.ebm.beta
        table = torch.full((len(end), space.vocab_size), -torch.inf, dtype=end.dtype).to(end.device)
        table[:, space.eos_id] = end
        return table

    def tables(self) -> list[Float[Tensor, "P n A"]]:
        """q* of all prefixes, by depth: (P, branching**t, A) float64."""
        return [
            torch.stack(
                [
                    self.q_rows(t, slice(0, self.space.num_prefixes(t)), p)
                    for p in range(self.ebm.num_prompts)
                ]
            )
            for t in range(self.space.max_length)
        ]

    # As a policy ------------------------------------------------------------------------------

    def logits(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T A"]:
        """Exact q* before every token, float64; ``-inf`` where forbidden."""
        prompt_ids = resolve_prompt_ids(
            len(tokens), prompt_ids, self.ebm.num_prompts, tokens.device
        )
        index = self.space.prefix_indices(tokens)
        rows = [self.q_rows(t, index[:, t], prompt_ids) for t in range(self.space.max_length)]
        return torch.stack(rows, dim=1)

    def start(self, prompt_ids: Int64[Tensor, "B"]) -> _Decoding:
        """State of a decoding: nothing read yet."""
        return _Decoding(prompt_ids, torch.zeros_like(prompt_ids))

    def step(
        self, state: _Decoding, tokens: Int64[Tensor, "B"] | None
    ) -> Float[Tensor, "B A"]:
        """q* at the next position, after one more token of each row."""
        if tokens is not None:
            state.index = state.index * self.space.branching + self.space.rank(tokens)
            state.depth += 1
        return self.q_rows(state.depth, state.index, state.prompt_ids)

    def log_prob(
        self,
        tokens: Int64[Tensor, "B T"],
        lengths: Int64[Tensor, "B"] | None = None,
        prompt_ids: Int64[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B"]:
        """Exact log p*(y|x), float64, nats; ``-inf`` at impossible responses.

        Raises:
            ValueError: tokens, lengths or prompt ids that are none of the space's.
        """
        lengths = self.space.check(tokens, lengths)
        prompt_ids = resolve_prompt_ids(
            len(tokens), prompt_ids, self.ebm.num_prompts, tokens.device
        )
        return log_prob(self, self.space, tokens, lengths, prompt_ids)

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        prompt_ids: Int64[Tensor, "n"] | None = None,
    ) -> Batch:
        """Exact samples of p*; with several prompts, ``prompt_ids`` says which each answers.

        Raises:
            ValueError: prompt ids missing, of another length than n, or out of range.
        """
        return sample(self, self.space, n, generator, prompt_ids, self.ebm.num_prompts)


def _below(rows: Rows, width: int) -> Rows:
    """Where the ``width`` children of each row stand one level down."""
    if isinstance(rows, slice):
        return slice(rows.start * width, rows.stop * width)
    return (rows[:, None] * width + torch.arange(width, device=rows.device)).flatten()
