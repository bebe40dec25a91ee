"""A policy that is a Hugging Face causal language model: the extra ``hf``.

One path from ids to logits serves scoring, sampling and verification, and it is the model's
``forward`` alone: temperature 1, no top-k, and ``generation_config`` is never read.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from rl_ebm.messages.arguments import whole
from rl_ebm.policies.base import device_of, evaluating, resolve_prompt_ids
from rl_ebm.policies.hf import folders
from rl_ebm.policies.hf.adapter import AdapterFree, keep_adapter_alone
from rl_ebm.policies.hf.check import check_passes
from rl_ebm.tokens import TokenSpace, check_space
from rl_ebm.tokens.prompts import GivenPrompts, check_prompts


@dataclass
class Decoding:
    """What a batch has read so far, for :meth:`HuggingFace.step`."""

    context: Int64[Tensor, "B C"]
    mask: Bool[Tensor, "B S"]
    """False at the padding left of short prompts; S grows with what is read"""
    cache: Any = None


class HuggingFace(nn.Module):
    """Any ``AutoModelForCausalLM`` as a policy, a ``PeftModel`` of one included.

    The model reads ``bos_id`` (where given), the prompt and the response, nothing else. Shorter
    prompts are padded on the left and masked by their lengths, never by a padding id, which
    with many tokenizers is the EOS. Tokens of the space are the model's first A ids.

    The model is put into evaluation mode: dropout would make the law that is sampled another
    one than the law that is scored. ``policy.train()`` brings it back for ``logits``; ``step``
    decodes without it always, so that gradient checkpointing, which takes the cache away in
    training mode, can be used.

    Args:
        model: with ``forward(input_ids, attention_mask, use_cache, ...)`` and a key-value cache.
        space: the responses; A at most the model's vocabulary (its surplus ids get no mass).
        prompts: what the policy answers, a list of lists of ids, or what the tokenizer returned,
            ``input_ids`` with their ``attention_mask``; None without prompts.
        bos_id: id before every prompt; None for none, if no prompt is empty.
        logits_are_values: whether its raw logits are trained to be q.

    Raises:
        TypeError: no module.
        ValueError: a model without a key-value cache, with fewer ids than the space, with room
            for fewer tokens, or whose logits padding or cache change; an id that it does not
            know; nothing to read before the first token; prompt tuning.
    """

    def __init__(
        self,
        model: nn.Module,
        space: TokenSpace,
        prompts: GivenPrompts | None = None,
        bos_id: int | None = None,
        logits_are_values: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(
                "model must be a loaded model, AutoModelForCausalLM.from_pretrained(...), got "
                f"{type(model).__name__}"
            )
        check_space(space)
        bos_id = None if bos_id is None else whole("bos_id", bos_id)
        self.model = cast("Any", model)
        self.space, self.bos_id, self.logits_are_values = space, bos_id, logits_are_values
        self.prompts = None if prompts is None else check_prompts(prompts, ranged=False)
        base = self.model.get_base_model() if self.has_adapter else self.model
        self._takes = set(inspect.signature(base.forward).parameters)
        # transformers 5.24 renamed it; the old name is to go.
        self._cache_name = "cache" if "cache" in self._takes else "past_key_values"
        self._config: Any = base.config.get_text_config()
        self._stateful = bool(getattr(base, "_is_stateful", False))
        start = [] if bos_id is None else [bos_id]
        contexts = [[*start, *p] for p in ([[]] if self.prompts is None else self.prompts)]
        self._check(contexts, type(base).__name__)
        lengths = torch.tensor([len(c) for c in contexts])
        self.context_width, self.ragged = int(lengths.max()), len(set(lengths.tolist())) > 1
        # Padding is id 0, whatever that is: the mask keeps it from being read.
        ids = [[0] * (self.context_width - len(c)) + c for c in contexts]
        device = device_of(model)
        self.register_buffer("context_ids", torch.tensor(ids, device=device), persistent=False)
        self.register_buffer("context_lengths", lengths.to(device), persistent=False)
        if self.has_adapter:
            keep_adapter_alone(self)
        self.eval()
        check_passes(self)

    context_ids: Tensor
    context_lengths: Tensor

    crops = True
    """a batch is read up to its longest response: scoring short ones does not cost T tokens"""

    # Scores -----------------------------------------------------------------------------------

    def logits(
        self, tokens: Int64[Tensor, "B T"], prompt_ids: Int64[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T A"]:
        """The model's logits before every token; row t reads the prompt and ``tokens[:, :t]``."""
        tokens = self.space.check_tokens(tokens, fewer=True)
        context, mask = self._context(len(tokens), prompt_ids)
        steps = tokens.shape[1]
        ids = torch.cat([context, tokens[:, :-1]], dim=1)
        return self._forward(ids, F.pad(mask, (0, steps - 1), value=True), steps)[0]

    @property
    def tree_bytes_per_node(self) -> int:
        """About what one sequence takes while it is evaluated without gradients."""
        seen = self.context_width + self.space.max_length
        width = int(getattr(self._config, "hidden_size", 1024))
        heads = int(getattr(self._config, "num_attention_heads", 16))
        return 4 * (self.space.max_length * self._vocab + seen * (16 * width + seen * heads))

    # Decoding with a cache --------------------------------------------------------------------

    def start(self, prompt_ids: Int64[Tensor, "B"]) -> Decoding:
        """A state that has read nothing; the first :meth:`step` reads the prompts."""
        return Decoding(*self._context(len(prompt_ids), prompt_ids))

    def step(self, state: Decoding, tokens: Int64[Tensor, "B"] | None) -> Float[Tensor, "B A"]:
        """Logits at the next position, after one more token of each row (None: the prompts)."""
        ids = state.context
        if tokens is not None:
            ids, state.mask = tokens.long()[:, None], F.pad(state.mask, (0, 1), value=True)
        with evaluating(self):
            logits, state.cache = self._forward(ids, state.mask, 1, state.cache, use_cache=True)
        return logits[:, 0]

    # Adapters, files --------------------------------------------------------------------------

    @property
    def has_adapter(self) -> bool:
        """Whether the model is a ``peft.PeftModel``."""
        return hasattr(self.model, "disable_adapter") and hasattr(self.model, "get_base_model")

    def reference(self) -> AdapterFree:
        """The model without its adapter, as a reference: the same weights, not a copy.

        Raises:
            ValueError: no adapter, or one that trains weights of the model itself.
        """
        return AdapterFree(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model (of a ``PeftModel`` the adapter alone), so that no half is ever there.

        Raises:
            ValueError: ``folder`` holds something else.
            OSError: of the file system; what was in ``folder`` is then as it was.
        """
        extras = {"bos_id": self.bos_id, "logits_are_values": self.logits_are_values}
        folders.write_model(self.model, Path(folder), extras)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        space: TokenSpace,
        prompts: GivenPrompts | None = None,
        bos_id: int | None = None,
        base: nn.Module | None = None,
    ) -> HuggingFace:
        """The policy in a folder of :meth:`save_pretrained`, or of transformers or peft.

        Args:
            folder: a local one.
            bos_id: None for the one that was saved.
            base: the model that an adapter belongs to, changed in place; None: the one that
                the adapter names.

        Raises:
            ValueError: no model there, one whose code came with it and would have to be run, or an
                adapter whose model has to be given.
        """
        model, extras = folders.read_model(Path(folder), base)
        bos_id = extras.get("bos_id") if bos_id is None else bos_id
        return cls(model, space, prompts, bos_id, bool(extras.get("logits_are_values", False)))

    # The one pass -----------------------------------------------------------------------------

    def _context(self, n: int, prompt_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """What stands before each response, padded on the left, and which of it is real."""
        if self.prompts is None:
            prompt_ids = None
        rows = resolve_prompt_ids(n, prompt_ids, len(self.context_ids), self.context_ids.device)
        lengths = self.context_lengths[rows]
        # No wider than this batch needs. The one place that waits for a GPU.
        width = int(lengths.max()) if self.ragged and n else self.context_width
        ids = self.context_ids[rows, -width:]
        return ids, torch.arange(width, device=ids.device) >= width - lengths[:, None]

    def _forward(
        self, ids: Tensor, mask: Tensor, keep: int, cache: Any = None, use_cache: bool = False
    ) -> tuple[Tensor, Any]:
        """Logits at the last ``keep`` of the ids, and the cache; the mask is of all ids so far."""
        a = self.space.vocab_size
        if not len(ids):
            return ids.new_zeros(0, keep, a, dtype=self.model.dtype), cache
        options: dict[str, Any] = {"use_cache": use_cache, "return_dict": True}
        if "position_ids" in self._takes:
            # Where the model does not take them it counts them from the mask.
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes:
            options["logits_to_keep"] = keep
        if cache is not None:
            options[self._cache_name] = cache
        # Always with a mask: without one, some models guess it from padding ids or positions.
        out = self.model(input_ids=ids, attention_mask=mask.long(), **options)
        return out.logits[:, -keep:, :a], getattr(out, self._cache_name, None)

    def _check(self, contexts: list[list[int]], name: str) -> None:
        if self._cache_name not in self._takes or self._stateful:
            raise ValueError(
                f"{name} is no Transformer with a key-value cache, and cannot be used here"
            )
        if self.has_adapter and self.model.active_peft_config.is_prompt_learning:
            raise ValueError("prompt tuning moves the positions of padded prompts: use LoRA")
        self._vocab = int(self._config.vocab_size)
        if self.space.vocab_size > self._vocab:
            raise ValueError(
                f"the model has {self._vocab} ids and the space {self.space.vocab_size} tokens: "
                "it would need model.resize_token_embeddings"
            )
        if not all(contexts):
            raise ValueError(
                "a causal language model needs something to read before the first token: give "
                "bos_id, or no empty prompt"
            )
        if wrong := [a for c in contexts for a in c if not 0 <= a < self._vocab]:
            raise ValueError(
                f"ids of prompts and bos_id must be in [0, {self._vocab}), got {wrong[0]}"
            )
        room = getattr(self._config, "max_position_embeddings", None)
        needed = max(map(len, contexts)) + self.space.max_length - 1
        if room is not None and needed > room:
            raise ValueError(
                f"the model reads at most {room} tokens, and the longest prompt with its response "
                f"takes {needed}"
            )
