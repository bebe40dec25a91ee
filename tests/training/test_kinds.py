"""Another package's reward, reference and policy: stored in a run's folder, and made again."""

from __future__ import annotations

import json
import math

import pytest
import torch
from run_cases import NETWORK, differences, load_state
from torch import nn
from toy_policies import seeded

import rl_ebm
from rl_ebm.cli import main
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.training.kinds import KINDS, register
from rl_ebm.training.run import resume, train

SPACE = rl_ebm.TokenSpace(3, 3)
PROMPTS = [[1], [2, 2]]


class Weighted:
    """R(x, y) = factor * the sum of the tokens' weights, a row for each prompt."""

    forbids = False
    called = False

    def __init__(self, weights, factor):
        self.weights, self.factor = weights, factor

    def __call__(self, tokens, lengths, prompt_ids):
        return self.factor * self.weights[prompt_ids[:, None], tokens].sum(1)

    def bind(self, space, prompts):
        assert self.weights.shape == (len(prompts or [[]]), space.vocab_size)
        return self

    def to(self, device):
        return Weighted(self.weights.to(device), self.factor)


class Tilted:
    """A law that likes low tokens."""

    forbids = False

    def __init__(self, space, slope):
        self.space, self.slope = space, slope

    def logits(self, tokens, prompt_ids=None):
        row = -self.slope * torch.arange(self.space.vocab_size, dtype=torch.float64)
        return row.expand(*tokens.shape, -1)


class Bigram(nn.Module):
    """Logits from the token before; ``width`` numbers of it."""

    def __init__(self, space, width, prompts=None):
        super().__init__()
        self.space, self.width, self.prompts = space, width, prompts
        self.before = nn.Embedding(space.vocab_size + 1, width)
        self.head = nn.Linear(width, space.vocab_size)

    def logits(self, tokens, prompt_ids=None):
        first = torch.full_like(tokens[:, :1], self.space.vocab_size)
        return self.head(self.before(torch.cat([first, tokens[:, :-1]], 1)))


@pytest.fixture
def registered(monkeypatch):
    """The three kinds, known for one test."""
    for role, known in KINDS.items():
        monkeypatch.setitem(KINDS, role, dict(known))
    register(
        "reward", "their weights", Weighted,
        lambda r: {"weights": r.weights, "factor": r.factor},
        lambda parts, space, prompts: Weighted(parts["weights"], parts["factor"]),
    )  # fmt: skip
    register(
        "reference", "their slope", Tilted,
        lambda r: {"slope": r.slope},
        lambda parts, space, prompts: Tilted(space, parts["slope"]),
    )  # fmt: skip
    register(
        "policy", "their bigram", Bigram,
        lambda p: {"width": p.width},
        lambda parts, space, prompts: Bigram(space, parts["width"], prompts),
    )  # fmt: skip


def theirs(prompts=None):
    weights = torch.randn(len(prompts or [[]]), 3, generator=seeded(), dtype=torch.float64)
    return rl_ebm.EBM(SPACE, Weighted(weights, 1.5), 0.7, Tilted(SPACE, 0.5), prompts)


def run_of(tmp_path, name="r", steps=4, prompts=None):
    torch.manual_seed(0)
    policy = Bigram(SPACE, 4, prompts)
    train(theirs(prompts), out=tmp_path / name, policy=policy, steps=steps, progress=False)
    return tmp_path / name, policy


@pytest.mark.parametrize("prompts", [None, PROMPTS])
def test_a_run_of_all_three_is_loaded_without_being_passed_anything(registered, tmp_path, prompts):
    run, policy = run_of(tmp_path, prompts=prompts)
    again, ebm = rl_ebm.load(run)
    assert type(again) is Bigram
    assert again.width == 4
    assert again.logits_are_values == policy.logits_are_values
    assert not differences(dict(again.state_dict()), dict(policy.state_dict()))
    tokens, lengths = SPACE.sequences()
    for p in range(ebm.num_prompts):
        ids = torch.full_like(lengths, p)
        want = theirs(prompts).log_weight(tokens, lengths, ids)
        assert torch.equal(ebm.log_weight(tokens, lengths, ids), want)


def test_it_goes_on_as_a_run_does_whose_parts_are_passed_again(tmp_path, request):
    passed, _ = run_of(tmp_path, "passed")
    ebm = theirs()
    given = {"reward": ebm.reward_model, "reference": ebm.reference, "policy": Bigram(SPACE, 4)}
    resume(passed, steps=8, progress=False, **given)
    request.getfixturevalue("registered")
    stored, _ = run_of(tmp_path, "stored")
    resume(stored, steps=8, progress=False)
    assert not differences(load_state(stored), load_state(passed))
    assert main(["verify", str(stored)]) == 0
    with pytest.raises(rl_ebm.RunError, match="leave policy out"):
        resume(stored, policy=Bigram(SPACE, 4))


def test_the_folder_holds_names_and_parts_alone(registered, tmp_path):
    run, _ = run_of(tmp_path)
    config = json.loads((run / "config.json").read_text())
    assert config["ebm"]["reward"] == {
        "kind": "their weights", "data": {"factor": 1.5}, "tensors": ["weights"],
    }  # fmt: skip
    assert config["ebm"]["reference"]["data"] == {"slope": 0.5}
    assert config["policy"] == {"kind": "their bigram", "data": {"width": 4}, "tensors": []}
    assert __name__ not in (run / "config.json").read_text()


def test_a_process_that_does_not_know_the_kinds_says_so(registered, tmp_path, monkeypatch):
    run, _ = run_of(tmp_path)
    for role, known in KINDS.items():
        ours = {name: kind for name, kind in known.items() if not kind.registered}
        monkeypatch.setitem(KINDS, role, ours)
    words = r"reference is of the kind 'their slope', which this process does not know: import"
    with pytest.raises(rl_ebm.RunError, match=words):
        rl_ebm.load(run)
    ebm = theirs()
    with pytest.raises(rl_ebm.RunError, match=r"'their weights'.* load\(run, reward=\.\.\.\)"):
        rl_ebm.load(run, reference=ebm.reference)
    with pytest.raises(rl_ebm.RunError, match=r"policy is of the kind 'their bigram'"):
        rl_ebm.load(run, reference=ebm.reference, reward=ebm.reward_model)


@pytest.mark.parametrize(
    ("role", "change", "words"),
    [
        ("reward", {"data": None}, "ebm.reward.data is null"),
        ("reward", {"tensors": "weights"}, "ebm.reward.tensors is"),
        ("reward", {"tensors": ["other"]}, "task.safetensors is damaged: it holds no"),
        ("reward", {"data": {}}, "is damaged"),
        ("reference", {"kind": 3}, "ebm.reference.kind is 3"),
        ("reference", {"data": {}}, "is damaged"),
        ("policy", {"data": {"width": "x"}}, "is damaged"),
        ("policy", {"tensors": 1}, "policy.tensors is 1"),
    ],
)
def test_damage_gets_a_sentence(registered, tmp_path, role, change, words):
    run, _ = run_of(tmp_path)
    path = run / "config.json"
    config = json.loads(path.read_text())
    (config if role == "policy" else config["ebm"])[role] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(rl_ebm.RunError, match=words):
        rl_ebm.load(run)


@pytest.mark.parametrize("parts", [{"x": {1: 2}}, {"x": math.nan}, {"x": (1, 2)}, {"x": object()}])
def test_parts_that_no_folder_holds_are_refused_before_the_run_is_made(registered, tmp_path, parts):
    class Odd(Tilted):
        pass

    register("reference", "odd", Odd, lambda r: parts, lambda *_: None)
    ebm = rl_ebm.EBM(SPACE, torch.zeros(27), reference=Odd(SPACE, 1.0))
    with pytest.raises(ValueError, match="parts that a run cannot hold"):
        train(ebm, out=tmp_path / "r", network=NETWORK, steps=1)
    assert not (tmp_path / "r").exists()


class Mine(Tabular):
    """A table of theirs."""


class Four(Bigram):
    """A bigram whose width need not be said."""

    def __init__(self, space, width=4):
        super().__init__(space, width)


@pytest.mark.parametrize(("kind", "parts"), [(Mine, {}), (Four, {"width": 4})])
def test_a_new_kind_of_network_goes_by_its_name(registered, tmp_path, kind, parts):
    register("policy", "new", kind, lambda p: {name: getattr(p, name) for name in parts},
             lambda given, space, prompts: kind(space, **given))  # fmt: skip
    policy, _ = train(theirs(), out=tmp_path, network="new", steps=1, progress=False)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["policy"] == {"kind": "new", "data": parts, "tensors": []}
    again, _ = rl_ebm.load(tmp_path)
    assert type(again) is type(policy) is kind
    assert not differences(dict(again.state_dict()), dict(policy.state_dict()))
    assert resume(tmp_path, steps=2, progress=False)[2]
    with pytest.raises(ValueError, match=r"policy must be 'transformer', .* or 'new'"):
        train(theirs(), network="tables", steps=1)


def test_a_kind_that_needs_parts_is_not_made_by_its_name(registered, tmp_path):
    words = r"kind 'their bigram' is not made without its parts \(KeyError\('width'\)\).* policy="
    with pytest.raises(ValueError, match=words):
        train(theirs(), out=tmp_path / "r", network="their bigram", steps=1)
    register("policy", "odd", Four, lambda p: {}, lambda *_: Bigram(SPACE, 4))
    with pytest.raises(ValueError, match="the kind 'odd' is of Four, and made a Bigram"):
        train(theirs(), out=tmp_path / "r", network="odd", steps=1)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("rewards", "x", Bigram, str, str), ValueError, "role must be one of reward, reference"),
        (("reward", "", Bigram, str, str), TypeError, "name must be printable text"),
        (("reward", "table", Bigram, str, str), ValueError, "called 'table' already"),
        (("reward", "function", Bigram, str, str), ValueError, "called 'function' already"),
        (("reference", "x", Uniform, str, str), ValueError, "Uniform has a kind of reference"),
    ],
)
def test_what_cannot_be_registered_gets_a_sentence(registered, arguments, error, words):
    with pytest.raises(error, match=words):
        register(*arguments)
