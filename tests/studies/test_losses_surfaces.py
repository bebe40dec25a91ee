"""What a loss says of all pairs, from some thousand: beside the loss itself, and autograd."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import huber_loss, logsigmoid

from rl_ebm import EBM, TokenSpace, audit_loss, solve
from rl_ebm.divergences import tv
from rl_ebm.exact import Solution
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.studies.losses import backward, drawn_pairs, panels, preference, surfaces
from rl_ebm.studies.losses.cases import asked, cases_of
from rl_ebm.studies.losses.drawn_pairs import Drawn
from rl_ebm.studies.losses.margin_rests import TILE, _mirror
from rl_ebm.studies.losses.panels import ASIDE, panels_of, places_of, terms_of
from rl_ebm.studies.losses.preference import Pairs, Preference
from rl_ebm.studies.losses.surfaces import Surface

Loss = Callable[..., Tensor]
SPACE = TokenSpace(3, 3)
GENERATOR = torch.Generator().manual_seed(0)
REWARD = torch.randn(27, generator=GENERATOR, dtype=torch.float64)


def _solution(space: TokenSpace = SPACE, seed: int = 1) -> Solution:
    """With a reference that is not uniform."""
    generator = torch.Generator().manual_seed(seed)
    a = space.vocab_size
    tables = [torch.randn(a**t, a, generator=generator).double() for t in range(space.max_length)]
    reference = Tabular.from_tables(tables, space)
    reward = torch.randn(space.num_sequences, generator=generator, dtype=torch.float64)
    return solve(EBM(space, reward, 0.5, reference))


SOLUTION = _solution()
UNIFORM = solve(EBM(SPACE, REWARD, 0.5, Uniform(SPACE)))


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few pairs as well."""
    monkeypatch.setattr(preference, "MANY", 0)
    monkeypatch.setattr(surfaces, "PLACES", 5)


def _flow(loss: Loss, solution: Solution = SOLUTION, **who: object) -> Preference:
    what = asked(loss, "preference", "centred", who.get("sampler"), None, 1, None, who.get("pairs"))
    (case,) = cases_of(what, solution)
    assert isinstance(case.flow, Preference)
    return case.flow


def _law(seed: int = 3, nats: float = 2.0, n: int = 27) -> Tensor:
    noise = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.log_softmax(nats * noise, 0)


def _dpo(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return -logsigmoid(0.7 * ((x - u) - (y - v))).mean()


def _apart(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Of each lead by itself."""
    return (torch.sigmoid(0.5 * (y - v)) - torch.sigmoid(0.4 * (x - u))).mean()


def _odds(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Of no reference, beside a likelihood."""
    x, y = x / 3, y / 3
    odds = (x - torch.log1p(-0.3 * x.exp())) - (y - torch.log1p(-0.3 * y.exp()))
    return (-x - 0.1 * logsigmoid(odds)).mean()


def _hinge(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return (torch.relu(1 - 0.8 * ((x - u) - (y - v))) + 0.05 * (x - u).square()).mean()


def _jumps(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Both derivatives are of the margin alone: where they jump, and by how much, is known."""
    m = (x - u) - (y - v)
    return (torch.relu(1 - 0.8 * m) + m.cosh().log() - 0.1 * x).mean()


def _huber(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """A kink in its derivative far from the reference."""
    lead = (x - u) - 0.1 * (y - v)
    return huber_loss(lead, torch.zeros_like(x), delta=6.5)


def _clamped(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Of leads alone, until log pi falls below -14."""
    return -logsigmoid(0.3 * ((x.clamp(min=-14) - u) - (y.clamp(min=-14) - v))).mean()


def _squares(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Of all four."""
    return ((x - y).square() * (1 + u.square()) + v * x).mean()


def _by_the_loss(flow: Preference, log_pi: Tensor) -> Tensor:
    """Expected derivatives, by autograd of the weighted loss of each pair."""
    r = flow.responses
    x = log_pi.clone().requires_grad_()
    log_mu, log_ref = r.log_law(flow.who_draws(torch.zeros_like(r.start))), r.log_ref.sum(1)
    if flow.drawn is not None:
        log_mu = r.log_law(flow.drawn)
    total = torch.zeros((), dtype=torch.float64)
    loss = flow.rows.loss.function
    for i in range(len(log_pi)):
        for j in range(len(log_pi)):
            wins = flow.pairs.wins(r.reward, torch.tensor([i]))[0, j]
            p = 2 * (log_mu[i] + log_mu[j]).exp() * wins
            if p > 0:
                each = (z[k, None] for k, z in ((i, x), (j, x), (i, log_ref), (j, log_ref)))
                total = total + p * loss(*each)
    (found,) = torch.autograd.grad(total, x)
    return found


@pytest.mark.parametrize("loss", [_dpo, _apart, _odds, _hinge, _jumps, _huber])
@pytest.mark.parametrize("labels", ["bradley-terry", "higher"])
def test_all_pairs_have_the_derivatives_of_the_loss_itself(loss: Loss, labels: str) -> None:
    """At laws near the reference and far from it, where one response has died nearly."""
    flow = _flow(loss, pairs=Pairs(labels))
    surface = flow._surface
    assert surface is not None
    drawn = flow._drawn_pairs
    assert drawn is not None
    assert drawn.known is surface
    assert (surface.jumps is not None) == (loss is _jumps)
    unit = flow.rows.unit
    for law in (_law(), _law(4, 9.0)):
        exact = _by_the_loss(flow, law) / unit
        torch.testing.assert_close(
            drawn.first(law), exact, rtol=0, atol=1e-12 * float(exact.abs().max())
        )
        for block in drawn.blocks():
            for more in ((0.0, 0.0), (0.01, 0.0), (0.0, -0.3)):
                for a, b in zip(
                    drawn.at(law, block, more), drawn.asked(law, block, more), strict=True
                ):
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11 * surface.size)
    assert not surface._wrong


def test_what_goes_by_how_far_apart_both_are_is_known_by_its_first_derivative() -> None:
    for loss, mirrored in ((_dpo, True), (_apart, False), (_odds, False), (_hinge, False)):
        surface = _flow(loss)._surface
        assert surface is not None
        assert surface.mirrored == mirrored


def test_a_loss_that_goes_by_more_is_asked_of_everything() -> None:
    flow = _flow(_squares)
    assert flow._surface is None
    assert flow._drawn_pairs is not None
    assert flow._drawn_pairs.known is None


def test_and_so_is_one_that_does_so_far_away_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is wrong on the way there."""
    monkeypatch.setattr(surfaces, "PLACES", 1)
    flow = _flow(_clamped)
    drawn, surface = flow._drawn_pairs, flow._surface
    assert drawn is not None
    assert surface is not None
    near, far = _law(nats=1.0), _law(5, 12.0)
    assert float(near.min()) > -14 > -20 > float(far.min())
    drawn.first(near)
    assert not surface._wrong
    exact = flow._asked.first(far)
    seen = [drawn.first(far + 1e-13 * k) for k in range(3)]
    assert surface._wrong
    torch.testing.assert_close(seen[-1], exact, rtol=0, atol=1e-12)
    assert surface.at(drawn, near, next(drawn.blocks()), (0.0, 0.0)) is None


def test_most_pairs_are_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """But those of one response at each law, and those of panels with kinks."""
    flow, count = _flow(_dpo), [0]
    drawn = flow._drawn_pairs
    assert drawn is not None
    drawn.first(_law())
    slopes = Preference.slopes

    def counted(self: Preference, x: Tensor, *rest: object) -> object:
        count[0] += len(x)
        return slopes(self, x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Preference, "slopes", counted)
    drawn.first(_law() + 1e-9)
    assert count[0] == 27
    drawn.first(_law() + 1e-9)
    assert count[0] == 27


def test_nothing_is_known_of_a_law_without_a_response_that_is_drawn() -> None:
    """The loss itself is asked there, and says that it is infinite."""
    flow = _flow(_dpo)
    drawn, surface = flow._drawn_pairs, flow._surface
    assert drawn is not None
    assert surface is not None
    law = _law().clone()
    law[3] = -math.inf
    block = drawn.few()
    assert surface.at(drawn, law, block, (0.0, 0.0)) is None
    tensor = torch.zeros(len(block.both(law)[0]), dtype=torch.float64)
    assert surface.at(drawn, _law(), block, (tensor, 0.0)) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "solution", "who"),
    [
        (_dpo, SOLUTION, {}),
        (_odds, SOLUTION, {}),
        (_jumps, UNIFORM, {}),
        (_dpo, SOLUTION, {"sampler": "policy", "pairs": Pairs("higher", 0.9)}),
        (_apart, UNIFORM, {"sampler": "teacher"}),
    ],
)
def test_limits_are_those_of_a_loss_that_is_asked(
    loss: Loss, solution: Solution, who: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their accuracy holds both."""

    def audit() -> object:
        return audit_loss(loss, solution, "preference", beyond=False, **who)  # type: ignore[arg-type]

    found = audit()
    monkeypatch.setattr(preference, "MANY", 10**9)
    exact = audit()
    assert found.log_laws is not None  # type: ignore[attr-defined]
    off = float(tv(found.log_laws[0], exact.log_laws[0]))  # type: ignore[attr-defined]
    assert off <= 1e-10 + found.accuracy + exact.accuracy  # type: ignore[attr-defined]


def _bump(u: Tensor, v: Tensor, wide: float) -> Tensor:
    return 1 / (1 + ((u - 0.7) ** 2 + (v - 1.3) ** 2) / wide**2)


def test_terms_are_of_the_function() -> None:
    """At places that it was not asked at, on both sides of 0."""
    generator = torch.Generator().manual_seed(7)
    for panel, width in (((0, -1), 2.0), ((-3, 2), 1.0)):
        u, v = places_of(panel, width, ASIDE)
        terms = terms_of(torch.stack([(u * v).sin(), (-u).exp()]), 1.0)
        assert terms is not None
        lows = (torch.tensor(panel, dtype=torch.float64) - ASIDE) * width
        u, v = (lows[:, None] + width * torch.rand(2, 50, generator=generator).double()).unbind()
        (k, of_u), (j, of_v) = (panels_of(x, width, ASIDE) for x in (u, v))
        assert set(k.tolist()) == {panel[0]}
        assert set(j.tolist()) == {panel[1]}
        found = ((of_u @ terms) * of_v).sum(-1)
        exact = torch.stack([(u * v).sin(), (-u).exp()])
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_round_numbers_are_within_a_panel() -> None:
    """Where kinks like to be: a kink between two panels would not be seen."""
    x = torch.tensor([-4.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    for width in surfaces.WIDTHS:
        for nats in (-0.05, 0.05):
            beside = panels_of(x + nats, width, ASIDE)[0]
            assert beside.tolist() == panels_of(x, width, ASIDE)[0].tolist()
    certain = torch.tensor([-1e-9, 0.0, 1e-9], dtype=torch.float64)
    assert panels_of(certain, 4.0, 0.0)[0].tolist() == [-1, -1, 0]
    flow = _flow(lambda x, y, u, v: ((x - u).abs() - 0.1 * (y - v).square()).mean())
    for loss, smooth in ((_dpo, True), (_apart, True), (_jumps, False)):
        known = _flow(loss)._surface
        assert known is not None
        assert known.smooth == smooth
    assert flow._surface is not None
    assert not flow._surface.smooth


def test_no_terms_of_what_is_not_smooth() -> None:
    """A kink in either number, or something narrow that lies between the nodes."""
    u, v = places_of((0, 0), 4.0, ASIDE)
    for values in ((u - 1.1).abs(), (v - 1.1).abs(), (u - v).relu(), (u > 2).double()):
        assert terms_of(torch.stack([u, values]), 1.0) is None
    smooth = _bump(u, v, 3.0)
    assert terms_of(smooth[None], 1.0) is not None
    for x in (u, v):  # so little that the sum is not off anywhere, and does not fade
        last = torch.cos(31 * (2 * (x / 4.0 + ASIDE) - 1).clamp(-1, 1).arccos())
        assert terms_of((smooth + 1e-12 * last)[None], 1.0) is None
    assert terms_of(_bump(u, v, 0.05)[None], 1.0) is None
    beside = smooth.clone()
    beside[-1] += 1e-6
    assert terms_of(beside[None], 1.0) is None


def test_functions_of_one_number_are_smooth_or_not() -> None:
    """As they are on every panel, and at the places where they were asked before."""
    x = torch.linspace(-40, 41, 1000, dtype=torch.float64)

    def both(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda m: torch.stack([m.sin(), f(m)])

    def smooth(f: Callable[[Tensor], Tensor]) -> bool:
        return panels.is_smooth(both(f), x, both(f)(x), 2.0123)

    assert smooth(torch.sigmoid)
    assert smooth(lambda m: 0 * m)
    for place in (-39.3, 0.0, 4.0, 17.1, 40.2):

        def jump(m: Tensor, place: float = place) -> Tensor:
            return 1e-6 * (m >= place)

        def kink(m: Tensor, place: float = place) -> Tensor:
            return (m - place).relu()

        assert not smooth(jump)
        assert not smooth(kink)
    assert not smooth(lambda m: torch.sigmoid(50 * m))
    values = both(torch.sigmoid)(x)
    values[1, 500] += 1e-9
    assert not panels.is_smooth(both(torch.sigmoid), x, values, 2.0123)


def test_steps_without_factors_are_those_of_a_solver() -> None:
    generator = torch.Generator().manual_seed(2)
    n = 60
    units = torch.rand(n, generator=generator).double() + 0.1
    slope = torch.randn(n, n, generator=generator).double() / n
    off = torch.randn(n, generator=generator).double()
    for rate in (2.0, 0.7):
        found = backward._at_once(slope, off, units, rate)
        exact = torch.linalg.solve(slope + rate * torch.diag(units), -off)
        assert found is not None
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-3 * float(exact.abs().max()))
    hard = 100 * torch.randn(n, n, generator=generator).double()
    assert backward._at_once(hard, off, units, 1e-3) is None
    assert backward._at_once(torch.zeros(n, n).double(), 0 * off, units, 1.0) is not None


def test_steps_of_many_responses_come_to_the_same_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """With factors and without, which are fewer: DPO's rest in closed form."""
    flow, factored = _flow(_dpo, UNIFORM), [0, 0]
    exact, of = torch.log_softmax(REWARD / 0.7, 0), backward.Solver.of

    for i, many in enumerate((0, 10**9)):

        def counted(*args: Tensor, i: int = i) -> object:
            factored[i] += 1
            return of(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(backward, "MANY", many)
        monkeypatch.setattr(backward.Solver, "of", counted)
        found = flow.rest_near(flow.responses.start, 1e-12)
        assert found is not None
        law = flow.responses.log_law(torch.log_softmax(found[0], -1))
        torch.testing.assert_close(law, exact, rtol=0, atol=1e-11)
    assert 0 < factored[0] <= factored[1] - 3


def test_a_table_and_its_transpose() -> None:
    table = torch.randn(TILE + 37, TILE + 37, generator=GENERATOR, dtype=torch.float64)
    found = table.clone()
    _mirror(found)
    torch.testing.assert_close(found, table + table.T, rtol=0, atol=0)


def test_drawn_pairs_are_asked_where_nothing_is_known() -> None:
    flow = _flow(_dpo)
    plain = Drawn.by(flow, flow._asked.log_mu)
    block = next(plain.blocks())
    for a, b in zip(plain.at(_law(), block), plain.asked(_law(), block), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert Surface.of(plain, flow._log_ref) is not None


def test_a_few_pairs_are_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many chosen responses, and of many rejected ones."""
    drawn = _flow(_dpo)._asked
    monkeypatch.setattr(drawn_pairs, "FEW", 100)
    few = drawn.few()
    x, y = few.both(torch.arange(27))
    assert 50 < len(x) <= 100
    assert len(x.unique()) == len(y.unique()) == 27
    monkeypatch.setattr(drawn_pairs, "FEW", 27**2)
    assert drawn.few().drawn is None
    assert torch.equal(drawn.few().p, next(drawn.blocks()).p)


def test_pairs_of_the_policy_are_known_as_well_and_those_in_float32_are_not() -> None:
    """Of which differences would tell rounding alone."""
    flow = _flow(_dpo, sampler="policy")
    assert flow._surface is not None
    assert flow.pairs_of(_law()).known is flow._surface

    def rounded(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return _dpo(x.float(), y.float(), u.float(), v.float()).double()

    assert _flow(rounded)._surface is None
