"""From a tokenizer and a TRL reward to a trained, verified and saved language model."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("peft", reason="needs the extra hf")
pytest.importorskip("tokenizers", reason="needs the extra hf")

import torch
from hf_cases import language_model, lora, plain_logits, tokenizers, transformers

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.policies import HuggingFace

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]
A, T, BETA = 12, 3, 0.5


def make_tokenizer():
    """A byte-pair encoding of 12 tokens, EOS among them, learned from a few words."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=A, special_tokens=["<eos>", "?"], show_progress=False
    )
    tokenizer.train_from_iterator(["a cat sat", "the cat", "a hat", "the hat sat"], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="?"
    )


TOKENIZER = make_tokenizer()
SPACE = rl_ebm.TokenSpace(len(TOKENIZER), T, eos_id=TOKENIZER.eos_token_id)
TEXTS = ["a", "the cat"]
PROMPTS = [TOKENIZER(text)["input_ids"] for text in TEXTS]


def reward(prompts, completions, wish, **_):
    """As TRL calls it: on texts, with a column of the data set."""
    return [
        2.0 * (w in y) + 0.5 * y.count("t") - 0.1 * len(x)
        for x, y, w in zip(prompts, completions, wish, strict=True)
    ]


def problem(kind="gpt2"):
    """A policy with an adapter that does nothing yet, and the EBM of its own model."""
    model = lora(language_model(kind, vocab_size=16, dtype=torch.float32), r=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    policy = HuggingFace(model, SPACE, PROMPTS)
    trl = rl_ebm.rewards.from_trl(reward, TOKENIZER.decode, columns={"wish": ["a", "he"]})
    return policy, rl_ebm.EBM(SPACE, trl, BETA, policy.reference(), PROMPTS)


def test_the_tokenizer_is_a_real_one():
    assert len(TOKENIZER) == A
    assert [len(p) for p in PROMPTS] == [len(TOKENIZER.tokenize(text)) for text in TEXTS]
    assert len(set(map(len, PROMPTS))) == 2
    assert TOKENIZER.decode(PROMPTS[1]) == "the cat"


def test_the_exact_solution_is_the_enumeration_of_texts():
    """By Python's sums over decoded texts, and one forward pass for each prefix."""
    policy, ebm = problem()
    solution = rl_ebm.solve(ebm)
    plain = language_model("gpt2", vocab_size=16, dtype=torch.float32).eval()
    rows = plain_logits(plain, SPACE, PROMPTS)
    log_ref = {s: x.double().log_softmax(-1).tolist() for s, x in rows.items()}
    others = [a for a in range(A) if a != SPACE.eos_id]
    for i, wish in enumerate(["a", "he"]):
        log_w = {}
        for n in range(T):
            for y in product(others, repeat=n):
                value = reward([TEXTS[i]], [TOKENIZER.decode(list(y))], [wish])[0] / BETA
                value += sum(log_ref[i, y[:t]][a] for t, a in enumerate(y))
                if n < T - 1:  # at the last position EOS is forced
                    value += log_ref[i, y][SPACE.eos_id]
                log_w[(*y, SPACE.eos_id)] = value
        top = max(log_w.values())
        log_z = top + math.log(math.fsum(math.exp(w - top) for w in log_w.values()))
        assert float(solution.log_z[i]) == pytest.approx(log_z, abs=1e-5)
        best = max(log_w, key=log_w.get)
        tokens = torch.tensor([[*best, *[0] * (T - len(best))]])
        log_p = solution.log_prob(tokens, torch.tensor([len(best)]), torch.tensor([i]))
        assert float(log_p) == pytest.approx(log_w[best] - log_z, abs=1e-5)
    # The untrained policy is the reference: KL(pi, p*) = log Z - E[R] / beta.
    report = rl_ebm.verify(policy, solution)
    for i, part in enumerate(report.per_prompt):
        gap = float(solution.log_z[i]) - part.expected_reward_policy / BETA
        assert part.kl_policy_target == pytest.approx(gap, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("agent", ["vargrad", "policy-gradient"])
def test_training_the_adapter_comes_near_the_target_and_is_saved(kind, agent, tmp_path):
    policy, ebm = problem(kind)
    solution = rl_ebm.solve(ebm)
    before = rl_ebm.verify(policy, solution)
    reference = ebm.reference.logits(*everything())

    options = AGENTS[agent].config(batch_size=256, lr=0.05)
    trained, report = rl_ebm.train(ebm, agent, policy=policy, options=options, steps=60)

    assert trained is policy
    # No nearer: the model is frozen, random, and eight numbers wide.
    assert report.kl_policy_target < before.kl_policy_target / 2
    assert report.kl_target_policy < before.kl_target_policy * 0.7
    assert torch.equal(ebm.reference.logits(*everything()), reference)

    policy.save_pretrained(tmp_path / "policy")
    base = language_model(kind, vocab_size=16, dtype=torch.float32)
    loaded = HuggingFace.from_pretrained(tmp_path / "policy", SPACE, PROMPTS, base=base)
    again = rl_ebm.verify(loaded, solution)
    assert again.kl_policy_target == pytest.approx(report.kl_policy_target, rel=1e-6)


def everything():
    tokens, _ = SPACE.sequences()
    return tokens.repeat(2, 1), torch.arange(2).repeat_interleave(len(tokens))


def test_a_run_directory_holds_the_adapter_and_is_resumed(tmp_path):
    run, options = tmp_path / "run", AGENTS["vargrad"].config(batch_size=64)
    policy, ebm = problem()
    rl_ebm.train(ebm, "vargrad", run, policy=policy, options=options, steps=2)
    assert (run / "policy.safetensors").stat().st_size < 20_000
    assert json.loads((run / "config.json").read_text())["policy"] == {"kind": "custom"}

    fresh, other = problem()
    loaded, _ = rl_ebm.load(run, reward=other.reward_model, reference=other.reference, policy=fresh)
    assert loaded is fresh
    assert torch.equal(fresh.logits(*everything()), policy.logits(*everything()))

    fresh, other = problem()
    again, report, went_on = rl_ebm.resume(
        run, steps=4, reward=other.reward_model, reference=other.reference, policy=fresh
    )
    assert went_on
    assert again is fresh
    assert 0 <= report.kl_target_policy < math.inf
    assert not torch.equal(fresh.logits(*everything()), policy.logits(*everything()))


@pytest.mark.slow
def test_the_whole_model_is_trained_with_another_as_its_reference(tmp_path):
    """Without an adapter: tied embeddings, and a second model as the reference."""
    _, ebm = problem()
    policy = HuggingFace(language_model(vocab_size=16, dtype=torch.float32), SPACE, PROMPTS)
    before = rl_ebm.verify(policy, rl_ebm.solve(ebm))
    options = AGENTS["soft-q"].config(batch_size=128, lr=0.03, tau=0.5)
    _, report = rl_ebm.train(
        ebm, "soft-q", tmp_path / "r", policy=policy, options=options, steps=30
    )
    assert policy.logits_are_values
    assert 0 < report.bellman_residual_max < math.inf
    assert report.kl_policy_target < before.kl_policy_target / 2
    fresh = HuggingFace(language_model(vocab_size=16, seed=3), SPACE, PROMPTS).float()
    rl_ebm.load(tmp_path / "r", reward=ebm.reward_model, reference=ebm.reference, policy=fresh)
    assert torch.equal(fresh.logits(*everything()), policy.logits(*everything()))
