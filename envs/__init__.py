"""An EBM as a Gymnasium environment, one at a time or batched, and named tasks.

Importing this package registers ``rl_ebm/TokenMDP-v0``.
"""

if __name__ == "envs":
    raise ImportError("import rl_ebm.envs: by its bare name it would be a second copy of it")

from rl_ebm.envs.flat import FlatObservation, FlatVectorObservation
from rl_ebm.envs.registration import ENV_ID, register
from rl_ebm.envs.token_mdp import TokenMDP
from rl_ebm.envs.transition import State, Transition
from rl_ebm.envs.vector import TokenVectorEnv
from rl_ebm.tasks import TASKS, Task, make_task

__all__ = [
    "ENV_ID",
    "TASKS",
    "FlatObservation",
    "FlatVectorObservation",
    "State",
    "Task",
    "TokenMDP",
    "TokenVectorEnv",
    "Transition",
    "make_task",
    "register",
]

register()
