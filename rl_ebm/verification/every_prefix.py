"""Running figures of a verification: what each block of prefixes adds to the report."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm import bounds, divergences
from rl_ebm.exact import Solution
from rl_ebm.exact.base import Rows
from rl_ebm.policies.walk import Block
from rl_ebm.soft_bellman import expectation, log_policy, soft_value
from rl_ebm.verification.parts import Depth, Prefix

WORST = 10
"""how many of the worst prefixes a report names"""
_Entry = tuple[float, int, int, Prefix]
"""a prefix with its error, and what puts the earlier prompt and state first among equals"""


@dataclass(frozen=True)
class States:
    """The states of a block, (n,) or (n, A): what a figure that is a sum over states may read.

    Attributes:
        log_s_star, log_s: log-probability of each state under target and policy, nats.
        log_pi_star, log_pi: the conditionals there; rows of ``-inf`` where there is none.
        spans: L_s of q - q* over the allowed actions.
    """

    log_s_star: Float[Tensor, "n"]
    log_s: Float[Tensor, "n"]
    log_pi_star: Float[Tensor, "n A"]
    log_pi: Float[Tensor, "n A"]
    spans: Float[Tensor, "n"]
    read_log_ref: Callable[[], Tensor]

    @cached_property
    def log_ref(self) -> Float[Tensor, "n A"]:
        """log p_ref(.|s); 0 for every action of the counting measure."""
        return self.read_log_ref()


@dataclass(frozen=True)
class Responses:
    """Responses that end in a block, (n, C): their exact log-probabilities, and rewards."""

    log_star: Float[Tensor, "n C"]
    log_pi: Float[Tensor, "n C"]
    reward: Float[Tensor, "n C"]


@dataclass(frozen=True)
class Sum:
    """A figure that is a sum over all states, or over all responses, of each prompt.

    Args:
        of_states: the term of each state, (n,).
        of_responses: that of each response, or what a row of them sums to.
        finish: what is done to the totals, (P,), in the end.
    """

    of_states: Callable[[States], Tensor] | None = None
    of_responses: Callable[[Responses], Tensor] | None = None
    finish: Callable[[Tensor, Accumulator], Tensor] = lambda total, _: total


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


class Accumulator:
    """Figures of some prompts; blocks come depth first, as :func:`rl_ebm.policies.walk` has them.

    With several prompts a block is a whole depth, the rows of one prompt after those of another.

    Args:
        solution: the exact solution.
        prompts: which prompts, (P,).
        values: whether the policy's raw logits are to be q (adds the Bellman residual).
        figures: what is summed up, by name; the totals are in ``sums``.
        worst_of_each: whether the worst prefixes are looked for in each prompt, or in all of them.

    Attributes, (P,), of all blocks that were added:
        kl, linf, states: a list by depth: the terms of KL(p*, pi), the largest error, the states
            that the target reaches.
        max_span, max_residual: the largest L_s, and |q - r - V_q|.
        ratio_low, ratio_high: of log pi - log p*.
        forbidden_reached: whether the policy gives a response that the target forbids.
        v_root: the policy's V of the empty prefix, on its raw logits.
        sums: by name.
    """

    def __init__(
        self,
        solution: Solution,
        prompts: Int64[Tensor, "P"],
        values: bool,
        figures: Mapping[str, Sum],
        worst_of_each: bool = True,
    ) -> None:
        self.solution, self.values, self.figures = solution, values, figures
        self.space = solution.space
        self.prompts, self.worst_of_each = prompts.tolist(), worst_of_each
        self.ids = prompts.to(solution.device)
        self.edges: dict[int, _Edges] = {}
        zero = torch.zeros(len(prompts), dtype=torch.float64, device=solution.device)
        self.sums: dict[str, Tensor] = {}
        depths = range(self.space.max_length)
        self.kl, self.linf, self.states = ([zero.clone() for _ in depths] for _ in range(3))
        self.max_span, self.max_residual, self.v_root = zero.clone(), zero.clone(), zero.clone()
        self.ratio_low, self.ratio_high = zero + torch.inf, zero - torch.inf
        self.forbidden_reached = zero > 0
        self.worst_by: dict[int | None, list[_Entry]] = defaultdict(list)

    def add(self, block: Block) -> None:
        """Add the states of one block.

        Raises:
            ValueError: logits that are NaN or +inf, or all -inf where the policy gets.
        """
        rows, prompt = self._rows(block)
        q_star = self.solution.reduced_q_rows(block.depth, rows, prompt)
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
        self.kl[block.depth] += self._each(expectation(log_s_star, kl_star)).sum(1)
        q_star = q_star.masked_fill(~allowed, -torch.inf)
        spans = bounds.logit_span(q, q_star)
        states = States(
            log_s_star,
            log_s,
            log_pi_star,
            log_pi,
            spans,
            lambda: self.solution.log_ref_rows(block.depth, rows, prompt),
        )
        for name, figure in self.figures.items():
            if figure.of_states is not None:
                self._plus(name, figure.of_states(states))
        if block.depth == 0:
            self.v_root = soft_value(q)
        self.max_span = torch.maximum(self.max_span, self._each(spans).amax(1))
        self._add_errors(block, q, q_star, log_s_star, log_s, kl_star)

        log_star, log_path = log_s_star[:, None] + log_pi_star, log_s[:, None] + log_pi
        self._add_responses(block, log_star, log_path)
        weight = log_s_star.exp()[:, None] / allowed.sum(-1, keepdim=True).clamp(min=1)
        weight = weight.expand_as(q)
        rest = _minus(q, self.solution.r_rows(block.depth, rows, prompt))
        self._add_residuals(block, q, rest, allowed, weight)
        if block.depth < self.space.max_length - 1:
            children = [
                self.space.gather_children(x) for x in (log_star, log_path, rest, allowed, weight)
            ]
            first = block.start * self.space.branching
            self.edges[block.depth] = _Edges(first, *children)

    def depths(self) -> list[list[Depth]]:
        """The states of each depth, for every prompt."""
        columns = (torch.stack(x, 1).tolist() for x in (self.states, self.linf, self.kl))
        return [
            [Depth(t, int(n), x, k) for t, (n, x, k) in enumerate(zip(*parts, strict=True))]
            for parts in zip(*columns, strict=True)
        ]

    def worst_prefixes(self) -> list[list[Prefix]]:
        """Those of every prompt, the largest error first."""
        worst: dict[int, list[Prefix]] = {prompt: [] for prompt in self.prompts}
        for *_, prefix in sorted(chain.from_iterable(self.worst_by.values()), reverse=True):
            worst[prefix.prompt_id].append(prefix)
        return list(worst.values())

    # Parts of a block ---------------------------------------------------------------------------

    def _rows(self, block: Block) -> tuple[Rows, int | Tensor]:
        """Where the rows of a block stand: prefixes of one depth, and the prompt of each."""
        if len(self.prompts) == 1:
            return slice(block.start, block.stop), self.prompts[0]
        rows = torch.arange(block.start, block.stop, device=self.ids.device)
        return rows.repeat(len(self.ids)), self.ids.repeat_interleave(len(rows))

    def _each(self, x: Tensor) -> Tensor:
        """What belongs to each prompt, (P, ...)."""
        return x.reshape(len(self.prompts), -1)

    def _arrivals(
        self, block: Block, like: Tensor
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """log-probability of each state under target and policy: what its parent handed on."""
        if block.depth == 0:
            return like.new_zeros(len(like)), like.new_zeros(len(like))
        places = self._places(block)
        edges = self.edges[block.depth - 1]
        return edges.log_star[places], edges.log_pi[places]

    def _places(self, block: Block) -> slice:
        if len(self.prompts) > 1:
            return slice(None)
        first = self.edges[block.depth - 1].first
        return slice(block.start - first, block.stop - first)

    def _add_errors(
        self,
        block: Block,
        q: Tensor,
        q_star: Tensor,
        log_s_star: Tensor,
        log_s: Tensor,
        kl_star: Tensor,
    ) -> None:
        """Logit errors, over the allowed actions: those where q* is finite."""
        allowed = torch.isfinite(q_star)
        delta = bounds.centre(q - q_star.masked_fill(~allowed, 0.0), q_star)
        linf = self._each(delta.abs().amax(-1))
        t = block.depth
        self.states[t] += self._each(allowed.any(-1)).sum(1)
        self.linf[t] = torch.maximum(self.linf[t], linf.amax(1))
        # Ties go to the state that comes first, however the tree was cut into blocks.
        if not self.worst_of_each:
            linf = linf.reshape(1, -1)
        width = block.stop - block.start
        order = linf.sort(dim=1, descending=True, stable=True).indices[:, :WORST]
        row = (order + torch.arange(len(order), device=order.device)[:, None] * linf.shape[1]).T
        places = row.flatten()
        columns = (linf.flatten(), log_s_star.exp(), log_s.exp(), kl_star)
        # All in one: a GPU is waited for once, not for every number.
        numbers = torch.stack([places.double(), *(x[places].double() for x in columns)], 1)
        for place, *four in numbers.tolist():
            self._see(block, int(place), width, four, delta)

    def _see(
        self,
        block: Block,
        place: int,
        width: int,
        numbers: Sequence[float],
        delta: Tensor,
    ) -> None:
        """One of the worst prefixes, where it is among those of its prompt (or of all).

        Args:
            numbers: its error, its probability under target and policy, and its KL.
        """
        error, probability_target, probability_policy, kl = numbers
        prompt = self.prompts[place // width]
        index = block.start + place % width
        key = (error, -prompt, -self.space.state_offset(block.depth) - index)
        heap = self.worst_by[prompt if self.worst_of_each else None]
        if error == 0 or (len(heap) == WORST and key <= heap[0][:3]):
            return
        prefix = Prefix(
            prefix=self.space.prefixes(block.depth, index, index + 1)[0].tolist(),
            prompt_id=prompt,
            probability_target=probability_target,
            probability_policy=probability_policy,
            delta=delta[place].tolist(),
            kl=kl,
        )
        (heapq.heappush if len(heap) < WORST else heapq.heappushpop)(heap, (*key, prefix))

    def _add_responses(self, block: Block, log_star: Tensor, log_pi: Tensor) -> None:
        """Responses that end in this block, with their exact log-probabilities under both."""
        eos, last = self.space.eos_id, self.space.max_length - 1
        if eos is None and block.depth < last:
            return
        columns = slice(None) if eos is None else slice(eos, eos + 1)
        reward = self.solution.reward_rows(block.depth, *self._rows(block))[:, columns]
        log_star, log_pi = log_star[:, columns], log_pi[:, columns]
        responses = Responses(log_star, log_pi, reward)
        for name, figure in self.figures.items():
            if figure.of_responses is not None:
                self._plus(name, figure.of_responses(responses))
        impossible = torch.isneginf(log_star)
        # Not by the mass: that may be too small for a float.
        reached = self._each(impossible & ~torch.isneginf(log_pi)).any(1)
        self.forbidden_reached |= reached
        # A response that neither has is left out; one that p* forbids counts as infinite.
        ratio = (log_pi - log_star).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        low = self._each(ratio.masked_fill(impossible, torch.inf)).amin(1)
        high = self._each(ratio.masked_fill(impossible, -torch.inf)).amax(1)
        self.ratio_low = torch.minimum(self.ratio_low, low)
        self.ratio_high = torch.maximum(self.ratio_high, high).masked_fill(reached, torch.inf)

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
        size = residual.abs().masked_fill(~allowed, 0.0)
        weight = weight.masked_fill(~allowed, 0.0)
        self.max_residual = torch.maximum(self.max_residual, self._each(size).amax(1))
        infinite = torch.isinf(size)
        self._plus("residual", torch.where(infinite, size, weight * size.masked_fill(infinite, 0)))
        self._plus("weight", weight)

    def _plus(self, name: str, terms: Tensor) -> None:
        total = self._each(terms).sum(1)
        self.sums[name] = self.sums[name] + total if name in self.sums else total


def _minus(x: Tensor, y: Tensor) -> Tensor:
    """x - y, where an infinite part makes the difference inf (never nan)."""
    infinite = torch.isinf(x) | torch.isinf(y)
    return (x.masked_fill(infinite, 0.0) - y.masked_fill(infinite, 0.0)).masked_fill(
        infinite, torch.inf
    )
