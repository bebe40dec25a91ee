"""Observations as one vector of zeros and ones, for agents that take only a ``Box``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from rl_ebm.envs.observation import Observation
from rl_ebm.messages.arguments import shown

FlatArray = NDArray[np.float32]

if TYPE_CHECKING:
    _VectorWrapper = gymnasium.vector.VectorObservationWrapper[
        FlatArray, Any, Observation, NDArray[Any]
    ]
else:  # before Gymnasium 1.4 it takes no type arguments
    _VectorWrapper = gymnasium.vector.VectorObservationWrapper


class OneHot:
    """Flattens observations of a :class:`rl_ebm.envs.TokenMDP`, one or a batch of them.

    Args:
        space: the observation space of one environment.

    Raises:
        TypeError: not the observation space of a token MDP.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        if not (isinstance(space, spaces.Dict) and {"tokens", "length"} <= set(space)):
            raise TypeError(
                f"this wrapper takes a TokenMDP, whose observation is a Dict with tokens and "
                f"length, got {space}"
            )
        self._parts = [("tokens", "length"), ("prompt", "prompt_length")]
        self._parts = [part for part in self._parts if part[0] in space.spaces]
        self._sizes: list[tuple[int, int]] = []
        for name, _ in self._parts:
            box = space[name]
            assert isinstance(box, spaces.Box), "ids are a Box"
            self._sizes.append((box.shape[0], int(box.high.max()) + 1))
        width = sum(n * a + n + 1 for n, a in self._sizes)
        self.space = spaces.Box(0.0, 1.0, (width,), np.float32)

    def __call__(self, observation: Observation) -> FlatArray:
        """(D,), or (B, D) from a batch.

        Raises:
            TypeError: no observation of a token MDP.
        """
        self._check(observation)
        blocks = []
        for (name, length_name), (n, a) in zip(self._parts, self._sizes, strict=True):
            ids = np.asarray(observation[name])
            length = np.asarray(observation[length_name])[..., None]
            real = np.arange(n) < length
            one_hot = (ids[..., None] == np.arange(a)) & real[..., None]
            blocks.append(one_hot.reshape(*ids.shape[:-1], n * a))
            blocks.append(length == np.arange(n + 1))
        return np.concatenate(blocks, axis=-1).astype(np.float32)

    def _check(self, observation: object) -> None:
        names = [name for part in self._parts for name in part]
        if not (isinstance(observation, Mapping) and all(name in observation for name in names)):
            raise TypeError(
                f"an observation is a dict of {', '.join(names)}, as the environment gives it, got "
                f"{shown(observation)}"
            )


class FlatObservation(
    gymnasium.ObservationWrapper[FlatArray, Any, Observation], RecordConstructorArgs
):
    """A :class:`rl_ebm.envs.TokenMDP` whose observation is one ``Box``, of zeros and ones.

    In this order: the one-hot of each of the T tokens (all 0 past the end), T·A; of the length,
    T + 1; and where there are prompts, of the W prompt tokens and of their number, in the same
    way, W·K and W + 1, with K - 1 the largest id of the prompt's space.

    Args:
        env: a TokenMDP, as ``gymnasium.make`` gives it.

    Raises:
        TypeError: an environment with another observation.
    """

    def __init__(self, env: gymnasium.Env[Observation, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gymnasium.ObservationWrapper.__init__(self, env)
        self._one_hot = OneHot(env.observation_space)
        self.observation_space = self._one_hot.space

    def observation(self, observation: Observation) -> FlatArray:
        """The flat observation, (D,)."""
        return self._one_hot(observation)

    def action_masks(self) -> NDArray[np.bool_]:
        """The environment's; wrappers do not pass methods through by themselves."""
        masks: NDArray[np.bool_] = self.env.get_wrapper_attr("action_masks")()
        return masks


class FlatVectorObservation(_VectorWrapper):
    """:class:`FlatObservation` for a :class:`rl_ebm.envs.TokenVectorEnv`: (num_envs, D).

    Args:
        env: a TokenVectorEnv, as ``gymnasium.make_vec`` gives it.

    Raises:
        TypeError: an environment with another observation.
    """

    def __init__(self, env: gymnasium.vector.VectorEnv[Observation, Any, NDArray[Any]]) -> None:
        super().__init__(env)
        self._one_hot = OneHot(env.single_observation_space)
        self.single_observation_space = self._one_hot.space
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def observations(self, observations: Observation) -> FlatArray:
        """The flat observations, (num_envs, D)."""
        return self._one_hot(observations)
