"""The exact solution on the prefix tree: a policy whose logits are q*."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.ebm import EBM
from rl_ebm.exact.base import Rows
from rl_ebm.policies.scoring import log_prob, resolve_prompt_ids, sample
from rl_ebm.soft_bellman import backup
from rl_ebm.tokens import Batch


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
        v: Sequence[Tensor],
        log_ref: Sequence[float] | Sequence[Tensor],
        log_z: Float[Tensor, "P"],
    ) -> None:
        self.ebm, self.space, self.prompts = ebm, ebm.space, ebm.prompts
        self.scores, self.v, self.log_ref = scores, list(v), log_ref
        self.log_z = log_z

    @property
    def device(self) -> torch.device:
        return self.scores.device

    @property
    def forbids(self) -> bool:
        """Whether some action has q* = -inf (where the space allows it)."""
        if self.ebm.forbids or bool(torch.isneginf(self.scores).any()):
            return True
        mask = self.space.action_mask(self.device)
        return any(
            isinstance(table, Tensor) and bool((torch.isneginf(table) & mask[t]).any())
            for t, table in enumerate(self.log_ref)
        )

    @property
    def forbids_responses(self) -> bool:
        """Whether some response that the reference allows has reward -inf."""
        return self.ebm.reward_model.forbids or bool(torch.isneginf(self.scores).any())

    # By rows of a depth ---------------------------------------------------------------------

    def q_rows(self, depth: int, rows: Rows, prompt: int | Tensor = 0) -> Float[Tensor, "n A"]:
        """q* of some prefixes of one depth, float64; ``prompt`` one for all, or one each."""
        r = self.r_rows(depth, rows, prompt)
        if depth == self.space.max_length - 1:
            return r
        width = self.space.branching
        v_next = self.v[depth + 1][_each(prompt, width), _below(rows, width)]
        return backup(r, v_next.double(), self.space)

    def r_rows(self, depth: int, rows: Rows, prompt: int | Tensor = 0) -> Float[Tensor, "n A"]:
        """r of some prefixes: log p_ref, plus R / beta where an action ends the response."""
        log_ref = self.log_ref[depth]
        if isinstance(log_ref, Tensor):
            log_ref = log_ref[prompt, rows].double()
        r = self.reward_rows(depth, rows, prompt) / self.ebm.beta + log_ref
        if self.space.eos_id is not None and depth == self.space.max_length - 1:
            r = r.masked_fill(~self.space.action_mask(r.device)[-1], -torch.inf)
        return r

    def reward_rows(self, depth: int, rows: Rows, prompt: int | Tensor = 0) -> Float[Tensor, "n A"]:
        """R of the response that ends with each action at some prefixes; 0 where none ends."""
        space = self.space
        if space.eos_id is None and depth == space.max_length - 1:
            scores = self.scores[_each(prompt, space.vocab_size), _below(rows, space.vocab_size)]
            return scores.double().view(-1, space.vocab_size)
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        reward = torch.zeros(count, space.vocab_size, dtype=torch.float64, device=self.device)
        if space.eos_id is not None:
            first = space.state_offset(depth)
            if isinstance(rows, slice):
                rows = slice(rows.start + first, rows.stop + first)
            else:
                rows = rows + first
            reward[:, space.eos_id] = self.scores[prompt, rows].double()
        return reward

    def tables(self) -> list[Tensor]:
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
        self.space.check_kind(tokens)
        prompt_ids = resolve_prompt_ids(
            len(tokens), prompt_ids, self.ebm.num_prompts, tokens.device
        )
        index = self.space.prefix_indices(tokens)
        rows = [self.q_rows(t, index[:, t], prompt_ids) for t in range(self.space.max_length)]
        return torch.stack(rows, dim=1)

    def start(self, prompt_ids: Int64[Tensor, "B"]) -> _Decoding:
        """State of a decoding: nothing read yet."""
        return _Decoding(prompt_ids, torch.zeros_like(prompt_ids))

    def step(self, state: _Decoding, tokens: Int64[Tensor, "B"] | None) -> Float[Tensor, "B A"]:
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
        prompt_ids = resolve_prompt_ids(n, prompt_ids, self.ebm.num_prompts, self.device)
        return sample(self, self.space, n, generator, prompt_ids)


def _each(prompt: int | Tensor, width: int) -> int | Tensor:
    """The prompt of each of the ``width`` children of each row."""
    return prompt if isinstance(prompt, int) else prompt.repeat_interleave(width)


def _below(rows: Rows, width: int) -> Rows:
    """Where the ``width`` children of each row stand one level down."""
    if isinstance(rows, slice):
        return slice(rows.start * width, rows.stop * width)
    return (rows[:, None] * width + torch.arange(width, device=rows.device)).flatten()
