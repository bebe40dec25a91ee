"""TRL's DPO with each of its losses and divergences, by its trainer's own ``_compute_loss``.

Pairs come from the reference, labelled by Bradley–Terry on R in reward units. A pair brings the
log-probabilities of its two whole responses and their lengths, over which ``ipo``, ``sft`` and
``sigmoid_norm`` take means: each is laid out over as many tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from rl_ebm.studies.frameworks.rows import Case, Instead, Row, part
from rl_ebm.studies.frameworks.trl_trainer import (
    Both,
    TokenZero,
    forget,
    pair_loss,
    shipped,
    stand_in,
)

DPO = "trl.trainer.dpo_trainer"
TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")
"""of ``f_divergence_type``, besides reverse_kl, which is shipped"""
SMOOTHING = 1e-3
"""what EXO's paper, and TRL's documentation, recommend for it; 0 is refused"""

INSTEAD = Instead(
    f"{DPO}.DPOTrainer._compute_loss",
    {"loss_type": "sigmoid"},
    'train with DPOTrainer and DPOConfig(loss_type="sigmoid", beta=beta), on pairs that the '
    "reference draws: it alone is fitted by log pi - log ref = reward / beta + a constant",
)
"""of the other trainers that take pairs"""


def rows(case: Case) -> list[Row]:
    """Every ``loss_type``, ``robust`` with labels that it takes for noisy, every divergence."""
    asked: list[dict[str, Any]] = [{"loss_type": t} for t in TYPES]
    for options in asked:
        if options["loss_type"] == "exo_pair":
            options["label_smoothing"] = SMOOTHING
    asked.append({"loss_type": "robust", "label_smoothing": 0.1})
    asked += [{"f_divergence_type": f} for f in DIVERGENCES]
    return [_row(case, options) for options in asked]


def _row(case: Case, options: dict[str, Any]) -> Row:
    config = part("trl.trainer.dpo_config", "DPOConfig")
    kind = options.get("loss_type", "sigmoid")
    given = {"beta": case.beta, **options, "loss_type": [kind]}
    trainer = stand_in(
        part(DPO, "DPOTrainer"),
        config,
        given,
        loss_types=[kind],
        precompute_ref_logps=True,
        ref_model=None,
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer.loss_weights = [1.0]
    return Row(
        f"{DPO}.DPOTrainer._compute_loss",
        options,
        "preference",
        loss_of(trainer, case.max_length, rough=_rough(options)),
        default=shipped(config, given),
        instead=replace(
            INSTEAD,
            sentence='set DPOConfig(loss_type="sigmoid", beta=beta), with '
            'f_divergence_type="reverse_kl" and no label_smoothing: it alone is fitted by log pi - '
            "log ref = reward / beta + a constant",
        ),
    )


def _rough(options: dict[str, Any]) -> bool:
    """Whether it takes float32 at most: its largest exponents are listed by dtype."""
    return options.get("f_divergence_type") == "alpha_divergence"


def loss_of(trainer: Any, longest: int, rough: bool = False) -> Callable[..., Tensor]:
    """The trainer's loss as a function of the contract; arguments as :func:`pair_loss`."""

    def call(both: Both) -> Tensor:
        forget(trainer)
        chosen, rejected = both.log_ref.chunk(2)
        batch = {**both.batch, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        found: Tensor = trainer._compute_loss(TokenZero(both.log_pi), batch, False)
        return found

    return pair_loss(call, longest, rough)
