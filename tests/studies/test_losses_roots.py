"""Other roots of a loss: where other starts end, and which are not followed."""

import math

import pytest
import torch
from torch import Tensor

from rl_ebm import EBM, TokenSpace, audit_loss, solve
from rl_ebm.studies.losses.cases import Case, asked, cases_of, root_from
from rl_ebm.studies.losses.preference import Pairs

GAP = 3.3
"""of the rewards of two responses; beta is 1"""


def _case(loss: object) -> Case:
    ebm = EBM(TokenSpace(2, 1), torch.tensor([0.0, GAP], dtype=torch.float64), 1.0)
    (case,) = cases_of(
        asked(loss, "preference", "centred", None, None, 1, None, Pairs()), solve(ebm)
    )
    return case


def _wells(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    d = (x - u) - (y - v)
    return (-torch.cos(2 * d) - 0.2 * d).mean()


def _well(k: int) -> float:
    """log-odds d at the bottom of a well: 2 sin(2 d) = 0.2 (2 p - 1), p how often 1 is chosen."""
    p = 1 / (1 + math.exp(-GAP))
    return k * math.pi + math.asin(0.1 * (2 * p - 1)) / 2


def test_other_starts_end_in_other_wells() -> None:
    ebm = EBM(TokenSpace(2, 1), torch.tensor([0.0, GAP], dtype=torch.float64), 1.0)
    found = audit_loss(_wells, solve(ebm), "preference")

    def off(k: int) -> float:
        return abs(1 / (1 + math.exp(-_well(k))) - 1 / (1 + math.exp(-GAP)))

    wells = {k: off(k) for k in range(-6, 7)}
    assert found.tv == pytest.approx(wells[0], abs=1e-8)
    nearest = min(range(-6, 7), key=lambda k: abs(_well(k) - GAP))
    assert nearest != 0
    assert found.other_roots[0] == pytest.approx(wells[nearest], abs=1e-8)
    assert len(found.other_roots) > 1
    for root in found.other_roots:
        assert min(abs(root - x) for x in wells.values()) < 1e-8
        assert abs(root - wells[0]) > 1e-4


def test_a_start_that_comes_to_a_kink_is_not_followed() -> None:
    """Beside the first well there is a wedge, at 3 nats: a rest, of a kink."""

    def wedge(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        d = (x - u) - (y - v)
        return torch.minimum(d**2, (d - 3).abs() + 0.1 * (d - 3) ** 2).mean()

    case = _case(wedge)
    end = root_from(case, case.target)
    assert end is None


def test_nor_is_one_that_loses_a_response() -> None:
    def falls(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        d = (x - u) - (y - v)
        return torch.minimum(d**2, 9 - 3 * d).mean()

    case = _case(falls)
    assert root_from(case, case.target + torch.tensor([[0.0, 10.0]], dtype=torch.float64)) is None


def test_a_start_at_rest_is_its_own_root() -> None:
    case = _case(_wells)
    end = root_from(case, torch.tensor([[0.0, _well(2)]], dtype=torch.float64))
    assert end is not None
    assert float(end.log_law[1] - end.log_law[0]) == pytest.approx(_well(2), abs=1e-7)
