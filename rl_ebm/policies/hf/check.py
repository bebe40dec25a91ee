"""A model at the door: whether padding and cache leave its logits as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from rl_ebm.policies.hf.base import ModelPolicy

STEPS = 3


@torch.no_grad()
def check_passes(policy: ModelPolicy) -> None:
    """Compare the policy's passes with the model's plain one, on its shortest and longest prompt.

    Of the plain pass, one sequence without padding, mask, positions or cache, nobody doubts what
    it means. A coarse check, as precise as half precision lets it be: architectures differ in
    whether they count positions from 0, read the mask, or keep their past where it is looked for.

    Raises:
        ValueError: the logits differ, or are no numbers.
    """
    lengths, device = policy.context_lengths, policy.context_ids.device
    if device.type == "meta":
        return
    rows = torch.stack([lengths.argmin(), lengths.argmax()])
    steps = min(STEPS, policy.space.max_length)
    tokens = (torch.arange(2 * steps, device=device) % policy.space.vocab_size).view(2, steps)
    plain = torch.cat(
        [_plain(policy, row, y) for row, y in zip(rows.tolist(), tokens, strict=True)]
    )
    state = policy.start(rows)
    cached = [policy.step(state, tokens[:, t - 1] if t else None) for t in range(steps)]
    for logits, way in (
        (policy.logits(tokens, rows), "with prompts of several lengths in a batch"),
        (torch.stack(cached, dim=1), "with a cache"),
    ):
        eps = 1e-6 if plain.dtype == torch.float64 else max(1e-3, 20 * torch.finfo(plain.dtype).eps)
        if not bool((logits - plain).abs().max() <= eps * plain.abs().max().clamp(min=1e-3)):
            raise ValueError(
                f"{type(policy.model).__name__} gives other logits {way} than for one sequence "
                f"alone ({str(plain.dtype).removeprefix('torch.')}): it cannot be used here"
            )


def _plain(policy: ModelPolicy, row: int, tokens: Tensor) -> Tensor:
    """The model's own logits of one sequence, (1, T, A)."""
    context = policy.context_ids[row, -int(policy.context_lengths[row]) :]
    ids = torch.cat([context, tokens[:-1]])[None]
    logits: Tensor = policy.model(input_ids=ids, use_cache=False, return_dict=True).logits
    return logits[:, -len(tokens) :, : policy.space.vocab_size]
