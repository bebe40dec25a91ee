"""Bounds on the KL: their closed form, that they are attained, that nothing ever passes them."""

from __future__ import annotations

import math

import brute_force
import mpmath
import pytest
import torch
from brute_force import INF, SPACES, EnumeratedEBM, random_tables
from toy_policies import close

from rl_ebm import bounds
from rl_ebm.soft_bellman import log_policy
from rl_ebm.tokens import TokenSpace

in_all_spaces = pytest.mark.parametrize("shape", SPACES, ids=str)
SCALES = [1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0, 30.0]


def vector(values):
    return torch.tensor(values, dtype=torch.float64)


def never_above(small, large):
    assert (small <= large * (1 + 1e-12) + 1e-15).all()


def exact_k(span):
    """K(L) = u - 1 - log u, u = L / (1 - exp(-L)), to 50 digits."""
    with mpmath.workdps(80):
        u = mpmath.mpf(span) / -mpmath.expm1(-mpmath.mpf(span))
        return u - 1 - mpmath.log(u)


def relative_errors(spans, dtype=torch.float64):
    got = bounds.span_kl(torch.tensor(spans, dtype=dtype)).tolist()
    spans = torch.tensor(spans, dtype=dtype).tolist()  # as rounded
    return [
        float(abs(k - exact_k(span)) / exact_k(span)) for k, span in zip(got, spans, strict=True)
    ]


# K(L) -----------------------------------------------------------------------------------------


def test_k_agrees_with_its_closed_form_at_high_precision():
    spans = [10 ** (i / 40) for i in range(-480, 121)]  # 1e-12 to 1e3
    assert max(relative_errors(spans)) < 2e-14
    assert max(relative_errors(spans[240:], torch.float32)) < 2e-5


def test_k_is_continuous_where_its_series_ends():
    spans = [0.01 + i / 1000 for i in range(500)] + [0.05, math.nextafter(0.05, 0.0)]
    assert max(relative_errors(spans)) < 2e-14


def test_k_at_its_ends_and_its_gradient():
    span = vector([0.0, 1e-9, 0.049, 0.051, 2.0, 700.0, 1e5, INF]).requires_grad_()
    k = bounds.span_kl(span)
    assert k[0] == 0
    assert k[-1] == INF
    (grad,) = torch.autograd.grad(k.sum(), span)
    assert torch.isfinite(grad).all()
    # K'(L) = (1 - 1/u) u'
    with mpmath.workdps(60):
        want = [float(mpmath.diff(exact_k, x)) for x in span[1:-1].tolist()]
    torch.testing.assert_close(grad[1:-1], vector(want), rtol=1e-9, atol=0.0)
    assert grad[0] == 0


def test_k_is_below_hoeffding_and_below_the_span_and_grows():
    spans = torch.logspace(-6, 3, 2000, dtype=torch.float64)
    k = bounds.span_kl(spans)
    never_above(k, torch.minimum(spans.square() / 8, spans))
    assert (k.diff() > 0).all()


@pytest.mark.parametrize("span", [1e-2, 0.1, 1.0, 5.0, 30.0])
def test_k_is_attained_by_a_two_level_error(span):
    top = 1 / -math.expm1(-span) - 1 / span
    log_p = [math.log(top), math.log1p(-top)]
    log_q = brute_force.log_softmax([log_p[0] - span, log_p[1]])
    attained = brute_force.kl(log_p, log_q)
    assert bounds.span_kl(vector(span)).item() == pytest.approx(attained, rel=1e-11, abs=1e-15)
    # Any other mass on the top level gives less.
    for other in (0.9 * top, 0.5 * (1 + top)):
        log_p = [math.log(other), math.log1p(-other)]
        log_q = brute_force.log_softmax([log_p[0] - span, log_p[1]])
        assert brute_force.kl(log_p, log_q) < attained


# Errors of logits -----------------------------------------------------------------------------


def logits_with_gaps():
    """delta, q, q*: random, q* with forbidden actions, q forbidding some that are allowed."""
    q_star = random_tables(4, 1, seed=1, forbid=0.3, leading=(60,))[0][:, 0]
    q = random_tables(4, 1, seed=2, forbid=0.1, leading=(60,))[0][:, 0]
    q_star[0] = -INF
    q_star[1] = vector([0.4, -INF, -INF, -INF])
    return q, q_star


def allowed_errors(q, q_star):
    return [b - a if b > -INF else None for a, b in zip(q, q_star, strict=True)]


def test_logit_span_is_the_largest_difference_of_two_errors():
    q, q_star = logits_with_gaps()
    want = []
    for a, b in zip(q.tolist(), q_star.tolist(), strict=True):
        errors = [d for d in allowed_errors(a, b) if d is not None]
        pairs = [x - y for x in errors for y in errors if math.isfinite(x) and math.isfinite(y)]
        want.append(INF if INF in errors else max(pairs, default=0.0))
    close(bounds.logit_span(q, q_star), vector(want))
    assert INF in want
    assert want[0] == 0.0


def test_centred_errors_are_less_their_mean_over_allowed_actions():
    q, q_star = logits_with_gaps()
    want = []
    for a, b in zip(q.tolist(), q_star.tolist(), strict=True):
        errors = allowed_errors(a, b)
        real = [d for d in errors if d is not None]
        if INF in real:
            want.append([0.0 if d is None else INF for d in errors])
        else:
            mean = math.fsum(real) / max(len(real), 1)
            want.append([0.0 if d is None else d - mean for d in errors])
    close(bounds.centre(q_star - q, q_star), vector(want))


def test_a_constant_for_each_state_changes_neither_span_nor_centred_error():
    q, q_star = logits_with_gaps()
    shift = torch.arange(60.0).double()[:, None]
    close(bounds.logit_span(q + shift, q_star), bounds.logit_span(q, q_star), 1e-10)
    close(bounds.centre(q_star - q - shift, q_star), bounds.centre(q_star - q, q_star), 1e-10)


def test_one_allowed_action_has_no_error():
    q_star, q = vector([[-INF, 0.3, -INF]]), vector([[5.0, -7.0, -INF]])
    assert bounds.logit_span(q, q_star).item() == 0
    assert bounds.centre(q_star - q, q_star).tolist() == [[0.0, 0.0, 0.0]]


# Sequences ------------------------------------------------------------------------------------


def test_prop3_is_two_t_times_half_the_span():
    """With the best constant c, max |delta - c| is half of max delta - min delta."""
    delta = vector([0.3, -0.9, 1.4])
    grid = torch.linspace(-2, 2, 40_001, dtype=torch.float64)
    best = (delta - grid[:, None]).abs().amax(1).min().item()
    span = bounds.logit_span(vector([0.0] * 3), delta)
    assert bounds.prop3_bound(span, 5).item() == pytest.approx(2 * 5 * best, abs=1e-3)
    got = bounds.prop3_bound(vector([1.0, 2.0]), torch.tensor([3, 4]))
    close(got, vector([3.0, 8.0]))
    assert bounds.prop3_bound(vector(INF), 5) == INF


def test_the_span_bound_counts_decisions_that_are_not_forced():
    span = vector([0.0, 0.5, INF])
    for shape, n in [((3, 4, None), 4), ((3, 4, 0), 3), ((3, 2, 1), 1)]:
        close(bounds.span_bound(span, TokenSpace(*shape)), n * bounds.span_kl(span))
    # EOS alone: one response, no decision, nothing to get wrong.
    assert bounds.span_bound(span, TokenSpace(3, 1, 1)).tolist() == [0.0, 0.0, 0.0]


@in_all_spaces
def test_the_occupancy_bound_weighs_each_state_by_its_probability(shape):
    r = random_tables(*shape, seed=3)
    truth = EnumeratedEBM(r, shape[2])
    log_pi = [log_policy(q) for q in truth.q_tables()]
    spans = [t[:, 0].nan_to_num(neginf=1.3).abs() for t in random_tables(*shape, seed=4)]
    want = math.fsum(
        math.exp(truth.prefix_log_prob(s)) * float(exact_k(span))
        for states, table in zip(truth.states, spans, strict=True)
        for s, span in zip(states, table.tolist(), strict=True)
    )
    close(bounds.occupancy_bound(log_pi, spans, TokenSpace(*shape)), vector(want))


def test_the_occupancy_bound_forgets_states_out_of_reach_and_no_others():
    space, half = TokenSpace(2, 2), [math.log(0.5)] * 2
    spans = [vector([1.0]), vector([2.0, INF])]
    k = [float(exact_k(x)) for x in (1.0, 2.0)]
    never = [vector([[0.0, -INF]]), vector([half, half])]
    close(bounds.occupancy_bound(never, spans, space), vector(sum(k)))
    # exp(-1e4) is 0 in floating point, and 0 * inf is nan.
    hardly = [vector([[0.0, -1e4]]), vector([half, half])]
    assert bounds.occupancy_bound(hardly, spans, space) == INF


def test_one_state_no_error_of_span_l_gives_more_than_k():
    for actions in (2, 3, 8):
        for i, scale in enumerate(SCALES):
            q, q_star = random_tables(actions, 1, seed=5 + i, scale=scale, leading=(2, 1000))[0]
            log_p, log_q = log_policy(q), log_policy(q_star)
            most = bounds.span_kl(bounds.logit_span(q, q_star))[:, 0]
            for a, b in ((log_p, log_q), (log_q, log_p)):
                never_above((a.exp() * (a - b)).sum(-1)[:, 0], most)


@pytest.mark.parametrize(
    "shape", [(4, 3, None), (4, 4, None), (4, 3, 0), (4, 4, 1), (4, 4, 3)], ids=str
)
@pytest.mark.parametrize("forbid", [0.0, 0.2])
@pytest.mark.parametrize("scale", SCALES)
def test_kl_never_passes_occupancy_span_and_prop_3(shape, scale, forbid):
    """150 random pairs each, as leading dimension; probabilities by enumeration."""
    space = TokenSpace(*shape)
    q_star = random_tables(*shape, seed=6, leading=(150,))
    error = random_tables(*shape, seed=7, scale=scale, leading=(150,))
    hole = random_tables(*shape, seed=8, forbid=forbid, leading=(150,))
    for t, h in zip(q_star, hole, strict=True):
        column = shape[2] if shape[2] is not None else 0
        h[..., column] = 0.0  # an action everywhere
        t[torch.isneginf(h)] = -INF
    q = [a + b.nan_to_num(neginf=0.0) for a, b in zip(q_star, error, strict=True)]
    log_pi, log_star = ([log_policy(t) for t in tables] for tables in (q, q_star))
    spans = [bounds.logit_span(a, b) for a, b in zip(q, q_star, strict=True)]
    max_span = torch.cat(spans, dim=-1).amax(-1)
    span = bounds.span_bound(max_span, space)
    prop3 = bounds.prop3_bound(max_span, space.max_length)
    never_above(span, prop3)
    # Prop. 3 as printed, with the logits as they come.
    delta = [(a - b).nan_to_num().abs().flatten(1) for a, b in zip(q, q_star, strict=True)]
    never_above(prop3, 2 * space.max_length * torch.cat(delta, 1).amax(1))

    log_p, log_p_star = (brute_force.sequence_log_probs(x, shape[2]) for x in (log_pi, log_star))
    possible = torch.isfinite(log_p_star)
    log_ratio = (log_p - log_p_star).masked_fill(~possible, 0.0)
    of_ratio = bounds.span_kl(
        log_ratio.masked_fill(~possible, -INF).amax(-1)
        - log_ratio.masked_fill(~possible, INF).amin(-1)
    )
    for states, log_a, sign in ((log_pi, log_p, 1), (log_star, log_p_star, -1)):
        kl = (log_a.exp() * sign * log_ratio).sum(-1)
        occupancy = bounds.occupancy_bound(states, spans, space)
        never_above(kl, occupancy)
        never_above(occupancy, span)
        never_above(kl, of_ratio)
        assert (kl > 0).double().mean() > 0.9  # but for what the gaps have decided


@pytest.mark.parametrize("size", [1e-3, 0.3, 10.0])
def test_a_bellman_residual_bounds_the_kl_by_the_span_it_leaves_on_responses(size):
    """q = M(r + b): the log-ratio is R_b up to a constant, so KL <= K(span of R_b)."""
    shape = (3, 3, 1)
    r = random_tables(*shape, seed=9)
    b = random_tables(*shape, seed=10, scale=size)
    both = EnumeratedEBM([x + y for x, y in zip(r, b, strict=True)], 1)
    truth, error = EnumeratedEBM(r, 1), EnumeratedEBM(b, 1)
    span = vector(max(error.log_weights) - min(error.log_weights))
    kl = brute_force.kl(both.log_probs, truth.log_probs)
    assert 0 < kl <= bounds.span_kl(span).item()


# One state, weighing its actions --------------------------------------------------------------


def brute_force_split(p, q):
    """The best split of the allowed actions, in p's order, by its definition."""
    allowed = sorted((i for i, x in enumerate(p) if x > 0), key=lambda i: -p[i])
    inside = sum(q[i] for i in allowed)
    if inside == 0:
        return INF
    best = INF
    for k in range(1, len(allowed) + 1):
        total = -math.log(inside)
        for part in (allowed[:k], allowed[k:]):
            if not part:
                continue
            m, n = sum(p[i] for i in part), sum(q[i] for i in part) / inside
            if any(q[i] == 0 for i in part):
                total = INF
                break
            ratios = [math.log(p[i] / q[i]) for i in part]
            span = max(ratios) - min(ratios)
            total += m * math.log(m / n) + m * float(exact_k(span) if span > 0 else 0)
        best = min(best, total)
    return best


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_the_split_bound_is_the_best_of_all_splits(scale):
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 3, 5):
        for zeros in range(n):
            logits = scale * torch.randn(2, n, generator=g, dtype=torch.float64)
            logits[0, :zeros] = -INF
            log_p, log_q = (row[torch.randperm(n, generator=g)] for row in log_policy(logits))
            want = brute_force_split(log_p.exp().tolist(), log_q.exp().tolist())
            close(bounds.split_kl(log_p, log_q), vector(want), 1e-11)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("n", [2, 3, 8])
def test_kl_never_passes_the_split_bound_nor_that_bound_k(scale, n):
    g = torch.Generator().manual_seed(n)
    log_p = log_policy(3 * torch.randn(4000, n, generator=g, dtype=torch.float64).pow(3))
    noise = scale * torch.randn(4000, n, generator=g, dtype=torch.float64)
    log_q = log_policy(log_p + noise)
    kl, got = (log_p.exp() * (log_p - log_q)).sum(-1), bounds.split_kl(log_p, log_q)
    assert (kl <= got * (1 + 1e-9) + 1e-13).all()
    assert (got <= bounds.span_kl(bounds.logit_span(log_q, log_p)) * (1 + 1e-9) + 1e-13).all()
    if n == 2:
        close(got, kl.clamp(min=0), 1e-11)


def test_an_error_at_an_action_that_p_hardly_takes_costs_little():
    log_p = log_policy(vector([0.0, -1.0, -30.0]))
    log_q = log_policy(vector([0.0, -1.0, -70.0]))
    assert float(bounds.span_kl(bounds.logit_span(log_q, log_p))) > 30
    assert float(bounds.split_kl(log_p, log_q)) < 1e-10


def test_the_split_bound_at_its_ends():
    p, q = vector([0.5, 0.5, 0.0]).log(), vector([0.5, 0.25, 0.25]).log()
    close(bounds.split_kl(p, q), vector(0.5 * math.log(2)))
    assert float(bounds.split_kl(p, vector([1.0, 0.0, 0.0]).log())) == INF
    dead = torch.full((3,), -INF, dtype=torch.float64)
    assert float(bounds.split_kl(dead, q)) == 0
    assert float(bounds.split_kl(q, q)) == 0
