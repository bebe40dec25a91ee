"""The table of figures: what it promises, and the figures that show how one is added."""

from __future__ import annotations

import math

import pytest
import torch
from brute_force import INF
from checkout import ROOT
from toy_policies import seeded, tabular
from verify_cases import REFERENCES, case, figures, make_policy

import rl_ebm
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.rewards import Automaton
from rl_ebm.statistics.interval import Interval, affine, nonnegative
from rl_ebm.verification.along_samples import verify_sampled
from rl_ebm.verification.entry import NATS, NUMBER, REWARD, SHARE
from rl_ebm.verification.figures import FIGURES
from rl_ebm.verification.reading import as_read
from rl_ebm.verification.verify import verify_listed

README = (ROOT / "README.md").read_text().split("## How to read the report")[1]


# The table ----------------------------------------------------------------------------------------


def test_an_entry_says_all_there_is_to_say():
    keys = [f.key for f in FIGURES]
    assert len(set(keys)) == len(keys)
    assert sorted(f.key for f in as_read()) == sorted(keys)
    for f in FIGURES:
        assert f.label, f.key
        assert f.meaning, f.key
        assert f.unit in (NATS, REWARD, SHARE, NUMBER), f.key
        assert f.exact is not None or f.sampled is not None, f.key
        assert not f.bounds or f.bounds in keys, f.key


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f.key)
def test_the_documentation_has_every_figure(figure):
    start = f"| `{figure.key.replace('/', '.')}` | "
    (line,) = [line for line in README.splitlines() if line.startswith(start)]
    for cell in (figure.label, figure.unit, figure.prompts, figure.meaning.replace("|", "\\|")):
        assert cell in line
    assert ("may be infinite" in line) == figure.infinite


@pytest.mark.parametrize("samples", [None, 30])
def test_every_figure_has_its_key_in_the_report_its_scalars_and_its_text(samples):
    exact = case((3, 3, 1), 0.7, "tabular", True, seed=3)
    report = rl_ebm.verify(
        make_policy("values", exact), rl_ebm.solve(exact.ebm), samples=samples, generator=seeded()
    )
    got, text = figures(report), str(report)
    form = "exact" if samples is None else "sampled"
    for f in FIGURES:
        there = getattr(f, form) is not None
        group, _, name = f.key.rpartition("/")
        assert (name in (got[group] if group else got)) == there, f.key
        assert (f.key in report.scalars()) == there, f.key
        if there and samples is not None:
            assert f"  {f.told or f.label} " in text
        if there and samples is None and f.row is not None:
            assert (f.row.name or f.label) in text


@pytest.mark.parametrize("shape", [(3, 3, None), (4, 3, 1)], ids=str)
@pytest.mark.parametrize("reference", REFERENCES)
def test_only_what_may_be_infinite_is(shape, reference):
    exact = case(shape, 0.7, reference, False, 0.3, seed=2)
    policy, solution = make_policy("values", exact, 0.3, 2), rl_ebm.solve(exact.ebm)
    for samples in (None, 20):
        found = rl_ebm.verify(policy, solution, samples=samples, generator=seeded()).scalars()
        for f in FIGURES:
            assert f.infinite or f.key not in found or math.isfinite(found[f.key]), f.key


# Squared Hellinger --------------------------------------------------------------------------------


def test_a_small_hellinger_distance_keeps_its_digits():
    # 1 - sum sqrt(p q) of two coins, eps apart, is eps^2 / 2 and more that is no digit of 1.
    space, eps = rl_ebm.TokenSpace(2, 1), 1e-7
    coins = (torch.tensor([0.5 + x, 0.5 - x], dtype=torch.float64).log() for x in (0.0, eps))
    target, policy = coins
    solution = rl_ebm.solve(rl_ebm.EBM(space, target))
    report = rl_ebm.verify(Tabular.from_tables([policy[None]], space), solution)
    assert report.hellinger2 == pytest.approx(eps**2 / 2, rel=1e-6)
    sampled = verify_sampled(Tabular.from_tables([policy[None]], space), solution, 20)
    assert sampled.hellinger2.estimate == pytest.approx(eps**2 / 2, rel=1e-6)


def test_laws_that_have_nothing_in_common_are_1_apart():
    space = rl_ebm.TokenSpace(2, 1)
    solution = rl_ebm.solve(rl_ebm.EBM(space, torch.tensor([0.3, -INF]).double()))
    policy = Tabular.from_tables([torch.tensor([[-INF, 0.1]]).double()], space)
    assert rl_ebm.verify(policy, solution).hellinger2 == 1.0
    report = verify_sampled(policy, solution, 40)
    assert report.hellinger2.low <= report.hellinger2.estimate == report.hellinger2.high == 1.0


# From the reference -------------------------------------------------------------------------------


def long(reference, seed=0):
    """An EBM whose responses are not listed, and a policy of one law at each position."""
    space = rl_ebm.TokenSpace(3, 8)
    ebm = rl_ebm.EBM(space, Automaton.counts(space, [1], 0.7), 0.5, reference and reference(space))
    law = torch.randn(8, 3, generator=seeded(seed), dtype=torch.float64)
    policy = Tabular.from_tables([law[t].expand(3**t, 3).clone() for t in range(8)], space)
    return ebm, policy, law.log_softmax(-1)


def entropy_of(log_p):
    return -math.fsum((log_p.exp() * log_p).flatten().tolist())


def test_the_policys_distance_from_a_uniform_reference_is_what_its_entropy_lacks():
    ebm, policy, law = long(Uniform)
    report = verify_sampled(policy, rl_ebm.solve(ebm), 1500, 0.999, seeded())
    found, truth = report.kl_policy_reference, 8 * math.log(3) - entropy_of(law)
    assert found.kind == "asymptotic"
    assert found.low <= truth <= found.high
    assert found.width < 0.2 * truth


def test_the_targets_distance_from_a_reference_is_exact_where_its_reward_is():
    # One count pays 0.7 / 0.5: each token by itself, p* = (1, e^1.4, 1) / (2 + e^1.4).
    ebm, policy, _ = long(Uniform)
    p = math.exp(1.4) / (2 + math.exp(1.4))
    one = p * math.log(3 * p) + (1 - p) * math.log(3 * (1 - p) / 2)
    found = verify_sampled(policy, rl_ebm.solve(ebm), 20).kl_target_reference
    assert found.low == found.high == pytest.approx(8 * one)
    assert found.kind == "finite-sample"


def test_without_a_reference_they_are_less_the_entropies():
    ebm, policy, law = long(None)
    report = verify_sampled(policy, rl_ebm.solve(ebm), 60, 0.9, seeded())
    for law_of in ("target", "policy"):
        entropy = getattr(report, f"entropy_{law_of}")
        found = getattr(report, f"kl_{law_of}_reference")
        assert found == affine(entropy, -1.0)
        assert found.kind == "finite-sample"
    assert report.kl_policy_reference.low <= -entropy_of(law) <= report.kl_policy_reference.high


@pytest.mark.parametrize("length", [3, 9])
@pytest.mark.parametrize("forbid", ["reference", "both"])
def test_mass_on_what_the_reference_forbids_is_infinitely_far_from_it(length, forbid):
    space = rl_ebm.TokenSpace(2, length)
    tables = [torch.zeros(2**t, 2).double() for t in range(length)]
    tables[0][0, 1] = -INF
    reward = Automaton.counts(space, [0], 0.1)
    if forbid == "both":
        reward = reward + Automaton.avoids(space, [1, 1])
    ebm = rl_ebm.EBM(space, reward, reference=Tabular.from_tables(tables, space))
    solution, policy = rl_ebm.solve(ebm), tabular(space)
    exact = verify_listed(policy, solution)
    assert exact.kl_policy_reference == INF
    assert 0 < exact.kl_target_reference < INF
    report = verify_sampled(policy, solution, 40, generator=seeded())
    assert report.kl_policy_reference.high == INF
    low, high = report.kl_target_reference.low, report.kl_target_reference.high
    assert low <= exact.kl_target_reference <= high


def test_an_end_is_open_where_the_reference_may_forbid_what_no_sample_shows():
    # The policy gives a millionth to what the reference forbids; the reward forbids as well.
    space = rl_ebm.TokenSpace(2, 12)
    tables = [torch.zeros(2**t, 2).double() for t in range(12)]
    tables[-1][-1, 1] = -INF  # after eleven times 1
    reward = Automaton.avoids(space, [1, 0, 1, 0, 1, 0, 1])
    ebm = rl_ebm.EBM(space, reward, reference=Tabular.from_tables(tables, space))
    law = torch.tensor([0.0, -2.0]).double()
    policy = Tabular.from_tables([law.expand(2**t, 2).clone() for t in range(12)], space)
    solution = rl_ebm.solve(ebm)
    assert verify_listed(policy, solution).kl_policy_reference == INF
    for seed in range(4):
        report = verify_sampled(policy, solution, 40, generator=seeded(seed))
        assert report.kl_policy_reference.high == INF
        if report.kl_policy_reference.estimate < INF:
            assert any("kl_policy_reference" in text for text in report.warnings)


def test_a_tail_that_samples_do_not_show_leaves_the_distance_worth_little():
    ebm, policy, _ = long(Uniform)
    report = verify_sampled(policy, rl_ebm.solve(ebm), 10, generator=seeded())
    found = report.kl_policy_reference
    assert found.high == INF
    assert (found.kind == "worth nothing") == (found.low == 0)
    assert any("kl_policy_reference" in text for text in report.warnings)


def test_a_reference_gives_no_more_rows_at_a_time_than_fit():
    space, seen = rl_ebm.TokenSpace(3, 4), []
    reference = tabular(space)

    class Spy:
        def logits(self, tokens, prompt_ids=None):
            seen.append(len(tokens))
            return reference.logits(tokens, prompt_ids)

    scores = torch.randn(81, generator=seeded()).double()
    solution = rl_ebm.solve(rl_ebm.EBM(space, scores, reference=Spy()))
    seen.clear()
    small = verify_sampled(Uniform(space), solution, 20, generator=seeded(), memory=3 * 32 * 4 * 3)
    assert max(seen) == 3
    found = small.kl_policy_reference
    assert found.low <= verify_listed(Uniform(space), solution).kl_policy_reference <= found.high


# log Z by the policy's values ---------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 1e-9])
@pytest.mark.parametrize("samples", [None, 20])
def test_an_exact_solution_claims_its_own_log_z(beta, samples):
    exact = case((3, 3, 1), beta, "tabular", True, seed=5)
    solution = rl_ebm.solve(exact.ebm)
    report = rl_ebm.verify(solution, solution, samples=samples, generator=seeded())
    assert report.log_z_policy == pytest.approx(report.log_z, rel=1e-12)
    for part, log_z in zip(report.per_prompt, solution.log_z.tolist(), strict=True):
        assert part.log_z_policy == pytest.approx(log_z, rel=1e-12)


@pytest.mark.parametrize("samples", [None, 20])
def test_a_constant_added_to_values_is_added_to_the_log_z_that_they_claim(samples):
    space = rl_ebm.TokenSpace(3, 4)
    solution = rl_ebm.solve(rl_ebm.EBM(space, torch.randn(81, generator=seeded()).double()))
    for values in (True, False):
        q = [table[0] + 2.5 for table in solution.tables()]
        policy = Tabular.from_tables(q, space, logits_are_values=values)
        report = rl_ebm.verify(policy, solution, samples=samples)
        want = pytest.approx(float(solution.log_z) + 2.5) if values else None
        assert report.log_z_policy == want
        assert ("the policy's log Z" in str(report)) == values


# Arithmetic of intervals --------------------------------------------------------------------------


def test_an_interval_of_a_multiple_and_of_what_cannot_be_negative():
    x = Interval(1.0, -2.0, INF, 0.9, "one-sided finite-sample")
    assert affine(x, -2.0, 1.0) == Interval(-1.0, -INF, 5.0, 0.9, "one-sided finite-sample")
    assert affine(x, 0.5) == Interval(0.5, -1.0, INF, 0.9, "one-sided finite-sample")
    assert nonnegative(x) == Interval(1.0, 0.0, INF, 0.9, "worth nothing")
    y = Interval(-0.1, -0.5, 0.2, 0.9, "asymptotic")
    assert nonnegative(y) == Interval(0.0, 0.0, 0.2, 0.9, "asymptotic")
