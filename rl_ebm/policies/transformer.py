"""A causal Transformer policy: q of every prefix from one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from rl_ebm.backbone import (
    Attend,
    Backbone,
    Context,
    TransformerConfig,
    causal,
    gathered,
    masked,
)
from rl_ebm.prefix_tree import PrefixTree
from rl_ebm.tokens import TokenSpace


@dataclass
class Cache:
    """Keys and values of what a batch has read, for decoding one token at a time."""

    rows: Tensor  # (B,): which prompt each row answers
    keys: list[Tensor] = field(default_factory=list)  # by layer, (B, H, C + T, D / H)
    values: list[Tensor] = field(default_factory=list)
    used: int = 0
    mask: Tensor | None = None  # (B, 1, 1, C + T): False at the padding of prompts
    position: Tensor | None = None  # (B,): of the next token


class Transformer(nn.Module):
    """Causal Transformer over BOS, the prompt and the response.

    Args:
        space: the responses.
        config: sizes.
        prompts: what the policy answers, a list of int sequences; None without prompts.
        logits_are_values: whether its raw logits are trained to be q.
    """

    def __init__(
        self,
        space: TokenSpace,
        config: TransformerConfig | None = None,
        prompts: Sequence[Sequence[int]] | None = None,
        logits_are_values: bool = False,
    ) -> None:
        super().__init__()
        config = TransformerConfig() if config is None else config
        self.space, self.config = space, config
        self.prompts = None if prompts is None else [list(p) for p in prompts]
        self.logits_are_values = logits_are_values
        context = Context(self.prompts, space.vocab_size)
        self.context_width, self.context_padded = context.width, context.padded
        self.register_buffer("context_ids", context.ids, persistent=False)
        self.register_buffer("context_positions", context.positions, persistent=False)
        self.register_buffer("context_real", context.real, persistent=False)
        self.backbone = Backbone(context.num_ids, context.width + space.max_length, config)
        self.head = nn.Linear(config.dim, space.vocab_size)

    context_ids: Tensor
    context_positions: Tensor
    context_real: Tensor

    compiled = False
    """whether the two passes below go through torch.compile: the same numbers up to rounding"""

    # One pass over sequences -----------------------------------------------------------------

    def logits(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T A"]:
        """q before every token; row t reads the prompt and ``tokens[:, :t]``."""
        rows = self._prompt_rows(len(tokens), prompt_ids)
        out: Tensor = (_compiled_sequence_pass() if self.compiled else Transformer._sequence_pass)(
            self, tokens, rows
        )
        return out

    def _sequence_pass(self, tokens: Tensor, rows: Tensor) -> Tensor:
        ids = torch.cat([self.context_ids[rows], tokens[:, :-1]], dim=1)
        first = self.context_positions[rows, -1:] + 1
        later = first + torch.arange(tokens.shape[1] - 1, device=tokens.device)
        positions = torch.cat([self.context_positions[rows], later], dim=1)
        attend: Attend = causal
        if self.context_padded:
            length = ids.shape[1]
            real = F.pad(self.context_real[rows], (0, length - self.context_width), value=True)
            look = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
            # A padded position sees itself, so that its softmax is no 0 / 0.
            eye = torch.eye(length, dtype=torch.bool, device=ids.device)
            attend = masked(((look & real[:, None, :]) | eye)[:, None])
        features = self.backbone(ids, positions, attend)
        out: Tensor = self.head(features[:, self.context_width - 1 :])
        return out

    @property
    def tree_bytes_per_node(self) -> int:
        """About what one node of a tree takes while it is evaluated without gradients."""
        seen = self.context_width + self.space.max_length
        return 4 * (4 * seen * self.config.dim + 8 * self.config.dim + 2 * self.config.hidden)

    # One pass over a prefix tree ---------------------------------------------------------------

    def tree_logits(
        self, tree: PrefixTree, prompt_ids: Int64[Tensor, "P"]
    ) -> Float[Tensor, "P N A"]:
        """q at every node of a tree, for each of the prompts, each node evaluated once."""
        prompt_ids = self._prompt_rows(len(prompt_ids), prompt_ids)
        out: Tensor = (_compiled_tree_pass() if self.compiled else Transformer._tree_pass)(
            self, tree, prompt_ids
        )
        return out

    def _tree_pass(self, tree: PrefixTree, prompt_ids: Tensor) -> Tensor:
        c, n = self.context_width, len(tree)
        context = self.context_ids[prompt_ids]
        p = len(context)
        ids = torch.cat([context, tree.tokens[1:].expand(p, -1)], dim=1)
        start = self.context_positions[prompt_ids]
        positions = torch.cat([start, start[:, -1:] + tree.depth[1:]], dim=1)
        keys, look = _tree_keys(tree, c)
        real = F.pad(self.context_real[prompt_ids], (0, n - 1), value=True)
        mask = look & real[:, keys]
        # The first key is the node itself, always seen: no softmax is 0 / 0.
        mask[..., 0] = True
        features = self.backbone(ids, positions, gathered(keys, mask))
        out: Tensor = self.head(features[:, c - 1 :])
        return out

    # Decoding with a cache ---------------------------------------------------------------------

    def start(self, prompt_ids: Int64[Tensor, "B"]) -> Cache:
        """A cache that has read nothing; the first :meth:`step` reads the prompts."""
        return Cache(self._prompt_rows(len(prompt_ids), prompt_ids))

    def step(self, cache: Cache, tokens: Int64[Tensor, "B"] | None) -> Float[Tensor, "B A"]:
        """q at the next position, after reading one token of each row (None: the prompts)."""
        if tokens is None:
            return self._prefill(cache)
        assert cache.position is not None
        end = cache.used + 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.keys[layer][:, :, cache.used : end] = k
            cache.values[layer][:, :, cache.used : end] = v
            mask = None if cache.mask is None else cache.mask[..., :end]
            return F.scaled_dot_product_attention(
                q, cache.keys[layer][:, :, :end], cache.values[layer][:, :, :end], attn_mask=mask
            )

        x = self.backbone(tokens[:, None], cache.position[:, None], attend)
        cache.used, cache.position = end, cache.position + 1
        out: Tensor = self.head(x[:, 0])
        return out

    def _prefill(self, cache: Cache) -> Tensor:
        rows, room = cache.rows, self.space.max_length - 1
        mask = None
        if self.context_padded:
            real = self.context_real[rows]
            cache.mask = F.pad(real, (0, room), value=True)[:, None, None]
            look = torch.ones(2 * real.shape[1:], dtype=torch.bool, device=real.device).tril()
            eye = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
            mask = ((look & real[:, None, :]) | eye)[:, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.keys.append(F.pad(k, (0, 0, 0, room)))
            cache.values.append(F.pad(v, (0, 0, 0, room)))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

        x = self.backbone(self.context_ids[rows], self.context_positions[rows], attend)
        cache.used = self.context_width
        cache.position = self.context_positions[rows, -1] + 1
        out: Tensor = self.head(x[:, -1])
        return out

    def _prompt_rows(self, n: int, prompt_ids: Tensor | None) -> Tensor:
        if self.prompts is None or prompt_ids is None:
            if self.prompts is not None and len(self.prompts) > 1:
                raise ValueError(
                    f"the policy has {len(self.prompts)} prompts: give prompt_ids, one for each row"
                )
            return torch.zeros(n, dtype=torch.int64, device=self.context_ids.device)
        return prompt_ids


def _tree_keys(tree: PrefixTree, context_width: int) -> tuple[Tensor, Tensor]:
    """Positions that each position of (context, nodes but the root) sees, itself first.

    Returns keys (L, W) and where they count (L, W): the context's own causal triangle, and for
    a node the whole context and its ancestors. The root stands at the end of the context.
    """
    device, c = tree.tokens.device, context_width
    width = c + tree.ancestors.shape[1] - 1
    row = torch.arange(c, device=device)
    column = torch.arange(width, device=device)
    context = (row[:, None] - column).clamp(min=0)
    seen = column <= row[:, None]
    # Node j > 0 stands at position c + j - 1; nearest ancestor first, then the context.
    depth = tree.depth[1:, None]
    up = depth - column
    nodes = tree.ancestors[1:].gather(1, up.clamp(min=0, max=tree.ancestors.shape[1] - 1))
    keys = torch.where(up >= 1, nodes + c - 1, c - 1 + up).clamp(min=0)
    counts = c - 1 + up >= 0
    return torch.cat([context, keys]), torch.cat([seen, counts])


@lru_cache(maxsize=1)
def _compiled_sequence_pass() -> Callable[..., Tensor]:
    return torch.compile(Transformer._sequence_pass)


@lru_cache(maxsize=1)
def _compiled_tree_pass() -> Callable[..., Tensor]:
    return torch.compile(Transformer._tree_pass)
