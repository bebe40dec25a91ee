"""Train an agent on an EBM, from Python: one call makes a run, another goes on with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_ebm.agents import entry_of
from rl_ebm.backbone import TransformerConfig
from rl_ebm.ebm import EBM
from rl_ebm.exact import Solution, TooLargeError, find_machines, solve
from rl_ebm.files import CONFIG, STATE, RunError, own_files
from rl_ebm.lock import only_one
from rl_ebm.policies import Policy, Trainable, Transformer
from rl_ebm.report_sampled import AnyReport
from rl_ebm.rewards import Reward, Table
from rl_ebm.runs import (
    OWN,
    agent_of_run,
    check_asked,
    damage_told,
    describe_ebm,
    make_policy,
    own_policy,
    read_config,
    rebuild_ebm,
    write_config,
)
from rl_ebm.training import TrainConfig, Trainer

SOLVED_UNASKED = 2**20
"""a reward that is a function is evaluated on at most so many sequences without being asked"""


def train(
    ebm: EBM,
    agent: str = "soft-q",
    out: str | Path | None = None,
    *,
    options: Any = None,
    policy: torch.nn.Module | None = None,
    network: TransformerConfig | str = "transformer",
    steps: int | None = None,
    seconds: float | int | None = None,
    seed: int = 0,
    config: TrainConfig | None = None,
    overwrite: bool = False,
    source: dict[str, Any] | None = None,
    compile: bool = False,
    progress: bool | None = None,
) -> tuple[Trainable, AnyReport | None]:
    """Distil an EBM into a new policy, or into one that is passed in.

    Args:
        ebm: the target.
        agent: a name of :data:`rl_ebm.agents.AGENTS`.
        out: the run directory; None writes no files.
        options: the agent's config, for example ``SoftQConfig(lr=1e-3)``; None for its default.
        policy: a policy to start from, trained in place; None for a new one. A run with one
            asks for it again: load(run, policy=...), resume(run, policy=...).
        network: of a new policy: sizes of the Transformer, or "transformer", or "tabular".
        steps: gradient steps, at most; 60 seconds where neither is given.
        seconds: trained seconds, at most.
        seed: of the initial weights and of everything that is drawn.
        config: how often to log, verify and checkpoint; ``steps`` and ``seconds`` go first.
        overwrite: whether a run that is in ``out`` already may be deleted.
        source: where ``ebm`` is from, see :func:`rl_ebm.runs.describe_ebm`.
        compile: use torch.compile on the network's passes.
        progress: show a bar; None where standard error is a terminal.

    Returns:
        The trained policy, and its exact report (None where the EBM is too large to solve).

    Raises:
        ValueError: an unknown agent, or an option out of range.
        RunError: ``out`` holds a run already, or the run had to stop.
    """
    run = None if out is None else Path(out)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    entry = entry_of(agent)
    options = entry.config() if options is None else options
    if not isinstance(options, entry.config):
        raise ValueError(
            f"options for {agent} must be a {entry.config.__name__}, got {type(options).__name__}"
        )
    if steps is None and seconds is None and config is None:
        seconds = 60.0
    if config is None:
        config = TrainConfig(steps=steps, seconds=seconds)
    elif steps is not None or seconds is not None:
        config = replace(config, steps=steps, seconds=seconds)
    policy_config: dict[str, Any] = (
        {"kind": "transformer"} | asdict(network)
        if isinstance(network, TransformerConfig)
        else {"kind": network}
    )
    if network == "transformer":
        policy_config |= asdict(TransformerConfig())
    if policy is not None:
        policy_config = dict(OWN)
    description = {
        "ebm": describe_ebm(ebm, source),
        "policy": policy_config,
        "agent": {
            "name": agent,
            "logits_are_values": entry.agent.logits_are_values,
            "options": asdict(options),
        },
        "train": {"seed": seed, "compile": compile, **asdict(config)},
    }
    with ExitStack() as held:
        if run is not None:
            check_free(run, overwrite)
            if existed := run.exists():
                held.enter_context(only_one(run))
        trainer = _trainer(ebm, description, run, progress, policy)
        if run is not None:
            # Only now: what cannot begin deletes nothing, and makes no folder.
            if not existed:
                run.mkdir(parents=True, exist_ok=True)
                held.enter_context(only_one(run))
            check_free(run, overwrite)  # another process may have been faster
            clear(run)
            write_config(run, description, ebm)
        report = trainer.train()
    return trainer.agent.policy, report


def resume(
    out: str | Path,
    *,
    steps: int | None = None,
    seconds: float | int | None = None,
    reward: Tensor | Callable[..., Any] | Reward | None = None,
    reference: Policy | None = None,
    device: torch.device | str = "cpu",
    progress: bool | None = None,
    policy: torch.nn.Module | None = None,
) -> tuple[Trainable, AnyReport | None, bool]:
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
    run = Path(out)
    description = read_config(run)
    with only_one(run):
        extended = steps is not None or seconds is not None
        with damage_told(run / CONFIG):
            check_asked(description, policy, run, "resume")
            ebm = rebuild_ebm(description["ebm"], run, reward, reference).to(device)
            if extended:
                description["train"] |= {"steps": steps, "seconds": seconds}
            trainer = _trainer(ebm, description, run, progress, policy)
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
    seed, compiled = train.pop("seed"), train.pop("compile")
    values = entry.agent.logits_are_values
    trained: Trainable = (
        make_policy(description["policy"], ebm, seed, values)
        if policy is None
        else own_policy(policy, ebm, values)
    )
    solution = solution_for_training(ebm, entry.needs_teacher, progress)
    config = TrainConfig(**train)
    if compiled and isinstance(trained, Transformer):
        trained.compiled = True
    generator = torch.Generator(ebm.device).manual_seed(seed)
    agent = entry.agent(ebm, trained, options, generator, solution)
    return Trainer(ebm, agent, generator, config, solution, run, description, progress)


def solution_for_training(ebm: EBM, needed: bool, progress: bool | None = None) -> Solution | None:
    """The exact solution where an agent needs it, or where it is cheap; else None."""
    cheap = isinstance(ebm.reward_model, Table) or ebm.space.num_sequences <= SOLVED_UNASKED
    cheap = cheap or find_machines(ebm) is not None
    if not needed and not cheap:
        return None
    try:
        return solve(ebm, progress=progress)
    except TooLargeError:
        if needed:
            raise
        return None


def check_free(run: Path, overwrite: bool) -> None:
    """Check that a run may be made here: nothing there, or a run that may be deleted.

    Raises:
        RunError: a run is there, or files that one would overwrite.
    """
    if run.exists() and not run.is_dir():
        raise RunError(f"{run} is a file: give a folder for the run")
    files = own_files(run)
    if any(run / name in files for name in (CONFIG, STATE)):
        if not overwrite:
            raise RunError(
                f"{run} holds a run already: go on with it (--resume {run}), delete it "
                "(--overwrite), or choose another folder"
            )
    elif files:
        raise RunError(f"{files[0]} is of no run, and would be lost: choose another folder")


def clear(run: Path) -> None:
    """Delete the files of a run, and no others."""
    for path in own_files(run):
        path.unlink()
