"""The exact solution on the prefix tree: a policy whose logits are q*."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.ebm import EBM
from rl_ebm.exact.base import Rows
from rl_ebm.policies.scoring import resolve_prompt_ids, sample
from rl_ebm.soft_bellman import backup, gather_tokens, log_policy
from rl_ebm.tokens import Batch, length_mask


@dataclass
class _Decoding:
    prompt_ids: Tensor
    index: Tensor
    depth: int = 0


class TreeSolution:
    r"""q* = M(r) of an EBM, by table look-up: arXiv 2512.15605, Eq. (6), Prop. 1.

    What it keeps is the scores (the EBM's own table is not copied), V of every state, and
    log p_ref where that is more than a constant for each depth; q* is put together from them.
    Where R / beta is large (:data:`rl_ebm.exact.backup.PLAIN`) V is kept in float64 and without
    the R / beta of a likely response, which is in every V of a prompt: of numbers near 1e9 only
    7 digits are left after the point, of their differences all of them.

    Attributes:
        ebm: what was solved.
        log_z: log Z(x) of every prompt, (P,), float64, nats.
        shift: what is taken off the rewards of every prompt, (P,), float64, reward units; 0 as
            a rule.
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
        shift: Float[Tensor, "P"],
    ) -> None:
        self.ebm, self.space, self.prompts = ebm, ebm.space, ebm.prompts
        self.scores, self.reduced_v, self.log_ref = scores, list(v), log_ref
        self.log_z, self.shift = log_z, shift

    @property
    def v(self) -> list[Tensor]:
        """V of all prefixes by depth, (P, branching**t), in the dtype of the scores."""
        offset = (self.shift / self.ebm.beta)[:, None]
        if not bool(offset.any()):
            return [v.to(self.scores.dtype) for v in self.reduced_v]
        return [(v + offset).to(self.scores.dtype) for v in self.reduced_v]

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
        return self.reduced_q_rows(depth, rows, prompt) + self._shift(prompt) / self.ebm.beta

    def reduced_q_rows(
        self, depth: int, rows: Rows, prompt: int | Tensor = 0
    ) -> Float[Tensor, "n A"]:
        """q* less :attr:`shift` / beta: the same differences, with all of their digits."""
        r = self.reduced_r_rows(depth, rows, prompt)
        if depth == self.space.max_length - 1:
            return r
        width = self.space.branching
        v_next = self.reduced_v[depth + 1][_each(prompt, width), _below(rows, width)]
        return backup(r, v_next.double(), self.space)

    def r_rows(self, depth: int, rows: Rows, prompt: int | Tensor = 0) -> Float[Tensor, "n A"]:
        """r of some prefixes: log p_ref, plus R / beta where an action ends the response."""
        reward = self.reward_rows(depth, rows, prompt)
        return self._end(depth, reward / self.ebm.beta + self._log_ref(depth, rows, prompt))

    def reduced_r_rows(
        self, depth: int, rows: Rows, prompt: int | Tensor = 0
    ) -> Float[Tensor, "n A"]:
        """r with R - :attr:`shift` in the place of R."""
        reward = self.reward_rows(depth, rows, prompt)
        # Only the actions that end a response are paid R, and R is what loses the shift.
        if self.space.eos_id is not None:
            reward[:, self.space.eos_id] -= self._shift(prompt).squeeze(-1)
        elif depth == self.space.max_length - 1:
            reward = reward - self._shift(prompt)
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

    def _shift(self, prompt: int | Tensor) -> Float[Tensor, "*n"]:
        """The shift of one prompt, or of each row's, (n, 1)."""
        return self.shift[prompt] if isinstance(prompt, int) else self.shift[prompt, None]

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
        """Exact q* before every token, float64; ``-inf`` where forbidden."""
        prompt_ids = resolve_prompt_ids(
            len(tokens), prompt_ids, self.ebm.num_prompts, tokens.device
        )
        offset = (self.shift / self.ebm.beta)[prompt_ids, None, None]
        return self._reduced_logits(tokens, prompt_ids) + offset

    def start(self, prompt_ids: Int64[Tensor, "B"]) -> _Decoding:
        """State of a decoding: nothing read yet."""
        return _Decoding(prompt_ids, torch.zeros_like(prompt_ids))

    def step(self, state: _Decoding, tokens: Int64[Tensor, "B"] | None) -> Float[Tensor, "B A"]:
        """q* at the next position less a constant of each prompt, after one more token each."""
        if tokens is not None:
            state.index = state.index * self.space.branching + self.space.rank(tokens)
            state.depth += 1
        return self.reduced_q_rows(state.depth, state.index, state.prompt_ids)

    def log_probs(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T"]:
        """log p* of each token after those before it, float64."""
        return gather_tokens(log_policy(self._reduced_logits(tokens, prompt_ids)), tokens)

    def _reduced_logits(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None
    ) -> Float[Tensor, "B T A"]:
        prompt_ids = resolve_prompt_ids(
            len(tokens), prompt_ids, self.ebm.num_prompts, tokens.device
        )
        index = self.space.prefix_indices(tokens)
        depths = range(self.space.max_length)
        rows = [self.reduced_q_rows(t, index[:, t], prompt_ids) for t in depths]
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
        each = self.log_probs(tokens.masked_fill(~real, 0), prompt_ids)
        return each.masked_fill(~real, 0.0).sum(1)

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
