"""Policy and exact solution along sampled responses: exact divergences at every visited state."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm import bounds, divergences
from rl_ebm.exact import Solution
from rl_ebm.policies.scoring import Policy, check_shape
from rl_ebm.report_sampled import SampledPrefix
from rl_ebm.soft_bellman import gather_tokens, log_policy, soft_value
from rl_ebm.tokens import Batch, TokenSpace

WORST = 10
_SHOWN = 64
"""actions that a worst prefix lists at most"""
_BYTES_PER_LOGIT = 160
_MULTIPLIER = 6364136223846793005


class Visits:
    """Figures along responses of one law: the target's own, or the policy's.

    Attributes, one entry a response:
        log_star, log_pi: exact log-probability under target and policy.
        kl: sum over the visited states of the KL there, of the law that was sampled to the other.
        entropy: sum of that law's entropies.
        occupancy: sum of K(L_s), what the span bound allows there.
    Attributes by position, (n, T): ``kl_at``.
    """

    def __init__(self, solution: Solution, batch: Batch, of_target: bool, values: bool) -> None:
        n, t_max = batch.tokens.shape
        self.solution, self.batch, self.of_target, self.values = solution, batch, of_target, values
        self.space: TokenSpace = solution.space
        zeros = torch.zeros(n, dtype=torch.float64)
        self.log_star, self.log_pi, self.entropy = zeros, zeros.clone(), zeros.clone()
        self.occupancy, self.residual = zeros.clone(), zeros.clone()
        self.kl_at = torch.zeros(n, t_max, dtype=torch.float64)
        self.linf = [0.0] * t_max
        self.max_span = self.max_residual = 0.0
        self.worst: list[tuple[float, int, SampledPrefix]] = []

    @property
    def kl(self) -> Float[Tensor, "n"]:
        total: Tensor = self.kl_at.sum(1)
        return total

    def walk(self, policy: Policy, memory: int) -> None:
        """Add all states of all responses, so many rows at a time that memory is kept.

        Raises:
            ValueError: logits that are NaN or +inf.
        """
        for rows in torch.arange(len(self.batch)).split(rows_at_once(policy, self.space, memory)):
            part = self.batch.take(rows.to(self.batch.tokens.device))
            left: Tensor | None = None
            ref = gain = torch.empty(0)
            if self.values:
                ref = self.solution.ebm.log_ref(part.tokens, part.lengths, part.prompt_ids)
                gain = self.solution.ebm.reward(part.tokens, part.lengths, part.prompt_ids)
                gain = gain.double() / self.solution.ebm.beta
            # One number for each prefix, but for collisions of 64 bits.
            prefix = torch.zeros_like(part.lengths)
            exact = along(self.solution, self.space, part)
            for t, (q_star, q) in enumerate(
                zip(exact, along(policy, self.space, part), strict=True)
            ):
                here = part.lengths > t
                q = q.to(q_star.device)
                if bool((torch.isnan(q) | torch.isposinf(q))[here].any()):
                    raise ValueError(
                        f"the policy's logits are NaN or +inf at depth {t}: it cannot be verified"
                    )
                if self.values:
                    left = self._residuals(rows, q, part, t, ref, gain, left)
                keep = here.nonzero()[:, 0]
                if len(keep) == 0:
                    break
                self._state(
                    rows[keep.cpu()], q_star[keep], q[keep], part.tokens[keep], t, prefix[keep]
                )
                prefix = prefix * _MULTIPLIER + part.tokens[:, t] + 1

    def _state(
        self, rows: Tensor, q_star: Tensor, q: Tensor, tokens: Tensor, t: int, prefix: Tensor
    ) -> None:
        dead = torch.isneginf(q).all(-1).cpu() & ~torch.isneginf(self.log_pi[rows])
        if bool(dead.any()):
            raise ValueError(
                f"the policy forbids every action at a prefix of depth {t} that it reaches: its "
                "probabilities do not sum to one"
            )
        log_pi_star, log_pi = log_policy(q_star), log_policy(q)
        mine, other = (log_pi_star, log_pi) if self.of_target else (log_pi, log_pi_star)
        known = ~torch.isneginf(self.log_star[rows]).to(q.device)
        # Beyond an impossible prefix the target has no conditional, and the KL is infinite already.
        kl = divergences.kl(mine, other).masked_fill(~known, 0.0)
        self.kl_at[rows, t] = kl.clamp(min=0.0).cpu()
        self.entropy[rows] += divergences.entropy(mine).cpu()
        q_star = q_star.masked_fill(~known[:, None], -torch.inf)
        spans = bounds.logit_span(q, q_star)
        self.occupancy[rows] += bounds.span_kl(spans).cpu()
        self.max_span = max(self.max_span, float(spans.max()))
        delta = bounds.centre(q - q_star.masked_fill(torch.isneginf(q_star), 0.0), q_star)
        linf = delta.abs().amax(-1)
        self.linf[t] = max(self.linf[t], float(linf.max()))
        kl_star = kl if self.of_target else divergences.kl(log_pi_star, log_pi)
        self._worst(rows, tokens, t, delta, linf, kl_star, prefix)
        action = tokens[:, t : t + 1]
        self.log_star[rows] += log_pi_star.gather(1, action)[:, 0].cpu()
        self.log_pi[rows] += log_pi.gather(1, action)[:, 0].cpu()

    def _worst(
        self,
        rows: Tensor,
        tokens: Tensor,
        t: int,
        delta: Tensor,
        linf: Tensor,
        kl: Tensor,
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
            size = delta[place].abs()
            actions = size.sort(descending=True, stable=True).indices[:_SHOWN].sort().values
            found = SampledPrefix(
                prefix=prefix,
                prompt_id=int(self.batch.prompt_ids[row]),
                log_probability_target=float(self.log_star[row]),
                log_probability_policy=float(self.log_pi[row]),
                actions=actions.tolist(),
                delta=delta[place][actions].tolist(),
                kl=max(float(kl[place]), 0.0),
            )
            entry = (error, -t * len(self.batch) - row, found)
            (heapq.heappush if len(self.worst) < WORST else heapq.heappushpop)(self.worst, entry)

    def _residuals(
        self,
        rows: Tensor,
        q: Tensor,
        part: Batch,
        t: int,
        log_ref: Tensor,
        gain: Tensor,
        left: Tensor | None,
    ) -> Tensor:
        """|q - r - V_q| of the transitions into position t, and of those that end there."""
        if left is not None:
            self._residual(rows, left - soft_value(q), part.lengths > t)
        left = gather_tokens(q[:, None], part.tokens[:, t : t + 1])[:, 0] - log_ref[:, t]
        self._residual(rows, left - gain, part.lengths == t + 1)
        return left

    def _residual(self, rows: Tensor, residual: Tensor, there: Tensor) -> None:
        size = (
            residual.abs()
            .masked_fill(~there, 0.0)
            .nan_to_num(nan=torch.inf, posinf=torch.inf)
            .cpu()
        )
        self.residual[rows] += size
        self.max_residual = max(self.max_residual, float(size.max()))


def rows_at_once(policy: Policy, space: TokenSpace, memory: int) -> int:
    """How many responses are looked at together, so that memory is about kept."""
    per_row = _BYTES_PER_LOGIT * space.vocab_size
    if not hasattr(policy, "step"):
        per_row += 16 * space.vocab_size * space.max_length
    return max(1, memory // per_row)


def along(policy: Policy, space: TokenSpace, batch: Batch) -> Iterator[Float[Tensor, "B A"]]:
    """Masked logits before every token of some responses, position by position, float64.

    By the policy's cache where it has one, so that no (B, T, A) is made.
    """
    mask = space.action_mask(batch.tokens.device)
    tokens = batch.clean().tokens
    if hasattr(policy, "step"):
        stepper = _steps(policy, tokens, batch.prompt_ids)
    else:
        logits = policy.logits(tokens, batch.prompt_ids)
        check_shape(logits, space)
        stepper = iter(logits.unbind(1))
    for t, rows in enumerate(stepper):
        yield rows.double().masked_fill(~mask[t].to(rows.device), -torch.inf)


def _steps(policy: object, tokens: Int64[Tensor, "B T"], prompt_ids: Tensor) -> Iterator[Tensor]:
    state = policy.start(prompt_ids)  # type: ignore[attr-defined]
    for t in range(tokens.shape[1]):
        yield policy.step(state, tokens[:, t - 1] if t else None)  # type: ignore[attr-defined]
