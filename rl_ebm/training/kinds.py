"""What a run's folder stores, and how it is made again: one table of kinds, an entry for each.

A **kind** describes a thing by parts, JSON values and tensors by name, and makes it again from
them. The values go into ``config.json``, the tensors into ``task.safetensors``; of a policy the
weights are stored anyway, and its parts are what makes it, untrained. A folder holds the names of
kinds and their parts, and never the name of code: what is made is what this process has registered
under the name. Of what has no kind the folder says so, and whoever loads it passes it again.

Another package's kind is one call of :func:`register`, before a run of it is made or loaded::

    register("reward", "length", Length, lambda r: {"per_token": r.per_token},
             lambda parts, space, prompts: Length(parts["per_token"]))

One of the library's is an entry below, with an example that the tests try.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rl_ebm.automata import from_tensors, to_tensors
from rl_ebm.files import RunError
from rl_ebm.messages.arguments import shown, whole
from rl_ebm.networks.backbone import TransformerConfig
from rl_ebm.packages.plugins import call_installed
from rl_ebm.policies import (
    MLP,
    AutomatonPolicy,
    MLPConfig,
    Tabular,
    Transformer,
    Uniform,
    fit_ngram,
)
from rl_ebm.rewards import Automaton, Table
from rl_ebm.tasks.named import find_task
from rl_ebm.tokens import Batch, TokenSpace
from rl_ebm.tokens.prompts import check_prompts

Parts = Mapping[str, Any]
"""JSON values and tensors, by name"""
GivenPrompts = list[list[int]] | None
Rebuild = Callable[[Parts, TokenSpace, GivenPrompts], Any]
Example = Callable[[TokenSpace, GivenPrompts], Any]


@dataclass(frozen=True)
class Kind:
    """How things of one class are stored and made again.

    Attributes:
        name: what a folder calls it.
        of: the class; of a reward, that of what ``bind`` returns.
        describe: the parts of a thing.
        rebuild: ``(parts, space, prompts)`` to the thing.
        example: ``(space, prompts)`` to one for them, with parts that are not those by default:
            the tests check it, and store it and make it again. Every kind of the library has one.
        tensors: whether it has tensors; a registered kind's folder names those that it has.
        derived: whether classes derived from it are of the kind too.
        bare: whether its tensors stand under their own names, as those of the first runs did, and
            not behind the role's.
        registered: whether the folder writes its parts in a place of their own, as of every kind
            but the first ones.
    """

    name: str
    of: type[Any]
    describe: Callable[[Any], Parts]
    rebuild: Rebuild
    example: Example | None = None
    tensors: bool = False
    derived: bool = False
    bare: bool = False
    registered: bool = True


def _first(
    name: str,
    of: type[Any],
    describe: Callable[[Any], Parts],
    rebuild: Rebuild,
    example: Example | None = None,
    **options: bool,
) -> Kind:
    """A kind of the first runs, whose parts stand beside its name."""
    return replace(Kind(name, of, describe, rebuild, example, **options), registered=False)


def _task(parts: Parts, space: TokenSpace, prompts: GivenPrompts) -> Any:
    try:
        task = find_task(parts["task"])
    except ValueError as error:
        raise RunError(f"the run's task is of no package that is installed here: {error}") from None
    if prompts != (None if task.prompts is None else check_prompts(task.prompts)):
        raise ValueError(f"the run's prompts are not those of the task {shown(task.name)}")
    return task.reward(space, whole("task_seed", parts["task_seed"], 0))


def _table(parts: Parts, space: TokenSpace, prompts: GivenPrompts) -> Table:
    scores = parts["scores"]
    if scores.shape != (len([[]] if prompts is None else prompts), space.num_sequences):
        raise ValueError(f"its scores, {tuple(scores.shape)}, are not one a response")
    if not scores.is_floating_point():
        raise ValueError(f"its scores are {scores.dtype}, and scores are floats")
    return Table(scores).bind(space, prompts)


def _automaton(parts: Parts, space: TokenSpace, prompts: GivenPrompts) -> Automaton:
    return Automaton(space, from_tensors(parts, "")).bind(space, prompts)


def _reference(parts: Parts, space: TokenSpace, prompts: GivenPrompts) -> AutomatonPolicy:
    machine = from_tensors(parts, "")
    return AutomatonPolicy(space, machine, prompts if machine.num_prompts > 1 else None)


def _transformer(parts: Parts, space: TokenSpace, prompts: GivenPrompts) -> Transformer:
    return Transformer(space, *_sizes(TransformerConfig, parts, prompts))


def _mlp(parts: Parts, space: TokenSpace, prompts: GivenPrompts) -> MLP:
    return MLP(space, *_sizes(MLPConfig, parts, prompts))


def _sizes(config: Callable[..., Any], parts: Parts, prompts: GivenPrompts) -> tuple[Any, ...]:
    """Of a network: V of the first runs, which do not say, has no head of its own."""
    sizes = {name: part for name, part in parts.items() if name != HEAD}
    return config(**sizes), prompts, False, bool(parts.get(HEAD, False))


def _network(thing: Transformer | MLP) -> Parts:
    return asdict(thing.config) | ({} if thing.value_head is None else {HEAD: True})


def _nothing(thing: Any) -> Parts:
    return {}


def _machine(thing: Any) -> Parts:
    return to_tensors(thing.machine, "")


def _some_scores(space: TokenSpace, prompts: GivenPrompts) -> Table:
    shape = len(prompts or [[]]), space.num_sequences
    return Table(torch.arange(math.prod(shape)).double().sin().reshape(shape))


def _some_bigram(space: TokenSpace, prompts: GivenPrompts) -> AutomatonPolicy:
    tokens, lengths = (x[:7] for x in space.sequences())
    ids = torch.arange(len(tokens)) % len(prompts or [[]])
    return fit_ngram(space, Batch(tokens, lengths, ids), 2, 1.0, prompts)


def _some_transformer(space: TokenSpace, prompts: GivenPrompts) -> Transformer:
    return Transformer(space, TransformerConfig(layers=1, heads=2, dim=8, hidden=8), prompts)


HEAD = "value_head"
"""the part of a network that says whether V has weights of its own"""
TASK = "task"
"""the kind of the rewards of named tasks, which a folder holds by name and seed"""
_REWARDS = (
    _first(
        "table", Table, lambda x: {"scores": x.scores}, _table, _some_scores,
        tensors=True, bare=True,
    ),
    _first(
        "automaton", Automaton, _machine, _automaton,
        lambda space, prompts: Automaton.counts(space, [0], 1.5), tensors=True,
    ),
    _first(TASK, type(None), _nothing, _task),
)  # fmt: skip
_REFERENCES = (
    _first(
        "uniform", Uniform, _nothing, lambda parts, space, prompts: Uniform(space),
        lambda space, prompts: Uniform(space), derived=True,
    ),
    _first(
        "automaton", AutomatonPolicy, _machine, _reference, _some_bigram,
        tensors=True, derived=True,
    ),
)  # fmt: skip
_POLICIES = (
    _first(
        "transformer", Transformer, _network, _transformer, _some_transformer
    ),
    _first(
        "tabular", Tabular, _nothing, lambda parts, space, prompts: Tabular(space, prompts),
        lambda space, prompts: Tabular(space, prompts, scale=1.0),
    ),
    Kind(
        "mlp", MLP, _network, _mlp,
        lambda space, prompts: MLP(space, MLPConfig(layers=1, hidden=8), prompts),
    ),
)  # fmt: skip
KINDS: dict[str, dict[str, Kind]] = {
    role: {kind.name: kind for kind in kinds}
    for role, kinds in (
        ("reward", _REWARDS),
        ("reference", _REFERENCES),
        ("policy", _POLICIES),
    )
}
"""by role and name, all that is known"""
GROUP = "rl_ebm.kinds"
"""entry points of installed packages: the name of a kind, and a function that registers it"""
GIVEN = {"reward": "function", "reference": "custom", "policy": "custom"}
"""the name that stands for a thing without a kind, which is passed again"""


def register(
    role: str,
    name: str,
    of: type[Any],
    describe: Callable[[Any], Parts],
    rebuild: Rebuild,
) -> None:
    """Let run folders hold things of a class, and ``load``, ``resume`` and ``verify`` make them.

    Args:
        role: "reward", "reference" or "policy".
        name: what folders call it; unchanged, once there are runs.
        of: the class, none derived from it; of a reward, that of what its ``bind`` returns.
        describe: the parts that make a thing: names to JSON values, or to tensors (of a policy,
            whose weights are stored anyway, JSON values alone).
        rebuild: ``(parts, space, prompts)`` to the thing; of a policy an untrained one.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a role that there is not, or a name or class that is taken.
    """
    if role not in KINDS:
        raise ValueError(f"role must be one of {', '.join(KINDS)}, got {shown(role)}")
    if not (isinstance(name, str) and name.isprintable() and name.strip()):
        raise TypeError(f"name must be printable text, got {shown(name)}")
    if not isinstance(of, type) or not callable(describe) or not callable(rebuild):
        raise TypeError("of must be a class, and describe and rebuild functions")
    if name in (GIVEN[role], *KINDS[role]):
        raise ValueError(f"there is a kind of {role} called {shown(name)} already")
    if of in [kind.of for kind in KINDS[role].values()]:
        raise ValueError(f"{of.__name__} has a kind of {role} already")
    KINDS[role][name] = Kind(name, of, describe, rebuild)


def kind_of(role: str, thing: object) -> Kind | None:
    """The kind of a thing; None for one that has to be passed again."""
    for kind in KINDS[role].values():
        if type(thing) is kind.of or (kind.derived and isinstance(thing, kind.of)):
            return kind
    return None


def describe(role: str, thing: object) -> tuple[Any, dict[str, Tensor]]:
    """What ``config.json`` says of a thing, and its tensors by the names that they are stored by.

    Raises:
        ValueError: parts of a registered kind that no folder can hold.
    """
    kind = kind_of(role, thing)
    if kind is None:
        return GIVEN[role], {}
    parts = kind.describe(thing)
    tensors = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
    named = {name if kind.bare else f"{role}.{name}": part for name, part in tensors.items()}
    if not kind.registered:
        return kind.name, named
    data = {name: part for name, part in parts.items() if name not in tensors}
    try:
        same = json.loads(json.dumps(data, allow_nan=False)) == data
    except (TypeError, ValueError):
        same = False
    if not same or (role == "policy" and tensors):
        raise ValueError(
            f"the {role} of the kind {kind.name!r} has parts that a run cannot hold: they must be "
            "JSON values as json.loads gives them" + ("" if role == "policy" else ", or tensors")
        )
    return said_of(kind.name, data, tensors), named


def said_of(name: str, data: Parts, tensors: Iterable[str] = ()) -> dict[str, Any]:
    """What ``config.json`` says of a thing of a registered kind: its values, its tensors' names."""
    return {"kind": name, "data": dict(data), "tensors": sorted(tensors)}


def find(role: str, said: Any) -> Kind | None:
    """The kind that ``config.json`` says; None for what has to be passed again.

    Raises:
        RunError: a registered kind that this process does not know.
    """
    if isinstance(said, dict) and "kind" not in said:
        return KINDS[role][TASK]
    name = said["kind"] if isinstance(said, dict) else said
    if name in KINDS[role]:
        return KINDS[role][name]
    if name == GIVEN[role]:
        return None
    fault = call_installed(GROUP, str(name))
    if fault is None and name in KINDS[role]:
        return KINDS[role][name]
    raise RunError(
        fault
        or f"the run's {role} is of the kind {shown(name)}, which this process does not know: "
        "import the package that registers it (rl_ebm.training.kinds.register)"
    )


def rebuild(
    role: str, said: Any, stored: Mapping[str, Tensor], space: TokenSpace, prompts: GivenPrompts
) -> Any:
    """The thing that :func:`describe` described.

    Args:
        said: what ``config.json`` says of it.
        stored: all tensors of the folder.

    Raises:
        RunError: a kind that this process does not know.
        KeyError: a tensor is missing.
    """
    kind = find(role, said)
    assert kind is not None, "what has no kind is passed again"
    parts: dict[str, Any] = {}
    if kind.registered:
        parts = dict(said.get("data", {}))
        parts |= {name: stored[f"{role}.{name}"] for name in said.get("tensors", [])}
    else:
        if isinstance(said, dict):
            parts = {name: part for name, part in said.items() if name != "kind"}
        front = "" if kind.bare else f"{role}."
        parts |= {n.removeprefix(front): x for n, x in stored.items() if n.startswith(front)}
    return kind.rebuild(parts, space, prompts)


def name_said(said: Any) -> str:
    """What ``config.json`` calls a thing: its task's name, or that of its kind."""
    if isinstance(said, dict):
        return str(said.get("task", said.get("kind")))
    return str(said)


def has_tensors(role: str, said: Any) -> bool:
    """Whether the folder has tensors of a thing."""
    kind = find(role, said)
    if kind is None:
        return False
    return bool(said.get("tensors")) if kind.registered else kind.tensors
