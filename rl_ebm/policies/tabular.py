"""Policies without a network: one logit row for each prefix, and the uniform one."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from rl_ebm.automata import Machine
from rl_ebm.messages.arguments import Number, check_generator, finite, shown
from rl_ebm.messages.words import bytes_text, count_text
from rl_ebm.networks.prefix_tree import PrefixTree
from rl_ebm.policies.automaton import uniform_machine
from rl_ebm.policies.base import prompt_rows
from rl_ebm.soft_bellman import Tables, check_tables
from rl_ebm.tokens import TokenSpace, check_space
from rl_ebm.tokens.prompts import GivenPrompts, check_prompts


class Tabular(nn.Module):
    """One row of logits for each prompt and prefix: the function space of the paper.

    Args:
        space: the responses; must be small enough to list its states.
        prompts: those of the EBM; None without prompts.
        scale: standard deviation of the random start.
        generator: for the random start; None for torch's global generator.
        dtype: float64 for ground truth, float32 for learners.
        logits_are_values: whether its raw logits are q.
    """

    def __init__(
        self,
        space: TokenSpace,
        prompts: GivenPrompts | None = None,
        scale: Number = 0.1,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        logits_are_values: bool = False,
    ) -> None:
        super().__init__()
        check_space(space)
        self.space = space
        self.prompts = None if prompts is None else check_prompts(prompts)
        self.logits_are_values = logits_are_values
        check_generator(generator, torch.device("cpu"))
        scale = finite("scale", scale, 0.0)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {shown(dtype)}")
        shape = (len(self.prompts or [[]]), space.num_states, space.vocab_size)
        check_table_size(shape)
        self.table = nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=dtype))

    @classmethod
    def from_tables(
        cls,
        q: Tables,
        space: TokenSpace,
        prompts: GivenPrompts | None = None,
        logits_are_values: bool = False,
    ) -> Tabular:
        """The policy with given logits: per-depth tables, (branching**t, A) or (P, ..., A)."""
        check_space(space)
        check_tables(space, q=q)
        rows = torch.cat([t if t.ndim == 3 else t[None] for t in q], dim=1)
        policy = cls(space, prompts, dtype=rows.dtype, logits_are_values=logits_are_values)
        if policy.table.shape != rows.shape:
            raise ValueError(f"q is for {rows.shape[0]} prompts, expected {policy.table.shape[0]}")
        policy.table = nn.Parameter(rows.detach().clone())
        return policy

    @property
    def forbids(self) -> bool:
        """Whether some action that the space allows has logit ``-inf``."""
        allowed = self.space.state_action_mask(self.table.device)
        return bool((torch.isneginf(self.table) & allowed).any())

    def tables(self) -> list[Tensor]:
        """The logits by depth: entry t is (P, branching**t, A)."""
        sizes = [self.space.num_prefixes(t) for t in range(self.space.max_length)]
        return list(self.table.split(sizes, dim=1))

    def logits(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T A"]:
        """The rows of all prefixes of each sequence."""
        tokens = self.space.check_tokens(tokens)
        ids = self.space.state_ids(tokens)
        if self.prompts is not None:
            rows = prompt_rows(self, len(tokens), prompt_ids)
            ids = ids + rows[:, None] * self.space.num_states
        # embedding: its backward is a parallel scatter-add, that of indexing is not.
        return F.embedding(ids, self.table.flatten(0, 1))

    def tree_logits(
        self, tree: PrefixTree, prompt_ids: Int64[Tensor, "P"]
    ) -> Float[Tensor, "P N A"]:
        """The rows of all nodes."""
        rows = prompt_rows(self, len(prompt_ids), prompt_ids)
        rank = self.space.rank(tree.tokens)
        index = torch.zeros_like(tree.tokens)
        for level in range(1, tree.ancestors.shape[1]):
            step = index * self.space.branching + rank[tree.ancestors[:, level]]
            index = torch.where(tree.depth >= level, step, index)
        ids = index + self.space.state_offsets(index.device)[tree.depth]
        return self.table[rows][:, ids]


MAX_TABLE = 2**30
"""logits of all prefixes and prompts, at most"""


def check_table_size(shape: tuple[int, int, int]) -> None:
    """Raise ValueError, with the count and the bytes, where a table is too large for any memory."""
    prompts, states, actions = shape
    size = prompts * states * actions
    if size > MAX_TABLE:
        raise ValueError(
            f"a table has a row for each prompt and prefix, and {count_text(prompts * states)} of "
            f"them with {actions} logits take {bytes_text(4 * size)} or more: make vocab_size or "
            "max_length smaller, or use a Transformer"
        )


class Uniform:
    """Equal logits everywhere: uniform over the allowed actions of each state."""

    forbids = False

    def __init__(self, space: TokenSpace) -> None:
        check_space(space)
        self.space, self.device = space, torch.device("cpu")

    def to(self, device: torch.device | str) -> Uniform:
        """The same, whose automaton is elsewhere."""
        moved = Uniform(self.space)
        moved.device = torch.device(device)
        return moved

    def logits(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T A"]:
        """Zeros."""
        self.space.check_kind(tokens)
        return torch.zeros(*tokens.shape, self.space.vocab_size, device=tokens.device)

    def log_probs(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T"]:
        """log pi of tokens that are allowed, float64."""
        return _log_uniform(self.space, str(tokens.device)).expand(tokens.shape)

    @property
    def machine(self) -> Machine:
        """The automaton of every position but a last one that is forced."""
        return uniform_machine(self.space).to(self.device)

    def log_ref_constants(self) -> list[float]:
        """log pi of every allowed action by depth: what makes solving cheap."""
        return _log_uniform(self.space, "cpu").tolist()


# Cached by device: a GPU would be waited for while it is copied.
@lru_cache(maxsize=64)
def _log_uniform(space: TokenSpace, device: str) -> Float[Tensor, "T"]:
    return (-space.action_mask().sum(1).double().log()).to(device)
