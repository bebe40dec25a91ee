"""Losses of pairs that go by margins: what is found of them, windows, and where kinks meet."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from rl_ebm import EBM, TokenSpace, audit_loss, solve
from rl_ebm.divergences import tv
from rl_ebm.exact import Solution
from rl_ebm.policies import Tabular
from rl_ebm.studies.losses import margins
from rl_ebm.studies.losses.audit import LossAudit
from rl_ebm.studies.losses.cases import asked, cases_of
from rl_ebm.studies.losses.kinds import in_units
from rl_ebm.studies.losses.margin_rests import Margins
from rl_ebm.studies.losses.margins import Jumps
from rl_ebm.studies.losses.preference import Pairs, Preference

Loss = Callable[..., Tensor]
REWARD = torch.tensor([0.3, -1.1, 0.9, 0.2], dtype=torch.float64)
SPACE = TokenSpace(2, 2)


def _solution(seed: int | None = None) -> Solution:
    """Four responses, drawn alike or by a reference of this seed."""
    if seed is None:
        return solve(EBM(SPACE, REWARD, beta=0.5))
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randn(2**t, 2, generator=generator).double() for t in range(2)]
    return solve(EBM(SPACE, REWARD, beta=0.5, reference=Tabular.from_tables(tables, SPACE)))


def _flow(loss: Loss, solution: Solution, labels: str = "bradley-terry") -> Preference:
    what = asked(loss, "preference", "centred", None, None, 1, None, Pairs(labels))
    (case,) = cases_of(what, solution)
    flow = in_units(case.flow)
    assert isinstance(flow, Preference)
    return flow


def _jumps(loss: Loss, solution: Solution) -> Jumps | None:
    flow = _flow(loss, solution)
    assert flow._drawn_pairs is not None
    return Jumps.of(flow._drawn_pairs, flow._log_ref, flow.rows.rough)


def _ended(loss: Loss, solution: Solution) -> tuple[Tensor, LossAudit]:
    """The law at the end, and what is said of it."""
    found = audit_loss(loss, solution, "preference", beyond=False)
    assert found.log_laws is not None
    return found.log_laws[0], found


def _log_mu(flow: Preference) -> Tensor:
    """log-probability of each response under who draws."""
    assert flow._drawn_pairs is not None
    return flow._drawn_pairs.log_mu


def _hinge(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return relu(1 - 0.7 * ((x - u) - (y - v))).mean()


def _without_reference(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return (relu(1 - 0.7 * (x - y)) - 0.2 * x).mean()


def _two(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Jumps of 0.7 at 1 / 0.7 and of 0.4 at -0.5, beside a parabola."""
    m = (x - u) - (y - v)
    return (relu(1 - 0.7 * m) + 0.4 * relu(m + 0.5) + 0.05 * m**2).mean()


def _curved(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    m = (x - u) - (y - v)
    return (relu(1 - 0.7 * m) - 0.5 * logsigmoid(0.6 * m)).mean()


@pytest.mark.parametrize("seed", [None, 3])
def test_jumps_are_found_where_they_are(seed: int | None) -> None:
    solution = _solution(seed)
    for loss, places, sizes, bends in (
        (_hinge, [1 / 0.7], [0.7], 0.0),
        (_without_reference, [1 / 0.7], [0.7], 0.0),
        (_two, [-0.5, 1 / 0.7], [0.4, 0.7], 0.1),
        (_curved, [1 / 0.7], [0.7], None),
    ):
        found = _jumps(loss, solution)
        assert found is not None
        order = found.places.argsort()
        assert found.places[order].tolist() == pytest.approx(places, abs=1e-9)
        # The units of a loss are its own: what is known are shares of them.
        first, second = found.jumps[:, order]
        assert (first / first[-1] * sizes[-1]).tolist() == pytest.approx(sizes, rel=1e-9)
        assert second.tolist() == pytest.approx((-first).tolist(), rel=1e-9)
        by_reference = seed is not None and loss is not _without_reference
        assert bool(found.lead.any()) == by_reference
        if bends is None:
            assert found.line is None
        else:
            assert found.line is not None
            assert found.line[1] / float(first[-1]) * sizes[-1] == pytest.approx(bends, abs=1e-9)


def test_none_are_of_what_goes_by_anything_else_or_does_not_jump() -> None:
    def clamped(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return (relu(1 - 0.7 * (x - y)) + relu(y + 3.0)).mean()

    def held(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return relu(1 - 0.7 * (x - y.detach())).mean() + 0.0 * y.mean()

    def smooth(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return -logsigmoid(0.7 * ((x - u) - (y - v))).mean()

    for loss in (clamped, held, smooth):
        assert _jumps(loss, _solution(3)) is None
    assert _jumps(_hinge, _solution(3)) is not None


def test_kinks_that_are_near_each_other_are_two() -> None:
    def near(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        m = (x - u) - (y - v)
        return (relu(1.2345 - m) + relu(1.2346 - m)).mean()

    found = _jumps(near, _solution())
    assert found is not None
    assert sorted(found.places.tolist()) == pytest.approx([1.2345, 1.2346], abs=1e-9)


def _expected_gradient(loss: Loss, log_pi: Tensor, flow: Preference) -> Tensor:
    """Pair by pair, by log pi of each response."""
    x = log_pi.clone().requires_grad_()
    log_ref, reward = _log_mu(flow), flow.responses.reward
    mu, total = log_ref.exp(), torch.zeros(())
    for i, j in itertools.product(range(len(mu)), repeat=2):
        chance = 2 * mu[i] * mu[j] * torch.sigmoid(reward[i] - reward[j])
        total = total + chance * loss(x[i, None], x[j, None], log_ref[i, None], log_ref[j, None])
    (found,) = torch.autograd.grad(total, x)
    return found


@pytest.mark.parametrize("loss", [_hinge, _without_reference, _two, _curved])
def test_the_mean_over_a_window_is_one_of_logistic_noise(loss: Loss) -> None:
    """In a window of 0.3, by 20,000 places of the margin's own quantiles."""
    flow, width = _flow(loss, _solution(3)), 0.3
    margin = flow._margins
    assert margin is not None
    log_pi = torch.tensor([0.1, 0.45, 0.05, 0.4], dtype=torch.float64).log()
    share = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    noise = width * torch.logit(share)

    def averaged(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        n = len(noise)
        return loss(x.expand(n) + noise, y.expand(n), u.expand(n), v.expand(n))

    found = margin.averaged(log_pi, width)
    wanted = _expected_gradient(averaged, log_pi, flow)
    # The units of a loss are its own.
    assert torch.allclose(found.first / found.first.norm(), wanted / wanted.norm(), atol=1e-4)


@pytest.mark.parametrize("loss", [_hinge, _without_reference, _two, _curved])
def test_its_own_derivative_is_that_of_the_mean(loss: Loss) -> None:
    margin = _flow(loss, _solution(3))._margins
    assert margin is not None
    log_pi = torch.tensor([0.1, 0.45, 0.05, 0.4], dtype=torch.float64).log()
    steps = 1e-5 * torch.eye(4, dtype=torch.float64)
    rows = [
        (margin.averaged(log_pi + h, 0.3).first - margin.averaged(log_pi - h, 0.3).first) / 2e-5
        for h in steps
    ]
    close = 1e-2 if loss is _curved else 1e-8  # its mean is over three places, and they are not one
    assert torch.allclose(margin.averaged(log_pi, 0.3).second, torch.stack(rows), atol=close)


@pytest.mark.parametrize(("seed", "beta"), [(None, 0.7), (1, 0.2), (2, 0.7), (3, 0.2)])
def test_a_hinge_ends_at_the_best_of_all_levels(seed: int | None, beta: float) -> None:
    """Margins of its least expected loss are multiples of 1 / beta (differences are unimodular)."""

    def hinge(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return relu(1 - beta * ((x - u) - (y - v))).mean()

    solution = _solution(seed)
    log_ref = _log_mu(_flow(hinge, solution))
    law, found = _ended(hinge, solution)
    mu, wins = log_ref.exp(), torch.sigmoid(REWARD[:, None] - REWARD)
    levels = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.float64)
    apart = levels[:, :, None] - levels[:, None, :]
    expected = (mu[:, None] * mu * wins * relu(1 - apart)).sum((1, 2))
    best = levels[expected.argmin()]
    assert found.accuracy < 1e-8
    assert float(tv(law, torch.log_softmax(log_ref + best / beta, 0))) < 1e-8
    assert "along a kink" in found.how


def test_in_float32_it_ends_there_as_well() -> None:
    def rounded(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return _hinge(x.float(), y.float(), u.float(), v.float())

    (exact, _), (law, _) = (_ended(loss, _solution(1)) for loss in (_hinge, rounded))
    assert float(tv(exact, law)) < 1e-5


def test_a_rest_beside_its_jumps_is_a_smooth_one() -> None:
    """The parabola is steep, and its rest is not at the kink, which is at 6 nats."""

    def beside(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        m = (x - u) - (y - v)
        return ((m - 1) ** 2 + relu(m - 6)).mean()

    def alone(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return (((x - u) - (y - v) - 1) ** 2).mean()

    assert _jumps(beside, _solution()) is not None
    (law, found), (smooth, _) = (_ended(loss, _solution()) for loss in (beside, alone))
    assert found.how == "flow"
    assert float(tv(law, smooth)) < 1e-10


def test_only_a_convex_kink_that_curves_every_way_is_a_minimum() -> None:
    solution = _solution()

    def other_way(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        m = (x - u) - (y - v)
        return (0.3 * m**2 - relu(1 - m)).mean()

    flow = _flow(_hinge, solution)
    margin = flow._margins
    assert margin is not None
    end = margin.rest(_log_mu(flow), -60.0, rough=False)
    assert end is not None
    assert margin.is_minimum(end[0])
    # No pair is at its kink there: it is as good as any law beside it.
    assert not margin.is_minimum(torch.log_softmax(10 * REWARD, 0))
    # All are in the right order by as much as the kink wants, or more: beyond it, all is flat.
    kept = _flow(_hinge, solution, "higher")._margins
    assert kept is not None
    assert not kept.is_minimum(torch.log_softmax(REWARD.argsort().argsort() / 0.7, 0))
    concave = _flow(other_way, solution)._margins
    assert isinstance(concave, Margins)
    assert not concave.is_minimum(end[0])


@pytest.mark.slow
def test_the_bisection_of_pairs_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    law, found = _ended(_without_reference, _solution(2))
    monkeypatch.setattr(margins.Jumps, "of", lambda *_: None)
    by_pairs, other = _ended(_without_reference, _solution(2))
    assert max(found.accuracy, other.accuracy) < 1e-8
    assert float(tv(law, by_pairs)) <= 1e-8


def test_no_log_probability_is_above_0_where_jumps_are_looked_for() -> None:
    """Losses that are NaN there have jumps as well."""

    def hinge(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        legal = torch.log(torch.where((x <= 0) & (y <= 0), 1.0, math.nan))
        return (torch.relu(1 - (x - y)) + legal).mean()

    found = _flow(hinge, _solution())._jumps
    assert found is not None
    torch.testing.assert_close(found.places, torch.ones(1, dtype=torch.float64))
