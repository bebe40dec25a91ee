"""The benchmark: methods x tasks x seeds under one budget of reward calls, in the open.

Every run is a run directory of its own, trained by a process of its own: the same network, the
same initial weights for each seed, the same number of responses scored. What is finished is not
run again, and what was interrupted goes on.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rl_ebm.agents import AGENTS, entry_of, make_options, meant
from rl_ebm.agents.shared.account import values_apart
from rl_ebm.agents.shared.batch_size import START
from rl_ebm.ebm import EBM
from rl_ebm.envs import TASKS, make_task
from rl_ebm.exact import find_machines, solve
from rl_ebm.files import RunError, check_folder, check_regular, own_files, parts, write_text
from rl_ebm.files.lock import only_one
from rl_ebm.files.tensors import holds
from rl_ebm.messages.arguments import WrongTypeError, shown
from rl_ebm.messages.words import nearest, printable
from rl_ebm.networks.backbone import Context, TransformerConfig, check_sizes
from rl_ebm.policies import Uniform
from rl_ebm.rewards import read_table
from rl_ebm.rewards.base import scores_of
from rl_ebm.statistics.interval import check_samples
from rl_ebm.studies.bench_rows import RANKED, RESULTS, Rows, bracket, looks, samples_of, write_rows
from rl_ebm.studies.seeds import between
from rl_ebm.studies.workers import Lost, Workers
from rl_ebm.training.checkpoint import outline
from rl_ebm.training.config import UNDRAWN, TrainConfig, check_limits
from rl_ebm.training.directory import (
    CONFIG,
    METRICS,
    SCORES,
    STATE,
    check_free,
    describe_ebm,
    load,
    read_config,
)
from rl_ebm.training.loop import MAX_EVALUATED, NonFiniteError, looks_at_all
from rl_ebm.training.run import resume, train
from rl_ebm.training.run_policy import network_config
from rl_ebm.training.stopping import ending_raises

PLAN = "plan.json"
REPORT = "report.md"


@dataclass(frozen=True)
class Problem:
    """What is distilled: a named task, or a table file."""

    name: str
    """a name of rl_ebm.envs.TASKS, or the path of a table"""
    beta: float = 1.0
    task_seed: int = 0

    @property
    def label(self) -> str:
        """Its name in tables and folders."""
        return self.name if self.name in TASKS else Path(self.name).stem

    @property
    def picture(self) -> str:
        """The file of its curves."""
        return f"{self.label}.png"

    def make(self) -> tuple[EBM, dict[str, Any]]:
        """The EBM, and where it is from; the reference is uniform where a task has none."""
        if self.name in TASKS:
            given = "uniform" if TASKS[self.name].reference is None else None
            ebm = make_task(self.name, beta=self.beta, reference=given, task_seed=self.task_seed)
            return ebm, {"task": self.name, "task_seed": self.task_seed}
        table = read_table(Path(self.name), None, "minmax", "error")
        ebm = EBM(table.space, table.scores, self.beta, Uniform(table.space))
        return ebm, {"alphabet": list(table.alphabet), "separator": table.separator}


@dataclass(frozen=True)
class Plan:
    """A benchmark.

    Attributes:
        agents: names of :data:`rl_ebm.agents.AGENTS`.
        problems: what they distil.
        seeds: of the initial weights and of what is drawn.
        calls: responses that each run may score; where its batch grows, with the step that
            reaches them.
        seconds: after which a run ends though calls are left; None for no limit.
        network: sizes of the Transformer.
        options: of each agent, where they are not its defaults.
        samples: responses of target and policy each of a look at a run on a task beyond
            enumeration; the others are verified at every prefix.
    """

    agents: tuple[str, ...]
    problems: tuple[Problem, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    calls: int = 1_000_000
    seconds: float | None = None
    network: TransformerConfig = field(default_factory=TransformerConfig)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: int = 1000

    def __post_init__(self) -> None:
        if not isinstance(self.network, TransformerConfig):
            raise WrongTypeError(
                "the network of a benchmark must be a TransformerConfig, which every run then "
                f"has, got {shown(self.network)}"
            )
        if not self.agents or not self.problems or not self.seeds:
            raise ValueError("a benchmark needs at least one agent, one task and one seed")
        given = {
            "agent": Counter(self.agents),
            "task": Counter(problem.label for problem in self.problems),
            "seed": Counter(map(str, self.seeds)),
        }
        for what, names in given.items():
            twice = [name for name, count in names.items() if count > 1]
            if twice:
                raise ValueError(
                    f"each {what} can be given once, {', '.join(twice)} is there twice (a table "
                    "is called by its file's name without the ending)"
                )
        for name in self.agents:
            entry_of(name)
        for problem in self.problems:
            if problem.name not in TASKS and not Path(problem.name).exists():
                raise ValueError(
                    TASKS.fault(problem.name)
                    or f"there is no task and no table {problem.name!r}"
                    f"{nearest(problem.name, TASKS)}"
                )
        if not 1 <= self.calls < 2**63:
            raise ValueError(f"calls must be >= 1 and below 2**63, got {self.calls}")
        check_limits(None, self.seconds)
        check_samples(self.samples, 2, ": one has no spread")
        for name in self.options:
            if name not in self.agents:
                hint = "" if name in AGENTS else meant(name, self.agents)
                raise ValueError(f"options are given for {name!r}, which takes no part{hint}")
        for name in self.agents:
            options = vars(self.config(name))
            size = options.get("batch_size", 1) or max(START, options.get("group_size") or 0)
            if size > self.calls:
                raise ValueError(
                    f"calls={self.calls} is less than one step of {name}, which scores {size} "
                    "responses: give more calls, or a smaller batch_size in the options"
                )

    def config(self, agent: str) -> Any:
        """The options of an agent."""
        return make_options(agent, entry_of(agent), self.options.get(agent, {}))

    def steps(self, agent: str) -> int | None:
        """Gradient steps that the calls allow; None where the batch grows, and responses count.

        An agent that draws nothing takes as many as one of :data:`UNDRAWN` responses a step.
        """
        size = getattr(self.config(agent), "batch_size", UNDRAWN)
        return None if size is None else max(1, self.calls // size)

    def training(self, agent: str, ebm: EBM) -> TrainConfig:
        """When a run ends, and how it is looked at."""
        samples = None if looks_at_all(ebm) else self.samples
        return TrainConfig(
            self.steps(agent), self.seconds, 20, 2.0, samples=samples,
            responses=self.calls if self.steps(agent) is None else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run."""

    plan: Plan
    agent: str
    problem: Problem
    seed: int
    run: Path


def jobs(plan: Plan, out: Path) -> list[Job]:
    """All runs, with their folders."""
    return [
        Job(plan, agent, problem, seed, out / "runs" / problem.label / agent / str(seed))
        for problem in plan.problems
        for seed in plan.seeds
        for agent in plan.agents
    ]


def measure(job: Job) -> Rows:
    """Train a run, or what is left of it; what its verifications found, by step."""
    if not finished(job):
        if (job.run / CONFIG).exists():
            resume(job.run, progress=False)
        else:
            ebm, source = job.problem.make()
            train(
                ebm,
                job.agent,
                job.run,
                options=job.plan.config(job.agent),
                network=job.plan.network,
                config=job.plan.training(job.agent, ebm),
                seed=job.seed,
                source=source,
                progress=False,
            )
    return rows_of(job)


def _check_begun(job: Job) -> None:
    """Check what there is of a run, before any other is trained.

    Raises:
        RunError: it is damaged, another's, or something else is in its place.
    """
    if not (job.run / CONFIG).exists():
        check_free(job.run, overwrite=False)
    elif not finished(job):
        own_files(job.run)
        if (job.run / STATE).exists():
            load(job.run)


def finished(job: Job) -> bool:
    """Whether the run is there, and complete.

    Raises:
        RunError: a run of another benchmark is in its place.
    """
    if not (job.run / CONFIG).exists():
        return False
    config = read_config(job.run)
    ebm, source = job.problem.make()
    apart = values_apart(job.plan.config(job.agent))
    ends = job.plan.training(job.agent, ebm)
    same = (
        config["ebm"] == json.loads(json.dumps(describe_ebm(ebm, source)))
        and _same_scores(job.run, ebm)
        and config["agent"]["name"] == job.agent
        and config["agent"]["options"] == asdict(job.plan.config(job.agent))
        and config["policy"] == network_config(job.plan.network, apart)
        and config["train"]["seed"] == job.seed
        and config["train"]["steps"] == ends.steps
        and config["train"]["seconds"] == ends.seconds
        and config["train"].get("samples") == ends.samples
    )
    if not same:
        raise RunError(
            f"{job.run} holds a run of another problem, or with other options, network, budget or "
            "samples: give another --out, or delete it"
        )
    if not (job.run / STATE).exists():
        return False
    return outline(job.run / STATE).get("complete") is True


def _same_scores(run: Path, ebm: EBM) -> bool:
    """Whether the table that a run was trained on, where it was one, is the one there is now."""
    scores = scores_of(ebm.reward_model)
    if scores is None or not (run / SCORES).exists():
        return True
    return holds(run / SCORES, {"scores": scores})


def rows_of(job: Job) -> Rows:
    """What a run's metrics say of each verification.

    Raises:
        RunError: there are none, or they are damaged.
    """
    of = {"task": job.problem.label, "agent": job.agent, "seed": job.seed}
    return looks(job.run / METRICS, of, job.problem.beta)


def run(plan: Plan, out: Path, workers: int = 2) -> tuple[Rows, list[str]]:
    """Every run of a plan, ``workers`` at a time with one thread each.

    ``results.csv`` is written after each, so that what was interrupted is not lost. A run whose
    loss stops being finite, or whose agent cannot train on its task, has failed; the others go on.

    Returns:
        the rows of all runs, and a line for each that failed.

    Raises:
        ValueError: a problem with too many states to be listed, and no automaton that tells
            what is true of them, or a network that does not fit into memory.
        RunError: a run of another benchmark is in the place of one.
    """
    for problem in plan.problems:
        ebm, _ = problem.make()
        context = Context(ebm.prompts, ebm.space.vocab_size)
        check_sizes(plan.network, context.num_ids, context.width + ebm.space.max_length)
        if looks_at_all(ebm):
            continue
        if find_machines(ebm) is None:
            states = ebm.num_prompts * ebm.space.num_states
            raise ValueError(
                f"{problem.label} has {states:,} states, and a benchmark verifies every run: at "
                f"most {MAX_EVALUATED:,} can be, or those of an automaton"
            )
        solve(ebm)  # what does not fit is told before anything is trained
    out.mkdir(parents=True, exist_ok=True)
    todo = jobs(plan, out)
    with only_one(out), ending_raises():
        check_folders(out, [job.run for job in todo])
        written = (PLAN, RESULTS, REPORT, *(problem.picture for problem in plan.problems))
        for name in written:
            check_regular(out / name)
        for part in parts(out, written):  # of a benchmark that was killed
            part.unlink()
        for job in todo:
            _check_begun(job)
        return _run_all(plan, out, todo, workers)


def check_folders(out: Path, runs: Sequence[Path]) -> None:
    """Check that no folder between a benchmark's and its runs leads out of it.

    Raises:
        RunError: one does.
    """
    for run in runs:
        for folder in reversed([run, *(p for p in run.parents if p.is_relative_to(out))][:-1]):
            check_folder(folder)


def _run_all(plan: Plan, out: Path, todo: list[Job], workers: int) -> tuple[Rows, list[str]]:
    # What is there is read before anything is trained: a run may be damaged, or another's.
    found = {i: rows_of(job) for i, job in enumerate(todo) if finished(job)}
    left = [i for i in range(len(todo)) if i not in found]
    failed: dict[int, str] = {}
    write_text(out / PLAN, json.dumps(asdict(plan), indent=1) + "\n")

    def written() -> Rows:
        rows = [row for k in sorted(found) for row in found[k]]
        if rows:
            write_rows(out / RESULTS, rows)
        return rows

    with Workers(measure, workers) as processes:
        for k, result in processes.each([todo[i] for i in left]):
            i, job = left[k], todo[left[k]]
            try:
                found[i] = result()
                written()
            except (ValueError, Lost) as error:
                if isinstance(error, RunError) and not isinstance(error, NonFiniteError):
                    raise
                failed[i] = f"{job.problem.label}, {job.agent}, seed {job.seed}: {error}"
                if isinstance(error, Lost):
                    failed[i] += "; the same command goes on with it"
            _say(job, found.get(i, []), len(found) + len(failed), len(todo))
    return written(), [failed[k] for k in sorted(failed)]


def _say(job: Job, rows: Rows, done: int, total: int) -> None:
    end = "failed"
    if rows:
        kl, seconds = rows[-1][RANKED], rows[-1]["seconds"]
        told = f"{kl:.3g}"
        if samples_of(rows) is not None:
            told = between(*bracket(rows[-1], RANKED), kl)
        end = f"KL(policy, target) {told}, {seconds:.0f} s"
    task = printable(job.problem.label)
    print(f"[{done:3d}/{total}] {task:12s} {job.agent:22s} seed {job.seed}: {end}", file=sys.stderr)
