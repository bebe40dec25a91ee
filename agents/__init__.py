"""Agents: one file for each objective, its loss callable from outside.

An agent has a ``policy``, ``sample() -> Batch | None`` (the responses that it wants next),
``update(batch, progress) -> metrics`` (one gradient step on scored responses) and
``state_dict`` / ``load_state_dict``. ``own_rows`` (a slice; None for none) says which of the
sampled rows are draws of the policy as it is: they make the curves ``charts/episodic_*``, and
without it there are none. It touches no environment, file, clock or writer
(preferences of a file are read for it, when it is made). What it
converges to stands in its entry: of responses, groups and proposals without end, but for a size
that is given, and with the exact solution as its teacher.

A new objective is its file, which ends with its ``ENTRIES``, and a line in :data:`OBJECTIVES`.
"""

from __future__ import annotations

if __name__ == "agents":
    raise ImportError("import rl_ebm.agents: by its bare name it would be a second copy of it")

from importlib import import_module

from rl_ebm.agents.names import meant
from rl_ebm.agents.registry import (
    AGENTS,
    Agent,
    AgentEntry,
    entry_of,
    entry_of_run,
    make_options,
    register,
)
from rl_ebm.agents.shared.account import Behaviour, behaviour, learned_log_z

OBJECTIVES = (
    "soft_q",
    "path_consistency",
    "trajectory_balance",
    "tree_backup",
    "monte_carlo",
    "policy_gradient",
    "ppo",
    "matching",
    "best_of_n",
    "sampled_teacher",
    "on_policy_distillation",
    "dpo",
    "teacher_forcing",
    "exact",
)
"""the files whose ``ENTRIES`` are the library's agents, in the order in which these are listed"""

for _file in OBJECTIVES:
    AGENTS.update(import_module(f"{__name__}.{_file}").ENTRIES)

from rl_ebm.agents.best_of_n import BestOfNAgent, BestOfNConfig
from rl_ebm.agents.dpo import DPOAgent, DPOConfig, IPOAgent, IPOConfig
from rl_ebm.agents.exact import ExactAgent, ExactConfig
from rl_ebm.agents.matching import MatchingAgent, MatchingConfig
from rl_ebm.agents.monte_carlo import MonteCarloAgent, MonteCarloConfig
from rl_ebm.agents.on_policy_distillation import (
    OnPolicyDistillationAgent,
    OnPolicyDistillationConfig,
)
from rl_ebm.agents.path_consistency import (
    DetailedBalanceAgent,
    DetailedBalanceConfig,
    PathConsistencyAgent,
    PathConsistencyConfig,
    SubTBAgent,
    SubTBConfig,
)
from rl_ebm.agents.policy_gradient import PolicyGradientAgent, PolicyGradientConfig
from rl_ebm.agents.ppo import GRPOAgent, GRPOConfig, PPOAgent, PPOConfig
from rl_ebm.agents.sampled_teacher import SampledTeacherAgent, SampledTeacherConfig
from rl_ebm.agents.soft_q import SoftQAgent, SoftQConfig
from rl_ebm.agents.teacher_forcing import TeacherForcingAgent, TeacherForcingConfig
from rl_ebm.agents.trajectory_balance import (
    TrajectoryBalanceAgent,
    TrajectoryBalanceConfig,
    VarGradAgent,
    VarGradConfig,
)

__all__ = [
    "AGENTS",
    "Agent",
    "AgentEntry",
    "Behaviour",
    "BestOfNAgent",
    "BestOfNConfig",
    "DPOAgent",
    "DPOConfig",
    "DetailedBalanceAgent",
    "DetailedBalanceConfig",
    "ExactAgent",
    "ExactConfig",
    "GRPOAgent",
    "GRPOConfig",
    "IPOAgent",
    "IPOConfig",
    "MatchingAgent",
    "MatchingConfig",
    "MonteCarloAgent",
    "MonteCarloConfig",
    "OnPolicyDistillationAgent",
    "OnPolicyDistillationConfig",
    "PPOAgent",
    "PPOConfig",
    "PathConsistencyAgent",
    "PathConsistencyConfig",
    "PolicyGradientAgent",
    "PolicyGradientConfig",
    "SampledTeacherAgent",
    "SampledTeacherConfig",
    "SoftQAgent",
    "SoftQConfig",
    "SubTBAgent",
    "SubTBConfig",
    "TeacherForcingAgent",
    "TeacherForcingConfig",
    "TrajectoryBalanceAgent",
    "TrajectoryBalanceConfig",
    "VarGradAgent",
    "VarGradConfig",
    "behaviour",
    "entry_of",
    "entry_of_run",
    "learned_log_z",
    "make_options",
    "meant",
    "register",
]
