"""TRL's policy gradients: GRPO, GMPO and RLOO, each by its trainer's own ``_compute_loss``.

How rewards become advantages stands in the middle of ``_generate_and_score_completions``, which
cannot be called without a model that generates. It is written down again here, from TRL 1.16:

- GRPO takes off the group's mean and divides by its standard deviation + 1e-4, unless
  ``scale_rewards="none"``; of one prompt the batch is a group ("batch" is "group").
- ``cispo`` cuts its ratios at ``epsilon_high``, where others cut at 1 + epsilon_high: what is
  shipped, 0.2, cuts the ratio 1 too, and weighs the reward by 0.2. Its documentation asks for 5.
- RLOO pays ``beta * sum(log pi_old - log_ref)`` in the reward and takes off the mean of the others;
  with ``normalize_advantages`` it then divides by the standard deviation + 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from rl_ebm.studies.frameworks.rows import Case, Instead, Row, family, part
from rl_ebm.studies.frameworks.trl_trainer import defaults, feed, shipped, stand_in
from rl_ebm.studies.losses.advantages import Advantages

GRPO = "trl.trainer.grpo_trainer"
GMPO = "trl.experimental.gmpo.gmpo_trainer"
RLOO = "trl.trainer.rloo_trainer"
TYPES = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
EPSILON = 1e-4
"""what TRL adds to a standard deviation"""


def rows(case: Case) -> list[Row]:
    """Every ``loss_type`` x ``scale_rewards`` x ``use_bias_correction_kl``, GMPO and RLOO."""
    gmpo = family(GMPO, partial(_gmpo_rows, case))
    return [*_grpo_rows(case), *gmpo, *_rloo_rows(case)]


def _inputs(
    log_pi_old: Tensor, log_ref: Tensor, advantages: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """A batch as ``_generate_and_score_completions`` returns it, with a prompt of one token."""
    one = torch.ones(len(mask), 1, dtype=torch.long)
    return {
        "prompt_ids": one,
        "prompt_mask": one,
        "completion_ids": torch.zeros_like(mask, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages[:, 0],
        "old_per_token_logps": log_pi_old,
        "old_logps": (log_pi_old * mask).sum(1),
        "ref_per_token_logps": log_ref,
        "num_items_in_batch": mask.sum(),
    }


def loss_of(trainer: Any) -> Callable[..., Tensor]:
    """The trainer's loss as a function of the contract."""

    def loss(
        log_pi: Tensor, log_pi_old: Tensor, log_ref: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        feed(trainer, log_pi)
        found = trainer._compute_loss(None, _inputs(log_pi_old, log_ref, advantages, mask))
        assert isinstance(found, Tensor)
        return found

    return loss


def _trainer(module: str, name: str, case: Case, options: dict[str, Any]) -> tuple[Any, Any]:
    """A stand-in for a trainer, and its configuration's class."""
    config = part(module.replace("_trainer", "_config"), f"{name}Config")
    given = {"beta": case.beta, "max_completion_length": case.max_length, **options}
    args = defaults(config)
    high = {**vars(args), **options}.get("epsilon_high")
    made = stand_in(
        part(module, f"{name}Trainer"),
        config,
        given,
        epsilon_low=args.epsilon,
        _entropy_bonus_enabled=False,
    )
    made.epsilon_high = args.epsilon if high is None else high
    return made, config


def _scaled(scale: str) -> Advantages:
    if scale == "none":
        return Advantages(combine="mean")
    return Advantages(combine="std", epsilon=EPSILON)


INSTEAD = Instead(
    f"{RLOO}.RLOOTrainer._compute_loss",
    {"normalize_advantages": False},
    "train with RLOOTrainer and RLOOConfig(beta=beta): it pays the KL in the reward of the whole "
    "completion, where GRPOConfig(beta=beta) adds a loss to each token that does not see what the "
    "tokens after it will cost; no loss_type, scale_rewards or use_bias_correction_kl changes that",
)


def _grpo_rows(case: Case) -> list[Row]:
    scales = ("group", "batch", "none") if case.prompts == 1 else ("group", "none")
    asked: list[dict[str, Any]] = [
        {"loss_type": t, "scale_rewards": s, "use_bias_correction_kl": c}
        for t, s, c in product(TYPES, scales, (True, False))
    ]
    for options in asked:
        if options["loss_type"] == "luspo":  # its configuration asks for it
            options["importance_sampling_level"] = "sequence"
    asked += [
        {"loss_type": "grpo", "importance_sampling_level": "sequence"}
        | {"scale_rewards": "none", "use_bias_correction_kl": c}
        for c in (True, False)
    ]  # fmt: skip
    asked += [
        {"loss_type": "cispo", "epsilon_high": 5.0, "scale_rewards": "none"}
        | {"use_bias_correction_kl": c}
        for c in (True, False)
    ]  # fmt: skip
    asked.append({"beta": 0.0})
    return [_grpo(case, options) for options in asked]


def _grpo(case: Case, options: dict[str, Any]) -> Row:
    made, config = _trainer(GRPO, "GRPO", case, options)
    return Row(
        f"{GRPO}.GRPOTrainer._compute_loss",
        options,
        "policy-gradient",
        loss_of(made),
        _scaled(options.get("scale_rewards", made.scale_rewards)),
        default=shipped(config, options),
        instead=INSTEAD,
    )


def _gmpo_rows(case: Case) -> list[Row]:
    """GMPO is GRPO with the geometric mean of the ratios; it has no correction of its KL."""
    found = []
    for scale in ("group", "none"):
        made, config = _trainer(GMPO, "GMPO", case, {"scale_rewards": scale})
        found.append(
            Row(
                f"{GMPO}.GMPOTrainer._compute_loss",
                {"scale_rewards": scale},
                "policy-gradient",
                loss_of(made),
                _scaled(scale),
                default=shipped(config, {"scale_rewards": scale}),
                instead=INSTEAD,
            )
        )
    return found


def _rloo_rows(case: Case) -> list[Row]:
    def paid(reward: Tensor, log_pi_old: Tensor, log_ref: Tensor, mask: Tensor) -> Tensor:
        return reward - case.beta * ((log_pi_old - log_ref) * mask).sum(1)

    found = []
    for normalised in (False, True):
        options = {"normalize_advantages": normalised}
        made, config = _trainer(RLOO, "RLOO", case, options)
        combined = (
            Advantages(paid, "std", EPSILON) if normalised else Advantages(paid, "leave-one-out")
        )
        found.append(
            Row(
                f"{RLOO}.RLOOTrainer._compute_loss",
                options,
                "policy-gradient",
                loss_of(made),
                combined,
                default=shipped(config, options),
            )
        )
    return found
