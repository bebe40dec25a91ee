"""Training a policy that is passed in, and its runs, which ask for it again."""

from __future__ import annotations

import json

import pytest
import torch
from run_cases import differences, small_options

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.policies import Tabular

SPACE = rl_ebm.TokenSpace(3, 3)


def ebm(reward=None):
    scores = torch.randn(27, generator=torch.Generator().manual_seed(1))
    return rl_ebm.EBM(SPACE, scores if reward is None else reward)


def table(seed=0):
    return Tabular(SPACE, generator=torch.Generator().manual_seed(seed))


class Tied(torch.nn.Module):
    """A policy with two names for one weight, as language models have."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.zeros(3, 3))
        self.other = self.one

    def logits(self, tokens, prompt_ids=None):
        return self.one + self.other.expand(len(tokens), 3, 3)


@pytest.mark.parametrize(("agent", "values"), [("soft-q", True), ("policy-gradient", False)])
def test_a_policy_that_is_passed_in_is_trained_in_place(agent, values):
    policy = table()
    policy.logits_are_values = not values
    before = policy.table.detach().clone()
    untrained = rl_ebm.verify(policy, rl_ebm.solve(ebm()))

    options = AGENTS[agent].config(batch_size=256, lr=0.2)
    trained, report = rl_ebm.train(ebm(), agent, policy=policy, options=options, steps=60)

    assert trained is policy
    assert policy.logits_are_values is values
    assert not torch.equal(policy.table, before)
    assert report.kl_target_policy < untrained.kl_target_policy / 10


def test_no_steps_leave_the_policy_as_it_was():
    policy = table()
    before = policy.table.detach().clone()
    rl_ebm.train(ebm(), "soft-q", policy=policy, steps=0)
    assert torch.equal(policy.table, before)


def test_its_run_is_loaded_and_resumed_with_a_policy_made_alike(tmp_path):
    options, run = small_options("soft-q"), tmp_path / "run"
    half, _ = rl_ebm.train(ebm(), out=run, policy=table(), options=options, steps=3)

    loaded, _ = rl_ebm.load(run, policy=table(5))
    assert differences(half.state_dict(), loaded.state_dict()) == []
    assert loaded.logits_are_values

    again = table(6)
    other, _, went_on = rl_ebm.resume(run, steps=6, policy=again)
    assert went_on
    assert other is again
    assert json.loads((run / "config.json").read_text())["policy"] == {"kind": "custom"}
    assert torch.equal(rl_ebm.load(run, policy=table(7))[0].table, again.table)


def test_tied_weights_are_saved_and_loaded(tmp_path):
    trained, _ = rl_ebm.train(ebm(), out=tmp_path / "run", policy=Tied(), steps=3)
    loaded, _ = rl_ebm.load(tmp_path / "run", policy=Tied())
    assert float(trained.one.detach().abs().max()) > 0
    assert torch.equal(loaded.one, trained.one)


def test_a_run_says_when_it_needs_a_policy_and_when_not(tmp_path):
    own, ours = tmp_path / "own", tmp_path / "ours"
    rl_ebm.train(ebm(), out=own, policy=table(), steps=1)
    rl_ebm.train(ebm(), out=ours, network="tabular", steps=1)
    with pytest.raises(rl_ebm.RunError, match=r"a policy of your own: .*load\(run, policy="):
        rl_ebm.load(own)
    with pytest.raises(rl_ebm.RunError, match=r"a policy of your own: .*resume\(run, policy="):
        rl_ebm.resume(own, steps=2)
    with pytest.raises(rl_ebm.RunError, match="leave policy out"):
        rl_ebm.load(ours, policy=table())
    with pytest.raises(rl_ebm.RunError, match="leave policy out"):
        rl_ebm.resume(ours, steps=2, policy=table())
    with pytest.raises(rl_ebm.RunError, match="holds the weights of another policy"):
        rl_ebm.load(own, policy=Tied())


def test_what_is_no_trainable_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a torch.nn.Module with logits.*got Linear"):
        rl_ebm.train(ebm(), policy=torch.nn.Linear(2, 2), steps=1)
    with pytest.raises(ValueError, match="the policy is on meta and the EBM on cpu"):
        rl_ebm.train(ebm(), policy=table().to("meta"), steps=1, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
