"""Edges that a wrong mask, a wrong side or a wrong draw would pass unseen."""

from __future__ import annotations

import itertools
import math

import gymnasium
import numpy as np
import pytest
import torch
from brute_force import INF, log_sum_exp, prefixes, random_tables
from toy_policies import seeded

import rl_ebm
from rl_ebm.exact.automaton import sampling as automaton_sample
from rl_ebm.exact.tree import backup
from rl_ebm.policies import Tabular
from rl_ebm.soft_bellman import bellman_residual
from rl_ebm.tokens import TokenSpace

# The Bellman residual ----------------------------------------------------------------------------


def residual(q, r, space):
    """By Eq. (1) in Python: state by state, action by action."""
    place = [
        {s: i for i, s in enumerate(prefixes(space.vocab_size, t, space.eos_id))}
        for t in range(space.max_length)
    ]
    last, out = space.max_length - 1, []
    for t, states in enumerate(place):
        table = torch.zeros_like(q[t])
        for s, i in states.items():
            for a in range(space.vocab_size):
                if space.eos_id is not None and t == last and a != space.eos_id:
                    continue
                ends = t == last or a == space.eos_id
                if ends:
                    v = 0.0
                else:
                    row = q[t + 1][place[t + 1][(*s, a)]].tolist()
                    if space.eos_id is not None and t + 1 == last:
                        row = [row[space.eos_id]]
                    v = log_sum_exp(row)
                mine, paid = float(q[t][i, a]), float(r[t][i, a])
                if paid == -INF or (mine == -INF and v == -INF):
                    continue  # r forbids it, or both sides of the equation are -inf
                table[i, a] = mine - paid - v
        out.append(table)
    return out


@pytest.mark.parametrize("shape", [(3, 3, None), (3, 4, 1), (2, 3, 0), (4, 1, None)])
def test_the_residual_looks_at_allowed_actions_alone(shape):
    space = TokenSpace(*shape)
    for seed in range(6):
        r = random_tables(*shape, seed=seed, forbid=0.3)
        # A q that is finite where r forbids, and -inf at some actions that r allows.
        q = random_tables(*shape, seed=50 + seed, forbid=0.2 * (seed % 2))
        for t in range(len(q) - 1):  # no finite q before a dead end: no r gives such a q
            dead = torch.isneginf(space.spread(torch.logsumexp(q[t + 1], -1), fill=0.0))
            q[t] = q[t].masked_fill(dead, -INF)
        for t in reversed(range(len(q) - 1)):
            dead = torch.isneginf(space.spread(torch.logsumexp(q[t + 1], -1), fill=0.0))
            q[t] = q[t].masked_fill(dead, -INF)
        found = bellman_residual(q, r, space)
        for got, want in zip(found, residual(q, r, space), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
            assert not bool(got.isnan().any())


def test_the_report_has_the_residual_of_allowed_actions_alone():
    space = TokenSpace(3, 2)
    scores = torch.randn(9, generator=seeded(2), dtype=torch.float64)
    scores[[1, 5]] = -INF
    solution = rl_ebm.solve(rl_ebm.EBM(space, scores))
    exact = [t[0] for t in solution.tables()]

    def largest(tables):
        policy = Tabular.from_tables([t[None] for t in tables], space)
        policy.logits_are_values = True
        report = rl_ebm.verify(policy, solution)
        return report.bellman_residual_max, report.bellman_residual_mean

    assert largest(exact)[0] == pytest.approx(0, abs=1e-12)
    # Off by 0.25 at one allowed action of the last depth, p* = 1 / 3 of its state among 3.
    off = [t.clone() for t in exact]
    off[1][0, 0] += 0.25
    after = [math.fsum(map(math.exp, row)) for row in off[1].tolist()]
    shift = abs(math.log(after[0]) - float(torch.logsumexp(exact[1][0], -1)))
    assert largest(off)[0] == pytest.approx(max(0.25, shift))
    # A weight on what the EBM forbids enters V of its state, and nothing else.
    off = [t.clone() for t in exact]
    off[1][0, 1] = 0.7
    want = math.log(sum(map(math.exp, off[1][0].tolist()))) - float(exact[0][0, 0])
    assert largest(off)[0] == pytest.approx(abs(want))
    # What the EBM allows and the policy forbids is no residual that is finite.
    off = [t.clone() for t in exact]
    off[1][0, 0] = -INF
    assert largest(off) == (INF, INF)


# Sums of a chunk ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "edges"), [
    (torch.float32, [15.9, 16.1, 59.9, 60.1, 75.0, 80.0, 88.0, 100.0, 200.0, 3e4, 1e30]),
    (torch.float64, [599.9, 600.1, 650.0, 695.0, 700.0, 708.0, 709.9, 746.0, 1e5, 1e200]),
])  # fmt: skip
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sums_of_a_full_chunk_on_either_side_of_the_edge_of_overflow(dtype, edges, sign):
    """All leaves alike: V = R / beta + (T - t) log A, whatever the exponent's range."""
    space = TokenSpace(2, 14)
    for x, beta in itertools.product(edges, (1.0, 0.25)):
        scores = torch.full((2**14,), sign * x * beta, dtype=dtype)
        paid = float(scores[0].double()) / beta
        solution = rl_ebm.solve(rl_ebm.EBM(space, scores, beta))
        want = paid + 14 * math.log(2)
        assert float(solution.log_z) == pytest.approx(
            want, rel=1e-6 if dtype.itemsize == 4 else 1e-13
        )
        for t, v in enumerate(solution.v):
            close = pytest.approx(paid + (14 - t) * math.log(2), rel=2e-6)
            assert float(v.min()) == close
            assert float(v.max()) == close
        tokens = torch.tensor([[0, 1] * 7])
        assert float(solution.log_prob(tokens)) == pytest.approx(-14 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("span", [599.0, 601.0, 700.0, 744.0, 760.0, 1e4])
def test_the_smallest_leaves_of_a_chunk_keep_their_values(monkeypatch, span):
    """Subtrees that lie far below the rest of their chunk have values of their own."""
    monkeypatch.setattr(backup, "_CHUNK", 2**6)
    space = TokenSpace(2, 8)
    scores = torch.randn(256, generator=seeded(0), dtype=torch.float64)
    scores[128:144] -= span
    scores[64:128] += span
    solution = rl_ebm.solve(rl_ebm.EBM(space, scores))
    for t, v in enumerate(solution.v):
        n = 2 ** (8 - t)
        for i, value in enumerate(v[0].tolist()):
            assert value == pytest.approx(log_sum_exp(scores[i * n : (i + 1) * n].tolist()), 1e-11)


# Draws at the ends of their range -----------------------------------------------------------------


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_a_weight_of_0_is_never_picked(monkeypatch, u):
    monkeypatch.setattr(
        torch, "rand", lambda n, **kwargs: torch.full((n,), u, dtype=kwargs["dtype"])
    )
    weights = [[0.0, 0.3, 0.0, 0.7, 0.0], [0.0, 0.0, 1.0], [0.4, 0.6], [0.0, 1e-300, 0.0]]
    log_weight = torch.tensor([x for w in weights for x in w], dtype=torch.float64).log()
    segment = torch.tensor([i for i, w in enumerate(weights) for _ in w])
    asked = torch.tensor([0, 1, 2, 3, 1, 0])
    found = automaton_sample._pick(log_weight, segment, len(weights), asked, None)
    starts = [0, 5, 8, 10]
    for place, s in zip(found.tolist(), asked.tolist(), strict=True):
        positive = [starts[s] + i for i, w in enumerate(weights[s]) if w > 0]
        assert place == (positive[0] if u == 0 else positive[-1])


def test_picks_are_drawn_by_their_weights():
    log_weight = torch.tensor([0.2, 0.0, 0.8, 1.0, 3.0], dtype=torch.float64).log()
    segment, n = torch.tensor([0, 0, 0, 1, 1]), 20_000
    asked = torch.tensor([0, 1]).repeat(n)
    found = automaton_sample._pick(log_weight, segment, 2, asked, seeded(0))
    share = found.bincount(minlength=5) / n
    for got, want in zip(share.tolist(), [0.2, 0.0, 0.8, 0.25, 0.75], strict=True):
        assert abs(got - want) <= 5 * math.sqrt(want * (1 - want) / n)


# Prompts of a batch of environments ---------------------------------------------------------------


def test_only_rows_that_begin_anew_draw_a_prompt():
    """The draws are those of one generator, one for each new response, in the order of rows."""
    n, prompts = 7, [[0], [1, 1], [2], [], [0, 2]]
    space = TokenSpace(3, 5, eos_id=1)
    ebm = rl_ebm.EBM(space, lambda tokens, lengths, ids: lengths.double(), prompts=prompts)
    envs = gymnasium.make_vec("rl_ebm/TokenMDP-v0", num_envs=n, ebm=ebm)
    _, info = envs.reset(seed=11)
    rng, _ = gymnasium.utils.seeding.np_random(11)
    want = rng.integers(len(prompts), size=n)
    assert info["prompt_id"].tolist() == want.tolist()
    actions, ended = np.random.default_rng(5), np.zeros(n, dtype=bool)
    together = 0
    for _ in range(60):
        if ended.any():
            together += 0 < ended.sum() < n
            want = want.copy()
            want[ended] = rng.integers(len(prompts), size=int(ended.sum()))
        _, _, ended, _, info = envs.step(actions.integers(3, size=n))
        assert info["prompt_id"].tolist() == want.tolist()
    assert together > 20
