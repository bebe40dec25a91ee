"""Slopes of pairs, steps by an older one, and what is a minimum: beside autograd's Hessian."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rl_ebm import EBM, TokenSpace, audit_loss, solve
from rl_ebm.divergences import tv
from rl_ebm.exact import Solution
from rl_ebm.policies import Uniform
from rl_ebm.studies.losses import backward, beyond, drawn_pairs
from rl_ebm.studies.losses.backward import is_minimum, slope_at
from rl_ebm.studies.losses.cases import Case, asked, cases_of, ended
from rl_ebm.studies.losses.drawn_pairs import Block, Drawn, off_laws
from rl_ebm.studies.losses.flow import Limit
from rl_ebm.studies.losses.pair_rests import rest_near
from rl_ebm.studies.losses.preference import Pairs, Preference

Loss = Callable[..., Tensor]
REWARD = torch.tensor([2, -9, 7, 1, 11, -5, 3, 4], dtype=torch.float64) / 8
SPACE = TokenSpace(2, 3)
SOLUTION = solve(EBM(SPACE, REWARD, 0.5, Uniform(SPACE)))
LOG_REF = torch.full((8,), -3 * math.log(2), dtype=torch.float64)


def _dpo(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return -logsigmoid(0.7 * ((x - u) - (y - v))).mean()


def _beside_likelihood(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Of more than the difference."""
    return (-logsigmoid(0.7 * (x - y)) - 0.2 * x * (y - v).cos()).mean()


def _bowl(a: float, b: float) -> Loss:
    """At rest at the reference, with a curvature of the difference and one of each."""

    def loss(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return (a * ((x - u) - (y - v)).square() + b * (x - u).square()).mean()

    return loss


def _drawn(loss: Loss, labels: str = "bradley-terry", solution: Solution = SOLUTION) -> Drawn:
    (case,) = cases_of(
        asked(loss, "preference", "centred", None, None, 1, None, Pairs(labels)), solution
    )
    assert isinstance(case.flow, Preference)
    return Drawn.by(case.flow, LOG_REF)


def _expected(loss: Loss, log_pi: Tensor, labels: str = "bradley-terry") -> Tensor:
    """Pair by pair."""
    total = torch.zeros((), dtype=torch.float64)
    for i, j in itertools.product(range(8), repeat=2):
        gap = REWARD[i] - REWARD[j]
        wins = torch.sigmoid(gap) if labels == "bradley-terry" else (gap.sign() + 1) / 2
        refs = (LOG_REF[i, None], LOG_REF[j, None])
        total = total + 2 / 64 * wins * loss(log_pi[i, None], log_pi[j, None], *refs)
    return total


@pytest.fixture(params=["bradley-terry", "higher"])
def labels(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("loss", [_dpo, _beside_likelihood])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("pairs", [2**17, 24])
def test_slopes_are_the_hessian(
    loss: Loss, labels: str, centred: bool, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn_pairs, "PAIRS", pairs)
    generator = torch.Generator().manual_seed(0)
    x = torch.log_softmax(torch.randn(8, generator=generator, dtype=torch.float64), 0)
    drawn = _drawn(loss, labels)
    assert (len(list(drawn.blocks())) == 1) == (pairs > 64)
    found = slope_at(drawn, x, 1e-4, centred)
    free = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(_expected(loss, free, labels), free)
    second = torch.autograd.functional.hessian(lambda z: _expected(loss, z, labels), x)
    assert isinstance(second, Tensor)
    torch.testing.assert_close(found.first, first, rtol=0, atol=1e-12)
    torch.testing.assert_close(drawn.first(x), first, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.second, second, rtol=0, atol=1e-8 if centred else 1e-4)


def test_slopes_on_laws_are_those_of_what_moves_a_law() -> None:
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    drawn, x = _drawn(_beside_likelihood), torch.log_softmax(x, 0)
    found = slope_at(drawn, x, 1e-4, centred=True).on_laws(x, LOG_REF.exp())
    v = v - (x.exp() * v).sum()  # keeps it a law
    ahead, behind = (off_laws(drawn.first(z), z) for z in (x + 1e-5 * v, x - 1e-5 * v))
    torch.testing.assert_close(found @ v, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("a", [-1.0, -0.1, 0.0, 0.1, 1.0])
@pytest.mark.parametrize("b", [-1.0, -0.3, 0.0, 0.3, 1.0])
def test_a_minimum_is_where_all_curvatures_are_positive(a: float, b: float) -> None:
    if a == b == 0:
        return
    loss = _bowl(a, b)
    start = torch.zeros(8, dtype=torch.float64)
    second = torch.autograd.functional.hessian(
        lambda z: _expected(loss, torch.log_softmax(z, 0)), start
    )
    assert isinstance(second, Tensor)
    constant = torch.ones(8, 8, dtype=torch.float64)  # which moves no law
    least = float(torch.linalg.eigvalsh(second + constant).min())
    assert abs(least) > 1e-3, "a flat one is not to be told from rounding"
    assert is_minimum(_drawn(loss), LOG_REF, 1e-4) == (least > 0)


def test_what_is_flat_or_no_gradient_is_no_minimum() -> None:
    def held(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return ((x - u) * (x - u - 0.5 * (y - v)).detach()).mean() + (y - v).square().mean()

    def alone(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return (y - v).square().mean()

    def cube(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return ((x - u) - (y - v)).pow(3).mean()

    assert is_minimum(_drawn(alone), LOG_REF, 1e-4)
    assert not is_minimum(_drawn(held), LOG_REF, 1e-4)
    assert not is_minimum(_drawn(cube), LOG_REF, 1e-4)


@pytest.mark.parametrize(("sign", "least"), [(-1.0, True), (1.0, False)])
def test_that_laws_stay_laws_curves_what_is_linear(sign: float, least: bool) -> None:
    """Likelihood of the chosen one: greatest where the policy is the law of what is chosen."""

    def likelihood(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return sign * x.mean()

    chosen = torch.sigmoid(REWARD[:, None] - REWARD).mean(1) / 4
    drawn = _drawn(likelihood)
    assert float(off_laws(drawn.first(chosen.log()), chosen.log()).abs().max()) < 1e-14
    assert is_minimum(drawn, chosen.log(), 1e-4) == least


@pytest.mark.parametrize(("last", "least"), [(-torch.inf, False), (-32.0, False), (-6.0, True)])
def test_what_is_hardly_drawn_has_no_least_that_is_seen(last: float, least: bool) -> None:
    log_mu = torch.log_softmax(torch.tensor([0.0] * 7 + [last]).double(), 0)
    drawn = Drawn.by(_drawn(_bowl(1.0, 0.0)).loss, log_mu)
    assert is_minimum(drawn, LOG_REF, 1e-4) == least


def test_blocks_are_tables_with_entries_left_out() -> None:
    p = torch.tensor([[0.1, 0.0, 0.3], [0.2, 0.4, 0.0]], dtype=torch.float64)
    block = Block(slice(1, 3), p, (p > 0).flatten())
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    x, y = block.both(values)
    assert x.tolist() == [2, 2, 3, 3]
    assert y.tolist() == [1, 3, 1, 2]
    torch.testing.assert_close(block.weighted(x * y), p * values[1:, None] * values)
    some = block.some(y > 1)
    assert [z.tolist() for z in some.both(values)] == [[2, 3], [3, 2]]
    torch.testing.assert_close(
        some.weighted(torch.ones(2, dtype=torch.float64)), p * torch.tensor([0, 1, 1])
    )
    whole = Block(slice(0, 2), p, None)
    assert [z.tolist() for z in whole.some(whole.both(values)[1] == 2).both(values)] == [
        [1, 2],
        [2, 2],
    ]


def test_steps_by_an_older_slope_come_to_the_same_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is DPO's in closed form, at inverse temperature 0.7 of rewards; and are fewer."""
    rests, looked = [], []
    for pays in (backward.PAYS, 0.0):
        monkeypatch.setattr(backward, "PAYS", pays)
        count = [0]

        def counted(*args: object, count: list[int] = count) -> object:
            count[0] += 1
            return slope_at(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(backward, "slope_at", counted)
        found = rest_near(_drawn(_dpo), LOG_REF, 1e-12, 1e-4)
        assert found is not None
        rests.append(found)
        looked.append(count[0])
    exact = torch.log_softmax(REWARD / 0.7, 0)
    for law, off in rests:
        torch.testing.assert_close(law, exact, rtol=0, atol=1e-12)
        assert off < 1e-13
    assert looked[0] <= looked[1] - 3


def test_a_steep_loss_in_float32_rests_where_its_float64_does() -> None:
    """Where a gradient is small enough a slope may still be far from that of the rest."""

    def divergence(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return -logsigmoid(16.0 * (-(u - x).exp() + (v - y).exp())).mean()

    def rounded(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return divergence(x.float(), y.float(), u.float(), v.float()).double()

    reward = 12 * REWARD
    solution = solve(EBM(SPACE, reward, 0.5, Uniform(SPACE)))
    exact = rest_near(_drawn(divergence, solution=solution), LOG_REF, 1e-12, 1e-4)
    found = rest_near(_drawn(rounded, solution=solution), LOG_REF, 1e-5, 1e-2, centred=True)
    assert exact is not None
    assert found is not None
    assert found[1] < 1e-6
    assert float(tv(exact[0], found[0])) < 1e-6


def test_a_rest_that_is_a_minimum_is_not_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is none it is: from beside itself."""
    calls = [0]
    first = Preference.rest_near

    def counted(self: Preference, theta: Tensor, rest: float) -> tuple[Tensor, float] | None:
        calls[0] += 1
        return first(self, theta, rest)

    monkeypatch.setattr(Preference, "rest_near", counted)
    found = []
    for known in (Preference.is_minimum, lambda self, theta, kink=False: False):
        calls[0] = 0
        monkeypatch.setattr(Preference, "is_minimum", known)
        audit = audit_loss(_dpo, SOLUTION, "preference", beyond=False)
        found.append((calls[0], audit.log_laws[0]))
    assert [calls for calls, _ in found] == [1, 2]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-12)


def test_other_starts_are_tried_of_few_pairs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 pairs: the EBM and two more, or nothing."""
    (case,) = cases_of(
        asked(_bowl(1.0, 0.0), "preference", "centred", None, None, 1, None, None), SOLUTION
    )
    end = ended(case)
    tried: list[Tensor] = []

    def seen(case: Case, start: Tensor) -> Limit:
        tried.append(start)
        return end

    monkeypatch.setattr(beyond, "root_from", seen)
    for many, starts in ((64, 3), (63, 0)):
        monkeypatch.setattr(beyond, "MANY_PAIRS", many)
        tried.clear()
        assert beyond.other_roots(case, end) == []
        assert len(tried) == starts
