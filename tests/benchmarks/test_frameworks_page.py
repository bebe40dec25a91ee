"""The page of shipped losses: from stored rows, its tables, advice and pictures."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.frameworks.__main__ import EBMS, Options, advice, frontier, main, table
from rl_ebm import solve
from rl_ebm.divergences import kl
from rl_ebm.studies.problems import problems


def line(name: str, options: dict, **more) -> dict:
    known = {
        "framework": "trl", "version": "1.16.0", "name": f"trl.{name}", "options": options,
        "default": False, "degenerate": False, "is_target": False, "tv": 0.25,
        "kl_fixed_point_target": 0.5, "kl_target_fixed_point": 0.5, "expected_reward": 2.0,
        "kl_reference": 1.0, "how": "flow", "other_roots": [], "depends_on_sampler": True,
    }  # fmt: skip
    return known | more


LINES = [
    line("Trainer.loss", {"a": 1}, default=True),
    line("Trainer.loss", {"a": 2}, instead={
        "name": "trl.Trainer.loss", "options": {"a": 3}, "sentence": "set a=3",
    }),
    line("Trainer.loss", {"a": 3}, is_target=True, tv=0.0, kl_target_fixed_point=0.0),
    line("Other.loss", {}, tv=None, degenerate=None, is_target=None, how="not settled",
         kl_target_fixed_point=None, expected_reward=None, kl_reference=None),
]  # fmt: skip


def test_rows_of_one_limit_share_a_line_and_shipped_ones_stand_out():
    rows = table(LINES).splitlines()[2:]
    assert len(rows) == 3
    assert "**a=1** (shipped); a=2" in rows[0]
    assert rows[1].endswith("the EBM |")
    assert rows[2].endswith("| none | ? | ? | ? | ? | not settled |")
    assert advice(LINES) == "- trl: set a=3 (TV of that setting: 0.0000)"


def test_the_frontier_is_above_every_law():
    solution = solve(EBMS["small"].make())
    (problem,) = problems(solution)
    edge = frontier(problem)
    values = problem.beta * problem.g_responses
    generator = torch.Generator().manual_seed(0)
    for scale in torch.linspace(0, 3, 50):
        noise = torch.randn(len(values), generator=generator).double()
        law = torch.log_softmax(problem.log_ref_responses + scale * (values + noise), 0)
        distance, reward = float(kl(law, problem.log_ref_responses)), float(law.exp() @ values)
        # Of all laws no farther from the reference, the edge's is the largest E[R].
        beyond = [r for k, r in edge if k >= distance]
        assert reward <= min(beyond) + 1e-9
    # p* is on it: the policy of the largest E[R] - beta KL.
    best = max(r - problem.beta * k for k, r in edge)
    value = float(problem.log_target.exp() @ (problem.beta * problem.g_responses))
    own = value - problem.beta * float(kl(problem.log_target, problem.log_ref_responses))
    assert best <= own + 1e-9
    assert best == pytest.approx(own, abs=1e-3)


def test_the_page_is_made_of_what_is_stored(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "small-trl.json").write_text(json.dumps(LINES))
    shipped = tmp_path / "frameworks.md"
    main(Options(frameworks=(), ebms=(), out=tmp_path, shipped=shipped))
    page = (tmp_path / "README.md").read_text()
    assert EBMS["small"].title in page
    assert EBMS["large"].title not in page
    assert (folder / "small.png").is_file()
    assert shipped.read_text().count("\n") == 3
