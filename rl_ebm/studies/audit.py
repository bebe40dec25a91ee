"""The audit: what each objective converges to on an EBM that can be solved, exactly."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from rl_ebm.agents import AGENTS, make_options
from rl_ebm.divergences import kl, tv
from rl_ebm.exact import Solution
from rl_ebm.fixed_points import FixedPoint, Problem
from rl_ebm.messages.numerals import as_json
from rl_ebm.soft_bellman import expectation
from rl_ebm.studies.problems import problems

SAME = 1e-8
"""total variation up to which a fixed point is the EBM"""
MEASURES = (
    "tv",
    "kl_fixed_point_target",
    "kl_target_fixed_point",
    "expected_reward",
    "kl_reference",
)


@torch.no_grad()
def audit(solution: Solution) -> list[dict[str, Any]]:
    """The fixed point of every objective, with every option that moves it.

    Returns:
        a dict for each: ``objective`` (the agent's name), ``options``, ``degenerate`` (the limit
        is on the boundary), ``is_target`` (it is the EBM), ``how`` it was found ("stated": it is
        the objective's own claim; "not known": there is none), ``other_roots`` (further interior
        laws without a gradient: their total variation from the EBM), ``depends_on_sampler``
        (whether it would be another one if the responses were drawn from another policy, the loss
        as it is), and in nats and reward units ``tv``, ``kl_fixed_point_target``,
        ``kl_target_fixed_point``, ``expected_reward``, ``kl_reference`` (without a reference, to
        the counting measure: minus the entropy): means over the prompts.
        None is what is not known, never "no" and never "the EBM".

    Raises:
        ValueError: responses of reward -inf that the reference allows.
    """
    cases = problems(solution)
    found = []
    for name, entry in AGENTS.items():
        for options in entry.variants:
            config = make_options(name, entry, options)
            points = [entry.limit(config, case) for case in cases]
            found.append(_line(name, options, points, cases))
    return found


def _line(
    name: str, options: dict[str, Any], points: list[FixedPoint], cases: list[Problem]
) -> dict[str, Any]:
    measured = [measures(p.log_law, c) for p, c in zip(points, cases, strict=True)]
    known = [m for m in measured if m is not None]
    means = {
        key: fmean(m[key] for m in known) if len(known) == len(cases) else None for key in MEASURES
    }
    return {
        "objective": name,
        "options": options,
        "degenerate": any_of([p.degenerate for p in points]),
        "is_target": is_target(points, cases),
        **means,
        "how": next((p.how for p in points if p.log_law is None), points[0].how),
        "other_roots": [
            float(tv(root, case.log_target))
            for point, case in zip(points, cases, strict=True)
            for root in point.other_roots
        ],
        "depends_on_sampler": any_of([p.sampler for p in points]),
    }


def is_target(points: list[FixedPoint], cases: list[Problem]) -> bool | None:
    """Whether the limits are the EBM, of every prompt; None where that is not known."""

    def other(point: FixedPoint, case: Problem) -> bool | None:
        # A target so peaked that the best response alone is near it is still another law.
        if point.degenerate or point.log_law is None:
            return True if point.degenerate else None
        return bool(tv(point.log_law, case.log_target) > SAME)

    verdict = any_of([other(p, c) for p, c in zip(points, cases, strict=True)])
    return None if verdict is None else not verdict


def any_of(verdicts: list[bool | None]) -> bool | None:
    """Whether one is True; None where none is, and one is not known."""
    if True in verdicts:
        return True
    return None if None in verdicts else False


def measures(log_law: torch.Tensor | None, problem: Problem) -> dict[str, float] | None:
    """A law over the responses against the EBM, the reward and the reference."""
    if log_law is None:
        return None
    return {
        "tv": float(tv(log_law, problem.log_target)),
        "kl_fixed_point_target": float(kl(log_law, problem.log_target)),
        "kl_target_fixed_point": float(kl(problem.log_target, log_law)),
        "expected_reward": problem.beta * float(expectation(log_law, problem.g_responses).sum()),
        "kl_reference": float(kl(log_law, problem.log_ref_responses)),
    }


def to_text(lines: list[dict[str, Any]], reference: bool = True) -> str:
    """A table for people.

    Args:
        reference: whether the EBM has one; else ``kl_reference`` is minus the entropy.
    """
    last = "KL(fp, ref)" if reference else "-H(fp)"
    head = ("objective", "options", "TV", "KL(fp, p*)", "KL(p*, fp)", "E[R]", last, "")
    rows = [head]
    for x in lines:
        options = ", ".join(f"{v}" for v in x["options"].values() if v != "none")
        numbers = ["?" if x[k] is None else f"{x[k]:.4g}" for k in MEASURES]
        note = "the EBM" if x["is_target"] else "degenerate" if x["degenerate"] else ""
        if x["is_target"] and x["how"] == "stated":
            note = "the EBM, as stated"
        note = note or (x["how"] if x["tv"] is None else "")
        if x["other_roots"]:
            note += f" ({len(x['other_roots'])} other roots)"
        rows.append((x["objective"], options, *numbers, note))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def to_json(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with infinite numbers as text, as in report.json."""
    return [{name: as_json(value) for name, value in line.items()} for line in lines]
