"""Adapters of peft: the policy with one, the reference without it, in any order; and folders."""

from __future__ import annotations

import copy
import json
import shutil

import pytest

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("peft", reason="needs the extra hf")

import torch
from hf_cases import (
    BOS,
    PROMPTS,
    all_steps,
    language_model,
    lora,
    mixed_batch,
    peft,
    plain_logits,
    rows_of,
    transformers,
)
from toy_policies import close

from rl_ebm import EBM, TokenSpace, solve, verify
from rl_ebm.policies import HuggingFace, check

SPACE = TokenSpace(4, 3, eos_id=1)
TOKENS, LENGTHS, IDS = mixed_batch(SPACE, 3, pad=2)
KINDS = pytest.mark.parametrize("kind", ["gpt2", "llama"])
# Of peft with the newest transformers; and of older peft, where a model has no name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]


def adapted(kind="gpt2", prompts=PROMPTS, seed=0, **options):
    return HuggingFace(lora(language_model(kind), seed, **options), SPACE, prompts)


def real(rows):
    return torch.cat([row[:n] for row, n in zip(rows, LENGTHS.tolist(), strict=True)])


def want_of(model, contexts=PROMPTS):
    """Of the model as it is now, in evaluation mode: put in before it gets an adapter."""
    return rows_of(plain_logits(model, SPACE, contexts), TOKENS, LENGTHS, IDS)


@KINDS
def test_policy_and_reference_pass_the_conformance_check(kind):
    policy = adapted(kind)
    check(policy)
    check(policy.reference(), name="the reference")
    step = policy.step
    policy.step = lambda state, tokens: 2 * step(state, tokens)
    with pytest.raises(ValueError, match="step does not agree with its logits"):
        check(policy)


@KINDS
def test_policy_and_reference_interleaved_are_the_adapted_model_and_the_base(kind):
    base = want_of(language_model(kind).eval())
    policy = adapted(kind)
    with_adapter = want_of(policy.model)
    reference = policy.reference()
    assert float((with_adapter - base).abs().max()) > 0.1

    for _ in range(2):
        close(real(reference.logits(TOKENS, IDS)), base)
        close(real(policy.logits(TOKENS, IDS)).detach(), with_adapter)
    # Decoding in turn, a token of one, a token of the other.
    states = policy.start(IDS), reference.start(IDS)
    steps = [], []
    for t in range(3):
        last = TOKENS[:, t - 1] if t else None
        for one, state, out in zip((policy, reference), states, steps, strict=True):
            out.append(one.step(state, last).detach())
    close(real(torch.stack(steps[0], 1)), with_adapter)
    close(real(torch.stack(steps[1], 1)), base)
    close(real(all_steps(reference, TOKENS, IDS)), base)


@KINDS
def test_gradients_flow_into_the_adapter_alone_whatever_the_reference_does(kind):
    policy = adapted(kind)
    policy.logits(TOKENS, IDS).square().sum().backward()
    want = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    assert want
    assert all("lora_" in name for name in want)
    policy.zero_grad()

    reference = policy.reference()
    loss = policy.logits(TOKENS, IDS).square().sum()
    assert not reference.logits(TOKENS, IDS).requires_grad
    assert not all_steps(reference, TOKENS, IDS).requires_grad
    loss.backward()

    got = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name], 1e-9)


def test_the_reference_leaves_what_is_frozen_and_every_mode_as_it_was():
    policy = adapted(lora_dropout=0.5)
    frozen = next(p for n, p in policy.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    policy.train()
    policy.model.get_base_model().lm_head.eval()
    before = [p.requires_grad for p in policy.parameters()], [m.training for m in policy.modules()]
    base = want_of(language_model().eval())
    reference = policy.reference()
    for rows in (reference.logits(TOKENS, IDS), all_steps(reference, TOKENS, IDS)):
        close(real(rows), base)  # and no dropout
    assert before == (
        [p.requires_grad for p in policy.parameters()],
        [m.training for m in policy.modules()],
    )
    with pytest.raises(ValueError, match="token ids must be in"):
        reference.logits(TOKENS + 100, IDS)
    assert before[0] == [p.requires_grad for p in policy.parameters()]
    assert float((policy.logits(TOKENS, IDS) - reference.logits(TOKENS, IDS)).detach().std()) > 0.1


def test_the_reference_is_the_same_memory_and_training_the_adapter_leaves_it():
    policy = adapted()
    reference = policy.reference()
    before = reference.logits(TOKENS, IDS)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    policy.logits(TOKENS, IDS).square().sum().backward()
    optimizer.step()
    close(reference.logits(TOKENS, IDS), before, 0.0)
    # No copy: a change of the model's weights is one of the reference's.
    policy.model.get_base_model().transformer.wte.weight.data.mul_(2)
    assert float((reference.logits(TOKENS, IDS) - before).abs().max()) > 0.1
    assert reference.to("cpu") is reference
    assert reference.device == torch.device("cpu")
    with pytest.raises(ValueError, match="is the policy's own model, on cpu: move the policy"):
        reference.to("meta")


def test_the_reference_is_a_reference_for_the_exact_solution():
    policy = adapted()
    reference = policy.reference()
    assert reference.prompts == PROMPTS
    assert reference.tree_bytes_per_node == policy.tree_bytes_per_node
    ebm = EBM(SPACE, lambda tokens, lengths, ids: 0.0 * lengths, 1.0, reference, PROMPTS)
    assert ebm.to("cpu").reference is reference
    solution = solve(ebm)
    other = HuggingFace(language_model(), SPACE, PROMPTS)
    assert verify(reference, solution).kl_target_policy < 1e-12
    assert verify(other, solution).kl_target_policy < 1e-12
    assert verify(policy, solution).kl_target_policy > 0.01
    close(solution.log_z, torch.zeros(3, dtype=torch.float64), 1e-9)


def test_modules_that_are_saved_whole_stay_out_of_the_reference():
    base = want_of(language_model("llama").eval())
    policy = adapted("llama", modules_to_save=["lm_head"])
    head = next(p for n, p in policy.named_parameters() if "modules_to_save" in n)
    head.data.add_(1.0)
    close(real(policy.reference().logits(TOKENS, IDS)), base)
    assert head.requires_grad


def test_a_model_without_a_free_reference_says_so():
    with pytest.raises(ValueError, match="the model has no adapter"):
        HuggingFace(language_model(), SPACE, PROMPTS).reference()
    with (
        pytest.warns(UserWarning, match="disabling adapter layers with bias"),
        pytest.raises(ValueError, match="bias of the model itself is trained too"),
    ):
        adapted(bias="all").reference()
    tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prompt tuning moves the positions"):
        HuggingFace(peft.get_peft_model(language_model(), tuning), SPACE, PROMPTS)


@KINDS
def test_a_checkpoint_holds_the_adapter_alone(kind):
    policy, other = adapted(kind), adapted(kind, seed=5)
    state = copy.deepcopy(policy.state_dict())
    assert state
    assert all("lora_" in name for name in state)
    assert list(torch.nn.ModuleDict({"p": policy}).state_dict()) == [f"p.{n}" for n in state]
    other.load_state_dict(state)
    close(other.logits(TOKENS, IDS), policy.logits(TOKENS, IDS), 0.0)
    name = next(iter(state))
    lost = {n: x for n, x in state.items() if n != name}
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(lost)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(state | {"more": state[name]})
    whole = HuggingFace(language_model(kind), SPACE, PROMPTS)
    assert len(whole.state_dict()) >= len(list(whole.parameters()))


# Folders ---------------------------------------------------------------------------------------


@KINDS
def test_a_saved_model_comes_back_bit_for_bit(kind, tmp_path):
    policy = HuggingFace(language_model(kind), SPACE, PROMPTS, BOS, logits_are_values=True)
    policy.save_pretrained(tmp_path / "new" / "policy")
    loaded = HuggingFace.from_pretrained(str(tmp_path / "new" / "policy"), SPACE, PROMPTS)
    assert (loaded.bos_id, loaded.logits_are_values) == (BOS, True)
    close(loaded.logits(TOKENS, IDS), policy.logits(TOKENS, IDS), 0.0)
    other = HuggingFace.from_pretrained(tmp_path / "new" / "policy", SPACE, PROMPTS, bos_id=3)
    assert other.bos_id == 3
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["policy"]


def test_a_folder_of_transformers_is_read_too(tmp_path):
    model = language_model("llama")
    model.save_pretrained(tmp_path / "m")
    loaded = HuggingFace.from_pretrained(tmp_path / "m", SPACE, PROMPTS)
    assert loaded.bos_id is None
    assert not loaded.logits_are_values
    close(real(loaded.logits(TOKENS, IDS)).detach(), want_of(model.eval()))


@KINDS
def test_a_saved_adapter_comes_back_onto_its_model(kind, tmp_path):
    policy = adapted(kind)
    policy.save_pretrained(tmp_path / "a")
    assert sum(f.stat().st_size for f in (tmp_path / "a").glob("*.safetensors")) < 20_000
    with pytest.raises(ValueError, match=r"not the name of its model: pass the model, base="):
        HuggingFace.from_pretrained(tmp_path / "a", SPACE, PROMPTS)
    loaded = HuggingFace.from_pretrained(tmp_path / "a", SPACE, PROMPTS, base=language_model(kind))
    close(loaded.logits(TOKENS, IDS), policy.logits(TOKENS, IDS), 0.0)
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, p in policy.named_parameters() if p.requires_grad
    ]
    # An adapter that names its model, a folder here, finds it.
    language_model(kind).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    found = HuggingFace.from_pretrained(tmp_path / "a", SPACE, PROMPTS)
    close(found.logits(TOKENS, IDS), policy.logits(TOKENS, IDS), 0.0)
    close(found.reference().logits(TOKENS, IDS), policy.reference().logits(TOKENS, IDS), 0.0)


def test_saving_again_replaces_and_a_write_that_fails_leaves_what_was(tmp_path, monkeypatch):
    folder = tmp_path / "p"
    first, second = (HuggingFace(language_model(seed=s), SPACE, PROMPTS) for s in (0, 1))

    def loaded():
        return HuggingFace.from_pretrained(folder, SPACE, PROMPTS).logits(TOKENS, IDS)

    first.save_pretrained(folder)
    (tmp_path / "p.part").mkdir()  # of a write that was cut short
    (tmp_path / "p.part" / "junk").write_text("x")
    second.save_pretrained(folder)
    close(loaded(), second.logits(TOKENS, IDS), 0.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p"]
    assert not (folder / "junk").exists()

    def full(path):
        path.mkdir()
        (path / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(first.model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        first.save_pretrained(folder)
    monkeypatch.undo()
    moves = []

    def broken(source, target):
        moves.append((source.name, target.name))
        if len(moves) == 2:
            raise OSError(5, "Input/output error")
        shutil.move(source, target)

    monkeypatch.setattr("rl_ebm.policies.hf.folders.os.replace", broken)
    with pytest.raises(OSError, match="Input/output"):
        first.save_pretrained(folder)
    assert moves == [("p", "p.old"), ("p.part", "p"), ("p.old", "p")]
    close(loaded(), second.logits(TOKENS, IDS), 0.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p"]


def test_no_other_folder_is_overwritten_and_none_is_read_that_holds_no_model(tmp_path):
    policy = HuggingFace(language_model(), SPACE, PROMPTS)
    (tmp_path / "mine").mkdir()
    policy.save_pretrained(tmp_path / "mine")  # empty: nothing is lost
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("theirs", "file"):
        with pytest.raises(ValueError, match="holds no policy of ours, and would be lost"):
            policy.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"theirs holds no model$"):
        HuggingFace.from_pretrained(tmp_path / "theirs", SPACE, PROMPTS)
    (tmp_path / "mine").rename(tmp_path / "gone.old")
    with pytest.raises(ValueError, match=r"cut short, and the model before it is in .*gone.old"):
        HuggingFace.from_pretrained(tmp_path / "gone", SPACE, PROMPTS)
    policy.save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match="a whole model, no adapter: leave base out"):
        HuggingFace.from_pretrained(tmp_path / "mine", SPACE, PROMPTS, base=language_model())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    assert again.config.model_type == policy.model.config.model_type


@pytest.mark.parametrize("adapter", [False, True])
def test_code_that_came_with_a_model_is_never_run(adapter, tmp_path, monkeypatch):
    """Nor is anybody asked whether it may be, who would say yes."""
    folder, ran = tmp_path / "theirs", tmp_path / "ran"
    language_model("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    config |= {"model_type": "theirs", "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    if adapter:
        adapted("llama").save_pretrained(tmp_path / "adapter")
        path = tmp_path / "adapter" / "adapter_config.json"
        said = json.loads(path.read_text()) | {"base_model_name_or_path": str(folder)}
        path.write_text(json.dumps(said))
        folder = tmp_path / "adapter"
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=f"{folder} needs code that came with the model, and none"):
        HuggingFace.from_pretrained(folder, SPACE, PROMPTS)
    assert not ran.exists()
