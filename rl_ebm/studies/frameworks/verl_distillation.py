"""verl's distillation: each of its losses, called as its workers do, without a task's reward.

With ``use_policy_gradient``, which is shipped, the estimate is what a token is charged, and its
own gradient is left out; else the estimate is the loss. ``forward_kl_topk`` computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.studies.frameworks.rows import Case, Instead, Row, part
from rl_ebm.studies.frameworks.verl_ppo import actor, batch_of

LOSSES = "verl.trainer.distillation.losses"
ESTIMATORS = ("k1", "abs", "k2", "k3")
NAME = f"{LOSSES}.distillation_loss"
FLOOR = -1e4
"""of logits: 0 * -inf is no number"""
DEFAULT = {"loss_mode": "k3", "use_policy_gradient": True}
INSTEAD = Instead(
    NAME,
    {"loss_mode": "k1", "use_policy_gradient": True},
    'set distillation_loss.loss_mode="k1" with use_policy_gradient=True (or loss_mode="k2" with '
    "use_policy_gradient=False): these have the gradient of the KL to the teacher, the others that "
    "of something else, and forward_kl_topk has no bucket for the tokens outside the top k",
)


def rows(case: Case) -> list[Row]:
    """Each estimator in both places, and the top 2 of the teacher."""
    asked: list[dict[str, Any]] = [
        {"loss_mode": k, "use_policy_gradient": p}
        for p in (True, False)
        for k in ESTIMATORS
        if p or k != "k1"  # refused: it has no gradient
    ]
    asked += [
        {"loss_mode": "forward_kl_topk", "topk": 2, "use_policy_gradient": p}
        for p in (True, False)
    ]  # fmt: skip
    return [
        Row(
            NAME,
            options,
            "distillation",
            _loss_of(actor(case, {}), options),
            sampler="student",
            default=options == DEFAULT,
            instead=INSTEAD,
        )
        for options in asked
    ]


def _loss_of(config: Any, options: dict[str, Any]) -> Callable[..., Tensor]:
    """verl's loss as a function of the contract."""
    distillation_loss = part(LOSSES, "distillation_loss")
    with redirect_stdout(StringIO()):  # it prints what it thinks of its own options
        given = part("verl.workers.config", "DistillationLossConfig")(
            use_task_rewards=False, **options
        )
    settings = SimpleNamespace(distillation_loss=given)

    def loss(
        student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, mask: Tensor
    ) -> Tensor:
        student, teacher = (x.clamp(min=FLOOR) for x in (student_logits, teacher_logits))
        if "topk" in options:
            student, teacher = student.float(), teacher.float()
        log_pi, log_q = (
            _at_tokens(x, tokens).masked_fill(~mask.bool(), 0.0) for x in (student, teacher)
        )
        output, data = batch_of(log_pi, mask, old_log_probs=log_pi.detach())
        attention = data["attention_mask"].bool()
        if "topk" in options:
            top = teacher.log_softmax(-1).topk(options["topk"], -1)
            data["teacher_logprobs"] = _nested(top.values, attention)
            data["teacher_ids"] = _nested(top.indices, attention)
            packed = _packed(student, attention)[None]
            found = part(LOSSES, "distillation_ppo_loss")(
                config, settings, data=data, student_logits=packed
            )
            output |= {name: value[0] for name, value in found.items()}
        else:
            data["teacher_logprobs"] = _nested(log_q[..., None], attention)
        value = distillation_loss(config, settings, output, data)[0]
        assert isinstance(value, Tensor)
        return value

    return loss


def _at_tokens(logits: Float[Tensor, "B T A"], tokens: Int64[Tensor, "B T"]) -> Tensor:
    """log pi of each token."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def _packed(values: Float[Tensor, "B T K"] | Int64[Tensor, "B T K"], attention: Tensor) -> Tensor:
    """Rows one after another, without their padding; the last of each is of no token."""
    return torch.cat([values, torch.zeros_like(values[:, :1])], 1)[attention]


def _nested(values: Float[Tensor, "B T K"] | Int64[Tensor, "B T K"], attention: Tensor) -> Tensor:
    ends = torch.cat([torch.zeros(1, dtype=torch.long), attention.sum(1).cumsum(0)])
    return torch.nested.nested_tensor_from_jagged(_packed(values, attention), ends)
