"""Verification from samples: against that at every prefix, and how often its intervals hold."""

from __future__ import annotations

import math
import statistics
from functools import cache

import pytest
import torch
from automaton_cases import random_case

import rl_ebm
from rl_ebm.policies import Tabular
from rl_ebm.rewards import Automaton
from rl_ebm.statistics.expectations import bounded
from rl_ebm.statistics.interval import Interval
from rl_ebm.verification.along_samples import verify_sampled
from rl_ebm.verification.figures import FIGURES
from rl_ebm.verification.reading import by_key
from rl_ebm.verification.verify import verify_listed

MEANS = (
    "kl_target_policy",
    "kl_policy_target",
    "tv",
    "js",
    "hellinger2",
    "entropy_target",
    "entropy_policy",
    "expected_reward_target",
    "expected_reward_policy",
    "kl_target_reference",
    "kl_policy_reference",
    "mass_impossible",
    "bounds/occupancy",
)


def _key(figure):
    return figure.key


def cases():
    """Three EBMs of some size where everything is possible, with a policy of random logits."""
    found = []
    for seed in range(1000):
        ebm, _ = random_case(seed, zeros=0.0)
        if ebm.space.num_sequences >= 20:
            g = torch.Generator().manual_seed(seed)
            found.append((ebm, Tabular(ebm.space, ebm.prompts, 0.7, g, logits_are_values=True)))
        if len(found) == 8:
            return found
    raise AssertionError("no such cases")


CASES = cases()
in_all_cases = pytest.mark.parametrize(
    ("ebm", "policy"), CASES, ids=[str(e.space) for e, _ in CASES]
)


@cache
def both(i):
    """The reports of a case at every prefix and from many samples."""
    ebm, policy = CASES[i]
    solution = rl_ebm.solve(ebm)
    g = torch.Generator().manual_seed(0)
    return verify_listed(policy, solution), verify_sampled(policy, solution, 3000, 0.9999, g)


def mean_over_states(ebm, policy, of_target, terms):
    """Of the states that a law visits, each as often as it does: the mean over the prompts."""
    solution, means = rl_ebm.solve(ebm), []
    for prompt in range(ebm.num_prompts):
        tokens, lengths = ebm.space.sequences()
        ids = torch.full_like(lengths, prompt)
        law = solution if of_target else policy
        p = rl_ebm.policies.log_prob(law, ebm.space, tokens, lengths, ids).detach().exp().double()
        q, q_star = (
            rl_ebm.policies.q_values(x, ebm.space, tokens, ids).detach() for x in (policy, solution)
        )
        real = torch.arange(ebm.space.max_length) < lengths[:, None]
        total = terms(ebm, tokens, lengths, ids, q, q_star).masked_fill(~real, 0.0).sum(1)
        means.append(float(p @ total / (p @ lengths.double())))
    return statistics.fmean(means)


def errors(ebm, tokens, lengths, ids, q, q_star):
    allowed = torch.isfinite(q_star)
    delta = (q - q_star).masked_fill(~allowed, 0.0)
    delta = delta - (delta.sum(-1) / allowed.sum(-1))[..., None]
    return delta.masked_fill(~allowed, 0.0).abs().amax(-1)


def residuals(ebm, tokens, lengths, ids, q, q_star):
    chosen = q.gather(2, tokens[..., None])[..., 0]
    after = torch.cat([q.logsumexp(-1)[:, 1:], torch.zeros(len(q), 1)], 1)
    ends = torch.arange(ebm.space.max_length) == lengths[:, None] - 1
    paid = ebm.reward(tokens, lengths, ids).double() / ebm.beta
    after = torch.where(ends, paid[:, None], after)
    return (chosen - ebm.log_ref(tokens, lengths, ids) - after).abs()


# The truth of what samples alone tell; of visits, the Bellman residual is that of their tokens.
ALONE = {
    "logits_linf_target": (True, errors),
    "logits_linf_policy": (False, errors),
    "bellman_residual_mean": (True, residuals),
    "bellman_residual_mean_policy": (False, residuals),
}


@pytest.mark.parametrize("i", range(len(CASES)), ids=[str(e.space) for e, _ in CASES])
@pytest.mark.parametrize("figure", [f for f in FIGURES if f.sampled is not None], ids=_key)
def test_every_sampled_figure_holds_its_exact_value(figure, i):
    """A new entry of the table is in here: at every prefix and along samples it is one number."""
    exact, report = both(i)
    if figure.key in ALONE:
        truth = mean_over_states(*CASES[i], *ALONE[figure.key])
    else:
        truth = exact.scalars()[figure.key]
    found = by_key(report)[figure.key]
    if not isinstance(found, Interval):
        assert found == pytest.approx(truth, rel=1e-12)
        return
    size = max(1.0, abs(truth))
    assert found.low - 1e-9 <= truth <= found.high + 1e-9
    if found.high == math.inf:
        # A maximum; of so few states all were visited.
        assert found.estimate == pytest.approx(truth, rel=1e-9)
    else:
        assert abs(found.estimate - truth) < 0.25 * size
        assert found.width < 0.5 * size


@pytest.mark.parametrize("i", range(len(CASES)), ids=[str(e.space) for e, _ in CASES])
def test_every_depth_and_the_worst_prefix_are_those_of_all_prefixes(i):
    exact, report = both(i)
    for mine, theirs in zip(report.per_depth, exact.per_depth, strict=True):
        assert mine.mean_kl.low - 1e-12 <= theirs.mean_kl <= mine.mean_kl.high + 1e-12
        assert mine.linf == pytest.approx(theirs.linf, rel=1e-9)
    depths = math.fsum(d.mean_kl.estimate for d in report.per_depth)
    assert depths == pytest.approx(report.kl_target_policy.estimate, rel=1e-9)
    best, known = report.worst_prefixes[0], exact.worst_prefixes[0]
    assert best.prefix == known.prefix
    assert best.delta == pytest.approx([known.delta[a] for a in best.actions])
    assert best.kl == pytest.approx(known.kl)
    if best.prompt_id == known.prompt_id and known.probability_policy > 0:
        assert math.exp(best.log_probability_target) == pytest.approx(known.probability_target)
        assert math.exp(best.log_probability_policy) == pytest.approx(known.probability_policy)


@pytest.mark.slow
def test_intervals_hold_as_often_as_they_say():
    ebm, policy = CASES[0]
    solution = rl_ebm.solve(ebm)
    truth = verify_listed(policy, solution).scalars()
    confidence, runs = 0.8, 150
    missed = dict.fromkeys(MEANS, 0)
    for seed in range(runs):
        g = torch.Generator().manual_seed(seed)
        found = verify_sampled(policy, solution, 60, confidence, g).intervals()
        for name in MEANS:
            low, high = found[name].low - 1e-9, found[name].high + 1e-9
            missed[name] += not low <= truth[name] <= high
    # Four standard deviations above what is allowed; asymptotic ones get three per cent more.
    spread = 4 * math.sqrt(runs * confidence * (1 - confidence))
    for name, count in missed.items():
        bounded_ones = ("tv", "js", "hellinger2", "mass_impossible", "entropy_target")
        extra = 0 if name in (*bounded_ones, "entropy_policy") else 0.03 * runs
        assert count <= runs * (1 - confidence) + spread + extra, (name, count)


@in_all_cases
def test_the_exact_policy_has_no_error(ebm, policy):
    solution = rl_ebm.solve(ebm)
    report = verify_sampled(solution, solution, 50, generator=torch.Generator().manual_seed(0))
    for name in ("kl_target_policy", "kl_policy_target", "tv", "js", "logits_linf"):
        assert report.intervals()[name].estimate == pytest.approx(0.0, abs=1e-9)
    assert report.bellman_residual_max.estimate < 1e-9


def test_residuals_are_those_of_the_transitions_that_were_visited():
    ebm, policy = next((e, p) for e, p in CASES if e.space.eos_id is not None)
    solution = rl_ebm.solve(ebm)
    report = verify_sampled(policy, solution, 200, generator=torch.Generator().manual_seed(1))
    ids = torch.zeros(200, dtype=torch.int64)
    batch = solution.sample(200, torch.Generator().manual_seed(1), ids)
    q = rl_ebm.policies.q_values(policy, ebm.space, batch.tokens, batch.prompt_ids)
    log_ref = ebm.log_ref(batch.tokens, batch.lengths, batch.prompt_ids)
    gain = ebm.reward(batch.tokens, batch.lengths, batch.prompt_ids) / ebm.beta
    sizes = []
    for i, n in enumerate(batch.lengths.tolist()):
        for t in range(n):
            q_t = float(q[i, t, batch.tokens[i, t]].detach())
            last = t == n - 1
            after = float(gain[i]) if last else float(q[i, t + 1].detach().logsumexp(0))
            sizes.append(abs(q_t - float(log_ref[i, t]) - after))
    got = report.per_prompt[0] if report.per_prompt else report
    assert got.bellman_residual_mean.estimate == pytest.approx(statistics.fmean(sizes), rel=1e-5)
    assert got.bellman_residual_max.estimate >= max(sizes) - 1e-5


def test_a_policy_that_gives_mass_to_the_impossible_is_infinitely_far():
    space = rl_ebm.TokenSpace(3, 5, eos_id=0)
    ebm = rl_ebm.EBM(
        space, Automaton.avoids(space, [1, 2]), reference=rl_ebm.policies.Uniform(space)
    )
    solution = rl_ebm.solve(ebm)
    policy = rl_ebm.policies.Uniform(space)
    exact = verify_listed(policy, solution)
    report = verify_sampled(policy, solution, 2000, 0.999, torch.Generator().manual_seed(0))
    assert report.kl_policy_target == Interval(math.inf, math.inf, math.inf, 0.999, "finite-sample")
    assert report.bounds.occupancy.estimate == math.inf
    assert report.log_ratio_span.estimate == math.inf
    for name in ("mass_impossible", "tv", "kl_target_policy", "js"):
        interval = report.intervals()[name]
        assert interval.low <= exact.scalars()[name] <= interval.high
    assert report.expected_reward_policy.estimate == -math.inf
    text = str(report)
    assert "nan" not in text.lower()
    plain = report.to_dict()
    assert plain["kl_policy_target"]["estimate"] == "Infinity"
    assert set(plain["tv"]) == {"estimate", "low", "high", "confidence", "kind"}


def test_verify_lists_what_it_can_and_samples_the_rest():
    small, large = rl_ebm.TokenSpace(4, 4), rl_ebm.TokenSpace(20, 30)
    for space, mode in ((small, "exact-automaton"), (large, "sampled")):
        ebm = rl_ebm.EBM(space, Automaton.counts(space, [1, 2], 1.0))
        solution = rl_ebm.solve(ebm)
        report = rl_ebm.verify(rl_ebm.policies.Uniform(space), solution)
        assert report.mode == mode
    assert report.num_samples == 1000
    assert "about 10^39" in str(report)
    assert rl_ebm.verify(rl_ebm.policies.Uniform(space), solution, samples=7).num_samples == 7
    tree = rl_ebm.solve(rl_ebm.EBM(small, torch.randn(256)))
    assert rl_ebm.verify(rl_ebm.policies.Uniform(small), tree).mode == "exact-tree"
    assert rl_ebm.verify(rl_ebm.policies.Uniform(small), tree, samples=5).mode == "sampled"


def test_no_logits_of_whole_sequences_are_made_where_there_is_a_cache():
    space = rl_ebm.TokenSpace(50, 20)
    ebm = rl_ebm.EBM(space, Automaton.counts(space, [1], 1.0))
    solution = rl_ebm.solve(ebm)

    class Stepper:
        largest = 0

        def logits(self, tokens, prompt_ids=None):
            raise AssertionError("asked for (B, T, A)")

        def start(self, prompt_ids):
            return prompt_ids

        def step(self, state, tokens):
            Stepper.largest = max(Stepper.largest, len(state))
            return torch.zeros(len(state), 50)

    memory = 160 * 50 * 8
    report = verify_sampled(Stepper(), solution, 8, memory=memory)
    assert report.mode == "sampled"
    one = verify_sampled(rl_ebm.policies.Uniform(space), solution, 8, memory=1)
    assert one.num_samples == 8


def test_thousands_of_tokens_neither_overflow_nor_underflow():
    space = rl_ebm.TokenSpace(3, 4096)
    reward = Automaton.counts(space, [1, 1], 3.0) + Automaton.avoids(space, [2, 2])
    ebm = rl_ebm.EBM(space, reward, reference=rl_ebm.policies.Uniform(space))
    solution = rl_ebm.solve(ebm)
    assert math.isfinite(float(solution.log_z))
    batch = solution.sample(4, torch.Generator().manual_seed(0))
    log_p = solution.log_prob(batch.tokens, batch.lengths)
    along = rl_ebm.policies.log_prob(solution, space, batch.tokens, batch.lengths)
    torch.testing.assert_close(log_p, along, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [({"samples": 1}, "samples must be at least 2"), ({"confidence": 1.0}, "confidence")],
)
def test_bad_input(kwargs, words):
    ebm, policy = CASES[0]
    with pytest.raises(ValueError, match=words):
        verify_sampled(policy, rl_ebm.solve(ebm), **kwargs)


def test_bounded_means():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(500, generator=g, dtype=torch.float64) * 0.2
    interval = bounded(x, 1.0, 0.99)
    assert interval.low < 0.1 < interval.high
    assert interval.high - interval.low < 0.1
    assert interval.kind == "finite-sample"
    assert bounded(torch.zeros(10).double(), 1.0, 0.9).low == 0.0
