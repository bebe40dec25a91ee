"""Random losses on small random EBMs: what is drawn, and what it is called.

Everything is a function of the seed. A loss takes float tensors of any batch, and no choice in it
depends on values otherwise than through the operations of torch: it can be mapped over a dimension.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rl_ebm import EBM, TokenSpace
from rl_ebm.policies import Tabular

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Drawn:
    """A loss, and what it is audited and trained with.

    Attributes:
        group: of the report.
        words: its parts.
        arguments: those of ``audit_loss`` besides loss, solution and kind.
    """

    ebm: EBM
    kind: Any
    group: str
    words: str
    loss: Loss
    arguments: dict[str, Any] = field(default_factory=dict)


def draw(seed: int) -> Drawn:
    """One loss of the three kinds, on an EBM of its own."""
    rng = random.Random(seed)
    ebm = _ebm(rng, seed)
    make = rng.choices([_policy_gradient, _distillation, _preference], [6, 2, 2])[0]
    return make(rng, ebm)


def _ebm(rng: random.Random, seed: int) -> EBM:
    """A 2 or 3, T 2 or 3, fixed length or EOS, a reference that is not uniform, at times -inf."""
    vocab = rng.choice([2, 3])
    eos = rng.choice([None, vocab - 1])
    length = 3 if eos is not None and vocab == 2 else rng.choice([2, 3])
    space = TokenSpace(vocab, length, eos)
    generator = torch.Generator().manual_seed(seed)
    reference = Tabular(space, scale=0.7, generator=generator, dtype=torch.float64)
    scores = torch.randn(space.num_sequences, generator=generator, dtype=torch.float64)
    if vocab == 3 and rng.random() < 0.15:
        reference.table.data[0, 0, 0] = -torch.inf
    return EBM(space, scores, rng.choice([0.3, 0.5, 1.0, 1.5]), reference)


# Normalisers: (B, T) and the mask to one number.
NORMALISERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean of token sums": lambda x, m: (x * m).sum(1).mean(),
    "mean of token means": lambda x, m: ((x * m).sum(1) / m.sum(1)).mean(),
    "shared token count": lambda x, m: (x * m).sum() / m.sum(),
    "sum over a constant": lambda x, m: (x * m).sum() / 7.0,
}


def estimate(name: str, log_ratio: Tensor) -> Tensor:
    """k1, k2 or k3 of KL(pi, p), from log pi - log p (Schulman 2020)."""
    if name == "k1":
        return log_ratio
    if name == "k2":
        return log_ratio.square() / 2
    return torch.expm1(-log_ratio) + log_ratio


def _policy_gradient(rng: random.Random, ebm: EBM) -> Drawn:
    place = rng.choices(["loss", "reward", "nowhere"], [5, 4, 1])[0]
    kl = rng.choice(["k1", "k2", "k3"])
    clamp = rng.choice([None, None, "log-ratio", "penalty", "advantage"])
    ratio = rng.choice(["log pi", "ratio", "clipped ratio"])
    weighed = place == "loss" and rng.random() < 0.25
    name = rng.choice(list(NORMALISERS))
    inner = rng.choice([1, 1, 1, 2, 3]) if ratio != "log pi" else 1
    sampler = rng.choice([None] * 8 + ["reference", "teacher"])
    beta, normalise = ebm.beta, NORMALISERS[name]

    def penalty(log_ratio: Tensor) -> Tensor:
        x = log_ratio.clamp(-0.5, 0.5) if clamp == "log-ratio" else log_ratio
        k = estimate(kl, x)
        return k.clamp(max=0.3) if clamp == "penalty" else k

    def loss(log_pi: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        mask = mask.to(log_pi.dtype)
        a = advantages.clamp(-0.7, 0.7) if clamp == "advantage" else advantages
        r = (log_pi - old).exp()
        gain = {
            "log pi": a * log_pi,
            "ratio": a * r,
            "clipped ratio": torch.minimum(a * r, a * r.clamp(0.8, 1.2)),
        }[ratio]
        if place == "loss":
            gain = gain - beta * penalty(log_pi - ref) * (r if weighed else 1.0)
        return normalise(-gain, mask)

    coupling, advantages = _advantages(rng, place, beta, penalty)
    told = [ratio, place if place == "nowhere" else f"{kl} in the {place}", name, coupling]
    told += [f"{clamp} clamped"] if clamp else []
    told += ["penalty times ratio"] if weighed else []
    told += [f"{inner} inner steps"] if inner > 1 else []
    arguments: dict[str, Any] = {"advantages": advantages, "sampler": sampler}
    if inner > 1:
        arguments |= {"inner_steps": inner, "lr": rng.choice([0.1, 0.5])}
        told.append(f"rate {arguments['lr']}")
    told += [f"drawn by the {sampler}"] if sampler else []
    group = f"policy gradient, penalty {'in the ' if place != 'nowhere' else ''}{place}"
    return Drawn(ebm, "policy-gradient", group, ", ".join(told), loss, arguments)


def _advantages(
    rng: random.Random, place: str, beta: float, penalty: Callable[[Tensor], Tensor]
) -> tuple[str, Any]:
    """A name, or a function that pays the penalty in the reward."""
    if place != "reward":
        name = rng.choice(["centred", "leave-one-out", "group-std"])
        return name, name
    coupling = rng.choice(["none", "none of tokens", "centred", "leave-one-out", "group-std"])

    def advantages(rewards: Tensor, old: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
        mask = mask.to(old.dtype)
        paid = beta * penalty(old - ref) * mask
        if coupling == "none of tokens":  # the return from each token on
            after = paid.sum(1, keepdim=True) - paid.cumsum(1) + paid
            return (rewards[:, None] - after) * mask
        returns = rewards - paid.sum(1)
        return returns if coupling == "none" else combined(coupling, returns)

    return f"function, {coupling}", advantages


def combined(coupling: str, returns: Tensor) -> Tensor:
    """Advantages of one group: the whole batch, (B,)."""
    gain = returns - returns.mean()
    if coupling == "leave-one-out":
        return gain * (len(returns) / max(len(returns) - 1, 1))
    if coupling == "group-std" and len(returns) > 1:
        return gain / (gain.square().sum() / (len(returns) - 1) + 1e-16).sqrt()
    return gain


def _distillation(rng: random.Random, ebm: EBM) -> Drawn:
    divergence = rng.choice(["forward", "reverse", "js", "k1", "k2", "k3"])
    # k1 has no expected gradient on the student's own draws: training would be a random walk.
    share = rng.choice([0.5, 0.0] if divergence == "k1" else [1.0, 0.5, 0.0])
    name = rng.choice(list(NORMALISERS))
    clamp = rng.choice([None, None, 0.5])
    normalise = NORMALISERS[name]

    def loss(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        mask = mask.to(student.dtype)
        log_pi, log_q = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
        if divergence in ("k1", "k2", "k3"):
            at = tokens[..., None]
            log_ratio = (log_pi.gather(-1, at) - log_q.gather(-1, at))[..., 0]
            each = estimate(divergence, log_ratio)
        else:
            each = _divergence(divergence, log_pi, log_q)
        return normalise(each if clamp is None else each.clamp(max=clamp), mask)

    told = f"{divergence}, {name}, student's share {share:g}"
    told += "" if clamp is None else f", clamped at {clamp:g}"
    sampled = "estimators" if divergence in ("k1", "k2", "k3") else "divergences"
    return Drawn(ebm, "distillation", f"distillation, {sampled}", told, loss, {"sampler": share})


def _divergence(name: str, log_pi: Tensor, log_q: Tensor) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    if name == "forward":
        return kl(log_q, log_pi)
    if name == "reverse":
        return kl(log_pi, log_q)
    middle = torch.logaddexp(log_pi, log_q) - 0.6931471805599453
    return (kl(log_pi, middle) + kl(log_q, middle)) / 2


def _preference(rng: random.Random, ebm: EBM) -> Drawn:
    form = rng.choice(["dpo", "ipo", "cdpo", "hinge", "exp", "dpo and likelihood"])
    sampler = rng.choice(["reference", "reference", "teacher", "policy"])
    total = rng.random() < 0.3
    beta = ebm.beta

    def loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        each = {
            "dpo": lambda: -F.logsigmoid(margin),
            "ipo": lambda: (margin / beta - 1 / (2 * beta)).square(),
            "cdpo": lambda: -0.9 * F.logsigmoid(margin) - 0.1 * F.logsigmoid(-margin),
            "hinge": lambda: (1 - margin).clamp(min=0),
            "exp": lambda: (-margin).exp(),
            "dpo and likelihood": lambda: -F.logsigmoid(margin) - 0.2 * chosen,
        }[form]()
        return each.sum() if total else each.mean()

    told = f"{form}, {'sum' if total else 'mean'}, pairs of the {sampler}"
    return Drawn(ebm, "preference", "preference", told, loss, {"sampler": sampler})
