"""PPO of Stable-Baselines3, on the Gymnasium environment with the soft reward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.peers.contender import Contender
from benchmarks.peers.policies import PrefixPolicy, count
from benchmarks.peers.watch import Watch
from rl_ebm import EBM
from rl_ebm.envs import ENV_ID, FlatObservation
from rl_ebm.tokens import TokenSpace

ENVS = 4
FIXED_POINT = (
    "its entropy bonus does not enter the returns: each state's gradient has the entropy of that "
    "state's own actions, and the advantage counts none of the entropy that follows, so its "
    "fixed point is another policy (and its advantages are normalised, its rewards discounted); "
    "without the bonus, its default, it seeks the best response alone"
)


def flat_observations(prefixes: torch.Tensor, space: TokenSpace) -> torch.Tensor:
    """What :class:`rl_ebm.envs.FlatObservation` shows of prefixes padded with -1."""
    hot = prefixes[..., None] == torch.arange(space.vocab_size)
    depth = (prefixes >= 0).sum(1, keepdim=True)
    length = depth == torch.arange(space.max_length + 1)
    return torch.cat([hot.flatten(1), length], dim=1).float()


def trainer(entropy_is_beta: bool) -> Callable[[EBM, int, Watch], None]:
    """What trains PPO: its own loop, looked at between two of its iterations."""

    def train(ebm: EBM, seed: int, watch: Watch) -> None:
        import gymnasium
        from stable_baselines3 import PPO
        from stable_baselines3.common.callbacks import BaseCallback
        from stable_baselines3.common.env_util import make_vec_env

        def make() -> gymnasium.Env:
            return FlatObservation(gymnasium.make(ENV_ID, ebm=ebm, reward_mode="soft"))

        model = PPO(
            "MlpPolicy",
            make_vec_env(make, n_envs=ENVS, seed=seed),
            ent_coef=ebm.beta if entropy_is_beta else 0.0,
            seed=seed,
            device="cpu",
        )
        space, actor = ebm.space, model.policy

        def rows(prefixes: torch.Tensor) -> torch.Tensor:
            return actor.get_distribution(flat_observations(prefixes, space)).distribution.logits

        steps_an_epoch = model.n_steps * ENVS // model.batch_size

        class Look(BaseCallback):
            def _on_step(self) -> bool:
                return True

            def _on_rollout_start(self) -> None:  # the last iteration's updates are done
                if model.num_timesteps:
                    watch(
                        PrefixPolicy(space, rows),
                        model._n_updates * steps_an_epoch,
                        model.num_timesteps // space.max_length,
                    )

        watch.start(count(model.policy))
        model.learn(10**12, callback=Look())

    return train


def contender(name: str, entropy: str, entropy_is_beta: bool) -> Contender:
    return Contender(
        name=f"stable-baselines3 PPO{name}",
        package="stable-baselines3",
        module="stable_baselines3",
        extra="peers-sb3",
        network="its MlpPolicy",
        settings=f"the class's defaults, {ENVS} environments, soft reward, {entropy}; an update "
        "is a step on a minibatch of 64 actions",
        source="the defaults of `PPO`; 4 environments as in the example of its documentation",
        fixed_point=FIXED_POINT,
        train=trainer(entropy_is_beta),
        one_length=True,
    )


CONTENDERS = (
    contender("", "ent_coef 0", False),
    contender(", ent_coef beta", "ent_coef beta", True),
)
