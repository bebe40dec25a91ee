"""Whether random losses end where ``audit_loss`` says: long noisy training on sampled batches.

    python -m benchmarks.losses --count 200 --seed 0     # over an hour of one core
    python -m benchmarks.losses --quick                  # a few, shortly: only to see that it works

Each loss (:mod:`benchmarks.support.random_losses`) is audited, and trained with on batches that the
library's sampler draws from a tabular policy (:mod:`benchmarks.support.loss_training`). Writes
``benchmarks/results/losses.md``.
"""

from __future__ import annotations

import math
import statistics as stats
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from benchmarks.support.loss_training import Ended, Plan, Statistic, statistics, train
from benchmarks.support.machine import describe
from benchmarks.support.random_losses import Drawn, draw
from rl_ebm import audit_loss, solve
from rl_ebm.policies import Tabular, log_prob
from rl_ebm.training.checkpoint import write_text

RESULTS = Path(__file__).parent / "results"
DEAD = 1e-2
"""probability that a dead response falls below"""
NEAR = 2e-2
"""total variation between the end of a run and its limit, where some of it is on the boundary"""
MOVING = 3e-3
"""total variation by which averaged laws of two halves differ where a run is not over"""
SHORT = Plan(first=250, last=200)
LONGER = (4, 48)
"""times as many updates, for what does not agree"""
VERDICTS = ("agree", "agree, boundary", "still moving", "another root", "disagree", "refused")


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    count: int = 200
    """losses"""
    seed: int = 0
    """of the first; the others follow"""
    minutes: float = math.inf
    """after which no further loss is tried"""
    quick: bool = False
    """three losses, few updates; writes nothing into the results"""


@dataclass(frozen=True)
class Outcome:
    """What became of one loss.

    Attributes:
        verdict: one of :data:`VERDICTS`.
        far: TV between the predicted limit and the EBM.
        off: TV between the predicted limit and the mean law of the runs of the lower rate.
        tells: whether the runs tell the limit from the EBM: some statistic of the EBM is out of
            what would agree.
        width: the widest half of an interval, allowance and all.
    """

    seed: int
    case: Drawn
    verdict: str
    far: float = math.nan
    off: float = math.nan
    tells: bool = False
    width: float = math.nan
    words: str = ""


def tried(seed: int, plan: Plan) -> Outcome:
    """One loss, audited and trained with; once more and longer where the runs were not over."""
    case = draw(seed)
    solution = solve(case.ebm)
    try:
        found = audit_loss(case.loss, solution, case.kind, beyond=False, **case.arguments)
    except ValueError as error:
        return Outcome(seed, case, "refused", words=str(error))
    if found.log_laws is None:
        return Outcome(seed, case, "refused", words=f"no limit: {found.how}")
    law = found.log_laws[0].exp()
    far = math.nan if found.tv is None else found.tv
    outcome, moving = _compared(seed, case, law, train(case, plan, seed), far)
    for longer in LONGER:
        if outcome.verdict != "disagree":
            return outcome
        longer_plan = replace(plan, first=plan.first * longer, last=plan.last * longer)
        end = train(case, longer_plan, seed + 1)
        outcome, moving = _compared(seed, case, law, end, far)
        if outcome.verdict == "disagree":
            outcome = _elsewhere(outcome, law, end) or outcome
    still = outcome.verdict == "disagree" and moving > MOVING
    return replace(outcome, verdict="still moving") if still else outcome


def _elsewhere(outcome: Outcome, law: Tensor, end: Ended) -> Outcome | None:
    """The verdict "another root", where the audit says so of where the runs came by."""
    case, half = outcome.case, len(end.logits) // 2
    again = _limit_from(case, end.logits[half:].mean(0))
    if again is not None and float((again - law).abs().sum()) / 2 > 1e-3:
        other, _ = _compared(outcome.seed, case, again, end, outcome.far)
        if other.verdict.startswith("agree"):
            return replace(other, verdict="another root")
    if bool((law == 0).any()) and _each_from_halfway(case, end):
        return replace(outcome, verdict="another root")
    return None


def _compared(seed: int, case: Drawn, law: Tensor, end: Ended, far: float) -> tuple[Outcome, float]:
    """The verdict, and the total variation by which the runs still move."""
    found, half = end.mean.exp(), len(end.mean) // 2
    off = float((found[half:].mean(0) - law).abs().sum()) / 2
    moving = float((end.late.exp() - end.early.exp()).mean(0).abs().sum()) / 2
    dead = law == 0
    allowed = end.before > -math.inf
    if bool((dead & allowed[0]).any()):
        now, then = (float(x.exp()[:, dead].max()) for x in (end.last, end.before))
        falls = now < DEAD and (now < then or now < 1e-5)
        words = f"dead at most {then:.2g}, then {now:.2g}"
        verdict = "agree, boundary" if falls else "disagree"
        return Outcome(seed, case, verdict, far, off, falls, math.nan, words), moving
    compared = statistics(case, end, law)
    target = solve(case.ebm)
    tells = any(not x.agrees for x in statistics(case, end, _law(case, target)))
    wrong = [x for x in compared if not x.agrees]
    words = "; ".join(_words(x) for x in wrong)
    width = max(x.noise + x.allowance for x in compared)
    verdict = "disagree" if wrong else "agree"
    return Outcome(seed, case, verdict, far, off, tells, width, words), moving


def _law(case: Drawn, policy: object) -> Tensor:
    """Of a policy on all responses."""
    tokens, lengths = case.ebm.space.sequences()
    return log_prob(policy, case.ebm.space, tokens, lengths).exp()  # type: ignore[arg-type]


def _words(x: Statistic) -> str:
    return f"{x.name} {x.found:.4f}, predicted {x.predicted:.4f} (± {x.noise + x.allowance:.4f})"


def _limit_from(case: Drawn, logits: Tensor) -> Tensor | None:
    """The limit that is predicted from there; logits of one run, (S, A)."""
    start = Tabular(case.ebm.space, scale=0.0, dtype=torch.float64)
    start.table.data.copy_(logits[None].double())
    try:
        found = audit_loss(
            case.loss, solve(case.ebm), case.kind, beyond=False, start=start, **case.arguments
        )
    except ValueError:
        return None
    return None if found.log_laws is None else found.log_laws[0].exp()


def _each_from_halfway(case: Drawn, end: Ended) -> bool:
    """Whether each run of the lower rate ends where the audit says from its halfway point.

    Noise decides on the way who survives where several can.
    """
    half = len(end.halfway) // 2
    for logits, last in zip(end.halfway[half:], end.last[half:].exp(), strict=True):
        law = _limit_from(case, logits)
        if law is None or float((last - law).abs().sum()) / 2 > NEAR:
            return False
    return True


def report(outcomes: list[Outcome], command: str, seconds: float) -> str:
    """Markdown: counts by group, and every one that does not agree."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for x in outcomes:
        groups[x.case.group].append(x)
    groups = dict(sorted(groups.items())) | {"all": outcomes}
    rows = [
        "| losses | " + " | ".join(VERDICTS) + " | not the EBM | told from it | TV | half width |",
        "|---" * (len(VERDICTS) + 5) + "|",
    ]
    for name, members in groups.items():
        counts = [sum(x.verdict == v for x in members) for v in VERDICTS]
        elsewhere = [x for x in members if x.far > 1e-6]
        told = sum(x.tells for x in elsewhere)
        good = [x for x in members if x.verdict == "agree"]
        off = stats.median(x.off for x in good) if good else math.nan
        width = stats.median(x.width for x in good) if good else math.nan
        rows.append(
            f"| {name} | {' | '.join(map(str, counts))} | {len(elsewhere)} | {told} | "
            f"{off:.2g} | {width:.2g} |"
        )
    others = [x for x in outcomes if not x.verdict.startswith("agree")]
    listed = [
        f"- seed {x.seed}, {x.verdict}: {x.case.group}: {x.case.words}. {x.words}" for x in others
    ]
    return "\n".join([*rows, "", *listed, "", f"`{command}`, {seconds / 60:.0f} minutes."])


MEANING = """\
Each loss is audited, and trained with: Adam at a rate that falls to a tenth, from the reference,
on batches of a few hundred that the library's sampler draws from a `Tabular` policy; the logits are
averaged over the last updates. Six seeds at a rate and six at half of it. Compared are E[R] and the
probabilities of the three likeliest responses, of the six at half the rate: a prediction agrees
where each is within Student's 99.9 % interval (Bonferroni over the four) plus twice the difference
between both rates (the bias of steps of a length, and of a way that is not over) plus 0.003 of the
statistic's scale (batches are finite, and their means are not those of the limit). On the boundary
every response that is said to die must be below 0.01 in every run, and have fallen since the
averaging began. What does not agree is trained four times as long, and then 48 times. "Still
moving" is what then still moves by 0.003 in total variation between both halves of the averaging,
and "another root" what agrees with the limit that is predicted from where the runs ended, or, where
responses die, each run to 0.02 in total variation with the limit predicted from where its averaging
began.
"Told from it": some statistic of the EBM itself is out of its interval, so the agreement says
something. TV and half width are medians over those that agree inside.
"""


def main(options: Options) -> None:
    torch.set_num_threads(1)
    plan = Plan(seeds=3, first=40, last=40) if options.quick else SHORT
    begin, outcomes = time.monotonic(), []
    for i in range(3 if options.quick else options.count):
        if time.monotonic() - begin > 60 * options.minutes:
            break
        outcomes.append(tried(options.seed + i, plan))
        x = outcomes[-1]
        print(x.seed, x.verdict, x.case.group, x.case.words, x.words, sep=" | ", flush=True)
    command = "python -m benchmarks.losses " + " ".join(sys.argv[1:])
    text = report(outcomes, command.strip(), time.monotonic() - begin)
    text = f"{MEANING}\n{text} {describe()}\n"
    print(text)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        write_text(RESULTS / "losses.md", text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
