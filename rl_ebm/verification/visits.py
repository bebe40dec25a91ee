"""Policy and exact solution along sampled responses: exact divergences at every visited state.

A response of T tokens visits T states, and at each the two laws of the next token are known whole.
So its divergence is a sum of T exact ones, sum_t KL(pi*(.|s_t), pi(.|s_t)): by the chain rule that
has the same mean as the single log p*(y) - log pi(y), and as a rule a smaller variance, as what the
next token does to the ratio is summed over and not drawn. What a reader would get wrong: only the
law that drew the responses may weigh what is found, so one pass over responses of the target gives
KL(target, policy) and another, over the policy's own, KL(policy, target); and a state that is
visited twice counts twice in the means, once in the list of worst prefixes.
"""

from __future__ import annotations

import heapq

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm import bounds, divergences
from rl_ebm.exact import Solution
from rl_ebm.policies.base import Policy
from rl_ebm.policies.decoding import along
from rl_ebm.policies.detours import rows_at_once
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import Batch, TokenSpace
from rl_ebm.verification.parts import SampledPrefix
from rl_ebm.verification.state_errors import state_errors

WORST = 10
_SHOWN = 64
"""actions that a worst prefix lists at most"""
_MULTIPLIER = 6364136223846793005


def log_ratio(x: Float[Tensor, "n"], total: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """x - total; ``-inf`` where x is, in a row without a law too."""
    return (x - total).masked_fill(torch.isneginf(x), -torch.inf)


class Visits:
    """Figures along responses of one law: the target's own, or the policy's.

    Attributes, one entry a response:
        log_star, log_pi: exact log-probability under target and policy.
        kl: sum over the visited states of the KL there, of the law that was sampled to the other.
        entropy: sum of that law's entropies.
        occupancy: sum of K(L_s), what the span bound allows there.
        error: sum of the largest |delta| of each visited state that the target reaches.
        reached: how many these are.
        closed_star, closed: whether at a visited state that the target reaches it, or the policy,
            was seen to forbid a token.
        residual: sum of |q - r - V_q| of the transitions.
    Attributes of the root: ``v_root``, the policy's V there on its raw logits.
    Attributes by position, (n, T): ``kl_at``.
    """

    def __init__(self, solution: Solution, batch: Batch, of_target: bool, values: bool) -> None:
        n, t_max = batch.tokens.shape
        self.solution, self.batch, self.of_target, self.values = solution, batch, of_target, values
        self.space: TokenSpace = solution.space
        zeros = torch.zeros(n, dtype=torch.float64)
        self.log_star, self.log_pi, self.entropy = zeros, zeros.clone(), zeros.clone()
        self.occupancy, self.residual = zeros.clone(), zeros.clone()
        self.error, self.reached = zeros.clone(), zeros.clone()
        self.kl_at = torch.zeros(n, t_max, dtype=torch.float64)
        self.linf = [0.0] * t_max
        self.max_span = self.max_residual = self.v_root = 0.0
        self.closed_star = self.closed = False
        self.worst: list[tuple[float, int, SampledPrefix]] = []

    @property
    def kl(self) -> Float[Tensor, "n"]:
        total: Tensor = self.kl_at.sum(1)
        return total

    def walk(self, policy: Policy, memory: int, at_once: int | None = None) -> None:
        """Add all states of all responses, so many rows at a time that memory is kept.

        Args:
            at_once: rows at a time at most; None for no further limit.

        Raises:
            ValueError: logits that are NaN or +inf.
        """
        size = min(rows_at_once(policy, self.space, memory), at_once or len(self.batch))
        room = torch.empty(
            5, size, self.space.vocab_size, dtype=torch.float64, device=self.solution.device
        )
        for rows in torch.arange(len(self.batch)).split(size):
            self._walk(policy, rows, room)

    def _walk(self, policy: Policy, rows: Int64[Tensor, "B"], room: Float[Tensor, "5 n A"]) -> None:
        part = self.batch.take(rows.to(self.batch.tokens.device))
        paid = Payments(self.solution, part) if self.values else None
        # One number for each prefix, but for collisions of 64 bits.
        prefix = torch.zeros_like(part.lengths)
        exact, given = (along(x, self.space, part) for x in (self.solution, policy))
        for t, (q_star, q) in enumerate(zip(exact, given, strict=True)):
            keep = (part.lengths > t).nonzero()[:, 0]
            if len(keep) == 0:
                break
            q_star, q = (
                out[: len(keep)].copy_(x if len(keep) == len(x) else x[keep.to(x.device)])
                for x, out in ((q_star, room[0]), (q, room[1]))
            )
            v, chosen = self._state(
                rows[keep.cpu()], q_star, q, part.tokens[keep], t, prefix[keep], room[2:]
            )
            if paid is not None:
                residuals = paid.residuals(t, keep, v, chosen).cpu()
                self.residual[rows[keep.cpu()]] += residuals.sum(0)
                self.max_residual = max(self.max_residual, float(residuals.max()))
            prefix = prefix * _MULTIPLIER + part.tokens[:, t] + 1

    def _state(
        self,
        rows: Tensor,
        q_star: Tensor,
        q: Tensor,
        tokens: Tensor,
        t: int,
        prefix: Tensor,
        scratch: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Enter some states; the policy's V there and its logits of the tokens that follow."""
        if self.space.eos_id is not None and t == self.space.max_length - 1:
            for x in (q_star, q):
                x.masked_fill_(~self.space.action_mask(q.device)[t], -torch.inf)
        known = ~torch.isneginf(self.log_star[rows]).to(q.device)
        if not bool(known.all()):
            # Beyond an impossible prefix the target has no conditional.
            q_star[~known] = -torch.inf
        self._look_for_closed(q_star, q, t, known)
        found = state_errors(q_star, q, self.of_target, scratch[:, : len(q)])
        if bool((torch.isnan(found.top) | torch.isposinf(found.top)).any()):
            raise ValueError(
                f"the policy's logits are NaN or +inf at depth {t}: it cannot be verified"
            )
        dead = torch.isneginf(found.top).cpu() & ~torch.isneginf(self.log_pi[rows])
        if bool(dead.any()):
            raise ValueError(
                f"the policy forbids every action at a prefix of depth {t} that it reaches: its "
                "probabilities do not sum to one"
            )
        self.kl_at[rows, t] = found.kl.cpu()
        self.entropy[rows] += found.entropy.cpu()
        self.occupancy[rows] += bounds.span_kl(found.span).cpu()
        self.error[rows] += found.linf.cpu()
        self.reached[rows] += known.cpu()
        self.max_span = max(self.max_span, float(found.span.max()))
        self.linf[t] = max(self.linf[t], float(found.linf.max()))
        self._worst(rows, tokens, t, q_star, q, found.linf, prefix)
        action = tokens[:, t : t + 1]
        chosen = q.gather(1, action)[:, 0]
        self.log_star[rows] += log_ratio(q_star.gather(1, action)[:, 0], found.v_star).cpu()
        self.log_pi[rows] += log_ratio(chosen, found.v).cpu()
        v = found.v + found.top
        if t == 0:
            self.v_root = float(v[0])
        return v, chosen + found.top

    def _look_for_closed(self, q_star: Tensor, q: Tensor, t: int, known: Tensor) -> None:
        # Where the space itself forbids nothing is seen of either.
        if self.space.eos_id is not None and t == self.space.max_length - 1:
            return
        for name, x in (("closed_star", q_star), ("closed", q)):
            if not getattr(self, name):
                setattr(self, name, bool((torch.isneginf(x.amin(-1)) & known).any()))

    def _worst(
        self,
        rows: Tensor,
        tokens: Tensor,
        t: int,
        q_star: Tensor,
        q: Tensor,
        linf: Tensor,
        hashes: Tensor,
    ) -> None:
        order = linf.sort(descending=True, stable=True).indices
        # The first row of each prefix, the largest errors first.
        first = dict(zip(reversed(hashes[order].tolist()), reversed(order.tolist()), strict=True))
        for place in list(reversed(first.values()))[:WORST]:
            error, row = float(linf[place]), int(rows[place])
            if error == 0 or (len(self.worst) == WORST and error <= self.worst[0][0]):
                return
            prefix = tokens[place, :t].tolist()
            if any(known.prefix == prefix for _, _, known in self.worst):
                continue
            delta = bounds.centre(
                q[place] - q_star[place].masked_fill(torch.isneginf(q_star[place]), 0.0),
                q_star[place],
            )
            actions = delta.abs().sort(descending=True, stable=True).indices[:_SHOWN].sort().values
            kl = divergences.kl(log_policy(q_star[place]), log_policy(q[place]))
            found = SampledPrefix(
                prefix=prefix,
                prompt_id=int(self.batch.prompt_ids[row]),
                log_probability_target=float(self.log_star[row]),
                log_probability_policy=float(self.log_pi[row]),
                actions=actions.tolist(),
                delta=delta[actions].tolist(),
                kl=max(float(kl), 0.0),
            )
            entry = (error, -t * len(self.batch) - row, found)
            (heapq.heappush if len(self.worst) < WORST else heapq.heappushpop)(self.worst, entry)


class Payments:
    """What the soft Bellman equation says of the transitions of some responses."""

    def __init__(self, solution: Solution, batch: Batch) -> None:
        ebm = solution.ebm
        self.log_ref = ebm.log_ref(batch.tokens, batch.lengths, batch.prompt_ids).double()
        reward = ebm.reward(batch.tokens, batch.lengths, batch.prompt_ids)
        self.gain, self.lengths = reward.double() / ebm.beta, batch.lengths
        self.left = torch.zeros_like(self.gain)

    def residuals(self, t: int, keep: Tensor, v: Tensor, chosen: Tensor) -> Float[Tensor, "2 m"]:
        """|q - r - V_q| of the transitions into position t, and of those that end there.

        Args:
            keep: the rows that are not over.
            v, chosen: the policy's V at them, and its q of the tokens that follow.
        """
        into = self.left[keep] - v if t else torch.zeros_like(v)
        left = chosen - self.log_ref[keep, t]
        self.left[keep] = left
        over = torch.where(self.lengths[keep] == t + 1, left - self.gain[keep], 0.0)
        return torch.stack([into, over]).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
