r"""The soft Bellman equations of a token MDP, as pure functions. No networks, no state.

Appending a token is deterministic, so with immediate log-weights r (nats)

    q(s, a) = r(s, a) + V(s a),  V(s) = log sum_a exp q(s, a),  V(end) = 0            (1)
    log pi(a|s) = q(s, a) - V(s)                                                    (2)
    r(s, a) = q(s, a) - V_q(s a)          (the inverse map)                           (3)

With ``r = log p_ref``, plus ``R / beta`` on the last token, V(x) is log Z(x) and the product
of the policy (2) is the EBM: arXiv 2512.15605, Eq. (6), Eq. (8), Prop. 1. Everything is in
nats; beta is already inside r. ``-inf`` is a legal log-weight (a forbidden action): a state
from which nothing possible follows has q, V and log pi all ``-inf``, and its gradient is 0.

**Per-depth tables** are lists: entry t has shape ``(..., branching**t, A)``; rows are the
prefixes of depth t in enumeration order, columns token ids (see :mod:`rl_ebm.tokens.space`). In EOS
mode the last entry is ``-inf`` off EOS. Leading dimensions (prompts) pass through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.messages.arguments import shown
from rl_ebm.tokens import TokenSpace, check_space, length_mask

Tables = Sequence[Tensor]


def soft_value(q: Float[Tensor, "... A"]) -> Float[Tensor, "..."]:
    """V(s) of Eq. (1); ``-inf``, with gradient 0, where every action is forbidden."""
    dead = torch.isneginf(q).all(-1)
    # torch.logsumexp has gradient nan at a row of -inf only: such rows are taken out before.
    v = torch.logsumexp(q.masked_fill(dead[..., None], 0.0), dim=-1)
    return v.masked_fill(dead, -torch.inf)


def log_policy(q: Float[Tensor, "... A"]) -> Float[Tensor, "... A"]:
    """log pi of Eq. (2); all ``-inf``, with gradient 0, where every action is forbidden."""
    forbidden = torch.isneginf(q)
    dead = forbidden.all(-1, keepdim=True)
    log_pi = torch.log_softmax(q.masked_fill(dead, 0.0), dim=-1)
    return log_pi.masked_fill(forbidden, -torch.inf)


def backup(
    r: Float[Tensor, "... n A"], v_next: Float[Tensor, "... m"], space: TokenSpace
) -> Float[Tensor, "... n A"]:
    """One step of Eq. (1): q of one depth from r and the values of the next depth."""
    return r + space.spread(v_next, fill=0.0)


def q_from_r(r: Tables, space: TokenSpace) -> list[Tensor]:
    """The map M: q from r, backwards over the depths. arXiv 2512.15605, Eq. (6).

    Raises:
        ValueError: tables that are not those of ``space``.
    """
    check_tables(space, r=r)
    q: list[Tensor] = [_mask_last(r[-1], space)]
    for r_t in reversed(r[:-1]):
        q.append(backup(r_t, soft_value(q[-1]), space))
    return q[::-1]


def r_from_q(q: Tables, space: TokenSpace) -> list[Tensor]:
    """The inverse of M, Eq. (3): all depths independently. arXiv 2512.15605, Sec. 3.2.

    Where q is ``-inf`` so is r.

    Raises:
        ValueError: tables that are not those of ``space``, or a q that is finite at an action
            after which every action is forbidden (no r gives such a q).
    """
    check_tables(space, q=q)
    q = [*q[:-1], _mask_last(q[-1], space)]
    r = [
        _minus_value(q_t, space.spread(soft_value(q_next), fill=0.0)) for q_t, q_next in pairwise(q)
    ]
    return [*r, q[-1]]


def q_from_r_tree(r: Float[Tensor, "N A"], children: Int64[Tensor, "N A"]) -> Float[Tensor, "N A"]:
    """The map M on any prefix tree.

    Args:
        r: immediate log-weights; ``-inf`` at actions that the tree does not have.
        children: the node that an action leads to, always of a larger number than its
            parent; -1 where the response ends.

    Raises:
        ValueError: a child that does not stand after its parent.
    """
    levels = _levels(children)
    v = r.new_zeros(r.shape[0])
    q = torch.empty_like(r)
    for nodes in reversed(levels):
        q_level = r[nodes] + _child_values(v, children[nodes])
        q = q.index_copy(0, nodes, q_level)
        v = v.index_copy(0, nodes, soft_value(q_level))
    return q


def r_from_q_tree(q: Float[Tensor, "N A"], children: Int64[Tensor, "N A"]) -> Float[Tensor, "N A"]:
    """The inverse of M on any prefix tree: Eq. (3) at every node at once."""
    return _minus_value(q, _child_values(soft_value(q), children))


def r_along_path(
    q: Float[Tensor, "B T A"], tokens: Int64[Tensor, "B T"], lengths: Int64[Tensor, "B"]
) -> Float[Tensor, "B T"]:
    """The inverse of M along sequences, O(T A) each: r at each token, 0 past the end.

    ``q[:, t]`` is taken before ``tokens[:, t]``. A sequence's r sum to R_r(x, y) of
    arXiv 2512.15605, Eq. (5): the log-weight that the policy of q gives it, V_q(x) included.
    """
    last = length_mask(lengths.long() - 1, tokens.shape[1])[:, :-1]
    v_next = soft_value(q[:, 1:]).masked_fill(~last, 0.0)
    v_next = torch.cat([v_next, v_next.new_zeros(len(q), 1)], dim=1)
    r = _minus_value(gather_tokens(q, tokens), v_next)
    return r.masked_fill(~length_mask(lengths, tokens.shape[1]), 0.0)


def bellman_residual(q: Tables, r: Tables, space: TokenSpace) -> list[Tensor]:
    """b = q - r - V_q(s a) at allowed actions (finite r), else 0; q = M(r + b) exactly.

    0 too where q forbids an action after which it forbids everything; infinite where it
    forbids any other that r allows.
    """
    check_tables(space, q=q, r=r)
    b = []
    for t, (r_q, r_t) in enumerate(zip(r_from_q(q, space), r, strict=True)):
        forbidden = torch.isneginf(r_t) | ~space.action_mask(r_t.device)[t]
        if t + 1 < space.max_length:
            # Before a dead end both sides of Eq. (1) are -inf.
            stuck = torch.isneginf(space.spread(soft_value(q[t + 1]), fill=0.0))
            forbidden = forbidden | (stuck & torch.isneginf(q[t]))
        b.append((r_q - r_t).masked_fill(forbidden, 0.0))
    return b


def forward_log_marginals(log_pi: Tables, space: TokenSpace) -> list[Tensor]:
    """log-probability of every prefix under a policy: entry t has shape (..., branching**t).

    It is the derivative of V(x) with respect to r on the way there: arXiv 2512.15605,
    App. A.11 (forward-backward, App. A.9).
    """
    check_tables(space, log_pi=log_pi)
    marginals = [log_pi[0].new_zeros(log_pi[0].shape[:-1])]
    for log_pi_t in log_pi[:-1]:
        marginals.append(space.gather_children(marginals[-1][..., None] + log_pi_t))
    return marginals


def sequence_log_probs(log_pi: Tables, space: TokenSpace) -> Float[Tensor, "... N"]:
    """log-probability of every response, in enumeration order."""
    marginals = forward_log_marginals(log_pi, space)
    if space.eos_id is None:
        return (marginals[-1][..., None] + log_pi[-1]).flatten(-2)
    ends = [m + t[..., space.eos_id] for m, t in zip(marginals, log_pi, strict=True)]
    return torch.cat(ends, dim=-1)


def gather_tokens(
    rows: Float[Tensor, "B T A"], tokens: Int64[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """The entry of each row at its token."""
    return rows.gather(-1, tokens.long()[..., None])[..., 0]


def sequence_log_prob(
    log_pi: Float[Tensor, "B T A"], tokens: Int64[Tensor, "B T"], lengths: Int64[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """Sum over the real tokens of log pi: never normalised by length."""
    mask = length_mask(lengths, tokens.shape[1])
    return gather_tokens(log_pi, tokens).masked_fill(~mask, 0.0).sum(1)


def expectation(log_p: Float[Tensor, "..."], x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """exp(log_p) * x, elementwise, with 0 * inf = 0; the caller sums."""
    x = x.masked_fill(torch.isneginf(log_p), 0.0)
    # exp underflows to 0 where the probability is not: infinite x stay infinite there.
    infinite = torch.isinf(x)
    return torch.where(infinite, x, log_p.exp() * x.masked_fill(infinite, 0.0))


def rounded_up(x: Float[Tensor, "..."], terms: int) -> Float[Tensor, "..."]:
    """x, and 0 where it is below 0 by no more than what rounding makes of ``terms`` terms.

    For sums that are nonnegative in exact arithmetic, such as a KL. A number that is further
    below is an error (or the figure of a part) and stays as it is. The gradient is that of x.
    """
    slack = 64 * torch.finfo(x.dtype).eps * (1 + math.log(max(terms, 1)))
    with torch.no_grad():
        lift = -x.masked_fill((x > 0) | (x < -slack), 0.0)
    return x + lift


def check_tables(space: TokenSpace, **named: Tables) -> None:
    """Raise unless every argument holds the per-depth tables of ``space``.

    Raises:
        TypeError: no list of floating-point tensors, or a space that is none.
        ValueError: other sizes.
    """
    check_space(space)
    for name, tables in named.items():
        if not isinstance(tables, (list, tuple)):
            raise TypeError(
                f"{name} must be a list of tensors, one for each depth, got {shown(tables)}"
            )
        for t, table in enumerate(tables):
            if not (isinstance(table, Tensor) and table.dtype.is_floating_point):
                got = table.dtype if isinstance(table, Tensor) else type(table).__name__
                raise TypeError(
                    f"{name}[{t}] must be a tensor of floats, got {got}: use "
                    "torch.tensor(..., dtype=torch.float64)"
                )
        if len(tables) != space.max_length:
            raise ValueError(
                f"{name} has {len(tables)} tables, expected one for each of the "
                f"{space.max_length} depths"
            )
        for t, table in enumerate(tables):
            want = (space.num_prefixes(t), space.vocab_size)
            if tuple(table.shape[-2:]) != want:
                raise ValueError(
                    f"{name}[{t}] has shape {tuple(table.shape)}, expected (..., {want[0]}, "
                    f"{want[1]})"
                )


def _mask_last(table: Tensor, space: TokenSpace) -> Tensor:
    """At the last depth of EOS mode only EOS is allowed, whatever the table says."""
    return table.masked_fill(~space.action_mask(table.device)[-1], -torch.inf)


def _minus_value(q: Tensor, v_next: Tensor) -> Tensor:
    forbidden = torch.isneginf(q)
    stuck = torch.isneginf(v_next)
    if bool((stuck & ~forbidden).any()):
        raise ValueError(
            "q is finite at an action after which every action is forbidden: no r gives such "
            "a q; put -inf there"
        )
    # -inf - (-inf) would be nan, in the gradient too: v_next is taken out where q is -inf.
    return q - v_next.masked_fill(forbidden, 0.0)


def _child_values(v: Tensor, children: Tensor) -> Tensor:
    ends = children < 0
    return v[children.clamp(min=0)].masked_fill(ends, 0.0)


def _levels(children: Tensor) -> list[Tensor]:
    """Node numbers by depth. Node 0 is a root; so is any node that is nobody's child."""
    n, a = children.shape
    parent = torch.arange(n, device=children.device)[:, None].expand(n, a)
    inner = children >= 0
    if bool((children[inner] <= parent[inner]).any()):
        raise ValueError("children must stand after their parents: a child's number is too small")
    depth = torch.zeros(n, dtype=torch.int64, device=children.device)
    while True:
        deeper = depth.clone().index_put((children[inner],), depth[parent[inner]] + 1)
        if torch.equal(deeper, depth):
            break
        depth = deeper
    return [(depth == d).nonzero()[:, 0] for d in range(int(depth.max()) + 1)]
