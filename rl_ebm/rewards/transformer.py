"""A reward that is a bidirectional Transformer: the EBM of arXiv 2512.15605."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from rl_ebm.networks.backbone import (
    Attend,
    Backbone,
    Context,
    TransformerConfig,
    check_config,
    everything,
    masked,
)
from rl_ebm.rewards.base import Prompts
from rl_ebm.tokens import TokenSpace, check_space, length_mask
from rl_ebm.tokens.prompts import GivenPrompts, check_prompts


class TransformerReward(nn.Module):
    """R(x, y) by the policy's backbone without a causal mask, mean over positions, scalar head.

    Args:
        space: the responses.
        config: sizes.
        prompts: those of the EBM; None without prompts.
    """

    forbids = False
    called = True
    unmasked: Attend = staticmethod(everything)
    """attention where all responses are of one length and there is nothing to mask"""

    def __init__(
        self,
        space: TokenSpace,
        config: TransformerConfig | None = None,
        prompts: GivenPrompts | None = None,
    ) -> None:
        super().__init__()
        check_space(space)
        config = TransformerConfig() if config is None else config
        check_config(config)
        self.space, self.config = space, config
        self.prompts = None if prompts is None else check_prompts(prompts)
        context = Context(self.prompts, space.vocab_size)
        self.context_padded = context.padded
        self.register_buffer("context_ids", context.ids, persistent=False)
        self.register_buffer("context_positions", context.positions, persistent=False)
        self.register_buffer("context_real", context.real, persistent=False)
        self.backbone = Backbone(context.num_ids, context.width + space.max_length, config)
        self.head = nn.Linear(config.dim, 1)

    context_ids: Tensor
    context_positions: Tensor
    context_real: Tensor

    def forward(
        self,
        tokens: Int64[Tensor, "B T"],
        lengths: Int64[Tensor, "B"],
        prompt_ids: Int64[Tensor, "B"],
    ) -> Float[Tensor, "B"]:
        """R(x, y), with gradient."""
        prompt_ids = prompt_ids.long()  # uint8 as an index is a mask
        context = self.context_ids[prompt_ids]
        ids = torch.cat([context, tokens.long()], dim=1)
        start = self.context_positions[prompt_ids]
        later = start[:, -1:] + 1 + torch.arange(tokens.shape[1], device=tokens.device)
        mask = length_mask(lengths, tokens.shape[1])
        real = torch.cat([self.context_real[prompt_ids], mask], dim=1)
        attend: Attend = masked(real[:, None, None])
        if self.space.eos_id is None and not self.context_padded:
            attend = self.unmasked  # the same, without a mask to apply
        x = self.backbone(ids, torch.cat([start, later], dim=1), attend)
        weight = F.normalize(real.to(x.dtype), p=1.0, dim=1)
        out: Tensor = self.head((weight[..., None] * x).sum(1))[:, 0]
        return out

    def bind(self, space: TokenSpace, prompts: Prompts | None) -> TransformerReward:
        if space != self.space:
            raise ValueError(f"the reward was made for {self.space}, the EBM has {space}")
        if self.prompts != (None if prompts is None else [list(p) for p in prompts]):
            raise ValueError("the reward was made for other prompts than the EBM's")
        return self

    def __call__(self, *args: Tensor) -> Tensor:
        out: Tensor = super().__call__(*args)
        return out
