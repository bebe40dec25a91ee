"""The flags of every command, and what they make."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from rl_ebm.agents import entry_of
from rl_ebm.ebm import EBM
from rl_ebm.envs import TASKS, make_task
from rl_ebm.messages.words import nearest
from rl_ebm.policies import MLPConfig, TransformerConfig, parse_reference
from rl_ebm.rewards import parse_reward, read_table
from rl_ebm.tokens import TokenSpace

_TASKS = f"a named task: {' or'.join(', '.join(TASKS.names()).rsplit(',', 1))}; else random"


@dataclass(frozen=True)
class Target:
    """What is distilled or solved."""

    task: Annotated[str | None, tyro.conf.arg(help=_TASKS)] = None
    table: Path | None = None
    """a TSV or CSV file with the columns sequence and score"""
    reward: str | None = None
    """what an automaton pays, for example "2*contains:3 1 + avoids:7 7 + regex:(0|1)*"; needs
    --vocab-size and --max-length, which may be as large as you like"""
    alphabet: str | None = None
    """order of the table's tokens, ACGT for example; else the sorted set seen. With --reward the
    symbols of all tokens, in which phrases and patterns are written"""
    separator: str | None = None
    """what stands between two symbols of a table's sequences and of --alphabet, " " for words; then
    sequences may be of different lengths, each ended by an EOS of its own"""
    ragged: bool = False
    """the table's sequences may be of different lengths though there is no --separator"""
    normalise: Literal["minmax"] | None = None
    """minmax maps the table's scores to [0, 1] first"""
    missing: Literal["error", "forbid"] = "error"
    """what a sequence that the table lacks is: an error, or impossible (forbid)"""
    vocab_size: int | None = None
    """A, number of token ids, EOS included; None for the task's default"""
    max_length: int | None = None
    """T, length of the responses, at most; None for the task's default"""
    eos_id: int | None = None
    """token id that ends a response; None for responses of exactly T tokens"""
    beta: float = 1.0
    """temperature of the KL penalty, > 0, in reward units per nat"""
    reference: str | None = None
    """uniform over the allowed tokens of each state; ngram:FILE?order=2&smoothing=1 or
    hmm:FILE?states=8, fitted to the responses in a file, one a line; None for the counting
    measure"""
    task_seed: int = 0
    """seed of what the task draws"""

    def make(self) -> tuple[EBM, dict[str, Any]]:
        """The EBM, and where it is from (for the run's configuration)."""
        if self.reward is not None:
            return self._automaton()
        if self.table is None:
            if self.alphabet or self.normalise or self.missing != "error":
                raise ValueError("--alphabet, --normalise and --missing need a --table")
            if self.separator is not None or self.ragged:
                raise ValueError("--separator and --ragged need a --table")
            name = self.task or "random"
            if name not in TASKS:
                unknown = f"there is no task {name!r}{nearest(name, TASKS)}"
                raise ValueError(TASKS.fault(name) or unknown)
            ebm = make_task(
                name,
                vocab_size=self.vocab_size,
                max_length=self.max_length,
                eos_id=self.eos_id,
                beta=self.beta,
                task_seed=self.task_seed,
            )
            if self.reference is not None:
                reference = parse_reference(self.reference, ebm.space)
                ebm = EBM(ebm.space, ebm.reward_model, self.beta, reference, ebm.prompts)
            return ebm, {"task": name, "task_seed": self.task_seed}
        if any(x is not None for x in (self.task, self.vocab_size, self.max_length, self.eos_id)):
            raise ValueError(
                "a --table has its own sequences: leave out --task, --vocab-size, --max-length "
                "and --eos-id"
            )
        table = read_table(
            self.table,
            self.alphabet,
            self.normalise,
            self.missing,
            self.separator,
            True if self.ragged else None,
        )
        given = None
        if self.reference is not None:
            given = parse_reference(self.reference, table.space, table.alphabet)
        ebm = EBM(table.space, table.scores, self.beta, given)
        return ebm, {"alphabet": list(table.alphabet), "separator": table.separator}

    def _automaton(self) -> tuple[EBM, dict[str, Any]]:
        if self.task or self.table or self.normalise or self.missing != "error" or self.ragged:
            raise ValueError("--reward is a target of its own: leave out --task and --table")
        size, symbols = self.vocab_size, None
        if self.alphabet is not None:
            words = self.separator and self.alphabet.split(self.separator)
            symbols = words or list(self.alphabet)
        if size is None and symbols is not None:
            size = len(symbols)
        if size is None or self.max_length is None:
            raise ValueError("--reward needs --vocab-size (or --alphabet) and --max-length")
        if symbols is not None and len(set(symbols)) < len(symbols):
            raise ValueError(f"--alphabet {self.alphabet!r} has a symbol twice: each is one token")
        if symbols is not None and len(symbols) != size:
            raise ValueError(
                f"--alphabet has {len(symbols)} symbols, expected one for each of the {size} "
                "tokens (EOS included)"
            )
        assert self.reward is not None
        space = TokenSpace(size, self.max_length, self.eos_id)
        reward = parse_reward(self.reward, space, symbols)
        given = None
        if self.reference is not None:
            given = parse_reference(self.reference, space, symbols)
        source: dict[str, Any] = {}
        if symbols is not None:
            source = {"alphabet": symbols, "separator": self.separator or ""}
        return EBM(space, reward, self.beta, given), source


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
    """trained seconds at which the run ends; 60 where no limit is given"""
    responses: int | None = None
    """responses drawn at which the run ends"""
    resume: Path | None = None
    """run directory to go on with, exactly where its last checkpoint was"""
    overwrite: bool = False
    """delete a run that --out holds already"""
    seed: int = 0
    """of the initial weights and of everything that is drawn in training"""
    device: str | None = None
    """cpu or cuda; None for cuda where there is one"""
    policy: Literal["transformer", "mlp", "tabular"] = "transformer"
    """a causal Transformer; an MLP over the one-hot prefix, with --layers hidden layers of width
    --hidden, for cheap steps in small spaces; or one logit row for each prefix"""
    compile: bool = False
    """put the network through torch.compile"""
    log_every: int = 20
    """steps between two rows of metrics"""
    eval_every: float = 5.0
    """seconds between two exact verifications, at least; never more than a tenth of the time"""
    checkpoint_every: float = 5.0
    """seconds between two checkpoints, at least; longer where saving a large network would take
    more than a tenth of the time"""
    samples: int | None = None
    """responses of target and policy each that a verification on the way draws where prefixes are
    too many to be listed; None for 100, fewer of long ones"""
    target: Target = field(default_factory=Target)
    network: TransformerConfig = field(default_factory=TransformerConfig)


@dataclass(frozen=True)
class Verify:
    """Flags of ``rl-ebm verify``."""

    run: tyro.conf.Positional[Path]
    """run directory"""
    max_kl: float | None = None
    """exit code 1 when KL(target, policy), or the upper end of its interval, is larger, in nats; an
    asymptotic interval is no proof, and an end that is open is above everything"""
    memory: int = 2**28
    """bytes that one evaluation of the policy may take, about"""
    samples: int | None = None
    """verify along so many responses of target and policy each; None for every prefix where they
    can be listed, else for 1,000. Where there is no exact solution: responses of the policy, of
    which None takes 10,000"""
    confidence: float = 0.95
    """of the intervals around what is sampled"""
    reward_max: float | None = None
    """a number that no reward exceeds: an upper bound on log Z, and so on KL(policy, target), where
    there is no exact solution"""
    per_prompt: bool = False
    """keep the figures of each prompt in report.json, also of more than 100 prompts"""
    seed: int = 0
    """of the samples"""
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
class Audit:
    """Flags of ``rl-ebm audit``."""

    framework: str | None = None
    """trl, verl, torchrl or openrlhf: audit the losses that its installed release ships, by its own
    code, in the place of ours; all: of those that are installed"""
    only: tuple[str, ...] = ()
    """with --framework: those losses alone in whose name and options all of these are found, for
    example GRPOTrainer loss_type=dapo; all of TRL's together take half an hour"""
    json: bool = False
    """print JSON"""
    device: str | None = None
    """cpu or cuda; None for cuda where there is one"""
    target: Target = field(default_factory=Target)


@dataclass(frozen=True)
class Diagnose:
    """Flags of ``rl-ebm diagnose``."""

    run: tyro.conf.Positional[Path]
    """run directory"""
    seconds: float = 60.0
    """time for the fit that measures what the network can reach"""
    json: bool = False
    """print JSON"""


@dataclass(frozen=True)
class Bench:
    """Flags of ``rl-ebm bench``."""

    out: Path
    """folder of the runs, results.csv and report.md; what it holds already is not run again"""
    agents: str = "soft-q,path-consistency,trajectory-balance,vargrad,policy-gradient,grpo,dpg"
    """names that rl-ebm agents lists, separated by commas"""
    tasks: str = "random,zipf,peaked,pairwise,planted,lookahead,sparse,star"
    """named tasks, or paths of tables (scaled to [0, 1]), separated by commas; potts and phrases
    are beyond enumeration"""
    seeds: int = 3
    """runs of each agent on each task"""
    calls: int = 1_000_000
    """responses that each run may score"""
    seconds: float | None = None
    """trained seconds after which a run ends though calls are left"""
    beta: float = 1.0
    """temperature of all tasks, in reward units per nat; the reference is uniform where a task has
    none of its own"""
    task_seed: int = 0
    """seed of what the tasks draw"""
    options: Path | None = None
    """JSON file, {agent: {option: value}}: options that are not the defaults"""
    workers: int = 2
    """runs at a time, each with one thread"""
    samples: int = 1000
    """responses of target and policy each by which a task beyond enumeration (potts, phrases) is
    verified, with an interval around each figure; the others are verified exactly"""
    network: TransformerConfig = field(default_factory=TransformerConfig)


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


def train_flags(agent: str) -> Any:
    """The flags of ``rl-ebm train`` for one agent: its options are flags too."""
    config = entry_of(agent).config
    return make_dataclass(
        "TrainWithOptions",
        [("options", config, field(default_factory=config))],
        bases=(Train,),
        frozen=True,
    )


def device_of_flag(name: str | None) -> torch.device:
    """The device of ``--device``.

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


def generator_of_flag(seed: int, device: torch.device) -> torch.Generator:
    """The generator of ``--seed``.

    Raises:
        ValueError: no seed.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be in [0, 2**63), got {seed}")
    return torch.Generator(device).manual_seed(seed)


NOT_OF_MLP = ("--dim", "--heads")
"""sizes of a Transformer that an MLP does not have"""


def network_of_flags(
    policy: str, sizes: TransformerConfig, given: set[str]
) -> TransformerConfig | MLPConfig | str:
    """What makes the policy; of an MLP the flags give the hidden layers and their width.

    Raises:
        ValueError: a size that it does not have.
    """
    wrong = [flag for flag in NOT_OF_MLP if flag in given]
    if policy == "mlp" and wrong:
        raise ValueError(f"{wrong[0]} is no size of --policy mlp, which has --layers and --hidden")
    if policy == "mlp":
        return MLPConfig(sizes.layers, sizes.hidden)
    return sizes if policy == "transformer" else policy
