r"""A pre-LN Transformer, with attention as an argument.

Each block is written once; what a position may look at is a function that the caller gives:
all earlier positions, all positions, the ancestors in a prefix tree, or a cache.

The architecture is that of arXiv 2512.15605, App. C (its parameter counts pin it down): learned
token and position embeddings, biases everywhere, ReLU, no final LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from rl_ebm.messages.arguments import shown, whole
from rl_ebm.messages.memory import check_fits
from rl_ebm.messages.words import count_text
from rl_ebm.networks.tiles import Tile

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v), each (..., H, L, D / H), to the context, of the shape of q."""


MAX_LAYERS = 10_000
"""more take minutes to be made, however narrow they are"""
_MODULES = 2**15
"""bytes that the modules of one block take beside their weights, about"""


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a Transformer."""

    layers: int = 2
    """number of blocks"""
    heads: int = 4
    """attention heads; must divide dim"""
    dim: int = 64
    """width of the residual stream"""
    hidden: int = 256
    """width inside the MLP"""

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "dim", "hidden"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        if self.layers > MAX_LAYERS:
            raise ValueError(f"layers must be at most {MAX_LAYERS}, got {self.layers}")
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got dim={self.dim}, heads={self.heads}")


def check_config(config: object) -> None:
    """Raise TypeError unless something is a TransformerConfig."""
    if not isinstance(config, TransformerConfig):
        raise TypeError(
            "config must be a TransformerConfig, for example TransformerConfig(layers=2, dim=64), "
            f"got {shown(config)}"
        )


def num_parameters(config: TransformerConfig, num_ids: int, length: int) -> int:
    """Weights and biases of a :class:`Backbone`."""
    d, h = config.dim, config.hidden
    block = 4 * d + (3 * d * d + 3 * d) + (d * d + d) + (d * h + h) + (h * d + d)
    return (num_ids + length) * d + config.layers * block


def check_sizes(config: TransformerConfig, num_ids: int, length: int) -> None:
    """Check that a backbone fits into memory, before anything is made.

    Raises:
        ValueError: it does not.
    """
    count = num_parameters(config, num_ids, length)
    check_fits(
        4 * count + _MODULES * config.layers,
        f"a network of {count_text(count)} parameters (layers={config.layers}, dim={config.dim}, "
        f"hidden={config.hidden}, {num_ids:,} token ids, {length:,} positions)",
        "make it smaller",
    )


class Block(nn.Module):
    """Attention, then an MLP, each on a normalised copy of the stream it adds to."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.norm2 = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, config.hidden)
        self.down = nn.Linear(config.hidden, config.dim)

    def forward(
        self, x: Float[Tensor, "*n L D"], layer: int, attend: Attend
    ) -> Float[Tensor, "*n L D"]:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(-2, -3) for part in qkv.unbind(-3))  # (..., H, L, D / H)
        x = x + self.out(attend(layer, q, k, v).transpose(-2, -3).flatten(-2))
        mlp: Tensor = self.down(F.relu(self.up(self.norm2(x))))
        return x + mlp


class Backbone(nn.Module):
    """Embeddings and blocks: ids and positions to features.

    Args:
        num_ids: rows of the token embedding.
        num_positions: rows of the position embedding.
    """

    def __init__(self, num_ids: int, num_positions: int, config: TransformerConfig) -> None:
        super().__init__()
        check_sizes(config, num_ids, num_positions)
        self.token = nn.Embedding(num_ids, config.dim)
        self.position = nn.Embedding(num_positions, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(
        self, ids: Int64[Tensor, "*n L"], positions: Int64[Tensor, "*m L"], attend: Attend
    ) -> Float[Tensor, "*n L D"]:
        x: Tensor = self.token(ids) + self.position(positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, attend)
        return x


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every position sees itself and the earlier ones."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def everything(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every position sees all positions."""
    return F.scaled_dot_product_attention(q, k, v)


def masked(mask: Bool[Tensor, "..."]) -> Attend:
    """Every position sees the keys where the mask, broadcast to (..., H, L, L), is True."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


def tiled(tiles: Sequence[Tile], real: Bool[Tensor, "P C"]) -> Attend:
    """Positions are a context, then the tiles of a prefix tree whose root ends the context.

    Args:
        real: False at the padding of the contexts; a padded position sees itself, so that its
            softmax is no 0 / 0.
    """
    c = real.shape[1]
    eye = torch.eye(c, dtype=torch.bool, device=real.device)
    context = (torch.ones_like(eye).tril() & real[:, None]) | eye
    top, *lower = tiles
    # The first tile attends together with the context, which sees nothing of it.
    size = c + top.nodes.numel()
    top_mask = torch.cat([F.pad(context, (0, size - c)), _looks(real, top)], 1)[:, None]
    masks = [_looks(real, tile)[:, None, None] for tile in lower]  # (P, H, G, n, C + W + n)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = size
        parts = [
            F.scaled_dot_product_attention(
                q[:, :, :at], k[:, :, :at], v[:, :, :at], attn_mask=top_mask
            )
        ]
        for tile, mask in zip(lower, masks, strict=True):
            groups = tile.nodes.shape
            own = slice(at, at + tile.nodes.numel())
            keys, values = (
                torch.cat(
                    [
                        x[:, :, None, :c].expand(-1, -1, groups[0], -1, -1),
                        # The root, place 0, is the context's last position.
                        x[:, :, tile.above.flatten() + (c - 1)].unflatten(2, tile.above.shape),
                        x[:, :, own].unflatten(2, groups),
                    ],
                    dim=3,
                )
                for x in (k, v)
            )
            part = F.scaled_dot_product_attention(
                q[:, :, own].unflatten(2, groups), keys, values, attn_mask=mask
            )
            parts.append(part.flatten(2, 3))
            at = own.stop
        return torch.cat(parts, dim=2)

    return attend


def _looks(real: Bool[Tensor, "P C"], tile: Tile) -> Bool[Tensor, "P n W"]:
    """What the nodes of a tile see: the real context, all above them, some of their group."""
    inside = F.pad(tile.seen, (tile.above.shape[1], 0), value=True)
    context = real[:, None].expand(-1, len(inside), -1)
    return torch.cat([context, inside.expand(len(real), -1, -1)], 2)


class Context:
    """Left-padded prompts behind a BOS, as ids, positions and a mask of what is real.

    A separator ends each prompt: without it, a prompt and a shorter one with a response that
    has begun would be the same input. Without prompts there is a BOS alone.

    Args:
        prompts: int sequences; None without prompts.
        vocab_size: A.
    """

    def __init__(self, prompts: Sequence[Sequence[int]] | None, vocab_size: int) -> None:
        largest = max((i for p in prompts or [] for i in p), default=0)
        bos_id = max(vocab_size, largest + 1)
        self.num_ids = bos_id + (1 if prompts is None else 2)
        lists = [[]] if prompts is None else [[*p, bos_id + 1] for p in prompts]
        self.width = 1 + max(len(p) for p in lists)
        rows = [[bos_id] * (self.width - len(p)) + p for p in lists]
        self.ids = torch.tensor(rows)
        pad = torch.tensor([self.width - 1 - len(p) for p in lists])[:, None]
        self.positions = (torch.arange(self.width) - pad).clamp(min=0)
        self.real = torch.arange(self.width) >= pad
        self.padded = bool((~self.real).any())
