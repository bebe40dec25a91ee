"""Tables of Figures 2 to 4: ours beside what is read off the paper's."""

from __future__ import annotations

from benchmarks.paper.common import Rows, ends, select
from benchmarks.paper.fit import Schedule
from rl_ebm.studies.seeds import geometric, geometric_interval

Setting = tuple[int, int, int]
"""V, T and N"""

RATES = (3e-3, 1e-3, 1e-4)
"""the paper's grid; it takes the one with the smallest area under the EBM's curve"""

PAPER = {
    (8, 4, 2): (3.2e-6, 4.2e-6, 5.7, 0.023),
    (8, 4, 3): (2.1e-7, 4.6e-7, 2.8, 0.0082),
    (4, 8, 2): (7.9e-6, 8.2e-6, 14.0, 0.039),
    (4, 8, 3): (3.1e-7, 1.1e-6, 3.7, 0.017),
}
"""read off its figures at step 5,000: ARM gap, EBM gap, logit distance before and after the map"""

READ = {"500": "4.9e-04", "1,000": "1.9e-04", "4,900": "6e-05 to 1.1e-04", "5,000": "3.2e-06"}
"""its ARM's gap at some steps, for V = 8, T = 4 and N = 2; before the end of all its curves"""
ORDER = 10.0
"""by which a gap shrinks that shrinks by an order of magnitude"""

RAMP = Schedule(1).ramp
"""steps of its end in which the rate falls to 0"""


def chosen_rate(rows: Rows, layers: int) -> float:
    """The paper's rule: the smallest area under the EBM's curve; the first if one is missing."""
    trials = [select(rows, layers=layers, lr=lr) for lr in RATES]
    if not all(trials):
        return RATES[0]
    area = {lr: sum(r["gap"] for r in mine) for lr, mine in zip(RATES, trials, strict=True)}
    return min(area, key=lambda lr: area[lr])


def compared(values: list[float], paper: float) -> str:
    """Ours, the paper's, and their ratio."""
    if not values:
        return f"not run / {paper:.2g}"
    return f"{geometric_interval(values)} / {paper:.2g} ({geometric(values)[0] / paper:.2g} x)"


def gap_lines(rows: Rows, rates: Rows, settings: list[Setting]) -> list[tuple[str, ...]]:
    """Lines of a table: gaps and distances at the end, against the paper's."""
    lines = []
    for v, t, n in settings:
        mine = select(rows, vocab_size=v, max_length=t, layers=n)
        arm, ebm = select(mine, model="ARM"), select(mine, model="EBM")
        far = select(arm, ebm=True)
        values = [ends(arm, "gap"), ends(ebm, "gap"), ends(far, "before"), ends(far, "after")]
        paper = zip(values, PAPER[v, t, n], strict=True)
        rate = f"{chosen_rate(rates, n):g}" if mine and select(rates, layers=n) else "not run"
        lines.append((f"{v}, {t}, {n}", rate, *(compared(*x) for x in paper)))
    return lines


def to_the_law(rows: Rows, settings: list[Setting]) -> str:
    """Distances of ARMs that no EBM was trained beside, to the law itself: of all seeds."""
    found = []
    for v, t, n in settings:
        arm = select(rows, model="ARM", vocab_size=v, max_length=t, layers=n, ebm=False)
        if arm:
            before, after, kept = (span(ends(arm, x)) for x in ("before", "after", "invariant"))
            found.append(f"{before}, {after} and {kept} (V={v}, T={t}, N={n})")
    return "; ".join(found) or "none"


def span(values: list[float]) -> str:
    """Smallest to largest."""
    return f"{min(values):.2g} to {max(values):.2g}"


def gains(rows: Rows, init: str, beta2: float, ramp: int) -> list[float]:
    """By how much the gap shrinks while the rate falls to 0, of each seed."""
    mine = select(rows, model="choice", init=init, beta2=beta2)
    last = max((r["step"] for r in mine), default=0)
    ended = {r["seed"]: r["gap"] for r in mine if r["step"] == last}
    return [r["gap"] / ended[r["seed"]] for r in mine if r["step"] == last - ramp]


def choice_lines(rows: Rows, choices: list[tuple[str, float]]) -> list[tuple[str, ...]]:
    """Lines of a table: the ARM's gap at some steps, the paper's first, then by choice."""
    lines = [("the paper's curve", "not stated", *READ.values(), "19 to 34")]
    for init, beta2 in choices:
        mine = select(rows, model="choice", init=init, beta2=beta2)
        at = sorted({r["step"] for r in mine})
        values = [geometric_interval([r["gap"] for r in mine if r["step"] == k]) for k in at]
        values = values or ["not run"] * len(READ)
        gained = geometric_interval(gains(rows, init, beta2, RAMP)) if mine else "not run"
        lines.append((f"{init}'s", f"{beta2:g}", *values, gained))
    return lines


def orders(rows: Rows, choices: list[tuple[str, float]]) -> str:
    """The choices whose last steps gain an order of magnitude, and the others, with the means."""
    named: dict[bool, list[str]] = {True: [], False: []}
    for init, beta2 in choices:
        found = gains(rows, init, beta2, RAMP)
        if found:
            mean = geometric(found)[0]
            named[mean >= ORDER].append(f"{init}'s with {beta2:g} ({mean:.2g} x)")
    most, fewer = (", ".join(named[key]) or "none" for key in (True, False))
    return f"an order of magnitude or more with {most}; less with {fewer}"


def invariants(rows: Rows, settings: list[Setting]) -> str:
    """The invariant distance to an EBM at the end, in each setting."""
    found = []
    for v, t, n in settings:
        mine = select(rows, model="ARM", vocab_size=v, max_length=t, layers=n, ebm=True)
        if mine:
            kept = geometric_interval(ends(mine, "invariant"))
            found.append(f"{kept} (V={v}, T={t}, N={n})")
    return "; ".join(found)
