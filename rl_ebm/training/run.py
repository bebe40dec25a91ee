"""Train an agent on an EBM, from Python: one call makes a run, another goes on with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from rl_ebm.agents import entry_of
from rl_ebm.agents.shared.account import values_apart
from rl_ebm.agents.shared.trained import check_apart, check_weights
from rl_ebm.ebm import EBM, check_ebm
from rl_ebm.exact import Solution, TooLargeError, find_machines
from rl_ebm.exact import solve as solve_exactly
from rl_ebm.files import CONFIG
from rl_ebm.files.lock import only_one
from rl_ebm.messages.arguments import Number, Whole, flag, shown, whole
from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.policies import MLP, MLPConfig, Policy, Tabular, Trainable, Transformer
from rl_ebm.rewards import Reward
from rl_ebm.rewards.base import is_called, scores_of
from rl_ebm.training.config import TrainConfig, check_limits
from rl_ebm.training.defaults import options_of
from rl_ebm.training.directory import (
    agent_of_run,
    check_free,
    clear,
    damage_told,
    describe_ebm,
    read_config,
    rebuild_ebm,
    write_config,
)
from rl_ebm.training.loop import Trainer
from rl_ebm.training.run_policy import (
    check_asked,
    make_policy,
    network_config,
    own_policy,
    policy_config,
    with_parts,
)
from rl_ebm.verification.sampled_report import AnyReport

SOLVED_UNASKED = 2**20
"""sequences of an EBM without a table up to which it is solved without being asked"""
CALLED_UNASKED = 2**12
"""the same where the reward is a function or a network of the user's: each sequence is a call"""

AnyModule = TypeVar("AnyModule", bound=torch.nn.Module)


@overload
def train(
    ebm: EBM,
    agent: str = "soft-q",
    out: str | Path | None = None,
    *,
    options: Any = None,
    policy: AnyModule,
    network: TransformerConfig | MLPConfig | str = "transformer",
    steps: Whole | None = None,
    seconds: Number | None = None,
    seed: Whole = 0,
    config: TrainConfig | None = None,
    overwrite: bool = False,
    source: dict[str, Any] | None = None,
    compile: bool = False,
    progress: bool | None = None,
    solve: bool | None = None,
) -> tuple[AnyModule, AnyReport | None]: ...


@overload
def train(
    ebm: EBM,
    agent: str = "soft-q",
    out: str | Path | None = None,
    *,
    options: Any = None,
    policy: None = None,
    network: TransformerConfig | MLPConfig | str = "transformer",
    steps: Whole | None = None,
    seconds: Number | None = None,
    seed: Whole = 0,
    config: TrainConfig | None = None,
    overwrite: bool = False,
    source: dict[str, Any] | None = None,
    compile: bool = False,
    progress: bool | None = None,
    solve: bool | None = None,
) -> tuple[Tabular | Transformer | MLP, AnyReport | None]: ...


def train(
    ebm: EBM,
    agent: str = "soft-q",
    out: str | Path | None = None,
    *,
    options: Any = None,
    policy: torch.nn.Module | None = None,
    network: TransformerConfig | MLPConfig | str = "transformer",
    steps: Whole | None = None,
    seconds: Number | None = None,
    seed: Whole = 0,
    config: TrainConfig | None = None,
    overwrite: bool = False,
    source: dict[str, Any] | None = None,
    compile: bool = False,
    progress: bool | None = None,
    solve: bool | None = None,
) -> tuple[Any, AnyReport | None]:
    """Distil an EBM into a new policy, or into one that is passed in.

    Args:
        ebm: the target.
        agent: a name of :data:`rl_ebm.agents.AGENTS`.
        out: the run directory; None writes no files.
        options: the agent's config, for example ``SoftQConfig(lr=1e-3)``; None for its default. A
            pretrained model that is passed in gets a rate and a batch of its own by default
            (:func:`rl_ebm.training.defaults.default_options`), and they are printed.
        policy: a policy to start from, trained in place, with float32 or float64 weights that the
            reference has no part in; None for a new one. A run with one asks for it again:
            load(run, policy=...), resume(run, policy=...).
        network: of a new policy: sizes of a Transformer or an MLP, or the name of a kind that needs
            no parts: "transformer", "mlp", "tabular", or yours (:mod:`rl_ebm.training.kinds`).
        steps: gradient steps, at most; 60 seconds where there is no limit, in ``config`` neither.
        seconds: trained seconds, at most.
        seed: of the initial weights and of everything that is drawn.
        config: how often to log, verify and checkpoint; ``steps`` and ``seconds`` go first.
        overwrite: whether a run that is in ``out`` already may be deleted.
        source: where ``ebm`` is from, see :func:`rl_ebm.training.directory.describe_ebm`.
        compile: use torch.compile on the network's passes, of the library's own Transformer.
        progress: show a bar; None where standard error is a terminal.
        solve: whether to solve the EBM first, for exact metrics on the way and the report. None:
            tables and automata wherever they fit, a reward that is a function or a network only
            up to 4,096 sequences, since each is a call of it (counted as ``solution_calls``, apart
            from the ``reward_calls`` of the training).

    Returns:
        The trained policy, and its exact report (None where the EBM was not solved).

    Raises:
        TypeError: an argument of another kind.
        ValueError: an unknown agent, an option out of range, or a policy that cannot be trained.
        RunError: ``out`` holds a run already, or the run had to stop.
    """
    check_ebm(ebm)
    _check_kinds(out, config, source, policy)
    flags = _check_flags(overwrite=overwrite, compile=compile, progress=progress, solve=solve)
    description = _description(
        ebm, agent, options, policy, network, _ends(config, steps, seconds), source, seed, **flags
    )
    return _begin(ebm, description, out, overwrite, progress, policy)


def _check_flags(**flags: bool | None) -> dict[str, Any]:
    """Raise unless these arguments of :func:`train` say yes or no; those that a run keeps."""
    for name in ("overwrite", "compile"):
        flag(name, flags[name])
    for name in ("progress", "solve"):
        flag(name, flags[name], unset=True)
    return {"compile": flags["compile"], "solve": flags["solve"]}


def _description(
    ebm: EBM,
    agent: str,
    options: Any,
    policy: torch.nn.Module | None,
    network: TransformerConfig | MLPConfig | str,
    config: TrainConfig,
    source: dict[str, Any] | None,
    seed: Whole,
    **kept: bool | None,
) -> dict[str, Any]:
    """The configuration of a new run, with every option that was left out."""
    seed = whole("seed", seed)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    entry = entry_of(agent)
    options = options_of(agent, options, policy)
    of_network = network_config(network, values_apart(options))
    return {
        "ebm": describe_ebm(ebm, source),
        "policy": of_network if policy is None else policy_config(policy),
        "agent": {
            "name": agent,
            "logits_are_values": entry.agent.logits_are_values,
            "options": asdict(options),
        },
        "train": {"seed": seed, **kept, **asdict(config)},
    }


def _begin(
    ebm: EBM,
    description: dict[str, Any],
    out: str | Path | None,
    overwrite: bool,
    progress: bool | None,
    policy: torch.nn.Module | None,
) -> tuple[Any, AnyReport | None]:
    """Train a new run to its end; its folder is made, or emptied, once nothing can be refused."""
    run = None if out is None else Path(out)
    with ExitStack() as held:
        if run is not None:
            check_free(run, overwrite)
            if existed := run.exists():
                check_held = held.enter_context(only_one(run))
        trainer = _trainer(ebm, description, run, progress, policy)
        description["policy"] = with_parts(description["policy"], trainer.agent.policy)
        if run is not None:
            # Only now: what cannot begin deletes nothing, and makes no folder.
            if not existed:
                run.mkdir(parents=True, exist_ok=True)
                check_held = held.enter_context(only_one(run))
            trainer.check_held = check_held
            check_free(run, overwrite)  # another process may have been faster
            clear(run)
            write_config(run, description, ebm)
        report = trainer.train()
    return trainer.agent.policy, report


def _check_kinds(out: object, config: object, source: object, policy: object) -> None:
    """Raise unless these arguments of :func:`train` are of the kinds that it takes."""
    if not (out is None or isinstance(out, (str, os.PathLike))):
        raise TypeError(f"out must be a path, or None for no files, got {shown(out)}")
    if not (config is None or isinstance(config, TrainConfig)):
        raise TypeError(f"config must be a TrainConfig, got {type(config).__name__}")
    if not (source is None or isinstance(source, dict)):
        raise TypeError(f"source must be a dict, or None, got {shown(source)}")
    if not (policy is None or isinstance(policy, torch.nn.Module)):
        raise ValueError(
            "policy must be a torch.nn.Module with logits(tokens, prompt_ids=None), got "
            f"{shown(policy)}"
        )


def _ends(config: TrainConfig | None, steps: Any, seconds: Any) -> TrainConfig:
    """The config with the ends that go first; 60 seconds where there is none at all."""
    if steps is None and seconds is None and (config is None or config.endless):
        seconds = 60.0
    limits = check_limits(steps, seconds)
    if config is None:
        return TrainConfig(**limits)
    return config if steps is None and seconds is None else replace(config, **limits)


@overload
def resume(
    out: str | Path,
    *,
    steps: Whole | None = None,
    seconds: Number | None = None,
    reward: Tensor | Callable[..., Any] | Reward | None = None,
    reference: Policy | None = None,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
    policy: AnyModule,
) -> tuple[AnyModule, AnyReport | None, bool]: ...


@overload
def resume(
    out: str | Path,
    *,
    steps: Whole | None = None,
    seconds: Number | None = None,
    reward: Tensor | Callable[..., Any] | Reward | None = None,
    reference: Policy | None = None,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
    policy: None = None,
) -> tuple[Tabular | Transformer | MLP, AnyReport | None, bool]: ...


def resume(
    out: str | Path,
    *,
    steps: Whole | None = None,
    seconds: Number | None = None,
    reward: Tensor | Callable[..., Any] | Reward | None = None,
    reference: Policy | None = None,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
    policy: torch.nn.Module | None = None,
) -> tuple[Any, AnyReport | None, bool]:
    """Go on with a run, exactly where its last checkpoint was.

    One process at a time trains into a folder: another gets a RunError.

    Args:
        out: the run directory.
        steps: a new limit of gradient steps; with neither, the run's own limits.
        seconds: a new limit of trained seconds.
        reward: the reward, where the run was trained on a Python function.
        reference: the reference, where it was a policy of yours.
        policy: one made like the policy that was passed to :func:`train`, where one was.

    Returns:
        The policy, the exact report, and whether there was anything left to do.

    Raises:
        RunError: no run there, a damaged one, or something that has to be given.
    """
    if not isinstance(out, (str, os.PathLike)):
        raise TypeError(f"out must be the path of a run, got {shown(out)}")
    run = Path(out)
    limits = check_limits(steps, seconds)
    description = read_config(run)
    with only_one(run) as check_held:
        extended = steps is not None or seconds is not None
        with damage_told(run / CONFIG):
            check_asked(description, policy, run, "resume")
            ebm = rebuild_ebm(description["ebm"], run, reward, reference).to(device)
            if extended:
                description["train"] |= limits | {"responses": None}
            trainer = _trainer(ebm, description, run, progress, policy)
        trainer.check_held = check_held
        trainer.resume()
        if trainer.finished and trainer.complete:
            trainer.restore_policy()
            return trainer.agent.policy, None, False
        if extended:
            write_config(run, {k: v for k, v in description.items() if k != "version"}, ebm)
        return trainer.agent.policy, trainer.train(), True


def _trainer(
    ebm: EBM,
    description: dict[str, Any],
    run: Path | None,
    progress: bool | None,
    policy: torch.nn.Module | None,
) -> Trainer:
    """Everything that a run needs, from its configuration."""
    train = dict(description["train"])
    entry, options = agent_of_run(description)
    seed, compiled, asked = train.pop("seed"), train.pop("compile"), train.pop("solve", None)
    values = entry.agent.logits_are_values
    trained: Trainable = (
        make_policy(description["policy"], ebm, seed, values)
        if policy is None
        else own_policy(policy, ebm, values)
    )
    check_weights(trained)
    check_apart(ebm, trained)
    config = TrainConfig(**train)
    if compiled and not isinstance(trained, Transformer):
        raise ValueError(
            "compile=True compiles the library's own Transformer, and the policy is a "
            f"{type(trained).__name__}: leave it out, or compile a model of your own before it is "
            "passed in (model.compile())"
        )
    if isinstance(trained, Transformer):
        trained.compiled = compiled or trained.compiled
    solution = solution_for_training(ebm, entry.needs_teacher, progress, asked)
    generator = torch.Generator(ebm.device).manual_seed(seed)
    agent = entry.agent(ebm, trained, options, generator, solution)
    return Trainer(ebm, agent, generator, config, solution, run, description, progress)


def solution_for_training(
    ebm: EBM, needed: bool, progress: bool | None = None, asked: bool | None = None
) -> Solution | None:
    """The exact solution where an agent needs it, it is asked for, or it is cheap; else None.

    Raises:
        TooLargeError: it is needed or asked for, and does not fit.
        ValueError: it is needed, and not wanted.
    """
    if needed and asked is False:
        raise ValueError("this agent learns from the exact solution: leave out solve=False")
    if asked is False or not (needed or asked or is_cheap(ebm)):
        return None
    try:
        return solve_exactly(ebm, progress=progress)
    except TooLargeError:
        if needed or asked:
            raise
        return None


def is_cheap(ebm: EBM) -> bool:
    """Whether an EBM is solved without being asked."""
    if scores_of(ebm.reward_model) is not None or find_machines(ebm) is not None:
        return True
    theirs = is_called(ebm.reward_model)
    count = ebm.num_prompts * ebm.space.num_sequences
    return count <= (CALLED_UNASKED if theirs else SOLVED_UNASKED)
