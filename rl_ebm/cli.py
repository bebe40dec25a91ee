"""The command line: ``rl-ebm train | verify | solve | sample | agents``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import torch
import tyro

import rl_ebm
from rl_ebm import flags
from rl_ebm.agents import AGENTS
from rl_ebm.backbone import TransformerConfig
from rl_ebm.checkpoint import write_text
from rl_ebm.ebm import EBM
from rl_ebm.envs import TASKS, make_task
from rl_ebm.exact import solve, summarise
from rl_ebm.names import nearest
from rl_ebm.policies import Uniform, log_prob, sample
from rl_ebm.rewards import read_table
from rl_ebm.runs import REPORT, decode, load, read_config
from rl_ebm.train import resume, train
from rl_ebm.training import TrainConfig
from rl_ebm.verify import verify


@dataclass(frozen=True)
class Target:
    """What is distilled or solved."""

    task: str | None = None
    """a named task: random, pairwise or prompts; random where there is no --table"""
    table: Path | None = None
    """a TSV or CSV file with the columns sequence and score"""
    alphabet: str | None = None
    """order of the table's tokens, ACGT for example; else the sorted set seen"""
    normalise: Literal["minmax"] | None = None
    """minmax maps the table's scores to [0, 1] first"""
    missing: Literal["error", "forbid"] = "error"
    """what a sequence that the table lacks is: an error, or impossible (forbid)"""
    vocab_size: int | None = None
    """A, number of token ids of the task, EOS included; None for the task's default"""
    max_length: int | None = None
    """T, length of the task's responses, at most; None for the task's default"""
    eos_id: int | None = None
    """token id that ends a response of the task; None for responses of exactly T tokens"""
    beta: float = 1.0
    """temperature of the KL penalty, > 0, in reward units per nat"""
    reference: Literal["uniform"] | None = None
    """uniform over the allowed tokens of each state; None for the counting measure"""
    task_seed: int = 0
    """seed of what the task draws"""

    def make(self) -> tuple[EBM, dict[str, Any]]:
        """The EBM, and where it is from (for the run's configuration)."""
        if self.table is None:
            if self.alphabet or self.normalise or self.missing != "error":
                raise ValueError("--alphabet, --normalise and --missing need a --table")
            name = self.task or "random"
            if name not in TASKS:
                raise ValueError(f"there is no task {name!r}{nearest(name, TASKS)}")
            ebm = make_task(
                name,
                vocab_size=self.vocab_size,
                max_length=self.max_length,
                eos_id=self.eos_id,
                beta=self.beta,
                reference=self.reference,
                task_seed=self.task_seed,
            )
            return ebm, {"task": name, "task_seed": self.task_seed}
        if self.task or self.vocab_size or self.max_length or self.eos_id is not None:
            raise ValueError(
                "a --table has its own sequences: leave out --task, --vocab-size, --max-length "
                "and --eos-id"
            )
        table = read_table(self.table, self.alphabet, self.normalise, self.missing)
        reference = None if self.reference is None else Uniform(table.space)
        ebm = EBM(table.space, table.scores, self.beta, reference)
        return ebm, {"alphabet": list(table.alphabet), "separator": table.separator}


@dataclass(frozen=True)
class Train:
    """Flags of ``rl-ebm train``; those of the agent's options come on top."""

    out: Path | None = None
    """run directory to make; needed unless --resume"""
    agent: str = "soft-q"
    """what trains: a name that rl-ebm agents lists; its options are flags too"""
    steps: int | None = None
    """gradient steps at which the run ends"""
    seconds: float | None = None
    """trained seconds at which the run ends; 60 where neither limit is given"""
    resume: Path | None = None
    """run directory to go on with, exactly where its last checkpoint was"""
    overwrite: bool = False
    """delete a run that --out holds already"""
    seed: int = 0
    """of the initial weights and of everything that is drawn in training"""
    device: str | None = None
    """cpu or cuda; None for cuda where there is one"""
    policy: Literal["transformer", "tabular"] = "transformer"
    """a causal Transformer, or one logit row for each prefix"""
    compile: bool = False
    """put the network through torch.compile"""
    log_every: int = 20
    """steps between two rows of metrics"""
    eval_every: float = 5.0
    """seconds between two exact verifications, at least; never more than a tenth of the time"""
    checkpoint_every: float = 5.0
    """seconds between two checkpoints"""
    target: Target = field(default_factory=Target)
    network: TransformerConfig = field(default_factory=TransformerConfig)


@dataclass(frozen=True)
class Verify:
    """Flags of ``rl-ebm verify``."""

    run: tyro.conf.Positional[Path]
    """run directory"""
    max_kl: float | None = None
    """exit code 1 when KL(target, policy) is larger, in nats"""
    memory: int = 2**28
    """bytes that one evaluation of the policy may take, about"""
    device: str | None = None
    """cpu or cuda; None for cuda where there is one"""


@dataclass(frozen=True)
class Solve:
    """Flags of ``rl-ebm solve``."""

    json: bool = False
    """print JSON"""
    top: int = 10
    """how many of the most probable sequences to list"""
    device: str | None = None
    """cpu or cuda; None for cuda where there is one"""
    target: Target = field(default_factory=Target)


@dataclass(frozen=True)
class Sample:
    """Flags of ``rl-ebm sample``."""

    run: tyro.conf.Positional[Path]
    """run directory"""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 10
    """how many responses"""
    seed: int = 0
    """of the draws"""
    device: str | None = None
    """cpu or cuda; None for cuda where there is one"""


@dataclass(frozen=True)
class Agents:
    """``rl-ebm agents`` has no flags."""


def run_train(args: Sequence[str]) -> int:
    """Train an agent, or go on with a run."""
    if flags.value_of("--resume", args) is not None:
        return _run_resume(args)
    name = flags.value_of("--agent", args) or "soft-q"
    if name not in AGENTS:
        raise ValueError(f"there is no agent {name!r}{nearest(name, AGENTS)}")
    kind = train_flags(name)
    a: Any = flags.parse(kind, args, "rl-ebm train", _ABOUT["train"])
    if a.out is None:
        raise ValueError("say where the run goes: --out FOLDER (or --resume RUN)")
    ebm, source = a.target.make()
    ebm = ebm.to(_device(a.device))
    limits = a.steps is not None or a.seconds is not None
    _, report = train(
        ebm,
        a.agent,
        a.out,
        options=a.options,
        network=a.network if a.policy == "transformer" else "tabular",
        config=TrainConfig(
            steps=a.steps,
            seconds=a.seconds if limits else 60.0,
            log_every=a.log_every,
            eval_every=a.eval_every,
            checkpoint_every=a.checkpoint_every,
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
    known = flags.flag_names(Train)
    extra = sorted((flags.given(args) - usable) & known)
    if extra:
        raise ValueError(
            f"{extra[0]} cannot be given with --resume: the run keeps its configuration (only "
            "--steps, --seconds and --device may change)"
        )
    a = flags.parse(Train, args, "rl-ebm train", _ABOUT["train"])
    assert a.resume is not None
    _, report, went_on = resume(
        a.resume, steps=a.steps, seconds=a.seconds, device=_device(a.device)
    )
    if not went_on:
        print(f"{a.resume} is finished: nothing to do (--steps N or --seconds S extends it)")
        return 0
    _say_trained(a.resume, report)
    return 0


def train_flags(agent: str) -> Any:
    """The flags of ``rl-ebm train`` for one agent: its options are flags too."""
    config = AGENTS[agent].config
    return make_dataclass(
        "TrainWithOptions",
        [("options", config, field(default_factory=config))],
        bases=(Train,),
        frozen=True,
    )


def run_verify(args: Sequence[str]) -> int:
    """Verify a run's policy exactly; print the report, and write report.json."""
    a = flags.parse(Verify, args, "rl-ebm verify", _ABOUT["verify"])
    policy, ebm = load(a.run, device=_device(a.device))
    report = verify(policy, solve(ebm), a.memory)
    write_text(a.run / REPORT, json.dumps(report.to_dict(), indent=1) + "\n")
    print(report)
    print(f"\nwritten: {a.run / REPORT}")
    if a.max_kl is not None and report.kl_target_policy > a.max_kl:
        print(f"KL(target, policy) is above --max-kl {a.max_kl:g}", file=sys.stderr)
        return 1
    return 0


def run_solve(args: Sequence[str]) -> int:
    """Solve an EBM exactly; print log Z, entropy and the most probable sequences."""
    a = flags.parse(Solve, args, "rl-ebm solve", _ABOUT["solve"])
    if a.top < 0:
        raise ValueError(f"--top must be >= 0, got {a.top}")
    ebm, source = a.target.make()
    ebm = ebm.to(_device(a.device))
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
        print(f"sequences         {part['num_sequences']:,}")
        print(f"log Z             {part['log_z']:.6f}")
        print(f"entropy           {part['entropy']:.6f} nats")
        print(f"expected reward   {part['expected_reward']:.6f}")
        print(f"{'probability':>13} {'score':>10}  sequence")
        for x in part["top"]:
            print(f"{x['probability']:13.6g} {x['score']:10.5g}  {x['sequence']}")
    return 0


def _mean(parts: list[dict[str, Any]]) -> dict[str, Any]:
    means = {k: fmean(p[k] for p in parts) for k in ("log_z", "entropy", "expected_reward")}
    return means | {"num_sequences": parts[0]["num_sequences"], "per_prompt": parts}


def run_sample(args: Sequence[str]) -> int:
    """Draw responses from a run's policy: one line each, with log pi and the reward."""
    a = flags.parse(Sample, args, "rl-ebm sample", _ABOUT["sample"])
    if a.n < 1:
        raise ValueError(f"-n must be >= 1, got {a.n}")
    device = _device(a.device)
    policy, ebm = load(a.run, device=device)
    source = read_config(a.run)["ebm"]
    generator = torch.Generator(device).manual_seed(a.seed)
    prompt_ids = torch.arange(a.n, device=device) % ebm.num_prompts
    model: Any = policy
    batch = ebm.score(sample(model, ebm.space, a.n, generator, prompt_ids))
    with torch.no_grad():
        log_pi = log_prob(model, ebm.space, batch.tokens, batch.lengths, prompt_ids)
    assert batch.reward is not None
    columns = ["sequence", "log_pi", "score"]
    print("\t".join(columns if ebm.prompts is None else ["prompt", *columns]))
    for row in range(a.n):
        tokens = batch.tokens[row, : int(batch.lengths[row])].tolist()
        cells = [
            decode(source, tokens), f"{float(log_pi[row]):.5f}", f"{float(batch.reward[row]):.6g}"
        ]  # fmt: skip
        if ebm.prompts is not None:
            cells.insert(0, " ".join(map(str, ebm.prompts[int(prompt_ids[row])])))
        print("\t".join(cells))
    return 0


def run_agents(args: Sequence[str]) -> int:
    """List the agents, with the paper of each."""
    flags.parse(Agents, args, "rl-ebm agents", _ABOUT["agents"])
    for name, entry in AGENTS.items():
        print(f"{name:16s} {entry.summary} ({entry.paper})")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": run_train,
    "verify": run_verify,
    "solve": run_solve,
    "sample": run_sample,
    "agents": run_agents,
}
_ABOUT = {name: (run.__doc__ or "").splitlines()[0] for name, run in COMMANDS.items()}


def help_text() -> str:
    """Every command with every flag, the options of each agent included."""
    lines = ["usage: rl-ebm COMMAND [flags]", ""]
    lines += [f"  {name:8s} {about}" for name, about in _ABOUT.items()]
    lines += ["", "rl-ebm COMMAND --help is one of the following alone.", ""]
    kinds = {"train": Train, "verify": Verify, "solve": Solve, "sample": Sample}
    for name, kind in kinds.items():
        lines.append(_help(kind, f"rl-ebm {name}"))
    for name, entry in AGENTS.items():
        lines.append(_help(entry.config, f"rl-ebm train --agent {name}"))
    return "\n".join(lines)


def _help(kind: Any, prog: str) -> str:
    text: str = tyro.extras.get_parser(
        kind, prog=prog, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    ).format_help()
    return text


def _device(name: str | None) -> torch.device:
    """The device of a flag.

    Raises:
        ValueError: neither cpu nor cuda, or no CUDA here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: there is no CUDA device here, or this build of torch has no CUDA; "
            "use --device cpu"
        )
    return torch.device(name)


def _say_trained(run: Path, report: rl_ebm.Report | None) -> None:
    if report is not None:
        print(
            f"KL(target, policy) {report.kl_target_policy:.6f} nats, KL(policy, target) "
            f"{report.kl_policy_target:.6f} nats, total variation {report.tv:.6f}"
        )
    print(f"run: {run}; next: rl-ebm verify {run}; tensorboard --logdir {run}")


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 1 (``verify --max-kl`` exceeded), 2 (wrong input)."""
    args = sys.argv[1:] if args is None else list(args)
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if args[0] == "--version":
        print(rl_ebm.__version__)
        return 0
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        return flags.fail(f"there is no command {command!r}{nearest(command, COMMANDS)}")
    try:
        return COMMANDS[command](rest)
    except SystemExit as stop:  # help was printed
        return int(stop.code or 0)
    except KeyboardInterrupt:
        flags.fail("stopped; a run goes on with rl-ebm train --resume RUN")
        return 130
    except OSError as error:
        return flags.fail(f"{error.strerror or error}: {error.filename or 'file system'}")
    except (ValueError, TypeError, torch.cuda.OutOfMemoryError) as error:
        return flags.fail(str(error))
