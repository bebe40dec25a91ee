r"""V beside a policy, for networks whose raw logits are q = log pi + V.

V sums up all that a response earns, of a prefix too that is long drawn, and must climb to log Z,
tens of nats. Learned in the weights that shape a policy it pulls them about, and a policy needs
none of it. But V needs little of its own: by the soft Bellman equation, summed from the root along
a path (arXiv 2512.15605, Eq. 9),

    V(s_t) = log Z + sum_{k < t} (log pi(a_k|s_k) - log p_ref(a_k|s_k)),

whose sum has log pi, which the network knows, and log p_ref, which it can learn token by token. So
V is a level for each prompt, which is log Z at q*, a number for each place, and the flow of log pi
and of what a small network, which reads the features, has for -log p_ref. None of it has a gradient
by the weights of the policy.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from rl_ebm.networks.prefix_tree import PrefixTree
from rl_ebm.tokens import TokenSpace


class ValueHead(nn.Module):
    """Makes q of the logits and features of a network; its own weights are those of V alone.

    Args:
        space: the responses.
        features: how many a state has.
        num_prompts: how many prompts are told apart.
    """

    def __init__(self, space: TokenSpace, features: int, num_prompts: int = 1) -> None:
        super().__init__()
        self.space = space
        self.register_buffer("level", torch.zeros(num_prompts))
        self.place = nn.Parameter(torch.zeros(space.max_length))
        self.hidden = nn.Linear(features, features)
        self.out = nn.Linear(features, space.vocab_size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    level: Tensor

    def log_pi(
        self, logits: Float[Tensor, "... A"], place: Int64[Tensor, "..."]
    ) -> Float[Tensor, "... A"]:
        """log pi of the tokens that the space allows after so many."""
        total = logits.logsumexp(-1)
        if self.space.eos_id is not None:  # the last token can only end a response
            last = place == self.space.max_length - 1
            total = torch.where(last, logits[..., self.space.eos_id], total)
        return logits - total[..., None]

    def gains(
        self, log_pi: Float[Tensor, "P N A"], features: Float[Tensor, "P N D"]
    ) -> Float[Tensor, "P N A"]:
        """By how much V is higher after a token than before it: log pi - log p_ref, as learned."""
        features = F.layer_norm(features.detach(), features.shape[-1:])
        learned: Tensor = self.out(F.relu(self.hidden(features)))
        return log_pi.detach() + learned

    def values(
        self,
        flow: Float[Tensor, "P N"],
        place: Int64[Tensor, "N"],
        rows: Int64[Tensor, "P"],
    ) -> Float[Tensor, "P N 1"]:
        """V of states behind which so much was gained."""
        v: Tensor = self.level[rows][:, None] + flow + self.place[place]
        return v[..., None]

    def of_sequences(
        self,
        logits: Float[Tensor, "B w A"],
        features: Float[Tensor, "B w D"],
        tokens: Int64[Tensor, "B w"],
        rows: Int64[Tensor, "B"],
    ) -> Float[Tensor, "B w A"]:
        """q before every token, of rows that answer these prompts."""
        place = torch.arange(logits.shape[1], device=logits.device)
        log_pi = self.log_pi(logits, place)
        drawn = self.gains(log_pi, features).gather(-1, tokens[..., None])[..., 0]
        return log_pi + self.values(flow_of(drawn), place, rows)

    def of_tree(
        self,
        logits: Float[Tensor, "P N A"],
        features: Float[Tensor, "P N D"],
        tree: PrefixTree,
        rows: Int64[Tensor, "P"],
    ) -> Float[Tensor, "P N A"]:
        """q at every node."""
        log_pi = self.log_pi(logits, tree.depth)
        drawn = self.gains(log_pi, features)[:, tree.parents, tree.tokens]
        flow = torch.zeros_like(drawn)
        for level in range(1, tree.ancestors.shape[1]):
            there = tree.depth >= level
            flow = flow + drawn[:, tree.ancestors[:, level]].masked_fill(~there, 0.0)
        return log_pi + self.values(flow, tree.depth, rows)


def flow_of(gains: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Their sum over what stands before each token."""
    return F.pad(gains[:, :-1], (1, 0)).cumsum(1)
