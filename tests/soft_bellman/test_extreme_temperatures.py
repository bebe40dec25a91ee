"""Every figure of an exact solution at temperatures from 1e-6 to 1e6, in every dtype of scores."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from brute_force import INF, log_softmax, log_sum_exp, sequences
from exact_truth import Truth, reference_log_probs
from toy_policies import SMALL, randomised, seeded

import rl_ebm
from rl_ebm.automata import deterministic, hidden
from rl_ebm.exact import summarise, summarise_automaton
from rl_ebm.exact.automaton.marginals import find_flow, token_log_marginals
from rl_ebm.policies import AutomatonPolicy, Tabular, Transformer, Uniform
from rl_ebm.rewards import Automaton
from rl_ebm.tokens import TokenSpace

BETAS = [1e-6, 1e-3, 0.1, 1.0, 30.0, 1e6]
SCALES = [1.0, 30.0, 1e3, 1e6]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32]
REFERENCES = [None, "uniform", "ngram", "hmm", "tabular", "forbids", "transformer"]
SPACES = [(3, 3, None), (2, 5, None), (3, 4, 1), (4, 3, 0)]
PROMPTS = [[], [2, 0, 1]]


def reference(kind, space, prompts=None, seed=0):
    a, g = space.vocab_size, seeded(seed)

    def law(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).log_softmax(-1)

    if kind is None:
        return None
    if kind == "uniform":
        return Uniform(space)
    if kind == "ngram":
        following = torch.arange(a).expand(a, a)
        return AutomatonPolicy(space, deterministic(following, law(a, a)))
    if kind == "hmm":
        return AutomatonPolicy(space, hidden(law(2), law(2, 2), law(2, a)))
    if kind == "transformer":
        return randomised(Transformer(space, SMALL, prompts), seed)
    table = Tabular(space, prompts, scale=1.5, generator=g, dtype=torch.float64)
    if kind == "tabular":
        return table
    # The last token (or the one before EOS) is forbidden half of the time.
    tables = []
    for t in range(space.max_length):
        shape = (1 if prompts is None else len(prompts), space.num_prefixes(t), a)
        logits = torch.randn(shape, generator=g, dtype=torch.float64)
        place = torch.rand(shape, generator=g) < 0.4
        place[..., space.eos_id or 0] = False
        tables.append(logits.masked_fill(place, -INF))
    return Tabular.from_tables(tables, space, prompts)


def scores_of(space, scale, dtype, prompts=1, forbid=0.0, seed=0):
    g = seeded(seed)
    x = scale * torch.randn(prompts, space.num_sequences, generator=g, dtype=torch.float64)
    if dtype == torch.float16:
        x = x.clamp(-6e4, 6e4)
    x = x.to(dtype)
    if forbid and dtype.is_floating_point:
        drop = torch.rand(x.shape, generator=g) < forbid
        drop[:, 0] = False
        x = x.masked_fill(drop, -INF)
    return x


def check(got, want, rel=1e-9, scale=None):
    assert got == pytest.approx(want, rel=rel, abs=rel * (abs(want) if scale is None else scale))


def check_figures(solution, truths, tolerance):
    """Summary, log-probabilities, logits and the report of an exact table."""
    space = solution.space
    tokens, lengths = space.sequences()
    for i, truth in enumerate(truths):
        reward_scale = max(abs(r) for r, p in zip(truth.scores, truth.p, strict=True) if p > 1e-300)
        check(float(solution.log_z[i]), truth.log_z, 1e-12 if tolerance < 1e-7 else 1e-6, 1.0)
        summary = summarise(solution, 5, i)
        check(summary.entropy, truth.entropy, 1e-9, 1.0)
        assert 0 <= summary.entropy <= math.log(space.num_sequences) * (1 + 1e-12)
        check(summary.expected_reward, truth.expected_reward, 1e-9, reward_scale)
        best = sorted(range(len(truth.p)), key=lambda n: (-truth.log_w[n], n))[:5]
        want = [n for n in best if truth.p[n] > 0]
        assert [r.tokens for r in summary.top] == [list(truth.responses[n]) for n in want]
        for r, n in zip(summary.top, want, strict=True):
            check(r.probability, truth.p[n], 1e-9, 1.0)
            assert 0 < r.probability <= 1
            assert r.score == truth.scores[n]
        log_p = solution.log_prob(tokens, lengths, torch.full_like(lengths, i))
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-11)
        for got, x in zip(log_p.tolist(), truth.log_p, strict=True):
            check(got, x, tolerance, 1.0)


def check_report(solution, truths, tolerance):
    space, p = solution.space, len(truths)
    report = rl_ebm.verify(Uniform(space), solution)
    parts = report.per_prompt or [report]
    uniform = [
        sum(-math.log(space.vocab_size) for t in range(len(y)) if not forced(space, t))
        for y in truths[0].responses
    ]
    for part, truth in zip(parts, truths, strict=True):
        scale = max([abs(r) for r in truth.scores if r > -INF])
        check(part.entropy_target, truth.entropy, tolerance, 1.0)
        check(part.expected_reward_target, truth.expected_reward, tolerance, scale)
        want = math.fsum(
            q * (x - u) for q, x, u in zip(truth.p, truth.log_p, uniform, strict=True) if q > 0
        )
        check(part.kl_target_policy, want, tolerance, 1.0)
        want = math.fsum(math.exp(u) * (u - x) for x, u in zip(truth.log_p, uniform, strict=True))
        check(part.kl_policy_target, want, tolerance, 1.0)
        want = math.fsum(abs(q - math.exp(u)) for q, u in zip(truth.p, uniform, strict=True)) / 2
        check(part.tv, want, tolerance, 1.0)
        want = math.fsum(math.exp(u) * r for r, u in zip(truth.scores, uniform, strict=True))
        check(part.expected_reward_policy, want, tolerance, scale)
        assert part.kl_target_policy >= 0 <= part.entropy_target
        for prefix in part.worst_prefixes:
            check(prefix.probability_target, truth.marginal(prefix.prefix), tolerance, 1.0)
    own = rl_ebm.verify(solution, solution)
    for part in own.per_prompt or [own]:
        assert part.kl_target_policy == pytest.approx(0, abs=1e-11)
        assert part.kl_policy_target == pytest.approx(0, abs=1e-11)
    assert p == len(parts)


def forced(space, t):
    return space.eos_id is not None and t == space.max_length - 1


PARTS = [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 7))]
CASES = list(enumerate(itertools.product(DTYPES, SCALES)))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize(
    "part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 7))]
)
def test_figures_at_every_temperature_in_every_dtype(beta, kind, part):
    first = part + 3 * BETAS.index(beta) + REFERENCES.index(kind)
    for n, (dtype, scale) in (CASES[(first + i) % len(CASES)] for i in (0, 7, 14)):
        space = TokenSpace(*SPACES[n % len(SPACES)])
        prompts = PROMPTS if n % 3 == 2 else None
        scores = scores_of(space, scale, dtype, len(prompts or [0]), 0.2 * (n % 2), seed=n)
        p_ref = reference(kind, space, prompts, seed=n)
        ebm = rl_ebm.EBM(space, scores if prompts else scores[0], beta, p_ref, prompts)
        truths = [
            Truth(row, beta, reference_log_probs(p_ref, space, i), space)
            for i, row in enumerate(scores.double().tolist())
        ]
        solution = rl_ebm.solve(ebm)
        # Values in float32 where that is enough for them.
        tolerance = 1e-10 if solution.reduced_v[0].dtype == torch.float64 else 3e-6
        check_figures(solution, truths, max(tolerance, 1e-9))
        check_report(solution, truths, max(tolerance, 1e-9))


# Automata ----------------------------------------------------------------------------------------


def exact_reward(machine, tokens):
    """R of one response as a fraction: the sum of the weights along its path."""
    k, total = int(machine.start[0]), Fraction(0)
    for a in tokens:
        weight = float(machine.log_weight[k, a])
        if weight == -INF:
            return -INF
        total, k = total + Fraction(weight), int(machine.next[k, a])
    return total + Fraction(float(machine.final[k]))


def random_reward(space, scale, forbid, seed):
    g, a, k = seeded(seed), space.vocab_size, 3
    weight = scale * torch.randn(k, a, generator=g, dtype=torch.float64)
    weight[torch.rand(k, a, generator=g) < forbid] = -INF
    weight[:, space.eos_id or 0] = scale
    final = scale * torch.randn(k, generator=g, dtype=torch.float64)
    machine = deterministic(torch.randint(k, (k, a), generator=g), weight, final)
    return Automaton(space, machine), machine


@pytest.mark.parametrize(
    "beta", [pytest.param(b, marks=pytest.mark.slow) if b in (1e-3, 30.0) else b for b in BETAS]
)
@pytest.mark.parametrize("kind", [None, "uniform", "ngram", "hmm"])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_figures_of_automata_at_every_temperature(beta, kind, scale):
    for n, shape in enumerate(SPACES):
        space = TokenSpace(*shape)
        reward, machine = random_reward(space, scale, 0.2 * (n % 2), seed=n)
        p_ref = reference(kind, space, seed=n)
        solution = rl_ebm.solve(rl_ebm.EBM(space, reward, beta, p_ref))
        assert solution.mode == "exact-automaton"
        responses = sequences(*shape)
        scores = [exact_reward(machine, y) for y in responses]
        truth = Truth(scores, beta, reference_log_probs(p_ref, space), space)
        largest = float(max(abs(r) for r, p in zip(scores, truth.p, strict=True) if p > 0))
        # What float64 leaves of R / beta; what R is to be expected does not feel it.
        rounding = 1e-10 + 1e-15 * largest / beta
        check(float(solution.log_z[0]), truth.log_z, 1e-12, 1.0)
        listed, found = summarise(solution, 5), summarise_automaton(solution, 5)
        for summary in (listed, found):
            check(summary.expected_reward, truth.expected_reward, 1e-12, largest)
            if summary is listed or kind != "hmm":
                assert summary.entropy >= 0
                check(summary.entropy, truth.entropy, rounding, 1.0)
                best = sorted(range(len(truth.p)), key=lambda i: (-truth.log_w[i], i))[:5]
                best = [i for i in best if truth.p[i] > 0]
                top = summary.top[: len(best)]
                assert [r.tokens for r in top] == [list(responses[i]) for i in best]
                for r, i in zip(top, best, strict=True):
                    check(r.probability, truth.p[i], rounding, 1.0)
                    assert 0 <= r.probability <= 1
        tokens, lengths = space.sequences()
        log_p = solution.log_prob(tokens, lengths)
        assert float(log_p.max()) <= 0
        for got, x in zip(log_p.tolist(), truth.log_p, strict=True):
            check(got, x, rounding, 1.0)
        flow = find_flow(solution.values, space, 0)
        for t in range(space.max_length):
            got = token_log_marginals(solution.values, flow, space, t).exp()
            arrived = [0.0] * space.vocab_size
            for p, y in zip(truth.p, responses, strict=True):
                if len(y) > t:
                    arrived[y[t]] += p
            for x, want in zip(got.tolist(), arrived, strict=True):
                check(x, want, rounding, 1.0)
            if space.eos_id is None:
                assert float(got.sum()) == pytest.approx(1, abs=1e-13)
        check_report(solution, [truth], max(rounding, 1e-9))


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 1.0, 1e6])
def test_samples_at_every_temperature(beta):
    """Counts against the exact law: chi-square-like, each count within five of its deviations."""
    n = 4000
    for i, (kind, dtype) in enumerate(itertools.product(["hmm", None], DTYPES[1:4])):
        space = TokenSpace(*SPACES[i % len(SPACES)])
        # Ties and near ties at every temperature: a few best rewards within beta of each other.
        scores = 1e3 * torch.randn(space.num_sequences, generator=seeded(i), dtype=torch.float64)
        scores = scores.to(dtype)
        scores[3] = scores[5] = scores[7] = scores.max()
        p_ref = reference(kind, space, seed=i)
        truth = Truth(scores.double().tolist(), beta, reference_log_probs(p_ref, space), space)
        solution = rl_ebm.solve(rl_ebm.EBM(space, scores, beta, p_ref))
        batch = solution.sample(n, seeded(i))
        places = space.sequence_indices(batch.tokens, batch.lengths)
        counts = places.bincount(minlength=space.num_sequences).tolist()
        for count, p in zip(counts, truth.p, strict=True):
            assert abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1e-6


def test_the_likeliest_of_equal_rewards_come_in_order():
    space = TokenSpace(3, 4)
    for beta in (1e-6, 0.7, 1e6):
        row = torch.tensor([[0.1, 0.1, -0.3]], dtype=torch.float64)
        reward = Automaton(space, deterministic(torch.zeros(1, 3).int(), row))
        solution = rl_ebm.solve(rl_ebm.EBM(space, reward, beta))
        best = [list(y) for y in itertools.product((0, 1), repeat=4)]
        assert [r.tokens for r in summarise_automaton(solution, 12).top] == best[:12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [None, "uniform", "forbids"])
def test_values_far_below_the_best_keep_their_digits(dtype, kind):
    """One response 1e9 nats above all others, which differ by some nats among themselves."""
    space, beta = TokenSpace(3, 4), 1e-6
    scores = (3e-6 * torch.randn(81, generator=seeded(4), dtype=torch.float64)).to(dtype)
    scores[7], scores[40] = 1e3, -1e3
    p_ref = reference(kind, space, seed=4)
    solution = rl_ebm.solve(rl_ebm.EBM(space, scores, beta, p_ref))
    log_ref = reference_log_probs(p_ref, space)
    weights = [w + x / beta for w, x in zip(log_ref, scores.double().tolist(), strict=True)]
    for t, v in enumerate(solution.reduced_v):
        paid = solution.paid[t][0].double() / beta
        n = 3 ** (4 - t)
        for i, got in enumerate((paid + v[0]).tolist()):
            rows = weights[i * n : (i + 1) * n]
            # V of a prefix leaves out what p_ref gave for it.
            before = 0.0 if p_ref is None else prefix_log_ref(p_ref, space, t, i)
            want = log_sum_exp(rows) - before if before > -INF else got
            assert got == pytest.approx(want, rel=1e-12, abs=1e-10)


def prefix_log_ref(p_ref, space, t, i):
    tokens = torch.zeros(1, space.max_length, dtype=torch.int64)
    tokens[0, :t] = space.prefixes(t, i, i + 1)[0]
    rows = p_ref.logits(tokens, torch.zeros(1, dtype=torch.int64))[0].double().tolist()
    return sum(log_softmax(rows[d])[int(tokens[0, d])] for d in range(t))


def test_what_float64_has_no_room_for_is_refused():
    space = TokenSpace(2, 2)
    for scores, beta in ([1e10, 0, 1, 2], 1e-295), ([-1e10, 0, 1, 2], 1e-295):
        with pytest.raises(ValueError, match=r"too large for float64: .* scale the rewards down"):
            rl_ebm.solve(rl_ebm.EBM(space, torch.tensor(scores), beta))
    with pytest.raises(ValueError, match="too large for float64"):
        rl_ebm.solve(
            rl_ebm.EBM(space, torch.tensor([1.7e308, -1.7e308, 0, 0], dtype=torch.float64))
        )
