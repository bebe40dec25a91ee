r"""Learning from preferences: DPO and IPO, of pairs that R labels or that a file holds.

With h = log pi(y|x) - log p_ref(y|x) of the response that was chosen, h' of the one rejected,

    DPO:  loss = - mean ((1 - eps) log sigma(beta (h - h')) + eps log sigma(- beta (h - h')))
    IPO:  loss =   mean (h - h' - 1 / (2 tau))^2

Rafailov et al. 2023 (arXiv 2305.18290, Eq. 7), with smoothed labels (cDPO) where eps > 0; Azar et
al. 2023 (arXiv 2310.12036, Eq. 17). y is chosen over y' with probability sigma(R - R'), in reward
units (Bradley and Terry 1952), and beta is the EBM's. DPO then ends at the EBM; IPO at
p_ref exp(P / tau) with P the chance to be chosen over a draw of whoever draws the pairs: never
the EBM, whatever tau. :mod:`rl_ebm.fixed_points.preferences`. On a file of finitely many pairs
DPO has no limit where one response is never rejected: it moves without end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import logsigmoid

from rl_ebm.agents.registry import AgentEntry
from rl_ebm.agents.shared.account import Behaviour
from rl_ebm.agents.shared.base import BaseAgent, given
from rl_ebm.agents.shared.learner import (
    check_batch_size,
    check_rates,
    draw_groups,
    log_ref_and_gain,
    token_values,
)
from rl_ebm.agents.shared.on_policy import trained_on
from rl_ebm.agents.shared.option_types import checked_options
from rl_ebm.fixed_points import FixedPoint, Problem, dpo_limit, forbids, ipo_limit
from rl_ebm.messages.arguments import WrongTypeError, shown
from rl_ebm.policies import Uniform, read_pairs
from rl_ebm.policies.base import Policy
from rl_ebm.policies.decoding import sample
from rl_ebm.policies.scoring import q_values
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import Batch

UNKNOWN = FixedPoint(None, degenerate=None, how="not known", sampler=True)


@checked_options
class PreferenceOptions:
    """Options of every agent that learns from preferences."""

    batch_size: int = 4096
    """responses in a step, two a pair"""
    source: Literal["reference", "policy", "teacher"] = "reference"
    """who draws the pairs: the reference (uniform without one), the policy, or a teacher"""
    labels: Literal["sampled", "exact"] = "sampled"
    """whether who is chosen is drawn, or both ways count by their probabilities"""
    pairs: str | None = None
    """a file of preferences, which are learned from instead: JSON lines with chosen and rejected,
    lists of ids, or the two tensors in a .safetensors"""
    lr: float | int = 1e-2
    """peak learning rate of Adam"""
    max_grad_norm: float | int = 1.0
    """gradients are clipped to this norm"""
    forbidden_log_weight: float | int | None = None
    """log-weight trained on in the place of -inf, nats"""

    def __post_init__(self) -> None:
        check_rates(self.lr, self.max_grad_norm)
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be >= 2, two a pair, got {self.batch_size}")
        check_batch_size("batch_size", self.batch_size)
        if self.pairs is None:
            return
        if not isinstance(self.pairs, str):
            raise WrongTypeError(
                f"pairs must be the path of a file, as text, or None, got {shown(self.pairs)}"
            )
        if self.source != "reference" or self.labels != "sampled":
            raise ValueError("pairs of a file are drawn and labelled: leave out source and labels")


@checked_options
class DPOConfig(PreferenceOptions):
    """Options of the agent ``dpo``."""

    label_smoothing: float | int = 0.0
    """eps: share of the labels that count as if they were the other way (cDPO), below 0.5"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")


@checked_options
class IPOConfig(PreferenceOptions):
    """Options of the agent ``ipo``."""

    tau: float | int | None = None
    """strength of the regularisation; None for the EBM's beta"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None and not 0 < self.tau < math.inf:
            raise ValueError(f"tau must be a finite number > 0, or None for beta, got {self.tau}")


def dpo_terms(
    margin: Float[Tensor, "B"], beta: float = 1.0, label_smoothing: float = 0.0
) -> Float[Tensor, "B"]:
    """The loss of each pair, nats, by its h - h'."""
    x, eps = beta * margin, label_smoothing
    return -(1 - eps) * logsigmoid(x) - eps * logsigmoid(-x)


def ipo_terms(margin: Float[Tensor, "B"], tau: float = 1.0) -> Float[Tensor, "B"]:
    """The loss of each pair, nats squared, by its h - h'."""
    return (margin - 1 / (2 * tau)).square()


def dpo_loss(
    chosen_log_pi: Float[Tensor, "B"],
    rejected_log_pi: Float[Tensor, "B"],
    chosen_log_ref: Float[Tensor, "B"],
    rejected_log_ref: Float[Tensor, "B"],
    beta: float = 1.0,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """DPO of pairs, mean over them.

    Args:
        chosen_log_pi: log pi of the response that was chosen, summed over its tokens.
        beta: reward units per nat.
    """
    margin = (chosen_log_pi - chosen_log_ref) - (rejected_log_pi - rejected_log_ref)
    return dpo_terms(margin, beta, label_smoothing).mean()


def ipo_loss(
    chosen_log_pi: Float[Tensor, "B"],
    rejected_log_pi: Float[Tensor, "B"],
    chosen_log_ref: Float[Tensor, "B"],
    rejected_log_ref: Float[Tensor, "B"],
    tau: float = 1.0,
) -> Float[Tensor, ""]:
    """IPO of pairs, mean over them; arguments as :func:`dpo_loss`."""
    margin = (chosen_log_pi - chosen_log_ref) - (rejected_log_pi - rejected_log_ref)
    return ipo_terms(margin, tau).mean()


def neighbours(
    prompt_ids: Int64[Tensor, "B"],
) -> tuple[Int64[Tensor, "N"], Int64[Tensor, "N"], Bool[Tensor, "N"]]:
    """Rows that answer one prompt, two by two in their order, wherever they stand.

    Returns:
        first and second row of N = B - 1 neighbours, and which of these are pairs. (Their number
        is not known without waiting for the device.)
    """
    order = prompt_ids.argsort(stable=True)
    ids = prompt_ids[order]
    rows = torch.arange(len(ids), device=ids.device)
    place = rows - torch.searchsorted(ids, ids)
    return order[:-1], order[1:], (place[:-1] % 2 == 0) & (ids[:-1] == ids[1:])


class PreferenceAgent(BaseAgent, ABC):
    """Learns which of two responses to a prompt is preferred; a subclass is its :meth:`terms`."""

    Config = PreferenceOptions
    held: tuple[Batch, Batch] | None = None
    """the preferences of a file"""

    @abstractmethod
    def terms(self, margin: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """The loss of each pair by h - h' of the chosen and the rejected response."""

    def begin(self, teacher: Policy | None) -> None:
        """Who draws, or the preferences of the file."""
        if self.config.pairs is not None:
            found = read_pairs(self.config.pairs, self.ebm.space, self.ebm.num_prompts)
            self.held = found[0].to(self.ebm.device), found[1].to(self.ebm.device)
        reference = Uniform(self.ebm.space) if self.ebm.reference is None else self.ebm.reference
        self.source: Policy = reference
        if self.config.source == "policy":
            self.source = self.policy
        elif self.config.source == "teacher":
            self.source = given(teacher, self.ebm, "source='teacher'")

    @property
    def own_rows(self) -> slice | None:
        """The rows of :meth:`sample` that are draws of the policy as it is; None without one."""
        return slice(None) if self.source is self.policy else None

    def sample(self) -> Batch | None:
        """Responses of the source, two to a prompt at least; None with a file."""
        if self.held is not None:
            return None
        n, p = self.config.batch_size, self.ebm.num_prompts
        ids = draw_groups(n, p, 2, 2, self.generator)
        return sample(self.source, self.ebm.space, len(ids), self.generator, ids)

    def behaviour(self) -> Behaviour | None:
        """The policy, the reference or the teacher draws; with a file nobody does."""
        if self.held is not None:
            return None
        drawn = self.config.source
        return Behaviour(*(float(drawn == name) for name in ("policy", "reference", "teacher")))

    def update(self, batch: Batch | None, progress: float = 0.0) -> dict[str, Tensor]:
        """One gradient step on pairs of the responses, labelled by R, or of the file."""
        loss = self._held_loss() if batch is None or self.held else self._loss(batch.clean())
        return {"losses/loss": loss.detach()} | self.learner.descend(loss, progress)

    def _held_loss(self) -> Float[Tensor, ""]:
        """Of as many pairs of the file as a step has, drawn with replacement; of all if so few."""
        assert self.held is not None
        count, n = len(self.held[0]), self.config.batch_size // 2
        if count > n:
            rows = torch.randint(count, (n,), generator=self.generator, device=self.ebm.device)
            chosen, rejected = (batch.take(rows) for batch in self.held)
        else:
            chosen, rejected = self.held
        h = self._log_ratio(Batch.cat([chosen, rejected]))
        return self.terms(h[: len(chosen)] - h[len(chosen) :]).mean()

    def _loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Of responses two by two, by the probability that the first of them is chosen."""
        first, second, counts = neighbours(batch.prompt_ids)
        _, gain = log_ref_and_gain(self.ebm, batch, self.config.forbidden_log_weight)
        reward = gain * self.ebm.beta
        chosen = torch.sigmoid(reward[first] - reward[second])
        if self.config.labels == "sampled":
            u = torch.rand(chosen.shape, generator=self.generator, device=chosen.device)
            chosen = (u < chosen).to(chosen.dtype)
        h = self._log_ratio(batch)
        margin = h[first] - h[second]
        loss = chosen * self.terms(margin) + (1 - chosen) * self.terms(-margin)
        return loss.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)

    def _log_ratio(self, batch: Batch) -> Float[Tensor, "B"]:
        """h of each response."""
        q = q_values(self.policy, self.ebm.space, batch.tokens, batch.prompt_ids)
        log_pi = token_values(log_policy(q), batch).sum(1)
        log_ref = self.ebm.log_ref(batch.tokens, batch.lengths, batch.prompt_ids)
        stand_in = self.config.forbidden_log_weight
        if stand_in is not None:
            log_ref = log_ref.masked_fill(torch.isneginf(log_ref), stand_in)
        return log_pi - log_ref.to(log_pi.dtype).sum(1)


class DPOAgent(PreferenceAgent):
    """Direct preference optimisation."""

    Config = DPOConfig

    def terms(self, margin: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Logistic, of the margin in reward units."""
        return dpo_terms(margin, self.ebm.beta, self.config.label_smoothing)


class IPOAgent(PreferenceAgent):
    """Identity preference optimisation."""

    Config = IPOConfig

    def terms(self, margin: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Squares, of the margin in nats."""
        return ipo_terms(margin, self.ebm.beta if self.config.tau is None else self.config.tau)


def fixed_point(config: DPOConfig | IPOConfig, problem: Problem) -> FixedPoint:
    """The limit of pairs without end; of a file's pairs, or a teacher's with IPO, none is known.

    Where p_ref forbids something and does not draw it, nobody learns what its stand-in is.
    """
    blind = config.source != "policy" and forbids(problem)
    if config.pairs is not None or (config.forbidden_log_weight is not None and blind):
        return UNKNOWN
    online = config.source == "policy"
    problem = trained_on(config.forbidden_log_weight, problem)
    if isinstance(config, DPOConfig):
        if config.source == "teacher" and config.label_smoothing:
            return UNKNOWN
        return dpo_limit(problem, config.label_smoothing, online)
    if config.source == "teacher":
        return UNKNOWN
    return ipo_limit(problem, problem.beta if config.tau is None else config.tau, online)


SOURCES = ({"source": "reference"}, {"source": "policy"})

ENTRIES = {
    "dpo": AgentEntry(
        DPOAgent,
        DPOConfig,
        "direct preference optimisation of pairs that R labels, or of a file",
        "Rafailov et al. 2023, arXiv 2305.18290",
        fixed_point=fixed_point,
        variants=(*SOURCES, *(x | {"label_smoothing": 0.1} for x in SOURCES)),
    ),
    "ipo": AgentEntry(
        IPOAgent,
        IPOConfig,
        "identity preference optimisation of pairs that R labels, or of a file",
        "Azar et al. 2023, arXiv 2310.12036",
        fixed_point=fixed_point,
        variants=SOURCES,
    ),
}
