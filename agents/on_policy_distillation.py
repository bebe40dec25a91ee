r"""On-policy distillation: the policy writes, the teacher says at each state what it would do.

    loss = mean_i sum_t D(teacher(.|s_t), pi(.|s_t)),    s_t along responses drawn from pi,

or, a share of them, from the teacher: there the forward KL is teacher forcing with the exact
probability of every token in the place of the one that was drawn. The distributions over the next
token are full, and no gradient goes through the draws. Agarwal et al. 2024 (arXiv 2306.13649,
Eq. 3 and Alg. 1); D is the forward KL(teacher, pi), the reverse KL(pi, teacher), or
Jensen-Shannon. Each is 0 at every state that is visited exactly where the policy is the
teacher's: with the exact solution as the teacher, at the EBM.

What is run at scale sees less of the teacher, and does not always end there
(:mod:`rl_ebm.fixed_points.distillation`). ``support`` says at which tokens the two are compared:

* ``teacher-top``, ``student-top``: the ``top_k`` likeliest of either, the rest of the mass
  renormalised away, dropped, or kept in one bucket (``outside``). TRL 1.10's server distillation
  has the teacher's with a bucket, or renormalised without it; verl's ``forward_kl_topk`` drops,
  its ``forward_kl_topk_tail`` has the bucket.
* ``token``: the one that was drawn, u = log pi - log teacher, as k1, k2 or k3 in the loss (times
  pi / pi_old, of which the gradient counts, with ``kl_weight="ratio"``), or as a reward:

      loss = - mean_i sum_t A_t log pi(a_t|s_t),    A_t = - sum_{j >= t} gamma^(j - t) kappa(u_j),

  without a gradient through A. k1 with gamma = 0 is Lu et al. 2025
  (https://thinkingmachines.ai/blog/on-policy-distillation), and tinker's default; any gamma > 0
  is its ``kl_discount_factor``; verl has all of them (``use_policy_gradient``).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.agents.registry import AgentEntry
from rl_ebm.agents.shared.account import Behaviour
from rl_ebm.agents.shared.base import given
from rl_ebm.agents.shared.imitation import ImitationAgent, ImitationOptions
from rl_ebm.agents.shared.learner import token_values
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.divergences import KL_TERMS, TO_TEACHER, restricted, top_actions
from rl_ebm.fixed_points import Distillation, FixedPoint, Problem, distilled, target
from rl_ebm.policies.base import Policy, forbids_of
from rl_ebm.policies.decoding import sample
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import Batch, length_mask

DIVERGENCES = TO_TEACHER


@checked_options
class OnPolicyDistillationConfig(ImitationOptions):
    """Options of the agent ``on-policy-distillation``."""

    batch_size: int = 2048
    """responses in a step"""
    divergence: Literal["forward", "reverse", "js"] = "reverse"
    """of the teacher and the policy at each state"""
    on_policy: float | int = 1.0
    """share of the responses drawn from the policy, the rest from the teacher"""
    support: Literal["all", "teacher-top", "student-top", "token"] = "all"
    """tokens at which the two are compared: all, the top_k of either, or the one that was drawn"""
    top_k: int = 16
    """tokens that are compared, with teacher-top or student-top"""
    outside: Literal["renormalise", "drop", "bucket"] = "renormalise"
    """what becomes of the mass outside of them: taken away, dropped, or one more outcome"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """with token: estimate of KL(policy, teacher)"""
    kl_in: Literal["reward", "loss"] = "reward"
    """with token: whether it is paid as a reward is, or the loss with its own gradient"""
    kl_weight: Literal["none", "ratio"] = "none"
    """with token: ratio multiplies what is in the loss by pi / pi_old"""
    discount: float | int = 0.0
    """with token: of the rewards of later tokens, in the return of each"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"on_policy must be in [0, 1], got {self.on_policy}")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount must be in [0, 1], got {self.discount}")
        if self.top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {self.top_k}")
        self._check_drawn()

    def _check_drawn(self) -> None:
        """Raise ValueError for options that a drawn token has no use for, or all but that."""
        if self.support != "token":
            if (self.kl_estimator, self.kl_in, self.kl_weight) != ("k1", "reward", "none"):
                raise ValueError(
                    "kl_estimator, kl_in and kl_weight are of the token that was drawn: use "
                    "support='token', or leave them out"
                )
            if self.discount:
                raise ValueError("discount is of rewards: use support='token', or leave it out")
        elif self.divergence != "reverse":
            raise ValueError(
                "the token that was drawn estimates KL(policy, teacher): use divergence='reverse' "
                "with support='token'"
            )
        elif self.on_policy != 1:
            raise ValueError(
                "the estimate of a drawn token is of the policy's own draws: use on_policy=1 with "
                "support='token'"
            )
        elif self.kl_in == "reward" and self.kl_weight == "ratio":
            raise ValueError(
                "kl_weight='ratio' is for an estimate with a gradient of its own: use kl_in='loss'"
            )
        elif self.kl_in == "loss" and self.discount:
            raise ValueError("discount is of rewards: use kl_in='reward', or leave it out")

    @property
    def ends_at_target(self) -> bool | None:
        """True where the EBM is stated as the limit, whatever the rewards; None: computed."""
        return True if self.support == "all" else None


def on_policy_distillation_loss(
    log_pi: Float[Tensor, "B T A"],
    log_teacher: Float[Tensor, "B T A"],
    lengths: Int64[Tensor, "B"],
    divergence: str = "reverse",
    top_k: int | None = None,
    whose: str = "teacher",
    outside: str = "renormalise",
) -> Float[Tensor, ""]:
    """Sum of the divergences at the states of each response, mean over the responses; nats.

    Args:
        top_k: the likeliest tokens, at which alone the two are compared; None for all.
        whose: likeliest, the "teacher"'s or the "student"'s.
        outside: what becomes of the rest: :func:`rl_ebm.divergences.restricted`.
    """
    past = ~length_mask(lengths, log_pi.shape[1])
    # Rows past the end say nothing; equal ones have divergence and gradient 0.
    even = -math.log(log_pi.shape[-1])
    log_pi, log_teacher = (x.masked_fill(past[..., None], even) for x in (log_pi, log_teacher))
    if top_k is not None:
        kept = top_actions(log_teacher if whose == "teacher" else log_pi.detach(), top_k)
        log_pi, log_teacher = (restricted(x, kept, outside) for x in (log_pi, log_teacher))
    terms = DIVERGENCES[divergence](log_teacher, log_pi)
    return terms.masked_fill(past, 0.0).sum(1).mean()


def drawn_token_loss(
    log_pi: Float[Tensor, "B T"],
    log_teacher: Float[Tensor, "B T"],
    lengths: Int64[Tensor, "B"],
    kl_estimator: str = "k1",
    kl_in: str = "reward",
    kl_weight: str = "none",
    discount: float = 0.0,
) -> Float[Tensor, ""]:
    """An estimate of the reverse KL at the drawn tokens, summed over each response; nats.

    Args:
        log_pi: log pi(a_t|s_t) of the tokens, which pi drew, with gradient.
        log_teacher: the teacher's.
    """
    past = ~length_mask(lengths, log_pi.shape[1])
    u = (log_pi - log_teacher).masked_fill(past, 0.0)
    kappa = KL_TERMS[kl_estimator](u)
    if kl_in == "loss":
        # Its value is 1: pi has drawn. Its gradient is not.
        ratio = (log_pi - log_pi.detach()).exp() if kl_weight == "ratio" else 1.0
        return (kappa * ratio).masked_fill(past, 0.0).sum(1).mean()
    cost = returns_to_go(kappa.detach(), discount)
    return (cost * log_pi).masked_fill(past, 0.0).sum(1).mean()


def returns_to_go(x: Float[Tensor, "B T"], discount: float) -> Float[Tensor, "B T"]:
    """sum_{j >= t} discount^(j - t) x_j."""
    found = [x[:, -1]]
    for column in x.flip(1)[:, 1:].unbind(1):
        found.append(column + discount * found[-1])
    return torch.stack(found[::-1], 1)


class OnPolicyDistillationAgent(ImitationAgent):
    """Learns from a teacher at the states that its own policy visits; rewards are not read."""

    Config = OnPolicyDistillationConfig

    def drawn_from(self, teacher: Policy | None) -> Policy:
        """The policy itself; the teacher only says what it would do."""
        self.teacher = given(teacher, self.ebm, "on-policy-distillation")
        cfg = self.config
        if "reverse" in (cfg.divergence, cfg.support) and forbids_of(teacher):
            raise ValueError(
                "the teacher forbids some actions, so KL(policy, teacher) is infinite: use "
                "divergence='forward' or 'js'"
            )
        return self.policy

    @property
    def own_rows(self) -> slice | None:
        """The policy's own draws, which come first; None without one."""
        count = round(self.config.on_policy * self.config.batch_size)
        return slice(0, count) if count else None

    def sample(self) -> Batch:
        """Responses of the policy, and of the teacher."""
        ids = self.prompts()
        count = round(self.config.on_policy * len(ids))
        if 0 < count < len(ids):
            # Which rows are whose does not depend on their prompts.
            ids = ids[torch.randperm(len(ids), generator=self.generator, device=ids.device)]
        parts = [
            sample(source, self.ebm.space, len(some), self.generator, some)
            for source, some in ((self.policy, ids[:count]), (self.teacher, ids[count:]))
            if len(some)
        ]
        return parts[0] if len(parts) == 1 else Batch.cat(parts)

    def behaviour(self) -> Behaviour | None:
        """The policy and the teacher draw."""
        return Behaviour(self.config.on_policy, teacher=1 - self.config.on_policy)

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The divergences at the states of the policy's responses."""
        space, ids = self.ebm.space, batch.prompt_ids
        with torch.no_grad():
            # A single prompt needs no ids: the teacher would read them from the device to check.
            asked = ids if self.ebm.num_prompts > 1 else None
            log_teacher = log_policy(q_values(self.teacher, space, batch.tokens, asked))
        log_pi = log_policy(q_values(self.policy, space, batch.tokens, ids))
        log_teacher, cfg = log_teacher.to(log_pi.dtype), self.config
        if cfg.support == "token":
            drawn, told = (token_values(x, batch) for x in (log_pi, log_teacher))
            options = (cfg.kl_estimator, cfg.kl_in, cfg.kl_weight, cfg.discount)
            return drawn_token_loss(drawn, told, batch.lengths, *options)
        top_k = None if cfg.support == "all" else min(cfg.top_k, space.vocab_size)
        whose = cfg.support.removesuffix("-top")
        return on_policy_distillation_loss(
            log_pi, log_teacher, batch.lengths, cfg.divergence, top_k, whose, cfg.outside
        )


def fixed_point(config: OnPolicyDistillationConfig, problem: Problem) -> FixedPoint:
    """The EBM of all tokens, as stated; computed where less of the teacher is seen."""
    if config.support == "all":
        return target(config, problem)
    return distilled(
        problem,
        Distillation(
            config.divergence,
            config.support,
            config.top_k,
            config.outside,
            config.kl_estimator,
            config.kl_in,
            config.kl_weight == "ratio",
            float(config.discount),
        ),
    )


VARIANTS: tuple[dict[str, Any], ...] = (
    *({"divergence": name} for name in ("forward", "reverse", "js")),
    *(
        {"divergence": name, "support": whose, "top_k": 2, "outside": outside}
        for name, whose in (("forward", "teacher-top"), ("reverse", "student-top"))
        for outside in ("renormalise", "drop", "bucket")
    ),
    *({"support": "token", "kl_estimator": k, "kl_in": "reward"} for k in ("k1", "k2", "k3")),
    {"support": "token", "kl_estimator": "k1", "kl_in": "reward", "discount": 1.0},
    *(
        {"support": "token", "kl_estimator": k, "kl_in": "loss", "kl_weight": weight}
        for weight in ("none", "ratio")
        for k in ("k1", "k2", "k3")
    ),
)
"""what the audit lists"""

ENTRIES = {
    "on-policy-distillation": AgentEntry(
        OnPolicyDistillationAgent,
        OnPolicyDistillationConfig,
        "a teacher's next-token distribution at the states of the policy's own responses",
        "Agarwal et al. 2024, arXiv 2306.13649",
        needs_teacher=True,
        fixed_point=fixed_point,
        variants=VARIANTS,
    ),
}
