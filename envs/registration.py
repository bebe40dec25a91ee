"""The ids under which Gymnasium finds the environments."""

from __future__ import annotations

import gymnasium

ENV_ID = "rl_ebm/TokenMDP-v0"


def register() -> None:
    """Register :data:`ENV_ID` for ``gymnasium.make`` and ``make_vec``; twice is once."""
    if ENV_ID not in gymnasium.registry:
        gymnasium.register(
            ENV_ID,
            entry_point="rl_ebm.envs.token_mdp:TokenMDP",
            vector_entry_point="rl_ebm.envs.vector:TokenVectorEnv",
        )
