"""Agents: one file for each objective, its loss callable from outside.

An agent has a ``policy``, ``sample() -> Batch | None`` (the responses that it wants next),
``update(batch, progress) -> metrics`` (one gradient step on scored responses) and
``state_dict`` / ``load_state_dict``. ``own_rows`` (a slice; None for none) says which of the
sampled rows are draws of the policy as it is: they make the curves ``charts/episodic_*``, and
without it there are none. It touches no environment, file, clock or writer. What it
converges to stands in its entry: of responses, groups and proposals without end, but for a size
that is given, and with the exact solution as its teacher.
"""

from __future__ import annotations

if __name__ == "agents":
    raise ImportError("import rl_ebm.agents: by its bare name it would be a second copy of it")

from itertools import product

from rl_ebm.agents.best_of_n import BestOfNAgent, BestOfNConfig
from rl_ebm.agents.best_of_n import fixed_point as best_of_n_fixed_point
from rl_ebm.agents.exact import ExactAgent, ExactConfig
from rl_ebm.agents.matching import SLOPES, MatchingAgent, MatchingConfig
from rl_ebm.agents.matching import fixed_point as matching_fixed_point
from rl_ebm.agents.monte_carlo import MonteCarloAgent, MonteCarloConfig
from rl_ebm.agents.monte_carlo import fixed_point as monte_carlo_fixed_point
from rl_ebm.agents.names import meant
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
from rl_ebm.agents.registry import (
    AGENTS,
    Agent,
    AgentEntry,
    entry_of,
    entry_of_run,
    make_options,
    register,
)
from rl_ebm.agents.sampled_teacher import SampledTeacherAgent, SampledTeacherConfig
from rl_ebm.agents.sampled_teacher import fixed_point as sampled_teacher_fixed_point
from rl_ebm.agents.shared.account import Behaviour, behaviour, learned_log_z
from rl_ebm.agents.shared.kl_penalty import fixed_point as penalised_fixed_point
from rl_ebm.agents.shared.off_policy import fixed_point as off_policy_fixed_point
from rl_ebm.agents.soft_q import SoftQAgent, SoftQConfig
from rl_ebm.agents.teacher_forcing import TeacherForcingAgent, TeacherForcingConfig
from rl_ebm.agents.trajectory_balance import (
    TrajectoryBalanceAgent,
    TrajectoryBalanceConfig,
    VarGradAgent,
    VarGradConfig,
)
from rl_ebm.fixed_points import target

PENALTIES = tuple(
    {"kl_estimator": k, "kl_in": place, "kl_level": level, "advantage": advantage}
    for place, k, level, advantage in product(
        ("reward", "loss"), ("k1", "k2", "k3"), ("token", "sequence"), ("none", "group-std")
    )
)
"""options of a policy gradient that move its fixed point"""

BUILT_IN = {
    "soft-q": AgentEntry(
        SoftQAgent,
        SoftQConfig,
        "soft Q-learning on sequences: logits regress on soft lambda- or n-step returns",
        "Haarnoja et al. 2017, arXiv 1702.08165",
        fixed_point=off_policy_fixed_point,
    ),
    "path-consistency": AgentEntry(
        PathConsistencyAgent,
        PathConsistencyConfig,
        "path consistency (PCL): squared soft Bellman residuals of all sub-trajectories",
        "Nachum et al. 2017, arXiv 1702.08892",
        fixed_point=off_policy_fixed_point,
    ),
    "subtb": AgentEntry(
        SubTBAgent,
        SubTBConfig,
        "sub-trajectory balance, weights lambda^length, with V = logsumexp q as the flow",
        "Madan et al. 2023, arXiv 2209.12782",
        fixed_point=off_policy_fixed_point,
    ),
    "detailed-balance": AgentEntry(
        DetailedBalanceAgent,
        DetailedBalanceConfig,
        "detailed balance with V = logsumexp q: the squared one-step soft Bellman residual",
        "Bengio et al. 2023, arXiv 2111.09266",
        fixed_point=off_policy_fixed_point,
    ),
    "trajectory-balance": AgentEntry(
        TrajectoryBalanceAgent,
        TrajectoryBalanceConfig,
        "trajectory balance with a learned log Z for each prompt",
        "Malkin et al. 2022, arXiv 2201.13259",
        fixed_point=off_policy_fixed_point,
    ),
    "vargrad": AgentEntry(
        VarGradAgent,
        VarGradConfig,
        "variance of the log-ratio over a batch: trajectory balance with the batch's log Z",
        "Richter et al. 2020, arXiv 2010.10436",
        fixed_point=off_policy_fixed_point,
    ),
    "monte-carlo": AgentEntry(
        MonteCarloAgent,
        MonteCarloConfig,
        "regression of Q* = log E_ref exp(R / beta) on rollouts of the reference (Q#)",
        "Zhou et al. 2025, arXiv 2502.20548",
        fixed_point=monte_carlo_fixed_point,
    ),
    "policy-gradient": AgentEntry(
        PolicyGradientAgent,
        PolicyGradientConfig,
        "KL-regularised REINFORCE, leave-one-out baseline (RLOO); by default k1 KL in the reward",
        "Ahmadian et al. 2024, arXiv 2402.14740",
        fixed_point=penalised_fixed_point,
        variants=PENALTIES,
    ),
    "ppo": AgentEntry(
        PPOAgent,
        PPOConfig,
        "clipped policy gradient, several steps a batch, no critic; by default k1 in the reward",
        "Schulman et al. 2017, arXiv 1707.06347",
        fixed_point=penalised_fixed_point,
        variants=PENALTIES[:1],
    ),
    "grpo": AgentEntry(
        GRPOAgent,
        GRPOConfig,
        "PPO's step with advantages over the group's sigma, k3 in the loss",
        "Shao et al. 2024, arXiv 2402.03300",
        fixed_point=penalised_fixed_point,
        variants=PENALTIES[-3:-2],
    ),
    "dpg": AgentEntry(
        MatchingAgent,
        MatchingConfig,
        "distribution matching (DPG, GDC, f-DPG): an f-divergence by policy gradient",
        "Go et al. 2023, arXiv 2302.08215",
        fixed_point=matching_fixed_point,
        variants=tuple({"divergence": name} for name in SLOPES),
    ),
    "best-of-n": AgentEntry(
        BestOfNAgent,
        BestOfNConfig,
        "imitation of the best of n responses: of the policy (expert iteration) or the reference",
        "Beirami et al. 2024, arXiv 2401.01879",
        fixed_point=best_of_n_fixed_point,
        variants=({"source": "policy"}, {"source": "reference"}),
    ),
    "sampled-teacher": AgentEntry(
        SampledTeacherAgent,
        SampledTeacherConfig,
        "teacher forcing on samples made without a solution: resampled proposals, or MCMC",
        "Bornschein and Bengio 2015, arXiv 1406.2751",
        fixed_point=sampled_teacher_fixed_point,
        variants=({"method": "sir"}, {"method": "mcmc"}),
    ),
    "on-policy-distillation": AgentEntry(
        OnPolicyDistillationAgent,
        OnPolicyDistillationConfig,
        "a teacher's next-token distribution at the states of the policy's own responses",
        "Agarwal et al. 2024, arXiv 2306.13649",
        needs_teacher=True,
        needs_reward=False,
        fixed_point=target,
        variants=tuple({"divergence": name} for name in ("forward", "reverse", "js")),
    ),
    "teacher-forcing": AgentEntry(
        TeacherForcingAgent,
        TeacherForcingConfig,
        "negative log-likelihood of samples of a teacher, by default the exact solution",
        "Blondel et al. 2025, arXiv 2512.15605, Prop. 2",
        needs_teacher=True,
        needs_reward=False,
        fixed_point=target,
    ),
    "exact": AgentEntry(
        ExactAgent,
        ExactConfig,
        "full-gradient distillation of the exact solution over every prefix",
        "Blondel et al. 2025, arXiv 2512.15605, Eq. (2)",
        needs_teacher=True,
        needs_reward=False,
        fixed_point=target,
    ),
}

AGENTS.update(BUILT_IN)

__all__ = [
    "AGENTS",
    "Agent",
    "AgentEntry",
    "Behaviour",
    "BestOfNAgent",
    "BestOfNConfig",
    "DetailedBalanceAgent",
    "DetailedBalanceConfig",
    "ExactAgent",
    "ExactConfig",
    "GRPOAgent",
    "GRPOConfig",
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
