"""Both models of arXiv 2512.15605, App. C, fitted to a law by its exact risk.

The EBM is the bidirectional Transformer with a mean-pooled scalar head, the ARM the causal one,
at the same sizes. Adam, full enumeration, a trapezoid of the learning rate. The ARM's risk is
evaluated through the prefix tree, each prefix once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from rl_ebm import EBM, TokenSpace, solve
from rl_ebm.agents.exact import exact_loss
from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.policies import Transformer
from rl_ebm.policies.scoring import tree_q_values
from rl_ebm.rewards import TransformerReward
from rl_ebm.soft_bellman import log_policy, sequence_log_probs
from rl_ebm.training.checkpoint import load_state, save_state

SMALL = TransformerConfig(layers=2, heads=2, dim=16, hidden=16)
"""the paper's N = 2: 3,633 parameters as an EBM at V = 8, T = 4"""
LARGE = TransformerConfig(layers=3, heads=4, dim=64, hidden=64)
"""the paper's N = 3: 76,609 parameters"""
SIZES = {2: SMALL, 3: LARGE}
CHUNK = 2048
"""sequences that the EBM scores at a time: small enough for the cache"""
EVERY = 500
"""steps between two checkpoints of a long fit"""


@dataclass(frozen=True)
class Schedule:
    """Adam, with a learning rate that rises, stays and falls."""

    steps: int = 5000
    lr: float = 3e-3
    ramp: int = 100
    """steps of the rise, and of the fall"""
    beta2: float = 0.95
    """of Adam; the paper states none, and 0.95 gives its curves where 0.999 does not (figures.py)"""

    def rate(self, step: int) -> float:
        ramp = max(1, min(self.ramp, self.steps // 2))
        return self.lr * min(1.0, (step + 1) / ramp, (self.steps - step) / ramp)


def flax_init(module: nn.Module) -> None:
    """Flax's defaults: truncated LeCun normal, biases 0, embeddings N(0, 1 / D)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            std = part.in_features**-0.5 / 0.87962566103423978  # of N(0, 1) cut off at 2
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=part.embedding_dim**-0.5)


def make_arm(
    space: TokenSpace, config: TransformerConfig, seed: int, init: str = "flax"
) -> Transformer:
    """A causal Transformer with Flax's initial weights, or with torch's."""
    torch.manual_seed(seed)
    model = Transformer(space, config)
    if init == "flax":
        flax_init(model)
    return model


def make_ebm(space: TokenSpace, config: TransformerConfig, seed: int) -> TransformerReward:
    """A bidirectional Transformer with Flax's initial weights."""
    torch.manual_seed(seed)
    model = TransformerReward(space, config)
    flax_init(model)
    return model


def dense(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every position sees all positions, term by term: torch.compile fuses this for short rows."""
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v


def hasten(model: Transformer | TransformerReward) -> None:
    """torch.compile, for fits of hours: the same function up to rounding."""
    if isinstance(model, Transformer):
        model.compiled = True
    else:
        model.unmasked = dense
        model.compile()


MAKE = {"ARM": make_arm, "EBM": make_ebm}
"""what a name of a model stands for"""


def parameters(model: nn.Module) -> int:
    """How many numbers a model learns."""
    return sum(p.numel() for p in model.parameters())


def scores(reward: TransformerReward) -> Float64[Tensor, "N"]:
    """R of every sequence, float64."""
    space = reward.space
    parts = []
    with torch.no_grad():
        for start in range(0, space.num_sequences, CHUNK):
            tokens, lengths = space.sequences(start, min(start + CHUNK, space.num_sequences))
            parts.append(reward(tokens, lengths, torch.zeros_like(lengths)).double())
    return torch.cat(parts)


def descend_ebm(
    reward: TransformerReward, log_rho: Float64[Tensor, "N"]
) -> Callable[[], Float[Tensor, ""]]:
    """A function that puts the gradient of the EBM's risk into its parameters."""
    space = reward.space
    rho = log_rho.exp().float()
    pieces = [
        space.sequences(start, min(start + CHUNK, space.num_sequences))
        for start in range(0, space.num_sequences, CHUNK)
    ]

    def risk() -> Float[Tensor, ""]:
        score = torch.cat([reward(x, n, torch.zeros_like(n)) for x, n in pieces])
        loss = torch.logsumexp(score, 0) - (rho * score).sum()
        loss.backward()
        return loss.detach()

    return risk


def descend_arm(
    policy: Transformer, log_rho: Float64[Tensor, "N"]
) -> Callable[[], Float[Tensor, ""]]:
    """A function that puts the gradient of the ARM's risk, less H, into its parameters."""
    with torch.no_grad():
        star = log_policy(tree_q_values(solve(EBM(policy.space, log_rho)), policy.space)).float()

    def risk() -> Float[Tensor, ""]:
        loss = exact_loss(tree_q_values(policy, policy.space), star, policy.space)
        loss.backward()
        return loss.detach()

    return risk


def fit(
    model: nn.Module,
    risk: Callable[[], Tensor],
    schedule: Schedule,
    log: list[dict[str, Any]] | None = None,
    checkpoint: Path | None = None,
) -> Iterator[int]:
    """Train; yields the number of steps taken, before the first one and after each.

    Args:
        log: what the caller writes down; restored with the model.
        checkpoint: a file that a long fit can go on from; it is removed at the end.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=schedule.lr, betas=(0.9, schedule.beta2))
    first = 0
    if checkpoint is not None and checkpoint.exists():
        state = load_state(checkpoint, "cpu")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = int(state["step"])
        if log is not None:
            log[:] = state["log"]
    yield first
    for step in range(first, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        optimizer.zero_grad(set_to_none=True)
        risk()
        optimizer.step()
        yield step + 1
        if checkpoint is not None and (step + 1) % EVERY == 0:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            states: dict[str, Any] = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "log": [] if log is None else log,
            }
            save_state(checkpoint, states)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


@torch.no_grad()
def log_law(model: nn.Module) -> Float64[Tensor, "N"]:
    """log-probability of every sequence under an ARM or an EBM, in float64."""
    if isinstance(model, TransformerReward):
        return torch.log_softmax(scores(model), 0)
    assert isinstance(model, Transformer)
    space = model.space
    sizes = [space.num_prefixes(t) for t in range(space.max_length)]
    log_pi = log_policy(tree_q_values(model, space)[0].double())
    return sequence_log_probs(list(log_pi.split(sizes)), space)


def watch(
    model: Transformer | TransformerReward,
    log_rho: Float64[Tensor, "N"],
    schedule: Schedule,
    points: int = 50,
) -> Iterator[tuple[int, Float64[Tensor, "N"]]]:
    """Fit an ARM or an EBM to a law; yields the step and the model's own law at the marks."""
    risk = (
        descend_ebm(model, log_rho)
        if isinstance(model, TransformerReward)
        else descend_arm(model, log_rho)
    )
    look = marks(schedule.steps, points)
    for step in fit(model, risk, schedule):
        if step in look:
            yield step, log_law(model)


def gap(log_rho: Float64[Tensor, "N"], log_p: Float64[Tensor, "N"]) -> float:
    """The risk less its minimum: KL(rho, p), nats."""
    return float((log_rho.exp() * (log_rho - log_p)).sum())


def marks(steps: int, points: int = 100) -> set[int]:
    """Steps at which to look: evenly spaced, the first and the last included."""
    return {0, steps, *(math.ceil(steps * i / points) for i in range(1, points))}
