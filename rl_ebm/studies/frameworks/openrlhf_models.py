"""OpenRLHF's losses: ``PolicyLoss``, ``DPOLoss``, and its KL in the loss or in the reward.

Its package cannot be imported without flash-attn, which needs a CUDA device. The two files that
hold the losses need nothing of it: they are loaded as they are installed, beside it. They compute
in float32. What joins them stands in the middle of its actor and its experience maker, and is
written down again here from OpenRLHF 0.11: the reward of each response, its baseline taken off,
less ``compute_reward``'s penalty of each token, summed from each token on; a whitening after that
changes the scale of it all.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib import util
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rl_ebm.studies.frameworks.rows import (
    Case,
    FrameworkError,
    Instead,
    Row,
    member,
    quiet,
    version_of,
)
from rl_ebm.studies.losses.advantages import Advantages

MODELS = "openrlhf.models"
BESIDE = "rl_ebm_openrlhf_models"
"""name of the package that holds the two files, without its __init__"""
ESTIMATORS = ("k1", "k2", "k3")
BASELINES = {
    "rloo": Advantages(combine="leave-one-out"),
    "reinforce_baseline": Advantages(combine="mean"),
    "dr_grpo": Advantages(combine="mean"),
    "group_norm": Advantages(combine="std", epsilon=1e-9),
    "gae": Advantages(combine="none"),
}
"""what is taken off a reward, before a penalty; a critic's baseline, like any, moves no limit"""
POLICY = f"{MODELS}.loss.PolicyLoss"
IN_REWARD = Instead(
    POLICY,
    {"advantage.estimator": "rloo", "kl.use_loss": False, "kl.estimator": "k1"},
    "set --algo.kl.estimator k1 without --algo.kl.use_loss, and --algo.advantage.estimator rloo: "
    "as a loss the KL of a token does not see what the tokens after it cost, and group_norm "
    "scales the reward without its penalty",
)
SIGMOID = Instead(
    f"{MODELS}.loss.DPOLoss",
    {},
    "leave ipo and label_smoothing off: -log sigmoid alone is fitted by log pi - log ref = "
    "reward / beta + const",
)


def part(name: str, of: str) -> Any:
    """A member of the installed files loss.py and utils.py.

    Raises:
        FrameworkError: they cannot be loaded, or do not have it.
    """
    version = version_of("openrlhf")
    spec = util.find_spec("openrlhf")
    folders = [] if spec is None else spec.submodule_search_locations or []
    beside = ModuleType(BESIDE)
    beside.__path__ = [str(Path(folder, "models")) for folder in folders]
    sys.modules.setdefault(BESIDE, beside)
    try:
        with quiet():
            module = importlib.import_module(f"{BESIDE}.{of}")
    except Exception as error:
        raise FrameworkError(
            f"openrlhf {version} cannot be loaded here: {MODELS}.{of} was expected, and gives "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    return member(module, name, "openrlhf", f"{MODELS}.{of}")


def rows(case: Case) -> list[Row]:
    """The KL in the loss with each estimator, in the reward with each baseline; DPO."""
    asked: list[dict[str, Any]] = [
        {"advantage.estimator": a, "kl.use_loss": True, "kl.estimator": k}
        | {"kl.unbiased_gradient": unbiased}
        for a, k, unbiased in product(("rloo", "group_norm"), ESTIMATORS, (False, True))
    ]  # fmt: skip
    asked += [
        {"advantage.estimator": "group_norm", "kl.use_loss": True, "kl.estimator": "k3"} | more
        for more in ({"policy_loss_type": "gspo"}, {"token_level_loss": False})
    ]
    asked += [
        {"advantage.estimator": a, "kl.use_loss": False, "kl.estimator": k}
        for a, k in product(BASELINES, ESTIMATORS)
        if k == "k1" or a in ("rloo", "group_norm")
    ]
    dpo: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1}, {"ipo": True}]
    return [*(_policy(case, options) for options in asked), *(_dpo(case, o) for o in dpo)]


def _policy(case: Case, options: dict[str, Any]) -> Row:
    names = ("policy_loss_type", "token_level_loss")
    made = part("PolicyLoss", "loss")(**{k: options[k] for k in names if k in options})
    default = {"advantage.estimator": "gae", "kl.use_loss": False, "kl.estimator": "k1"}
    return Row(
        POLICY,
        options,
        "policy-gradient",
        loss_of(case, made, options),
        BASELINES[options["advantage.estimator"]],
        default=options == default,
        instead=IN_REWARD,
    )


def loss_of(case: Case, policy_loss: Any, options: dict[str, Any]) -> Callable[..., Tensor]:
    """What its actor adds up, as a function of the contract."""
    approx_kl, aggregate = part("compute_approx_kl", "utils"), part("aggregate_loss", "loss")
    estimator, unbiased = options["kl.estimator"], options.get("kl.unbiased_gradient", False)

    def loss(
        log_pi: Tensor, log_pi_old: Tensor, log_ref: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        log_pi, log_pi_old, log_ref, advantages = (
            x.float() for x in (log_pi, log_pi_old, log_ref, advantages)
        )
        if not options["kl.use_loss"]:
            penalty = approx_kl(log_pi_old, log_ref, kl_estimator=estimator)
            advantages = _returns(case.beta, advantages[:, 0], penalty, mask)
        total = policy_loss(log_pi, log_pi_old, advantages, mask)[0]
        if options["kl.use_loss"]:
            kl = approx_kl(log_pi, log_ref, log_pi_old, estimator, unbiased)
            whole = aggregate(kl, mask, token_level_loss=policy_loss.token_level_loss)
            total = total + case.beta * whole
        assert isinstance(total, Tensor)
        return total

    return loss


def _returns(
    beta: float, reward: Float[Tensor, "B"], penalty: Float[Tensor, "B T"], mask: Tensor
) -> Float[Tensor, "B T"]:
    """compute_reward's, summed from each token on (get_cumulative_returns with gamma 1)."""
    paid = part("compute_reward", "utils")(reward, beta, penalty, mask.long()) * mask
    found = paid.flip(1).cumsum(1).flip(1)
    assert isinstance(found, Tensor)
    return found


def _dpo(case: Case, options: dict[str, Any]) -> Row:
    made = part("DPOLoss", "loss")(case.beta, **options)

    def loss(chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor) -> Tensor:
        found = made(chosen, rejected, chosen_ref, rejected_ref)[0]
        assert isinstance(found, Tensor)
        return found

    return Row(
        f"{MODELS}.loss.DPOLoss",
        options,
        "preference",
        loss,
        default=not options,
        instead=SIGMOID,
    )
