"""Two rows of logits against each other, all figures in a few passes and without new memory.

What :mod:`rl_ebm.divergences` and :mod:`rl_ebm.bounds` say one by one, for verification at large
vocabularies: there a pass that fills new memory takes several times as long as its arithmetic.

Everything comes from delta = q - q* and one exponential for each side. The rows' maxima are taken
off first, in place, so that no exponential overflows and large values lose no digits in the
difference; ``top`` gives the policy's back to those who need raw values. The KL is written as the
mean of delta under the law that is sampled, less the difference of the two log-sums: where policy
and target nearly agree both terms are small, while log pi - log pi* would cancel digit by digit.
What a reader gets wrong: an action that only one side forbids makes span, linf and one of the KLs
infinite, but not the other KL, so the three masks at the end are not the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.soft_bellman import rounded_up


@dataclass(frozen=True)
class StateErrors:
    """Of each row: the law whose KL and entropy are taken is ``mine``, the target or the policy.

    Attributes:
        kl: KL(mine, other), nats; infinite where mine has an action that the other forbids.
        entropy: of mine.
        span: of q - q* over the allowed actions; infinite where q forbids one, 0 if none is.
        linf: the largest |q - q* - its mean| over the allowed actions; infinite as the span.
        v_star, v: logsumexp of the rows as they were left.
        top: what was taken off the policy's rows, (n,).
    """

    kl: Float[Tensor, "n"]
    entropy: Float[Tensor, "n"]
    span: Float[Tensor, "n"]
    linf: Float[Tensor, "n"]
    v_star: Float[Tensor, "n"]
    v: Float[Tensor, "n"]
    top: Float[Tensor, "n"]


def state_errors(
    q_star: Float[Tensor, "n A"],
    q: Float[Tensor, "n A"],
    of_target: bool,
    scratch: Float[Tensor, "3 n A"] | None = None,
) -> StateErrors:
    """All figures; the rows are overwritten: their maxima become 0, which moves no probability.

    Args:
        q_star, q: exact logits and those of the policy; ``-inf`` where forbidden. A row of
            ``-inf`` only is a state without a law: KL from it is 0, KL to it infinite.
        of_target: whether the KL is that of the target to the policy, or the other way round.
        scratch: memory to work in; None for new memory.
    """
    delta, p, work = q.new_empty(3, *q.shape) if scratch is None else scratch
    for x in (q_star, q):
        top = x.amax(-1, keepdim=True)
        x.sub_(top.masked_fill(torch.isneginf(top), 0.0))
    mine, other = (q_star, q) if of_target else (q, q_star)
    v_other = torch.exp(other, out=p).sum(-1).log()
    total = torch.exp(mine, out=p).sum(-1)
    v_mine = total.log()
    p.div_(total.clamp(min=1.0)[:, None])
    v_star, v = (v_mine, v_other) if of_target else (v_other, v_mine)

    torch.sub(q, q_star, out=delta)
    forbidden = torch.isneginf(q_star)
    some = bool(forbidden.any())
    count = (~forbidden).sum(-1) if some else torch.full_like(v, q.shape[1])
    low = (delta.masked_fill_(forbidden, torch.inf) if some else delta).amin(-1)
    high = (delta.masked_fill_(forbidden, -torch.inf) if some else delta).amax(-1)
    lost, none = torch.isneginf(low), count == 0
    if some:
        delta.masked_fill_(forbidden, 0.0)
    if bool(lost.any()):
        delta.masked_fill_(torch.isneginf(delta), 0.0)
    mean = delta.sum(-1) / count.clamp(min=1)
    span, linf = high - low, torch.maximum(high - mean, mean - low)
    span, linf = (x.masked_fill_(none, 0.0).masked_fill_(lost, torch.inf) for x in (span, linf))

    torch.sub(mine, v_mine.masked_fill(torch.isneginf(v_mine), 0.0)[:, None], out=work)
    absent = torch.isneginf(work)
    if bool(absent.any()):
        work.masked_fill_(absent, 0.0)
    entropy = 0.0 - work.mul_(p).sum(-1)  # not -0 where one action is certain
    # Sum of p (log pi - log p*); a row without a law has p = 0.
    delta.sub_((v - v_star).nan_to_num(neginf=0.0, posinf=0.0)[:, None])
    ratio = delta.mul_(p).sum(-1)
    kl = rounded_up(-ratio if of_target else ratio, q.shape[-1])
    beyond = lost if of_target else (forbidden & ~absent).any(-1)
    return StateErrors(
        kl.masked_fill(beyond, torch.inf),
        entropy,
        span,
        linf,
        v_star,
        v,
        top[:, 0],
    )
