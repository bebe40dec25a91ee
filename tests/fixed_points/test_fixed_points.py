"""Fixed points of penalised policy gradients, against gradients that are summed up by hand."""

from __future__ import annotations

import math
from itertools import islice, product

import pytest
import torch
from fixed_point_cases import PENALTIES, problem_of, small_ebm
from toy_policies import close, seeded

import rl_ebm
from rl_ebm.agents.policy_gradient import policy_gradient_loss
from rl_ebm.agents.shared.kl_penalty import PenaltyOptions
from rl_ebm.divergences import tv
from rl_ebm.fixed_points import Penalty, penalised
from rl_ebm.fixed_points.closed_form import best_of_n, hyperbolic_rule
from rl_ebm.fixed_points.flow import by_depth, field, follow
from rl_ebm.policies import Tabular
from rl_ebm.soft_bellman import log_policy, sequence_log_probs
from rl_ebm.tokens import length_mask

SPACES = [(3, 2, None), (2, 3, None), (3, 3, 0), (2, 3, 1)]
in_every_space = pytest.mark.parametrize("shape", SPACES, ids=lambda s: "-".join(map(str, s)))
INTERIOR = [("k2", "loss"), ("k3", "loss")]


def summed_gradient(ebm, theta, options, gain_scale=1.0, shift=0.0):
    """d theta / dt as the loss has it: each response alone, weighed by its probability."""
    space = ebm.space
    policy = Tabular.from_tables(
        list(theta.split([space.num_prefixes(t) for t in range(space.max_length)])), space
    )
    tokens, lengths = space.sequences()
    ids = torch.zeros_like(lengths)
    mask = length_mask(lengths, space.max_length)

    def log_pis():
        rows = log_policy(policy.logits(tokens).masked_fill(~space.action_mask(), -math.inf))
        return rows.gather(2, tokens[..., None])[..., 0].masked_fill(~mask, 0.0)

    with torch.no_grad():
        weights = log_pis().sum(1).exp()
    log_ref = ebm.log_ref(tokens, lengths, ids).double()
    gain = ebm.reward(tokens, lengths, ids).double() / ebm.beta * gain_scale + shift
    total = torch.zeros_like(policy.table)
    for i in range(len(tokens)):
        if not weights[i]:
            continue
        row = slice(i, i + 1)
        loss = policy_gradient_loss(
            log_pis()[row], log_ref[row], gain[row], lengths[row], ids[row], 1, options
        )
        total -= weights[i] * torch.autograd.grad(loss, policy.table)[0]
    return total[0]


def logits_of(problem, log_law):
    """Logits of the policy whose law this is: log-sums of the responses behind each action."""
    space = problem.space
    tokens, lengths = space.sequences()
    states = space.state_ids(tokens)
    total = torch.zeros(space.num_states, space.vocab_size, dtype=torch.float64)
    for y, n, row, p in zip(tokens.tolist(), lengths.tolist(), states, log_law.exp(), strict=True):
        for t in range(n):
            total[row[t], y[t]] += p
    return total.log().nan_to_num(neginf=-1e3)


# The gradient -----------------------------------------------------------------------------------


@in_every_space
@pytest.mark.parametrize("penalty", PENALTIES, ids="-".join)
def test_the_field_is_the_expected_gradient_of_the_agents_loss(shape, penalty):
    ebm = small_ebm(shape)
    problem = problem_of(ebm)
    theta = torch.randn(ebm.space.num_states, shape[0], generator=seeded(5), dtype=torch.float64)
    k, place, level = penalty
    options = PenaltyOptions(kl_estimator=k, kl_in=place, kl_level=level)
    want = summed_gradient(ebm, theta, options)
    assert float(want.abs().max()) > 0.01
    got = field(problem, theta, Penalty(k, place, level))
    mask = torch.cat([~torch.isneginf(t) for t in problem.log_ref])
    close(got[mask], want[mask], 1e-12)
    assert not got[~mask].any()


def test_the_field_of_a_standardised_advantage_is_that_of_a_large_group():
    ebm = small_ebm((3, 2, None))
    space, problem = ebm.space, problem_of(ebm)
    copies = 400  # of all responses: under a uniform policy, a group that is the law itself
    policy = Tabular(space, scale=0.0, dtype=torch.float64)
    tokens, lengths = space.sequences()
    tokens, lengths = tokens.repeat(copies, 1), lengths.repeat(copies)
    ids = torch.zeros_like(lengths)
    options = PenaltyOptions(kl_estimator="k3", kl_in="loss", advantage="group-std")
    log_pi = log_policy(policy.logits(tokens)).gather(2, tokens[..., None])[..., 0]
    log_ref = ebm.log_ref(tokens, lengths, ids).double()
    gain = ebm.reward(tokens, lengths, ids).double() / ebm.beta
    loss = policy_gradient_loss(log_pi, log_ref, gain, lengths, ids, 1, options, ebm.beta)
    want = -torch.autograd.grad(loss, policy.table)[0][0]
    got = field(problem, torch.zeros_like(want), Penalty("k3", "loss", group_std=True))
    assert float(want.abs().max()) > 0.05
    close(got, want, 1e-3)


# Closed forms -----------------------------------------------------------------------------------


@in_every_space
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("penalty", INTERIOR, ids="-".join)
def test_at_a_closed_form_the_gradient_of_the_loss_vanishes(shape, penalty, level):
    ebm = small_ebm(shape, seed=3)
    problem = problem_of(ebm)
    point = penalised(problem, Penalty(*penalty, level))
    assert not point.degenerate
    close(float(point.log_law.exp().sum()), 1.0, 1e-12)
    k, place = penalty
    options = PenaltyOptions(kl_estimator=k, kl_in=place, kl_level=level)
    theta = logits_of(problem, point.log_law)
    assert float(summed_gradient(ebm, theta, options).abs().max()) < 1e-10
    # The EBM is not one, but for the whole response under k2.
    away = float(summed_gradient(ebm, logits_of(problem, problem.log_target), options).abs().max())
    assert (away < 1e-10) == ((k, level) == ("k2", "sequence"))
    assert (float(tv(point.log_law, problem.log_target)) < 1e-8) == (away < 1e-10)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_standardised_advantage_scales_the_temperature_by_its_own_deviation(level):
    ebm = small_ebm((3, 2, None), seed=1)
    problem = problem_of(ebm)
    point = penalised(problem, Penalty("k3", "loss", level, group_std=True))
    assert point.how == "root"
    law, reward = point.log_law.exp(), problem.g_responses * ebm.beta
    sigma = float(((law * reward.square()).sum() - (law * reward).sum() ** 2).sqrt())
    options = PenaltyOptions(kl_estimator="k3", kl_in="loss", kl_level=level)
    theta = logits_of(problem, point.log_law)
    # (R - mean) / sigma against beta is R / (beta sigma) in nats.
    assert float(summed_gradient(ebm, theta, options, 1 / sigma).abs().max()) < 1e-9
    assert float(summed_gradient(ebm, theta, options).abs().max()) > 1e-3


def test_a_deviation_that_grows_stops_at_the_next_root_above_it():
    space = rl_ebm.TokenSpace(2, 1)
    ref = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    reward = torch.tensor([0.0, 1.0], dtype=torch.float64)
    ebm = rl_ebm.EBM(space, reward, 2.0, Tabular.from_tables([ref], space))
    problem = problem_of(ebm)
    point = penalised(problem, Penalty("k2", "loss", group_std=True))
    (other,) = point.other_roots
    # p / (1 - p) = exp(1 / (beta sigma)) / 9 with sigma^2 = p (1 - p): it has a root on either
    # side of p_ref's own sigma, and the deviation grows from there.
    for law in (point.log_law, other):
        p = float(law[1].exp())
        odds = math.exp(1 / (2.0 * math.sqrt(p * (1 - p)))) / 9
        assert p / (1 - p) == pytest.approx(odds, rel=1e-9)
    p, q = float(point.log_law[1].exp()), float(other[1].exp())
    assert q * (1 - q) < 0.1 * 0.9 < p * (1 - p)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 2, None), (2, 3, 1)])
@pytest.mark.parametrize(("k", "level"), [("k2", "token"), ("k3", "token"), ("k3", "sequence")])
@pytest.mark.parametrize("group_std", [False, True])
def test_the_flow_from_the_reference_ends_at_what_is_predicted(shape, k, level, group_std):
    ebm = small_ebm(shape, beta=1.0, seed=2)
    problem = problem_of(ebm)
    penalty = Penalty(k, "loss", level, group_std)
    point = penalised(problem, penalty)
    theta = torch.empty(0)
    for _, theta, rate in islice(follow(problem, penalty, tolerance=1e-8), 8000):  # noqa: B007
        if float(rate.abs().max()) < 1e-6:
            break
    law = sequence_log_probs(by_depth(problem, theta), problem.space)
    start = sequence_log_probs(problem.start(), problem.space)
    assert float(tv(point.log_law, start)) > 0.05
    assert float(tv(point.log_law, law)) < (0.02 if point.degenerate else 1e-4)


def test_the_hyperbolic_rule_is_found_by_bisection_too():
    g = seeded(4)
    log_ref = torch.log_softmax(torch.randn(40, 5, generator=g, dtype=torch.float64), 1)
    q = torch.cat([10.0 ** torch.arange(-6, 4.0)] * 4)[:, None] * torch.randn(
        40, 5, generator=g, dtype=torch.float64
    )
    log_ref[0, 2] = -math.inf
    q[0, 2] = 1e9  # forbidden, whatever it pays
    q[1] = 0.7
    got = hyperbolic_rule(log_ref, q).exp()
    for row, (ref, values) in enumerate(zip(log_ref.exp().tolist(), q.tolist(), strict=True)):
        terms = [(r, x) for r, x in zip(ref, values, strict=True) if r]
        best = max(x for _, x in terms)
        low, high = 0.0, 1.0  # lambda - best, of which sum r / (d + best - x) is 1
        for _ in range(200):
            middle = (low + high) / 2
            over = math.fsum(r / (middle + (best - x)) for r, x in terms) > 1
            low, high = (middle, high) if over else (low, middle)
        want = [r / (low + (best - x)) if r else 0.0 for r, x in zip(ref, values, strict=True)]
        close(got[row], torch.tensor(want, dtype=torch.float64), 1e-12)
    close(got[1], log_ref[1].exp(), 1e-14)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_best_of_n_is_that_of_all_tuples(n):
    log_ref = torch.log_softmax(torch.randn(4, generator=seeded(), dtype=torch.float64), 0)
    g = torch.tensor([0.3, -1.0, 0.3, 2.0], dtype=torch.float64)  # two tie
    p = log_ref.exp().tolist()
    want = [0.0] * 4
    for draws in product(range(4), repeat=n):
        weight = math.prod(p[i] for i in draws)
        best = [i for i in draws if g[i] == max(g[j] for j in draws)]
        for i in best:  # one of the best draws, at random
            want[i] += weight / len(best)
    for total in (0.0, 3.0):  # what draws are made of may have any total
        got = best_of_n(log_ref + total, g, n).exp()
        close(got, torch.tensor(want, dtype=torch.float64), 1e-12)


# The mean over the tokens -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 3, 0), (2, 3, 1)])
@pytest.mark.parametrize("penalty", INTERIOR, ids="-".join)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_with_the_mean_over_tokens_the_gradient_vanishes_at_the_root(shape, penalty, level):
    ebm = small_ebm(shape, seed=3)
    problem = problem_of(ebm)
    k, place = penalty
    options = PenaltyOptions(kl_estimator=k, kl_in=place, kl_level=level, reduce_tokens="mean")
    point = penalised(problem, Penalty(k, place, level, mean_tokens=True))
    close(float(point.log_law.exp().sum()), 1.0, 1e-12)
    b = float((point.log_law.exp() * problem.g_responses).sum())  # the baseline, of its own law

    def slope(log_law, b):
        return summed_gradient(ebm, logits_of(problem, log_law), options, shift=-b).abs().max()

    assert float(slope(point.log_law, b)) < 1e-10
    assert float(slope(point.log_law, b + 0.1)) > 1e-4
    summed = penalised(problem, Penalty(k, place, level))
    # E kappa' = 0 for k3 of the whole response: nothing moves there.
    stays = (k, level) == ("k3", "sequence")
    assert (float(tv(point.log_law, summed.log_law)) < 1e-8) == stays


def test_with_the_mean_over_tokens_the_penalty_in_the_reward_still_ends_at_the_ebm():
    ebm = small_ebm((3, 3, 0), seed=3)
    problem = problem_of(ebm)
    options = PenaltyOptions(reduce_tokens="mean")
    theta = logits_of(problem, problem.log_target)
    (log_z,) = rl_ebm.solve(ebm).log_z.tolist()
    at_target = summed_gradient(ebm, theta, options, shift=-log_z)  # E[g - u] = log Z there
    assert float(at_target.abs().max()) < 1e-10
    assert float(summed_gradient(ebm, theta, options).abs().max()) > 1e-3  # without a baseline
    close(penalised(problem, Penalty("k1", "reward", mean_tokens=True)).log_law, problem.log_target)
    # Without a baseline long responses are paid for their length, and it is another law.
    bare = penalised(problem, Penalty("k1", "reward", mean_tokens=True, baseline=False)).log_law
    at_bare = summed_gradient(ebm, logits_of(problem, bare), options)
    assert float(at_bare.abs().max()) < 1e-10
    assert float(tv(bare, problem.log_target)) > 1e-3
    for penalty in (Penalty("k1", "loss"), Penalty("k3", "reward")):
        assert penalised(problem, penalty._replace(mean_tokens=True)).log_law is None


@pytest.mark.parametrize("beta", [0.5, 0.05, 0.01])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_the_mean_over_tokens_the_baseline_is_the_laws_own_mean(beta, seed):
    problem = problem_of(small_ebm((3, 3, 0), beta=beta, seed=seed))
    law = penalised(problem, Penalty("k2", "loss", "sequence", mean_tokens=True)).log_law
    lengths = problem.space.sequences()[1]
    baseline = float((law.exp() * problem.g_responses).sum())
    # (g - b - u) / |y| is one number for all responses.
    rate = (problem.g_responses - baseline - (law - problem.log_ref_responses)) / lengths
    close(rate, rate[:1].expand_as(rate), 1e-8)


@pytest.mark.parametrize("penalty", INTERIOR, ids="-".join)
def test_without_a_baseline_the_mean_over_tokens_has_another_root(penalty):
    ebm = small_ebm((3, 3, 0), seed=3)
    problem = problem_of(ebm)
    options = PenaltyOptions(kl_estimator=penalty[0], kl_in=penalty[1], reduce_tokens="mean")
    bare = penalised(problem, Penalty(*penalty, mean_tokens=True, baseline=False)).log_law
    theta = logits_of(problem, bare)
    assert float(summed_gradient(ebm, theta, options).abs().max()) < 1e-10
    with_one = penalised(problem, Penalty(*penalty, mean_tokens=True)).log_law
    assert float(tv(bare, with_one)) > 1e-3


def test_with_a_fixed_length_the_mean_over_tokens_moves_nothing():
    problem = problem_of(small_ebm((3, 2, None)))
    for penalty in (Penalty("k3", "loss", "token", True), Penalty("k2", "loss")):
        close(
            penalised(problem, penalty._replace(mean_tokens=True)).log_law,
            penalised(problem, penalty).log_law,
            0.0,
        )
