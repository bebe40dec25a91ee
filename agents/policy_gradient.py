r"""KL-regularised policy gradient: REINFORCE with a leave-one-out baseline (RLOO).

For k responses y_i ~ pi to a prompt, with returns in nats

    G_i = R(x, y_i) / beta - [kl_in = reward] kappa_i

    loss = mean_i ( - A_i log pi(y_i|x) + [kl_in = loss] kappa_i ),    A_i = G_i - mean_{j != i} G_j

where A has no gradient. kappa is an estimate of KL(pi, p_ref) by u = log pi - log p_ref. The
default, k1 in the reward, has the gradient of KL(pi, p*) as its mean: its fixed point is the
EBM. What the other options end at, :mod:`rl_ebm.fixed_points.penalties` says.
Kool et al. 2019 (https://openreview.net/forum?id=r1lgTGL5DE); Ahmadian et al. 2024
(arXiv 2402.14740); Shao et al. 2024 (arXiv 2402.03300) for k3 in the loss and group-std.
"""

from __future__ import annotations

from itertools import product

from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.agents.registry import AgentEntry
from rl_ebm.agents.shared.kl_penalty import (
    PenaltyOptions,
    advantages,
    fixed_point,
    kl_terms,
    token_weights,
)
from rl_ebm.agents.shared.on_policy import OnPolicyAgent
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.tokens import Batch


@checked_options
class PolicyGradientConfig(PenaltyOptions):
    """Options of the agent ``policy-gradient``."""


def policy_gradient_loss(
    log_pi: Float[Tensor, "B T"],
    log_ref: Float[Tensor, "B T"],
    gain: Float[Tensor, "B"],
    lengths: Int64[Tensor, "B"],
    prompt_ids: Int64[Tensor, "B"],
    num_prompts: int = 1,
    options: PenaltyOptions | None = None,
    beta: float = 1.0,
) -> Float[Tensor, ""]:
    """The surrogate of the module's docstring, mean over the responses.

    Args:
        log_pi: log pi(a_t|s_t) of responses drawn from pi, with gradient; 0 past the end.
        log_ref: log p_ref(a_t|s_t); 0 past the end.
        gain: R / beta of each response, nats.
        prompt_ids: which prompt each answers.
        beta: needed for group-std alone.
    """
    options = PenaltyOptions() if options is None else options
    kappa = kl_terms(log_pi, log_ref, lengths, options)
    returns = gain - kappa.detach().sum(1) if options.kl_in == "reward" else gain
    advantage = advantages(returns, prompt_ids, num_prompts, options, beta)
    loss = -advantage[:, None] * log_pi
    if options.kl_in == "loss":
        loss = loss + kappa
    return (token_weights(lengths, loss, options) * loss).sum(1).mean()


class PolicyGradientAgent(OnPolicyAgent):
    """RLOO on the policy's own samples."""

    Config = PolicyGradientConfig

    def loss(
        self,
        batch: Batch,
        log_pi: Float[Tensor, "B T"],
        log_pi_old: Float[Tensor, "B T"],
        log_ref: Float[Tensor, "B T"],
        gain: Float[Tensor, "B"],
    ) -> Tensor:
        """The surrogate of the policy's responses."""
        ids, p = batch.prompt_ids, self.ebm.num_prompts
        return policy_gradient_loss(
            log_pi, log_ref, gain, batch.lengths, ids, p, self.config, self.ebm.beta
        )


PENALTIES = tuple(
    {"kl_estimator": k, "kl_in": place, "kl_level": level, "advantage": advantage}
    for place, k, level, advantage in product(
        ("reward", "loss"), ("k1", "k2", "k3"), ("token", "sequence"), ("none", "group-std")
    )
)
"""options of a policy gradient that move its fixed point; times the ratio k3 in the loss is k2"""

ENTRIES = {
    "policy-gradient": AgentEntry(
        PolicyGradientAgent,
        PolicyGradientConfig,
        "KL-regularised REINFORCE, leave-one-out baseline (RLOO); by default k1 KL in the reward",
        "Ahmadian et al. 2024, arXiv 2402.14740",
        fixed_point=fixed_point,
        variants=PENALTIES,
    ),
}
