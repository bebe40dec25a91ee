"""Losses with rests beside each rest: the flow itself decides, and how well it is known is said."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from loss_cases import top_two
from torch import Tensor
from torch.nn.functional import relu

from rl_ebm import EBM, TokenSpace, audit_loss, solve
from rl_ebm.divergences import tv
from rl_ebm.exact import Solution
from rl_ebm.studies.losses import way
from rl_ebm.studies.losses.cases import Case, asked, cases_of
from rl_ebm.studies.losses.contract import LossError
from rl_ebm.studies.losses.flow import Limit, to_go
from rl_ebm.studies.losses.kinds import in_units
from rl_ebm.studies.losses.limit import limit_from
from rl_ebm.studies.losses.preference import Pairs
from rl_ebm.studies.losses.way import decided

REWARD = torch.tensor([0.3, -1.1, 0.9, 0.2], dtype=torch.float64)


def _solution() -> Solution:
    return solve(EBM(TokenSpace(2, 2), REWARD, beta=0.5))


def _hinge(factor: float = 1.0) -> Callable[..., Tensor]:
    def loss(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return factor * relu(1 - 0.5 * ((x - u) - (y - v))).mean()

    return loss


def _by_euler(length: float) -> Tensor:
    """log-law of the hinge's flow, from the uniform law, by tiny steps of its own logits.

    Logits are those of (first token; second token after each), and the expected loss is a sum over
    all pairs, of which the one with the higher reward wins.
    """
    logits = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    wins = (REWARD[:, None] > REWARD).double() * 2 / 16
    first = None
    for _ in range(int(80 / length)):
        log_pi = logits.log_softmax(-1)
        log_law = (log_pi[0][:, None] + log_pi[1:]).flatten()
        loss = (wins * relu(1 - 0.5 * (log_law[:, None] - log_law))).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        first = float(gradient.abs().max()) if first is None else first
        if not bool(gradient.any()):
            break
        logits = (logits - length / first * gradient).detach().requires_grad_()
    return log_law.detach()


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_hinge_ends_where_its_flow_does(factor: float) -> None:
    found = audit_loss(
        _hinge(factor), _solution(), "preference", pairs=Pairs("higher"), beyond=False
    )
    coarse, fine = _by_euler(1e-2), _by_euler(5e-3)
    own = float(tv(coarse, fine))
    assert own < 1e-3
    assert 1e-8 < found.accuracy < 2e-3
    assert found.how.endswith("to one rest of many")
    assert float(tv(found.log_laws[0], fine)) <= found.accuracy + 2 * own


def _plain_hinge(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return relu(1 - 0.5 * (x - y)).mean()


def _least_hinge() -> Tensor:
    """log-law of the minimum of the expected hinge, which is linear between its kinks.

    So it lies where as many kinks meet as there are gaps: three pairs that join all four responses,
    each at one of its two margins. All of these are tried.
    """
    wins = torch.sigmoid(REWARD[:, None] - REWARD)
    pairs = list(itertools.combinations(range(4), 2))
    best = (math.inf, torch.zeros(4, dtype=torch.float64))
    for tree in itertools.combinations(pairs, 3):
        rows = torch.zeros(4, 4, dtype=torch.float64)
        for k, (i, j) in enumerate(tree):
            rows[k, i], rows[k, j] = 1, -1
        rows[3] = 1
        if abs(float(torch.linalg.det(rows))) < 0.5:
            continue
        for signs in itertools.product((-2.0, 2.0), repeat=3):
            x = torch.linalg.solve(rows, torch.tensor([*signs, 0.0], dtype=torch.float64))
            value = float((wins * relu(1 - 0.5 * (x[:, None] - x))).fill_diagonal_(0).sum())
            if value < best[0]:
                best = (value, x)
    return best[1].log_softmax(0)


@pytest.mark.slow
def test_along_kinks_it_goes_on_to_the_end() -> None:
    """The reference is uniform, and so are the draws; pairs are labelled by Bradley-Terry."""
    found = audit_loss(_plain_hinge, _solution(), "preference", beyond=False)
    assert found.how == "flow, along a kink"
    assert found.accuracy < 1e-7
    assert float(tv(found.log_laws[0], _least_hinge())) <= found.accuracy + 1e-9


def _only_first(x: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """It looks at the first token alone."""
    ratio = (x - old).exp()[:, 0]
    kl = (x - ref)[:, 0]
    return -(ratio * (advantages[:, 0] - 0.5 * kl.detach())).mean()


def test_what_a_loss_never_looks_at_leaves_a_limit_exact() -> None:
    """The second token stays uniform; the first is the softmax of its mean reward over beta."""
    found = audit_loss(_only_first, _solution(), beyond=False)
    first = torch.log_softmax(REWARD.view(2, 2).mean(1) / 0.5, 0)
    expected = (first[:, None] - math.log(2)).expand(2, 2).flatten()
    assert found.accuracy < 1e-10
    assert float(tv(found.log_laws[0], expected)) < 1e-9


def test_a_rest_that_is_alone_is_kept() -> None:
    case = _case(_hinge_of_two)
    flow = in_units(case.flow)
    end = limit_from(flow, case.start)
    assert decided(flow, case.start, end) is end


def test_what_had_not_come_to_rest_is_no_rest_of_many() -> None:
    """It comes back to where it would have come, further on than it was said to be off."""
    (case,) = cases_of(
        asked(_only_first, "policy-gradient", "centred", None, None, 1, None, None), _solution()
    )
    flow = in_units(case.flow)
    rest = limit_from(flow, case.start)
    theta = rest.theta.clone()
    theta[0, 0] += 2e-4
    law = case.responses.log_law(theta.log_softmax(1))
    short = replace(rest, theta=theta, log_law=law, accuracy=1e-6)
    off = float(tv(law, rest.log_law))
    assert off > 10 * short.accuracy
    end = decided(flow, case.start, short)
    assert not end.many
    assert float(tv(end.log_law, rest.log_law)) < 1e-3 * off


@pytest.mark.slow
def test_a_rest_with_others_beside_it_is_not() -> None:
    case = _case(_hinge())
    flow = in_units(case.flow)
    end = limit_from(flow, case.start)
    assert end.accuracy < 1e-10
    assert decided(flow, case.start, end) is not end


def _hinge_of_two(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Strictly convex in the difference: the square of the hinge's inside."""
    return (1 - 0.5 * ((x - u) - (y - v))).square().mean()


def _case(loss: Callable[..., Tensor]) -> Case:
    what = asked(loss, "preference", "centred", None, None, 1, None, Pairs("higher"))
    (case,) = cases_of(what, _solution())
    return case


def _steep(student: Tensor, *_: Tensor) -> Tensor:
    """Convex; least where the first difference is 1 and the second 2."""
    first, second = (student[:, t, 1] - student[:, t, 0] for t in (0, 1))
    return (30 * (first - 1).abs() + (second - 2).square()).mean()


@pytest.mark.slow
def test_what_slides_slowly_beside_a_steep_kink_gets_to_its_end() -> None:
    found = audit_loss(_steep, _solution(), "distillation", sampler="teacher", beyond=False)
    logits = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 2.0]], dtype=torch.float64)
    log_pi = logits.log_softmax(-1)
    expected = (log_pi[0][:, None] + log_pi[1:]).flatten()
    assert found.accuracy < 1e-4
    assert float(tv(found.log_laws[0], expected)) <= found.accuracy


SCORES = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
SHORTEST = 2e-4


def _alone(teacher: list[float]) -> list[float]:
    """Logits of one state where tiny steps end: what leaves the first two comes to stay there."""
    z = [0.0] * len(teacher)
    for _ in range(int(40 / SHORTEST)):
        i, j = sorted(range(len(z)), key=lambda a: -z[a])[:2]
        own, taught = (1 / (1 + math.exp(x[j] - x[i])) for x in (z, teacher))
        move = own * (1 - own) * (math.log(own / taught) - math.log((1 - own) / (1 - taught)))
        z[i] -= SHORTEST * move
        z[j] += SHORTEST * move
    return z


@pytest.mark.slow
def test_each_state_is_followed_to_where_it_goes_alone() -> None:
    """Which two are looked at changes on the way, and what was left behind stays where it is."""
    solution = solve(EBM(TokenSpace(3, 2), SCORES, beta=0.5))
    found = audit_loss(top_two, solution, "distillation", beyond=False)
    first = SCORES.view(3, 3) / 0.5
    teacher = torch.cat([first.logsumexp(1)[None], first])
    log_pi = torch.tensor([_alone(row) for row in teacher.tolist()]).double().log_softmax(-1)
    expected = (log_pi[0][:, None] + log_pi[1:]).flatten()
    assert found.how.endswith("to one rest of many")
    assert found.accuracy < 1e-5
    assert float(tv(found.log_laws[0], expected)) <= found.accuracy + SHORTEST
    assert found.is_target is False


@pytest.mark.slow
def test_a_rest_beside_the_kink_that_led_to_it_is_no_end_of_its_own() -> None:
    """The second and the third slide together until the first two are at rest: a smooth one."""
    solution = solve(EBM(TokenSpace(3, 1), SCORES[:3], beta=0.5))
    found = audit_loss(top_two, solution, "distillation", beyond=False)
    taught = (SCORES[:3] / 0.5).softmax(0)
    ratio = taught[0] / taught[1]
    expected = torch.stack([ratio, torch.ones(()), torch.ones(())]).log().log_softmax(0)
    assert found.accuracy < 1e-6
    assert float(tv(found.log_laws[0], expected)) <= found.accuracy + 1e-7


def test_a_loss_that_fails_where_a_state_goes_by_itself_is_left_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: object) -> Limit:
        raise LossError("it is nan there")

    solution = solve(EBM(TokenSpace(3, 1), SCORES[:3], beta=0.5))
    what = asked(top_two, "distillation", "centred", None, None, 1, None, None)
    (case,) = cases_of(what, solution)
    flow = in_units(case.flow)
    start = flow.responses.start
    end = Limit(start, flow.responses.log_law(start), torch.zeros_like(start).bool(), 0.0)
    asks: list[Limit] = []

    def at_once(*_: object) -> Limit:
        asks.append(replace(end, accuracy=1.0))
        return asks[-1]

    monkeypatch.setattr(way, "followed_on_ties", lambda *_: None)
    monkeypatch.setattr(way, "followed_apart", at_once)
    assert way._each_alone(flow, start, end, 1.0) is None  # it creeps
    assert asks
    for name in ("followed_apart", "followed_on_ties"):
        monkeypatch.setattr(way, name, failing)
        assert way._each_alone(flow, start, end, 1.0) is None


@pytest.mark.slow
def test_a_state_that_is_at_rest_is_not_moved_by_rounding() -> None:
    """The second token is worth nothing: there the teacher is the student's start."""
    reward = SCORES[:3].repeat_interleave(3)
    solution = solve(EBM(TokenSpace(3, 2), reward, beta=0.5))
    found = audit_loss(top_two, solution, "distillation", beyond=False)
    law = found.log_laws[0].view(3, 3)
    assert found.how.endswith("to one rest of many")
    assert float((law - law.logsumexp(1, keepdim=True) + math.log(3)).abs().max()) < 1e-9


def _bent(student: Tensor, *_: Tensor) -> Tensor:
    """Convex at each state; least at the kink, where the difference of its logits is 1."""
    difference = student[..., 1] - student[..., 0]
    return ((difference - 1).abs() + (difference - 2).square() / 4).mean()


@pytest.mark.slow
def test_a_rest_on_a_kink_that_is_alone_is_no_rest_of_many() -> None:
    found = audit_loss(_bent, _solution(), "distillation", beyond=False)
    log_pi = torch.tensor([0.0, 1.0], dtype=torch.float64).log_softmax(-1)
    expected = (log_pi[:, None] + log_pi).flatten()
    assert found.how == "flow, along a kink"
    assert found.accuracy < 1e-3
    assert float(tv(found.log_laws[0], expected)) <= found.accuracy


def _creeping(student: Tensor, *_: Tensor) -> Tensor:
    """Smooth, and flat from a difference of 1 on, to which it comes as 1 / time."""
    gap = student[:, :, 1] - student[:, :, 0]
    return relu(1 - gap).pow(3).mean()


@pytest.mark.slow
def test_what_creeps_without_a_kink_is_not_said_to_have_ended() -> None:
    found = audit_loss(_creeping, _solution(), "distillation", sampler="teacher", beyond=False)
    assert "kink" not in found.how
    want = torch.tensor([0.0, 1.0], dtype=torch.float64).log_softmax(0)
    law = (want[:, None] + want).flatten()
    assert float(tv(found.log_laws[0], law)) <= found.accuracy


def test_what_creeps_is_at_least_as_far_off_as_the_rest_beside_it() -> None:
    (case,) = cases_of(
        asked(_creeping, "distillation", "centred", "teacher", None, 1, None, None), _solution()
    )
    flow, states = in_units(case.flow), len(case.responses.start)
    here, there = (
        torch.tensor([[0.0, gap]], dtype=torch.float64).expand(states, 2) for gap in (0.9, 1.0)
    )
    law, rest = (case.responses.log_law(x.log_softmax(-1)) for x in (here, there))
    end = Limit(here, law, torch.zeros_like(here).bool(), 0.0)
    left = float(tv(law, rest))
    assert 0.95 * left <= way._creeps(flow, end, 1.0) < 5 * left  # it is flat beyond


def test_how_far_it_is_to_go_is_not_known_where_nothing_has_moved() -> None:
    def law(p: float) -> Tensor:
        return torch.tensor([p, 1 - p], dtype=torch.float64).log()

    assert to_go(lambda share: law(0.5)) == 1.0
    assert to_go(lambda share: law(0.5), still=1e-9) == 0.0
    # As 2 ** -time: halves of the time bring it ever less far.
    assert to_go(lambda share: law(0.5 + 2.0 ** (-20 * share) / 4)) == pytest.approx(
        2 * (2.0**-10 - 2.0**-20) / 4
    )
    # As 1 / time, which always has as far to go as it came.
    assert to_go(lambda share: law(0.5 + 0.01 / share)) == 1.0
