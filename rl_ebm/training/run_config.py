"""config.json of a run: what is in it is of the kind that was written, or it is refused."""

from __future__ import annotations

import errno
import json
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rl_ebm.agents import AGENTS
from rl_ebm.files import CONFIG, RunError, read_text
from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.training.kinds import GIVEN, HEAD, KINDS, TASK

Number = float | int
_SPACE = {"vocab_size": int, "max_length": int, "eos_id": int | None}
_EBM = {
    "space": dict[str, Any],
    "beta": Number,
    "prompts": list[list[int]] | None,
    "reward": str | dict[str, Any],
    "reference": str | dict[str, Any] | None,
}
_TASK = {"task": str, "task_seed": int}
_REGISTERED = {"kind": str, "data": dict[str, Any], "tensors": list[str]}
_PRINTED = {"alphabet": list[str] | None, "separator": str}
_AGENT = {"name": str, "logits_are_values": bool, "options": dict[str, Any]}
_TRAIN = {"seed": int, "compile": bool}


def read_config(run: Path) -> dict[str, Any]:
    """The configuration of a run.

    Raises:
        RunError: no run there, or a damaged one.
    """
    path = run / CONFIG
    try:
        config: Any = json.loads(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{run} holds no run: there is no {CONFIG} in it") from None
    except RunError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise RunError(
                f"no run has a path of {len(str(run)):,} characters: it is too long"
            ) from None
        raise RunError(f"{path} is damaged ({error})") from None
    parts = ("ebm", "policy", "agent", "train")
    if not isinstance(config, dict) or any(part not in config for part in parts):
        raise RunError(f"{path} is not the configuration of an rl-ebm run")
    try:
        _check_config(config)
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from None
    return config


def _check_config(config: dict[str, Any]) -> None:
    ebm, policy, agent = config["ebm"], config["policy"], config["agent"]
    _check(ebm, _EBM, "ebm")
    _check(ebm["space"], _SPACE, "ebm.space")
    _check(ebm, _PRINTED, "ebm", all_needed=False)
    for role in ("reward", "reference"):
        _check_kind(role, ebm[role])
    alphabet = ebm.get("alphabet")
    if alphabet is not None and len(alphabet) != ebm["space"]["vocab_size"]:
        raise ValueError("ebm.alphabet has not one symbol for each token")
    _check(policy, {"kind": str}, "policy")
    _check(policy, _REGISTERED, "policy", all_needed="data" in policy)
    if "data" not in policy and policy["kind"] not in _plain("policy"):
        raise ValueError(f"policy.kind is {json.dumps(policy['kind'])[:40]}")
    if policy["kind"] == "transformer":
        _check(policy, _hints(TransformerConfig) | {HEAD: bool}, "policy", all_needed=False)
    _check(agent, _AGENT, "agent")
    if agent["name"] in AGENTS:  # another one may be registered elsewhere
        hints = _hints(AGENTS[agent["name"]].config)
        _check(agent["options"], hints, "agent.options", all_needed=False)
    _check(config["train"], _TRAIN, "train")
    if not 0 <= config["train"]["seed"] < 2**63:
        raise ValueError("train.seed is no integer in [0, 2**63)")


def _plain(role: str) -> set[str]:
    """The kinds that a configuration gives by their name alone."""
    return {GIVEN[role], *(name for name, kind in KINDS[role].items() if not kind.registered)}


def _check_kind(role: str, said: Any) -> None:
    if isinstance(said, dict):
        registered = role == "reference" or "kind" in said
        _check(said, _REGISTERED if registered else _TASK, f"ebm.{role}")
    elif said not in _plain(role) - {TASK} and (said is not None or role == "reward"):
        raise ValueError(f"ebm.{role} is {said!r:.40}")


def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def _check(part: Any, kinds: Mapping[str, Any], name: str, all_needed: bool = True) -> None:
    if not isinstance(part, dict):
        raise ValueError(f"{name} is no object")
    for key, kind in kinds.items():
        if key in part:
            if not fits(part[key], kind):
                raise ValueError(f"{name}.{key} is {json.dumps(part[key])[:40]}")
        elif all_needed:
            raise ValueError(f"{name}.{key} is missing")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON can have been a value of a type before it was written."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, x) for x in inner)
    if origin is Literal:
        return any(type(value) is type(x) and value == x for x in inner)
    if origin in (list, tuple):
        kinds = [x for x in inner if x is not Ellipsis]
        if not isinstance(value, (list, tuple)):
            return False
        if origin is tuple and len(kinds) == len(inner):
            return len(value) == len(kinds) and all(map(fits, value, kinds))
        return all(fits(x, kinds[0]) for x in value) if kinds else True
    if origin is dict or kind is dict or is_dataclass(kind):
        return isinstance(value, dict)
    if kind is float:
        return type(value) in (int, float)
    if kind in (int, bool, str):
        return type(value) is kind
    return value is None if kind in (None, type(None)) else True
