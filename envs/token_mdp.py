"""An EBM as a Gymnasium environment."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray

from rl_ebm.ebm import EBM
from rl_ebm.envs.observation import Observation, Observer, choose_prompts, to_numpy
from rl_ebm.envs.transition import State, Transition
from rl_ebm.messages.arguments import Number, shown
from rl_ebm.tasks.named import Task, find_ebm


class TokenMDP(gymnasium.Env[Observation, Any]):
    r"""Write a response token by token, and be paid for it at the end.

    ## Description
    The token MDP of an energy-based model p*(y|x) = p_ref(y|x) exp(R(x, y) / beta) / Z(x). A
    state is the prompt x and the tokens written so far; an action appends a token. Transitions
    are deterministic. It is for people and for agents written for Gymnasium: the library's own
    training reads whole batches of responses from the EBM instead.

    ## Action Space
    `Discrete(A)`: the next token, A the vocabulary (EOS included where there is one). All A
    actions are executable; what the EBM forbids is left out of `info["action_mask"]`. In EOS
    mode, any action at the last position is executed as EOS.

    ## Observation Space
    A `Dict`:

    | key             | space                      | meaning                              |
    |-----------------|----------------------------|--------------------------------------|
    | `tokens`        | `Box(0, A-1, (T,), int64)` | the tokens written, padded with 0    |
    | `length`        | `Discrete(T+1)`            | how many of them are real            |
    | `prompt`        | `Box(0, …, (W,), int64)`   | the prompt, padded with 0            |
    | `prompt_length` | `Discrete(W+1)`            | how many of its tokens are real      |

    The last two are there only where the EBM has prompts: W is the length of the longest (at
    least 1), and the largest id of `prompt` is A - 1, or that of any prompt where it is more.
    :class:`rl_ebm.envs.FlatObservation` turns it into one `Box` of zeros and ones.

    ## Rewards
    `reward_mode="terminal"` (default): R(x, y) on the last action, 0 before.

    `reward_mode="soft"`: beta * log p_ref(a|s) at each step, plus R(x, y) on the last. The
    undiscounted sum is R(x, y) + beta * log p_ref(y|x), the reward whose maximum-entropy optimum
    at temperature beta is p*. An agent without entropy regularisation does not solve that
    problem: it looks for the one best response. Neither does one whose entropy bonus does not
    enter the returns, as in common PPOs (Stable-Baselines3's among them): its fixed point is
    another distribution.

    Rewards are finite. A step whose reward would be -inf (an impossible response; in soft mode
    also an action with log p_ref(a|s) = -inf, which the mask leaves out but an agent may take)
    pays `forbidden_reward` instead, and the response goes on by the same rules.

    ## Starting State
    No tokens. With several prompts, one is drawn uniformly from `np_random`, which
    `reset(seed=…)` seeds; `reset(options={"prompt_id": k})` sets prompt k instead.

    ## Episode End
    Terminated when the response is complete: after T tokens without an EOS; in EOS mode with the
    EOS, at the T-th token at the latest. Never truncated.

    ## Information
    - `action_mask`: int8 `(A,)`, 1 where neither the space nor log p_ref forbids the next action.
      All 0 where p_ref leaves no action at all; all 1 at the end, where no action is taken.
    - `action_replaced`: True where EOS was executed in the action's place; of `step` only.
    - `prompt_id`: index into the EBM's prompts, where it has any.

    The method `action_masks()` gives the mask as bool, as sb3-contrib's MaskablePPO asks for it.

    ## Arguments
    ```python
    import gymnasium, rl_ebm
    gymnasium.make("rl_ebm/TokenMDP-v0", ebm=ebm, reward_mode="soft", forbidden_reward=-10.0)
    gymnasium.make("rl_ebm/TokenMDP-v0", task="random", task_kwargs={"vocab_size": 4})
    gymnasium.make_vec("rl_ebm/TokenMDP-v0", num_envs=64, ebm=ebm)
    ```

    - `ebm`: a :class:`rl_ebm.EBM`; it computes on its own device. Or
    - `task`: a name in :data:`rl_ebm.envs.TASKS` or a :class:`rl_ebm.envs.Task`; `task_kwargs`
      goes to :func:`rl_ebm.envs.make_task`.
    - `reward_mode`: `"terminal"` or `"soft"`.
    - `forbidden_reward`: a finite number in reward units. Needed where a reward of -inf is
      possible: a `ValueError` at construction where that is known, else at the step that meets it.

    ## References
    The bijection between EBMs and token MDPs: arXiv 2512.15605.

    ## Version History
    - v0: initial version.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]

    def __init__(
        self,
        ebm: EBM | None = None,
        *,
        task: str | Task | None = None,
        task_kwargs: Mapping[str, Any] | None = None,
        reward_mode: str = "terminal",
        forbidden_reward: Number | None = None,
    ) -> None:
        self.ebm = find_ebm(ebm, task, task_kwargs)
        self._transition = Transition(self.ebm, reward_mode, forbidden_reward)
        self._observer = Observer(self.ebm)
        self.observation_space = self._observer.space
        self.action_space = spaces.Discrete(self.ebm.space.vocab_size)
        self._state: State | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an empty response.

        Raises:
            ValueError: an unknown option, or a ``prompt_id`` that is no index into the prompts.
        """
        super().reset(seed=seed)
        ids = choose_prompts(options, 1, self.ebm, self.np_random)
        self._state = self._transition.start(torch.from_numpy(ids))
        return self._observation(self._state), self._info(self._state)

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append a token.

        Raises:
            ResetNeeded: before the first reset, or after the end.
            ValueError: the action is no token id; or the reward is -inf and there is no
                ``forbidden_reward``.
        """
        state = self._current()
        if bool(state.ended):
            raise ResetNeeded("the response is complete: call reset() before the next step")
        token = torch.tensor([self._token(action)], device=self.ebm.device)
        self._state, reward, replaced = self._transition.step(state, token)
        info = self._info(self._state) | {"action_replaced": bool(replaced)}
        ended = bool(self._state.ended)
        return self._observation(self._state), float(reward), ended, False, info

    def action_masks(self) -> NDArray[np.bool_]:
        """``info["action_mask"]`` of the current state as bool, (A,)."""
        return to_numpy(self._transition.action_mask(self._current())[0])

    def _current(self) -> State:
        if self._state is None:
            raise ResetNeeded("call reset() before anything else")
        return self._state

    def _token(self, action: Any) -> int:
        a = self.ebm.space.vocab_size
        try:
            token = operator.index(action)
        except TypeError:
            token = -1
        if not 0 <= token < a:
            raise ValueError(f"an action is an integer token id in [0, {a}), got {shown(action)}")
        return token

    def _observation(self, state: State) -> Observation:
        return {name: rows[0] for name, rows in self._observer(state).items()}

    def _info(self, state: State) -> dict[str, Any]:
        info: dict[str, Any] = {"action_mask": self.action_masks().astype(np.int8)}
        if self.ebm.prompts is not None:
            info["prompt_id"] = int(state.prompt_ids)
        return info
