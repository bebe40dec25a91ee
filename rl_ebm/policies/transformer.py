"""A causal Transformer policy: logits of every prefix from one pass, and V beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from rl_ebm.messages.arguments import flag
from rl_ebm.networks.backbone import (
    Attend,
    Backbone,
    Context,
    TransformerConfig,
    causal,
    check_config,
    masked,
    tiled,
)
from rl_ebm.networks.prefix_tree import PrefixTree
from rl_ebm.networks.tiles import Tile
from rl_ebm.networks.values import ValueHead
from rl_ebm.policies.base import num_prompts, prompt_rows
from rl_ebm.tokens import TokenSpace, check_space
from rl_ebm.tokens.prompts import GivenPrompts, check_prompts


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
        value_head: whether V has weights of its own; None where raw logits are q.
    """

    def __init__(
        self,
        space: TokenSpace,
        config: TransformerConfig | None = None,
        prompts: GivenPrompts | None = None,
        logits_are_values: bool = False,
        value_head: bool | None = None,
    ) -> None:
        super().__init__()
        check_space(space)
        config = TransformerConfig() if config is None else config
        check_config(config)
        self.space, self.config = space, config
        self.prompts = None if prompts is None else check_prompts(prompts)
        flag("logits_are_values", logits_are_values)
        self.logits_are_values = logits_are_values
        context = Context(self.prompts, space.vocab_size)
        self.context_width, self.context_padded = context.width, context.padded
        self.register_buffer("context_ids", context.ids, persistent=False)
        self.register_buffer("context_positions", context.positions, persistent=False)
        self.register_buffer("context_real", context.real, persistent=False)
        self.backbone = Backbone(context.num_ids, context.width + space.max_length, config)
        self.head = nn.Linear(config.dim, space.vocab_size)
        flag("value_head", value_head, unset=True)
        wanted = logits_are_values if value_head is None else value_head
        self.value_head = ValueHead(space, config.dim, num_prompts(self)) if wanted else None

    context_ids: Tensor
    context_positions: Tensor
    context_real: Tensor

    compiled = False
    """whether the two passes below go through torch.compile: the same numbers up to rounding"""

    @property
    def crops(self) -> bool:
        """Whether a batch is read up to its longest response alone.

        Not on a GPU, which would have to be waited for, nor compiled, for each length anew.
        """
        return not self.compiled and self.context_ids.device.type == "cpu"

    # One pass over sequences -----------------------------------------------------------------

    def logits(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T A"]:
        """q before every token; row t reads the prompt and ``tokens[:, :t]``."""
        tokens = self.space.check_tokens(tokens, fewer=True)
        rows = prompt_rows(self, len(tokens), prompt_ids)
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
        features = self.backbone(ids, positions, attend)[:, self.context_width - 1 :]
        out: Tensor = self.head(features)
        if self.value_head is None:
            return out
        return self.value_head.of_sequences(out, features, tokens, rows)

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
        rows = prompt_rows(self, len(prompt_ids), prompt_ids)
        ids, depth = tree.tokens[tree.layout.order], tree.depth[tree.layout.order]
        features = (_compiled_tree_pass() if self.compiled else Transformer._tree_pass)(
            self, ids[1:], depth[1:], tree.layout.tiles, rows
        )[:, tree.layout.place]
        out: Tensor = self.head(features)
        if self.value_head is None:
            return out
        return self.value_head.of_tree(out, features, tree, rows)

    def _tree_pass(
        self, tokens: Tensor, depth: Tensor, tiles: Sequence[Tile], rows: Tensor
    ) -> Tensor:
        """Features of the root and of further nodes, in the order of their tiles."""
        ids = torch.cat([self.context_ids[rows], tokens.expand(len(rows), -1)], dim=1)
        start = self.context_positions[rows]
        positions = torch.cat([start, start[:, -1:] + depth], dim=1)
        features = self.backbone(ids, positions, tiled(tiles, self.context_real[rows]))
        found: Tensor = features[:, self.context_width - 1 :]
        return found

    # Decoding with a cache ---------------------------------------------------------------------

    def start(self, prompt_ids: Int64[Tensor, "B"]) -> Cache:
        """A cache that has read nothing; the first :meth:`step` reads the prompts."""
        return Cache(prompt_rows(self, len(prompt_ids), prompt_ids))

    def step(self, cache: Cache, tokens: Int64[Tensor, "B"] | None) -> Float[Tensor, "B A"]:
        """Logits of the next position, after reading one token of each row (None: the prompts).

        Of q log pi alone, which is what one draws by.
        """
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

        x = self.backbone(tokens.long()[:, None], cache.position[:, None], attend)
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


@lru_cache(maxsize=1)
def _compiled_sequence_pass() -> Callable[..., Tensor]:
    return torch.compile(Transformer._sequence_pass)


@lru_cache(maxsize=1)
def _compiled_tree_pass() -> Callable[..., Tensor]:
    return torch.compile(Transformer._tree_pass)
