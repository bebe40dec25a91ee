"""Chain rewards, whose exact solution needs no enumeration: a stand-in for weighted automata.

    R(y) = h[y_1] + sum_t J_t[y_t, y_{t+1}]

With each term paid where its last token is chosen (r of arXiv 2512.15605, Eq. 5), V(s) depends on
the depth and the last token alone, so that the soft Bellman equation is a pass over T vectors of
A values (App. A.9): O(T A^2), not A^T.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from rl_ebm import TokenSpace
from rl_ebm.policies.scoring import log_prob
from rl_ebm.tokens import Batch, length_mask


class Chain:
    """A chain reward over fixed-length responses; also the policy that is its EBM exactly.

    Args:
        space: the responses, of fixed length.
        first: h, (A,).
        couplings: J, (T - 1, A, A).
    """

    prompts = None
    forbids = False

    def __init__(
        self,
        space: TokenSpace,
        first: Float64[Tensor, "A"],
        couplings: Float64[Tensor, "T1 A A"],
    ) -> None:
        self.space, self.first, self.couplings = space, first, couplings
        v = [torch.zeros(space.vocab_size, dtype=torch.float64)]
        rows = []
        for coupling in couplings.flip(0):
            rows.append(coupling + v[-1])
            v.append(torch.logsumexp(rows[-1], 1))
        # q at depth t > 0 by the last token, (T - 1, A, A); q at the root.
        self.q = torch.stack(rows[::-1]) if rows else couplings
        self.q_root = first + v[-1]

    @staticmethod
    def random(space: TokenSpace, scale: float, seed: int, shared: bool = False) -> Chain:
        """h and J of scale * N(0, 1); one J for all positions where it is shared."""
        g = torch.Generator().manual_seed(seed)
        a, t = space.vocab_size, space.max_length
        first = scale * torch.randn(a, generator=g, dtype=torch.float64)
        couplings = torch.randn(1 if shared else t - 1, a, a, generator=g, dtype=torch.float64)
        return Chain(space, first, scale * couplings.expand(t - 1, a, a))

    @property
    def log_z(self) -> Float64[Tensor, ""]:
        return torch.logsumexp(self.q_root, 0)

    def reward(self, tokens: Int64[Tensor, "B T"], lengths: Int64[Tensor, "B"]) -> Tensor:
        """R of complete responses."""
        steps = torch.arange(len(self.couplings))
        return self.first[tokens[:, 0]] + self.couplings[steps, tokens[:, :-1], tokens[:, 1:]].sum(
            1
        )

    def logits(self, tokens: Int64[Tensor, "B T"], prompt_ids: Tensor | None = None) -> Tensor:
        """q* before every token; that of a reward paid at the end, up to a constant for each state."""
        steps = torch.arange(len(self.couplings))
        root = self.q_root.expand(len(tokens), 1, -1)
        return torch.cat([root, self.q[steps, tokens[:, :-1]]], 1)

    def start(self, prompt_ids: Tensor) -> list[int]:
        """Nothing is read yet; the state counts the tokens."""
        return [len(prompt_ids), 0]

    def step(self, state: list[int], tokens: Tensor | None) -> Tensor:
        """q* at the next position."""
        if tokens is None:
            return self.q_root.expand(state[0], -1)
        state[1] += 1
        return self.q[state[1] - 1, tokens]

    def log_prob(self, batch: Batch) -> Tensor:
        """log p* of responses."""
        return log_prob(self, self.space, batch.tokens, batch.lengths)

    def entropy(self) -> float:
        """H(p*), by the chain rule over the marginals of the last token."""
        log_m = torch.log_softmax(self.q_root, 0)
        total = -(log_m.exp() * log_m).sum()
        for q in self.q:
            log_pi = torch.log_softmax(q, 1)
            total -= (log_m.exp()[:, None] * log_pi.exp() * log_pi).sum()
            log_m = torch.logsumexp(log_m[:, None] + log_pi, 0)
        return float(total)


def kl_terms(
    log_p: Float64[Tensor, "B T A"], log_q: Float64[Tensor, "B T A"], lengths: Tensor
) -> Float64[Tensor, "B"]:
    """sum_t KL(p(.|s_t), q(.|s_t)) along responses of p: its mean over them is KL(p, q).

    The sum over the next token is exact, so that only the states are sampled (Rao-Blackwell).
    """
    terms = (log_p.exp() * (log_p - log_q)).sum(-1)
    return terms.masked_fill(~length_mask(lengths, terms.shape[1]), 0.0).sum(1)
