r"""Soft Q-learning on sequences: the logits regress on soft returns.

    loss = sum_t (q(s_t, a_t) - G_t)^2 / 2,    G_t without gradient,

    lambda-return:  G_t = r_t + (1 - lam) V(s_{t+1}) + lam (G_{t+1} - log pi(a_{t+1}|s_{t+1}))
    n-step return:  G_t = r_t + sum_{0 < k < n} (r_{t+k} - log pi(a_{t+k}|s_{t+k})) + V(s_{t+n})

with V and log pi of a target network, and no V after the last token. Since
q* - log pi* = V* along every path, G_t = q*(s_t, a_t) at the fixed point whoever drew the
tokens: no importance weights are needed, and a wrong q is corrected from the end backwards.
lam = 0, or n = 1, is the one-step backup of Haarnoja et al. 2017 (arXiv 1702.08165, Eq. 11),
by which values must travel T levels, one target update each; lam = 1 is the semi-gradient
form of path consistency (Nachum et al. 2017, arXiv 1702.08892, Eq. 15), and the default.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.agents.registry import AgentEntry
from rl_ebm.agents.shared.learner import token_values
from rl_ebm.agents.shared.off_policy import OffPolicyOptions, fixed_point
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.agents.shared.values import Learned, ValueAgent, carried_q
from rl_ebm.policies.base import Policy
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import gather_tokens, log_policy, soft_value
from rl_ebm.tokens import Batch, length_mask


@checked_options
class SoftQConfig(OffPolicyOptions):
    """Options of the agent ``soft-q``."""

    lam: float | int = 1.0
    """lambda of the return: 1 for whole paths, 0 for one-step backups"""
    n_step: int | None = None
    """n of the n-step return, in the place of the lambda-return"""
    tau: float | int = 1.0
    """target network: target <- (1 - tau) target + tau online, after each step"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam must be in [0, 1], got {self.lam}")
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must be in (0, 1], got {self.tau}")
        if self.n_step is not None and self.n_step < 1:
            raise ValueError(f"n_step must be >= 1, or None for lambda-returns, got {self.n_step}")

    @property
    def values_apart(self) -> bool:
        """Whole paths alone carry V; shorter returns bootstrap, by a V in the same weights."""
        return self.lam == 1 and self.n_step is None


def lambda_returns(
    r: Float[Tensor, "B T"],
    v: Float[Tensor, "B T"],
    log_pi: Float[Tensor, "B T"],
    lengths: Int64[Tensor, "B"],
    lam: float | int,
) -> Float[Tensor, "B T"]:
    """G_t of the module's docstring; 0 past the end.

    Args:
        r: immediate log-weights of the tokens.
        v: V(s_t) before each token.
        log_pi: log pi(a_t|s_t) of the tokens.
    """
    past = ~length_mask(lengths, r.shape[1])
    # Past the end nothing is paid and V is 0: the recursion starts itself at each row's end.
    r, v, log_pi = (x.masked_fill(past, 0.0) for x in (r, v, log_pi))
    returns = [r[:, -1]]
    for t in reversed(range(r.shape[1] - 1)):
        later = (1 - lam) * v[:, t + 1] + lam * (returns[-1] - log_pi[:, t + 1])
        returns.append(r[:, t] + later)
    return torch.stack(returns[::-1], dim=1)


def n_step_returns(
    r: Float[Tensor, "B T"],
    v: Float[Tensor, "B T"],
    log_pi: Float[Tensor, "B T"],
    lengths: Int64[Tensor, "B"],
    n: int,
) -> Float[Tensor, "B T"]:
    """G_t of the module's docstring; 0 past the end. Arguments as :func:`lambda_returns`."""
    steps = r.shape[1]
    n = min(n, steps)  # no response goes on longer
    real = length_mask(lengths, steps)
    v, soft = v.masked_fill(~real, 0.0), (r - log_pi).masked_fill(~real, 0.0)
    zeros = r.new_zeros(len(r), n)  # past the end nothing is paid and V is 0
    soft, v = torch.cat([soft, zeros], 1), torch.cat([v, zeros], 1)
    returns = r + v[:, n : n + steps]
    for k in range(1, n):
        returns = returns + soft[:, k : k + steps]
    return returns.masked_fill(~real, 0.0)


def soft_q_loss(
    q: Float[Tensor, "B T A"],
    returns: Float[Tensor, "B T"],
    tokens: Int64[Tensor, "B T"],
    lengths: Int64[Tensor, "B"],
) -> Float[Tensor, ""]:
    """Half the squared residual q(s_t, a_t) - G_t: sum over real tokens, mean over rows."""
    residual = gather_tokens(q, tokens) - returns
    return 0.5 * residual.masked_fill(~length_mask(lengths, q.shape[1]), 0.0).square().sum(1).mean()


class SoftQAgent(ValueAgent):
    """Soft Q-learning; its policy's raw logits become q*, its V at the root log Z."""

    Config = SoftQConfig

    def begin(self, teacher: Policy | None) -> None:
        """The target network."""
        super().begin(teacher)
        # With tau = 1 the target is the online network: no copy, no second pass.
        self.target = self.policy if self.config.tau == 1 else copy.deepcopy(self.policy)

    def loss(self, batch: Batch, r: Float[Tensor, "B T"]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of responses, and V at the root."""
        learned = self.learn_values(batch, r)
        q = learned.q if learned.root is None else carried_q(learned, batch, r, semi=True)
        with torch.no_grad():
            q_target = q.detach()
            if self.target is not self.policy:
                q_target = self._target_q(learned, batch, r)
            returns = self.returns(q_target, batch, r)
        loss = soft_q_loss(q, returns, batch.tokens, batch.lengths) + learned.loss
        return loss, {"losses/root_value": soft_value(q_target[:, 0]).mean()}

    def _target_q(
        self, learned: Learned, batch: Batch, r: Float[Tensor, "B T"]
    ) -> Float[Tensor, "B T A"]:
        """The same of the target network; it stands on the level of the online one."""
        q = q_values(self.target, self.ebm.space, batch.tokens, batch.prompt_ids)
        if learned.root is None:
            return q
        return carried_q(learned._replace(q=q), batch, r, semi=True)

    def returns(
        self, q: Float[Tensor, "B T A"], batch: Batch, r: Float[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """The returns that ``update`` regresses on, from the target network's q."""
        v, log_pi = soft_value(q), token_values(log_policy(q), batch)
        if self.config.n_step is not None:
            return n_step_returns(r, v, log_pi, batch.lengths, self.config.n_step)
        return lambda_returns(r, v, log_pi, batch.lengths, self.config.lam)

    def update(self, batch: Batch, progress: float = 0.0) -> dict[str, Tensor]:
        """One gradient step; the target network follows."""
        metrics = super().update(batch, progress)
        if self.target is not self.policy:
            with torch.no_grad():
                target: list[Tensor] = list(self.target.parameters())
                online = list[Tensor](self.policy.parameters())
                torch._foreach_lerp_(target, online, self.config.tau)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.target is not self.policy:
            state["target"] = self.target.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.target is not self.policy:
            self.target.load_state_dict(state["target"])


ENTRIES = {
    "soft-q": AgentEntry(
        SoftQAgent,
        SoftQConfig,
        "soft Q-learning on sequences: logits regress on soft lambda- or n-step returns",
        "Haarnoja et al. 2017, arXiv 1702.08165",
        fixed_point=fixed_point,
    ),
}
