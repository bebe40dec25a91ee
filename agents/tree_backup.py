r"""Exact backups over all responses that were seen; a response's own return for what was not.

The tree of the seen (:class:`rl_ebm.agents.shared.seen_tree.SeenTree`) has, below each child of a
state, the summed weight W of the seen responses and the policy's mass U of the others. With
V(s_t) = log Z + sum_{k < t} (log pi - r), the carried value, what the others weigh can be taken
for what the policy says, exp V U, or be judged by the return D of a response that went there:

    known:  e(s, a)   = V(s+a) - log(W(s+a) + U(s+a) exp V(s+a))        of every action a,
    own:    e_y(s, a) = V(s+a) - log(W(s+a) + U(s+a) exp(V(s+a) - D)),  D = log Z + log pi(y) - r,

the error of the policy's value below s+a either way. The gradient of a response y of the law mu is

    sum_t [ sum_a mu(a|s_t) e(s_t, a) grad log pi(a|s_t)
            + (e_y - e)(s_t, a_t) grad log pi(a_t|s_t) ]

with the tree as it was before y: the known part is summed over all actions, and the drawn one adds
what it does not know (a control variate: in expectation the two terms of e cancel). mu is pi or who
explores: what the policy hardly does has no weight in its own sum, and is put right by the other.
Of a response whose law is not known, it is e_y(s_t, a_t) grad log pi(a_t|s_t) alone.

Where nothing was seen W = 0 and U = 1, so e = 0 and e_y = D: this is VarGrad. Where everything was
seen U = 0, and e is the exact log-ratio of prefixes: with mu = pi the gradient is that of the KL of
each state's tokens, without noise. At the EBM, with U of the policy as it is, e = e_y = 0 whatever
was seen, and whoever drew; U of earlier visits passes.

Kin: TreeSample (Buesing et al. 2020, arXiv 1910.06862) backs values up exactly through a tree, to
sample from it, with a learned value at its frontier; tree backups (Precup et al. 2000) sum over the
actions that were not taken; Liang et al. 2018 (arXiv 1807.02322) enumerate a memory and sample
outside of it. Exactness rests on a deterministic environment and a deterministic reward. How many
nodes a step adds depends on what it drew, so that on a device each step waits for that number.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_ebm.agents.registry import AgentEntry
from rl_ebm.agents.shared.grouped import GroupedAgent
from rl_ebm.agents.shared.learner import prompt_means, token_values
from rl_ebm.agents.shared.off_policy import OffPolicyOptions, fixed_point
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.agents.shared.seen_tree import Backup, SeenTree
from rl_ebm.networks.values import flow_of
from rl_ebm.policies.base import Policy
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import gather_tokens, log_policy
from rl_ebm.tokens import Batch


@checked_options
class TreeBackupConfig(OffPolicyOptions):
    """Options of the agent ``tree-backup``."""

    batch_size: int | None = 128
    """new responses in a step: what was seen has no noise that more of them would average out; None
    for as many as the noise asks for"""
    explore: float | int = 0.25
    """share of them drawn from the reference (uniform without one), the rest from the policy"""
    memory: int = 2**20
    """prefixes that the tree keeps, at most; the responses that cost least are forgotten"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replay_size or self.anneal:
            raise ValueError(
                "tree-backup keeps every response with the weight that it has: leave replay_size, "
                "replay_batch and anneal at 0"
            )
        if not 1 <= self.memory <= 2**28:
            raise ValueError(f"memory must be in [1, 2**28] prefixes, got {self.memory}")


def known_error(
    log_seen: Float[Tensor, "*n"], log_unseen: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """V - log(W + U exp V): how much too high a value is, by what was seen below it, nats.

    Args:
        log_seen: log W - V.
        log_unseen: log U, or log U - D with a return's own D in the place of the value.
    """
    return -torch.logaddexp(log_seen, log_unseen)


def tree_backup_loss(
    log_pi: Float[Tensor, "B T A"],
    batch: Batch,
    mu: Float[Tensor, "B T A"],
    known: Float[Tensor, "B T A"],
    one: Float[Tensor, "B T"],
) -> Float[Tensor, ""]:
    """Half the squared errors, of all actions by mu and of the drawn ones beside them.

    Its gradient is that of the module's docstring; sum over tokens, mean over rows.

    Args:
        log_pi: with gradient.
        batch: the responses.
        mu: probabilities of every action by who drew; 0 where that is not known.
        known: e of every action, without gradient.
        one: e_y - e of the drawn ones, without gradient.
    """
    off = torch.isneginf(log_pi)
    every = known + (log_pi - log_pi.detach()).masked_fill(off, 0.0)
    drawn = token_values(log_pi, batch)
    errors = (mu * every.square()).sum(-1) + (one + (drawn - drawn.detach())).square()
    return 0.5 * errors.masked_fill(~batch.mask, 0.0).sum(1).mean()


def tree_errors(
    log_z: Float[Tensor, "B"],
    batch: Batch,
    r: Float[Tensor, "B T"],
    log_pi: Float[Tensor, "B T A"],
    tree: Backup,
) -> tuple[Float[Tensor, "B T A"], Float[Tensor, "B T"]]:
    """e of every action, and e_y of the drawn ones; 0 past the end.

    Args:
        log_z: of each row's prompt, from which values are carried.
        batch: the responses.
        r: immediate log-weights of their tokens.
        log_pi: of the policy at their states, without gradient.
        tree: what was known before these responses.
    """
    ahead = r - token_values(log_pi, batch)  # 0 past the end
    value = (log_z[:, None] + flow_of(-ahead))[..., None] + log_pi
    seen, unseen = tree.log_w - value, tree.u.log()
    # An action that the policy does not have weighs nothing, here and in the loss.
    off = torch.isneginf(log_pi) | ~batch.mask[..., None]
    known = known_error(seen, unseen).masked_fill(off, 0.0)
    drawn, others = (gather_tokens(x, batch.tokens) for x in (seen, unseen))
    judged = known_error(drawn, others - (log_z - ahead.sum(1))[:, None])
    return known, judged.masked_fill(~batch.mask, 0.0)


class TreeBackupAgent(GroupedAgent):
    """Exact backups over the seen; its policy's logits become log pi*, up to a constant."""

    Config = TreeBackupConfig
    kept = ("log_z",)
    weights_in = torch.float64

    @property
    def group_size(self) -> int | None:
        """All responses to a prompt in a step share a log Z."""
        return None

    def begin(self, teacher: Policy | None) -> None:
        """An empty tree.

        Raises:
            ValueError: a memory without room for the responses of a step.
        """
        super().begin(teacher)
        space, prompts = self.ebm.space, self.ebm.num_prompts
        least = 2 * (prompts + self.responses * space.max_length)
        if self.config.memory < least:
            raise ValueError(
                f"memory must hold the prefixes of two steps, {least}, got {self.config.memory}: "
                "give more, or a smaller batch_size"
            )
        room = (self.config.memory // 2 - prompts) // space.max_length
        self.batch_size.most = min(self.batch_size.most, room)
        self.tree = SeenTree(prompts, space.vocab_size, self.config.memory, self.ebm.device)
        self.log_z = torch.zeros(prompts, dtype=torch.float64, device=self.ebm.device)

    def score(self, batch: Batch) -> tuple[Batch, int]:
        """The batch with its rewards, and how many of them had to be asked for."""
        batch = batch.clean()
        rewards = self.tree.rewards(batch)
        rows = rewards.isnan().nonzero()[:, 0]
        named = torch.cat([batch.prompt_ids[:, None], batch.lengths[:, None], batch.tokens], 1)
        _, same = named[rows].unique(dim=0, return_inverse=True)
        count = int(same.max()) + 1 if len(same) else 0
        first = same.new_full((count,), len(rows)).scatter_reduce(
            0, same, torch.arange(len(rows), device=rows.device), "amin"
        )
        if count:
            asked = self.ebm.score(batch.take(rows[first])).rewards()
            rewards[rows] = asked.double()[same]
        return batch.with_reward(rewards), count

    def loss(self, batch: Batch, r: Float[Tensor, "B T"]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of responses, and what the tree knows; the responses are kept in it."""
        q = q_values(self.policy, self.ebm.space, batch.tokens, batch.prompt_ids)
        log_pi = log_policy(q)
        with torch.no_grad():
            rows = log_pi.double()
            self.tree.forget(batch.tokens.numel(), self.log_z)
            path = self.tree.path(batch)
            before = self.tree.backup(path, rows)
            drawn = token_values(rows, batch)
            found = (r - drawn).sum(1)
            mean, _ = prompt_means(found, batch.prompt_ids, self.ebm.num_prompts)
            log_z = torch.logaddexp(before.root_log_w, before.root_u.log() + mean)
            self.log_z[batch.prompt_ids] = log_z  # all rows of a prompt say the same
            known, judged = tree_errors(log_z, batch, r, rows, before)
            mu, told = self._laws(batch, rows)
            one = judged - token_values(known, batch).masked_fill(~told[:, None], 0.0)
            self.tree.add(batch, path, r, drawn)
        metrics = {
            "losses/log_z": self.log_z[batch.prompt_ids].mean(),
            "charts/seen_responses": torch.tensor(float(self.tree.responses)),
            "charts/unseen_mass": before.root_u.mean(),
        }
        mu, known, one = (x.to(q.dtype) for x in (mu, known, one))
        return tree_backup_loss(log_pi, batch, mu, known, one), metrics

    def _laws(
        self, batch: Batch, log_pi: Float[Tensor, "B T A"]
    ) -> tuple[Float[Tensor, "B T A"], Bool[Tensor, "B"]]:
        """Of each row the probabilities of who drew it, 0 where that is not known; where it is."""
        mu = torch.zeros_like(log_pi)
        told = torch.zeros_like(batch.lengths, dtype=torch.bool)
        if len(batch) != self.responses:
            return mu, told
        first = slice(0, self.explored)
        if self.explored:
            tokens, ids = batch.tokens[first], batch.prompt_ids[first]
            q = q_values(self.explorer, self.ebm.space, tokens, ids)
            mu[first], told[first] = log_policy(q).to(mu).exp(), True
        if self.own_rows is not None:
            mu[self.own_rows], told[self.own_rows] = log_pi[self.own_rows].exp(), True
        return mu, told

    def learned_log_z(self) -> Float[Tensor, "P"]:
        """log Z of each prompt by the tree and the last returns; 0 before the first."""
        return self.log_z

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"tree": self.tree.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.tree.load_state_dict(state["tree"])


ENTRIES = {
    "tree-backup": AgentEntry(
        TreeBackupAgent,
        TreeBackupConfig,
        "exact backups over all responses that were seen, own returns for the rest",
        "Buesing et al. 2020, arXiv 1910.06862",
        fixed_point=fixed_point,
    ),
}
