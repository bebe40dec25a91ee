r"""The KL penalty of a policy gradient: which estimate, where it stands, of what.

With u = log pi - log p_ref of a response, or of each of its tokens and then summed,

    k1 = u,  k2 = u^2 / 2,  k3 = exp(-u) - 1 + u.       (http://joschu.net/blog/kl-approx.html)

As estimates of the value of KL(pi, p_ref) k1 and k3 have no bias. As parts of an objective they
differ, and so do a penalty in the reward (held fixed, it weighs log pi as rewards do) and one in
the loss (its own gradient counts, not that of the draws): what each ends at is in
:mod:`rl_ebm.fixed_points.penalties`. One in the loss may be multiplied by the importance ratio
pi / pi_old (DeepSeek-V3.2, arXiv 2512.02556, Eq. 7), of which the gradient on the policy's own
draws is (kappa + kappa') grad log pi: for k3 that is u grad log pi, k2's own.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.agents.shared.learner import group_ids
from rl_ebm.agents.shared.on_policy import OnPolicyOptions, trained_on
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.divergences import KL_TERMS
from rl_ebm.fixed_points import FixedPoint, Penalty, Problem, penalised, penalised_in_groups
from rl_ebm.tokens import length_mask


@checked_options
class PenaltyOptions(OnPolicyOptions):
    """Options of every policy gradient."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """estimate of KL(policy, reference)"""
    kl_in: Literal["reward", "loss"] = "reward"
    """whether it is paid as a reward is, or added to the loss with its own gradient"""
    kl_level: Literal["token", "sequence"] = "token"
    """of each token and then summed, or of the whole response; the same for k1"""
    kl_weight: Literal["none", "ratio"] = "none"
    """ratio multiplies a penalty in the loss by pi / pi_old (TRL's use_bias_correction_kl)"""
    advantage: Literal["none", "group-std"] = "none"
    """group-std divides the advantages by the standard deviation of their group (GRPO)"""
    baseline: Literal["leave-one-out", "group-mean", "none"] = "leave-one-out"
    """taken off each return: the mean of the others in its group (RLOO), of the group, nothing"""
    reduce_tokens: Literal["sum", "mean"] = "sum"
    """sum over the tokens of a response, or their mean (which weighs short responses up)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advantage == "group-std" and self.baseline == "none":
            raise ValueError(
                "baseline='none' cannot be had with advantage='group-std', which takes off the "
                "group's mean: use advantage='none'"
            )
        if self.kl_weight == "ratio" and self.kl_in == "reward":
            raise ValueError(
                "kl_weight='ratio' is for a penalty with a gradient of its own: use kl_in='loss'"
            )


def fixed_point(options: PenaltyOptions, problem: Problem) -> FixedPoint:
    """What the expected gradient converges to from p_ref; of groups without end where none is set.

    Where p_ref forbids something, with the stand-in that is trained on.
    """
    penalty = Penalty(
        options.kl_estimator,
        options.kl_in,
        options.kl_level,
        group_std=options.advantage == "group-std",
        mean_tokens=options.reduce_tokens == "mean",
        baseline=options.baseline != "none",
        ratio=options.kl_weight == "ratio",
    )
    problem = trained_on(options.forbidden_log_weight, problem)
    if options.group_size is None:
        return penalised(problem, penalty)
    own_too = options.baseline == "group-mean"
    return penalised_in_groups(problem, penalty, options.group_size, own_too)


def kl_terms(
    log_pi: Float[Tensor, "B T"],
    log_ref: Float[Tensor, "B T"],
    lengths: Int64[Tensor, "B"],
    options: PenaltyOptions,
    log_pi_old: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """The penalty at each token, 0 past the end; that of a whole response stands at its first.

    Args:
        log_pi: log pi(a_t|s_t) of the tokens.
        log_ref: log p_ref(a_t|s_t) of the tokens.
        log_pi_old: log pi of the tokens when they were drawn, for ``kl_weight="ratio"``; None
            where pi itself draws.
    """
    past = ~length_mask(lengths, log_pi.shape[1])

    def of_level(x: Tensor) -> Tensor:
        x = x.masked_fill(past, 0.0)
        if options.kl_level == "token":
            return x
        # The other columns are 0, as is every estimate of u = 0.
        return torch.nn.functional.pad(x.sum(1, keepdim=True), (0, x.shape[1] - 1))

    kappa = KL_TERMS[options.kl_estimator](of_level(log_pi - log_ref))
    if options.kl_weight == "none":
        return kappa
    old = log_pi.detach() if log_pi_old is None else log_pi_old
    return of_level(log_pi - old).exp() * kappa


def centred(
    returns: Float[Tensor, "B"],
    prompt_ids: Int64[Tensor, "B"],
    num_prompts: int = 1,
    baseline: str = "leave-one-out",
) -> Float[Tensor, "B"]:
    """Return less its baseline: the mean return of the (other) responses of the same group.

    ``prompt_ids`` and ``num_prompts`` are those of groups where these are smaller than prompts.
    """
    if baseline == "none":
        return returns
    total, count = _group_sums(returns, prompt_ids, num_prompts)
    if baseline == "group-mean":
        return returns - total / count
    return returns - (total - returns) / (count - 1).clamp(min=1)


def standardised(
    returns: Float[Tensor, "B"], prompt_ids: Int64[Tensor, "B"], num_prompts: int = 1
) -> Float[Tensor, "B"]:
    """Return less the mean of its group, over the group's standard deviation (GRPO)."""
    rest = centred(returns, prompt_ids, num_prompts, "group-mean")
    square, count = _group_sums(rest.square(), prompt_ids, num_prompts)
    return rest / ((square / (count - 1).clamp(min=1)).sqrt() + 1e-6)


def advantages(
    returns: Float[Tensor, "B"],
    prompt_ids: Int64[Tensor, "B"],
    num_prompts: int,
    options: PenaltyOptions,
    beta: float,
) -> Float[Tensor, "B"]:
    """The advantage of each response, nats.

    Args:
        returns: R / beta, less the penalty where it is paid as a reward.
        beta: reward units per nat; in units of sigma against a penalty of weight beta, an
            advantage is 1 / beta times that in nats.
    """
    ids, count = group_ids(prompt_ids, num_prompts, options.group_size)
    if options.advantage == "group-std":
        return standardised(returns, ids, count) / beta
    return centred(returns, ids, count, options.baseline)


def token_weights(
    lengths: Int64[Tensor, "B"], rows: Float[Tensor, "B T"], options: PenaltyOptions
) -> Float[Tensor, "B T"]:
    """1 at real tokens, or 1 over their number; 0 past the end."""
    weight = length_mask(lengths, rows.shape[1]).to(rows.dtype)
    return weight / lengths[:, None] if options.reduce_tokens == "mean" else weight


def _group_sums(x: Tensor, prompt_ids: Tensor, num_prompts: int) -> tuple[Tensor, Tensor]:
    """Sum and number of the entries with the same prompt, at each entry."""
    zero = x.new_zeros(num_prompts)
    total = zero.index_add(0, prompt_ids, x)
    return total[prompt_ids], zero.index_add(0, prompt_ids, torch.ones_like(x))[prompt_ids]
