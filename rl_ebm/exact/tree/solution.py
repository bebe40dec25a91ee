"""The exact solution on the prefix tree: a policy whose logits are q*."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.ebm import EBM
from rl_ebm.exact.base import Rows
from rl_ebm.exact.tree.backup import join, split
from rl_ebm.policies.base import resolve_prompt_ids
from rl_ebm.policies.decoding import check_draws, sample
from rl_ebm.soft_bellman import backup, gather_tokens, log_policy
from rl_ebm.tokens import Batch, length_mask

_ALL = slice(None)


@dataclass
class _Decoding:
    prompt_ids: Tensor
    index: Tensor
    depth: int = 0


class TreeSolution:
    r"""q* = M(r) of an EBM, by table look-up: arXiv 2512.15605, Eq. (6), Prop. 1.

    What it keeps is the scores (the EBM's own table is not copied), V of every state, and
    log p_ref where that is more than a constant for each depth; q* is put together from them.
    Where R / beta is large (:data:`rl_ebm.exact.tree.backup.PLAIN`) V is kept in float64 and in two
    parts, R / beta of a likely response below the state and the rest: of numbers near 1e9 only
    7 digits are left after the point, of their differences all of them.

    Attributes:
        ebm: what was solved.
        log_z: log Z(x) of every prompt, (P,), float64, nats.
        paid: by depth R of a likely response below each prefix, (P, branching**t), where
            R / beta is large; else None.
        reduced_v: by depth V of each prefix, less paid / beta.
        mode: ``"exact-tree"``.
    """

    mode = "exact-tree"
    lists_all = True
    logits_are_values = True

    def __init__(
        self,
        ebm: EBM,
        scores: Float[Tensor, "P N"],
        v: Sequence[Tensor],
        log_ref: Sequence[float] | Sequence[Tensor],
        log_z: Float[Tensor, "P"],
        paid: list[Tensor] | None = None,
    ) -> None:
        self.ebm, self.space, self.prompts = ebm, ebm.space, ebm.prompts
        self.scores, self.reduced_v, self.log_ref = scores, list(v), log_ref
        self.log_z, self.paid = log_z, paid

    @property
    def v(self) -> list[Tensor]:
        """V of all prefixes by depth, (P, branching**t), in the dtype of the scores."""
        return [self._v(t).to(self.scores.dtype) for t in range(self.space.max_length)]

    def _v(self, depth: int, prompt: Any = _ALL, rows: Rows = _ALL) -> Tensor:
        v = self.reduced_v[depth][prompt, rows].double()
        if self.paid is None:
            return v
        return v + self.paid[depth][prompt, rows].double() / self.ebm.beta

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

    def summary(self, top: int = 10, prompt: int = 0) -> None:
        """None: :func:`rl_ebm.exact.summarise` lists the tree."""

    # By rows of a depth ---------------------------------------------------------------------

    def q_rows(self, depth: int, rows: Rows, prompt: int | Tensor = 0) -> Float[Tensor, "n A"]:
        """q* of some prefixes of one depth, float64; ``prompt`` one for all, or one each."""
        r = self.r_rows(depth, rows, prompt)
        if depth == self.space.max_length - 1:
            return r
        width = self.space.branching
        v_next = self._v(depth + 1, _each(prompt, width), _below(rows, width))
        return backup(r, v_next, self.space)

    def reduced_q_rows(
        self, depth: int, rows: Rows, prompt: int | Tensor = 0
    ) -> Float[Tensor, "n A"]:
        """q* less a constant of each prefix: the same differences, with all of their digits."""
        return self.reduced_rows(depth, rows, prompt)[1]

    def reduced_rows(
        self, depth: int, rows: Rows, prompt: int | Tensor = 0
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n A"]]:
        """What is taken off, in reward units, and what is left."""
        if self.paid is None:
            q = self.q_rows(depth, rows, prompt)
            return q.new_zeros(len(q)), q
        paid, w = split(self.reward_rows(depth, rows, prompt))
        w = w + self.log_ref_rows(depth, rows, prompt)
        if depth < self.space.max_length - 1:
            # An action pays R where it ends the response, else what follows does.
            width = self.space.branching
            below = _each(prompt, width), _below(rows, width)
            paid_next, v_next = self.paid[depth + 1][below], self.reduced_v[depth + 1][below]
            paid = paid + self.space.spread(paid_next.double(), fill=0.0)
            w = w + self.space.spread(v_next, fill=0.0)
        return join(paid, w, self.ebm.beta)

    def r_rows(self, depth: int, rows: Rows, prompt: int | Tensor = 0) -> Float[Tensor, "n A"]:
        """r of some prefixes: log p_ref, plus R / beta where an action ends the response."""
        reward = self.reward_rows(depth, rows, prompt)
        return self._end(depth, reward / self.ebm.beta + self._log_ref(depth, rows, prompt))

    def log_ref_rows(
        self, depth: int, rows: Rows, prompt: int | Tensor = 0
    ) -> Float[Tensor, "n A"]:
        """log p_ref of some prefixes; 0 everywhere for the counting measure."""
        zero = torch.zeros_like(self.reward_rows(depth, rows, prompt))
        return self._end(depth, zero + self._log_ref(depth, rows, prompt))

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

    def _log_ref(self, depth: int, rows: Rows, prompt: int | Tensor) -> float | Tensor:
        log_ref = self.log_ref[depth]
        return log_ref[prompt, rows].double() if isinstance(log_ref, Tensor) else log_ref

    def _end(self, depth: int, r: Tensor) -> Tensor:
        """At the last depth of EOS mode only EOS is allowed."""
        if self.space.eos_id is None or depth < self.space.max_length - 1:
            return r
        return r.masked_fill(~self.space.action_mask(r.device)[-1], -torch.inf)

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
        """Exact q* before every token, float64; ``-inf`` where forbidden.

        Raises:
            TypeError: tokens that are no tensor of integers.
            ValueError: tokens of another shape or out of range, or prompt ids that are.
        """
        tokens = self.space.check_tokens(tokens)
        return self._rows(self.q_rows, tokens, prompt_ids)

    def start(self, prompt_ids: Int64[Tensor, "B"]) -> _Decoding:
        """State of a decoding: nothing read yet."""
        prompt_ids = prompt_ids.long()
        return _Decoding(prompt_ids, torch.zeros_like(prompt_ids))

    def step(self, state: _Decoding, tokens: Int64[Tensor, "B"] | None) -> Float[Tensor, "B A"]:
        """q* at the next position less a constant of each row, after one more token of each."""
        if tokens is not None:
            state.index = state.index * self.space.branching + self.space.rank(tokens)
            state.depth += 1
        return self.reduced_q_rows(state.depth, state.index, state.prompt_ids)

    def log_probs(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T"]:
        """log p* of each token after those before it, float64."""
        tokens = self.space.check_tokens(tokens)
        return gather_tokens(
            log_policy(self._rows(self.reduced_q_rows, tokens, prompt_ids)), tokens
        )

    def _rows(
        self,
        of: Callable[[int, Rows, Tensor], Tensor],
        tokens: Tensor,
        prompt_ids: Tensor | None,
    ) -> Tensor:
        """What a method gives for the prefixes of some sequences, (B, T, A)."""
        prompt_ids = resolve_prompt_ids(
            len(tokens), prompt_ids, self.ebm.num_prompts, tokens.device
        )
        index = self.space.prefix_indices(tokens)
        rows = [of(t, index[:, t], prompt_ids) for t in range(self.space.max_length)]
        return torch.stack(rows, dim=1)

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
        # What stands past the end is never read: it may be no token at all.
        real = length_mask(lengths, self.space.max_length)
        each = self.log_probs(tokens.long().masked_fill(~real, 0), prompt_ids)
        return each.masked_fill(~real, 0.0).sum(1)

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        prompt_ids: Int64[Tensor, "n"] | None = None,
    ) -> Batch:
        """Exact samples of p*; with several prompts, ``prompt_ids`` says which each answers.

        Raises:
            TypeError: an n that is no integer.
            ValueError: a negative n; prompt ids missing, of another length than n, or out of range.
        """
        n = check_draws(n, self.space, self.device)
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
