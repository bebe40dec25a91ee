"""Running figures of a verification: what each block of prefixes adds to the report."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm import bounds, divergences
from rl_ebm.exact import Solution
from rl_ebm.policies.walk import Block
from rl_ebm.report import Bounds, Depth, Prefix, Report
from rl_ebm.soft_bellman import expectation, log_policy, soft_value

WORST = 10
"""how many of the worst prefixes a report names"""


@dataclass
class _Edges:
    """What a block hands to its children: one entry for each edge to a state, in order."""

    first: int
    """index of the first child among the prefixes of its depth"""
    log_star: Tensor
    """log p* of each child"""
    log_pi: Tensor
    rest: Tensor
    """q - r of the edge on raw logits: what V_q(child) should be; inf - inf counts as inf"""
    allowed: Tensor
    weight: Tensor
    """of the edge in the mean residual"""


@dataclass
class _Depth:
    states: int = 0
    linf: float = 0.0
    kl: float = 0.0


class Accumulator:
    """Figures of one prompt; blocks come depth first, as :func:`rl_ebm.policies.walk` has them.

    Args:
        solution: the exact solution.
        prompt: which prompt.
        values: whether the policy's raw logits are to be q (adds the Bellman residual).
    """

    def __init__(self, solution: Solution, prompt: int, values: bool) -> None:
        self.solution, self.prompt, self.values = solution, prompt, values
        self.space = solution.space
        self.edges: dict[int, _Edges] = {}
        self.depths = [_Depth() for _ in range(self.space.max_length)]
        self.sums: dict[str, float] = {}
        self.max_span = self.max_residual = 0.0
        self.ratio_low, self.ratio_high = float("inf"), -float("inf")
        self.forbidden_reached = False
        self.worst: list[tuple[float, int, Prefix]] = []

    def add(self, block: Block) -> None:
        """Add the states of one block.

        Raises:
            ValueError: logits that are NaN or +inf, or all -inf where the policy gets.
        """
        rows = slice(block.start, block.stop)
        q_star = self.solution.reduced_q_rows(block.depth, rows, self.prompt)
        q = block.logits.to(q_star.device)
        if bool((torch.isnan(q) | torch.isposinf(q)).any()):
            raise ValueError(
                f"the policy's logits are NaN or +inf at depth {block.depth}: it cannot be verified"
            )
        log_s_star, log_s = self._arrivals(block, q)
        if bool((torch.isneginf(q).all(-1) & ~torch.isneginf(log_s)).any()):
            raise ValueError(
                f"the policy forbids every action at a prefix of depth {block.depth} that it "
                "reaches: its probabilities do not sum to one"
            )
        log_pi_star, log_pi = log_policy(q_star), log_policy(q)
        # Beyond an impossible prefix the target has no conditional: nothing counts there.
        allowed = torch.isfinite(q_star) & ~torch.isneginf(log_s_star)[:, None]

        kl_star = divergences.kl(log_pi_star, log_pi)
        self.depths[block.depth].kl += float(expectation(log_s_star, kl_star).sum())
        self._plus("kl_policy", expectation(log_s, divergences.kl(log_pi, log_pi_star)))
        self._add_errors(block, q, q_star, allowed, log_s_star, log_s, kl_star)

        log_star, log_path = log_s_star[:, None] + log_pi_star, log_s[:, None] + log_pi
        self._add_responses(block, log_star, log_path)
        weight = log_s_star.exp()[:, None] / allowed.sum(-1, keepdim=True).clamp(min=1)
        weight = weight.expand_as(q)
        rest = _minus(q, self.solution.r_rows(block.depth, rows, self.prompt))
        self._add_residuals(block, q, rest, allowed, weight)
        if block.depth < self.space.max_length - 1:
            children = [
                self.space.gather_children(x) for x in (log_star, log_path, rest, allowed, weight)
            ]
            first = block.start * self.space.branching
            self.edges[block.depth] = _Edges(first, *children)

    def report(self) -> Report:
        """The figures of all blocks that were added: a whole tree of them."""
        s = self.sums
        impossible = self.forbidden_reached
        span = torch.tensor(torch.inf if impossible else self.max_span, dtype=torch.float64)
        return Report(
            mode=self.solution.mode,
            num_sequences=self.space.num_sequences,
            log_z=float(self.solution.log_z[self.prompt]),
            kl_target_policy=sum(d.kl for d in self.depths),
            kl_policy_target=s["kl_policy"],
            # Sums over all responses pass their bounds by rounding.
            tv=min(s["tv"], 1.0),
            js=min(max(0.0, s["js"]), math.log(2)),
            entropy_target=s["entropy_target"],
            entropy_policy=s["entropy_policy"],
            expected_reward_target=s["reward_target"],
            expected_reward_policy=s["reward_policy"],
            mass_impossible=min(s["impossible"], 1.0),
            logits_linf=max(d.linf for d in self.depths),
            logits_span=self.max_span,
            log_ratio_span=self.ratio_high - self.ratio_low,
            bellman_residual_max=self.max_residual if self.values else None,
            bellman_residual_mean=s["residual"] / s["weight"] if self.values else None,
            bounds=Bounds(
                prop3=float(bounds.prop3_bound(span, self.space.max_length)),
                span=float(bounds.span_bound(span, self.space)),
                occupancy=torch.inf if impossible else s["occupancy"],
            ),
            per_depth=[
                Depth(depth=t, states=d.states, linf=d.linf, mean_kl=d.kl)
                for t, d in enumerate(self.depths)
            ],
            worst_prefixes=[prefix for _, _, prefix in sorted(self.worst, reverse=True)],
        )

    # Parts of a block ---------------------------------------------------------------------------

    def _arrivals(
        self, block: Block, like: Tensor
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """log-probability of each state under target and policy: what its parent handed on."""
        if block.depth == 0:
            return like.new_zeros(1), like.new_zeros(1)
        places = self._places(block)
        edges = self.edges[block.depth - 1]
        return edges.log_star[places], edges.log_pi[places]

    def _places(self, block: Block) -> slice:
        first = self.edges[block.depth - 1].first
        return slice(block.start - first, block.stop - first)

    def _add_errors(
        self,
        block: Block,
        q: Tensor,
        q_star: Tensor,
        allowed: Tensor,
        log_s_star: Tensor,
        log_s: Tensor,
        kl_star: Tensor,
    ) -> None:
        """Logit errors, spans and the occupancy bound."""
        q_star = q_star.masked_fill(~allowed, -torch.inf)
        spans = bounds.logit_span(q, q_star)
        self._plus("occupancy", expectation(log_s, bounds.span_kl(spans)))
        self.max_span = max(self.max_span, float(spans.max()))
        delta = bounds.centre(q - q_star.masked_fill(~allowed, 0.0), q_star)
        linf = delta.abs().amax(-1)
        depth = self.depths[block.depth]
        depth.states += int(allowed.any(-1).sum())
        depth.linf = max(depth.linf, float(linf.max()))
        # Ties go to the state that comes first, however the tree was cut into blocks.
        places = linf.sort(descending=True, stable=True).indices[:WORST]
        for error, place in zip(linf[places].tolist(), places.tolist(), strict=True):
            index = block.start + place
            order = -self.space.state_offset(block.depth) - index
            if error == 0 or (len(self.worst) == WORST and (error, order) <= self.worst[0][:2]):
                continue
            prefix = Prefix(
                prefix=self.space.prefixes(block.depth, index, index + 1)[0].tolist(),
                prompt_id=self.prompt,
                probability_target=float(log_s_star[place].exp()),
                probability_policy=float(log_s[place].exp()),
                delta=delta[place].tolist(),
                kl=float(kl_star[place]),
            )
            entry = (error, order, prefix)
            (heapq.heappush if len(self.worst) < WORST else heapq.heappushpop)(self.worst, entry)

    def _add_responses(self, block: Block, log_star: Tensor, log_pi: Tensor) -> None:
        """Responses that end in this block, with their exact log-probabilities under both."""
        eos, last = self.space.eos_id, self.space.max_length - 1
        if eos is None and block.depth < last:
            return
        columns = slice(None) if eos is None else slice(eos, eos + 1)
        rows = slice(block.start, block.stop)
        reward = self.solution.reward_rows(block.depth, rows, self.prompt)[:, columns]
        log_star, log_pi = log_star[:, columns], log_pi[:, columns]
        self._plus("tv", divergences.tv(log_star, log_pi))
        self._plus("js", divergences.js(log_star, log_pi))
        self._plus("entropy_target", divergences.entropy(log_star))
        self._plus("entropy_policy", divergences.entropy(log_pi))
        self._plus("reward_target", expectation(log_star, reward))
        self._plus("reward_policy", expectation(log_pi, reward))
        impossible = torch.isneginf(log_star)
        self._plus("impossible", log_pi[impossible].exp())
        # Not by the mass: that may be too small for a float.
        reached = bool((~torch.isneginf(log_pi[impossible])).any())
        self.forbidden_reached |= reached
        ratio = (log_pi - log_star)[~impossible]
        if len(ratio):
            self.ratio_low = min(self.ratio_low, float(ratio.min()))
            self.ratio_high = max(self.ratio_high, float(ratio.max()))
        if reached:
            self.ratio_high = torch.inf

    def _add_residuals(
        self, block: Block, q: Tensor, rest: Tensor, allowed: Tensor, weight: Tensor
    ) -> None:
        """|q - r - V_q(s a)|: of the edges that lead here, and of those that end here."""
        if not self.values:
            return
        if block.depth > 0:
            edges, places = self.edges[block.depth - 1], self._places(block)
            residual = _minus(edges.rest[places], soft_value(q))
            self._plus_residual(residual, edges.allowed[places], edges.weight[places])
        eos = self.space.eos_id
        if block.depth == self.space.max_length - 1:
            self._plus_residual(rest, allowed, weight)
        elif eos is not None:
            self._plus_residual(rest[:, eos], allowed[:, eos], weight[:, eos])

    def _plus_residual(self, residual: Tensor, allowed: Tensor, weight: Tensor) -> None:
        size, weight = residual[allowed].abs(), weight[allowed]
        if len(size):
            self.max_residual = max(self.max_residual, float(size.max()))
        infinite = torch.isinf(size)
        self._plus("residual", torch.where(infinite, size, weight * size.masked_fill(infinite, 0)))
        self._plus("weight", weight)

    def _plus(self, name: str, terms: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(terms.sum())


def _minus(x: Tensor, y: Tensor) -> Tensor:
    """x - y, where an infinite part makes the difference inf (never nan)."""
    infinite = torch.isinf(x) | torch.isinf(y)
    return (x.masked_fill(infinite, 0.0) - y.masked_fill(infinite, 0.0)).masked_fill(
        infinite, torch.inf
    )
