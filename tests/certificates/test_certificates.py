"""Certificates: what is claimed of log Z and of the divergences, against enumeration."""

from __future__ import annotations

import json
import math

import pytest
import torch
from certificate_cases import draw, kls_of
from test_smc import SPACES, by_space, ebm_of, log_z_of
from toy_policies import PROMPTS, Only, close, everything, responses, seeded, tabular, transformer

import rl_ebm
from rl_ebm.certificates import log_z_interval, sample_interval, self_normalised_kl
from rl_ebm.certificates.smc import smc
from rl_ebm.certificates.weights import UniformResponses
from rl_ebm.policies import sample
from rl_ebm.statistics.interval import difference
from rl_ebm.statistics.mean_bounds import betting_lower, log_mean

INF = math.inf
KLS = ("kl_policy_target", "kl_target_policy")


def exact(policy, ebm):
    """The report of the exact verifier."""
    return rl_ebm.verify(policy, rl_ebm.solve(ebm))


# What it is made of ------------------------------------------------------------------------------


@by_space
def test_a_certificate_is_made_of_its_parts(space):
    ebm, policy = ebm_of(space), tabular(space, seed=1)
    target = rl_ebm.solve(ebm).sample(200, seeded(3))
    got = rl_ebm.certify(policy, ebm, 300, 0.9, target, generator=seeded(2))
    batch = sample(policy, space, 300, seeded(2))

    def log_w_of(b):
        log_pi = rl_ebm.policies.log_prob(policy, space, b.tokens, b.lengths)
        return ebm.log_weight(b.tokens, b.lengths) - log_pi.detach(), log_pi.detach()

    log_w, log_pi = log_w_of(batch)
    t, _ = log_w_of(target)
    assert got.log_z == log_z_interval(log_w, 0.9, target_log_w=t)
    half = log_z_interval(log_w, 0.95, target_log_w=t)
    assert got.kl_policy_target == difference(half, sample_interval(log_w, 0.95), 0.0)
    assert got.kl_target_policy == difference(sample_interval(t, 0.95), half, 0.0)
    assert got.elbo == sample_interval(log_w, 0.9)
    assert got.eubo == sample_interval(t, 0.9)
    assert got.entropy_policy == sample_interval(-log_pi, 0.9)
    reward = ebm.score(batch).rewards()
    assert got.expected_reward_policy == sample_interval(reward, 0.9)
    assert got.ess == pytest.approx(float(log_w.exp().sum() ** 2 / log_w.exp().square().sum()))
    assert (got.num_samples, got.num_target_samples, got.mode) == (300, 200, "sampled")
    assert got.kl_policy_target.confidence == 0.9
    assert got.kl_policy_target.kind == "asymptotic"
    assert got.log_z.kind == "finite-sample"


def test_particles_bound_log_z_by_smc():
    space = SPACES[1]
    ebm = ebm_of(space)
    solution = rl_ebm.solve(ebm)
    got = rl_ebm.certify(solution, ebm, 400, particles=8, generator=seeded())
    close(got.log_z.estimate, log_z_of(ebm), 1e-9)
    constant = torch.full((50,), log_z_of(ebm), dtype=torch.float64)
    assert got.log_z.low == pytest.approx(float(betting_lower(constant, 0.05)), abs=1e-8)
    # The draws of SMC come after those of the policy itself.
    g = seeded(4)
    policy = tabular(space, seed=1)
    got = rl_ebm.certify(policy, ebm, 100, particles=10, generator=seeded(4))
    sample(policy, space, 100, g)
    runs = smc(ebm, policy, 10, generator=g, runs=10).log_z
    assert got.log_z == log_z_interval(runs, 0.95)


# Against the exact verifier ----------------------------------------------------------------------


@pytest.mark.parametrize("reference", [True, False])
@by_space
def test_the_truth_is_inside(space, reference):
    ebm = ebm_of(space, reference=reference)
    policy = tabular(space, seed=1)
    want = exact(policy, ebm)
    target = rl_ebm.solve(ebm).sample(1000, seeded(3))
    top = 8.0  # no reward is above it
    got = rl_ebm.certify(policy, ebm, 1000, 0.999, target, top, seeded(2))
    for name in ("log_z", *KLS, "entropy_policy", "expected_reward_policy"):
        interval = getattr(got, name)
        assert interval.low <= getattr(want, name) <= interval.high, name
        assert interval.width < 3, name


@by_space
def test_of_the_exact_policy_the_estimates_are_exact(space):
    ebm = ebm_of(space)
    solution = rl_ebm.solve(ebm)
    got = rl_ebm.certify(
        solution, ebm, 500, target_samples=solution.sample(500, seeded()), generator=seeded(1)
    )
    close(got.log_z.estimate, float(solution.log_z), 1e-9)
    assert got.kl_policy_target.estimate < 1e-9
    assert got.kl_target_policy.estimate < 1e-9
    assert got.kl_policy_target.high < 0.05
    assert got.kl_target_policy.high < 0.05
    assert got.ess == pytest.approx(500)
    assert got.warnings == []


@by_space
def test_each_prompt_has_its_certificate_and_the_means_hold_with_all_of_them(space):
    ebm = ebm_of(space, prompts=PROMPTS)
    policy = tabular(space, PROMPTS, seed=1)
    ids = torch.arange(3).repeat_interleave(torch.tensor([400, 500, 600]))
    target = rl_ebm.solve(ebm).sample(1500, seeded(3), ids)
    got = rl_ebm.certify(policy, ebm, 600, 0.97, target, generator=seeded(2))
    want = exact(policy, ebm)
    for part, truth in zip(got.per_prompt, want.per_prompt, strict=True):
        for name in ("log_z", *KLS):
            interval = getattr(part, name)
            assert interval.low <= getattr(truth, name) <= interval.high
            assert interval.confidence == pytest.approx(0.99)
    assert [part.num_target_samples for part in got.per_prompt] == [400, 500, 600]
    assert got.num_target_samples == 1500
    assert got.log_z.confidence == pytest.approx(0.97)
    for end in ("estimate", "low", "high"):
        parts = [getattr(part.log_z, end) for part in got.per_prompt]
        assert getattr(got.log_z, end) == pytest.approx(sum(parts) / 3)
    assert got.ess == min(part.ess for part in got.per_prompt)
    assert len(got.to_dict()["per_prompt"]) == 3
    assert "3 prompts" in str(got)


def test_a_prompt_without_target_samples_has_no_upper_end():
    space = SPACES[0]
    ebm = ebm_of(space, prompts=PROMPTS)
    ids = torch.tensor([0, 0, 1, 1])
    target = rl_ebm.solve(ebm).sample(4, seeded(3), ids)
    got = rl_ebm.certify(tabular(space, PROMPTS), ebm, 50, 0.95, target, generator=seeded())
    assert [part.log_z.high < INF for part in got.per_prompt] == [True, True, False]
    assert got.eubo is None
    assert got.log_z.high == INF
    assert any(text.startswith("prompt 2: nothing bounds") for text in got.warnings)


# What is honest where little is known ------------------------------------------------------------


def test_without_an_upper_bound_the_intervals_are_open():
    ebm, policy = ebm_of(SPACES[0]), tabular(SPACES[0], seed=1)
    got = rl_ebm.certify(policy, ebm, 400, generator=seeded())
    assert (got.log_z.high, got.log_z.kind) == (INF, "one-sided finite-sample")
    assert (got.kl_policy_target.high, got.kl_policy_target.kind) == (INF, "asymptotic")
    other = got.kl_target_policy
    assert (other.low, other.high, other.kind) == (0.0, INF, "one-sided finite-sample")
    assert got.eubo is None
    assert "nothing bounds log Z from above" in " ".join(got.warnings)
    text = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert text["log_z"]["high"] == "Infinity"
    assert text["eubo"] is None
    assert "warning: nothing bounds" in str(got)


def test_the_self_normalised_estimate_is_that_of_the_enumerated_law():
    for name, tolerance in (("easy", 0.01), ("impossible", 0.02)):
        (log_w,), _ = draw(name, 1, 20_000)
        assert self_normalised_kl(log_w, 0.95).estimate == pytest.approx(
            kls_of(name)[1], abs=tolerance
        )
    assert self_normalised_kl(torch.full((5,), -INF), 0.95).estimate == INF


def test_impossible_responses_of_the_policy_make_its_divergence_infinite():
    ebm, policy = ebm_of(SPACES[0], forbid=0.3), tabular(SPACES[0], seed=1)
    got = rl_ebm.certify(policy, ebm, 200, generator=seeded())
    kl = got.kl_policy_target
    assert (kl.estimate, kl.low, kl.high, kl.kind) == (INF, INF, INF, "finite-sample")
    assert got.elbo.high == -INF
    assert got.log_z.low > -INF
    assert "are impossible under the target" in got.warnings[0]
    json.dumps(got.to_dict(), allow_nan=False)


def test_all_weights_zero():
    space = SPACES[0]
    ebm = rl_ebm.EBM(space, lambda tokens, lengths: torch.full((len(tokens),), -INF))
    got = rl_ebm.certify(tabular(space), ebm, 20, reward_max=0.0, generator=seeded())
    assert (got.log_z.estimate, got.log_z.low) == (-INF, -INF)
    assert got.log_z.high <= math.log(81)
    assert got.kl_policy_target.low == INF
    assert (got.ess, got.kl_target_policy.estimate) == (0, INF)
    json.dumps(got.to_dict(), allow_nan=False)


def test_a_single_sample():
    space = SPACES[1]
    ebm = ebm_of(space)
    target = rl_ebm.solve(ebm).sample(1, seeded())
    got = rl_ebm.certify(tabular(space), ebm, 1, 0.95, target, 20.0, seeded())
    assert math.isfinite(got.log_z.low)
    assert (got.elbo.low, got.elbo.high) == (-INF, INF)
    assert (got.kl_policy_target.low, got.kl_policy_target.high) == (0, INF)
    assert got.ess == pytest.approx(1)
    assert "the effective sample size is 1" in got.warnings[0]
    assert "nats apart" in got.warnings[1]


def test_target_samples_that_the_policy_forbids():
    space = SPACES[0]
    ebm, policy = ebm_of(space), tabular(space, seed=1)
    policy.table.data[0, 0, 2] = -INF
    target = rl_ebm.solve(ebm).sample(300, seeded())
    got = rl_ebm.certify(policy, ebm, 300, 0.95, target, generator=seeded())
    assert got.kl_target_policy.low == INF
    assert got.eubo.estimate == INF
    assert got.log_z.low <= log_z_of(ebm) <= got.log_z.high < INF


def test_target_samples_that_are_none_are_noticed():
    space = SPACES[0]
    ebm, policy = ebm_of(space, scale=6.0), tabular(space, seed=1)
    # The best response alone is no sample of p*: it says that Z is small.
    tokens, lengths, ids, _ = everything(space, pad=0)
    worst = ebm.log_weight(tokens, lengths).argmin().repeat(500)
    fake = rl_ebm.Batch(tokens, lengths, ids).take(worst)
    got = rl_ebm.certify(policy, ebm, 2000, 0.95, fake, generator=seeded())
    assert "lower bound on log Z is above the upper one" in " ".join(got.warnings)
    assert got.log_z.low < got.log_z.high
    impossible = ebm_of(space, forbid=0.5)
    with pytest.raises(ValueError, match="no samples of p"):
        rl_ebm.certify(policy, impossible, 10, 0.95, rl_ebm.Batch(tokens, lengths, ids))


# The largest reward ------------------------------------------------------------------------------


@by_space
def test_the_uniform_law_over_responses(space):
    uniform = UniformResponses(space)
    tokens, lengths, _, _ = everything(space)
    log_p = rl_ebm.policies.log_prob(uniform, space, tokens, lengths)
    n = math.log(len(responses(space)))
    close(log_p, torch.full((len(tokens),), -n, dtype=torch.float64))
    assert uniform.log_count == pytest.approx(n)


@pytest.mark.parametrize("reference", [True, False])
@by_space
def test_the_largest_reward_bounds_log_z(space, reference):
    ebm = ebm_of(space, scale=0.3, reference=reference)
    tokens, lengths, ids, _ = everything(space, pad=0)
    top = float(ebm.reward(tokens, lengths, ids).max())
    certain = top / ebm.beta + (0 if reference else math.log(len(responses(space))))
    got = rl_ebm.certify(tabular(space), ebm, 2000, 0.95, None, top, seeded())
    assert log_z_of(ebm) <= got.log_z.high < certain
    assert got.log_z.high < log_z_of(ebm) + 0.2
    # By one sample nothing is gained, and nothing lost.
    got = rl_ebm.certify(tabular(space), ebm, 1, 0.95, None, top, seeded())
    assert log_z_of(ebm) <= got.log_z.high <= certain
    with pytest.raises(ValueError, match="reward_max is"):
        rl_ebm.certify(tabular(space), ebm, 500, 0.95, None, top - 0.1, seeded())


# Memory, modes, errors ---------------------------------------------------------------------------


@by_space
def test_little_memory_means_small_batches(space):
    ebm = ebm_of(space)
    rows = []

    class Watched(Only):
        def logits(self, tokens, prompt_ids=None):
            rows.append(len(tokens))
            return self.inner(tokens, prompt_ids)

    policy = Watched(tabular(space, seed=1))
    policy.inner = tabular(space, seed=1).logits
    target = rl_ebm.solve(ebm).sample(30, seeded())
    small = rl_ebm.certify(
        policy, ebm, 50, 0.95, target, None, seeded(), memory=200_000, particles=5
    )
    assert max(rows) < 12
    assert (small.num_samples, small.num_target_samples) == (50, 30)
    large = rl_ebm.certify(tabular(space, seed=1), ebm, 50, generator=seeded())
    assert abs(small.elbo.estimate - large.elbo.estimate) < 2


def test_a_policy_keeps_its_mode_and_gets_no_gradient():
    policy = transformer(SPACES[1]).train()
    got = rl_ebm.certify(policy, ebm_of(SPACES[1]), 20, generator=seeded(), particles=4)
    assert policy.training
    assert isinstance(got.log_z.low, float)


def test_the_same_seed_gives_the_same_certificate():
    ebm, policy = ebm_of(SPACES[1]), tabular(SPACES[1])
    first, second = (
        rl_ebm.certify(policy, ebm, 60, reward_max=20, generator=seeded(6)) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"confidence": 1.0}, "confidence must be a number in"),
        ({"samples": 10, "particles": 11}, "particles must be in"),
        ({"samples": 10, "particles": 0}, "particles must be in"),
        ({"reward_max": INF}, "reward_max must be finite"),
        ({"samples": 100, "reward_max": -50.0}, "reward_max is -50.0"),
    ],
)
def test_wrong_arguments(options, word):
    with pytest.raises(ValueError, match=word):
        rl_ebm.certify(tabular(SPACES[0]), ebm_of(SPACES[0]), **options)


def test_a_policy_for_other_prompts():
    with pytest.raises(ValueError, match="other prompts"):
        rl_ebm.certify(tabular(SPACES[0], PROMPTS), ebm_of(SPACES[0]), 10)


def test_estimates_are_means_of_weights():
    (log_w,), _ = draw("easy", 1, 30)
    assert log_z_interval(log_w, 0.9).estimate == float(log_mean(log_w))
