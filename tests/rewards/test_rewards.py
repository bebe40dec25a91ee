"""Rewards: tables, functions, TRL's, the Transformer, against Python loops over every response."""

from __future__ import annotations

import math

import jaxtyping
import pytest
import torch
from brute_force import INF
from toy_policies import (
    PROMPTS,
    SHAPES,
    SMALL,
    close,
    everything,
    randomised,
    responses,
    scores_of,
)

import rl_ebm
from rl_ebm.rewards import Reward, Table, TransformerReward, as_reward, from_trl
from rl_ebm.tokens import Batch, TokenSpace

in_all_spaces = pytest.mark.parametrize("shape", SHAPES, ids=str)
EOS = (3, 3, 1)


# Tables -----------------------------------------------------------------------------------------


@in_all_spaces
@pytest.mark.parametrize("num_prompts", [None, 3])
def test_a_table_is_read_in_enumeration_order_whatever_stands_past_the_end(shape, num_prompts):
    space = TokenSpace(*shape)
    scores = scores_of(space, num_prompts)
    prompts = None if num_prompts is None else PROMPTS
    ebm = rl_ebm.EBM(space, scores, prompts=prompts)
    tokens, lengths, ids, pairs = everything(space, num_prompts or 1)
    want = [float(scores[k] if prompts is None else scores[i, k]) for i, k in pairs]
    close(ebm.reward(tokens, lengths, ids), torch.tensor(want, dtype=torch.float64), 0.0)
    scored = ebm.score(Batch(tokens, lengths, ids))
    close(scored.reward, torch.tensor(want, dtype=torch.float64), 0.0)
    past = torch.arange(space.max_length) >= lengths[:, None]
    assert torch.equal(scored.tokens, tokens.masked_fill(past, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_of_floats_is_not_copied_and_others_become_float64(dtype):
    space = TokenSpace(2, 2)
    scores = scores_of(space, dtype=dtype)
    bound = as_reward(scores, space, None)
    assert bound.scores.data_ptr() == scores.data_ptr()
    assert bound.scores.dtype == dtype
    for other in (torch.int64, torch.float16, torch.bool):
        assert Table(torch.ones(4, dtype=other)).scores.dtype == torch.float64
    assert not Table(scores.clone().requires_grad_()).scores.requires_grad


def test_a_table_that_does_not_fit_is_refused():
    space = TokenSpace(3, 2)
    with pytest.raises(ValueError, match=r"shape \(1, 8\), expected \(9,\): one score for each"):
        rl_ebm.EBM(space, torch.zeros(8))
    with pytest.raises(ValueError, match=r"shape \(1, 9\), expected \(3, 9\)"):
        rl_ebm.EBM(space, torch.zeros(9), prompts=PROMPTS)
    with pytest.raises(ValueError, match=r"shape \(1, 1, 9\), expected \(N,\) or \(P, N\)"):
        rl_ebm.EBM(space, torch.zeros(1, 1, 9))
    for wrong in (math.nan, INF):
        scores = scores_of(space)
        scores[5] = wrong
        with pytest.raises(ValueError, match=f"is {wrong} at index 5: a reward must be a number"):
            rl_ebm.EBM(space, scores)


def test_a_prompt_without_possible_response_is_refused_and_less_is_known():
    space = TokenSpace(3, 2)
    scores = scores_of(space, 3)
    assert not rl_ebm.EBM(space, scores, prompts=PROMPTS).forbids
    scores[1, :8] = -INF
    assert rl_ebm.EBM(space, scores, prompts=PROMPTS).forbids
    scores[1, 8] = -INF
    with pytest.raises(ValueError, match="every response of a prompt has reward -inf"):
        rl_ebm.EBM(space, scores, prompts=PROMPTS)


def test_what_is_no_reward_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match=r"reward must be a tensor of scores, .* got list"):
        rl_ebm.EBM(TokenSpace(2, 1), [0.0, 1.0])


# Functions --------------------------------------------------------------------------------------


@in_all_spaces
@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["", "prompts"])
def test_a_function_gets_zeros_past_the_end_and_prompt_ids_where_there_are_prompts(shape, prompts):
    space = TokenSpace(*shape)
    seen = []

    def reward(tokens, lengths, *rest):
        seen.append((tokens, lengths, *rest))
        return (
            (tokens * 3 ** torch.arange(space.max_length)).sum(1) + 100 * lengths + 1000 * sum(rest)
        )

    tokens, lengths, ids, pairs = everything(space, 3 if prompts else 1)
    got = rl_ebm.EBM(space, reward, prompts=prompts).reward(tokens, lengths, ids)
    want = [
        sum(a * 3**t for t, a in enumerate(y)) + 100 * len(y) + 1000 * i
        for i, y in ((i, responses(space)[k]) for i, k in pairs)
    ]
    close(got, torch.tensor(want, dtype=torch.float64), 0.0)
    assert len(seen[0]) == (3 if prompts else 2)


@pytest.mark.parametrize(
    ("dtype", "want"),
    [
        (torch.int64, torch.float64),
        (torch.bool, torch.float64),
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_what_a_function_returns_is_a_detached_float(dtype, want):
    weight = torch.ones(2, requires_grad=True)
    tokens, lengths = TokenSpace(2, 1).sequences()
    reward = as_reward(lambda tokens, lengths: weight.to(dtype), TokenSpace(2, 1), None)
    got = reward(tokens, lengths, torch.zeros(2, dtype=torch.int64))
    assert got.dtype == want
    assert not got.requires_grad
    assert got.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([0.0, 1.0], TypeError, r"returned list, expected a tensor of shape \(2,\)"),
        (torch.zeros(2, 1), ValueError, r"returned shape \(2, 1\), expected \(2,\): one number"),
        (torch.tensor([0.0, math.nan]), ValueError, "value is nan at index 1"),
        (torch.tensor([INF, 0.0]), ValueError, "value is inf at index 0"),
    ],
)
def test_a_function_that_returns_no_rewards_is_told(value, error, message):
    space = TokenSpace(2, 1)
    ebm = rl_ebm.EBM(space, lambda tokens, lengths: value)
    with pytest.raises(error, match=message):
        ebm.log_weight(*space.sequences())


# Rewards written for TRL ------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["", "prompts"])
def test_a_trl_reward_gets_each_rows_prompt_completion_and_columns(prompts):
    space, calls = TokenSpace(*EOS), []

    def trl(prompts, completions, weight, **rest):
        assert rest.keys() == {"completion_ids", "trainer_state", "log_extra", "log_metric"}
        calls.extend(zip(prompts, completions, weight, strict=True))
        return [w * len(c) - 10 * len(p) for p, c, w in calls]

    decode = "".join
    weights = [2, 3, 5] if prompts else [7]
    reward = from_trl(trl, lambda ids: decode("abcdefg"[i] for i in ids), {"weight": weights})
    tokens, lengths, ids, pairs = everything(space, len(weights))
    got = rl_ebm.EBM(space, reward, prompts=prompts).reward(tokens, lengths, ids)
    want = [
        (
            decode("abcdefg"[a] for a in (prompts or [[]])[i]),
            decode("abcdefg"[a] for a in responses(space)[k][:-1]),  # without the EOS
            weights[i],
        )
        for i, k in pairs
    ]
    assert calls == want
    numbers = [w * len(c) - 10 * len(p) for p, c, w in want]
    close(got, torch.tensor(numbers, dtype=torch.float64), 0.0)


def test_a_trl_completion_of_fixed_length_is_whole():
    space, seen = TokenSpace(2, 3), []

    def trl(prompts, completions):
        seen.extend(completions)
        return [-INF if sum(c) == 0 else 0.0 for c in completions]

    ebm = rl_ebm.EBM(space, from_trl(trl, list))
    log_weight = ebm.log_weight(*space.sequences())
    assert [tuple(c) for c in seen] == responses(space)
    assert log_weight.tolist() == [-INF] + [0.0] * 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0], "returned 1 values for 2 completions"),
        ([0.0, None], "returned None: rl-ebm has one reward for every response"),
        ([0.0, math.nan], "the TRL reward's value is nan at index 1"),
    ],
)
def test_a_trl_reward_that_returns_no_rewards_is_told(values, message):
    space = TokenSpace(2, 1)
    ebm = rl_ebm.EBM(space, from_trl(lambda prompts, completions: values, list))
    with pytest.raises(ValueError, match=message):
        ebm.log_weight(*space.sequences())


def test_a_column_has_an_entry_for_each_prompt():
    reward = from_trl(lambda **_: [], list, {"answer": ["a", "b"]})
    with pytest.raises(ValueError, match=r"column 'answer' has 2 entries, expected .* 3 prompts"):
        rl_ebm.EBM(TokenSpace(2, 1), reward, prompts=PROMPTS)


# The bidirectional Transformer ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [EOS, (3, 3, None)], ids=str)
def test_the_reward_transformer_does_not_read_past_the_end_but_the_whole_response(shape):
    space = TokenSpace(*shape)
    reward = randomised(TransformerReward(space, SMALL, PROMPTS))
    tokens, lengths, ids, _ = everything(space, 3, pad=0)
    want = reward(tokens, lengths, ids)
    for pad in (1, 2):
        padded = everything(space, 3, pad)[0]
        close(reward(padded, lengths, ids), want)
    # It is no causal network: the first token's features know the last token.
    assert want.unique().numel() == want.numel()
    ebm = rl_ebm.EBM(space, reward, beta=0.5, prompts=PROMPTS)
    garbage = everything(space, 3)[0]
    close(ebm.log_weight(garbage, lengths, ids), 2 * want)
    want.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in reward.parameters())


def test_a_reward_transformer_of_another_problem_is_refused():
    reward = TransformerReward(TokenSpace(3, 2), SMALL)
    assert isinstance(reward, Reward)
    with pytest.raises(
        ValueError, match=r"the reward was made for TokenSpace.*, the EBM has Token"
    ):
        rl_ebm.EBM(TokenSpace(3, 3), reward)
    with pytest.raises(ValueError, match="made for other prompts than the EBM's"):
        rl_ebm.EBM(TokenSpace(3, 2), reward, prompts=[[1]])
