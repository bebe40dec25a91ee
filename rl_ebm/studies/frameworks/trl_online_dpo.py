"""TRL's OnlineDPO, by its trainer's own ``training_step``: the policy itself draws the pairs.

Of two responses to a prompt the one with the higher reward is chosen, always: no Bradley–Terry. The
step draws, scores and goes backwards; here the responses, their log-probabilities and their rewards
are those that it is given, what is chosen first, and its loss is taken where it would go backwards.
The sampler's ``temperature`` is 0.9 as shipped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rl_ebm.studies.frameworks.rows import Case, Instead, Row, family, part
from rl_ebm.studies.frameworks.trl_grpo import RLOO
from rl_ebm.studies.frameworks.trl_trainer import (
    Both,
    TokenZero,
    pair_loss,
    shipped,
    spread,
    stand_in,
)
from rl_ebm.studies.losses.preference import Pairs

ONLINE = "trl.experimental.online_dpo.online_dpo_trainer"
TYPES = ("sigmoid", "ipo")
TEMPERATURES = (0.9, 1.0)
"""what is shipped, and the policy itself"""
INSTEAD = Instead(
    f"{RLOO}.RLOOTrainer._compute_loss",
    {"normalize_advantages": False},
    "train with RLOOTrainer and RLOOConfig(beta=beta), which draws as well: that the higher of two "
    "rewards always wins says nothing of by how much",
)


def rows(case: Case) -> list[Row]:
    """Both ``loss_type``, as warm as shipped and at temperature 1."""
    return family(ONLINE, partial(_rows, case), "preference")


def _rows(case: Case) -> list[Row]:
    config = part(ONLINE.replace("_trainer", "_config"), "OnlineDPOConfig")
    asked: list[dict[str, Any]] = [
        {"loss_type": kind, "temperature": t} for kind in TYPES for t in TEMPERATURES
    ]
    return [_row(case, config, options) for options in asked]


def _row(case: Case, config: type[Any], options: dict[str, Any]) -> Row:
    trainer = stand_in(
        part(ONLINE, "OnlineDPOTrainer"),
        config,
        {**options, "n_gpu": 1},
        _beta=case.beta,
        eos_token_ids=[1],
        processing_class=SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids)),
        stats=defaultdict(list),
        reward_funcs=[],
        state=SimpleNamespace(global_step=1, epoch=0),
    )
    name = "OnlineDPOTrainer.training_step"
    part(ONLINE, name)
    return Row(
        f"{ONLINE}.{name}",
        options,
        "preference",
        loss_of(trainer, case.max_length),
        sampler="policy",
        default=shipped(config, options),
        instead=INSTEAD,
        pairs=Pairs("higher", options["temperature"]),
    )


def loss_of(trainer: Any, longest: int) -> Callable[..., Tensor]:
    """The trainer's loss as a function of the contract; arguments as :func:`pair_loss`."""

    def call(both: Both) -> Tensor:
        trainer.stats.clear()
        rows = len(both.mask)
        log_ref, _ = spread(both.log_ref, both.lengths, longest)
        one, read = torch.ones(rows, 1, dtype=torch.long), both.mask.long()
        seen: list[Tensor] = []
        trainer.ref_model = TokenZero(log_ref)
        trainer.accelerator.backward = lambda x, **_: seen.append(x)
        trainer._generate = lambda *_: (one, one, torch.zeros_like(read), read, None)
        wins = torch.arange(rows) < rows // 2
        trainer._calculate_rewards_from_functions = lambda **_: wins.double()
        trainer.training_step(TokenZero(both.log_pi), {"prompt": [""] * (rows // 2)})
        return seen[0]

    return pair_loss(call, longest)
