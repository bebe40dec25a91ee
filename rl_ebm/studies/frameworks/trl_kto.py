"""TRL's KTO, by its trainer's own ``_compute_loss``.

Its data are single responses that are called desirable or not: both of each pair here, so that one
is desirable as often as it is chosen. Its reference point is the mean of log pi - log ref of other
prompts' responses in a batch, 0 where that is below 0. With one prompt those are drawn by the
reference too: in large batches the mean is -KL(ref, pi), never above 0, and the point is 0. That is
what a batch is given whose own are 0. (In small ones it is above 0 by chance, and moves the limit:
that is not shown here.) With several prompts it is of responses that no prompt's policy was
asked for, and there is no limit of one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rl_ebm.studies.frameworks.rows import Case, Row, family, nothing, part
from rl_ebm.studies.frameworks.trl_dpo import INSTEAD
from rl_ebm.studies.frameworks.trl_trainer import TokenZero, shipped, spread, stand_in

KTO = "trl.trainer.kto_trainer"
TYPES = ("kto", "apo_zero_unpaired")


def rows(case: Case) -> list[Row]:
    """Both ``loss_type``."""
    return family(KTO, partial(_rows, case), "preference")


def _rows(case: Case) -> list[Row]:
    config = part("trl.trainer.kto_config", "KTOConfig")
    name = "KTOTrainer._compute_loss"
    part(KTO, "KTOTrainer._compute_kl_logps")
    found = []
    for kind in TYPES:
        options = {"loss_type": kind}
        trainer = stand_in(
            part(KTO, "KTOTrainer"),
            config,
            {"beta": case.beta, **options},
            precompute_ref_logps=True,
            calculate_KL=kind == "kto",
            ref_model=None,
            _total_train_tokens=0,
            _tp_size=1,
        )
        part(KTO, name)
        several = case.prompts > 1 and kind == "kto"
        found.append(
            Row(
                f"{KTO}.{name}",
                options,
                "preference",
                nothing if several else loss_of(trainer, case.max_length),
                default=shipped(config, options),
                instead=INSTEAD,
                unknown="its reference point is of other prompts' responses, so that no prompt has "
                "a limit of its own"
                if several
                else None,
            )
        )
    return found


def loss_of(trainer: Any, longest: int) -> Callable[..., Tensor]:
    """The trainer's loss as a function of the contract.

    Args:
        longest: tokens of the longest response.
    """

    def loss(
        chosen: Tensor,
        rejected: Tensor,
        chosen_ref: Tensor,
        rejected_ref: Tensor,
        chosen_length: Tensor,
        rejected_length: Tensor,
    ) -> Tensor:
        for kept in trainer._metrics.values():
            kept.clear()
        lengths = torch.cat([chosen_length, rejected_length])
        log_pi, mask = spread(torch.cat([chosen, rejected]), lengths, longest)
        log_ref = torch.cat([chosen_ref, rejected_ref])
        others = torch.zeros_like(log_ref)
        trainer._compute_kl_logps = lambda *_: others
        prompt = torch.zeros(len(mask), 1, dtype=torch.long)
        completion = torch.cat([prompt, mask.long()], 1)
        batch = {
            "input_ids": torch.zeros_like(completion),
            "attention_mask": torch.ones_like(completion),
            "completion_mask": completion,
            "label": torch.arange(len(mask)) < len(chosen),
            "ref_logps": log_ref,
            "ref_KL_logps": others,
        }
        found = trainer._compute_loss(TokenZero(log_pi), batch, False)
        assert isinstance(found, Tensor)
        return found

    return loss
