"""Whose responses on-policy distillation visits: the policy's, the teacher's, or some of each."""

from __future__ import annotations

import pytest
import torch
from toy_policies import seeded

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.policies import Tabular, Uniform


class Always(Tabular):
    """Says one token, whatever came before."""

    def __init__(self, space, token, prompts=None):
        super().__init__(space, prompts)
        logits = torch.full_like(self.table, -50.0)
        logits[..., token] = 50.0
        self.table = torch.nn.Parameter(logits)


@pytest.mark.parametrize(("share", "count"), [(1, 40), (0.75, 30), (0.3, 12), (0, 0)])
def test_the_share_of_responses_that_are_the_policys(share, count):
    prompts = [[0], [1], [2], [3]]
    space = rl_ebm.TokenSpace(3, 4)
    ebm = rl_ebm.EBM(space, torch.randn(4, 81, generator=seeded()), prompts=prompts)
    entry = AGENTS["on-policy-distillation"]
    policy, teacher = Always(space, 1, prompts), Always(space, 2, prompts)
    config = entry.config(batch_size=40, on_policy=share)
    agent = entry.agent(ebm, policy, config, seeded(), teacher)
    batch = agent.sample()
    assert len(batch) == 40
    assert batch.tokens.tolist() == [[1] * 4] * count + [[2] * 4] * (40 - count)
    # Every prompt is answered by both, and as often as ever.
    assert batch.prompt_ids.bincount().tolist() == [10] * 4
    if count == 12:
        assert len(batch.prompt_ids[:12].unique()) > 1


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_between_nothing_and_all(share):
    with pytest.raises(ValueError, match="on_policy"):
        AGENTS["on-policy-distillation"].config(on_policy=share)


@pytest.mark.slow
def test_an_automaton_is_distilled_by_its_exact_logits():
    space = rl_ebm.TokenSpace(6, 10, eos_id=0)
    reward = rl_ebm.rewards.Automaton.contains(space, [1, 2], 6.0)
    ebm = rl_ebm.EBM(space, reward, reference=Uniform(space))
    solution = rl_ebm.solve(ebm)
    config = AGENTS["on-policy-distillation"].config(
        batch_size=64, divergence="forward", on_policy=0.5
    )
    network = rl_ebm.policies.TransformerConfig(1, 2, 32, 32)
    policy, report = rl_ebm.train(
        ebm, "on-policy-distillation", options=config, steps=80, network=network
    )
    assert report.mode == "sampled"
    generator = seeded(0)
    uniform = rl_ebm.verify(Uniform(space), solution, samples=2000, generator=generator)
    found = rl_ebm.verify(policy, solution, samples=2000, generator=generator)
    assert found.kl_target_policy.high < 0.6 * uniform.kl_target_policy.low
