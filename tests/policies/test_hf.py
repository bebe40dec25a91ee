"""Hugging Face policies against a plain forward pass of the raw model for each prefix."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("peft", reason="needs the extra hf")

import torch
from hf_cases import (
    BOS,
    CONFIGS,
    EOS,
    PROMPTS,
    VOCAB,
    all_steps,
    language_model,
    mixed_batch,
    plain_logits,
    plain_row,
    rows_of,
    transformers,
)
from test_policies import assert_drawn_from, drawn
from toy_policies import close, responses, seeded

from rl_ebm import EBM, TokenSpace, solve, verify
from rl_ebm.policies import HuggingFace, log_prob, sample
from rl_ebm.policies.walk import walk
from rl_ebm.tokens import length_mask

FIXED, ENDED = TokenSpace(3, 3), TokenSpace(4, 3, eos_id=EOS)
# (prompts, bos_id), and what stands before each response.
CONTEXTS = {
    "bos alone": (None, BOS, [[BOS]]),
    "ragged": (PROMPTS, None, PROMPTS),
    "ragged, bos is eos": ([[], *PROMPTS], EOS, [[EOS], *([EOS, *p] for p in PROMPTS)]),
    "equal": ([[3, 4], [EOS, EOS]], None, [[3, 4], [EOS, EOS]]),
}
in_all_contexts = pytest.mark.parametrize("name", CONTEXTS)
in_both_spaces = pytest.mark.parametrize("space", [FIXED, ENDED], ids=["fixed", "eos"])


# Scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@in_all_contexts
@in_both_spaces
def test_logits_and_cached_steps_are_those_of_the_plain_model(kind, name, space):
    prompts, bos_id, contexts = CONTEXTS[name]
    # Bloom adds its smallest number to a bias: -inf, then NaN, at padding in float64.
    dtype, tolerance = (torch.float32, 1e-5) if kind == "bloom" else (torch.float64, 1e-11)
    model = language_model(kind, dtype=dtype)
    policy = HuggingFace(model, space, prompts, bos_id)
    tokens, lengths, ids = mixed_batch(space, len(contexts), pad=2)
    want = rows_of(plain_logits(model, space, contexts), tokens, lengths, ids)
    real = length_mask(lengths, space.max_length)

    with torch.no_grad():
        rows, steps = policy.logits(tokens, ids), all_steps(policy, tokens, ids)

    assert rows.shape == (*tokens.shape, space.vocab_size)
    assert rows.dtype == dtype
    close(rows[real], want, tolerance)
    close(steps[real], want, tolerance)
    assert float(want.std()) > 0.1


@in_both_spaces
def test_log_prob_is_that_of_the_first_columns_by_the_chain_rule(space):
    """EOS, padding id and BOS of the model, is a token like the others."""
    model = language_model("llama")
    policy = HuggingFace(model, space, PROMPTS)
    want, total = plain_logits(model, space, PROMPTS), 0.0
    tokens, lengths, ids = mixed_batch(space, 3)
    got = log_prob(policy, space, tokens, lengths, ids).exp()
    for i, y, n, p in zip(ids.tolist(), tokens.tolist(), lengths.tolist(), got, strict=True):
        product = 1.0
        for t in range(n):
            forced = space.eos_id is not None and t == space.max_length - 1
            if not forced:
                product *= float(want[i, tuple(y[:t])].softmax(-1)[y[t]])
        total += product
        assert float(p.detach()) == pytest.approx(product, rel=1e-9)
    assert total == pytest.approx(3, rel=1e-9)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_row_t_does_not_change_with_tokens_from_t_on(kind):
    policy = HuggingFace(language_model(kind), TokenSpace(3, 4), bos_id=BOS)
    a, b = (torch.randint(3, (40, 4), generator=seeded(s)) for s in (1, 2))
    for t in range(4):
        mixed = torch.cat([a[:, :t], b[:, t:]], dim=1)
        close(policy.logits(mixed)[:, : t + 1], policy.logits(a)[:, : t + 1], 1e-12)


@pytest.mark.parametrize("kind", ["gpt2", "gpt2, eager", "llama"])
def test_gradients_through_padded_batches_are_those_of_sequences(kind):
    model = language_model(kind)
    policy = HuggingFace(model, FIXED, PROMPTS)
    tokens, _, ids = mixed_batch(FIXED, 3)
    weight = torch.randn(*tokens.shape, 3, generator=seeded(), dtype=torch.float64)
    (policy.logits(tokens, ids) * weight).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for i, y, w in zip(ids.tolist(), tokens.tolist(), weight, strict=True):
        for t in range(3):
            (plain_row(model, PROMPTS[i], y[:t], 3) * w[t]).sum().backward()
    for one, other in zip(got, model.parameters(), strict=True):
        close(one, other.grad, 1e-5)  # Llama's norm is in float32, whatever the weights are


def test_only_the_rows_of_the_response_are_computed():
    model = language_model("llama")
    policy = HuggingFace(model, FIXED, PROMPTS)
    shapes = []
    model.lm_head.register_forward_hook(lambda _, inputs, out: shapes.append(out.shape))
    tokens, _, ids = mixed_batch(FIXED, 3)
    policy.logits(tokens, ids)
    all_steps(policy, tokens, ids)
    assert shapes == [(81, 3, VOCAB)] + [(81, 1, VOCAB)] * 3


def test_a_model_that_computes_all_rows_gives_the_same():
    """Some models of older transformers have no ``logits_to_keep``."""
    policy, old = (HuggingFace(language_model("gpt2"), FIXED, PROMPTS) for _ in range(2))
    old._takes.remove("logits_to_keep")
    tokens, _, ids = mixed_batch(FIXED, 3)
    close(old.logits(tokens, ids), policy.logits(tokens, ids))
    close(all_steps(old, tokens, ids), all_steps(policy, tokens, ids))


def test_a_batch_is_padded_to_its_own_longest_prompt():
    model = language_model("gpt2")
    policy = HuggingFace(model, FIXED, PROMPTS)
    widths = []
    model.transformer.wte.register_forward_hook(lambda _, i, out: widths.append(out.shape[1]))
    tokens = torch.tensor([[1, 2, 0], [2, 2, 1]])
    batches = [torch.tensor(rows) for rows in ([0, 0], [0, 2], [1, 2])]
    got = [policy.logits(tokens, rows).detach() for rows in batches]
    assert widths == [1 + 2, 2 + 2, 5 + 2]
    want = plain_logits(model, FIXED, PROMPTS)
    for rows, logits in zip(batches, got, strict=True):
        close(logits.flatten(0, 1), rows_of(want, tokens, torch.tensor([3, 3]), rows))


# Samples ---------------------------------------------------------------------------------------


def test_samples_follow_the_model_whatever_its_generation_config_says():
    model = language_model("gpt2")
    policy = HuggingFace(model, ENDED, PROMPTS)
    ids = torch.arange(18_000) % 3
    before = sample(policy, ENDED, len(ids), seeded(), ids)
    hostile = {"temperature": 0.01, "top_k": 1, "top_p": 0.01, "repetition_penalty": 9.0}
    hostile |= {"suppress_tokens": [0, 2], "begin_suppress_tokens": [EOS], "forced_bos_token_id": 3}
    hostile |= {"bad_words_ids": [[3]], "min_new_tokens": 3, "forced_eos_token_id": 3}
    model.generation_config = transformers.GenerationConfig(do_sample=True, **hostile)
    for name in hostile:
        setattr(model.config, name, hostile[name])  # where older models kept it
    model.config.use_cache = False

    batch = sample(policy, ENDED, len(ids), seeded(), ids)

    assert torch.equal(batch.tokens, before.tokens)
    tokens, lengths, rows = mixed_batch(ENDED, 3)
    log_p = log_prob(policy, ENDED, tokens, lengths, rows).detach()
    for i in range(3):
        close(log_p[i::3], plain_log_probs(model, PROMPTS[i], ENDED))
        assert_drawn_from(drawn(batch)[i::3], log_p[i::3].tolist(), ENDED)


def plain_log_probs(model, context, space):
    want = plain_logits(model, space, [context])
    rows = {s: x.log_softmax(-1) for (_, s), x in want.items()}
    last = space.max_length - 1
    return torch.stack(
        [sum(rows[y[:t]][a] * (t < last) for t, a in enumerate(y)) for y in responses(space)]
    )


@pytest.mark.parametrize("n", [0, 1])
def test_few_samples_or_none(n):
    policy = HuggingFace(language_model(), FIXED, PROMPTS)
    ids = torch.zeros(n, dtype=torch.int64)
    assert len(sample(policy, FIXED, n, seeded(), ids)) == n
    assert policy.logits(torch.zeros(n, 3, dtype=torch.int64), ids).shape == (n, 3, 3)


# Modes -----------------------------------------------------------------------------------------


def test_dropout_is_off_unless_asked_for_and_never_on_in_decoding():
    model = language_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    assert model.training
    policy = HuggingFace(model, FIXED, bos_id=BOS)
    tokens, lengths, ids = mixed_batch(FIXED, 1)
    want = rows_of(plain_logits(model, FIXED, [[BOS]]), tokens, lengths, ids)
    for _ in range(2):
        close(policy.logits(tokens).flatten(0, 1), want)
    policy.train()
    assert float((policy.logits(tokens) - policy.logits(tokens)).abs().max().detach()) > 0.1
    close(all_steps(policy, tokens, ids).flatten(0, 1), want)
    solution = solve(EBM(FIXED, torch.zeros(27), reference=policy.eval()))
    report = verify(policy.train(), solution)
    assert report.kl_target_policy < 1e-12
    assert all(module.training for module in policy.modules())


@pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning")
def test_gradient_checkpointing_leaves_sampling_and_gradients_as_they_are():
    model = language_model("llama")
    policy = HuggingFace(model, FIXED, bos_id=BOS)
    tokens, _, ids = mixed_batch(FIXED, 1)
    want = policy.logits(tokens)
    gradients = torch.autograd.grad(want.square().sum(), list(model.parameters()))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    got = policy.logits(tokens)
    close(got, want)
    again = torch.autograd.grad(got.square().sum(), list(model.parameters()))
    for one, other in zip(again, gradients, strict=True):
        close(one, other, 1e-5)
    close(all_steps(policy, tokens, ids), want)


def test_half_precision_is_scored_in_float32():
    policy = HuggingFace(language_model("llama", dtype=torch.bfloat16), FIXED, PROMPTS)
    tokens, lengths, ids = mixed_batch(FIXED, 3)
    assert policy.logits(tokens, ids).dtype == torch.bfloat16
    total = log_prob(policy, FIXED, tokens, lengths, ids).exp().sum()
    assert float(total.detach()) == pytest.approx(3, rel=0.05)


# What is refused, and memory -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, "something to read before the first token: give bos_id"),
        ({}, "something to read before the first token: give bos_id"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[15]]}, r"must be in \[0, 15\), got 15"),
        ({"prompts": [[-1]]}, r"must be in \[0, 15\), got -1"),
        ({"bos_id": 15}, r"must be in \[0, 15\), got 15"),
        ({"space": TokenSpace(16, 2), "bos_id": 0}, "has 15 ids and the space 16 tokens"),
        ({"space": TokenSpace(3, 33), "bos_id": 0}, "at most 32 tokens, .* takes 33"),
        ({"prompts": [[0] * 30]}, "at most 32 tokens, .* takes 33"),
    ],
)
def test_what_the_model_cannot_read_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HuggingFace(language_model(), **({"space": TokenSpace(3, 4)} | arguments))


def test_all_of_the_vocabulary_and_of_the_positions_may_be_used():
    HuggingFace(language_model(), TokenSpace(15, 32), bos_id=14)


def test_architectures_whose_logits_would_be_wrong_are_refused():
    ids = {"vocab_size": 15, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    auto, config = transformers.AutoModelForCausalLM, transformers.AutoConfig.for_model
    mamba = config("mamba", hidden_size=8, num_hidden_layers=1, state_size=2, **ids)
    with pytest.raises(ValueError, match="MambaForCausalLM is no Transformer with a key-value"):
        HuggingFace(auto.from_config(mamba), FIXED, bos_id=BOS)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8, "is_decoder": True, "max_position_embeddings": 32}
    roberta = auto.from_config(config("roberta", **sizes, **ids))  # its positions start at 1
    for parameter in roberta.parameters():
        parameter.data.normal_(0, 0.5, generator=seeded(parameter.numel()))
    with pytest.raises(ValueError, match="RobertaForCausalLM gives other logits with prompts"):
        HuggingFace(roberta, FIXED, bos_id=BOS)


def test_a_name_is_no_model_and_prompts_need_prompt_ids():
    with pytest.raises(Exception, match=r"from_pretrained|Type-check error"):
        HuggingFace("gpt2", FIXED)
    policy = HuggingFace(language_model(), FIXED, PROMPTS)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="there are 3 prompts: give prompt_ids"):
        policy.logits(tokens)
    with pytest.raises(ValueError, match=r"prompt_ids must be in \[0, 3\)"):
        policy.logits(tokens, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="made for other prompts"):
        EBM(FIXED, torch.zeros(2, 27), reference=policy, prompts=PROMPTS[:2])
    policy.prompts[0].append(0)  # a list of its own
    assert PROMPTS[0] == [2]


def test_a_walk_takes_no_more_sequences_at_a_time_than_fit():
    policy = HuggingFace(language_model(), TokenSpace(3, 5), bos_id=BOS)
    rows = []
    policy.model.register_forward_hook(lambda _, inputs, out: rows.append(len(out.logits)))
    memory = 20 * (policy.tree_bytes_per_node + 16 * 3)
    logits = torch.cat([block.logits for block in walk(policy, policy.space, memory=memory)])
    assert len(logits) == policy.space.num_states
    assert 3 <= max(rows) <= 20
    wider = HuggingFace(language_model(vocab_size=1000), TokenSpace(3, 5), bos_id=BOS)
    assert wider.tree_bytes_per_node - policy.tree_bytes_per_node == 4 * 5 * 985


def test_without_the_extra_one_sentence_says_so():
    code = "import sys; sys.modules['transformers'] = None; import rl_ebm.policies as p\n"
    code += "try: p.HuggingFace\nexcept ImportError as e: print(e)\nprint(hasattr(p, 'Other'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    sentence = "rl_ebm.policies.HuggingFace needs the extra hf: pip install '.[hf]' in a checkout"
    assert done.stdout.splitlines() == [f"{sentence} of rl-ebm", "False"]
