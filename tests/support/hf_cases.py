"""Tiny random language models, and their logits by one plain forward pass for each prefix.

Weights start random and large: near zero every wrong path looks right.
"""

from __future__ import annotations

import brute_force
import pytest
import torch
from toy_policies import responses, seeded

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
peft = pytest.importorskip("peft", reason="needs the extra hf")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")

transformers.logging.set_verbosity_error()  # tiny vocabularies lack the default ids
transformers.utils.logging.disable_progress_bar()

VOCAB = 15  # more than any space here: a padded embedding matrix
EOS = 1
_IDS = {"vocab_size": VOCAB, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS}
_LLAMA = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
_GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32}
CONFIGS = {
    "gpt2": _GPT2,
    "gpt2, eager": _GPT2 | {"attn_implementation": "eager"},
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 3},
    "opt": _LLAMA | {"ffn_dim": 12, "word_embed_proj_dim": 8},
    "bloom": {"hidden_size": 8, "n_layer": 2, "n_head": 2},
}

PROMPTS = [[2], [EOS, 0, 14, EOS, 3], [EOS, EOS]]  # ragged, with ids of padding and of no token
BOS = 7


def language_model(kind="gpt2", seed=0, dtype=torch.float64, **options):
    """A random model, in training mode as transformers makes it."""
    options = _IDS | CONFIGS[kind] | options
    attention = options.pop("attn_implementation", "sdpa" if kind != "bloom" else "eager")
    config = transformers.AutoConfig.for_model(kind.split(",")[0], **options)
    # Its own random start costs draws of the global generator.
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.8, generator=seeded(seed + parameter.numel()))
    return model.to(dtype)


def lora(model, seed=0, **options):
    """The model with an adapter that does something: peft starts at nothing."""
    with torch.random.fork_rng():
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules="all-linear",
            **{"r": 2, "fan_in_fan_out": model.config.model_type == "gpt2"} | options,
        )
        adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.5, generator=seeded(seed + parameter.numel()))
    return adapted


def plain_row(model, context, prefix, a):
    """Logits after one sequence: no batch, padding, mask, positions or cache."""
    return model(input_ids=torch.tensor([[*context, *prefix]]), use_cache=False).logits[0, -1, :a]


@torch.no_grad()
def plain_logits(model, space, contexts):
    """(context's place, prefix) to logits (A,), in the mode the model is in."""
    return {
        (i, s): plain_row(model, context, s, space.vocab_size)
        for i, context in enumerate(contexts)
        for t in range(space.max_length)
        for s in brute_force.prefixes(space.vocab_size, t, space.eos_id)
    }


def mixed_batch(space, num_prompts, pad=0):
    """Every response to every prompt, prompts in turn: tokens, lengths, prompt ids."""
    rows = [(i, y) for y in responses(space) for i in range(num_prompts)]
    tokens, lengths = brute_force.padded([y for _, y in rows], space.max_length, pad)
    return tokens, lengths, torch.tensor([i for i, _ in rows])


def rows_of(want, tokens, lengths, ids):
    """The entries of ``plain_logits`` before every real token, (real tokens, A)."""
    return torch.stack(
        [
            want[i, tuple(y[:t])]
            for i, y, n in zip(ids.tolist(), tokens.tolist(), lengths.tolist(), strict=True)
            for t in range(n)
        ]
    )


def all_steps(policy, tokens, ids):
    """(B, T, A) by decoding with the cache."""
    state = policy.start(ids)
    steps = range(tokens.shape[1])
    return torch.stack([policy.step(state, tokens[:, t - 1] if t else None) for t in steps], 1)
