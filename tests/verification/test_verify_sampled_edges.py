"""Verification from samples of policies that are hard to look at, and what it may take."""

from __future__ import annotations

import math

import pytest
import torch

import rl_ebm
from rl_ebm.automata import hidden
from rl_ebm.policies import AutomatonPolicy, Uniform
from rl_ebm.policies.checks import ROWS
from rl_ebm.rewards import Automaton
from rl_ebm.statistics.expectations import bounded, ratio_interval
from rl_ebm.statistics.mean_bounds import betting_lower
from rl_ebm.verification.along_samples import verify_sampled
from rl_ebm.verification.visits import Visits

SPACE = rl_ebm.TokenSpace(3, 6, eos_id=0)
PROMPTS = [[1], [], [2, 2]]


class Plain:
    """Logits of a table by position and last token, and nothing else."""

    def __init__(self, table):
        self.table, self.largest = table, 0

    def logits(self, tokens, prompt_ids=None):
        self.largest = max(self.largest, len(tokens))
        before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)
        return self.table[torch.arange(tokens.shape[1]), before]


def table(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 3, generator=g, dtype=torch.float64)


def solution(prompts=None, **others):
    return rl_ebm.solve(
        rl_ebm.EBM(SPACE, Automaton.counts(SPACE, [1, 2]), prompts=prompts, **others)
    )


def sane(report):
    for name, interval in report.intervals().items():
        assert interval.low <= interval.estimate <= interval.high, name
    assert "nan" not in str(report).lower()
    report.to_dict()


@pytest.mark.parametrize("prompts", [None, PROMPTS])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers(prompts, value):
    logits = table()
    logits[3, :, 1] = value
    with pytest.raises(ValueError, match="NaN or \\+inf at depth 3"):
        verify_sampled(Plain(logits), solution(prompts), 200)


@pytest.mark.parametrize("depth", [0, 2, 5])
def test_a_state_at_which_everything_is_forbidden(depth):
    logits = table()
    logits[depth] = -math.inf
    words = f"forbids every action at a prefix of depth {depth} that it reaches"
    with pytest.raises(ValueError, match=words):
        verify_sampled(Plain(logits), solution(), 200)
    # Behind a token that the policy never gives nothing is asked of it.
    logits = table()
    logits[:, :, 2] = logits[1:, 2] = -math.inf
    report = verify_sampled(Plain(logits), solution(), 200)
    sane(report)
    assert report.kl_target_policy.estimate == math.inf
    assert math.isfinite(report.kl_policy_target.estimate)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [None, PROMPTS])
def test_no_more_responses_at_a_time_than_fit(prompts):
    policy = Plain(table())
    one = verify_sampled(policy, solution(prompts), 3, memory=1)
    assert policy.largest == 1
    sane(one)
    per_row = 3 * (160 + 16 * 6)
    verify_sampled(policy, solution(prompts), 30, memory=7 * per_row + 1)
    assert policy.largest == 7
    policy.largest = 0
    verify_sampled(policy, solution(prompts), 2 * ROWS)  # more than the trial at the door
    assert policy.largest == 2 * ROWS


def test_nothing_of_whole_sequences_is_asked_of_a_reference(monkeypatch):
    def refuse(*_):
        raise AssertionError("asked for (B, T, A)")

    monkeypatch.setattr(Uniform, "logits", refuse)
    found = solution(reference=Uniform(SPACE))
    law = torch.zeros(1, 3).double().log_softmax(1)
    machine = rl_ebm.automata.deterministic(torch.zeros(1, 3).long(), law)
    policy = AutomatonPolicy(SPACE, machine)
    policy.logits_are_values = True
    # One count of the phrase is off by its pay where the response ends.
    residual = verify_sampled(policy, found, 200).bellman_residual_max
    assert 0.9 < residual.estimate < math.inf


@pytest.mark.parametrize("eos", [None, 0, 2])
def test_log_probs_of_the_uniform_reference(eos):
    space = rl_ebm.TokenSpace(3, 4, eos)
    ebm = rl_ebm.EBM(space, Automaton.counts(space, [1]), reference=Uniform(space))
    tokens, lengths = space.sequences()
    want = [
        y.count(1) - math.log(3) * (min(len(y), 3) if eos is not None else 4)
        for y in (y[:n] for y, n in zip(tokens.tolist(), lengths.tolist(), strict=True))
    ]
    assert ebm.log_weight(tokens, lengths).tolist() == pytest.approx(want)


def test_the_worst_visited_prefixes_are_all_listed():
    # A target that is nearly one response: the worst states of others are visited by few rows.
    space = rl_ebm.TokenSpace(3, 6, eos_id=0)
    reward = Automaton.counts(space, [1, 1], 1.5)
    found = rl_ebm.solve(rl_ebm.EBM(space, reward))
    policy = Plain(table(3))
    g = torch.Generator().manual_seed(5)
    report = verify_sampled(policy, found, 300, generator=g)
    g = torch.Generator().manual_seed(5)
    drawn = found.sample(300, g)
    own = rl_ebm.policies.sample(policy, space, 300, g)
    errors, spans, kls = {}, {}, {}
    for batch in (drawn.clean(), own.clean()):
        q_star, q = found.logits(batch.tokens), policy.logits(batch.tokens)
        for i, n in enumerate(batch.lengths.tolist()):
            for t in range(n):
                delta = (q[i, t] - q_star[i, t])[torch.isfinite(q_star[i, t])]
                size = float((delta - delta.mean()).abs().max())
                prefix = tuple(batch.tokens[i, :t].tolist())
                errors[prefix] = size
                spans[prefix] = float(delta.max() - delta.min())
                # In EOS mode the last row has one action that is allowed: no divergence.
                if t < 5:
                    star, mine = q_star[i, t].log_softmax(0), q[i, t].log_softmax(0)
                    kls[prefix] = float((star.exp() * (star - mine)).sum())
    want = sorted(errors.values(), reverse=True)[:10]
    got = [max(abs(x) for x in w.delta) for w in report.worst_prefixes]
    assert got == pytest.approx(want)
    for w in report.worst_prefixes:
        assert errors[tuple(w.prefix)] == pytest.approx(max(abs(x) for x in w.delta))
        assert w.kl == pytest.approx(kls[tuple(w.prefix)])
    assert len({tuple(w.prefix) for w in report.worst_prefixes}) == 10
    assert report.logits_linf.estimate == pytest.approx(want[0])
    assert report.logits_span.estimate == pytest.approx(max(spans.values()))
    for depth in report.per_depth:
        largest = max(x for prefix, x in errors.items() if len(prefix) == depth.depth)
        assert depth.linf == pytest.approx(largest, abs=1e-12)
        assert depth.states == int((drawn.lengths > depth.depth).sum())


def test_means_over_the_states_that_either_visits():
    # The target stays with one response; what the policy visits is worse.
    found = rl_ebm.solve(rl_ebm.EBM(SPACE, Automaton.counts(SPACE, [1, 1], 6.0)))
    logits = table(3)
    logits[:, 2] *= 9
    policy = Plain(logits)
    policy.logits_are_values = True
    report = verify_sampled(policy, found, 60, generator=torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(5)
    drawn = found.sample(60, g).clean(), rl_ebm.policies.sample(policy, SPACE, 60, g).clean()
    means, residuals, at_depth = [], [], [[0.0] * 6, [0.0] * 6]
    for law, batch in enumerate(drawn):
        q_star, q = found.logits(batch.tokens), policy.logits(batch.tokens)
        q[:, -1, 1:] = -math.inf
        paid = found.ebm.reward(batch.tokens, batch.lengths, batch.prompt_ids)
        sizes, off = [], []
        for i, n in enumerate(batch.lengths.tolist()):
            for t in range(n):
                delta = (q[i, t] - q_star[i, t])[torch.isfinite(q_star[i, t])]
                sizes.append(float((delta - delta.mean()).abs().max()))
                at_depth[law][t] = max(at_depth[law][t], sizes[-1])
                after = paid[i] if t == n - 1 else q[i, t + 1].logsumexp(0)
                off.append(abs(float(q[i, t, batch.tokens[i, t]] - after)))
        means.append(sum(sizes) / len(sizes))
        residuals.append(sum(off) / len(off))
    assert report.logits_linf_target.estimate == pytest.approx(means[0])
    assert report.logits_linf_policy.estimate == pytest.approx(means[1])
    assert report.bellman_residual_mean.estimate == pytest.approx(residuals[0])
    assert report.bellman_residual_mean_policy.estimate == pytest.approx(residuals[1])
    assert any(a < b for a, b in zip(*at_depth, strict=True))
    for depth, a, b in zip(report.per_depth, *at_depth, strict=True):
        assert depth.linf == pytest.approx(max(a, b), abs=1e-12)


def test_log_z_is_the_mean_over_the_prompts():
    g = torch.Generator().manual_seed(2)
    law = [torch.randn(s, generator=g).double().log_softmax(-1) for s in ((3, 2), (2, 2), (2, 3))]
    reference = AutomatonPolicy(SPACE, hidden(*law), PROMPTS)
    reward = Automaton.contains(SPACE, [1, 2], 3.0)
    found = rl_ebm.solve(rl_ebm.EBM(SPACE, reward, reference=reference, prompts=PROMPTS))
    assert len(set(found.log_z.tolist())) == 3
    report = verify_sampled(found, found, 5)
    assert report.log_z == pytest.approx(float(found.log_z.mean()))
    assert [r.log_z for r in report.per_prompt] == pytest.approx(found.log_z.tolist())


def test_residuals_of_a_policy_that_forbids():
    logits = table()
    logits[2, :, 1] = -math.inf
    policy = Plain(logits)
    policy.logits_are_values = True
    report = verify_sampled(policy, solution(), 200, generator=torch.Generator().manual_seed(0))
    sane(report)
    assert report.bellman_residual_max.estimate == math.inf
    assert report.bellman_residual_mean.estimate == math.inf


def test_pieces_add_up_to_the_whole():
    found, policy = solution(), Plain(table(1))
    batch = found.sample(40, torch.Generator().manual_seed(0)).clean()
    parts, whole = (Visits(found, batch, True, True) for _ in range(2))
    parts.walk(policy, 3 * 3 * (160 + 16 * 6))
    whole.walk(policy, 2**28)
    for name in ("log_star", "log_pi", "kl", "entropy", "occupancy", "residual"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    assert parts.linf == pytest.approx(whole.linf)
    errors = [sorted(x for x, _, _ in v.worst) for v in (parts, whole)]
    assert errors[0] == pytest.approx(errors[1])


def test_every_prompt_has_its_share_of_the_confidence():
    report = verify_sampled(Plain(table()), solution(PROMPTS), 20, 0.94)
    assert report.kl_target_policy.confidence == pytest.approx(0.94)
    assert report.per_prompt[0].tv.confidence == pytest.approx(0.98)
    for depth in range(6):
        visits = [r.per_depth[depth].states for r in report.per_prompt]
        assert report.per_depth[depth].states == sum(visits)


def test_ends_of_intervals():
    x = torch.tensor([0.1, 0.5, 0.2, 0.9]).double()
    interval = bounded(x, 1.0, 0.9)
    assert interval.low == pytest.approx(float(betting_lower(x.log(), 0.05).exp()))
    weight = torch.tensor([1.0, 2.0, 4.0, 3.0]).double()
    mean = float(x.sum() / weight.sum())
    spread = float((x - mean * weight).std()) / 2 / 2.5
    # Student's t with 3 degrees of freedom, two-sided 90%.
    interval = ratio_interval(x, weight, 0.9)
    assert interval.estimate == pytest.approx(mean)
    assert interval.high == pytest.approx(mean + 2.353363 * spread, rel=1e-5)


def test_an_estimate_is_in_its_interval_where_sums_are_rounded():
    for start in range(1, 40):
        x = torch.full((3,), 5.613617504469547 / start, dtype=torch.float64)
        same = ratio_interval(x, torch.full_like(x, 2.0), 0.9)
        assert same.low <= same.estimate <= same.high


def test_states_that_the_reference_never_reaches_do_not_count():
    space = rl_ebm.TokenSpace(3, 4)
    g = torch.Generator().manual_seed(0)
    reference = rl_ebm.policies.Tabular(space, None, 1.0, g, torch.float64)
    with torch.no_grad():
        reference.table[..., 0, 2] = -math.inf
    scores = torch.randn(81, generator=g).double()
    found = rl_ebm.solve(rl_ebm.EBM(space, scores, reference=reference))
    # What follows token 2 has values all the same: a policy is not compared with them.
    assert bool(torch.isfinite(found.logits(torch.tensor([[2, 0, 0, 0]]))[0, 1:]).all())
    logits = torch.zeros(4, 3, 3, dtype=torch.float64)
    logits[1, 2, 0] = 500.0
    report = verify_sampled(Plain(logits), found, 100, generator=g)
    # At depth 1 the state [2] is the only one that is far off.
    exact = rl_ebm.verify(Plain(logits), found)
    assert report.logits_linf.estimate == pytest.approx(exact.logits_linf)
    assert report.logits_linf.estimate < 100
    assert report.kl_policy_target.estimate == math.inf
    assert report.mass_impossible.low > 0.1
    # At the first position a state counts for every response, later where it is possible.
    own = rl_ebm.policies.sample(Plain(logits), space, 100, torch.Generator().manual_seed(3))
    visits = Visits(found, own, False, False)
    visits.walk(Plain(logits), 2**28)
    possible = own.tokens[:, 0] != 2
    assert visits.reached.tolist() == torch.where(possible, 4.0, 1.0).tolist()


@pytest.mark.parametrize("eos", [None, 0])
def test_entropies_are_bounded_and_so_are_their_intervals(eos):
    space = rl_ebm.TokenSpace(3, 6, eos)
    found = rl_ebm.solve(rl_ebm.EBM(space, Automaton.counts(space, [1, 2])))
    report = verify_sampled(Plain(torch.zeros(6, 3, 3).double()), found, 40, 0.9)
    interval = report.entropy_policy
    assert interval.kind == "finite-sample"
    most = (6 - (eos is not None)) * math.log(3)
    assert interval.low <= interval.estimate <= interval.high <= most + 1e-9
    if eos is None:
        assert interval.estimate == pytest.approx(most)
        # Nothing but all samples at the upper end: what is left below is of the order of 1 / n.
        assert most * (1 - 2 * math.log(20) / 40) < interval.low < most
    one = rl_ebm.TokenSpace(3, 1, 0)
    found = rl_ebm.solve(rl_ebm.EBM(one, Automaton.counts(one, [0])))
    report = verify_sampled(found, found, 5)
    assert report.entropy_policy.low == report.entropy_policy.high == 0
