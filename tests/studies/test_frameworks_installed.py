"""The shipped losses of installed frameworks, against closed forms that are known."""

from __future__ import annotations

import pytest
from framework_cases import SMALL, needs

from rl_ebm.divergences import tv
from rl_ebm.fixed_points import Penalty
from rl_ebm.fixed_points.penalties import penalised
from rl_ebm.studies.frameworks import FRAMEWORKS, audit_framework
from rl_ebm.studies.frameworks.audit import case_of
from rl_ebm.studies.problems import problems

pytestmark = pytest.mark.filterwarnings("default")  # of other packages


def found(lines, **options):
    (line,) = [x for x in lines if options.items() <= x["options"].items()]
    return line


def ends_at(line, estimator, place="loss", group_std=False, near=1e-8):
    """Whether the limit is that of our own penalty."""
    (problem,) = problems(SMALL)
    point = penalised(problem, Penalty(estimator, place, "token", group_std))
    assert line["degenerate"] == point.degenerate
    assert line["tv"] == pytest.approx(float(tv(point.log_law, problem.log_target)), abs=near)


BESIDE = {"openrlhf": ("deepspeed",)}
"""what else has to be installed"""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs(n, *BESIDE.get(n, ()))) for n in FRAMEWORKS]
)
def test_rows_are_there_and_advice_is_a_row(name):
    """Each row's advice is another row; one is what the framework ships."""
    rows = [row for make in FRAMEWORKS[name] for row in make(case_of(SMALL))]
    known = [(row.name, row.options) for row in rows]
    assert len(rows) > 10
    for row in rows:
        assert known.count((row.name, row.options)) == 1, row
        assert row.name.startswith(name)
        if row.instead is not None:
            assert (row.instead.name, row.instead.options) in known, row


def audited(framework, part, **options):
    """The rows of a name that have these options."""

    def asked(row):
        return part in row.name and options.items() <= row.options.items()

    return audit_framework(framework, SMALL, asked)


@needs("trl")
@pytest.mark.parametrize(("corrected", "estimator"), [(False, "k3"), (True, "k2")])
@pytest.mark.parametrize("scale", ["none", pytest.param("group", marks=pytest.mark.slow)])
def test_grpo_of_trl(corrected, estimator, scale):
    """k3 in the loss of each token; times its ratio it has the gradient of k2."""
    options = {"loss_type": "dapo", "scale_rewards": scale, "use_bias_correction_kl": corrected}
    (line,) = audited("trl", "GRPOTrainer", **options)
    grouped = scale == "group"
    ends_at(line, estimator, group_std=grouped, near=1e-3 if grouped else 1e-8)


@needs("trl")
@pytest.mark.slow
def test_what_trl_ships_has_no_penalty():
    (line,) = audited("trl", "GRPOTrainer", beta=0.0)
    assert line["default"]
    assert line["degenerate"]


@needs("trl")
def test_rloo_of_trl_is_the_ebm():
    lines = audited("trl", "RLOOTrainer")
    assert len(lines) == 2
    for line in lines:
        assert line["is_target"]


@needs("trl")
def test_dpo_of_trl():
    (ipo,) = audited("trl", "DPOTrainer", loss_type="ipo")
    assert ipo["is_target"] is False
    for line in audited("trl", "DPOTrainer", **ipo["instead"]["options"]):
        assert line["is_target"]


@needs("trl")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["GKDTrainer", "full_logits"])
def test_distillation_of_trl_is_the_teacher(name):
    mode = {} if name == "GKDTrainer" else {"distillation_mode": name}
    for line in audited("trl", "GKDTrainer" if not mode else "SDFTTrainer", **mode):
        assert line["is_target"]


@needs("torchrl")
@pytest.mark.slow
def test_torchrl_with_its_kl_in_the_loss():
    (line,) = audited("torchrl", "GRPOLoss", aggregation="token_mean")
    ends_at(line, "k3", group_std=True, near=1e-3)


@needs("torchrl")
def test_torchrl_with_its_kl_in_the_reward():
    lines = audited("torchrl", "GRPOLoss", add_to_reward=True)
    assert found(lines, reward="(T, 1)", trajectory_return="sum")["is_target"]
    ends_at(found(lines, reward="(1, 1)", trajectory_return=None), "k2")


@needs("verl")
@pytest.mark.slow
def test_verl():
    low = {"use_kl_loss": True, "kl_loss_type": "low_var_kl"}
    (line,) = audited("verl", "ppo_loss", adv_estimator="rloo", **low)
    ends_at(line, "k3")
    paid = {"use_kl_in_reward": True, "kl_penalty": "kl"}
    (line,) = audited("verl", "ppo_loss", adv_estimator="grpo", **paid)
    assert line["is_target"]


@needs("openrlhf", "deepspeed")
@pytest.mark.slow
def test_openrlhf():
    paid = {"kl.use_loss": False, "kl.estimator": "k1", "advantage.estimator": "rloo"}
    (line,) = audited("openrlhf", "PolicyLoss", **paid)
    assert line["tv"] < 1e-4  # in float32
