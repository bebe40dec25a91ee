"""How probable tokens like the one that turns a response off are: by sums over a table."""

from __future__ import annotations

import pytest
import torch
from toy_policies import seeded

import rl_ebm
from rl_ebm.policies import Tabular, Uniform, sample
from rl_ebm.policies.detours import detours


def test_tokens_that_are_as_likely_count_as_well():
    space = rl_ebm.TokenSpace(4, 3)
    batch = sample(Uniform(space), space, 20, seeded())
    _, masses = detours(Uniform(space), space, batch, 20)
    torch.testing.assert_close(masses, torch.ones(20).double())


@pytest.mark.parametrize("eos_id", [None, 2])
def test_a_mass_is_that_of_all_tokens_that_are_no_likelier(eos_id):
    space = rl_ebm.TokenSpace(4, 2, eos_id)
    policy = Tabular(space, dtype=torch.float64)
    values = torch.tensor([0.1, 0.4, 0.1, 0.4]).double()  # in pairs
    policy.table = torch.nn.Parameter(values.log().expand_as(policy.table).clone())
    batch = sample(policy, space, 200, seeded())
    turned, masses = detours(policy, space, batch, 64)
    assert sorted(set(masses.mul(1e9).round().tolist())) == [2e8, 1e9]
    if eos_id is not None:  # the first token is the only decision: the last is the EOS anyway
        want = torch.where(values[turned.tokens[:, 0]] > 0.3, 1.0, 0.2).double()
        torch.testing.assert_close(masses, want)
