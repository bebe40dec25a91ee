"""What a certificate holds, as JSON and as text."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from rl_ebm.statistics.interval import Interval, average


@dataclass(frozen=True)
class Certificate:
    """What samples say of a policy and its target, in nats; see the module's docstring.

    Each interval holds with its own confidence. With several prompts the figures are means over
    the prompts, ``ess`` the smallest, and ``per_prompt`` has each prompt's own: those have a
    confidence so much higher that they all hold together with that of the means.
    """

    mode: str
    """always ``"sampled"``"""
    num_samples: int
    """of the policy, for each prompt"""
    num_target_samples: int
    """of p*, over all prompts; 0 where none were given"""
    log_z: Interval
    kl_policy_target: Interval
    """KL(pi, p*)"""
    kl_target_policy: Interval
    """KL(p*, pi); without samples of p* a self-normalised estimate, and no more than >= 0"""
    elbo: Interval
    """E_pi log W <= log Z"""
    eubo: Interval | None
    """E_p* log W >= log Z; None without samples of p*"""
    expected_reward_policy: Interval
    entropy_policy: Interval
    """Shannon, without the reference"""
    ess: float
    """effective sample size of the weights W: (sum W)^2 / sum W^2"""
    warnings: list[str] = field(default_factory=list)
    per_prompt: list[Certificate] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: infinite numbers are the strings "Infinity" and "-Infinity"."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Interval):
                value = value.to_dict()
            elif f.name == "per_prompt":
                if not value:
                    continue
                value = [certificate.to_dict() for certificate in value]
            out[f.name] = list(value) if f.name == "warnings" else value
        return out

    def __str__(self) -> str:
        named = (
            ("log Z", self.log_z),
            ("KL(policy, target)", self.kl_policy_target),
            ("KL(target, policy)", self.kl_target_policy),
            ("ELBO", self.elbo),
            ("EUBO", self.eubo),
            ("expected reward", self.expected_reward_policy),
            ("entropy of the policy", self.entropy_policy),
        )
        prompts = f", {len(self.per_prompt)} prompts (means)" if self.per_prompt else ""
        return "\n".join(
            [
                f"{self.mode}: {self.num_samples:,} samples of the policy, "
                f"{self.num_target_samples:,} of the target{prompts}",
                *(f"  {name:22s} {interval}" for name, interval in named if interval is not None),
                f"  {'effective sample size':22s} {self.ess:.4g}",
                *(f"  warning: {text}" for text in self.warnings),
            ]
        )


def combine(parts: list[Certificate]) -> Certificate:
    """Means over the prompts, which hold where every prompt's own interval does."""
    figures: dict[str, Any] = {}
    for f in fields(Certificate):
        column = [getattr(part, f.name) for part in parts]
        if f.name == "per_prompt":
            figures[f.name] = parts
        elif f.name == "warnings":
            figures[f.name] = [
                f"prompt {i}: {text}" for i, texts in enumerate(column) for text in texts
            ]
        elif f.name == "num_target_samples":
            figures[f.name] = sum(column)
        elif f.name == "ess":
            figures[f.name] = min(column)
        elif isinstance(column[0], Interval) or f.name == "eubo":
            figures[f.name] = None if None in column else average(column)
        else:
            figures[f.name] = column[0]
    return Certificate(**figures)
