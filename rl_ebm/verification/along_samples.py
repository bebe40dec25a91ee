"""Verify a policy where prefixes cannot be listed, against a solution that knows each of them."""

from __future__ import annotations

import torch

from rl_ebm.exact import Solution
from rl_ebm.policies.base import Policy, evaluating
from rl_ebm.policies.detours import rows_at_once
from rl_ebm.statistics.interval import check_confidence, check_samples
from rl_ebm.verification.laws import draw
from rl_ebm.verification.sampled_report import SampledReport, combine_sampled, report

SAMPLES = 100
"""responses of target and policy each that a verification while training reads, at most"""


def samples_at(max_length: int) -> int:
    """How many responses a verification while training reads: what each takes is quadratic."""
    return max(8, min(SAMPLES, 2**25 // max_length**2))


@torch.no_grad()
def verify_sampled(
    policy: Policy,
    solution: Solution,
    samples: int = 1000,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
    memory: int = 2**28,
) -> SampledReport:
    """Compare any policy with the exact one along exact samples of both.

    Args:
        policy: anything with ``logits``, and better with ``start`` and ``step``.
        solution: of :func:`rl_ebm.solve`.
        samples: responses of the target, and as many of the policy, for each prompt.
        confidence: of every interval by itself.
        generator: on the CPU, or where policy and solution are; None for the global one.
        memory: about how many bytes the logits of one step may take.

    Raises:
        ValueError: fewer samples than 2, a confidence out of (0, 1), a policy for other prompts,
            or one whose logits are NaN or +inf.
    """
    check_confidence(confidence)
    check_samples(samples, 2, ": one has no spread")
    # The means over prompts hold where every prompt's own interval does.
    each = 1 - (1 - confidence) / solution.ebm.num_prompts
    with evaluating(policy):
        rows = rows_at_once(policy, solution.space, memory)
        solution.ebm.check_policy(policy, rows=rows, steps=True)
        reports = [
            report(draw(policy, solution, prompt, samples, each, generator, memory))
            for prompt in range(solution.ebm.num_prompts)
        ]
    return reports[0] if len(reports) == 1 else combine_sampled(reports)
