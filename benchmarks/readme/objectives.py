"""What each objective ends at, exactly, and what finite groups and finitely many samples add.

    python -m benchmarks.readme.objectives            # about a minute
    python -m benchmarks.readme.objectives --quick    # a smaller EBM: only to see that it works

The audit of the task ``random`` (A = 8, T = 4; uniform reference, beta = 1), and of EBMs of eight
responses where every group can be summed over. Nothing is trained and nothing is drawn.
Writes ``benchmarks/results/objectives.md`` and ``finite.md``, the README's tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.support.machine import describe
from rl_ebm import EBM, TokenSpace, solve
from rl_ebm.divergences import tv
from rl_ebm.envs import make_task
from rl_ebm.fixed_points import Penalty, Problem, penalised
from rl_ebm.fixed_points.finite import group_fixed_point, resampled_law
from rl_ebm.policies import Uniform
from rl_ebm.studies.audit import audit
from rl_ebm.studies.problems import problems
from rl_ebm.studies.seeds import geometric_interval
from rl_ebm.training.checkpoint import write_text

RESULTS = Path(__file__).parents[1] / "results"
GROUPS = (2, 4, 8, 16)
SAMPLES = (16, 64, 256, 1024, 4096)
SEEDS = range(3)
OUTSIDE = {"renormalise": "renormalised", "drop": "the rest dropped", "bucket": "a bucket"}
SOMETIMES = ("policy-gradient", "on-policy-distillation", "dpo")
"""what ends at the EBM with some of its options"""


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    quick: bool = False
    """a smaller EBM and smaller groups; writes nothing into the results"""


def random_task(quick: bool, seed: int = 0, beta: float = 1.0) -> EBM:
    """The task ``random`` with the uniform reference."""
    size = {"vocab_size": 3, "max_length": 3} if quick else {}
    return make_task("random", beta=beta, reference="uniform", task_seed=seed, **size)


def options_of(line: dict[str, Any]) -> str:
    """The options of an audited objective, in words."""
    o = line["options"]
    if o.get("support") == "token":
        ratio = ", times the ratio" if o.get("kl_weight") == "ratio" else ""
        later = ", later ones count" if o.get("discount") else ""
        return f"the drawn token, {o['kl_estimator']} in the {o['kl_in']}{ratio}{later}"
    if "support" in o:
        whose = o["support"].removesuffix("-top")
        return f"{o['divergence']}, the {whose}'s top {o['top_k']}, {OUTSIDE[o['outside']]}"
    if "kl_in" in o:
        level = "" if o["kl_estimator"] == "k1" else f" of each {o['kl_level']}"
        level = level.replace("each sequence", "the response")
        ratio = ", times the ratio" if o.get("kl_weight") == "ratio" else ""
        std = ", group-std" if o["advantage"] == "group-std" else ""
        return f"{o['kl_estimator']}{level} in the {o['kl_in']}{ratio}{std}"
    return ", ".join(f"{k} {v}" for k, v in o.items())


def wanted(line: dict[str, Any]) -> bool:
    """Whether a line says something that another one does not."""
    o = line["options"]
    if o.get("kl_estimator") == "k1" and o.get("kl_level") == "sequence":
        return False  # the sum of the tokens is the response
    # A penalty in the reward is scaled with the rest: nothing moves.
    return not (o.get("kl_in") == "reward" and o.get("advantage") == "group-std")


def audit_table(quick: bool) -> str:
    """Markdown: those that end at the EBM, then the others by distance."""
    lines = [x for x in audit(solve(random_task(quick))) if wanted(x)]
    right: dict[str, list[str]] = {}
    for x in lines:
        if x["is_target"]:
            right.setdefault(f"`{x['objective']}`", []).append(options_of(x))
    named = [
        f"{name} ({'; '.join(o)})" if name.strip("`") in SOMETIMES else name
        for name, o in right.items()
    ]
    rows = [
        "| objective | options | ends | TV | KL(target, end) | E[R] | KL(end, reference) |",
        "|---|---|---|---|---|---|---|",
    ]

    def number(v: float | None, how: str) -> str:
        return how if v is None else "∞" if v == float("inf") else f"{v:.3g}"

    others = [x for x in lines if x["is_target"] is False]
    unknown = [
        f"`{x['objective']}` {options_of(x)}".strip() for x in lines if x["is_target"] is None
    ]
    keys = ("tv", "kl_target_fixed_point", "expected_reward", "kl_reference")
    for x in sorted(others, key=lambda x: 9.0 if x["tv"] is None else x["tv"]):
        end = {True: "on the boundary", False: "elsewhere", None: "not known"}[x["degenerate"]]
        cells = " | ".join(number(x[k], x["how"]) for k in keys)
        rows.append(f"| `{x['objective']}` | {options_of(x)} | {end} | {cells} |")
    star = next(x for x in lines if x["is_target"])
    return (
        f"These end at the EBM (E[R] {star['expected_reward']:.3g}, KL(target, reference) "
        f"{star['kl_reference']:.3g}): {', '.join(named)}. These do not:\n\n" + "\n".join(rows)
    ) + (f"\n\nNot known: {', '.join(unknown)}." if unknown else "")


def small(seed: int, beta: float) -> Problem:
    """Eight responses with scores N(0, 1)."""
    space = TokenSpace(2, 3)
    scores = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (problem,) = problems(solve(EBM(space, scores, beta, Uniform(space))))
    return problem


def finite_table(quick: bool) -> str:
    """Markdown: how far finite groups and finitely many proposals move the end."""
    groups, samples = (GROUPS[:2], SAMPLES[:2]) if quick else (GROUPS, SAMPLES)
    rows = ["| what | finite | TV from its limit |", "|---|---|---|"]
    for beta in (1.0, 0.3):
        cases = [small(seed, beta) for seed in SEEDS]
        limits = [penalised(c, Penalty("k3", "loss", group_std=True)).log_law for c in cases]
        for size in groups:
            far = [
                float(tv(group_fixed_point(c, "k3", size), limit))
                for c, limit in zip(cases, limits, strict=True)
                if limit is not None
            ]
            rows.append(
                f"| `grpo`, 8 responses, beta {beta:g} | groups of {size} | "
                f"{geometric_interval(far)} |"
            )
    for n in samples:
        bias = []
        for seed in SEEDS:
            (case,) = problems(solve(random_task(quick, seed)))
            law = resampled_law(case.log_ref_responses, case.g_responses, n)
            bias.append(float(tv(law, case.log_target)))
        rows.append(
            f"| `sampled-teacher` (sir, from the reference), task `random` | {n:,} proposals | "
            f"{geometric_interval(bias)} |"
        )
    return "\n".join(rows)


def main(options: Options) -> None:
    tables = {"objectives": audit_table(options.quick), "finite": finite_table(options.quick)}
    for name, text in tables.items():
        text = f"{text}\n\nExact, nothing drawn. {describe()}\n"
        print(text)
        if not options.quick:
            RESULTS.mkdir(exist_ok=True)
            write_text(RESULTS / f"{name}.md", text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
