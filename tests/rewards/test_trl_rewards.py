"""Rewards in TRL's form: every argument that TRL passes, every result that it takes."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
import torch

import rl_ebm
from rl_ebm.rewards import from_trl

SPACE = rl_ebm.TokenSpace(3, 3, eos_id=0)
PROMPTS = [[1], [2, 2]]
TOKENS = torch.tensor([[1, 2, 0], [2, 0, 0], [0, 0, 0]])
LENGTHS = torch.tensor([3, 2, 1])
IDS = torch.tensor([1, 0, 1])


def decode(ids):
    return "".join("xab"[a] for a in ids)


def rewards(function, **kwargs):
    reward = from_trl(function, decode, **kwargs)
    return rl_ebm.EBM(SPACE, reward, prompts=PROMPTS).reward(TOKENS, LENGTHS, IDS).tolist()


def test_everything_that_trl_passes():
    seen = {}

    def f(**kwargs):
        seen.update(kwargs)
        kwargs["log_extra"]("said", kwargs["completions"])
        kwargs["log_metric"]("mean", 2)
        return [1.0, 2.0, 3.0]

    reward = from_trl(f, decode, {"answer": ["u", "v"]})
    ebm = rl_ebm.EBM(SPACE, reward, prompts=PROMPTS)
    assert ebm.reward(TOKENS, LENGTHS, IDS).tolist() == [1, 2, 3]
    assert seen["prompts"] == ["bb", "a", "bb"]
    assert seen["completions"] == ["ab", "b", ""]
    assert seen["completion_ids"] == [[1, 2, 0], [2, 0], [0]]
    assert seen["answer"] == ["v", "u", "v"]
    assert seen["trainer_state"].global_step == 0
    assert reward.extra == {"said": ["ab", "b", ""]}
    assert reward.metrics == {"mean": 2.0}


def test_a_function_gets_what_it_takes():
    assert rewards(lambda completions: [len(c) for c in completions]) == [2, 1, 0]
    assert rewards(lambda completion_ids, prompts: [len(c) for c in completion_ids]) == [3, 2, 1]


def test_coroutine_functions_are_awaited_together_on_one_loop():
    running, most, loops = [0], [0], set()

    async def f(completions, **_):
        loops.add(asyncio.get_running_loop())
        running[0] += 1
        most[0] = max(most[0], running[0])
        await asyncio.sleep(0.02)
        running[0] -= 1
        return [float(len(c)) for c in completions]

    class Judge:
        async def __call__(self, completions, **_):
            return await f(completions)

    assert rewards(f) == [2, 1, 0]
    assert rewards([f, Judge(), lambda completions: [1] * 3], weights=[1, 2, 5]) == [11, 8, 5]
    assert most == [2]
    assert len(loops) == 1

    async def inside():
        return rewards(f)

    # Where a loop is running already, as in a notebook.
    assert asyncio.run(inside()) == [2, 1, 0]


def test_none_is_left_out_of_the_sum():
    f = [1.0, None, -math.inf]
    g = [None, 3, 2]
    assert rewards([lambda **_: f, lambda **_: g], weights=[0.5, 2]) == [0.5, 6, -math.inf]
    assert rewards([lambda **_: f, lambda **_: g]) == [1, 3, -math.inf]
    # 0 times -inf is 0.
    assert rewards([lambda **_: f, lambda **_: g], weights=[0, 2]) == [0, 6, 4]
    with pytest.raises(ValueError, match=r"returned None: .* completion 1"):
        rewards(lambda **_: f)
    with pytest.raises(ValueError, match="every TRL reward returned None"):
        rewards([lambda **_: f, lambda **_: [1, None, 1]])


def test_none_in_an_array_of_objects_does_not_apply():
    some = np.array([1.0, None, None], dtype=object)
    assert rewards([lambda **_: some, lambda **_: [5, 6, 7]]) == [6, 6, 7]
    with pytest.raises(ValueError, match="returned None"):
        rewards(lambda **_: some)


@pytest.mark.parametrize("value", [None, "0.5", [1.0], torch.zeros(2)], ids=repr)
def test_a_metric_that_is_no_number_is_named(value):
    def function(completions, log_metric, **_):
        log_metric("a", value)
        return [0.0] * len(completions)

    with pytest.raises(TypeError, match=r"log_metric\('a', ...\) takes a number, got"):
        rewards(function)


@pytest.mark.parametrize("values", [None, 3, "abc"])
def test_extras_that_are_no_list_are_named(values):
    def function(completions, log_extra, **_):
        log_extra("a", values)
        return [0.0] * len(completions)

    with pytest.raises(TypeError, match=r"log_extra\('a', ...\) takes a list, got"):
        rewards(function)


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3], dtype=np.float16),
        np.array([1, 2, 3], dtype=object),
        torch.tensor([1.0, 2, 3], requires_grad=True),
        torch.tensor([1, 2, 3], dtype=torch.bfloat16),
        [torch.tensor(1.0), np.float32(2), 3],
    ],
    ids=repr,
)
def test_numbers_of_any_kind(values):
    assert rewards(lambda **_: values) == [1, 2, 3]
    assert rewards(lambda **_: iter(values)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        (torch.zeros(3, 1), ValueError, r"returned shape \(3, 1\), expected \(3,\)"),
        (torch.zeros(1), ValueError, r"returned shape \(1,\), expected \(3,\)"),
        (np.zeros(()), ValueError, r"returned shape \(\), expected \(3,\)"),
        ([0.0], ValueError, "returned 1 values for 3 completions"),
        ([], ValueError, "returned 0 values for 3 completions"),
        (None, TypeError, "returned None, expected a list"),
        (1.0, TypeError, "returned 1.0, expected a list"),
        ("123", TypeError, "expected a list of numbers"),
        ({1: 1, 2: 2, 3: 3}, TypeError, "expected a list of numbers"),
        ([1, "2", 3], TypeError, "value is '2' at index 1"),
        ([1, [2], 3], TypeError, r"value is list at index 1"),
        ([1, math.nan, 3], ValueError, "value is nan at index 1"),
        ([1, 2, math.inf], ValueError, "value is inf at index 2"),
    ],
    ids=repr,
)
def test_what_is_no_reward_is_named(values, error, words):
    with pytest.raises(error, match=words):
        rewards(lambda **_: values)
    with pytest.raises(error, match=words):
        rewards([lambda **_: [0, 0, 0], lambda **_: values])


def test_messages_stay_messages():
    prompts = [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]
    seen = []

    def f(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [0, 0, 0]

    rewards(f, prompts=prompts)
    texts = ["ab", "b", ""]
    assert seen == [
        (prompts[i], [{"role": "assistant", "content": text}])
        for i, text in zip([1, 0, 1], texts, strict=True)
    ]
    with pytest.raises(ValueError, match=r"prompts has 1 entries, expected .* 2 prompts"):
        rewards(f, prompts=prompts[:1])


@pytest.mark.parametrize(
    ("function", "kwargs", "error", "words"),
    [
        ([], {}, TypeError, "a TRL reward function or a list"),
        ("f", {}, TypeError, "a TRL reward function or a list"),
        ([len, 3], {}, TypeError, "got int"),
        (torch.nn.Linear(1, 1), {}, TypeError, "wrap a reward model"),
        (len, {"weights": [1, 2]}, ValueError, "2 weights for 1 reward functions"),
        (len, {"weights": "x"}, TypeError, "weights must be a list of numbers"),
        (len, {"weights": [math.nan]}, ValueError, "finite"),
        (len, {"columns": {"prompts": [1, 2]}}, ValueError, "TRL passes something else"),
        (len, {"columns": {"a": "xy"}}, TypeError, "must be a list"),
        (len, {"columns": [1]}, TypeError, "dict of lists"),
        (len, {"columns": {"a": [1]}}, ValueError, "has 1 entries"),
    ],
)
def test_arguments_that_are_none(function, kwargs, error, words, monkeypatch):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(error, match=words):
        rewards(function, **kwargs)


def test_an_ebm_of_two_rewards_is_solved_as_their_sum():
    def short(completions, **_):
        return [-float(len(c)) for c in completions]

    async def wants_a(completions, prompts, **_):
        return [None if p == "a" else float("a" in c) for c, p in zip(completions, prompts)]  # noqa: B905

    reward = from_trl([short, wants_a], decode, weights=[0.5, 3])
    solution = rl_ebm.solve(rl_ebm.EBM(SPACE, reward, 0.7, prompts=PROMPTS))
    tokens, lengths = SPACE.sequences()
    for prompt in range(2):
        weights = [
            (-0.5 * (n - 1) + 3 * (prompt == 1 and 1 in y[:n])) / 0.7
            for y, n in zip(tokens.tolist(), lengths.tolist(), strict=True)
        ]
        want = math.log(math.fsum(map(math.exp, weights)))
        assert float(solution.log_z[prompt]) == pytest.approx(want)
