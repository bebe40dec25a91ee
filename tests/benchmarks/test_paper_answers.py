"""The one-line answers of the paper's report: recomputed from its tables, and of made-up ones."""

import csv
import math
import re
import statistics
from typing import Any

import pytest

from benchmarks.paper import answers
from benchmarks.paper.common import ANSWERED, HERE, SECTIONS

T_2 = {0.95: 4.302653, 1 - 0.05 / 4: 8.860, 1 - 0.05 / 3: 7.6488}
"""quantiles of Student's t with two degrees of freedom, two-sided"""


def _rows(name: str) -> list[dict[str, str]]:
    with open(HERE / "results" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def _ends(name: str) -> list[dict[str, str]]:
    last = {row["run"]: row for row in _rows(name)}
    return list(last.values())


def _said(name: str) -> str:
    line = (HERE / "results" / f"{name}.md").read_text().split("\n")[2]
    assert line.startswith(ANSWERED)
    return line.removeprefix(ANSWERED).strip()


def test_the_report_begins_with_all_of_them() -> None:
    report = (HERE / "README.md").read_text()
    head = report[: report.index("\n## ")]
    for name in SECTIONS:
        assert _said(name) in head


def test_what_is_said_of_bounds() -> None:
    rows = _rows("bounds")
    agents = [row for row in rows if row["kind"] == "agent"]
    loose, split = (
        statistics.median(float(r[key]) / float(r["kl"]) for r in agents)
        for key in ("prop3", "split")
    )
    broken = sum(float(r["prop3"]) < float(r["kl"]) for r in rows)
    said = _said("bounds")
    assert f"Prop. 3 fails at {broken} of {len(rows):,} policies" in said
    assert f"is {loose:,.0f} times the KL" in said
    assert said.endswith(f"a bound is {split:.1f} times it.")


def test_what_is_said_of_scale() -> None:
    left: dict[str, list[float]] = {}
    for row in _ends("scale"):
        if (row["vocab_size"], row["max_length"], row["shared"]) == ("64", "16", "True"):
            share = float(row["kl_target_policy"]) / float(row["uniform"])
            left.setdefault(row["agent"], []).append(100 * share)
    assert len(left) == 5
    for agent, shares in left.items():
        assert f"`{agent}` {sum(shares) / len(shares):.2g} %" in _said("scale")


def test_what_is_said_of_traces() -> None:
    kl = {
        (r["law"], r["loss"], int(r["trace"]), r["seed"]): float(r["kl_policy_target"])
        for r in _ends("traces")
    }
    helped = [kl[(*k[:2], 4, k[3])] < kl[(*k[:2], 0, k[3])] for k in kl if k[2] == 0]
    parity = [v for k, v in kl.items() if k[0] == "parity"]
    lost = [v for v in parity if abs(v / math.log(2) - 1) < 0.01]
    assert f"in {sum(helped)} of {len(helped)} runs" in _said("traces")
    assert f"{len(lost)} of {len(parity)} runs on parity" in _said("traces")


def test_what_is_said_of_samples() -> None:
    kl = {(r["law"], r["model"], r["n"], r["seed"]): float(r["kl"]) for r in _rows("samples")}
    means, widest = [], [1.0, 1.0]
    for n in ("100", "1000", "10000", "100000"):
        logs = [
            math.log(kl["pairwise", "ARM", n, s] / kl["pairwise", "EBM", n, s])
            - math.log(kl["additive", "ARM", n, s] / kl["additive", "EBM", n, s])
            for s in ("0", "1", "2")
        ]
        mean = sum(logs) / 3
        half = T_2[1 - 0.05 / 4] * statistics.stdev(logs) / math.sqrt(3)
        means.append(math.exp(mean))
        widest = [
            min(widest[0], math.exp(mean - half)),
            max(widest[1], math.exp(mean + half)),
        ]
    found = [float(x) for x in re.findall(r"\d+\.\d+(?:e[+-]\d+)?|\d+", _said("samples"))]
    assert found[:2] == pytest.approx([min(means), max(means)], rel=0.05)
    assert found[-2:] == pytest.approx(widest, rel=0.05)


def test_what_is_said_of_a_mask() -> None:
    kl = {(r["law"], r["model"], r["seed"]): float(r["gap"]) for r in _rows("weights") if r["gap"]}
    means = []
    for law in ("zipf", "normal", "pairwise"):
        logs = [math.log(kl[law, "EBM-causal", s] / kl[law, "EBM", s]) for s in ("0", "1", "2")]
        means.append(math.exp(sum(logs) / 3))
        assert abs(sum(logs) / 3) < T_2[1 - 0.05 / 3] * statistics.stdev(logs) / math.sqrt(3)
    assert f"by {min(means):.2g} to {max(means):.2g} by law" in _said("weights")
    assert "costs something on no law and helps on no law" in _said("weights")


def _fits(kls: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    """Rows of runs, of which the first look is no end."""
    return [
        {"run": f"{law} {model} {seed}", "law": law, "model": model, "seed": seed, "steps": 10}
        | {"gap": gap}
        for (law, model), values in kls.items()
        for seed, end in enumerate(values)
        for gap in (100.0, end)
    ]


def test_a_law_is_named_where_its_interval_is_on_one_side_and_all_hold_together() -> None:
    one = [1.0, 1.0, 1.0, 1.0]
    rows = _fits(
        {
            ("far", "ARM"): [2.0, 2.1, 1.9, 2.0],
            ("far", "EBM"): one,
            ("near", "ARM"): [0.5, 0.52, 0.5, 0.51],
            ("near", "EBM"): one,
            # Alone it would exclude 1: t > 3.18 with three degrees of freedom; of 3 laws, 4.86.
            ("chance", "ARM"): [math.exp(0.1 * x) for x in (0.2, 1.0, 1.0, 0.9)],
            ("chance", "EBM"): one,
        }
    )
    said = answers.harder_data(rows)
    assert "behind the EBM on far and ahead on near, of 3 laws" in said
    logs = [0.02, 0.1, 0.1, 0.09]
    alone = statistics.fmean(logs) * 2 / statistics.stdev(logs)
    assert 3.18 < alone < 4.86


def test_identities_of_function_space_are_all_in_its_table() -> None:
    rows = _rows("function_space")
    known = {row["what"] for row in rows}
    assert set(answers.IDENTITIES) <= known
    largest = max(abs(float(r["value"])) for r in rows if r["what"] in answers.IDENTITIES)
    assert f"hold to {largest:.0e}" in _said("function_space")


def test_what_is_said_of_figures_and_of_sampling() -> None:
    after: dict[str, float] = {}
    gaps: dict[tuple[str, str], float] = {}
    for row in _rows("figures"):
        if row["ebm"] == "True" and row["model"] in ("ARM", "EBM"):
            gaps[row["run"], row["model"]] = float(row["gap"])
            if row["model"] == "ARM":
                after[row["run"]] = float(row["after"])
    said = _said("figures")
    assert f"({len(after)} pairs)" in said
    assert f"{min(gaps.values()):.0e} to {max(gaps.values()):.0e} nats" in said
    assert f"further than {max(after.values()):.2g} " in said
    chain = [row for row in _ends("sampled_ebm") if row["law"] == "chain"]
    nearer = [float(r["policy_kl"]) < float(r["kl"]) for r in chain if r["policy_kl"]]
    assert f"in {sum(nearer)} of {len(nearer)} runs" in _said("sampled_ebm")
    kls = {m: [float(r["kl"]) for r in chain if r["method"] == m] for m in ("gibbs", "nce")}
    assert statistics.fmean(kls["nce"]) < statistics.fmean(kls["gibbs"])
    assert f"`nce` ends nearest to the law, {statistics.fmean(kls['nce']):.2g} nats" in _said(
        "sampled_ebm"
    )
