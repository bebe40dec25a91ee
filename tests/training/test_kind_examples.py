"""Every kind of the library: its example goes into a run's folder and comes out again."""

from __future__ import annotations

import json

import pytest
import torch
from run_cases import NETWORK, differences, load_state, small_options
from toy_policies import seeded

import rl_ebm
from rl_ebm.agents import SoftQAgent
from rl_ebm.training.config import TrainConfig
from rl_ebm.training.kinds import GIVEN, KINDS, TASK
from rl_ebm.training.run import resume, train

SPACE = rl_ebm.TokenSpace(3, 3, eos_id=1)
PROMPTS = [[1], [2, 0]]
EVERY_STEP = TrainConfig(steps=4, checkpoint_every=1e-9)
CASES = [(role, name) for role, known in KINDS.items() for name in known if name != TASK]
every_kind = pytest.mark.parametrize(("role", "name"), CASES)
with_prompts = pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["", "prompts"])


def run_of(folder, role, name, prompts=None):
    """A run in which one thing is the kind's example; what was trained, and its EBM."""
    torch.manual_seed(0)
    kind = KINDS[role][name]
    thing = kind.example(SPACE, prompts)
    count = len(prompts or [[]])
    scores = torch.randn(count, SPACE.num_sequences, generator=seeded(), dtype=torch.float64)
    reward, reference = (thing if role == x else None for x in ("reward", "reference"))
    ebm = rl_ebm.EBM(SPACE, scores if reward is None else reward, 0.7, reference, prompts)
    how = {"network": NETWORK}
    if role == "policy":  # those of the first runs are made by name, or by a Transformer's sizes
        how = {"policy": thing} if kind.registered else {"network": getattr(thing, "config", name)}
    options = small_options("soft-q")
    policy, _ = train(ebm, out=folder, config=EVERY_STEP, options=options, progress=False, **how)
    return policy, ebm


def numbers(role, thing, prompts):
    """What it says of every response to every prompt."""
    n, count = SPACE.num_sequences, len(prompts or [[]])
    tokens, lengths = (x[torch.arange(n).repeat(count)] for x in SPACE.sequences())
    ids = torch.arange(count).repeat_interleave(n)
    if role == "reward":
        return rl_ebm.EBM(SPACE, thing, prompts=prompts).log_weight(tokens, lengths, ids)
    return thing.logits(tokens, ids)


@with_prompts
@every_kind
def test_its_parts_make_it_again(role, name, prompts):
    kind = KINDS[role][name]
    thing = kind.example(SPACE, prompts)
    again = kind.rebuild(kind.describe(thing), SPACE, prompts)
    for x in (thing, again):
        assert isinstance(x, kind.of)
        assert kind.derived or type(x) is kind.of
    if role == "policy":  # its weights are stored beside it
        again.load_state_dict(thing.state_dict())
    assert torch.equal(numbers(role, again, prompts), numbers(role, thing, prompts))


@with_prompts
@every_kind
def test_what_is_loaded_is_what_was_trained_on(role, name, prompts, tmp_path):
    policy, ebm = run_of(tmp_path / "r", role, name, prompts)
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    said = config["policy"]["kind"] if role == "policy" else config["ebm"][role]
    assert said != GIVEN[role]
    again, other = rl_ebm.load(tmp_path / "r")
    of = {"reward": other.reward_model, "reference": other.reference, "policy": again}[role]
    assert isinstance(of, KINDS[role][name].of)
    assert not differences(dict(again.state_dict()), dict(policy.state_dict()))
    assert torch.equal(numbers("policy", again, prompts), numbers("policy", policy, prompts))
    batch = rl_ebm.solve(ebm).sample(30, seeded(), torch.arange(30) % ebm.num_prompts)
    of_batch = batch.tokens, batch.lengths, batch.prompt_ids
    assert torch.equal(other.log_weight(*of_batch), ebm.log_weight(*of_batch))


@pytest.mark.slow
@pytest.mark.usefixtures("saves_at_each_step")
@every_kind
def test_a_run_that_was_cut_short_goes_on_as_if_it_had_not_been(role, name, tmp_path, monkeypatch):
    run_of(tmp_path / "whole", role, name)
    real, calls = SoftQAgent.update, []

    def update(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(SoftQAgent, "update", update)
        with pytest.raises(KeyboardInterrupt):
            run_of(tmp_path / "cut", role, name)
    assert load_state(tmp_path / "cut")["step"] == 2
    resume(tmp_path / "cut", progress=False)
    assert not differences(load_state(tmp_path / "cut"), load_state(tmp_path / "whole"))
