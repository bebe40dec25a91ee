"""Reports, the walk behind them, and what verifying leaves as it was."""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import replace

import pytest
import torch
from brute_force import INF, prefixes
from toy_policies import PROMPTS, close, logits_by_prefix, seeded, tabular, transformer
from verify_cases import ALL_SPACES, KEYS, assert_same, case, figures, make_policy

import rl_ebm
from rl_ebm.policies import Uniform
from rl_ebm.policies.walk import walk
from rl_ebm.tokens import TokenSpace
from rl_ebm.verification.verify import logit_errors

walk_module = importlib.import_module("rl_ebm.policies.walk")
in_all_spaces = pytest.mark.parametrize("shape", ALL_SPACES, ids=str)


# The policy ---------------------------------------------------------------------------------------


class Moody(torch.nn.Module):
    """Wrong in training mode; fails where a graph would be built."""

    def __init__(self, space):
        super().__init__()
        self.space, self.rows = space, tabular(space)

    def logits(self, tokens, prompt_ids=None):
        assert not self.training
        rows = self.rows.logits(tokens, prompt_ids)
        assert not rows.requires_grad
        return rows


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", [rl_ebm.verify, logit_errors])
def test_a_module_is_evaluated_without_graph_and_put_back_in_its_mode(training, method):
    exact = case((3, 3, None), seed=1)
    policy = Moody(exact.ebm.space).train(training)
    method(policy, rl_ebm.solve(exact.ebm))
    assert policy.training == policy.rows.training == training
    policy.rows.table.data[0, 2, 1] = math.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        rl_ebm.verify(policy, rl_ebm.solve(exact.ebm))
    assert policy.training == training


def test_a_frozen_part_of_a_module_in_training_stays_in_evaluation_mode():
    exact = case((3, 3, None), seed=1)
    policy = Moody(exact.ebm.space).train()
    policy.rows.eval()
    rl_ebm.verify(policy, rl_ebm.solve(exact.ebm))
    assert policy.training
    assert not policy.rows.training


@in_all_spaces
@pytest.mark.parametrize("prompted", [False, True])
def test_exact_and_learned_logits_of_all_states_for_pictures(shape, prompted):
    exact = case(shape, 0.7, "tabular", prompted, forbid=0.3, seed=2)
    space, solution = exact.ebm.space, rl_ebm.solve(exact.ebm)
    policy = make_policy("plain", exact, 0.0, 3)
    rows = logits_by_prefix(policy, space, len(exact.truths))
    for i, t in enumerate(exact.truths):
        depths = logit_errors(policy, solution, i)
        assert len(depths) == space.max_length
        for states, names in zip(depths, t.states, strict=True):
            for field in states:
                assert len(field) == len(names)
            for n, s in enumerate(names):
                alive = t.prefix_log_prob(s) > -INF
                q_star = t.q(s)
                allowed = [alive and x > -INF for x in q_star]
                assert states.allowed[n].tolist() == allowed
                want = [centred(q, allowed) for q in (rows[i, s], q_star)]
                assert states.q[n].tolist() == pytest.approx(want[0], abs=1e-10)
                assert states.q_star[n].tolist() == pytest.approx(want[1], abs=1e-10)
                linf = max(abs(a - b) for a, b in zip(*want, strict=True))
                assert float(states.linf[n]) == pytest.approx(linf, abs=1e-10)
                edge = [t.prefix_log_prob((*s, a)) for a in range(space.vocab_size)]
                assert states.log_edge[n].tolist() == pytest.approx(edge, abs=1e-10)


def centred(q, allowed):
    kept = [x for x, a in zip(q, allowed, strict=True) if a]
    return [x - sum(kept) / len(kept) if a else 0.0 for x, a in zip(q, allowed, strict=True)]


# The report ---------------------------------------------------------------------------------------


def test_the_keys_of_a_report_are_those_promised():
    exact = case((3, 2, None), seed=3)
    report = rl_ebm.verify(tabular(exact.ebm.space), rl_ebm.solve(exact.ebm))
    got = figures(report)
    assert set(got) >= KEYS
    assert set(got["bounds"]) == {"prop3", "span", "occupancy"}
    assert set(got["per_depth"][0]) == {"depth", "states", "linf", "mean_kl"}
    assert {"prefix", "probability_target", "probability_policy", "delta"} <= set(
        got["worst_prefixes"][0]
    )
    numbers = {k for k, x in got.items() if isinstance(x, (int, float))}
    want = {k: float(got[k]) for k in numbers}
    want |= {f"bounds/{k}": x for k, x in got["bounds"].items()}
    assert report.scalars() == want
    assert got["bellman_residual_max"] is None
    assert replace(report, tv=-INF).to_dict()["tv"] == "-Infinity"
    with pytest.raises(AssertionError, match="a report never holds nan"):
        replace(report, tv=math.nan).to_dict()


@pytest.mark.parametrize("prompted", [False, True])
def test_the_text_of_a_report_has_its_main_numbers(prompted):
    exact = case((3, 3, None), 0.5, "tabular", prompted, seed=3)
    report = rl_ebm.verify(make_policy("values", exact), rl_ebm.solve(exact.ebm))
    text = str(report)
    lines = text.splitlines()
    assert lines[0] == "exact-tree: 27 sequences" + (", 3 prompts (means)" if prompted else "")

    def line(name):
        (found,) = [x for x in lines if x.strip().startswith(name)]
        return [float(x) for x in re.findall(r"-?\d+\.\d+(?:e[+-]\d+)?", found)]

    for name, want in {
        "log Z": [report.log_z],
        "KL(target, policy)": [report.kl_target_policy],
        "KL(policy, target)": [report.kl_policy_target],
        "<= occupancy bound": [report.bounds.occupancy],
        "<= span bound": [report.bounds.span],
        "total variation": [report.tv],
        "Jensen-Shannon": [report.js],
        "mass on impossible": [0.0],
        "entropy": [report.entropy_target, report.entropy_policy],
        "expected reward": [report.expected_reward_target, report.expected_reward_policy],
        "logit error, max": [report.logits_linf, report.logits_span],
        "Bellman residual, max": [report.bellman_residual_max, report.bellman_residual_mean],
    }.items():
        assert line(name) == pytest.approx(want, abs=1e-6), name
    (prop3,) = [x for x in lines if "(Prop. 3)" in x]
    assert float(prop3.split()[-1]) == pytest.approx(report.bounds.prop3, abs=1e-5)
    for d in report.per_depth:
        row = next(x.split() for x in lines if x.split()[:2] == [str(d.depth), str(d.states)])
        assert float(row[2]) == pytest.approx(d.linf, abs=1e-5)
        assert float(row[3]) == pytest.approx(d.mean_kl, abs=1e-5)
    worst = report.worst_prefixes[0]
    name = " ".join(map(str, worst.prefix)) or "(empty)"
    assert (f"prompt {worst.prompt_id}: {name}" if prompted else name) in text
    assert "Bellman" not in str(replace(report, bellman_residual_max=None))


# Memory -------------------------------------------------------------------------------------------


@in_all_spaces
@pytest.mark.parametrize("memory", [1, 20_000, 60_000, 2**28])
@pytest.mark.parametrize("prompted", [False, True])
def test_a_walk_meets_every_prefix_once_after_its_parents_block(shape, memory, prompted):
    space, prompts = TokenSpace(*shape), PROMPTS if prompted else None
    for policy in (transformer(space, prompts), tabular(space, prompts), Uniform(space)):
        prompt = 2 if prompted else 0
        rows = logits_by_prefix(policy, space, prompt + 1)
        seen, above = [], {}
        for block in walk(policy, space, prompt, memory):
            names = prefixes(shape[0], block.depth, shape[2])[block.start : block.stop]
            assert block.logits.dtype == torch.float64
            close(block.logits, torch.tensor([rows[prompt, s] for s in names]).double(), 1e-6)
            assert block.start == sum(len(s) == block.depth for s in seen)  # in order
            if block.depth:
                assert {s[:-1] for s in names} <= set(above[block.depth - 1])
            above[block.depth] = names
            seen += names
        assert len(seen) == len(set(seen)) == space.num_states


@pytest.mark.slow
@pytest.mark.parametrize("eos_id", [None, 2])
@pytest.mark.parametrize("make", [tabular, Uniform])
def test_no_evaluation_is_larger_than_the_memory_given(monkeypatch, make, eos_id):
    space = TokenSpace(4, 8 if eos_id is None else 9, eos_id)
    scores = torch.randn(space.num_sequences, generator=seeded(1), dtype=torch.float64)
    solution, policy, sizes = rl_ebm.solve(rl_ebm.EBM(space, scores)), make(space), []
    original = walk_module.PrefixTree.below

    class Spy:
        @staticmethod
        def below(*args):
            tree, slices = original(*args)
            sizes.append(sum(s.stop - s.start for s in slices))
            assert len(tree) <= 2 * sizes[-1] + space.max_length  # the rest are ancestors
            return tree, slices

    monkeypatch.setattr(walk_module, "PrefixTree", Spy)
    reports = []
    for memory in (1_100_000, 2**23, 2**34):
        sizes.clear()
        reports.append(figures(rl_ebm.verify(policy, solution, memory)))
        assert max(sizes) <= memory / 4096
        assert sum(sizes) == space.num_states
    assert len(sizes) == 1
    assert_same(reports[0], reports[-1], 1e-11)
    assert_same(reports[1], reports[-1], 1e-11)
