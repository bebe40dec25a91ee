"""Certificates where nothing can be enumerated: a chain, whose Z a transfer matrix gives.

10 tokens, 12 of them: a trillion responses. The reward couples neighbours.
"""

from __future__ import annotations

import pytest
import torch
from toy_policies import seeded

import rl_ebm
from rl_ebm.certificates.smc import smc
from rl_ebm.policies import Uniform, log_prob

SPACE = rl_ebm.TokenSpace(10, 12)
COUPLING = 1.5 * torch.randn(10, 10, generator=seeded(), dtype=torch.float64)
HARDEST = float(COUPLING.max()) * 11


def reward(tokens, lengths):
    return COUPLING[tokens[:, :-1], tokens[:, 1:]].sum(1)


class Chain:
    """q of the chain by messages from the end, each off by normal errors."""

    # R is paid at the end: what a prefix has earned is part of its value.
    logits_are_values = True

    def __init__(self, error=0.0):
        noise = torch.randn(12, 10, 10, generator=seeded(1), dtype=torch.float64)
        step = COUPLING - torch.full((), 10.0).double().log()
        message = torch.zeros(10, dtype=torch.float64)
        rows = []
        for t in reversed(range(12)):
            # Before the first token there is nothing to couple with.
            pair = step if t else step.new_full((10, 10), -torch.full((), 10.0).double().log())
            rows.append(pair + message + error * noise[t])
            message = torch.logsumexp(pair + message, dim=1)
        self.rows = torch.stack(rows[::-1])
        self.log_z = float(message[0])

    def logits(self, tokens, prompt_ids=None):
        before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
        earned = COUPLING[tokens[:, :-1], tokens[:, 1:]].cumsum(1)
        earned = torch.cat([torch.zeros(len(tokens), 2), earned[:, :-1]], dim=1)
        return self.rows[torch.arange(12), before] + earned[..., None]


EBM = rl_ebm.EBM(SPACE, reward, reference=Uniform(SPACE))
EXACT = Chain()


def test_the_chain_is_exact():
    tokens = torch.randint(10, (50, 12), generator=seeded(2))
    lengths = torch.full((50,), 12)
    log_z = EBM.log_weight(tokens, lengths) - log_prob(EXACT, SPACE, tokens, lengths)
    torch.testing.assert_close(log_z, torch.full_like(log_z, EXACT.log_z))


@pytest.mark.parametrize("particles", [None, 20])
def test_bounds_are_tight_for_a_good_policy(particles):
    policy = Chain(error=0.15)
    target = rl_ebm.policies.sample(EXACT, SPACE, 4000, seeded(3))
    got = rl_ebm.certify(policy, EBM, 4000, 0.99, target, HARDEST, seeded(7), particles=particles)
    assert got.log_z.low <= EXACT.log_z <= got.log_z.high
    assert got.log_z.width < 0.3
    # KL(pi, p*) = log Z - E_pi log W, E from other samples, and many.
    batch = rl_ebm.policies.sample(policy, SPACE, 10_000, seeded(5))
    log_pi = log_prob(policy, SPACE, batch.tokens, batch.lengths)
    kl = EXACT.log_z - float((EBM.log_weight(batch.tokens, batch.lengths) - log_pi).mean())
    assert got.kl_policy_target.low <= kl <= got.kl_policy_target.high
    assert 0.05 < kl < 0.3
    assert got.warnings == []


def test_a_policy_that_knows_nothing_is_said_to_be_so():
    got = rl_ebm.certify(Uniform(SPACE), EBM, 4000, generator=seeded(4), reward_max=HARDEST)
    assert got.log_z.low <= EXACT.log_z <= got.log_z.high
    assert got.log_z.width > 1
    assert any("effective sample size" in text for text in got.warnings)
    assert any("nats apart" in text for text in got.warnings)


def test_twists_and_resampling_do_better_than_weights_at_the_end():
    policy = Chain(error=0.5)
    twisted = smc(EBM, policy, 64, generator=seeded(6), runs=100).log_z
    plain = smc(EBM, policy, 64, generator=seeded(6), runs=100, ess_threshold=0).log_z
    assert float((twisted - EXACT.log_z).square().mean()) < float(
        (plain - EXACT.log_z).square().mean()
    )
