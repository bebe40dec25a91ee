"""What an agent sees of a state, as numpy arrays, and which prompt it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from rl_ebm.ebm import EBM
from rl_ebm.envs.transition import State
from rl_ebm.messages.arguments import shown as shown_value

Observation = dict[str, Any]


class Observer:
    """Makes observations of states: ``tokens``, ``length``, and the prompt where there are any.

    Args:
        ebm: the EBM whose space and prompts are shown.
    """

    def __init__(self, ebm: EBM) -> None:
        a, t_max = ebm.space.vocab_size, ebm.space.max_length
        shown: dict[str, spaces.Space[Any]] = {
            "tokens": spaces.Box(0, a - 1, (t_max,), np.int64),
            "length": spaces.Discrete(t_max + 1),
        }
        self._prompts: NDArray[np.int64] | None = None
        if ebm.prompts is not None:
            self._prompt_lengths = np.array([len(p) for p in ebm.prompts], dtype=np.int64)
            width = max(1, *self._prompt_lengths.tolist())  # a Box has at least one entry
            self._prompts = np.zeros((ebm.num_prompts, width), dtype=np.int64)
            for row, prompt in zip(self._prompts, ebm.prompts, strict=True):
                row[: len(prompt)] = prompt
            largest = max(a - 1, int(self._prompts.max()))
            shown["prompt"] = spaces.Box(0, largest, (width,), np.int64)
            shown["prompt_length"] = spaces.Discrete(width + 1)
        self.space = spaces.Dict(shown)
        """of one row"""

    def __call__(self, state: State) -> Observation:
        """New arrays, one row for each of the state's: ``tokens`` (B, T), ``length`` (B,), …"""
        shown = {"tokens": to_numpy(state.tokens), "length": to_numpy(state.lengths)}
        if self._prompts is not None:
            ids = to_numpy(state.prompt_ids)
            shown["prompt"] = self._prompts[ids]
            shown["prompt_length"] = self._prompt_lengths[ids]
        return shown


def to_numpy(x: Tensor) -> NDArray[Any]:
    """A copy: what an agent does to its observation never reaches the state."""
    return np.array(x.numpy(force=True))


def choose_prompts(
    options: dict[str, Any] | None, n: int, ebm: EBM, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Which prompt each of n rows begins with: those of ``options``, else uniform draws.

    Args:
        options: None, {}, or {"prompt_id": one index, or n of them}.
        n: number of rows.
        ebm: holds the prompts; without prompts the answer is 0 and nothing is drawn.
        rng: for the draws, one for each row.

    Returns:
        Indices into ``ebm.prompts``, (n,).

    Raises:
        ValueError: an unknown option, or a ``prompt_id`` that is no index into the prompts.
    """
    given = {} if options is None else options
    if not isinstance(given, Mapping):
        raise TypeError(
            "the options of reset must be a dict, for example {'prompt_id': 0}, or None, got "
            f"{shown_value(given)}"
        )
    for name in given:
        if name != "prompt_id":
            raise ValueError(
                f"unknown reset option {shown_value(name)}: the only one is 'prompt_id', an index "
                "into the EBM's prompts"
            )
    if "prompt_id" not in given:
        if ebm.prompts is None:
            return np.zeros(n, dtype=np.int64)
        return rng.integers(ebm.num_prompts, size=n)
    if ebm.prompts is None:
        raise ValueError("reset got the option 'prompt_id', and this EBM has no prompts")
    ids = np.asarray(given["prompt_id"])
    if (
        not np.issubdtype(ids.dtype, np.integer)
        or ids.shape not in ((), (n,))
        or not ((ids >= 0) & (ids < ebm.num_prompts)).all()
    ):
        raise ValueError(
            f"the reset option 'prompt_id' must be an index in [0, {ebm.num_prompts}), or an "
            f"array of shape ({n},) of them, got "
            f"{shown_value(given['prompt_id'])}"
        )
    return np.array(np.broadcast_to(ids, (n,)), dtype=np.int64)
