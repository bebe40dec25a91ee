"""The kinds of loss, each made into an expected gradient: probed, and put beside its EBM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.studies.losses import distillation, policy_gradient, preference
from rl_ebm.studies.losses.advantages import Advantages
from rl_ebm.studies.losses.contract import Inputs, Loss, LossError, check_loss
from rl_ebm.studies.losses.distillation import Distillation
from rl_ebm.studies.losses.policy_gradient import PolicyGradient
from rl_ebm.studies.losses.preference import Preference
from rl_ebm.studies.losses.responses import Responses, normalised
from rl_ebm.studies.losses.rows import ROUGH, Rows, rows_of

AnyFlow = PolicyGradient | Distillation | Preference
Maker = Callable[..., AnyFlow]
PROBED = 6
"""responses on which a loss is tried"""


def probe(responses: Responses, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Places of a few responses, with every length among them, and logits near the reference."""
    generator = torch.Generator().manual_seed(seed)
    n = len(responses.reward)
    order = torch.randperm(n, generator=generator).tolist()
    seen: dict[float, int] = {}
    for i in order:
        seen.setdefault(float(responses.lengths[i]), i)
    chosen = [*seen.values(), *order][: max(PROBED, len(seen))]
    while len(chosen) < 4:
        chosen.append(chosen[-1])
    noise = torch.randn(responses.start.shape, generator=generator, dtype=torch.float64)
    return torch.tensor(chosen), normalised(responses.start + noise / 4, responses.start)


def policy_gradient_flow(
    function: Any, responses: Responses, advantages: Advantages, **who: Any
) -> PolicyGradient:
    """A loss (log_pi, log_pi_old, log_ref, advantages, mask), all (B, T)."""
    r, (rows, table) = responses, probe(responses)
    mask = r.mask[rows]
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log_pi = r.at_tokens(table)[rows]
    inputs: Inputs = (
        log_pi,
        (log_pi + noise / 50).masked_fill(~mask, 0.0),
        r.log_ref[rows],
        noise.flip(0).masked_fill(~mask, 0.0),
        mask,
    )
    loss = Loss(function, policy_gradient.NAMES)
    combined = _combined(loss, inputs, r.lengths[rows])
    return PolicyGradient(r, combined, advantages, scaled=is_scaled(loss, inputs), **who)


def is_scaled(loss: Loss, inputs: Inputs) -> bool:
    """Whether the gradient is twice as large where the advantages are, and 0 where they are."""

    def at(scale: float) -> Tensor:
        return loss.gradients((*inputs[:3], inputs[3] * scale, inputs[4]))[0]

    once, twice = at(1.0), at(2.0)
    close = ROUGH * float(once.abs().max())
    return float(at(0.0).abs().max()) <= close and float((twice - 2 * once).abs().max()) <= close


def distillation_flow(
    function: Any,
    responses: Responses,
    teacher: Float[Tensor, "S A"],
    student: float = 1.0,
    **who: Any,
) -> Distillation:
    """A loss (student_logits, teacher_logits, tokens, mask): (B, T, A) twice, (B, T) twice."""
    r, (rows, table) = responses, probe(responses)
    loss = Loss(function, distillation.NAMES)
    made = Distillation(r, Rows(loss, "rows", False), teacher, student, **who)
    inputs = tuple(x[rows] for x in made.inputs(table))
    combined = _combined(loss, inputs, r.lengths[rows])
    return Distillation(r, combined, teacher, student, **who)


def preference_flow(function: Any, responses: Responses, **who: Any) -> Preference:
    """A loss (chosen_log_pi, rejected_log_pi, chosen_log_ref, rejected_log_ref), all (B,)."""
    r, (rows, table) = responses, probe(responses)
    log_pi, log_ref = r.log_law(table)[rows], r.log_ref.sum(1)[rows]
    inputs = (log_pi, log_pi.roll(1), log_ref, log_ref.roll(1))
    loss = Loss(function, preference.NAMES, leaves=2)
    combined = _combined(loss, inputs, torch.ones(len(rows), dtype=torch.float64))
    return Preference(r, combined, **{"drawn": r.start} | who)


def _combined(loss: Loss, inputs: Inputs, counts: Tensor) -> Rows:
    check_loss(loss, inputs)
    if len(counts) < 4:
        raise LossError(f"a loss is tried on at least 4 responses, and there are {len(counts)}")
    return rows_of(loss, inputs, counts)
