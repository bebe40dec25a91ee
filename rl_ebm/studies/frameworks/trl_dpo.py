"""TRL's DPO with each of its losses, by its trainer's own ``_compute_loss``.

Pairs come from the reference, labelled by Bradley–Terry on R in reward units. A pair brings the
log-probabilities of its two whole responses; they are laid out over ``max_length`` tokens, which
``ipo``, ``sigmoid_norm`` and ``sft`` divide by: where lengths differ those have no limit here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.studies.frameworks.rows import Case, Instead, Row, part
from rl_ebm.studies.frameworks.trl_trainer import shipped, stand_in

DPO = "trl.trainer.dpo_trainer"
TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
BY_LENGTH = ("ipo", "sft", "sigmoid_norm")
SMOOTHING = 1e-3
"""what EXO's paper, and TRL's documentation, recommend for it; 0 is refused"""


def rows(case: Case) -> list[Row]:
    """Every ``loss_type``, and ``robust`` with the labels that it takes for noisy."""
    asked: list[dict[str, Any]] = [{"loss_type": t} for t in TYPES]
    for options in asked:
        if options["loss_type"] == "exo_pair":
            options["label_smoothing"] = SMOOTHING
    asked.append({"loss_type": "robust", "label_smoothing": 0.1})
    return [_row(case, options) for options in asked]


def _row(case: Case, options: dict[str, Any]) -> Row:
    config = part("trl.trainer.dpo_config", "DPOConfig")
    trainer = stand_in(
        part(DPO, "DPOTrainer"),
        config,
        {"beta": case.beta, **options, "loss_type": [options["loss_type"]]},
        loss_types=[options["loss_type"]],
        precompute_ref_logps=True,
        ref_model=None,
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer.loss_weights = [1.0]
    by_length = options["loss_type"] in BY_LENGTH and not case.fixed_length
    return Row(
        f"{DPO}.DPOTrainer._compute_loss",
        options,
        "preference",
        loss_of(trainer, case.max_length),
        default=shipped(config, {**options, "loss_type": [options["loss_type"]]}),
        instead=Instead(
            f"{DPO}.DPOTrainer._compute_loss",
            {"loss_type": "sigmoid"},
            'set DPOConfig(loss_type="sigmoid", beta=beta), with f_divergence_type="reverse_kl" '
            "and no label_smoothing: it alone is fitted by log pi - log ref = reward / beta + a "
            "constant",
        ),
        unknown="it divides by the length of a response, which a pair does not bring"
        if by_length
        else None,
    )


def loss_of(trainer: Any, length: int) -> Callable[..., Tensor]:
    """The trainer's loss as a function of the contract."""

    def loss(chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor) -> Tensor:
        for kept in trainer._metrics.values():
            kept.clear()
        log_pi = torch.cat([chosen, rejected])[:, None].expand(-1, length) / length
        ids = torch.zeros(len(log_pi), length + 1, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[:, 0] = 0  # the prompt
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "completion_mask": mask,
            "ref_chosen_logps": chosen_ref,
            "ref_rejected_logps": rejected_ref,
        }
        found = trainer._compute_loss(_Model(log_pi), batch, False)
        assert isinstance(found, Tensor)
        return found

    return loss


class _Model:
    """A language model whose token 0 has the given log-probabilities."""

    training = True

    def __init__(self, log_pi: Float[Tensor, "B T"]) -> None:
        self.log_pi = log_pi

    def __call__(self, **_: Any) -> SimpleNamespace:
        """What the fused head returns, and the logits of two tokens that releases before read."""
        given = self.log_pi
        end = given.new_zeros(len(given), 1, 2)
        other = torch.log(-torch.expm1(given.clamp(max=-1e-12)))
        return SimpleNamespace(
            log_probs=given,
            entropy=torch.zeros_like(given),
            mean_logits=torch.zeros_like(given),
            is_top1=torch.zeros_like(given, dtype=torch.bool),
            logits=torch.cat([torch.stack([given, other], -1), end], 1),
        )
