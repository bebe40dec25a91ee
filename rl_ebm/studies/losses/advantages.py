"""How rewards become advantages, in large groups and in small ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rl_ebm.fixed_points.groups import group_advantages
from rl_ebm.messages.arguments import shown
from rl_ebm.soft_bellman import expectation
from rl_ebm.studies.losses.contract import LossError

Returns = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(rewards (B,), log_pi_old, log_ref, mask, each (B, T)) to the return of each response or token"""
Combine = Literal["none", "mean", "leave-one-out", "std"]
COMBINES: dict[str, Combine] = {
    "centred": "mean",
    "leave-one-out": "leave-one-out",
    "group-std": "std",
}


@dataclass(frozen=True)
class Advantages:
    """Returns of responses, each by itself, and what their group takes off or divides by.

    Attributes:
        returns: of each response or token; None for the reward.
        combine: "none"; less the mean of the group ("mean") or of the others in it
            ("leave-one-out"); or less the mean, over the standard deviation plus ``epsilon``.
    """

    returns: Returns | None = None
    combine: Combine = "mean"
    epsilon: float = 0.0
    coupled: bool = False
    """whether ``returns`` does that itself, to the rows that it is given"""

    def of_each(self, reward: Tensor, log_pi_old: Tensor, log_ref: Tensor, mask: Tensor) -> Tensor:
        """What each response returns, (N,), or each of its tokens, (N, T).

        Raises:
            LossError: another shape, NaN or infinite numbers.
        """
        if self.returns is None:
            return reward
        found = self._called(reward, log_pi_old, log_ref, mask)
        if self.coupled and self.combine == "std":
            return _undivided(found, self._called, reward, log_pi_old, log_ref, mask)
        if self.coupled and self.combine == "leave-one-out":  # n / (n - 1) less the mean of all
            return found * (1 - 1 / len(found))
        return found

    def _called(self, reward: Tensor, log_pi_old: Tensor, log_ref: Tensor, mask: Tensor) -> Tensor:
        assert self.returns is not None
        with torch.no_grad():
            given = (x.clone() for x in (reward, log_pi_old, log_ref, mask))
            found = self.returns(*given)
        allowed = (reward.shape, mask.shape)
        if not isinstance(found, Tensor) or found.shape not in allowed:
            what = tuple(found.shape) if isinstance(found, Tensor) else shown(found)
            raise LossError(
                f"advantages must return one number for each response, {tuple(reward.shape)}, or "
                f"for each token, {tuple(mask.shape)}, got {what}"
            )
        if not bool(torch.isfinite(found).all()):
            raise LossError("advantages returns numbers that are NaN or infinite")
        return found.detach().double()

    def in_group(
        self, returns: Float[Tensor, "N *T"], log_law: Float[Tensor, "N"], size: int | None
    ) -> Float[Tensor, "N *T"]:
        """Expected advantage of each, in a group whose others are of a law.

        Args:
            size: of the group; None for one without end.

        Raises:
            OverflowError: what a group of that size has on average cannot be computed.
        """
        if self.combine == "none":
            return returns
        if returns.ndim == 2:
            raise LossError(
                "advantages of tokens are taken as they are: give combine='none' with (B, T)"
            )
        mean = expectation(log_law, returns).sum()
        if self.combine != "std":
            share = 1.0 if size is None or self.combine != "mean" else (size - 1) / size
            return share * (returns - mean)
        if size is None:
            spread = expectation(log_law, (returns - mean).square()).sum().sqrt()
            return (returns - mean) / (spread + self.epsilon).clamp(min=1e-300)
        return group_advantages(log_law, returns, size, self.epsilon or 1e-12)


def _undivided(
    found: Float[Tensor, "N"], called: Returns, reward: Float[Tensor, "N"], *rest: Tensor
) -> Float[Tensor, "N"]:
    """Returns that a function has standardised, times the deviation by which it divided.

    At a limit where all returns are alike the deviation is 0, and what is left is noise of size 1.
    With other rewards R + v the function returns x' = (x + v) / s', so s' x' - s x = v, less its
    mean: two unknown numbers, and as many equations as responses.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(reward.shape, generator=generator, dtype=torch.float64)
    v = v - v.mean()
    other = called(reward + v, *rest)
    sides = torch.stack([other - other.mean(), -(found - found.mean())], 1)
    s = torch.linalg.lstsq(sides, v[:, None]).solution
    off = float((sides @ s - v[:, None]).abs().max())
    return found * float(s[1]) if off < 1e-6 and float(s[1]) > 0 else found


def advantages_of(given: str | Advantages | Returns) -> Advantages:
    """What ``advantages`` of :func:`rl_ebm.audit_loss` says; a function is looked at.

    Raises:
        ValueError: another name.
        TypeError: no name, and no function.
    """
    if isinstance(given, Advantages):
        return given
    if isinstance(given, str):
        if given not in COMBINES:
            known = ", ".join(repr(name) for name in COMBINES)
            raise ValueError(
                f"advantages must be {known}, or a function (rewards, log_pi_old, log_ref, mask), "
                f"got {given!r}"
            )
        return Advantages(combine=COMBINES[given])
    if not callable(given):
        raise TypeError(
            "advantages must be a name or a function (rewards, log_pi_old, log_ref, mask), got "
            f"{shown(given)}"
        )
    combine = _coupling(given)
    return Advantages(given, combine, coupled=combine != "none")


def _coupling(function: Returns) -> Combine:
    """Whether a function takes rows each by itself, or a statistic of them off.

    Of two rows with returns f and g, less their mean is (f - g) / 2, less the other is f - g, and
    standardised it is the same number whatever they are.

    Raises:
        LossError: rows are coupled in another way, or the function fails.
    """
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(6, generator=generator, dtype=torch.float64)
    log_pi, log_ref = -torch.rand(2, 6, 3, generator=generator, dtype=torch.float64) - 0.1
    mask = torch.ones(6, 3, dtype=torch.bool)
    known = Advantages(function)

    def of(*rows: int) -> Tensor:
        at = list(rows)
        try:
            return known.of_each(reward[at], log_pi[at], log_ref[at], mask[at])
        except LossError:
            raise
        except Exception as error:
            raise LossError(
                f"advantages fails on {len(rows)} responses of 3 tokens: "
                f"{type(error).__name__}: {error}"
            ) from error

    everything = of(*range(6))
    if not torch.equal(everything, of(*range(6))):
        raise LossError(
            "advantages gives two answers for the same responses: an audit is exact, so it may "
            "draw no random numbers and keep nothing between calls"
        )
    pairs = torch.stack([of(i, (i + 1) % 6) for i in range(6)])
    first, after = everything, everything.roll(-1, 0)
    if torch.allclose(pairs[:, 0], first, atol=1e-9) and torch.allclose(of(0)[0], first[0]):
        return "none"
    if everything.ndim == 1:
        gap, both = first - after, pairs[:, 0] - pairs[:, 1]
        balanced = torch.allclose(pairs.sum(1), gap * 0, atol=1e-7)
        if torch.allclose(both, gap, atol=1e-7) and balanced:
            return "mean"
        if torch.allclose(both, gap * 2 * 5 / 6, atol=1e-7):
            return "leave-one-out"
        if balanced and _one_size(pairs):
            return "std"
    raise LossError(
        "advantages couples the responses of a batch otherwise than by taking off a mean (of all "
        "or of the others) and dividing by a standard deviation: return what each response is "
        "worth by itself"
    )


def _one_size(pairs: Tensor) -> bool:
    """Whether all standardised pairs are nearly the same two numbers, up to a small epsilon."""
    size = pairs[:, 0].abs()
    return bool((size > 0.5).all()) and float(size.max() - size.min()) < 0.05
