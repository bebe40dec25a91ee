"""Pairs that the policy itself draws, warm or not, and pairs whose higher reward always wins."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.functional import logsigmoid
from toy_policies import seeded

import rl_ebm
from rl_ebm.divergences import tv
from rl_ebm.policies import Tabular
from rl_ebm.studies.losses.kinds import preference_flow
from rl_ebm.studies.losses.preference import Pairs
from rl_ebm.studies.losses.responses import normalised, responses_of
from rl_ebm.studies.problems import problems

BETA = 0.7


def solved(scores=None, eos=1, depth=3):
    space = rl_ebm.TokenSpace(3, depth, eos_id=eos)
    if scores is None:
        scores = torch.randn(space.num_sequences, generator=seeded(4), dtype=torch.float64)
    reference = Tabular(space, scale=0.8, generator=seeded(3), dtype=torch.float64)
    return rl_ebm.solve(rl_ebm.EBM(space, scores, BETA, reference))


def ipo(chosen, rejected, chosen_ref, rejected_ref):
    return (chosen - chosen_ref - rejected + rejected_ref - 1 / (2 * BETA)).square().mean()


def dpo(chosen, rejected, chosen_ref, rejected_ref):
    return -logsigmoid(BETA * (chosen - chosen_ref - rejected + rejected_ref)).mean()


@pytest.mark.parametrize("labels", ["bradley-terry", "higher"])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_the_expected_gradient_of_pairs_that_the_policy_draws(labels, temperature):
    """All pairs one by one, their law held fixed, by autograd through the logits of every state."""
    solution = solved(eos=None, depth=2)
    (problem,) = problems(solution)
    r = responses_of(problem)
    pairs = Pairs(labels, temperature)
    flow = preference_flow(dpo, r, drawn=None, pairs=pairs)
    theta = torch.randn(r.start.shape, generator=seeded(5), dtype=torch.float64)
    logits = theta.clone().requires_grad_()

    def log_law(x):  # two tokens: the state before the second is 1 + the first
        a, b = x[0].log_softmax(0), x[1:].log_softmax(1)
        return (a[:, None] + b).flatten()

    log_pi, mu = log_law(logits), log_law(theta / temperature).exp()
    total = torch.zeros((), dtype=torch.float64)
    for y, z in itertools.product(range(9), repeat=2):
        gap = float(r.reward[y] - r.reward[z])
        wins = 1 / (1 + math.exp(-gap)) if labels == "bradley-terry" else float(gap > 0)
        wins = 0.5 if y == z else wins
        ref = problem.log_ref_responses
        h = log_pi[y] - ref[y] - log_pi[z] + ref[z]
        total = total - 2 * mu[y] * mu[z] * wins * logsigmoid(BETA * h)
    (want,) = torch.autograd.grad(total, logits)
    assert torch.allclose(flow.field(theta)[0], want, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["bradley-terry", "higher"])
@pytest.mark.parametrize("temperature", [0.9, 1.0])
def test_ipo_of_the_policys_own_pairs_is_its_own_best_answer(labels, temperature):
    """Its rest is log pi / p_ref = (P(y beats who draws) - 1/2) / beta + c: found by turns."""
    solution = solved(eos=None, depth=2)
    found = rl_ebm.audit_loss(
        ipo, solution, "preference", sampler="policy", pairs=Pairs(labels, temperature),
        beyond=False,
    )  # fmt: skip
    (problem,) = problems(solution)
    r = responses_of(problem)
    gap = r.reward[:, None] - r.reward
    wins = torch.sigmoid(gap) if labels == "bradley-terry" else 0.5 * (1 + gap.sign())
    law = r.log_law(r.start)
    for _ in range(4000):
        drawn = normalised(r.logits(law) / temperature, r.start)
        best = r.log_law(r.start) + (wins @ r.log_law(drawn).exp()) / BETA
        law = torch.log_softmax(0.8 * law + 0.2 * best, 0)
    assert float(tv(found.log_laws[0], law)) < 1e-10
    assert found.degenerate is False
    assert found.options.get("labels", "bradley-terry") == labels
    assert found.options.get("temperature", 1.0) == temperature


@pytest.mark.slow
def test_a_winner_that_always_wins_is_all_that_dpo_leaves():
    """Two equal winners are kept as the reference has them: one gradient pulls both."""
    scores = torch.tensor([0.3, 1.0, -0.4, 0.2, 1.0, 0.1, -1.0, 0.0, 0.5]).double()
    solution = solved(scores, eos=None, depth=2)
    found = rl_ebm.audit_loss(
        dpo, solution, "preference", sampler="policy", pairs=Pairs("higher"), beyond=False
    )
    assert found.degenerate
    best = found.log_laws[0].exp()[[1, 4]]
    assert float(best.sum()) == pytest.approx(1, abs=1e-8)
    ratio = problems(solution)[0].log_ref_responses[[1, 4]].exp()
    assert torch.allclose(best, ratio / ratio.sum(), atol=1e-6)


def test_what_pairs_cannot_be():
    with pytest.raises(ValueError, match="labels must be one of 'bradley-terry', 'higher'"):
        Pairs("higest")
    with pytest.raises(ValueError, match="temperature"):
        Pairs(temperature=0.0)
    with pytest.raises(ValueError, match="pairs are of kind='preference'"):
        rl_ebm.audit_loss(ipo, solved(), "distillation", pairs=Pairs())
    with pytest.raises(ValueError, match="temperature of 2 is that of the policy's own draws"):
        rl_ebm.audit_loss(ipo, solved(), "preference", pairs=Pairs(temperature=2.0))
    with pytest.raises(TypeError, match="pairs must be"):
        rl_ebm.audit_loss(ipo, solved(), "preference", pairs="higher")


def down(chosen, rejected, chosen_ref, rejected_ref):
    """APO-down: sigmoids that saturate, so that all but one response fall, ever slower."""
    own, gap = chosen - chosen_ref, chosen - chosen_ref - rejected + rejected_ref
    return (torch.sigmoid(BETA * own) + torch.sigmoid(-BETA * gap)).mean()


@pytest.mark.slow
def test_what_falls_ever_slower_is_dead_and_the_rest_is_where_the_plain_flow_leads():
    """The flow by hand, in logits, by Heun's steps as long as their error lets them be."""
    space = rl_ebm.TokenSpace(3, 2)
    uniform = Tabular(space, scale=0.0, dtype=torch.float64)
    scores = 3 * torch.randn(9, generator=seeded(2), dtype=torch.float64)
    solution = rl_ebm.solve(rl_ebm.EBM(space, scores, BETA, uniform))
    found = rl_ebm.audit_loss(down, solution, "preference", beyond=False)
    p = 2 / 81 * torch.sigmoid(scores[:, None] - scores)
    x, h = torch.zeros(4, 3, dtype=torch.float64), 1.0

    def law(x):
        return (x[0].log_softmax(0)[:, None] + x[1:].log_softmax(1)).flatten()

    def slope(x):
        leaf = x.clone().requires_grad_()
        u = BETA * (law(leaf) + math.log(9))
        value = (p * (torch.sigmoid(u)[:, None] + torch.sigmoid(u - u[:, None]))).sum()
        return torch.autograd.grad(value, leaf)[0]

    for _ in range(1000):
        first = slope(x)
        second = slope(x - h * first)
        error = float((h * (second - first) / 2).abs().max())
        if error <= 1e-2:
            x = x - h * (first + second) / 2
        h *= min(2.0, max(0.3, 0.9 * (1e-2 / max(error, 1e-300)) ** 0.5))
    best = int(law(x).argmax())
    assert float(law(x)[best].exp()) > 0.999
    assert found.degenerate
    assert found.survivors["responses"] < 9
    assert float(found.log_laws[0][best].exp()) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_a_loss_in_float32_that_bends_much_settles():
    """Scores 2 - 2 exp(-u / 2), in float32 and in float64."""

    def bent(chosen, rejected, chosen_ref, rejected_ref):
        a, b = (2 - 2 * torch.exp(-u / 2) for u in (chosen - chosen_ref, rejected - rejected_ref))
        return -logsigmoid(0.5 * (a - b)).mean()

    def rough(*pair):
        return bent(*(x.float() for x in pair))

    space = rl_ebm.TokenSpace(3, 4, eos_id=0)
    scores = torch.randn(space.num_sequences, generator=seeded(0), dtype=torch.float64)
    reference = Tabular(space, scale=1.0, generator=seeded(1), dtype=torch.float64)
    solution = rl_ebm.solve(rl_ebm.EBM(space, scores, 0.5, reference))
    exact, found = (
        rl_ebm.audit_loss(loss, solution, "preference", beyond=False) for loss in (bent, rough)
    )
    assert found.tv == pytest.approx(exact.tv, abs=1e-4)


def test_who_is_higher_does_not_depend_on_what_all_rewards_share():
    reward = torch.tensor([0.0, 1e-7, 1e-7, -2e-7], dtype=torch.float64)
    for shift in (0.0, 1e6, -1e6):
        wins = Pairs("higher").wins(reward + shift, torch.arange(4))
        gap = reward[:, None] - reward
        assert torch.equal(wins, (gap > 0).double() + 0.5 * (gap == 0))
