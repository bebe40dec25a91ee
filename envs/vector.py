"""An EBM as a batched Gymnasium environment: all rows step together, on the EBM's device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from rl_ebm.ebm import EBM
from rl_ebm.envs.observation import Observation, Observer, choose_prompts, to_numpy
from rl_ebm.envs.transition import State, Transition
from rl_ebm.messages.arguments import Int, Number, shown, whole
from rl_ebm.tasks.named import Task, find_ebm


class TokenVectorEnv(gymnasium.vector.VectorEnv[Observation, Any, NDArray[Any]]):
    r"""``num_envs`` copies of :class:`rl_ebm.envs.TokenMDP`, stepped as one batch.

    Action and observation spaces, rewards and arguments are those of :class:`TokenMDP`, batched
    as Gymnasium batches them; numpy arrays come in and go out. One step calls the reference at
    most once, and the reward at most once: when some row is complete.

    ## Autoreset
    `AutoresetMode.NEXT_STEP`: the step after a row's end ignores that row's action (which must
    still be a token id), begins a new response in it, pays 0, and draws its prompt.
    `reset(options=…)` sets the prompts of the first responses only: one `prompt_id`, or an array
    of `num_envs` of them.

    ## Seeding
    `reset(seed=…)` seeds one generator for all rows, `np_random`; prompts are drawn from it in
    the order of the rows. With `num_envs=1` the prompts are those of :class:`TokenMDP`.

    ## Information
    That of :class:`TokenMDP`, each entry an array with one row for each environment, with its
    `_name`: True where the row has this entry. `_action_replaced` is False in the rows that
    begin anew.

    ## Version History
    - v0: initial version.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": [],
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: Int = 1,
        ebm: EBM | None = None,
        *,
        task: str | Task | None = None,
        task_kwargs: Mapping[str, Any] | None = None,
        reward_mode: str = "terminal",
        forbidden_reward: Number | None = None,
    ) -> None:
        self.num_envs = num_envs = whole("num_envs", num_envs, 1, 2**24)
        self.ebm = find_ebm(ebm, task, task_kwargs)
        self._transition = Transition(self.ebm, reward_mode, forbidden_reward)
        self._observer = Observer(self.ebm)
        self.single_observation_space = self._observer.space
        self.single_action_space = spaces.Discrete(self.ebm.space.vocab_size)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._state: State | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an empty response in every row.

        Raises:
            ValueError: an unknown option, or a ``prompt_id`` that is no index into the prompts.
        """
        super().reset(seed=seed)
        ids = choose_prompts(options, self.num_envs, self.ebm, self.np_random)
        self._state = self._transition.start(torch.from_numpy(ids))
        return self._observer(self._state), self._info(self._state)

    def step(
        self, actions: Any
    ) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Append a token to every row, or begin anew where the last step ended.

        Args:
            actions: token ids, (num_envs,) integers.

        Raises:
            ResetNeeded: before the first reset.
            ValueError: actions of another shape, or that are no token ids; or a reward is -inf
                and there is no ``forbidden_reward``.
        """
        before = self._current()
        tokens = torch.from_numpy(self._tokens(actions)).to(self.ebm.device)
        anew = to_numpy(before.ended)
        self._state, reward, replaced = self._transition.step(
            before, tokens, self._next_prompt_ids(anew)
        )
        info = self._info(self._state) | {
            "action_replaced": to_numpy(replaced),
            "_action_replaced": ~anew,
        }
        ended = to_numpy(self._state.ended)
        return self._observer(self._state), to_numpy(reward), ended, np.zeros_like(ended), info

    def action_masks(self) -> NDArray[np.bool_]:
        """``info["action_mask"]`` of the current states as bool, (num_envs, A)."""
        return to_numpy(self._transition.action_mask(self._current()))

    def _current(self) -> State:
        if self._state is None:
            raise ResetNeeded("call reset() before anything else")
        return self._state

    def _tokens(self, actions: Any) -> NDArray[np.int64]:
        a = self.ebm.space.vocab_size
        try:
            tokens = np.asarray(actions)
        except (TypeError, ValueError, RuntimeError):  # of ragged lists, tensors without values
            tokens = np.empty(0)
        if (
            tokens.shape != (self.num_envs,)
            or not np.issubdtype(tokens.dtype, np.integer)
            or not ((tokens >= 0) & (tokens < a)).all()
        ):
            raise ValueError(
                f"actions must be integer token ids in [0, {a}) of shape ({self.num_envs},), got "
                f"{shown(actions)}"
            )
        return tokens.astype(np.int64)

    def _next_prompt_ids(self, anew: NDArray[np.bool_]) -> torch.Tensor | None:
        """Draws for the rows that begin anew, in their order; 0 in the others."""
        if self.ebm.prompts is None or not anew.any():
            return None
        ids = np.zeros(self.num_envs, dtype=np.int64)
        ids[anew] = choose_prompts(None, int(anew.sum()), self.ebm, self.np_random)
        return torch.from_numpy(ids).to(self.ebm.device)

    def _info(self, state: State) -> dict[str, Any]:
        named = {"action_mask": self.action_masks().astype(np.int8)}
        if self.ebm.prompts is not None:
            named["prompt_id"] = to_numpy(state.prompt_ids)
        present = {f"_{name}": np.ones(self.num_envs, dtype=np.bool_) for name in named}
        return named | present
