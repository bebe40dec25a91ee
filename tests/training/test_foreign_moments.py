"""Moments of an optimiser from somebody else's checkpoint: what no training leaves is refused."""

from __future__ import annotations

import math

import pytest
import torch
from run_cases import NETWORK, small_options

import rl_ebm
from rl_ebm.files import RunError
from rl_ebm.training.run import resume, train

SPACE = rl_ebm.TokenSpace(3, 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = tmp_path_factory.mktemp("moments") / "run"
    scores = torch.randn(27, generator=torch.Generator().manual_seed(0))
    ebm = rl_ebm.EBM(SPACE, scores)
    train(ebm, out=run, options=small_options("soft-q"), network=NETWORK, steps=4, progress=False)
    return run


def matrix(learner):
    """The moments of a weight that has two dimensions."""
    return next(m for m in learner["state"].values() if m["exp_avg"].ndim == 2)


def transposed(learner):
    moments = matrix(learner)
    moments["exp_avg"] = moments["exp_avg"].t().contiguous().t()


def expanded(learner):
    moments = matrix(learner)
    moments["exp_avg_sq"] = moments["exp_avg_sq"][:1].expand_as(moments["exp_avg"])


def fill(name, value):
    return lambda learner: matrix(learner)[name].fill_(value)


SPOILT = {
    "transposed": (transposed, "laid out otherwise than its parameter"),
    "expanded": (expanded, "laid out otherwise|is damaged"),
    "none left": (lambda learner: learner["state"].clear(), "after 4 steps .* has no moments"),
    "nan": (fill("exp_avg", math.nan), "exp_avg of its optimiser is NaN, infinite or too small"),
    "negative": (fill("exp_avg_sq", -1.0), "exp_avg_sq of its .* is NaN, infinite or too small"),
    "before the start": (fill("step", -1.0), "step of its optimiser is NaN, infinite or too small"),
    "no count": (fill("step", math.nan), "step of its optimiser is NaN, infinite or too small"),
    **{
        f"no {name}": (
            lambda learner, name=name: learner["param_groups"][0].pop(name), f"has no {name}"
        )
        for name in ("betas", "eps", "weight_decay", "factor")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_no_training_leaves_is_refused(name, run):
    spoil, said = SPOILT[name]
    state = torch.load(run / "state.pt", weights_only=True)
    spoil(state["agent"]["learner"])
    torch.save(state, run / "state.pt")
    before = (run / "state.pt").read_bytes()
    with pytest.raises(RunError, match=said):
        resume(run, steps=6, progress=False)
    assert (run / "state.pt").read_bytes() == before


def test_what_torch_fills_in_may_be_missing(run):
    """A version of torch that had fewer settings has saved it."""
    state = torch.load(run / "state.pt", weights_only=True)
    state["agent"]["learner"]["param_groups"][0].pop("decoupled_weight_decay", None)
    torch.save(state, run / "state.pt")
    resume(run, steps=6, progress=False)
