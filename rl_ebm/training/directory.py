"""Run directories: what a run was trained on, and how to rebuild it without running code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from rl_ebm.agents import AgentEntry, entry_of_run, make_options
from rl_ebm.ebm import EBM
from rl_ebm.files import (
    CERTIFICATE,
    CONFIG,
    METRICS,
    POLICY,
    REPORT,
    SCORES,
    STATE,
    RunError,
    another_policy,
    cut,
    marks,
    own_events,
    own_files,
    parts,
    write_text,
)
from rl_ebm.files.tensors import holds, load_tensors, save_tensors
from rl_ebm.packages.version import VERSION
from rl_ebm.policies import MLP, Policy, Tabular, Trainable, Transformer
from rl_ebm.rewards import Reward
from rl_ebm.tokens import TokenSpace
from rl_ebm.training import kinds
from rl_ebm.training.checkpoint import outline
from rl_ebm.training.run_config import read_config
from rl_ebm.training.run_policy import check_asked, make_policy, own_policy

__all__ = [
    "CERTIFICATE", "CONFIG", "METRICS", "POLICY", "REPORT", "SCORES", "STATE", "RunError",
    "cut_back", "damage_told", "decode", "describe_ebm", "load", "load_weights", "read_config",
    "rebuild_ebm", "write_config",
]  # fmt: skip

Own = TypeVar("Own", bound=torch.nn.Module)


def cut_back(run: Path, events: Mapping[str, int]) -> None:
    """Delete or cut what was written after a checkpoint.

    An event file of another run stays: its name has another mark than those of the checkpoint.

    Args:
        events: sizes of the event files at the checkpoint.

    Raises:
        RunError: one of the run's files is no regular file; nothing has been touched.
    """
    own_files(run)
    remove_parts(run)
    for path in own_events(run):
        if path.name in events:
            cut(path, events[path.name])
        elif marks([path.name]) <= marks(events):
            path.unlink()


def forget(run: Path) -> None:
    """Delete what was said of a policy that goes on learning."""
    for name in (REPORT, CERTIFICATE):
        (run / name).unlink(missing_ok=True)


def keep_weights(run: Path) -> None:
    """Put weights aside that have no checkpoint, before a run begins again in their place."""
    if not (run / POLICY).exists():
        return
    names = (f"{POLICY}.before" + (f".{i}" if i else "") for i in count())
    kept = next(run / name for name in names if not os.path.lexists(run / name))
    os.replace(run / POLICY, kept)
    told = f"{run / STATE} is missing, so the run begins again at step 0; the weights that it had"
    print(f"{told} are kept in {kept}", file=sys.stderr)


def remove_parts(run: Path) -> None:
    """Delete what writes that were cut short have left."""
    for part in parts(run):
        part.unlink()


def describe_ebm(ebm: EBM, source: dict[str, Any] | None = None) -> dict[str, Any]:
    """What rebuilds an EBM, as JSON; its table or automata, where it has them, go beside it.

    Args:
        ebm: the EBM.
        source: ``task`` and ``task_seed`` of the named task that it is; or ``alphabet`` and
            ``separator`` of its table file, for printing.
    """
    source = source or {}
    reward, reference = kinds.describe("reward", ebm.reward_model)[0], None
    if "task" in source:
        reward = {"task": source["task"], "task_seed": source["task_seed"]}
    if ebm.reference is not None:
        reference = kinds.describe("reference", ebm.reference)[0]
    return {
        "space": asdict(ebm.space),
        "beta": ebm.beta,
        "prompts": ebm.prompts,
        "reward": reward,
        "reference": reference,
        "alphabet": source.get("alphabet"),
        "separator": source.get("separator", " "),
    }


def decode(config: dict[str, Any], tokens: Sequence[int]) -> str:
    """Tokens as the run's table file writes them; ids where there is none."""
    alphabet = config.get("alphabet")
    if alphabet is None:
        symbols = [str(token) for token in tokens]
    else:
        # The EOS of a table has no symbol.
        symbols = [alphabet[token] for token in tokens if alphabet[token]]
    return str(config.get("separator", " ")).join(symbols)


def rebuild_ebm(
    config: dict[str, Any],
    run: Path,
    reward: Tensor | Callable[..., Any] | Reward | None = None,
    reference: Policy | None = None,
) -> EBM:
    """The EBM that :func:`describe_ebm` described.

    Raises:
        RunError: it needs a reward or a reference that only Python can give.
    """
    space, prompts = TokenSpace(**config["space"]), config["prompts"]
    made: dict[str, Any] = {"reference": reference, "reward": reward}
    for role, given in made.items():
        said = config[role]
        if said is not None and not _is_given(role, said, given, run):
            with scores_told(run) if kinds.has_tensors(role, said) else nullcontext():
                stored = load_tensors(run / SCORES) if kinds.has_tensors(role, said) else {}
                made[role] = kinds.rebuild(role, said, stored, space, prompts)
    return EBM(space, made["reward"], config["beta"], made["reference"], prompts)


_GIVEN = {"reward": "on a Python reward", "reference": "with a reference policy of your own"}


def _is_given(role: str, said: Any, given: object, run: Path) -> bool:
    """Whether a reward or reference is what was passed; RunError where it had to be."""
    try:
        known = kinds.find(role, said) is not None
    except RunError as error:
        if given is None:
            raise RunError(f"{error}, or pass it again, load(run, {role}=...)") from None
        return True
    if not known and given is None:
        raise RunError(f"{run} was trained {_GIVEN[role]}: pass it again, load(run, {role}=...)")
    return not known


def write_config(run: Path, config: dict[str, Any], ebm: EBM) -> None:
    """Make a run directory: tables first, so that a directory with a config is a run."""
    run.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for role, thing in (("reward", ebm.reward_model), ("reference", ebm.reference)):
        said, own = kinds.describe(role, thing)
        if config["ebm"][role] == said:  # and no task, nor given again
            tensors |= own
    if tensors and not holds(run / SCORES, tensors):
        save_tensors(run / SCORES, tensors)
    write_text(run / CONFIG, json.dumps({"version": VERSION} | config, indent=1) + "\n")


def agent_of_run(config: dict[str, Any]) -> tuple[AgentEntry, Any]:
    """The agent of a run, and its options.

    Raises:
        RunError: an agent that this process does not know, or options that it does not have.
    """
    agent = config["agent"]
    if not isinstance(agent, dict) or "name" not in agent or "options" not in agent:
        raise RunError(f"{CONFIG} names no agent and options: it is damaged")
    try:
        entry = entry_of_run(agent["name"])
        return entry, make_options(agent["name"], entry, agent["options"])
    except ValueError as error:
        raise RunError(str(error)) from None


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Errors of a shape that no written configuration causes, as a sentence about the file."""
    try:
        yield
    except RunError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise RunError(f"{path} is damaged ({error!r})") from None


@contextmanager
def scores_told(run: Path) -> Iterator[None]:
    """Errors of a table or automaton that cannot have been written, as a sentence."""
    path = run / SCORES
    try:
        yield
    except RunError:
        raise
    except KeyError as error:
        raise RunError(f"{path} is damaged: it holds no {error}") from None
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise RunError(f"{path} is damaged: {error}") from None


@overload
def load(
    run: str | Path,
    reward: Tensor | Callable[..., Any] | Reward | None = None,
    reference: Policy | None = None,
    device: torch.device | str = "cpu",
    policy: None = None,
) -> tuple[Tabular | Transformer | MLP, EBM]: ...
@overload
def load(
    run: str | Path,
    reward: Tensor | Callable[..., Any] | Reward | None = None,
    reference: Policy | None = None,
    device: torch.device | str = "cpu",
    *,
    policy: Own,
) -> tuple[Own, EBM]: ...
def load(
    run: str | Path,
    reward: Tensor | Callable[..., Any] | Reward | None = None,
    reference: Policy | None = None,
    device: torch.device | str = "cpu",
    policy: torch.nn.Module | None = None,
) -> tuple[Any, EBM]:
    """The policy and the EBM that a run directory holds, rebuilt; runs no code from it.

    Args:
        run: the directory.
        reward: the reward, where the run was trained on a Python function.
        reference: the reference, where it was a policy of yours.
        device: where to put both.
        policy: one made like the policy that was passed to train, where one was; it gets the
            run's weights, on its own device.

    Raises:
        RunError: no run, a damaged one, or something that has to be given.
    """
    if not isinstance(run, (str, Path)):
        raise TypeError(f"run must be the path of a run directory, got {type(run).__name__}")
    run = Path(run)
    config = read_config(run)
    own_files(run)
    with damage_told(run / CONFIG):
        ebm = rebuild_ebm(config["ebm"], run, reward, reference).to(device)
        values = bool(config["agent"]["logits_are_values"])
        check_asked(config, policy, run, "load")
        loaded: Trainable = (
            make_policy(config["policy"], ebm, seed=0, values=values)
            if policy is None
            else own_policy(policy, ebm, values)
        )
    shapes = {name: tuple(x.shape) for name, x in loaded.state_dict().items()}
    load_weights(loaded, load_tensors(run / POLICY, shapes), run / POLICY)
    return loaded, ebm


def load_weights(policy: Trainable, weights: dict[str, Tensor], source: Path) -> None:
    """Put weights into a policy.

    Raises:
        RunError: they are those of another policy, or not numbers.
    """
    for name, value in policy.state_dict().items():
        given = weights.get(name)
        if given is None or not value.is_floating_point():
            continue
        if not given.is_floating_point():
            raise RunError(f"{source} is damaged: {name} is {given.dtype}, and weights are floats")
        if bool((given.isnan() | torch.isposinf(given)).any()):
            raise RunError(f"{source} is damaged: {name} has weights that are NaN or infinite")
    try:
        policy.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError, ValueError):
        raise RunError(another_policy(source)) from None


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
    """Delete the files of a run, and no others: event files are those that its checkpoint knows."""
    own = own_files(run)
    try:
        known = marks(outline(run / STATE)["event_sizes"])
    except (RunError, OSError, KeyError, TypeError):  # none, or a damaged one: it knows nothing
        known = set[str]()
    for path in own:
        of = marks([path.name])
        if not of or of <= known:
            path.unlink()
