"""Reports of many prompts: what they keep; prompts taken together have their own figures."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from toy_policies import Plain, seeded, tabular, transformer
from verify_cases import logit_tables

import rl_ebm
from rl_ebm.exact import solve
from rl_ebm.policies import Uniform
from rl_ebm.policies.walk import prompts_at_once, walk_prompts
from rl_ebm.tokens import TokenSpace
from rl_ebm.verification.every_prefix import Accumulator
from rl_ebm.verification.verify import KEPT

verify_module = importlib.import_module(
    "rl_ebm.verification.verify"
)  # the package shows a function there


def problem(count, space, reference=None):
    prompts = [[i] for i in range(count)]
    scores = torch.randn(count, space.num_sequences, generator=seeded(1), dtype=torch.float64)
    scores[::3, 1] = -torch.inf
    return solve(rl_ebm.EBM(space, scores, 0.7, reference, prompts)), prompts


@pytest.mark.parametrize("shape", [(3, 3, None), (3, 3, 1)])
@pytest.mark.parametrize("kind", ["table", "transformer", "plain"])
def test_prompts_together_have_the_figures_of_each_alone(shape, kind):
    space, count = TokenSpace(*shape), 7
    solution, prompts = problem(count, space, tabular(space, [[i] for i in range(7)], seed=3))
    policy = {
        "table": lambda: tabular(space, prompts, seed=2),
        "transformer": lambda: transformer(space, prompts, seed=2),
        "plain": lambda: Plain(space, logit_tables(space, count, seed=2, forbid=0.2)),
    }[kind]()
    together = rl_ebm.verify(policy, solution)
    alone = rl_ebm.verify(policy, solution, memory=1)
    assert prompts_at_once(policy, space, 1) == 1
    assert prompts_at_once(policy, space, 2**28) > count
    assert len(together.per_prompt) == len(alone.per_prompt) == count
    assert together.num_prompts == count
    for a, b in zip([together, *together.per_prompt], [alone, *alone.per_prompt], strict=True):
        a, b = a.to_dict(), b.to_dict()
        for key in a.keys() - {"per_prompt", "worst_prefixes", "per_depth", "bounds", "mode"}:
            assert float(a[key] or 0) == pytest.approx(float(b[key] or 0), rel=1e-9, abs=1e-12), key
        for x, y in zip(a["worst_prefixes"], b["worst_prefixes"], strict=True):
            assert (x["prefix"], x["prompt_id"]) == (y["prefix"], y["prompt_id"])
            want = pytest.approx([float(d) for d in y["delta"]], rel=1e-9, abs=1e-12)
            assert [float(d) for d in x["delta"]] == want
        for x, y in zip(a["per_depth"], b["per_depth"], strict=True):
            want = pytest.approx([float(v) for v in y.values()], rel=1e-9, abs=1e-12)
            assert [float(v) for v in x.values()] == want


def test_the_figures_of_each_prompt_are_kept_on_request_beyond_some():
    space = TokenSpace(2, 2)
    few, _ = problem(KEPT, space)
    many, _ = problem(KEPT + 1, space)
    assert len(rl_ebm.verify(Uniform(space), few).per_prompt) == KEPT
    short = rl_ebm.verify(Uniform(space), many)
    full = rl_ebm.verify(Uniform(space), many, per_prompt=True)
    assert short.per_prompt == []
    assert len(full.per_prompt) == KEPT + 1
    a, b = short.to_dict(), full.to_dict()
    assert len(b.pop("per_prompt")) == KEPT + 1
    assert a.pop("num_prompts") == KEPT + 1
    assert a == b
    assert len(json.dumps(a)) < 6000
    for report in (short, full):
        assert f"{KEPT + 1} prompts (means)" in str(report)
        assert "prompt " in str(report).split("worst prefixes")[1]
        assert "num_prompts" not in report.scalars()
    assert rl_ebm.verify(Uniform(space), few, per_prompt=False).per_prompt == []
    one = solve(rl_ebm.EBM(space, torch.randn(4, generator=seeded(0))))
    assert "num_prompts" not in rl_ebm.verify(Uniform(space), one).to_dict()


def test_sampled_reports_keep_each_prompt_on_request_too(monkeypatch):
    space = TokenSpace(2, 2)
    solution, _ = problem(3, space)
    monkeypatch.setattr(verify_module, "KEPT", 2)
    for per_prompt, count in ((None, 0), (True, 3), (False, 0)):
        report = rl_ebm.verify(
            Uniform(space), solution, samples=20, generator=seeded(0), per_prompt=per_prompt
        )
        assert len(report.per_prompt) == count


@pytest.mark.slow
def test_thousands_of_prompts_are_walked_together(monkeypatch):
    """One evaluation of the policy for many prompts, not one for each."""
    space = TokenSpace(3, 2)
    policy = tabular(space, [[i] for i in range(2000)], seed=1)
    solution, _ = problem(2000, space, policy)
    calls, own = [], policy.tree_logits
    monkeypatch.setattr(
        policy, "tree_logits", lambda tree, ids: (calls.append(len(ids)), own(tree, ids))[1]
    )
    report = rl_ebm.verify(policy, solution)
    assert sum(calls) == 2000
    assert len(calls) <= 4
    assert report.num_prompts == 2000


@pytest.mark.parametrize("keep", [True, False])
def test_of_prompts_that_are_equally_bad_the_first_are_named(keep):
    count, space = 12, TokenSpace(2, 2)
    # 1 is worth 1 at either position: the error of every state is 1/2.
    scores = torch.tensor([[0.0, 1.0, 1.0, 2.0]], dtype=torch.float64).repeat(count, 1)
    solution = solve(rl_ebm.EBM(space, scores, 1.0, prompts=[[i] for i in range(count)]))
    tree = Accumulator(solution, torch.arange(count), False, {}, worst_of_each=keep)
    for block in walk_prompts(Uniform(space), space, torch.arange(count)):
        tree.add(block)
    found = [(w.prompt_id, w.prefix) for worst in tree.worst_prefixes() for w in worst]
    want = [(i, prefix) for i in range(count) for prefix in ([], [0], [1])]
    assert found == (want if keep else want[:10])
