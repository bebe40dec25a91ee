"""The flat observation holds what the Dict holds, and nothing else."""

import gymnasium
import numpy as np
import pytest
import torch

from rl_ebm.ebm import EBM
from rl_ebm.envs import ENV_ID, FlatObservation, FlatVectorObservation
from rl_ebm.tokens import TokenSpace

PROMPTS = [[5], [], [1, 2]]


def an_ebm(prompts):
    space = TokenSpace(3, 4, eos_id=1)
    n = space.num_sequences
    scores = torch.zeros(n) if prompts is None else torch.zeros(len(prompts), n)
    return EBM(space, scores, prompts=prompts)


def decode(flat, blocks):
    """Ids (0 past the end) and lengths of each block (n ids, of a values), by Python loops."""
    out, at = [], 0
    for n, a in blocks:
        ids, length = [], int(np.argmax(flat[at + n * a : at + n * a + n + 1]))
        for i in range(n):
            one_hot = flat[at + i * a : at + (i + 1) * a]
            assert one_hot.sum() == (i < length)
            ids.append(int(np.argmax(one_hot)))
        assert flat[at + n * a : at + n * a + n + 1].sum() == 1
        out.append((ids, length))
        at += n * a + n + 1
    assert at == len(flat)
    return out


@pytest.mark.parametrize("prompts", [None, PROMPTS])
def test_decodes_back_to_the_dict(prompts):
    blocks = [(4, 3)] if prompts is None else [(4, 3), (2, 6)]
    ebm = an_ebm(prompts)
    plain, flat = (gymnasium.make(ENV_ID, ebm=ebm) for _ in range(2))
    flat = FlatObservation(flat)
    plain_vec, flat_vec = (gymnasium.make_vec(ENV_ID, num_envs=4, ebm=ebm) for _ in range(2))
    flat_vec = FlatVectorObservation(flat_vec)
    rng = np.random.default_rng(0)

    def same(obs, one_hot):
        got = decode(one_hot, blocks)
        assert got[0] == (obs["tokens"].tolist(), obs["length"])
        if prompts is not None:
            assert got[1] == (obs["prompt"].tolist(), obs["prompt_length"])

    for seed in range(10):
        obs, one_hot = plain.reset(seed=seed)[0], flat.reset(seed=seed)[0]
        same(obs, one_hot)
        ended = False
        while not ended:
            action = int(rng.integers(3))
            obs, _, ended, *_ = plain.step(action)
            one_hot = flat.step(action)[0]
            assert one_hot in flat.observation_space
            same(obs, one_hot)

    rows, flat_rows = plain_vec.reset(seed=0)[0], flat_vec.reset(seed=0)[0]
    for _ in range(12):
        assert flat_rows in flat_vec.observation_space
        for b in range(4):
            assert flat_rows[b] in flat_vec.single_observation_space
            same({key: value[b] for key, value in rows.items()}, flat_rows[b])
        actions = rng.integers(3, size=4)
        rows, flat_rows = plain_vec.step(actions)[0], flat_vec.step(actions)[0]


def test_space_is_a_box_of_zeros_and_ones():
    env = FlatObservation(gymnasium.make(ENV_ID, ebm=an_ebm(PROMPTS)))
    size = 4 * 3 + 5 + 2 * 6 + 3
    assert env.observation_space == gymnasium.spaces.Box(0.0, 1.0, (size,), np.float32)


def test_action_masks_reach_through_the_wrapper():
    env = FlatObservation(gymnasium.make(ENV_ID, ebm=an_ebm(None)))
    env.reset()
    assert env.action_masks().tolist() == [True, True, True]
    for _ in range(3):
        env.step(0)
    assert env.action_masks().tolist() == [False, True, False]


def test_spec_makes_the_wrapped_env_again():
    env = FlatObservation(gymnasium.make(ENV_ID, ebm=an_ebm(None)))
    assert env.spec.make().observation_space == env.observation_space


def test_another_environment_is_refused():
    with pytest.raises(TypeError, match="this wrapper takes a TokenMDP"):
        FlatObservation(gymnasium.make("CartPole-v1"))
    with pytest.raises(TypeError, match="this wrapper takes a TokenMDP"):
        FlatVectorObservation(gymnasium.make_vec("CartPole-v1"))
