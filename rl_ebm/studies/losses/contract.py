"""A user's loss, called with care: what it must do, and one sentence where it does not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl_ebm.messages.arguments import shown

Inputs = tuple[Tensor, ...]


class LossError(ValueError):
    """A loss that cannot be audited; the sentence says what was seen."""


@dataclass
class Loss:
    """A loss by its name, the number of inputs that are differentiated, and how it takes masks.

    Attributes:
        names: of the inputs, for messages.
        leaves: the first so many inputs have gradients.
    """

    function: Callable[..., Any]
    names: tuple[str, ...]
    leaves: int = 1
    float_mask: bool = field(default=False, init=False)

    def gradients(self, inputs: Inputs) -> Inputs:
        """By each of the leaves.

        Raises:
            LossError: what :func:`check_loss` looks for, wherever it shows first.
        """
        leaves, given = self._given(inputs)
        try:
            value = self._value(given)
        except LossError:
            raise
        except Exception as error:
            raise LossError(_failed(error, inputs)) from error
        found = torch.autograd.grad(value, leaves, allow_unused=True)
        found = tuple(
            torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)
        )
        if not all(_finite(g) for g in found):
            raise LossError(
                "the loss has a gradient that is NaN or infinite at finite log-probabilities: "
                "look for 0 * inf, log(0) or a division by 0 in it"
            )
        return found

    def value(self, inputs: Inputs) -> float:
        """What the loss is there."""
        return float(self._value(self._given(inputs)[1]).detach())

    def _given(self, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        """New leaves, and the inputs made from them: what a loss may write into."""
        leaves = [x.clone().requires_grad_() for x in inputs[: self.leaves]]
        rest = [
            self._mask(x) if x.dtype == torch.bool else x.clone() for x in inputs[self.leaves :]
        ]
        return leaves, [*[x * 1 for x in leaves], *rest]

    def _mask(self, mask: Tensor) -> Tensor:
        return mask.double() if self.float_mask else mask.clone()

    def _value(self, given: list[Tensor]) -> Tensor:
        value = self.function(*given)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise LossError(
                f"a loss must return one number, a tensor with one entry, got {_described(value)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise LossError(
                f"the loss is {value.item()} at finite log-probabilities: it must be finite there"
            )
        if not value.requires_grad:
            raise LossError(
                f"the loss does not depend on {' or '.join(self.names[: self.leaves])}: "
                "it has no gradient"
            )
        return value.reshape(())


def check_loss(loss: Loss, inputs: Inputs) -> None:
    """Try a loss on a few rows: its mask, its arguments, chance, memory, device.

    Raises:
        TypeError: no function.
        LossError: one sentence of what it does that none may.
    """
    if not callable(loss.function):
        raise TypeError(
            f"loss must be a function ({', '.join(loss.names)}), got {shown(loss.function)}"
        )
    _check_arguments(loss)
    before = torch.get_rng_state()
    first = _called(loss, inputs)
    drawn = not torch.equal(before, torch.get_rng_state())
    again = _called(loss, inputs)
    if drawn or first[0] != again[0]:
        torch.set_rng_state(before)
        raise LossError(
            "the loss draws random numbers: an audit is exact, so leave dropout and noise out"
            if drawn
            else "the loss gives two values for the same inputs: it may keep nothing between calls"
        )
    for name, kept, now in zip(loss.names, _as_given(loss, inputs), first[1], strict=True):
        if not torch.equal(kept, now.detach()):
            raise LossError(f"the loss writes into {name}: work on a copy ({name}.clone())")
    gradients = loss.gradients(inputs)
    if all(not bool(g.any()) for g in gradients):
        raise LossError(
            f"the loss does not depend on {' or '.join(loss.names[: loss.leaves])} where it is "
            "tried, at log-probabilities near the reference's: its gradient is 0 there"
        )
    mask = next((x for x in inputs if x.dtype == torch.bool), None)
    if mask is not None and any(
        bool(g[~mask].any()) for g in gradients if g.shape[:2] == mask.shape
    ):
        raise LossError(
            "the loss has a gradient past the end of a response, where mask is 0: multiply what is "
            "summed by mask"
        )


def _check_arguments(loss: Loss) -> None:
    try:
        inspect.signature(loss.function).bind(*loss.names)
    except ValueError:  # a built-in function tells nothing
        return
    except TypeError as error:
        raise LossError(
            f"the loss is called as loss({', '.join(loss.names)}), and cannot be: {error}"
        ) from None


def _called(loss: Loss, inputs: Inputs) -> tuple[float, Sequence[Tensor]]:
    """Value, and what became of the inputs. The mask is bool, or floats where that fails."""
    for float_mask in (False, True):
        loss.float_mask = float_mask
        _, given = loss._given(inputs)
        try:
            value = loss._value(given)
        except LossError:
            raise
        except Exception as error:
            has_mask = any(x.dtype == torch.bool for x in inputs)
            if has_mask and not float_mask and isinstance(error, (RuntimeError, TypeError)):
                continue
            raise LossError(_failed(error, inputs)) from error
        return float(value.detach()), given
    raise AssertionError("one of the two returns or raises")


def _as_given(loss: Loss, inputs: Inputs) -> list[Tensor]:
    return [x.detach() for x in loss._given(inputs)[1]]


def _failed(error: Exception, inputs: Inputs) -> str:
    text = " ".join(str(error).split())[:200]
    if "cuda" in text.lower():
        return f"the loss needs a CUDA device, and is audited on the CPU: {text}"
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
    return f"the loss fails on inputs of shapes {shapes}: {type(error).__name__}: {text}"


def _finite(x: Tensor) -> bool:
    """A sum is ten times as fast to look at, and finite if and only if nothing is not; but for
    numbers so large that their sum is none."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def _described(value: object) -> str:
    return f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
