"""All figures of two rows of logits, against those that say them one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ebm import bounds, divergences
from rl_ebm.soft_bellman import log_policy, soft_value
from rl_ebm.verification.state_errors import state_errors

FIGURES = ("kl", "entropy", "span", "linf", "v_star", "v")


def one_by_one(q_star: torch.Tensor, q: torch.Tensor, of_target: bool) -> dict[str, torch.Tensor]:
    log_star, log_pi = log_policy(q_star), log_policy(q)
    mine, other = (log_star, log_pi) if of_target else (log_pi, log_star)
    free = q - q_star.masked_fill(torch.isneginf(q_star), 0.0)
    tops = [x.amax(-1).masked_fill(torch.isneginf(x.amax(-1)), 0.0) for x in (q_star, q)]
    return {
        "kl": divergences.kl(mine, other),
        "entropy": divergences.entropy(mine),
        "span": bounds.logit_span(q, q_star),
        "linf": bounds.centre(free, q_star).abs().amax(-1),
        "v_star": soft_value(q_star) - tops[0],
        "v": soft_value(q) - tops[1],
    }


@given(
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from([0.0, 0.2, 0.7]),
    st.sampled_from([0.0, 0.2, 0.7]),
    st.sampled_from([0.0, 40.0, -3000.0]),
)
@settings(deadline=None, max_examples=200)
def test_as_one_by_one(seed, of_target, star_forbids, policy_forbids, offset):
    g = torch.Generator().manual_seed(seed)
    q_star, q = 3 * torch.randn(2, 6, 7, generator=g, dtype=torch.float64)
    q += offset
    for x, share in ((q_star, star_forbids), (q, policy_forbids)):
        x[torch.rand(6, 7, generator=g) < share] = -math.inf
    q_star[0] = -math.inf
    q[1] = -math.inf
    q_star[2] = q[2] = -math.inf
    want = one_by_one(q_star, q, of_target)
    top = q.amax(-1)
    found = state_errors(q_star, q, of_target)
    for name in FIGURES:
        torch.testing.assert_close(getattr(found, name), want[name], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.top, top)


def test_equal_but_for_a_constant():
    q = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = state_errors(q.clone(), q + 12.5, True)
    assert 0 <= float(found.kl.min()) <= float(found.kl.max()) < 1e-14
    assert float(found.linf.max()) < 1e-13
    assert float(found.span.min()) >= 0


@pytest.mark.parametrize("of_target", [True, False])
def test_probabilities_are_left_as_they_were_and_memory_is_reused(of_target):
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 4, 9, generator=g, dtype=torch.float64)
    q_star, q = rows.clone()
    room = torch.full((3, 4, 9), math.nan, dtype=torch.float64)
    found = state_errors(q_star, q, of_target, room)
    again = state_errors(*rows.clone(), of_target)
    for name in FIGURES:
        torch.testing.assert_close(getattr(found, name), getattr(again, name))
    for left, v, whole in ((q_star, found.v_star, rows[0]), (q, found.v, rows[1])):
        torch.testing.assert_close(left - v[:, None], log_policy(whole))


def test_what_is_no_number_shows_in_the_maximum():
    q_star, q = torch.randn(2, 3, 4, dtype=torch.float64)
    q[0, 1], q[2, 3] = math.nan, math.inf
    top = state_errors(q_star, q, True).top
    assert torch.equal(torch.isnan(top), torch.tensor([True, False, False]))
    assert torch.equal(torch.isposinf(top), torch.tensor([False, False, True]))


@pytest.mark.parametrize("of_target", [True, False])
@pytest.mark.parametrize("mask", [-1e9, -1e30, float(torch.finfo(torch.float32).min)])
def test_a_finite_mask_drowns_nothing(of_target, mask):
    rows = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    q_star, q = rows
    q[:, 1] = mask
    q_star[:, 1 if of_target else 4] = mask
    want = one_by_one(q_star, q, of_target)
    found = state_errors(q_star.clone(), q.clone(), of_target)
    torch.testing.assert_close(found.entropy, want["entropy"])
    torch.testing.assert_close(found.kl, want["kl"])
    if of_target:
        # The same as with the action left out.
        rest = torch.tensor([0, 2, 3, 4, 5])
        plain = state_errors(q_star[:, rest], q[:, rest], of_target)
        torch.testing.assert_close(found.kl, plain.kl)
