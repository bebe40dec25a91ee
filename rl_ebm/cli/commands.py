"""The commands of ``rl-ebm``: what each does with its flags; :data:`COMMANDS` lists them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import torch

from rl_ebm.agents import AGENTS, entry_of
from rl_ebm.certificates import Certificate, certify
from rl_ebm.cli import parsing
from rl_ebm.cli.exits import exit_code
from rl_ebm.cli.flags import (
    Agents,
    Audit,
    Bench,
    Diagnose,
    Sample,
    Solve,
    Train,
    Verify,
    device_of_flag,
    generator_of_flag,
    network_of_flags,
    train_flags,
)
from rl_ebm.ebm import EBM
from rl_ebm.exact import TooLargeError, solve, summarise
from rl_ebm.files import write_text
from rl_ebm.messages.words import count_text, nearest, printable
from rl_ebm.packages.version import VERSION
from rl_ebm.policies import Policy, log_prob, sample
from rl_ebm.statistics.interval import Interval
from rl_ebm.studies import frameworks
from rl_ebm.studies.audit import audit, to_json, to_text
from rl_ebm.studies.bench import Plan, Problem
from rl_ebm.studies.bench import run as bench
from rl_ebm.studies.bench_options import read_options
from rl_ebm.studies.bench_report import write_report
from rl_ebm.studies.diagnose import diagnose
from rl_ebm.training.config import TrainConfig
from rl_ebm.training.directory import CERTIFICATE, REPORT, decode, load, read_config
from rl_ebm.training.run import resume, train
from rl_ebm.training.stopping import Terminated
from rl_ebm.verification.sampled_report import AnyReport
from rl_ebm.verification.verify import verify

T = TypeVar("T")


def run_train(args: Sequence[str]) -> int:
    """Train an agent, or go on with a run."""
    if parsing.value_of("--resume", args) is not None:
        return _run_resume(args)
    name = parsing.value_of("--agent", args) or "soft-q"
    entry_of(name)
    kind = train_flags(name)
    for flag in parsing.given(args) - parsing.flag_names(kind):
        others = [o for o, e in AGENTS.items() if flag in parsing.flag_names(e.config)]
        if others:
            raise ValueError(
                f"{flag} is no option of --agent {name}, but of {' and '.join(others)}"
            )
    a: Any = _parse(kind, args)
    if a.out is None:
        raise ValueError("say where the run goes: --out FOLDER (or --resume RUN)")
    ebm, source = a.target.make()
    ebm = ebm.to(device_of_flag(a.device))
    limits = (a.steps, a.seconds, a.responses) != (None, None, None)
    _, report = train(
        ebm,
        a.agent,
        a.out,
        options=a.options,
        network=network_of_flags(a.policy, a.network, parsing.given(args)),
        config=TrainConfig(
            steps=a.steps,
            seconds=a.seconds if limits else 60.0,
            responses=a.responses,
            log_every=a.log_every,
            eval_every=a.eval_every,
            checkpoint_every=a.checkpoint_every,
            samples=a.samples,
        ),
        seed=a.seed,
        overwrite=a.overwrite,
        compile=a.compile,
        source=source,
    )
    _say_trained(a.out, report)
    return 0


def _run_resume(args: Sequence[str]) -> int:
    usable = {"--resume", "--steps", "--seconds", "--device", "--help"}
    known = parsing.flag_names(Train).union(
        *(parsing.flag_names(entry.config) for entry in AGENTS.values())
    )
    extra = sorted((parsing.given(args) - usable) & known)
    if extra:
        raise ValueError(
            f"{extra[0]} cannot be given with --resume: the run keeps its configuration (only "
            "--steps, --seconds and --device may change)"
        )
    a = _parse(Train, args)
    assert a.resume is not None
    _, report, went_on = resume(
        a.resume, steps=a.steps, seconds=a.seconds, device=device_of_flag(a.device)
    )
    if not went_on:
        run = printable(str(a.resume))
        print(f"{run} is finished: nothing to do (--steps N or --seconds S extends it)")
        return 0
    _say_trained(a.resume, report)
    return 0


def run_verify(args: Sequence[str]) -> int:
    """Verify a run's policy exactly, or from samples; print the report, and write it as JSON."""
    a = _parse(Verify, args)
    if a.max_kl is not None and not a.max_kl >= 0:
        raise ValueError(f"--max-kl must be a number >= 0, got {a.max_kl}")
    if a.memory < 1:
        raise ValueError(f"--memory must be >= 1 byte, got {a.memory}")
    if a.reward_max is not None and not math.isfinite(a.reward_max):
        raise ValueError(f"--reward-max must be finite, got {a.reward_max}")
    device = device_of_flag(a.device)
    generator = generator_of_flag(a.seed, device)
    policy, ebm = load(a.run, device=device)
    report: AnyReport | Certificate
    try:
        each = True if a.per_prompt else None
        report = verify(policy, solve(ebm), a.memory, a.samples, a.confidence, generator, each)
        path = a.run / REPORT
        if a.reward_max is not None:
            print("--reward-max is not read: log Z is exact here", file=sys.stderr)
    except TooLargeError as error:
        print(f"nothing is exact here: {error}\n", file=sys.stderr)
        report = certify(
            policy,
            ebm,
            10_000 if a.samples is None else a.samples,
            a.confidence,
            reward_max=a.reward_max,
            generator=generator,
            memory=a.memory,
        )
        # A report that was exact stays: perhaps only memory is short today.
        path = a.run / CERTIFICATE
    print(report, flush=True)  # before it is written: the folder may be another's
    write_text(path, json.dumps(report.to_dict(), indent=1) + "\n")
    print(f"\nwritten: {printable(str(path))}")
    return 0 if a.max_kl is None else _gate(report.kl_target_policy, a.max_kl)


def _gate(kl: float | Interval, most: float) -> int:
    """Exit code 0 where KL(target, policy), or the upper end of its interval, is no larger."""
    low, high = (kl.low, kl.high) if isinstance(kl, Interval) else (kl, kl)
    if high <= most:
        return 0
    if high == math.inf and low < math.inf:
        text = "nothing bounds KL(target, policy) from above here, so it cannot be"
        print(f"{text} known to be within --max-kl {most:g}: {kl}", file=sys.stderr)
        return 1
    verb = "is" if low > most else "may be"
    print(f"KL(target, policy) {verb} above --max-kl {most:g}: it is {kl}", file=sys.stderr)
    return 1


def run_solve(args: Sequence[str]) -> int:
    """Solve an EBM exactly; print log Z, entropy and the most probable sequences."""
    a = _parse(Solve, args)
    if a.top < 0:
        raise ValueError(f"--top must be >= 0, got {a.top}")
    ebm, source = a.target.make()
    ebm = ebm.to(device_of_flag(a.device))
    solution = solve(ebm)
    parts = []
    for prompt in range(ebm.num_prompts):
        part = asdict(summarise(solution, a.top, prompt))
        for response in part["top"]:
            response["sequence"] = decode(source, response["tokens"])
        parts.append(part)
    if a.json:
        print(json.dumps(parts[0] if len(parts) == 1 else _mean(parts), indent=1))
        return 0
    for prompt, part in enumerate(parts):
        if len(parts) > 1:
            print(f"prompt {prompt}: {(ebm.prompts or [])[prompt]}")
        print(f"sequences         {count_text(part['num_sequences'])}")
        print(f"log Z             {part['log_z']:.6f}")
        for name, key, unit in (
            ("entropy", "entropy", " nats"), ("expected reward", "expected_reward", ""),
        ):  # fmt: skip
            value = part[key]
            print(f"{name:17s} " + (_NOT_KNOWN if value is None else f"{value:.6f}{unit}"))
        print(f"{'probability':>13} {'score':>10}  sequence")
        for x in part["top"]:
            print(f"{x['probability']:13.6g} {x['score']:10.5g}  {printable(x['sequence'])}")
    return 0


_NOT_KNOWN = "no exact value: a hidden part is no sum along the response"


def _mean(parts: list[dict[str, Any]]) -> dict[str, Any]:
    means = {
        k: None if None in [p[k] for p in parts] else fmean(p[k] for p in parts)
        for k in ("log_z", "entropy", "expected_reward")
    }
    top = [x | {"prompt_id": i} for i, p in enumerate(parts) for x in p["top"]]
    top.sort(key=lambda x: -x["probability"])
    merged = {"num_sequences": parts[0]["num_sequences"], "top": top[: len(parts[0]["top"])]}
    return means | merged | {"per_prompt": parts}


def run_audit(args: Sequence[str]) -> int:
    """Compute what each objective converges to on an EBM: its fixed point against p*."""
    a = _parse(Audit, args)
    ebm, _ = a.target.make()
    solution = solve(ebm.to(device_of_flag(a.device)))
    text, missing = to_text, list[str]()
    if a.framework is None and not a.only:
        lines = audit(solution)
    else:
        text = frameworks.to_text
        lines, missing = frameworks.audit_named(a.framework, solution, a.only)
    referred = ebm.reference is not None
    print(json.dumps(to_json(lines), indent=1) if a.json else text(lines, referred))
    if missing:
        print(f"left out: {'; '.join(missing)}", file=sys.stderr)
    return 0


def run_diagnose(args: Sequence[str]) -> int:
    """Split a run's error into objective, capacity and optimisation, and say what to mend."""
    a = _parse(Diagnose, args)
    found = diagnose(a.run, a.seconds)
    print(json.dumps(found.to_dict(), indent=1) if a.json else found)
    return 0


def run_bench(args: Sequence[str]) -> int:
    """Compare agents on tasks under one budget of reward calls; write a report."""
    a = _parse(Bench, args)
    if not 1 <= a.seeds <= 10_000 or a.workers < 1:
        told = f"--seeds must be in [1, 10000] and --workers >= 1, got {a.seeds} and {a.workers}"
        raise ValueError(told)
    plan = Plan(
        tuple(a.agents.split(",")),
        tuple(Problem(name, a.beta, a.task_seed) for name in a.tasks.split(",")),
        tuple(range(a.seeds)),
        a.calls,
        a.seconds,
        a.network,
        read_options(a.options),
        a.samples,
    )
    try:
        rows, failed = bench(plan, a.out, a.workers)
    except (KeyboardInterrupt, Terminated) as stop:
        parsing.fail("stopped; the same command goes on with what is left")
        return int(stop.code or 0) if isinstance(stop, Terminated) else 130
    if not rows:
        raise ValueError(f"every run failed: {'; '.join(failed)}")
    print(write_report(plan, rows, a.out, failed))
    written, runs = (printable(str(a.out / name)) for name in ("report.md", "runs"))
    print(f"\nwritten: {written}; curves: tensorboard --logdir {runs}")
    return 0


def run_sample(args: Sequence[str]) -> int:
    """Draw responses from a run's policy: one line each, with log pi and the reward."""
    a = _parse(Sample, args)
    if a.n < 1:
        raise ValueError(f"-n must be >= 1, got {a.n}")
    if a.n >= 2**63:
        raise ValueError(f"-n must be below 2**63, got {a.n}")
    device = device_of_flag(a.device)
    generator = generator_of_flag(a.seed, device)
    policy, ebm = load(a.run, device=device)
    source = read_config(a.run)["ebm"]
    columns = ["sequence", "log_pi", "score"]
    print("\t".join(columns if ebm.prompts is None else ["prompt", *columns]))
    # As many at a time as their logits take a quarter of a gigabyte.
    most = max(1, min(4096, 2**26 // (ebm.space.max_length * ebm.space.vocab_size)))
    for first in range(0, a.n, most):
        rows = torch.arange(first, min(first + most, a.n), device=device)
        _print_samples(policy, ebm, source, generator, rows % ebm.num_prompts)
    return 0


def _print_samples(
    policy: Policy,
    ebm: EBM,
    source: dict[str, Any],
    generator: torch.Generator,
    prompt_ids: torch.Tensor,
) -> None:
    batch = ebm.score(sample(policy, ebm.space, len(prompt_ids), generator, prompt_ids))
    with torch.no_grad():
        log_pi = log_prob(policy, ebm.space, batch.tokens, batch.lengths, prompt_ids)
    reward = batch.rewards()
    for row in range(len(batch)):
        tokens = batch.tokens[row, : int(batch.lengths[row])].tolist()
        text = printable(decode(source, tokens))
        cells = [text, f"{float(log_pi[row]):.5f}", f"{float(reward[row]):.6g}"]
        if ebm.prompts is not None:
            cells.insert(0, " ".join(map(str, ebm.prompts[int(prompt_ids[row])])))
        print("\t".join(cells))


def run_agents(args: Sequence[str]) -> int:
    """List the agents, with the paper of each."""
    _parse(Agents, args)
    for name, entry in AGENTS.items():
        print(f"{name:16s} {entry.summary} ({entry.paper})")
    return 0


class Command(NamedTuple):
    """What a command does with what stands after its name, and the dataclass of its flags."""

    run: Callable[[Sequence[str]], int]
    flags: Any

    @property
    def about(self) -> str:
        """One line."""
        return (self.run.__doc__ or "").splitlines()[0]


COMMANDS = {
    "train": Command(run_train, Train),
    "verify": Command(run_verify, Verify),
    "solve": Command(run_solve, Solve),
    "audit": Command(run_audit, Audit),
    "diagnose": Command(run_diagnose, Diagnose),
    "bench": Command(run_bench, Bench),
    "sample": Command(run_sample, Sample),
    "agents": Command(run_agents, Agents),
}
"""every command by its name, in the order of the help"""


def _parse(kind: type[T], args: Sequence[str]) -> T:
    """The flags of the command that they are of; see :func:`parsing.parse`."""
    name = next(name for name, c in COMMANDS.items() if issubclass(kind, c.flags))
    return parsing.parse(kind, args, f"rl-ebm {name}", COMMANDS[name].about)


def help_text() -> str:
    """Every command with every flag, the options of each agent included."""
    lines = ["usage: rl-ebm COMMAND [flags]", ""]
    lines += [f"  {name:8s} {command.about}" for name, command in COMMANDS.items()]
    lines += ["", "rl-ebm COMMAND --help is one of the following alone.", ""]
    for name, command in COMMANDS.items():
        if parsing.flag_names(command.flags):
            lines.append(parsing.help_text(command.flags, f"rl-ebm {name}"))
    for name, entry in AGENTS.items():
        lines.append(parsing.help_text(entry.config, f"rl-ebm train --agent {name}"))
    return "\n".join(lines)


def _say_trained(run: Path, report: AnyReport | None) -> None:
    if report is not None:
        figures = report.scalars()
        print(
            f"KL(target, policy) {figures['kl_target_policy']:.3g} nats, KL(policy, target) "
            f"{figures['kl_policy_target']:.3g} nats, total variation {figures['tv']:.3g}"
        )
    text = printable(str(run))
    print(f"run: {text}; next: rl-ebm verify {text}; tensorboard --logdir {text}")


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 1 (``verify --max-kl`` exceeded), 2 (wrong input)."""
    given = sys.argv[1:] if args is None else list(args)
    return exit_code(lambda: _run(given))


def _run(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if args[0] == "--version":
        print(VERSION)
        return 0
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        return parsing.fail(f"there is no command {command!r}{nearest(command, COMMANDS)}")
    return COMMANDS[command].run(rest)
