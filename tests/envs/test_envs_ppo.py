"""The first foreign client: an unmodified PPO of Stable-Baselines3."""

import gymnasium
import numpy as np
import pytest
import torch

from rl_ebm.ebm import EBM
from rl_ebm.envs import ENV_ID, FlatObservation
from rl_ebm.tokens import TokenSpace


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flat", "eos_id"), [(True, None), (False, 2)], ids=["flat-fixed", "dict-eos"]
)
def test_ppo_of_stable_baselines3_learns(flat, eos_id, tmp_path, monkeypatch):
    """PPO seeks the best response, not p*: so it is judged by its return alone."""
    from stable_baselines3 import PPO

    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path))  # else it leaves a folder in /tmp
    space = TokenSpace(4, 3, eos_id)
    scores = 2 * np.random.default_rng(0).standard_normal(space.num_sequences)
    env = gymnasium.make(ENV_ID, ebm=EBM(space, torch.from_numpy(scores)))
    env = FlatObservation(env) if flat else env
    policy = "MlpPolicy" if flat else "MultiInputPolicy"
    model = PPO(policy, env, n_steps=256, batch_size=64, learning_rate=3e-3, seed=0, device="cpu")
    model.learn(6144)

    returns = []
    obs, _ = env.reset(seed=1)
    while len(returns) < 300:
        action, _ = model.predict(obs)
        obs, reward, ended, *_ = env.step(action)
        if ended:
            returns.append(reward)
            obs, _ = env.reset()
    random_mean = exact_random_return(scores, space)
    assert np.mean(returns) > random_mean + 0.6 * (scores.max() - random_mean)


def exact_random_return(scores, space):
    """Mean return of equally likely actions: each response weighted by its probability."""
    if space.eos_id is None:
        return scores.mean()
    # EOS mode: length 1 has one response, then 3, then 9; only EOS is executed at the last place.
    weights = [1 / 4] + [1 / 16] * 3 + [1 / 16] * 9
    assert sum(weights) == 1.0
    return float(np.dot(weights, scores))
