r"""Verify a policy against an exact solution: every prefix, exactly.

The policy's tree is walked by blocks (:mod:`rl_ebm.policies.walk`), and each block adds its share
of every figure by the chain rule. Nothing is sampled, and nothing of the size of the tree is
kept. What the figures mean stands at :class:`rl_ebm.report.Report`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from statistics import fmean
from typing import Any

import torch

from rl_ebm.accumulate import WORST, Accumulator
from rl_ebm.exact import TreeSolution
from rl_ebm.policies.scoring import Policy
from rl_ebm.policies.walk import DEFAULT_MEMORY, walk
from rl_ebm.report import Bounds, Depth, Prefix, Report

_MAXIMA = ("_linf", "_span", "_max")


@torch.no_grad()
def verify(policy: Policy, solution: TreeSolution, memory: int = DEFAULT_MEMORY) -> Report:
    """Compare any policy with the exact one, prefix by prefix.

    Args:
        policy: anything with ``logits``.
        solution: of :func:`rl_ebm.solve`.
        memory: about how many bytes one evaluation of the policy may take.

    Returns:
        The report. With several prompts its figures are maxima for ``*_linf``, ``*_span`` and
        ``*_max``, means for the rest, and ``per_prompt`` has each prompt's own.

    Raises:
        ValueError: a policy for other prompts, or one whose logits are NaN or +inf.
    """
    solution.ebm.check_policy(policy)
    values = bool(getattr(policy, "logits_are_values", False))
    reports = []
    with _evaluating(policy):
        for prompt in range(solution.ebm.num_prompts):
            figures = Accumulator(solution, prompt, values)
            for block in walk(policy, solution.space, prompt, memory):
                figures.add(block)
            reports.append(figures.report())
    return reports[0] if len(reports) == 1 else combine(reports)


def combine(reports: Sequence[Report]) -> Report:
    """One report for several prompts: maxima of errors and spans, means of the rest."""
    figures: dict[str, Any] = {}
    for f in fields(Report):
        column = [getattr(report, f.name) for report in reports]
        if f.name == "mode":
            figures[f.name] = column[0]
        elif f.name == "bounds":
            figures[f.name] = Bounds(
                *(fmean(getattr(b, g.name) for b in column) for g in fields(Bounds))
            )
        elif f.name == "per_depth":
            figures[f.name] = [_combine_depth(depths) for depths in zip(*column, strict=True)]
        elif f.name == "worst_prefixes":
            figures[f.name] = sorted(sum(column, []), key=_error, reverse=True)[:WORST]
        elif f.name == "per_prompt":
            figures[f.name] = list(reports)
        elif column[0] is None:
            figures[f.name] = None
        else:
            figures[f.name] = _how(f.name)(column)
    return Report(**(figures | {"num_sequences": reports[0].num_sequences}))


def _how(name: str) -> Callable[[Sequence[float]], float]:
    return max if name.endswith(_MAXIMA) else fmean


def _combine_depth(depths: Sequence[Depth]) -> Depth:
    return replace(
        depths[0],
        states=sum(d.states for d in depths),
        linf=max(d.linf for d in depths),
        mean_kl=fmean(d.mean_kl for d in depths),
    )


def _error(prefix: Prefix) -> float:
    return max(abs(x) for x in prefix.delta)


@contextmanager
def _evaluating(policy: Policy) -> Iterator[None]:
    """A module in evaluation mode, and back in the mode it was in."""
    if not isinstance(policy, torch.nn.Module):
        yield
        return
    training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)
