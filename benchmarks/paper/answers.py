"""One line for each section of the report: what it answers, from its own rows.

Where several intervals are looked at, each is at 1 - 0.05 / (how many), so that all hold at 95 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rl_ebm.studies.seeds import geometric

Rows = list[dict[str, Any]]
ERROR = 0.05
"""probability that some interval of an answer misses"""


def function_space(rows: Rows) -> str:
    """Of Props. 1, 2, 4."""
    largest = max(abs(row["value"]) for row in rows if row["what"] in IDENTITIES)
    return (
        f"ARM and EBM are one object: {len(IDENTITIES)} identities hold to {largest:.0e} on every "
        "random table."
    )


IDENTITIES = (
    "M is a bijection: r to q to r",
    "M is a bijection: q to r to q",
    "log p of the ARM of q = M(r) is that of the EBM of r",
    "V_q(x) is log Z(x)",
    "the ARM of any q sums to 1",
    "gradient of V(x) by r is the prefix marginal",
    "gradient of log Z by R is p",
    "forward times backward over Z is the prefix marginal",
    "chain rule of the entropy",
    "chain rule of the KL",
    "ELBO = log Z - KL(ARM, EBM)",
    "residual form with a reference",
)


def figures(rows: Rows) -> str:
    """Of Figs. 2 to 4."""
    found = [row for row in _last(rows, ("run", "model")) if row.get("model") in ("ARM", "EBM")]
    trained = [row for row in found if row.get("ebm") is True]
    gaps = [row["gap"] for row in trained]
    after = [row["after"] for row in trained if row["model"] == "ARM"]
    return (
        f"Trained side by side ({len(after)} pairs) both models come within "
        f"{min(gaps):.0e} to {max(gaps):.0e} nats of the law, and no logit of the ARM is then "
        f"further than {max(after):.2g} from M of the EBM's rewards."
    )


def harder_data(rows: Rows) -> str:
    """Whether the ARM pays for the future."""
    ends = _last(rows, ("run",))
    steps = max(row["steps"] for row in ends if row["model"] == "EBM")
    kls = {(r["law"], r["model"], r["seed"]): r["gap"] for r in ends if r["steps"] == steps}
    ratios = _over(kls, "ARM", "EBM")
    behind, ahead = sides(ratios)
    seeds = min(map(len, ratios.values()))
    open_yet = "" if behind or ahead else ": which of them is the harder to train is not settled"
    return (
        f"With {seeds} seeds, at equal size and steps, the ARM is behind the EBM on "
        f"{_said(behind, 'no law')} and ahead on {_said(ahead, 'no law')}, of {len(ratios)} laws and all "
        f"intervals together{open_yet}."
    )


def bounds(rows: Rows) -> str:
    """How loose Prop. 3 is."""
    mine = [row for row in rows if row.get("kind") == "agent" and row["kl"] > 0]
    first, last = (
        statistics.median(row[key] / row["kl"] for row in mine) for key in ("prop3", "split")
    )
    broken = sum(row["prop3"] < row["kl"] * (1 - 1e-9) for row in rows if row.get("prop3") != "")
    return (
        f"Prop. 3 fails at {broken} of {len(rows):,} policies and is {first:,.0f} times the KL in "
        f"the median along training; weighed by states and actions a bound is {last:.1f} times it."
    )


def scale(rows: Rows) -> str:
    """What is left at a length and an alphabet that nobody enumerates."""
    ends = _last(rows, ("run",))
    size = max((row["vocab_size"] ** row["max_length"], row["shared"]) for row in ends)
    here = [r for r in ends if (r["vocab_size"] ** r["max_length"], r["shared"]) == size]
    left = {
        name: statistics.fmean(
            r["kl_target_policy"] / r["uniform"] for r in here if r["agent"] == name
        )
        for name in dict.fromkeys(r["agent"] for r in here)
    }
    told = ", ".join(f"`{k}` {100 * v:.2g} %" for k, v in sorted(left.items(), key=lambda x: x[1]))
    return (
        f"At {size[0]:.0e} sequences the same number of responses leaves of KL(target, uniform) "
        f"{told}."
    )


def weights(rows: Rows) -> str:
    """What the mask costs."""
    ends = _last([row for row in rows if row["gap"] != ""], ("run",))
    kls = {(r["law"], r["model"], r["seed"]): r["gap"] for r in ends}
    ratios = _over(kls, "EBM-causal", "EBM")
    more, less = sides(ratios)
    return (
        f"A causal mask changes the KL that the same EBM reaches by {_range(ratios)} by law; it "
        f"costs something on {_said(more, 'no law')} and helps on {_said(less, 'no law')}, all intervals "
        "together."
    )


def samples(rows: Rows) -> str:
    """Open question 1: R or q."""
    kls = {(r["law"], r["model"], r["n"], r["seed"]): r["kl"] for r in rows}

    def over(law: str, n: int, seed: int) -> float:
        return float(kls[law, "ARM", n, seed] / kls[law, "EBM", n, seed])

    ratios: dict[str, list[float]] = {}
    for _, _, n, seed in sorted(k for k in kls if k[:2] == ("pairwise", "ARM") and k[2] > 0):
        found = over("pairwise", n, seed) / over("additive", n, seed)
        ratios.setdefault(f"n = {n:,}", []).append(found)
    above, below = sides(ratios)
    ends = [geometric(values, _level(ratios))[1:] for values in ratios.values()]
    return (
        "R or q, which is easier to learn? Of laws that mirror each other the ARM's KL over the "
        f"EBM's is {_range(ratios)} times as large where R is simple as where q is; this is more "
        f"than 1 at {_said(above, 'no n')} and less at {_said(below, 'no n')}, but all intervals together "
        f"leave {min(x for x, _ in ends):.2g} to {max(x for _, x in ends):.2g}."
    )


def traces(rows: Rows) -> str:
    """Whether thinking helps."""
    kls = {
        (r["law"], r["loss"], r["trace"], r["seed"]): r["kl_policy_target"]
        for r in _last(rows, ("run",))
    }
    most = max(trace for _, _, trace, _ in kls)
    pairs = [(kls[law, loss, 0, s], v) for (law, loss, k, s), v in kls.items() if k == most]
    helped = sum(with_it < without for without, with_it in pairs)
    half = [v for (law, *_), v in kls.items() if law == "parity"]
    lost = sum(abs(v - math.log(2)) < 0.01 for v in half)
    collapse = (
        ", where half of the answers are lost: this measures how training collapses, not what a "
        "network can express"
    )
    return (
        f"With {most} tokens of trace sampled training ends nearer to the EBM than without in "
        f"{helped} of {len(pairs)} runs, and {lost} of {len(half)} runs on parity end at "
        f"log 2{collapse if lost else ''}."
    )


def sampled_ebm(rows: Rows) -> str:
    """The EBM where its partition function is no sum."""
    ends = _last(rows, ("run",))
    chain = [r for r in ends if r["law"] == "chain"]
    found = {
        name: statistics.fmean(r["kl"] for r in chain if r["method"] == name)
        for name in dict.fromkeys(r["method"] for r in chain)
    }
    if not found:
        return "Beyond enumeration nothing was run."
    best = min(found, key=lambda name: found[name])
    beside = [r for r in chain if r.get("policy_kl") not in ("", None)]
    ahead = sum(r["policy_kl"] < r["kl"] for r in beside)
    return (
        f"Beyond enumeration `{best}` ends nearest to the law, {found[best]:.2g} nats off; the ARM "
        f"that is trained beside an EBM ends nearer than it in {ahead} of {len(beside)} runs."
    )


ANSWERS: dict[str, Callable[[Rows], str]] = {
    f.__name__: f
    for f in (
        function_space, figures, harder_data, bounds, scale, weights, samples, traces, sampled_ebm,
    )
}  # fmt: skip
"""by section"""


def _last(rows: Rows, by: Sequence[str]) -> Rows:
    """The last row of each run, or of each of its models."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        found[tuple(row[key] for key in by)] = row
    return list(found.values())


def _over(kls: dict[tuple[str, str, int], float], model: str, other: str) -> dict[str, list[float]]:
    """By law, of each seed that both models have."""
    found: dict[str, list[float]] = {}
    for law, name, seed in kls:
        if name == model and (law, other, seed) in kls:
            found.setdefault(law, []).append(kls[law, model, seed] / kls[law, other, seed])
    return found


def _level(ratios: Mapping[str, Sequence[float]]) -> float:
    return 1 - ERROR / len(ratios)


def sides(ratios: Mapping[str, Sequence[float]]) -> tuple[list[str], list[str]]:
    """Where a ratio is above 1, and where below, all intervals together."""
    known = {name: geometric(values, _level(ratios)) for name, values in ratios.items()}
    above = [name for name, (_, low, _) in known.items() if low > 1]
    below = [name for name, (_, _, high) in known.items() if high < 1]
    return above, below


def _said(names: Sequence[str], none: str) -> str:
    return ", ".join(names) or none


def _range(ratios: dict[str, list[float]]) -> str:
    means = [geometric(values)[0] for values in ratios.values()]
    return f"{min(means):.2g} to {max(means):.2g}"
