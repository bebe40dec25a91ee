"""The verifier's report against its definitions, over whole responses and single states."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from brute_force import INF, log_softmax, prefixes
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_policies import PROMPTS, Plain, seeded, tabular
from verify_cases import (
    ALL_SPACES,
    KEYS,
    KINDS,
    REFERENCES,
    assert_same,
    case,
    compare,
    figures,
    logit_tables,
    make_policy,
    slow_reports,
)

import rl_ebm
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.tokens import TokenSpace
from rl_ebm.verification.report import combine

walk_module = importlib.import_module("rl_ebm.policies.walk")

in_all_spaces = pytest.mark.parametrize("shape", ALL_SPACES, ids=str)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from(ALL_SPACES),
    beta=st.sampled_from([0.3, 1.0, 5.0]),
    reference=st.sampled_from(REFERENCES),
    prompted=st.booleans(),
    forbid=st.sampled_from([0.0, 0.3]),
    kind=st.sampled_from(KINDS),
    policy_forbids=st.sampled_from([0.0, 0.0, 0.3]),
    memory=st.sampled_from([1, 30_000, 2**28]),
    seed=st.integers(0, 10**6),
)
def test_every_figure_is_what_its_definition_says(
    shape, beta, reference, prompted, forbid, kind, policy_forbids, memory, seed
):
    exact = case(shape, beta, reference, prompted, forbid, seed)
    policy = make_policy(kind, exact, policy_forbids, seed)
    report = rl_ebm.verify(policy, rl_ebm.solve(exact.ebm), memory)
    compare(report, slow_reports(policy, exact))
    for part in report.per_prompt or [report]:
        assert sum(d.mean_kl for d in part.per_depth) == part.kl_target_policy
        assert part.bounds.occupancy <= part.bounds.span * (1 + 1e-9)
        assert part.bounds.span <= part.bounds.prop3 * (1 + 1e-9)
        assert part.kl_policy_target <= part.bounds.occupancy * (1 + 1e-9) + 1e-12


@in_all_spaces
@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("forbid", [0.0, 0.4])
def test_an_exact_solution_has_no_error(shape, prompted, forbid):
    solution = rl_ebm.solve(case(shape, 0.3, "tabular", prompted, forbid, seed=4).ebm)
    for memory in (1, 2**28):
        report = rl_ebm.verify(solution, solution, memory)
        zeros = {"kl_target_policy", "kl_policy_target", "tv", "js", "mass_impossible"}
        zeros |= {"logits_linf", "logits_span", "log_ratio_span"}
        zeros |= {"bellman_residual_max", "bellman_residual_mean"}
        zeros |= {"bounds/prop3", "bounds/span", "bounds/occupancy"}
        for name, value in report.scalars().items():
            assert abs(value) < 1e-12 or name not in zeros, name
        assert zeros <= set(report.scalars())
        assert report.entropy_target == report.entropy_policy
        assert report.expected_reward_target == report.expected_reward_policy
        assert report.worst_prefixes == []
        assert all(d.linf == 0 for d in report.per_depth)


@pytest.mark.parametrize("shape", [(3, 3, None), (4, 4, 1)], ids=str)
@pytest.mark.parametrize("prompted", [False, True])
def test_a_planted_fault_is_named_first(shape, prompted):
    exact = case(shape, 0.8, "plain", prompted, seed=6)
    solution = rl_ebm.solve(exact.ebm)
    tables = [t.clone() for t in solution.tables()]
    prompt, s = len(exact.truths) - 1, prefixes(shape[0], 2, shape[2])[5]
    tables[2][prompt, 5, 0] += 0.7
    tables[2][prompt, 5, 2] -= 0.2
    tables[1][prompt, 1, 0] += 1e-3
    report = rl_ebm.verify(
        Tabular.from_tables(tables, exact.ebm.space, exact.ebm.prompts, True), solution
    )
    first, second = report.worst_prefixes
    assert (first.prefix, first.prompt_id) == (list(s), prompt)
    assert (second.prefix, second.prompt_id) == ([prefixes(shape[0], 1, shape[2])[1][0]], prompt)
    error = [0.7, 0.0, -0.2, *[0.0] * (shape[0] - 3)]  # q - q*
    want = [e - 0.5 / shape[0] for e in error]
    assert first.delta == pytest.approx(want, abs=1e-12)
    p_s = math.exp(exact.truths[prompt].prefix_log_prob(s))
    assert first.probability_target == pytest.approx(p_s, rel=1e-10)
    assert first.probability_policy == pytest.approx(p_s, rel=0.01)
    q = exact.truths[prompt].q(s)
    log_p, log_pi = log_softmax(q), log_softmax([x + e for x, e in zip(q, error, strict=True)])
    kl = sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_pi, strict=True))
    assert first.kl == pytest.approx(kl, rel=1e-9)
    assert report.logits_linf == pytest.approx(max(map(abs, want)))
    assert report.logits_span == pytest.approx(0.9)


@pytest.mark.parametrize("shape", [(3, 3, None), (4, 3, 1)], ids=str)
@pytest.mark.parametrize("values", [False, True])
def test_a_constant_for_each_state_shows_in_what_needs_values_alone(shape, values):
    exact = case(shape, 0.8, "plain", True, forbid=0.2, seed=7)
    space, solution = exact.ebm.space, rl_ebm.solve(exact.ebm)
    tables = logit_tables(space, 3, 8)
    shifted = [t + 3 * torch.randn(t.shape[:2], generator=seeded(9))[..., None] for t in tables]
    one, two = (
        figures(rl_ebm.verify(Tabular.from_tables(t, space, PROMPTS, values), solution))
        for t in (tables, shifted)
    )
    for part, other in zip([one, *one["per_prompt"]], [two, *two["per_prompt"]], strict=True):
        for name in ("bellman_residual_max", "bellman_residual_mean", "log_z_policy"):
            a, b = part.pop(name), other.pop(name)
            assert (a is None and b is None) if not values else abs(a - b) > 1e-2
    one.pop("per_prompt"), two.pop("per_prompt")
    assert_same(two, one, 1e-10)


def test_q_of_a_changed_r_has_the_change_as_its_residual():
    exact = case((3, 3, 1), 0.8, "plain", seed=7)
    space, solution = exact.ebm.space, rl_ebm.solve(exact.ebm)
    r = [torch.tensor([exact.truths[0].r[s] for s in depth]) for depth in exact.truths[0].states]
    b = [torch.randn(t.shape, generator=seeded(3)) for t in r]
    q = rl_ebm.q_from_r([(x + y).double() for x, y in zip(r, b, strict=True)], space)
    report = rl_ebm.verify(Tabular.from_tables(q, space, logits_are_values=True), solution)
    b[-1] = b[-1][:, [1]]  # nothing but EOS
    want = max(float(t.abs().max()) for t in b)
    assert report.bellman_residual_max == pytest.approx(want, rel=1e-5)
    weights = [
        [math.exp(exact.truths[0].prefix_log_prob(s)) for s in depth]
        for depth in exact.truths[0].states
    ]
    pairs = [
        (w, float(x.abs().mean()))
        for rows, ws in zip(b, weights, strict=True)
        for x, w in zip(rows, ws, strict=True)
    ]
    mean = sum(w * x for w, x in pairs) / sum(w for w, _ in pairs)
    assert report.bellman_residual_mean == pytest.approx(mean, rel=1e-5)


# Infinities --------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1, 2**28])
def test_a_policy_that_forbids_what_the_target_allows(memory):
    exact = case((3, 3, 0), 1.0, "tabular", seed=3)
    solution = rl_ebm.solve(exact.ebm)
    tables = [t[0].clone() for t in solution.tables()]
    tables[1][1, 2] = -INF
    policy = Tabular.from_tables(tables, exact.ebm.space, logits_are_values=True)
    report = rl_ebm.verify(policy, solution, memory)
    compare(report, slow_reports(policy, exact))
    got = figures(report)
    for name in ("logits_span", "logits_linf", "kl_target_policy", "log_ratio_span"):
        assert got[name] == "Infinity"
    assert got["bellman_residual_max"] == "Infinity"
    assert got["bounds"] == {"prop3": "Infinity", "span": "Infinity", "occupancy": "Infinity"}
    assert got["mass_impossible"] == 0
    assert 0 < got["kl_policy_target"] < INF
    assert [d["linf"] for d in got["per_depth"]] == [0.0, "Infinity", 0.0]
    assert got["worst_prefixes"][0]["prefix"] == [2]
    assert got["worst_prefixes"][0]["delta"] == ["Infinity"] * 3
    # A state that the policy never reaches adds nothing to what it costs to be there.
    tables[0][0, 2] = -INF
    tables[0][0, [0, 1]] += 0.1
    never_there = rl_ebm.verify(Tabular.from_tables(tables, exact.ebm.space), solution, memory)
    assert never_there.bounds.occupancy == INF  # the root itself has lost an action


@pytest.mark.parametrize("by", ["reward", "reference"])
@pytest.mark.parametrize("shape", [(3, 2, None), (3, 3, 1)], ids=str)
def test_mass_on_impossible_responses(by, shape):
    space = TokenSpace(*shape)
    scores = torch.randn(space.num_sequences, generator=seeded(2), dtype=torch.float64)
    reference = None
    if by == "reward":
        scores[-2] = -INF
    else:
        tables = logit_tables(space, seed=4)
        tables[-2 if shape[2] else -1][0, -1, -1] = -INF
        reference = Plain(space, tables)
    report = rl_ebm.verify(tabular(space), rl_ebm.solve(rl_ebm.EBM(space, scores, 1, reference)))
    got = figures(report)
    assert 0 < got["mass_impossible"] < 1
    for x in (got["kl_policy_target"], got["log_ratio_span"], *got["bounds"].values()):
        assert x == "Infinity"
    assert got["kl_target_policy"] < INF
    assert got["logits_span"] < INF
    assert (got["expected_reward_policy"] == "-Infinity") == (by == "reward")


def test_bounds_are_infinite_where_the_mass_on_impossible_responses_underflows():
    space = TokenSpace(2, 1)
    solution = rl_ebm.solve(rl_ebm.EBM(space, torch.tensor([0.3, -INF])))
    policy = Tabular.from_tables([torch.tensor([[0.0, -800.0]]).double()], space)
    report = rl_ebm.verify(policy, solution)
    assert report.kl_policy_target == report.bounds.occupancy == report.bounds.prop3 == INF


def test_the_largest_residual_counts_states_of_the_smallest_probability():
    space = TokenSpace(2, 2)
    solution = rl_ebm.solve(rl_ebm.EBM(space, torch.tensor([0.0, 0.0, -2000.0, -2000.0]).double()))
    tables = [t[0].clone() for t in solution.tables()]
    tables[1][1] += 500  # shows at the state itself and, the other way, at the one before
    tables[0][0, 1] += 500
    policy = Tabular.from_tables(tables, space, logits_are_values=True)
    assert rl_ebm.verify(policy, solution).bellman_residual_max == pytest.approx(500)


def test_of_equally_bad_prefixes_the_first_are_named_whatever_the_memory():
    space = TokenSpace(2, 7)
    solution = rl_ebm.solve(rl_ebm.EBM(space, torch.randn(128, generator=seeded()).double()))
    tables = [t[0].clone() for t in solution.tables()]
    for table in tables[2:]:
        table[:, 0] = -INF
    policy = Tabular.from_tables(tables, space)
    want = [list(s) for depth in (2, 3) for s in prefixes(2, depth)][:10]
    for memory in (1, 20_000, 2**28):
        worst = rl_ebm.verify(policy, solution, memory).worst_prefixes
        assert [w.prefix for w in worst] == want


def test_a_policy_that_allows_nothing_is_refused():
    space = TokenSpace(2, 1)
    solution = rl_ebm.solve(rl_ebm.EBM(space, torch.tensor([0.3, 0.1])))
    with pytest.raises(ValueError, match=r"."):
        rl_ebm.verify(Tabular.from_tables([torch.full((1, 2), -INF)], space), solution)


@pytest.mark.parametrize("value", [math.nan, INF])
def test_logits_that_are_no_numbers_are_refused(value):
    exact = case((3, 3, 1), prompted=True)
    solution, tables = rl_ebm.solve(exact.ebm), logit_tables(exact.ebm.space, 3)
    tables[1][2, 1, 0] = value
    with pytest.raises(ValueError, match="logits are NaN or \\+inf at depth 1: it cannot be"):
        rl_ebm.verify(Tabular.from_tables(tables, exact.ebm.space, PROMPTS), solution)


# Many prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [False, True])
def test_several_prompts_are_joined_by_maxima_and_means(values):
    exact = case((3, 3, 1), 0.5, "tabular", True, seed=5)
    space, solution = exact.ebm.space, rl_ebm.solve(exact.ebm)
    policy = Tabular.from_tables(logit_tables(space, 3, 9), space, PROMPTS, values)
    report = rl_ebm.verify(policy, solution)
    got, wants = figures(report), slow_reports(policy, exact)
    assert KEYS | {"per_prompt"} <= set(got)
    parts = got["per_prompt"]
    assert len(parts) == 3
    assert combine(report.per_prompt) == report
    want = {}
    for key, first in wants[0].items():
        column = [w[key] for w in wants]
        if key.endswith(("_linf", "_span", "_max")):
            want[key] = max(column) if first is not None else None
        elif isinstance(first, float):
            want[key] = sum(column) / 3
        else:
            want[key] = first
    want["bounds"] = {k: sum(w["bounds"][k] for w in wants) / 3 for k in wants[0]["bounds"]}
    want["per_depth"] = [
        {
            "depth": t,
            "states": sum(d["states"] for d in depths),
            "linf": max(d["linf"] for d in depths),
            "mean_kl": sum(d["mean_kl"] for d in depths) / 3,
        }
        for t, depths in enumerate(zip(*[w["per_depth"] for w in wants], strict=True))
    ]
    named = [w | {"prompt_id": i} for i, part in enumerate(wants) for w in part["worst_prefixes"]]
    want["worst_prefixes"] = sorted(named, key=lambda w: -max(map(abs, w["delta"])))[:10]
    assert_same({k: v for k, v in got.items() if k != "per_prompt"}, want)


def test_the_report_of_each_prompt_has_the_keys_of_one_prompt():
    exact = case((3, 2, None), prompted=True)
    got = figures(rl_ebm.verify(Uniform(exact.ebm.space), rl_ebm.solve(exact.ebm)))
    assert all(set(part) == set(got) - {"per_prompt"} for part in got["per_prompt"])


def test_prompts_that_are_not_the_ebms_are_refused():
    exact = case((3, 2, None), prompted=True)
    solution = rl_ebm.solve(exact.ebm)
    with pytest.raises(ValueError, match="the policy was made for other prompts than the EBM's"):
        rl_ebm.verify(tabular(exact.ebm.space, PROMPTS[::-1]), solution)
    rl_ebm.verify(tabular(exact.ebm.space), solution)  # one that reads none may be compared


def test_a_total_variation_is_at_most_1_by_rounding_neither():
    space = TokenSpace(4, 3)
    for seed in range(24):
        # Whatever the target allows the policy forbids.
        scores = torch.randn(64, generator=seeded(seed)).double()
        scores[16:] = -INF
        policy = Tabular(space, scale=1.0, generator=seeded(seed), dtype=torch.float64)
        with torch.no_grad():
            policy.table[0, 0, 0] = -INF
        report = rl_ebm.verify(policy, rl_ebm.solve(rl_ebm.EBM(space, scores)))
        assert 1 - 1e-12 < report.tv <= 1.0
