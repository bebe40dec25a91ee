"""The kinds of loss, each made into an expected gradient: probed, and put beside its EBM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
"""responses on which a loss is tried, at logits of the reference's and noise of these sizes:"""
NEAR, FAR = 0.25, 3.0


def probe(responses: Responses) -> tuple[Tensor, Tensor, Tensor]:
    """Places of a few responses, with every length among them; log pi near and far from p_ref."""
    generator = torch.Generator().manual_seed(0)
    n = len(responses.reward)
    order = torch.randperm(n, generator=generator).tolist()
    seen: dict[float, int] = {}
    for i in order:
        seen.setdefault(float(responses.lengths[i]), i)
    chosen = [*seen.values(), *order][: max(PROBED, len(seen))]
    while len(chosen) < 4:
        chosen.append(chosen[-1])
    noise = torch.randn(responses.start.shape, generator=generator, dtype=torch.float64)
    start = responses.start
    near, far = (normalised(start + size * noise, start) for size in (NEAR, FAR))
    return torch.tensor(chosen), near, far


def in_units(flow: AnyFlow) -> AnyFlow:
    """The same in units of the loss's own gradients, so that no factor of it moves its limit."""
    size = flow.rows.size
    rows = replace(flow.rows, unit=size)
    if isinstance(flow, PolicyGradient):
        return replace(flow, rows=rows, rate=flow.rate * size / flow.rows.unit)
    return replace(flow, rows=rows)


def policy_gradient_flow(
    function: Any, responses: Responses, advantages: Advantages, **who: Any
) -> PolicyGradient:
    """A loss (log_pi, log_pi_old, log_ref, advantages, mask), all (B, T)."""
    r, (rows, *tables) = responses, probe(responses)
    mask = r.mask[rows]
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gain = noise.flip(0).masked_fill(~mask, 0.0)

    def inputs(table: Tensor) -> Inputs:
        log_pi = r.at_tokens(table)[rows]
        old = (log_pi + noise / 50).masked_fill(~mask, 0.0)
        return log_pi, old, r.log_ref[rows], gain, mask

    near, far = map(inputs, tables)
    loss = Loss(function, policy_gradient.NAMES)
    combined = _combined(loss, near, r.lengths[rows], far)
    return PolicyGradient(r, combined, advantages, scaled=is_scaled(loss, near), **who)


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
    r, (rows, *tables) = responses, probe(responses)
    loss = Loss(function, distillation.NAMES)
    made = Distillation(r, Rows(loss, "rows", False), teacher, student, **who)
    near, far = (tuple(x[rows] for x in made.inputs(table)) for table in tables)
    combined = _combined(loss, near, r.lengths[rows], far)
    return Distillation(r, combined, teacher, student, **who)


def preference_flow(function: Any, responses: Responses, **who: Any) -> Preference:
    """A loss (chosen_log_pi, rejected_log_pi, chosen_log_ref, rejected_log_ref), all (B,).

    With six arguments, the last two are the lengths; whose tokens its rows share is then tried.
    """
    r, (rows, *tables) = responses, probe(responses)
    log_ref, lengths = r.log_ref.sum(1)[rows], (r.lengths[rows], r.lengths[rows].roll(1))
    who = {"drawn": r.start} | who
    by_length = callable(function) and preference.takes_lengths(function)
    given = (log_ref, log_ref.roll(1), *(x.long() for x in lengths if by_length))
    laws = [r.log_law(table)[rows] for table in tables]
    near, far = ((log_pi, log_pi.roll(1), *given) for log_pi in laws)
    names = preference.NAMES + (preference.LENGTHS if by_length else ())
    loss = Loss(function, names, leaves=2)
    if not by_length:
        return Preference(r, _combined(loss, near, torch.ones(len(rows)).double(), far), **who)
    failed: LossError | None = None
    for counted in preference.COUNTED:
        try:
            combined = _combined(loss, near, preference.count_of(counted, *lengths), far)
        except LossError as error:
            failed = failed or error
        else:
            return Preference(r, combined, **who, counted=counted)
    assert failed is not None
    raise failed


def _combined(loss: Loss, near: Inputs, counts: Tensor, far: Inputs) -> Rows:
    check_loss(loss, near)
    if len(counts) < 4:
        raise LossError(f"a loss is tried on at least 4 responses, and there are {len(counts)}")
    return rows_of(loss, near, counts, far)
