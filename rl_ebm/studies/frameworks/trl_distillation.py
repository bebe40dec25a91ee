"""TRL's distillation trainers, each by the function or method that holds its divergence.

The teacher is the EBM's exact solution. Its logits, and the student's, are what heads of identity
make of hidden states that are logits, where a trainer wants hidden states. Where a trainer mixes
its own responses with a data set, at ``lmbda``, the data are the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from rl_ebm.studies.frameworks.rows import Case, Instead, Row, family, part
from rl_ebm.studies.frameworks.trl_trainer import defaults, shipped, stand_in

DISTILLATION = "trl.trainer.distillation_trainer"
GKD = "trl.experimental.gkd.gkd_trainer"
SDFT = "trl.experimental.sdft.sdft_trainer"
SDPO = "trl.experimental.sdpo.sdpo_trainer"
IW_OPD = "trl.experimental.iw_opd.iw_opd_trainer"
BETAS = (0.0, 0.5, 1.0)
"""forward KL, Jensen–Shannon, reverse KL"""
FLOOR = -1e4
"""of logits: 0 * -inf is no number"""
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def rows(case: Case) -> list[Row]:
    """Of the trainers that the installed release has."""
    families = [
        (DISTILLATION, _distillation), (GKD, _gkd), (SDFT, _self_distillation),
        (SDPO, _self_distillation), (IW_OPD, _iw_opd),
    ]  # fmt: skip
    return [row for module, rows_of in families for row in family(module, partial(rows_of, module))]


def _finite(logits: Tensor) -> Tensor:
    return logits.clamp(min=FLOOR)


def _labels(tokens: Int64[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Int64[Tensor, "B T"]:
    return tokens.masked_fill(~mask.bool(), -100)


def _distillation(module: str) -> list[Row]:
    """DistillationTrainer: its divergence on tiles, which computes in float32."""
    divergence = part(module, "_chunked_divergence_loss")
    config = part(module.replace("_trainer", "_config"), "DistillationConfig")

    def loss_of(beta: float) -> Loss:
        def loss(
            student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, mask: Tensor
        ) -> Tensor:
            student, teacher = (_finite(x).float() for x in (student_logits, teacher_logits))
            head = torch.eye(student.shape[-1])
            found = divergence(student, teacher, head, head, mask, beta, mask.sum())[0]
            assert isinstance(found, Tensor)
            return found

        return loss

    name = f"{module}._chunked_divergence_loss"
    return [_row(name, {"beta": b}, loss_of(b), config=config) for b in BETAS]


def _gkd(module: str) -> list[Row]:
    """GKDTrainer: ``lmbda`` of the responses are the student's."""
    divergence = part(module, "GKDTrainer.generalized_jsd_loss")
    config = part(module.replace("_trainer", "_config"), "GKDConfig")
    share = defaults(config).lmbda

    def loss_of(beta: float) -> Loss:
        def loss(
            student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, mask: Tensor
        ) -> Tensor:
            found = divergence(
                _finite(student_logits), _finite(teacher_logits), _labels(tokens, mask), beta
            )
            assert isinstance(found, Tensor)
            return found

        return loss

    name = f"{module}.GKDTrainer.generalized_jsd_loss"
    return [
        _row(name, {"beta": b, "lmbda": share}, loss_of(b), share, config=config) for b in BETAS
    ]


def _self_distillation(module: str) -> list[Row]:
    """SDFTTrainer and SDPOTrainer; what they ship as top 100 is the top 2 of a small vocabulary."""
    kind = "SDFT" if module == SDFT else "SDPO"
    config = part(module.replace("_trainer", "_config"), f"{kind}Config")
    found = []
    for options in _self_options():
        trainer = stand_in(
            part(module, f"{kind}Trainer"), config, options, _name=kind, use_teacher_server=False
        )
        found.append(
            _row(
                f"{module}.{kind}Trainer._compute_self_distillation_loss",
                options,
                _self_loss(trainer, part(module, "DistillationLogits")),
                config=config,
            )
        )
    return found


def _self_options() -> list[dict[str, Any]]:
    top = [
        {"distillation_mode": "topk_logits", "distillation_topk": 2}
        | {"distillation_alpha": a, "distillation_add_tail": tail}
        for tail in (False, True)
        for a in BETAS
    ]  # fmt: skip
    full = [{"distillation_mode": "full_logits", "distillation_alpha": a} for a in BETAS]
    return [*top, *full, {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}]


def _self_loss(trainer: Any, logits_of: Any) -> Loss:
    def loss(
        student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, mask: Tensor
    ) -> Tensor:
        for kept in trainer._metrics.values():
            kept.clear()
        masks = {f.name: mask.long() for f in fields(logits_of) if f.name.endswith("_mask")}
        given = logits_of(
            completion_ids=tokens,
            student_logits=_finite(student_logits),
            teacher_logits=_finite(teacher_logits),
            **masks,
        )
        found = trainer._compute_self_distillation_loss(trainer.model, {}, given)
        assert isinstance(found, Tensor)
        return found

    return loss


def _iw_opd(module: str) -> list[Row]:
    """IWOPDTrainer: the sampled token, weighted by how far on it stands; top-k with a tail."""
    config = part(module.replace("_trainer", "_config"), "IWOPDConfig")
    trainer = stand_in(part(module, "IWOPDTrainer"), config, {})

    def sampled(
        student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, mask: Tensor
    ) -> Tensor:
        for kept in trainer._metrics.values():
            kept.clear()
        log_q = _finite(teacher_logits).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        found = trainer._compute_iw_opd_loss(
            _finite(student_logits), tokens, _labels(tokens, mask), log_q
        )
        assert isinstance(found, Tensor)
        return found

    def top_of(options: dict[str, Any]) -> Loss:
        def loss(
            student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, mask: Tensor
        ) -> Tensor:
            found = trainer.generalized_jsd_loss(
                _finite(student_logits), _finite(teacher_logits), _labels(tokens, mask), **options
            )
            assert isinstance(found, Tensor)
            return found

        return loss

    name = f"{module}.IWOPDTrainer"
    gamma = {"iw_opd_gamma": trainer.iw_opd_gamma}
    first = _row(f"{name}._compute_iw_opd_loss", gamma, sampled, config=config)
    top = [
        {"beta": b, "top_k": 2, "add_tail": tail} for tail in (False, True) for b in BETAS
    ]  # fmt: skip
    top += [{"beta": b, "top_k": 0} for b in BETAS]
    return [first, *(_row(f"{name}.generalized_jsd_loss", o, top_of(o)) for o in top)]


def _row(
    name: str,
    options: dict[str, Any],
    loss: Loss,
    sampler: str | float = "student",
    config: type[Any] | None = None,
) -> Row:
    return Row(
        name,
        options,
        "distillation",
        loss,
        sampler=sampler,
        default=config is not None and _ships(config, options),
        instead=_instead(name, options),
    )


def _ships(config: type[Any], options: dict[str, Any]) -> bool:
    """Here beta is no coefficient, but which divergence it is."""
    beta = options.get("beta", defaults(config).beta if "beta" in options else None)
    return shipped(config, options) and beta == vars(defaults(config)).get("beta", beta)


def _instead(name: str, options: dict[str, Any]) -> Instead | None:
    """What has the teacher as its only limit, in the same trainer."""
    why = (
        "of the tokens outside the top k it sees the sum at most, and which of them has what it "
        "leaves as it was"
    )
    if "distillation_mode" in options:
        alpha = options["distillation_alpha"]
        full = {"distillation_mode": "full_logits", "distillation_alpha": alpha}
        return Instead(name, full, f'set distillation_mode="full_logits": {why}')
    if options.get("top_k"):
        full = {"beta": options["beta"], "top_k": 0}
        return Instead(name, full, f"set loss_top_k=0, the whole vocabulary: {why}")
    return None
