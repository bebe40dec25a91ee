r"""Divergences and entropies, in nats: of rows, and of per-depth tables.

Rows are log-probabilities over the last dimension. On **tables** (see
:mod:`rl_ebm.soft_bellman`) the KL and the entropy follow the chain rule over prefixes,

    KL(P, Q) = sum_t E_{s_t ~ P} KL(P(.|s_t), Q(.|s_t)),  H(P) = sum_t E_{s_t ~ P} H(P(.|s_t))

(arXiv 2512.15605, App. A.3, A.4); total variation and Jensen-Shannon do not decompose. ``-inf`` is
a legal log-probability: 0 log 0 = 0, and KL(P, Q) is infinite where P > 0 = Q.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_ebm.soft_bellman import (
    Tables,
    expectation,
    forward_log_marginals,
    log_policy,
    rounded_up,
    soft_value,
)
from rl_ebm.tokens import TokenSpace

_ABOVE = 1e-3
"""by which rounding may leave a log-probability above 0, in any dtype"""

# Rows --------------------------------------------------------------------------------------


def check_rows(**named: Tensor) -> None:
    """Raise unless the arguments are rows of log-probabilities over the same outcomes.

    Reading the values waits for a GPU: there only shapes are looked at.

    Raises:
        TypeError: no tensor of floats.
        ValueError: rows of another length, or a log-probability above 0.
    """
    lengths = set()
    for name, x in named.items():
        if not (isinstance(x, Tensor) and x.dtype.is_floating_point):
            got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a tensor of log-probabilities, got {got}")
        lengths.add(x.shape[-1] if x.ndim else 0)
        if x.device.type != "cpu" or not x.numel():
            continue
        top = x.detach().amax().double().numpy()
        if top > _ABOVE:
            raise ValueError(
                f"{name} has an entry of {top:.3g}: log-probabilities are at most 0; normalise "
                "with torch.log_softmax"
            )
    if len(lengths) > 1:
        shapes = " and ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
        raise ValueError(f"the rows must be over the same outcomes, got shapes {shapes}")


def entropy(log_p: Float[Tensor, "... N"]) -> Float[Tensor, "..."]:
    """Shannon entropy H(p) = -sum p log p, over the last dimension."""
    check_rows(log_p=log_p)
    return 0.0 - expectation(log_p, log_p).sum(-1)  # not -0 where p is certain


def kl(log_p: Float[Tensor, "... N"], log_q: Float[Tensor, "... N"]) -> Float[Tensor, "..."]:
    """KL(p, q) = sum p (log p - log q), over the last dimension.

    Of normalised rows it is never negative, by rounding neither.
    """
    check_rows(log_p=log_p, log_q=log_q)
    # Where p = 0 the ratio may be nan: expectation does not read it there, nor its gradient.
    return rounded_up(expectation(log_p, log_p - log_q).sum(-1), log_p.shape[-1])


def tv(log_p: Float[Tensor, "... N"], log_q: Float[Tensor, "... N"]) -> Float[Tensor, "..."]:
    """Total variation, half of sum |p - q|, over the last dimension."""
    check_rows(log_p=log_p, log_q=log_q)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def js(log_p: Float[Tensor, "... N"], log_q: Float[Tensor, "... N"]) -> Float[Tensor, "..."]:
    """Jensen-Shannon divergence, (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2; <= log 2."""
    check_rows(log_p=log_p, log_q=log_q)
    # The gradient of logaddexp is nan where both are -inf; kl does not read log_m there.
    neither = torch.isneginf(log_p) & torch.isneginf(log_q)
    log_m = torch.logaddexp(log_p.masked_fill(neither, 0.0), log_q.masked_fill(neither, 0.0))
    log_m = log_m - math.log(2)
    return rounded_up(0.5 * (kl(log_p, log_m) + kl(log_q, log_m)), log_p.shape[-1])


TO_TEACHER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": kl,
    "reverse": lambda teacher, pi: kl(pi, teacher),
    "js": js,
}
"""divergences of (log teacher, log pi) by the names that distillation has for them"""


# Parts of rows -------------------------------------------------------------------------------


def top_actions(log_p: Float[Tensor, "... A"], k: int) -> Bool[Tensor, "... A"]:
    """The k largest entries of each row, of equal ones those of the lowest ids."""
    order = torch.sort(log_p, stable=True, dim=-1, descending=True).indices[..., :k]
    return torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, order, True)


def restricted(
    log_p: Float[Tensor, "... A"], kept: Bool[Tensor, "... A"], outside: str
) -> Float[Tensor, "... N"]:
    """log-probabilities of the actions that are kept, -inf at the others.

    Args:
        outside: what becomes of the others' mass: "renormalise" (those that are kept sum to 1),
            "drop" (they sum to what they do), "bucket" (one more outcome has it).
    """
    part = log_p.masked_fill(~kept, -torch.inf)
    if outside == "renormalise":
        return log_policy(part)
    if outside == "drop":
        return part
    rest = soft_value(log_p.masked_fill(kept, -torch.inf))
    return torch.cat([part, rest[..., None]], -1)


# Per-depth tables ----------------------------------------------------------------------------


def entropy_tables(log_pi: Tables, space: TokenSpace) -> Float[Tensor, "..."]:
    """Shannon entropy of the responses of a policy, by the chain rule."""
    marginals = forward_log_marginals(log_pi, space)
    terms = [expectation(m, entropy(p)).sum(-1) for m, p in zip(marginals, log_pi, strict=True)]
    return torch.stack(terms).sum(0)


def kl_tables(log_p: Tables, log_q: Tables, space: TokenSpace) -> Float[Tensor, "..."]:
    """KL between the responses of two policies, by the chain rule under the first."""
    return kl_by_depth(log_p, log_q, space).sum(0)


def kl_by_depth(log_p: Tables, log_q: Tables, space: TokenSpace) -> Float[Tensor, "T ..."]:
    """The terms of the chain rule: entry t is E_{s_t ~ P} KL(P(.|s_t), Q(.|s_t))."""
    marginals = forward_log_marginals(log_p, space)
    terms = [
        expectation(m, kl(p, q)).sum(-1) for m, p, q in zip(marginals, log_p, log_q, strict=True)
    ]
    return torch.stack(terms)


# Samples -------------------------------------------------------------------------------------


KL_TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda u: u,
    "k2": lambda u: u.square() / 2,
    "k3": lambda u: torch.expm1(-u) + u,
}
"""Estimates of KL(P, Q) at a sample of P by u = log p - log q
(http://joschu.net/blog/kl-approx.html). As estimates of its value k1 has no bias, k3 none where Q
has no mass outside P's (else it is too small by that mass), k2 a small one near P = Q."""
