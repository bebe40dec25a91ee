"""TRL's losses of pairs beside DPO, as installed, against conditions written down again here."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from framework_cases import needs
from toy_policies import seeded

import rl_ebm
from rl_ebm.policies import Tabular
from rl_ebm.studies.frameworks import trl_kto, trl_online_dpo, trl_pairs
from rl_ebm.studies.frameworks.audit import audit_framework, case_of
from rl_ebm.studies.frameworks.rows import quiet
from rl_ebm.studies.losses.audit import audit_loss
from rl_ebm.studies.problems import problems

pytestmark = [needs("trl"), pytest.mark.filterwarnings("default")]  # of other packages
BETA = 0.5
COUNT = 5
"""pairs of a batch"""


def solved():
    """Responses of 1 and 2 tokens, and a reference that is drawn."""
    space = rl_ebm.TokenSpace(3, 2, eos_id=2)
    reference = Tabular(space, scale=0.8, generator=seeded(3), dtype=torch.float64)
    scores = torch.randn(space.num_sequences, generator=seeded(4), dtype=torch.float64)
    return rl_ebm.solve(rl_ebm.EBM(space, scores, BETA, reference))


SOLUTION = solved()


def rows_of(module):
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module.rows(case_of(SOLUTION))


def batch():
    """log pi and log p_ref of what is chosen and what is not, and the lengths of both."""
    log_pi, log_ref = (-0.05 - 3 * torch.rand(2, COUNT, generator=seeded(i)).double()
                       for i in (1, 2))  # fmt: skip
    lengths = torch.tensor([[1, 2, 2, 1, 2], [2, 1, 2, 1, 1]])
    return (*log_pi, *log_ref, *lengths)


def softplus(x):
    return math.log1p(math.exp(x))


def margin(options, gap):
    """Of one pair whose scores differ by so much."""
    kind = options["loss_type"]
    if kind == "hinge":
        return max(0.0, 1 - BETA * gap)
    if kind == "ipo":
        return (gap - 1 / (2 * BETA)) ** 2
    shift = 0.5 if kind in ("simpo", "alphapo", "tpo-l") else 0.0
    return softplus(shift - BETA * gap)


def by_hand(row):
    """The loss of the batch, pair by pair, in Python's own floats."""
    chosen, rejected, chosen_ref, rejected_ref, n, m = (x.tolist() for x in batch())
    options, total = row.options, 0.0
    for i in range(COUNT):
        w, l = chosen[i], rejected[i]  # noqa: E741
        a, b = w / n[i], l / m[i]
        if "ORPO" in row.name:
            odds = a - b - math.log(1 - math.exp(a)) + math.log(1 - math.exp(b))
            total += BETA * softplus(-odds) / COUNT
        elif "KTO" in row.name:
            u, v = BETA * (w - chosen_ref[i]), BETA * (l - rejected_ref[i])
            total += (1 / (1 + math.exp(u)) + 1 / (1 + math.exp(-v))) / (2 * COUNT)
        elif "Online" in row.name:
            total += margin(options, w - chosen_ref[i] - l + rejected_ref[i]) / COUNT
        else:
            means = options["loss_type"] in ("ipo", "simpo", "alphapo", "tpo-l")
            x, y = (a, b) if means else (w, l)
            if "alpha" in options:
                x, y = ((1 - math.exp(-options["alpha"] * z)) / options["alpha"] for z in (x, y))
            total += margin(options, x - y) / COUNT
    weight = 1.0 if "ORPO" in row.name else options.get("cpo_alpha", 0.0)
    return total - weight * sum(chosen) / sum(n)


@pytest.mark.parametrize("module", [trl_pairs, trl_kto, trl_online_dpo])
def test_each_row_is_the_loss_that_its_options_say(module):
    seen = 0
    for row in rows_of(module):
        if row.unknown is not None:
            continue
        near = 1e-5 if "ORPO" in row.name else 1e-12  # it computes in float32
        assert float(row.loss(*batch())) == pytest.approx(by_hand(row), rel=near), row.options
        seen += 1
    assert seen >= 2


def test_a_token_that_is_sure_keeps_its_gradient():
    """At log pi = 0 the other token has nothing: the derivative by log pi is still that near 0."""
    (row,) = [r for r in rows_of(trl_pairs) if r.options == {"loss_type": "ipo", "cpo_alpha": 0.0}]
    found = []
    for sure in (0.0, -1e-9):
        chosen = torch.full((COUNT,), sure).double().requires_grad_()
        (g,) = torch.autograd.grad(row.loss(chosen, *batch()[1:]), chosen)
        found.append(g)
    assert torch.allclose(*found, atol=1e-7)
    assert float(found[0].abs().min()) > 0.01


def test_the_likelihood_of_a_third_response_has_no_law():
    (row,) = [r for r in rows_of(trl_pairs) if r.unknown is not None]
    assert row.default
    assert "tpo_alpha=0.0" in row.unknown


def test_a_reference_point_of_other_prompts_is_no_limit_of_one():
    with quiet():
        rows = trl_kto.rows(case_of_two())
    assert [row.unknown is not None for row in rows] == [True, False]


def case_of_two():
    """The same with two prompts."""
    return replace(case_of(SOLUTION), prompts=2)


def test_cpo_without_its_likelihood_is_dpo_of_a_uniform_reference():
    """Scores log pi are fitted by R / beta + c: the EBM of the counting measure, and no other."""
    (line,) = audit_framework(
        "trl", SOLUTION, lambda r: r.options == {"loss_type": "sigmoid", "cpo_alpha": 0.0}
    )
    (problem,) = problems(SOLUTION)
    law = torch.log_softmax(problem.g_responses, 0)
    off = float((law.exp() - problem.log_target.exp()).abs().sum()) / 2
    assert line["tv"] == pytest.approx(off, abs=1e-8)
    assert line["is_target"] is False
    assert line["instead"]["options"] == {"loss_type": "sigmoid"}


def test_online_ipo_of_trl_is_its_own_best_answer():
    """log pi / p_ref = P(higher than a draw) / beta + c, ties at a half."""
    (row,) = [
        r for r in rows_of(trl_online_dpo)
        if r.options == {"loss_type": "ipo", "temperature": 1.0}
    ]  # fmt: skip
    found = audit_loss(
        row.loss, SOLUTION, "preference", sampler=row.sampler, pairs=row.pairs, beyond=False
    )
    (problem,) = problems(SOLUTION)
    law = found.log_laws[0]
    wins = 0.5 * (1 + (problem.g_responses[:, None] - problem.g_responses).sign())
    off = law - problem.log_ref_responses - wins @ law.exp() / BETA
    assert float(off.max() - off.min()) < 1e-8
