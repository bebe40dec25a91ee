r"""Token spaces, batches of responses, and the order in which both are enumerated.

The symbols are those of :mod:`rl_ebm.tokens`; ``branching`` is the number of non-EOS tokens.

**Fixed-length mode** (``eos_id=None``): all ``A**T`` sequences. **EOS mode**: responses end
with EOS, have at most ``T`` tokens with it, and at the last position only EOS is allowed
(arXiv 2512.15605, Prop. 4; the response that is EOS alone counts).

A *state* is a prefix without EOS. The prefix of depth ``t`` has the index
``sum_i rank(tokens[i]) * branching**(t-1-i)``, with ``rank(a) = a``, less one for
``a > eos_id``. Sequences are enumerated by length, then lexicographically: in fixed-length
mode plainly lexicographically, in EOS mode the response of length ``t + 1`` that ends state
``s`` stands at ``s`` 's place among all states, shallow ones first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from rl_ebm.messages.arguments import Int, flag, holds_ids, ids_tensor, is_whole, shown, whole

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Batch:
    """Responses, with the prompt each answers and, once it is known, the reward of each."""

    tokens: Int64[Tensor, "B T"]
    lengths: Int64[Tensor, "B"]
    prompt_ids: Int64[Tensor, "B"]
    reward: Shaped[Tensor, "B"] | None = None

    def __post_init__(self) -> None:
        # Ids of any size become int64: small ones overflow, and uint8 as an index is a mask.
        for name in ("tokens", "lengths", "prompt_ids"):
            ids = getattr(self, name)
            if holds_ids(ids):
                object.__setattr__(self, name, ids.long())

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def mask(self) -> Bool[Tensor, "B T"]:
        """True at real tokens; from the lengths, never from pad ids."""
        return length_mask(self.lengths, self.tokens.shape[1])

    def rewards(self) -> Shaped[Tensor, "B"]:
        """The reward of each; ValueError where they are not known yet."""
        if self.reward is None:
            raise ValueError("the batch has no rewards: call ebm.score(batch) first")
        return self.reward

    def take(self, rows: Int64[Tensor, "N"]) -> Batch:
        """These rows of the batch."""
        reward = None if self.reward is None else self.reward[rows]
        return Batch(self.tokens[rows], self.lengths[rows], self.prompt_ids[rows], reward)

    def clean(self) -> Batch:
        """The batch with token 0 past the end of each response: what stands there is not read."""
        return replace(self, tokens=self.tokens.masked_fill(~self.mask, 0))

    def with_reward(self, reward: Shaped[Tensor, "B"]) -> Batch:
        return replace(self, reward=reward)

    def to(self, device: torch.device | str) -> Batch:
        reward = None if self.reward is None else self.reward.to(device)
        return Batch(
            self.tokens.to(device), self.lengths.to(device), self.prompt_ids.to(device), reward
        )

    @staticmethod
    def cat(parts: Sequence[Batch]) -> Batch:
        """Rows of all parts, one after the other; rewards only where every part has them."""
        rewards = [p.reward for p in parts if p.reward is not None]
        return Batch(
            torch.cat([p.tokens for p in parts]),
            torch.cat([p.lengths for p in parts]),
            torch.cat([p.prompt_ids for p in parts]),
            torch.cat(rewards) if len(rewards) == len(parts) else None,
        )


def length_mask(lengths: Int64[Tensor, "B"], max_length: int) -> Bool[Tensor, "B T"]:
    """True at the first ``lengths`` columns of each row."""
    return torch.arange(max_length, device=lengths.device) < lengths.long()[:, None]


@dataclass(frozen=True)
class TokenSpace:
    """All responses over a vocabulary, up to a length; the rules of the token MDP.

    Args:
        vocab_size: A, the number of token ids, EOS included; at least 2.
        max_length: T, at least 1; in EOS mode it counts the EOS.
        eos_id: the id that ends a response; None for responses of exactly T tokens.

    Raises:
        ValueError: a size out of range, or an ``eos_id`` that is no token id.
    """

    vocab_size: Int
    max_length: Int
    eos_id: Int | None = None

    def __post_init__(self) -> None:
        for name, least, most in (("vocab_size", 2, 2**31), ("max_length", 1, 2**20)):
            value = whole(name, getattr(self, name), least)
            object.__setattr__(self, name, whole(name, value, least, most))
        eos = self.eos_id
        if eos is None:
            return
        if not (is_whole(eos) and 0 <= eos < self.vocab_size):
            raise ValueError(
                f"eos_id must be a token id in [0, {self.vocab_size}), or None for responses "
                f"of fixed length, got {shown(eos)}"
            )
        object.__setattr__(self, "eos_id", int(eos))

    # Sizes --------------------------------------------------------------------------------

    @property
    def branching(self) -> int:
        """Number of non-EOS tokens: how many states follow a state."""
        return self.vocab_size - (self.eos_id is not None)

    @property
    def num_sequences(self) -> int:
        """How many responses there are: A^T, or sum of branching^t for t < T in EOS mode."""
        if self.eos_id is None:
            count: int = self.vocab_size**self.max_length
            return count
        return self.num_states

    @property
    def num_states(self) -> int:
        """How many prefixes there are at which an action is taken."""
        return self.state_offset(self.max_length)

    def num_prefixes(self, depth: int) -> int:
        """How many prefixes have ``depth`` tokens."""
        count: int = self.branching**depth
        return count

    def state_offset(self, depth: int) -> int:
        """How many states are shallower than ``depth``: where that level starts."""
        b = self.branching
        return depth if b == 1 else int(b**depth - 1) // (b - 1)

    @property
    def num_decisions(self) -> int:
        """Most unforced decisions in a response: T, or T - 1 in EOS mode."""
        return self.max_length - (self.eos_id is not None)

    # Rules of the token MDP, shared by environments and sampler; in uint8, 300 would equal 44 ---

    def action_mask(self, device: torch.device | str = "cpu") -> Bool[Tensor, "T A"]:
        """True where an action is allowed at a position. Shared: do not write into it."""
        return _action_mask(self, str(device))

    def state_action_mask(self, device: torch.device | str = "cpu") -> Bool[Tensor, "S A"]:
        """:meth:`action_mask` at the depth of every state, shallow ones first. Shared as well."""
        return _state_action_mask(self, str(device))

    def replaces(self, actions: Int64[Tensor, "B"], t: Int64[Tensor, "B"]) -> Bool[Tensor, "B"]:
        """True where an action at position ``t`` is executed as EOS instead (EOS mode, last t)."""
        if self.eos_id is None:
            return torch.zeros_like(actions, dtype=torch.bool)
        return (t.long() == self.max_length - 1) & (actions.long() != self.eos_id)

    def ends(self, actions: Int64[Tensor, "B"], t: Int64[Tensor, "B"]) -> Bool[Tensor, "B"]:
        """True where an action at position ``t`` ends the response."""
        last = t.long() == self.max_length - 1
        return last if self.eos_id is None else last | (actions.long() == self.eos_id)

    # Enumeration --------------------------------------------------------------------------

    def rank(self, tokens: Int64[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
        """Place of each non-EOS token among the non-EOS tokens; EOS itself gets a legal one."""
        tokens = tokens.long()
        if self.eos_id is None:
            return tokens
        return (tokens - (tokens > self.eos_id).long()).clamp(max=self.branching - 1)

    def unrank(self, rank: Int64[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
        """Inverse of :meth:`rank` on non-EOS tokens."""
        rank = rank.long()
        return rank if self.eos_id is None else rank + (rank >= self.eos_id).long()

    def prefix_indices(self, tokens: Int64[Tensor, "B T"]) -> Int64[Tensor, "B T"]:
        """Column t: index of ``tokens[:, :t]`` among the prefixes of depth t.

        What stands past the end of a response gives an index that is legal and means nothing.
        """
        tokens = ids_tensor("tokens", tokens, 2)
        index = torch.zeros_like(tokens)
        for t in range(1, tokens.shape[1]):
            index[:, t] = index[:, t - 1] * self.branching + self.rank(tokens[:, t - 1])
        return index

    def state_ids(self, tokens: Int64[Tensor, "B T"]) -> Int64[Tensor, "B T"]:
        """Column t: id of the state ``tokens[:, :t]`` among all states, shallow ones first."""
        return self.prefix_indices(tokens) + self.state_offsets(tokens.device)

    def state_offsets(self, device: torch.device | str = "cpu") -> Int64[Tensor, "T"]:
        """:meth:`state_offset` of every depth. Shared: do not write into it."""
        return _state_offsets(self, str(device))

    def prefixes(
        self, depth: int, start: int = 0, stop: int | None = None, device: str = "cpu"
    ) -> Int64[Tensor, "n depth"]:
        """Tokens of the prefixes ``start`` to ``stop`` of one depth, in enumeration order."""
        stop = self.num_prefixes(depth) if stop is None else stop
        index = torch.arange(start, stop, device=device)
        powers = [self.branching**i for i in reversed(range(depth))]
        digits = [index // power % self.branching for power in powers]
        if not digits:
            return torch.empty(stop - start, 0, dtype=torch.int64, device=device)
        return self.unrank(torch.stack(digits, dim=1))

    def sequence_indices(
        self, tokens: Int64[Tensor, "B T"], lengths: Int64[Tensor, "B"]
    ) -> Int64[Tensor, "B"]:
        """Place of each response in enumeration order."""
        tokens = ids_tensor("tokens", tokens, 2)
        last = (ids_tensor("lengths", lengths, 1) - 1)[:, None]
        if self.eos_id is None:
            prefix = self.prefix_indices(tokens).gather(1, last)
            return (prefix * self.vocab_size + tokens.gather(1, last))[:, 0]
        return self.state_ids(tokens).gather(1, last)[:, 0]

    def sequences(
        self, start: int = 0, stop: int | None = None, device: str = "cpu"
    ) -> tuple[Int64[Tensor, "n T"], Int64[Tensor, "n"]]:
        """Tokens (0 past the end) and lengths of responses, in enumeration order."""
        stop = self.num_sequences if stop is None else stop
        if self.eos_id is None:
            tokens = self.prefixes(self.max_length, start, stop, device)
            return tokens, torch.full((stop - start,), self.max_length, device=device)
        parts = [torch.empty(0, self.max_length, dtype=torch.int64, device=device)]
        lengths = [torch.empty(0, dtype=torch.int64, device=device)]
        for t in range(self.max_length):
            first, last = self.state_offset(t), self.state_offset(t + 1)
            a, b = max(start, first), min(stop, last)
            if a >= b:
                continue
            block = torch.zeros(b - a, self.max_length, dtype=torch.int64, device=device)
            block[:, :t] = self.prefixes(t, a - first, b - first, device)
            block[:, t] = self.eos_id
            parts.append(block)
            lengths.append(torch.full((b - a,), t + 1, device=device))
        return torch.cat(parts), torch.cat(lengths)

    def spread(self, children: Shaped[Tensor, "... m"], fill: float) -> Shaped[Tensor, "... n A"]:
        """Values of the states of depth t + 1 as columns of depth t, ``fill`` in EOS's column."""
        rows: Tensor = children.unflatten(-1, (-1, self.branching))
        if self.eos_id is None:
            return rows
        eos = rows.new_full((*rows.shape[:-1], 1), fill)
        return torch.cat([rows[..., : self.eos_id], eos, rows[..., self.eos_id :]], dim=-1)

    def gather_children(self, rows: Shaped[Tensor, "... n A"]) -> Shaped[Tensor, "... m"]:
        """Inverse of :meth:`spread`: the columns that lead to a state, flattened."""
        if self.eos_id is not None:
            rows = torch.cat([rows[..., : self.eos_id], rows[..., self.eos_id + 1 :]], dim=-1)
        return rows.flatten(-2)

    # Checks at the door -------------------------------------------------------------------

    def check_tokens(self, tokens: object, fewer: bool = False) -> Int64[Tensor, "B w"]:
        """Rows of token ids, as :meth:`check_kind`, and none of them out of range."""
        checked = self.check_kind(tokens, fewer)
        if checked.device.type != "cpu" or not len(checked):
            return checked  # a GPU would be waited for: there the look-up that uses them checks
        ids = checked.detach().numpy()
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(
                f"token ids must be in [0, {self.vocab_size}), got {ids.min()} to {ids.max()}: "
                "past the end of a response any legal id will do, such as 0"
            )
        return checked

    def check(
        self,
        tokens: Int64[Tensor, "..."],
        lengths: Int64[Tensor, "..."] | None = None,
    ) -> Int64[Tensor, "B"]:
        """Check responses and return their lengths (found from the first EOS where None).

        Raises:
            TypeError: no tensors.
            ValueError: wrong shape, a token id out of range, a length out of [1, T], a row
                without EOS, or one with something after it, in EOS mode.
        """
        t_max = self.max_length
        tokens = self.check_kind(tokens)
        lengths = None if lengths is None else ids_tensor("lengths", lengths, 1)
        n = tokens.shape[0]
        if lengths is not None and lengths.shape != (n,):
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected ({n},)")
        if lengths is None:
            lengths = self.find_lengths(tokens)
        if n == 0:
            return lengths
        if int(lengths.min()) < 1 or int(lengths.max()) > t_max:
            raise ValueError(
                f"lengths must be in [1, {t_max}], got {int(lengths.min())} to "
                f"{int(lengths.max())}; they count the EOS"
            )
        real = tokens[length_mask(lengths, t_max)]
        if int(real.min()) < 0 or int(real.max()) >= self.vocab_size:
            raise ValueError(
                f"token ids must be in [0, {self.vocab_size}), got {int(real.min())} to "
                f"{int(real.max())}"
            )
        if self.eos_id is None:
            if int(lengths.min()) < t_max:
                raise ValueError(f"without an EOS every length is {t_max}, got {lengths.tolist()}")
        elif not torch.equal(self.find_lengths(tokens, lengths), lengths):
            raise ValueError(
                f"in EOS mode a response ends with its first EOS (id {self.eos_id}), "
                "and a row disagrees with its length"
            )
        return lengths

    def check_kind(self, tokens: object, fewer: bool = False) -> Int64[Tensor, "B w"]:
        """What is (B, T) ids by its kind and shape, as int64, without reading an id.

        Args:
            fewer: whether fewer columns than T will do.

        Raises:
            TypeError: no tensor.
            ValueError: no integers, or another shape.
        """
        flag("fewer", fewer)
        ids, t_max = ids_tensor("tokens", tokens, 2), self.max_length
        if ids.ndim != 2 or not (1 <= ids.shape[1] <= t_max if fewer else ids.shape[1] == t_max):
            raise ValueError(f"tokens has shape {tuple(ids.shape)}, expected (B, {t_max})")
        return ids

    def find_lengths(
        self, tokens: Int64[Tensor, "B T"], lengths: Int64[Tensor, "B"] | None = None
    ) -> Int64[Tensor, "B"]:
        """Length of each row: up to its first EOS (among ``lengths`` columns), or T without EOS.

        Raises:
            ValueError: EOS mode, and a row has no EOS.
        """
        tokens = ids_tensor("tokens", tokens, 2)
        n = tokens.shape[0]
        if self.eos_id is None:
            return torch.full((n,), self.max_length, device=tokens.device)
        is_eos = tokens == self.eos_id
        if lengths is not None:
            is_eos = is_eos & length_mask(lengths, self.max_length)
        missing = ~is_eos.any(1)
        if bool(missing.any()):
            row = int(missing.nonzero()[0, 0])
            raise ValueError(
                f"row {row} has no EOS (id {self.eos_id}): in EOS mode every response ends with it"
            )
        return is_eos.long().argmax(1) + 1


@lru_cache(maxsize=64)
def _action_mask(space: TokenSpace, device: str) -> Tensor:
    mask = torch.ones(space.max_length, space.vocab_size, dtype=torch.bool, device=device)
    if space.eos_id is not None:
        mask[-1] = False
        mask[-1, space.eos_id] = True
    return mask


def check_space(space: object) -> None:
    """Raise TypeError unless something is a TokenSpace."""
    if not isinstance(space, TokenSpace):
        raise TypeError(f"space must be a TokenSpace, got {type(space).__name__}")


# Cached by device: a tensor made from a list would wait for a GPU.


@lru_cache(maxsize=64)
def _state_action_mask(space: TokenSpace, device: str) -> Tensor:
    sizes = [space.num_prefixes(t) for t in range(space.max_length)]
    return _action_mask(space, "cpu").repeat_interleave(torch.tensor(sizes), dim=0).to(device)


@lru_cache(maxsize=64)
def _state_offsets(space: TokenSpace, device: str) -> Tensor:
    return torch.tensor([space.state_offset(t) for t in range(space.max_length)], device=device)
