"""Where kinks of a preference loss meet: held against what the expected loss itself says."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import relu

from rl_ebm import EBM, TokenSpace, audit_loss, solve
from rl_ebm.divergences import tv
from rl_ebm.exact import Solution
from rl_ebm.studies.losses import pair_rests
from rl_ebm.studies.losses.cases import asked, cases_of
from rl_ebm.studies.losses.kinds import in_units
from rl_ebm.studies.losses.preference import Pairs, Preference
from rl_ebm.studies.losses.responses import normalised

Loss = Callable[..., Tensor]
REWARD = torch.tensor([0.3, -1.1, 0.9, 0.2, 1.4, -0.6, 0.1, 0.5], dtype=torch.float64)


def _solution(eos_id: int | None = None) -> Solution:
    space = TokenSpace(2 if eos_id is None else 3, 3, eos_id=eos_id)
    return solve(EBM(space, REWARD[: space.num_sequences], beta=0.5))


def _hinge(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return relu(1 - 0.7 * ((x - u) - (y - v))).mean()


def _beside_likelihood(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """CPO's hinge: smooth beside its kinks, and steeper where the pair is the wrong way round."""
    return (relu(1 - 0.7 * (x - y)) - 0.2 * x).mean()


def _clamped(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Two kinks in a pair, of which one is in the rejected response alone."""
    return (relu(1 - 0.7 * (x - y)) + relu(y + 3.0) - 0.1 * x).mean()


def _short(x: Tensor, y: Tensor, u: Tensor, v: Tensor, m: Tensor, n: Tensor) -> Tensor:
    """A hinge of means over tokens: what one law's pairs want no other can give."""
    return (relu(1 - 2.0 * (x / m - y / n)) - 0.2 * x).mean()


def _expected(
    loss: Loss, laws: Tensor, solution: Solution, labels: str = "bradley-terry"
) -> Tensor:
    """The expected loss of each log-law, pair by pair; tokens are drawn alike, the last is EOS."""
    space = solution.space
    lengths = space.sequences()[1].double()
    free = lengths if space.eos_id is None else lengths.clamp(max=space.max_length - 1)
    mu = float(space.vocab_size) ** -free
    assert float(mu.sum()) == pytest.approx(1.0)
    reward = REWARD[: len(mu)]
    total = torch.zeros(len(laws), dtype=torch.float64)
    for i, j in itertools.product(range(len(mu)), repeat=2):
        gap = reward[i] - reward[j]
        wins = torch.sigmoid(gap) if labels == "bradley-terry" else (gap.sign() + 1) / 2
        zero = torch.zeros(1, dtype=torch.float64)
        more = (lengths[i, None], lengths[j, None]) if loss is _short else ()
        each = [loss(law[i, None], law[j, None], zero, zero, *more) for law in laws]
        total += 2 * mu[i] * mu[j] * wins * torch.stack(each)
    return total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "labels"),
    [(_hinge, "bradley-terry"), (_beside_likelihood, "higher"), (_clamped, "bradley-terry")],
)
def test_no_law_nearby_has_a_smaller_expected_loss(loss: Loss, labels: str) -> None:
    """Each is convex in logits of whole responses, so that the smallest nearby is the smallest."""
    _is_least(loss, _solution(), labels)


@pytest.mark.slow
def test_nor_where_lengths_differ() -> None:
    _is_least(_short, _solution(eos_id=0))


def _is_least(loss: Loss, solution: Solution, labels: str = "bradley-terry") -> None:
    found = audit_loss(loss, solution, "preference", pairs=Pairs(labels), beyond=False)
    (law,) = found.log_laws
    assert found.how.startswith("flow, along a kink")
    assert found.accuracy < 1e-6
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(60, len(law), generator=generator, dtype=torch.float64)
    for size in (1e-1, 1e-3, 1e-5):
        near = torch.log_softmax(law + size * others, -1)
        here, there = (_expected(loss, x, solution, labels) for x in (law[None], near))
        assert float((there - here).min()) > -1e-9 * size


@pytest.mark.slow
def test_a_loss_in_float32_is_as_good_as_it_says() -> None:
    def rounded(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return _beside_likelihood(x.float(), y.float(), u.float(), v.float())

    exact, found = (
        audit_loss(f, _solution(), "preference", beyond=False)
        for f in (_beside_likelihood, rounded)
    )
    assert found.accuracy < 1e-3
    assert float(tv(exact.log_laws[0], found.log_laws[0])) <= found.accuracy + 1e-4


def _flow(loss: Loss) -> Preference:
    (case,) = cases_of(
        asked(loss, "preference", "centred", None, None, 1, None, Pairs()), _solution()
    )
    flow = in_units(case.flow)
    assert isinstance(flow, Preference)
    return flow


def _half(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Its gradients are 0 and 1/2, which float32 holds exactly."""
    return relu(1 - 0.5 * (x - y)).mean()


def _smooth(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return -torch.nn.functional.logsigmoid(0.7 * (x - y)).mean()


@pytest.mark.parametrize("loss", [_half, _hinge, _smooth])
def test_float32_is_told_from_constants_that_fit_it(loss: Loss) -> None:
    assert not _flow(loss).rows.rough
    assert _flow(lambda *given: loss(*(x.float() for x in given))).rows.rough


def _dies(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """What is rejected more often than chosen falls for ever, past all kinks."""
    return (relu(1 - 0.7 * (x - y)) + 5.0 * y).mean()


@pytest.mark.parametrize("loss", [_smooth, _dies])
def test_without_a_kink_to_rest_on_it_says_nothing(loss: Loss) -> None:
    flow = _flow(loss)
    assert flow.rest_on_kinks(flow.responses.start) is None


def test_nor_where_the_policy_itself_draws() -> None:
    (case,) = cases_of(
        asked(_hinge, "preference", "centred", "policy", None, 1, None, Pairs()), _solution()
    )
    assert case.flow.rest_on_kinks(case.start) is None


def _root(kind: torch.dtype) -> Loss:
    """DPO with the divergence whose derivative is -2 (ratio ** -0.5 - 1), in this precision."""

    def loss(*log_p: Tensor) -> Tensor:
        x, y, u, v = (z.to(kind) for z in log_p)
        gap = 2 * (torch.exp(-0.5 * (y - v)) - torch.exp(-0.5 * (x - u)))
        return -torch.nn.functional.logsigmoid(0.5 * gap).mean()

    return loss


@pytest.mark.parametrize("eos_id", [None, 0])
def test_a_rest_in_float32_is_as_far_off_as_it_says(eos_id: int | None) -> None:
    """A direction that is a hundred times slower is a hundred times further from its rest."""
    exact, rough = (
        audit_loss(_root(kind), _solution(eos_id), "preference", beyond=False)
        for kind in (torch.float64, torch.float32)
    )
    assert exact.log_laws is not None
    assert rough.log_laws is not None
    assert exact.accuracy < 1e-10 < rough.accuracy < 1e-4
    assert float(tv(exact.log_laws[0], rough.log_laws[0])) <= rough.accuracy
    assert rough.how == "flow"


def test_a_last_window_that_fails_leaves_what_those_before_it_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is off by a share of the last width that was looked at, and says so."""
    flow = _flow(_hinge)
    whole = flow.rest_on_kinks(flow.responses.start)
    assert whole is not None
    looked = pair_rests._in_window

    def fails(*args: Any) -> tuple[Tensor, float] | None:
        return None if args[2] <= pair_rests.WIDTHS[-1] else looked(*args)

    monkeypatch.setattr(pair_rests, "_in_window", fails)
    less = flow.rest_on_kinks(flow.responses.start)
    assert less is not None
    r = flow.responses
    off = float(tv(*(r.log_law(normalised(x, r.start)) for x in (whole[0], less[0]))))
    assert off <= max(whole[1] + less[1], 1e-12)


@pytest.mark.parametrize("beta", [0.3, 0.15])
def test_pairs_that_hardly_ever_hold_what_is_rare(beta: float) -> None:
    """DPO rests at the EBM whatever its pairs are: here the EBM's own, 1e-15 of them of the rarest.

    One rare response after another then falls by many nats before any gradient is small.
    """
    generator = torch.Generator().manual_seed(7)
    reward = torch.randn(27, generator=generator).double()
    solution = solve(EBM(TokenSpace(3, 3), reward, beta=beta))
    found = audit_loss(_dpo_at(beta), solution, "preference", sampler="teacher", beyond=False)
    log_target = (reward / beta).log_softmax(0)
    assert float(log_target.min()) < -10
    assert found.log_laws is not None
    assert float(tv(found.log_laws[0], log_target)) < 1e-12
    assert found.accuracy < 1e-12
    assert float((found.log_laws[0] - log_target).abs().max()) < 1e-3


def _dpo_at(beta: float) -> Loss:
    def loss(chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor) -> Tensor:
        gap = beta * (chosen - chosen_ref - rejected + rejected_ref)
        return -torch.nn.functional.logsigmoid(gap).mean()

    return loss
