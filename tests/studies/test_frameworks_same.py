"""Which rows are one loss: on what an EBM has, and on nothing else."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid
from toy_policies import seeded

import rl_ebm
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.studies.frameworks.rows import Row
from rl_ebm.studies.frameworks.same import Seen
from rl_ebm.studies.losses.responses import responses_of
from rl_ebm.studies.problems import problems

BETA = 0.5


def seen(eos_id=None, uniform=True, prompts=None):
    space = rl_ebm.TokenSpace(3, 3, eos_id=eos_id)
    count = len(prompts or [[]])
    reward = torch.randn(count, space.num_sequences, generator=seeded(1), dtype=torch.float64)
    reference = (
        Uniform(space)
        if uniform
        else Tabular(space, scale=0.7, generator=seeded(2), dtype=torch.float64)
    )
    solution = rl_ebm.solve(rl_ebm.EBM(space, reward, BETA, reference, prompts))
    return Seen(tuple(responses_of(problem) for problem in problems(solution)))


def margin(chosen, rejected, chosen_ref, rejected_ref):
    return (chosen - chosen_ref) - (rejected - rejected_ref)


def dpo(*four):
    return -logsigmoid(BETA * margin(*four)).mean()


def twice_dpo(*four):
    return -2 * logsigmoid(BETA * margin(*four)).sum()


def without_reference(chosen, rejected, *_):
    return -logsigmoid(BETA * (chosen - rejected)).mean()


def hinge(*four):
    return (1 - BETA * margin(*four)).relu().mean()


def by_length(chosen, rejected, chosen_ref, rejected_ref, chosen_length, rejected_length):
    return -logsigmoid(BETA * (chosen / chosen_length - rejected / rejected_length)).mean()


def clamped_dpo(*four):
    """DPO, but where it is far away."""
    return -logsigmoid(BETA * margin(*four).clamp(-15, 15)).mean()


def row(loss, kind="preference"):
    return Row(loss.__name__, {}, kind, loss)


def same(case, first, second, kind="preference"):
    case.keep(row(first, kind), {"how": first.__name__})
    found = case.find(row(second, kind))
    assert found is None or found == {"how": first.__name__}
    return found is not None


@pytest.mark.parametrize("prompts", [None, [[1], [2, 0]]])
def test_a_loss_without_a_reference_is_one_with_it_where_all_have_one_log_p_ref(prompts):
    assert same(seen(prompts=prompts), dpo, without_reference)
    assert not same(seen(eos_id=1, prompts=prompts), dpo, without_reference)
    assert not same(seen(uniform=False, prompts=prompts), dpo, without_reference)


@pytest.mark.parametrize("eos_id", [None, 1])
def test_a_factor_is_no_difference_and_all_else_is(eos_id):
    assert same(seen(eos_id), dpo, twice_dpo)
    for other in (hinge, clamped_dpo, by_length):
        assert not same(seen(eos_id), dpo, other)


def with_k1(log_pi, log_pi_old, log_ref, advantages, mask):
    each = -(log_pi - log_pi_old).exp() * advantages + BETA * (log_pi - log_ref)
    return (each * mask).sum() / mask.sum()


def with_k2(log_pi, log_pi_old, log_ref, advantages, mask):
    each = -(log_pi - log_pi_old).exp() * advantages + BETA * (log_pi - log_ref).square() / 2
    return (each * mask).sum() / mask.sum()


def with_k1_of_logs(log_pi, log_pi_old, log_ref, advantages, mask):
    """The same gradient, in other words."""
    each = -log_pi * advantages + BETA * log_pi
    return (each * mask).sum() / mask.sum()


@pytest.mark.parametrize("eos_id", [None, 1])
def test_policy_gradients_are_compared_where_nothing_is_old(eos_id):
    assert same(seen(eos_id), with_k1, with_k1_of_logs, "policy-gradient")
    assert not same(seen(eos_id), with_k1, with_k2, "policy-gradient")


def test_what_fails_is_like_nothing():
    def fails(*_):
        raise RuntimeError

    assert not same(seen(), fails, fails)
