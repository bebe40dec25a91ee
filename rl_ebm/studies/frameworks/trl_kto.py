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
from rl_ebm.studies.frameworks.trl_trainer import (
    Both,
    TokenZero,
    forget,
    pair_loss,
    shipped,
    stand_in,
)

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
    """The trainer's loss as a function of the contract; arguments as :func:`pair_loss`."""

    def call(both: Both) -> Tensor:
        forget(trainer)
        others = torch.zeros_like(both.log_ref)
        trainer._compute_kl_logps = lambda *_: others
        batch = {
            **both.batch,
            "label": torch.arange(len(others)) < len(others) // 2,
            "ref_logps": both.log_ref,
            "ref_KL_logps": others,
        }
        found: Tensor = trainer._compute_loss(TokenZero(both.log_pi), batch, False)
        return found

    return pair_loss(call, longest)
