r"""Where on-policy distillation ends that sees a part of the teacher: some tokens, or one drawn.

What a state's loss moves are its own logits alone, but for a reward of later tokens: each state
has a flow of its own, of A logits from p_ref, and how often it is visited is no more than a
clock. With T the teacher, S the tokens that are compared, pi the policy:

* **Renormalised on S**: pi(.|S) becomes T(.|S). A gradient of logits sums to 0, here over S, so
  that the logits outside stay and those of S keep their sum.
* **A bucket** for the rest: pi = T on S. Inside the bucket all logits have a gradient
  pi_b h, with one h: exp(-theta_b) grows by the same number c for all of them, found from the
  sum of all logits, which stays. The same holds for what is **dropped** in JS; the dropped
  reverse KL has its minimum at pi = T / e on S (d/dq of q log(q / T) is 0 there), and the
  dropped forward KL, where nothing holds mass outside, at T(.|S).
* **The drawn token**, u = log pi - log T, in the loss: E_pi[kappa'(u) grad log pi] is nothing for
  k1 (the policy stays where it is), grad KL(pi, T) for k2, grad KL(T, pi) for k3. Times the ratio
  pi / pi_old the slope is kappa + kappa': u + 1 for k1 and u for k3, both grad KL(pi, T); for k2
  u + u^2 / 2, which drives out what is rarer than about T / e^2.
* **As a reward**, with later ones counted by powers of gamma: k1 ends at T for every gamma, since
  u(s, a) = gamma V(s a) - V(s) and sum_a T exp(u) = 1 give V = 0 from the last token on. k2 and
  k3 have their largest reward at u = 0 and punish what is rarer, the rarer the more: as a rule
  it is driven out, and for k2 T on those that stay is left. For k3 no law is given then: what is
  lost still counts, E_pi[exp(-u)] = T for ever, though nobody draws it. Where what is common is
  rarer than under T, the flow can come to rest at T, from the one side from which that is stable:
  with more than two tokens it is not said which.

What the loss leaves open outside of S is what a plain gradient makes of p_ref: Adam, which scales
each logit's step, divides it otherwise, and so do shared weights.

Where the policy's own top tokens are compared, S moves with it: the flow is followed until S stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl_ebm.divergences import KL_TERMS, TO_TEACHER, restricted, top_actions, tv
from rl_ebm.fixed_points.flow import RAREST
from rl_ebm.fixed_points.penalties import NOT_COMPUTED
from rl_ebm.fixed_points.problem import FixedPoint, Problem
from rl_ebm.fixed_points.rows import Field, Limits, follow_rows
from rl_ebm.soft_bellman import (
    expectation,
    forward_log_marginals,
    log_policy,
    q_from_r,
    sequence_log_probs,
)

LOST = -4.0
"""log pi - log T below which a token that loses more than the others gain is given up"""
EQUAL = 1e-9
"""spread of the rewards of a state's tokens, over the largest, at which the state is at rest"""
SAME, CLOSER = 1e-10, 1e-3
"""largest |log pi - log T| of a state that is the teacher's; and, over that under p_ref, of one too
near to it to be followed: u' is of order u^2 there, and rounding would choose the side"""
NEAR = 0.02
"""total variation between a state's flow and the limit that it may have"""
LONGER = 3.0
"""time after which that limit must still be the same, in units of when it was first seen"""
DRIVEN, TOP = (4000, 8_000_000), (400, 3_000_000)
"""steps, and entries of logits over all steps, after which either flow is given up"""
CHECKED = 5
"""steps between two looks at who stays"""


class Distillation(NamedTuple):
    """What a loss has of the teacher at each state."""

    divergence: str = "reverse"
    """forward, reverse or js"""
    support: str = "all"
    """all, teacher-top, student-top or token"""
    top_k: int = 1
    outside: str = "renormalise"
    """renormalise, drop or bucket"""
    estimator: str = "k1"
    """of the drawn token: k1, k2 or k3"""
    place: str = "reward"
    """reward or loss"""
    ratio: bool = False
    """whether an estimate in the loss is multiplied by pi / pi_old, whose gradient counts"""
    discount: float = 0.0
    """of the rewards of later tokens"""


def distilled(problem: Problem, how: Distillation) -> FixedPoint:
    """The limit from p_ref of the expected gradient, the teacher being the EBM."""
    if how.support == "token":
        return _of_drawn_tokens(problem, how)
    if how.support == "all":
        return FixedPoint(problem.log_target)
    start, teacher = torch.cat(problem.start()), torch.cat(teacher_tables(problem))
    if how.support == "student-top":
        return _joined(problem, _student_top(start, teacher, how), "flow")
    limits = top_limits(start, teacher, top_actions(teacher, how.top_k), how)
    root = how.outside == "bucket" or (how.outside == "drop" and how.divergence != "forward")
    return _joined(problem, limits, "root" if root else "closed form")


def _of_drawn_tokens(problem: Problem, how: Distillation) -> FixedPoint:
    """The limit where the loss is an estimate at the token that was drawn."""
    if how.place == "loss" and how.estimator == "k1" and not how.ratio:
        return FixedPoint(problem.start_law, sampler=True)
    driven = ("k2",) if how.ratio else ("k2", "k3") if how.place == "reward" else ()
    if how.estimator not in driven:
        return FixedPoint(problem.log_target)
    if how.place == "reward" and how.discount > 0:
        return NOT_COMPUTED
    start, teacher = torch.cat(problem.start()), torch.cat(teacher_tables(problem))
    found = _joined(problem, _driven(start, teacher, how), "flow")
    if how.estimator == "k3" and found.degenerate:
        return FixedPoint(None, degenerate=True, how="not computed", sampler=True)
    return replace(found, sampler=how.place == "reward")


def teacher_tables(problem: Problem) -> list[Tensor]:
    """log pi of the EBM, by depth."""
    r = [a + b for a, b in zip(problem.log_ref, problem.g, strict=True)]
    return [log_policy(q) for q in q_from_r(r, problem.space)]


def _joined(problem: Problem, limits: Limits, how: str) -> FixedPoint:
    """The law of states that each have a limit; those that are never reached need none."""
    sizes = [len(t) for t in problem.log_ref]
    tables = list(limits.log_pi.split(sizes))
    reached = ~torch.isneginf(torch.cat(forward_log_marginals(tables, problem.space)))
    degenerate = bool((limits.boundary & limits.known & reached).any())
    if not bool((limits.known | ~reached).all()):
        return FixedPoint(None, degenerate or None, "not settled")
    return FixedPoint(sequence_log_probs(tables, problem.space), degenerate, how)


# Some tokens --------------------------------------------------------------------------------------


def top_limits(
    theta: Float[Tensor, "n A"],
    log_teacher: Float[Tensor, "n A"],
    kept: Bool[Tensor, "n A"],
    how: Distillation,
) -> Limits:
    """The limits of flows from theta on which the tokens that are compared stay the same.

    Args:
        theta: logits, -inf where p_ref forbids.
        kept: the tokens that are compared.
    """
    outside = ~kept & ~torch.isneginf(theta)
    some = outside.any(-1)
    boundary = torch.zeros_like(some)
    if how.outside == "renormalise":
        shift = (theta - log_teacher).masked_fill(~kept | torch.isneginf(theta), 0.0).sum(-1)
        count = (kept & ~torch.isneginf(theta)).sum(-1).clamp(min=1)
        log_pi = log_policy(torch.where(kept, log_teacher + (shift / count)[:, None], theta))
    elif how.outside == "drop" and how.divergence == "forward":
        log_pi, boundary = log_policy(log_teacher.masked_fill(~kept, -torch.inf)), some
    else:
        less = float(how.outside == "drop" and how.divergence == "reverse")
        log_pi = _with_rest(theta, log_teacher - less, kept)
    log_pi = torch.where(some[:, None], log_pi, log_teacher)
    return Limits(log_pi, torch.ones_like(some), boundary)


def _with_rest(
    theta: Float[Tensor, "n A"], log_kept: Float[Tensor, "n A"], kept: Bool[Tensor, "n A"]
) -> Float[Tensor, "n A"]:
    """log pi with given values on some actions, exp(-theta_b) + c at the others, the logits' sum.

    The logits on the kept ones are ``log_kept + k`` with k such that pi sums to 1. With c counted
    from where the largest of the others would be infinite, log c is found by bisection: the sum
    of all logits falls with it.
    """
    allowed = ~torch.isneginf(theta)
    outside, inside = allowed & ~kept, allowed & kept
    top = theta.masked_fill(~outside, -torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    # log of exp(top - theta_b) - 1, what is above the least.
    above = torch.expm1((top - theta).masked_fill(~outside, 0.0)).log()
    log_rest = torch.log(-torch.expm1(_log_sum(log_kept, inside).clamp(max=-1e-16)))
    total = theta.masked_fill(~allowed, 0.0).sum(-1, keepdim=True)
    fixed = log_kept.masked_fill(~inside, 0.0).sum(-1, keepdim=True)
    count = inside.sum(-1, keepdim=True)

    def at(log_c: Tensor) -> tuple[Tensor, Tensor]:
        theta_b = (top - torch.logaddexp(above, log_c)).masked_fill(~outside, -torch.inf)
        return theta_b, _log_sum(theta_b, outside) - log_rest

    low, high = torch.full_like(top, -700.0), torch.full_like(top, 700.0)
    for _ in range(80):
        middle = (low + high) / 2
        theta_b, k = at(middle)
        over = theta_b.masked_fill(~outside, 0.0).sum(-1, keepdim=True) + fixed + count * k > total
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    theta_b, k = at(low)
    return log_policy(torch.where(kept, (log_kept + k).masked_fill(~allowed, -torch.inf), theta_b))


def _log_sum(x: Float[Tensor, "n A"], where: Bool[Tensor, "n A"]) -> Float[Tensor, "n 1"]:
    """logsumexp of some entries of each row."""
    return x.masked_fill(~where, -torch.inf).logsumexp(-1, keepdim=True)


def _student_top(start: Tensor, teacher: Tensor, how: Distillation) -> Limits:
    """The limits where the policy's own top tokens are compared, which move with it."""
    allowed = ~torch.isneginf(start)
    compare = TO_TEACHER[how.divergence]

    def field(theta: Tensor) -> Tensor:
        with torch.enable_grad():
            x = theta.detach().requires_grad_()
            log_pi = log_policy(x.masked_fill(~allowed, -torch.inf))
            kept = top_actions(log_pi.detach(), how.top_k)
            rows = (restricted(p, kept, how.outside) for p in (teacher, log_pi))
            (slope,) = torch.autograd.grad(compare(*rows).sum(), x)
        return -slope

    whole = allowed.sum(-1) <= how.top_k
    found = Limits(
        torch.where(whole[:, None], teacher, start), whole, torch.zeros_like(allowed[:, 0])
    )
    since, before = torch.full_like(start[:, 0], torch.inf), torch.zeros_like(allowed)
    for time, theta in _looks(field, start, *TOP):
        logits = theta.masked_fill(~allowed, -torch.inf)
        kept = top_actions(log_policy(logits), how.top_k)
        limit = top_limits(logits, teacher, kept, how)
        near = tv(limit.log_pi, log_policy(logits)) < NEAR
        good = near & (top_actions(limit.log_pi, how.top_k) == kept).all(-1)
        stays = good & (kept == before).all(-1)
        since, before = torch.where(stays, since, time), kept
        # A limit that was there from the first look on was not passed by either.
        now = stays & (time > LONGER * since) & ~found.known
        found = _put(found, now, limit)
        if bool(found.known.all()):
            break
    return found


# The drawn token ----------------------------------------------------------------------------------


def _driven(start: Tensor, teacher: Tensor, how: Distillation) -> Limits:
    """The limits of flows that drive out what is rare: its cost grows on both sides of a place."""
    allowed = ~torch.isneginf(start)
    term = KL_TERMS[how.estimator]
    least = -1.0 if how.place == "loss" else 0.0  # u where the cost is least

    def cost(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_pi = log_policy(theta.masked_fill(~allowed, -torch.inf))
        u = (log_pi - teacher).masked_fill(~allowed, 0.0).clamp(min=RAREST)
        return log_pi, u, term(u) + u if how.place == "loss" else term(u)

    def field(theta: Tensor) -> Tensor:
        log_pi, _, x = cost(theta)
        return log_pi.exp() * (expectation(log_pi, x).sum(-1, keepdim=True) - x)

    none = torch.zeros_like(allowed[:, 0])
    found = Limits(start, allowed.sum(-1) <= 1, none)
    near = 0 * start[:, 0]  # largest |u| below which a state is not followed any more
    for now, (_, theta) in enumerate(_looks(field, start, *DRIVEN)):
        log_pi, u, x = cost(theta)
        far = u.abs().amax(-1)
        near = CLOSER * far if now == 0 else torch.where(far < near, torch.inf, near)
        x = x.masked_fill(~allowed, 0.0)
        mean = expectation(log_pi, x).sum(-1, keepdim=True)
        spread = (x - mean).masked_fill(~allowed, 0.0).abs().amax(-1)
        rest = spread <= EQUAL * x.abs().amax(-1)
        # Of two tokens the flow has one dimension, and passes no rest.
        same = (far < SAME) | (torch.isinf(near) & (allowed.sum(-1) <= 2))
        inside = Limits(torch.where(same[:, None], teacher, log_pi), none, none)
        found = _put(found, (same | (rest & ~torch.isinf(near))) & ~found.known, inside)
        # Where u is larger the cost grows with it: those pull each other to one u, that of T on
        # them, and none of them falls back, as the least of them costs less than the mean.
        stay = allowed & (u > least)
        limit = log_policy(teacher.masked_fill(~stay, -torch.inf))
        most = torch.maximum(
            x.masked_fill(~stay, -torch.inf).amax(-1, keepdim=True),
            cost(limit.masked_fill(~stay, -1e3))[2].masked_fill(~stay, 0).amax(-1, keepdim=True),
        )
        lost = allowed & (u < least + LOST) & (x > 1.05 * most)
        sure = (stay | lost | ~allowed).all(-1) & ~torch.isinf(near)
        found = _put(found, sure & ~found.known, Limits(limit, none, lost.any(-1)))
        if bool((found.known | torch.isinf(near)).all()):
            break
    return found


def _looks(field: Field, start: Tensor, steps: int, work: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Time and logits of rows that flow from p_ref, now and then, until it takes too long."""
    theta = start.nan_to_num(neginf=0.0)
    steps = min(steps, max(CHECKED, work // theta.numel()))
    return islice(follow_rows(field, theta), 0, steps, CHECKED)


def _put(found: Limits, rows: Bool[Tensor, "n"], limits: Limits) -> Limits:
    """What is known now of some rows."""
    return Limits(
        torch.where(rows[:, None], limits.log_pi, found.log_pi),
        found.known | rows,
        torch.where(rows, limits.boundary, found.boundary),
    )
