"""TRL's CPO, ORPO and TPO: losses of pairs without a reference, by their trainers' own code.

Pairs come from the reference, labelled by Bradley–Terry on R in reward units, and are laid out as
for DPO. What these call beta is no weight of a KL, for there is no reference in them: it is set to
the EBM's as everywhere. In ORPO it weighs the odds ratio beside the likelihood of what is chosen.
That likelihood is a mean over the tokens of a batch; ORPO's counts those of the prompt too, which
is one here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from rl_ebm.studies.frameworks.rows import Case, Row, family, nothing, part
from rl_ebm.studies.frameworks.trl_dpo import INSTEAD
from rl_ebm.studies.frameworks.trl_trainer import TokenZero, forget, pair_loss, shipped, stand_in

CPO = "trl.experimental.cpo.cpo_trainer"
ORPO = "trl.experimental.orpo.orpo_trainer"
TPO = "trl.experimental.tpo.tpo_trainer"
ALPHA = 0.25
"""of AlphaPO: its configuration ships 0, which is SimPO"""
IGNORED = -100
"""label of a token that is not looked at"""
Batch = dict[str, Tensor]
Call = Callable[[Any, TokenZero, Batch], Tensor]


def rows(case: Case) -> list[Row]:
    """Of the trainers that the installed release has."""
    families = [(CPO, _cpo), (ORPO, _orpo), (TPO, _tpo)]
    return [
        row
        for module, rows_of in families
        for row in family(module, partial(rows_of, module, case), "preference")
    ]


def _cpo(module: str, case: Case) -> list[Row]:
    """Each ``loss_type``, beside the likelihood of what is chosen and without it."""
    asked: list[dict[str, Any]] = [
        {"loss_type": t, "cpo_alpha": a}
        for t in ("sigmoid", "hinge", "ipo", "simpo")
        for a in (1.0, 0.0)
    ]
    asked.append({"loss_type": "alphapo", "alpha": ALPHA})
    found = []
    for options in asked:
        given: dict[str, Any] = {"is_encoder_decoder": False, **options}
        if options["loss_type"] == "alphapo":  # what its configuration makes of it
            given |= {"loss_type": "simpo", "cpo_alpha": 0.0}
        found.append(_row(module, "CPO", case, options, given, _pair_metrics))
    return found


def _orpo(module: str, case: Case) -> list[Row]:
    """It computes its odds in float32, and is given no more."""
    given = {"is_encoder_decoder": False}
    return [_row(module, "ORPO", case, {}, given, _pair_metrics, rough=True)]


def _tpo(module: str, case: Case) -> list[Row]:
    """Its likelihood is of a third response; without that it is a loss of pairs."""
    gold = Row(
        f"{module}.TPOTrainer._compute_loss",
        {"loss_type": "sigmoid"},
        "preference",
        nothing,
        default=True,
        unknown="it asks for a third, gold response beside each pair, and whose law that has is up "
        "to the data: tpo_alpha=0.0 leaves it out",
    )
    without = [{"loss_type": t, "tpo_alpha": 0.0} for t in ("sigmoid", "hinge", "ipo", "tpo-l")]
    return [gold, *(_row(module, "TPO", case, o, o, _triple_loss) for o in without)]


def _row(
    module: str,
    name: str,
    case: Case,
    options: dict[str, Any],
    given: dict[str, Any],
    call: Call,
    rough: bool = False,
) -> Row:
    config = part(module.replace("_trainer", "_config"), f"{name}Config")
    method = "_compute_loss" if call is _triple_loss else "get_batch_loss_metrics"
    trainer = stand_in(
        part(module, f"{name}Trainer"),
        config,
        {"beta": case.beta, **given},
        pad_token_id=0,
        padding_value=0,
        _stored_metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    part(module, f"{name}Trainer.{method}")
    return Row(
        f"{module}.{name}Trainer.{method}",
        options,
        "preference",
        loss_of(trainer, call, case.max_length, rough),
        default=shipped(config, options),
        instead=INSTEAD,
    )


def loss_of(trainer: Any, call: Call, longest: int, rough: bool = False) -> Callable[..., Tensor]:
    """A trainer's loss as a function of the contract; further arguments as :func:`pair_loss`.

    Args:
        call: (trainer, model, batch) to its loss.
    """
    return pair_loss(lambda both: call(trainer, TokenZero(both.log_pi), both.batch), longest, rough)


def _pair_metrics(trainer: Any, model: TokenZero, batch: Batch) -> Tensor:
    """CPO and ORPO take what is chosen and what is not apart."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    given = {}
    for name, x in {**batch, "labels": labels}.items():
        given[f"chosen_{name}"], given[f"rejected_{name}"] = x.chunk(2)
    del given["chosen_completion_mask"], given["rejected_completion_mask"]
    found: Tensor = trainer.get_batch_loss_metrics(model, given)[0]
    return found


def _triple_loss(trainer: Any, model: TokenZero, batch: Batch) -> Tensor:
    forget(trainer)
    found: Tensor = trainer._compute_loss(model, batch, False)
    return found
