"""What the losses that frameworks ship converge to, on three EBMs, and where that lies.

    python -m benchmarks.frameworks                              # all that is installed, all EBMs
    python -m benchmarks.frameworks --frameworks trl --ebms small
    python -m benchmarks.frameworks --frameworks --ebms          # only the page, of what is stored

Frameworks want releases of torch and transformers of their own, so that each may need its own
environment: rows are stored as ``benchmarks/frameworks/results/EBM-FRAMEWORK.json``, and the page
``benchmarks/frameworks/README.md`` is made from all that are there, whoever stored them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from rl_ebm import EBM, TokenSpace, solve
from rl_ebm.envs import make_task
from rl_ebm.files import write_text
from rl_ebm.fixed_points import Problem
from rl_ebm.policies import Tabular
from rl_ebm.soft_bellman import expectation
from rl_ebm.studies.audit import measures, to_json
from rl_ebm.studies.frameworks import FRAMEWORKS, audited
from rl_ebm.studies.frameworks.rows import FrameworkError, Row
from rl_ebm.studies.problems import problems

HERE = Path(__file__).parent
SHOWN = 5e-5
"""accuracy that four digits show"""
Line = dict[str, Any]


def with_eos() -> EBM:
    """Responses of 1 to 4 tokens, and a reference that is drawn, not uniform."""
    space = TokenSpace(3, 4, eos_id=0)
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(space.num_prefixes(t), 3, generator=generator).double() for t in range(4)]
    reward = torch.randn(space.num_sequences, generator=generator).double()
    return EBM(space, reward, beta=0.5, reference=Tabular.from_tables(tables, space))


@dataclass(frozen=True)
class Asked:
    """An EBM of the page: what it is called there, and which rows are asked for."""

    title: str
    make: Callable[[], EBM]
    only: Callable[[Row], bool] | None = None


FOLLOWED = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "discopop",
    "sft",
)  # fmt: skip
"""loss types of trl's DPOTrainer that were followed at A = 8, T = 4"""


def _in_minutes(row: Row) -> bool:
    """Whether a loss of 16.8 million pairs is followed, in minutes of one core.

    Left out is what was not followed: losses at whose end responses die; divergences other than the
    reverse KL, of which that of Jensen and Shannon had not ended after 400 backward steps; what
    computes in float32, and is asked of every pair; trainers that the policy draws for; and SimPO,
    its kin and sigmoid_norm: responses that end at exp(-50) and below are taken for dead there.
    """
    if any(f"{name}Trainer." in row.name for name in ("CPO", "TPO")):
        alone = 0.0 in (row.options.get("cpo_alpha"), row.options.get("tpo_alpha"))
        kind = row.options["loss_type"]
        return kind != "alphapo" and not (alone and kind in ("simpo", "tpo-l"))
    trl = row.name.endswith("DPOTrainer._compute_loss")
    return row.name.endswith("DPOLoss") or (trl and row.options.get("loss_type") in FOLLOWED)


EBMS = {
    "small": Asked(
        "A = 4, T = 3, beta 0.5: `random`, uniform reference",
        lambda: make_task("random", vocab_size=4, max_length=3, beta=0.5, reference="uniform"),
    ),
    "large": Asked(
        "A = 8, T = 4, beta 1: `random`, uniform reference; followed are, of the losses of 16.8 "
        "million pairs, OpenRLHF's, ten of trl's DPOTrainer, CPO's and TPO's, and of verl's "
        "distillation k1 and k3 in the reward",
        lambda: make_task("random", vocab_size=8, max_length=4, beta=1.0, reference="uniform"),
        lambda row: row.kind != "preference" or _in_minutes(row),
    ),
    "eos": Asked("EOS mode, A = 3, T = 4, beta 0.5: a reference that is not uniform", with_eos),
}


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    frameworks: tuple[str, ...] = tuple(FRAMEWORKS)
    """which to audit; those that are not installed are left as they are stored"""
    ebms: tuple[str, ...] = tuple(EBMS)
    """small, large or eos"""
    out: Path = HERE
    """folder of README.md, pictures and results"""
    shipped: Path = HERE.parent / "results" / "frameworks.md"
    """the README's table"""


def store(options: Options) -> None:
    """Audit what is installed."""
    for name in options.ebms:
        solution = solve(EBMS[name].make())
        for framework in options.frameworks:
            path = options.out / "results" / f"{name}-{framework}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines: list[Line] = []
            try:
                for line in audited(framework, solution, EBMS[name].only):
                    lines.append(line)  # stored at once: the next may take many minutes
                    write_text(path, json.dumps(to_json(lines), indent=1) + "\n")
            except FrameworkError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            print(f"{path.name}: {len(lines)} rows")


def frontier(problem: Problem) -> list[tuple[float, float]]:
    """(KL to the reference, E[R]) of p_ref exp(R / b) for many b: nothing lies above it."""
    rewards, log_ref = problem.beta * problem.g_responses, problem.log_ref_responses
    found = []
    for log_b in torch.linspace(-4, 5, 120, dtype=torch.float64):
        law = torch.log_softmax(log_ref + rewards / log_b.exp(), 0)
        measured = measures(law, problem)
        assert measured is not None
        found.append((measured["kl_reference"], float(expectation(law, rewards).sum())))
    return sorted(found)


def picture(name: str, lines: list[Line], path: Path) -> None:
    """Each limit on the plane of KL to the reference and E[R], with the exact frontier."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    (problem, *_) = problems(solve(EBMS[name].make()))
    target = measures(problem.log_target, problem)
    assert target is not None
    figure, axes = plt.subplots(figsize=(7, 4.5))
    axes.plot(*zip(*frontier(problem), strict=True), color="0.6", label="exact frontier")
    for i, framework in enumerate(dict.fromkeys(x["framework"] for x in lines)):
        own = [x for x in lines if x["framework"] == framework and x["tv"] is not None]
        points = {(x["kl_reference"], x["expected_reward"]) for x in own}
        axes.scatter(*zip(*points, strict=True), marker="osD^"[i], alpha=0.7, label=framework)
    axes.scatter(
        target["kl_reference"], target["expected_reward"], marker="*", s=180, color="k", label="p*"
    )
    axes.set_xlabel("KL(limit, reference), nats")
    axes.set_ylabel("E[R]")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def table(lines: list[Line]) -> str:
    """The rows of one EBM: those with one limit on one line."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for x in lines:
        others = ("kl_target_fixed_point", "expected_reward", "kl_reference")
        ends = (_known(x), *(_number(x[k]) for k in others))
        groups.setdefault((x["framework"], x["version"], x["name"], ends, _note(x)), []).append(x)
    rows = [
        "| framework | loss | options | TV | KL(p*, end) | E[R] | KL(end, reference) | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (framework, version, name, ends, note), own in groups.items():
        told = "; ".join(_options(x) for x in own)
        short = ".".join(name.split(".")[-2:])
        rows.append(f"| {framework} {version} | `{short}` | {told} | {' | '.join(ends)} | {note} |")
    return "\n".join(rows)


def _options(x: Line) -> str:
    told = ", ".join(f"{k}={v}" for k, v in x["options"].items()) or "none"
    return f"**{told}** (shipped)" if x["default"] else told


def _known(x: Line) -> str:
    """TV, and by how much it may be off where that shows."""
    off = x.get("accuracy")
    shown = off is not None and x["tv"] is not None and SHOWN <= float(off) < math.inf
    return _number(x["tv"]) + (f" ± {float(off):.1g}" if shown else "")


def _number(x: float | str | None) -> str:
    if x is None or x == "Infinity":
        return "?" if x is None else "∞"
    tiny = 1e-7 < abs(float(x)) < 5e-5  # less is rounding of a loss in float32
    return f"{float(x):.0e}" if tiny else f"{float(x):.4f}"


def _note(x: Line) -> str:
    if x["is_target"]:
        return "the EBM"
    if x["degenerate"]:
        return "on the boundary"
    return "" if x["tv"] is not None else str(x["how"])


def advice(lines: list[Line]) -> str:
    """A sentence for each loss that does not end at the EBM, and how near its setting comes."""
    found: dict[str, str] = {}
    for x in lines:
        instead = x.get("instead")
        if instead is None:
            continue
        ends = [
            y for y in lines
            if y["framework"] == x["framework"] and y["name"] == instead["name"]
            and all(y["options"].get(k) == v for k, v in instead["options"].items())
        ]  # fmt: skip
        checked = _number(ends[0]["tv"]) if ends else "not in this table"
        found[f"{x['framework']}: {instead['sentence']}"] = checked
    return "\n".join(f"- {sentence} (TV of that setting: {tv})" for sentence, tv in found.items())


def shipped(folder: Path) -> str:
    """The README's table: what the small EBM has of settings that are shipped."""
    stored = sorted((folder / "results").glob("small-*.json"))
    lines = [x for path in stored for x in json.loads(path.read_text()) if x["default"]]
    return table([x | {"default": False} for x in lines]) + "\n"


def page(options: Options) -> str:
    """The page, from all rows that are stored."""
    parts = [
        "# What shipped losses converge to",
        "Each row calls the framework's own code, unmodified, on the log-probabilities of every "
        "response, and follows its expected gradient from the reference to its end "
        "(`rl_ebm.audit_loss`): large batches and groups, the framework's KL coefficient set to "
        "the EBM's beta, one logit for each state and action. TV is the total variation from the "
        "EBM p* = p_ref exp(R / beta) / Z. What distils or fits samples has the EBM itself for its "
        "teacher. Made by `python -m benchmarks.frameworks`.",
    ]
    for name, asked in EBMS.items():
        stored = sorted((options.out / "results").glob(f"{name}-*.json"))
        lines: list[Line] = [x for path in stored for x in json.loads(path.read_text())]
        if not lines:
            continue
        picture(name, lines, options.out / "results" / f"{name}.png")
        parts += [
            f"## {asked.title}",
            f"![E[R] against KL to the reference](results/{name}.png)",
            table(lines),
            "To end at the EBM:\n\n" + advice(lines),
        ]
    return "\n\n".join(parts) + "\n"


def main(options: Options) -> None:
    store(options)
    write_text(options.out / "README.md", page(options))
    write_text(options.shipped, shipped(options.out))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
