"""The rows of a benchmark: what each look at a run found, exactly or with an interval around it.

Where prefixes are too many to be listed a figure is an estimate from exact samples of target and
policy. Its row then also has ``samples``, how many of each, and for each figure the ends of its own
95% interval, ``KEY_low`` and ``KEY_high``. That interval is about this one policy, and says nothing
of what another seed would have trained.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

from rl_ebm.files import RunError, write_text
from rl_ebm.training.metrics_csv import read_rows
from rl_ebm.verification.figures import FIGURES

RESULTS = "results.csv"
BENCHED = tuple(figure for figure in FIGURES if figure.benched)
RANKED = "kl_policy_target"
"""what agents are ordered by"""
SAMPLES = "samples"
"""the column that only estimates have: of how many responses"""
Rows = list[dict[str, Any]]


def looks(path: Path, of: Mapping[str, Any], beta: float) -> Rows:
    """What a run's metrics say of each verification.

    Args:
        path: its metrics.csv.
        of: what each row begins with: of which run it is.
        beta: of its EBM.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return [
            _look(row, of, beta) for row in read_rows(path)[1] if row.get("exact/kl_target_policy")
        ]
    except FileNotFoundError:
        raise RunError(f"{path} is missing: delete {path.parent} to run it again") from None
    except (KeyError, ValueError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(
            f"{path} is damaged ({error}): delete {path.parent} to run it again"
        ) from None


def _look(row: Mapping[str, str], of: Mapping[str, Any], beta: float) -> dict[str, Any]:
    figures = {f.key: float(row[f"exact/{f.key}"]) for f in BENCHED}
    found = {
        **of,
        "step": int(row["step"]),
        "seconds": float(row["seconds"]),
        "reward_calls": int(row["reward_calls"]),
        **figures,
    }
    if not row.get("sampled/num_samples"):
        # log Z - KL(pi, p*) = E[R] / beta - KL(pi, p_ref)
        kl_reference = figures["expected_reward_policy"] / beta - float(row["eval/elbo"])
        return found | {"kl_reference": kl_reference}
    keys = {f.key: f.key for f in BENCHED} | {"kl_reference": "kl_policy_reference"}
    found["kl_reference"] = float(row["exact/kl_policy_reference"])
    found[SAMPLES] = int(float(row["sampled/num_samples"]))
    for name, key in keys.items():
        for end in ("low", "high"):
            found[f"{name}_{end}"] = float(row[f"sampled/{key}/{end}"])
    return found


def bracket(row: Mapping[str, Any], key: str) -> tuple[float, float]:
    """Between what a figure is: the ends of its interval, or twice the value where it is exact."""
    if SAMPLES not in row:
        return row[key], row[key]
    return row[f"{key}_low"], row[f"{key}_high"]


def bracket_of_mean(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float]:
    """Between what the mean over these very runs is: the means of their lower and upper ends.

    It holds where each run's interval does, by the union bound: of n with probability 1 - n / 20
    at least.
    """
    low, high = zip(*(bracket(row, key) for row in rows), strict=True)
    return fmean(low), fmean(high)


def samples_of(rows: Iterable[Mapping[str, Any]]) -> int | None:
    """How many responses of target and policy each the rows of a task are from; None: exact."""
    return next((row[SAMPLES] for row in rows if SAMPLES in row), None)


def write_rows(path: Path, rows: Rows) -> None:
    """A CSV file, whole or not at all; what a row lacks stays empty."""
    text = StringIO(newline="")
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def last_of(rows: Sequence[dict[str, Any]], **fields: Any) -> Rows:
    """The last row of each run that has these values, by seed."""
    last = {}
    for row in rows:
        if all(row[k] == v for k, v in fields.items()):
            last[row["task"], row["agent"], row["seed"]] = row
    return list(last.values())
