"""The agents by name: what is registered of each, and how a name and its options are looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from rl_ebm.agents.names import meant
from rl_ebm.agents.shared.learner import check_nats
from rl_ebm.agents.shared.off_policy import fixed_point as off_policy_fixed_point
from rl_ebm.fixed_points import FixedPoint, Problem, target
from rl_ebm.messages.arguments import shown
from rl_ebm.messages.words import nearest
from rl_ebm.packages.plugins import Registry
from rl_ebm.policies import Trainable
from rl_ebm.tokens import Batch

NOT_KNOWN = FixedPoint(None, degenerate=None, how="not known", sampler=None)
"""of an agent of which nobody has said where it ends"""


@runtime_checkable
class Agent(Protocol):
    """What the training loop needs of an agent.

    It may also say what it learned and who draws for it, :mod:`rl_ebm.agents.shared.account`.
    """

    policy: Trainable
    logits_are_values: bool
    learner: Any

    def sample(self) -> Batch | None: ...

    def update(self, batch: Any, progress: float = 0.0) -> dict[str, Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class AgentEntry(NamedTuple):
    """An agent: its class, its options, what it does, where it is from.

    ``fixed_point(config, problem)`` is what its expected gradient converges to, None where that
    is not known, and ``variants`` are the options by which it differs: ``rl-ebm audit`` lists them.
    """

    agent: Any
    config: Any
    summary: str
    paper: str
    needs_teacher: bool = False
    fixed_point: Callable[[Any, Problem], FixedPoint] | None = None
    variants: tuple[dict[str, Any], ...] = ({},)

    def limit(self, config: Any, problem: Problem) -> FixedPoint:
        """What the agent with these options converges to, without a law where it is not known.

        Raises:
            TypeError: the entry's function states something else than a FixedPoint.
        """
        if self.fixed_point is None:
            return NOT_KNOWN
        found: Any = self.fixed_point(config, problem)
        if not isinstance(found, FixedPoint):
            raise TypeError(
                f"fixed_point of {self.agent.__name__} must return a "
                f"rl_ebm.fixed_points.FixedPoint, got {type(found).__name__}"
            )
        return found

    def ends_at_target(self, config: Any) -> bool | None:
        """True where the EBM is stated as the limit whatever the rewards, -inf too; else None.

        Options may say it themselves, ``config.ends_at_target``.
        """
        if hasattr(config, "ends_at_target"):
            told: bool | None = config.ends_at_target
            return told
        if self.fixed_point is off_policy_fixed_point:
            return True if config.forbidden_log_weight is None else None
        return True if self.fixed_point is target else None


def register(
    name: str,
    agent: Any,
    config: Any,
    summary: str,
    paper: str,
    fixed_point: Callable[[Any, Problem], FixedPoint] | None = None,
    *,
    needs_teacher: bool = False,
    variants: Iterable[Mapping[str, Any]] = ({},),
) -> AgentEntry:
    """Make an agent known by a name: to ``train``, ``audit``, ``diagnose``, ``bench`` and flags.

    In this process alone. An installed package does it for every process, the command line's too,
    by an entry point ``name = "module:ENTRY"`` in the group ``rl_ebm.agents``: that is an
    :class:`AgentEntry`, or a function of no arguments that returns one, as a function that calls
    this one does.

    Args:
        name: lower case, words joined by "-".
        agent: its class, ``agent(ebm, policy, config, generator, teacher)``.
        config: the dataclass of its options, each with a default.
        summary: one line of what it does.
        paper: where it is from.
        fixed_point: ``(config, problem) -> FixedPoint``, what its expected gradient converges to;
            :func:`rl_ebm.fixed_points.target` states that it is the EBM. None, the honest default:
            not known.
        needs_teacher: whether it is given the exact solution; it then reads no rewards.
        variants: options by which the limit differs, a line of the audit for each.

    Raises:
        ValueError: a name that is taken, or no name; options without a default; a variant that the
            config refuses.
        TypeError: something that is no agent, config or function.
    """
    _check_name(name)
    entry = AgentEntry(agent, config, summary, paper, needs_teacher, fixed_point, _listed(variants))
    return AGENTS.add(name, _checked(name, entry), ", or del rl_ebm.agents.AGENTS[name] first")


def _read(name: str, found: Any) -> AgentEntry:
    """The entry that an entry point refers to; raises as :func:`register` does."""
    entry: Any = found() if callable(found) else found
    if not isinstance(entry, AgentEntry):
        raise TypeError(
            "an entry point of rl_ebm.agents refers to an AgentEntry, or to a function of no "
            f"arguments that returns one, got {shown(entry)}"
        )
    _check_name(name)
    return _checked(name, entry)


AGENTS: Registry[AgentEntry] = Registry("agent", "rl_ebm.agents", _read)
"""every agent by its name"""


def _check_name(name: object) -> None:
    """Raise ValueError unless something can be an agent's name."""
    if not isinstance(name, str) or not name or set(name) & set(" _,\t\n") or name != name.lower():
        raise ValueError(
            f"an agent's name is lower case, its words joined by '-', got {shown(name)}"
        )


def _checked(name: str, entry: AgentEntry) -> AgentEntry:
    """Raise what is wrong with an entry, as :func:`register` says."""
    agent, config, fixed_point = entry.agent, entry.config, entry.fixed_point
    missing = [m for m in _MEMBERS if not hasattr(agent, m)]
    if not isinstance(agent, type) or missing:
        lacks = f"{agent.__name__} has no {missing[0]}" if isinstance(agent, type) else shown(agent)
        raise TypeError(f"agent must be a class with {', '.join(_MEMBERS)}: {lacks}")
    if not isinstance(config, type) or not is_dataclass(config):
        raise TypeError(f"config must be a dataclass of the agent's options, got {shown(config)}")
    if fixed_point is not None and not callable(fixed_point):
        raise TypeError(
            "fixed_point must be a function (config, problem) -> FixedPoint, or None where the "
            f"limit is not known, got {shown(fixed_point)}"
        )
    for options in entry.variants:
        make_options(name, entry, options)
    return entry


def _listed(variants: object) -> tuple[dict[str, Any], ...]:
    """Raise TypeError unless these are the options of an agent's variants, a dict each."""
    try:
        return tuple(dict(v) for v in variants) or ({},)  # type: ignore[attr-defined]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            "variants must be a list of {option: value}, for example [{'lr': 0.1}], got "
            f"{shown(variants)}"
        ) from None


_MEMBERS = ("sample", "update", "state_dict", "load_state_dict", "logits_are_values")


def entry_of(name: object) -> AgentEntry:
    """What is registered under a name.

    Raises:
        ValueError: nothing; the sentence names what is meant.
    """
    if isinstance(name, str) and name in AGENTS:
        return AGENTS[name]
    unknown = AGENTS.fault(name) or f"there is no agent {shown(name)}{meant(name, AGENTS)}"
    raise ValueError(unknown)


def entry_of_run(name: object) -> AgentEntry:
    """The same of a name that a run's configuration has.

    Raises:
        ValueError: this process does not know it.
    """
    if isinstance(name, str) and name in AGENTS:
        return AGENTS[name]
    raise ValueError(
        AGENTS.fault(name)
        or f"the run's agent {shown(name)} is unknown{meant(name, AGENTS)} (an agent of your own "
        "is registered first, rl_ebm.agents.register)"
    )


STAND_IN = "forbidden_log_weight"


def make_options(name: str, entry: AgentEntry, options: Any) -> Any:
    """The config of an agent, from options by name.

    Raises:
        ValueError: an option that it does not have, or a value that is none.
    """
    if not isinstance(entry, AgentEntry):
        raise TypeError(f"entry must be one of rl_ebm.agents.AGENTS, got {shown(entry)}")
    name = name if isinstance(name, str) else shown(name)
    if not isinstance(options, Mapping):
        raise ValueError(f"options of {name} are {{option: value}}, got {shown(options)}")
    known = [f.name for f in fields(entry.config) if f.init]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no such option: {option}{nearest(str(option), known)}")
    try:
        config = entry.config(**options)
        if options.get(STAND_IN) is not None:  # agents ask too, once there is something to train
            check_nats(STAND_IN, options[STAND_IN])
        return config
    except TypeError as error:
        raise ValueError(f"an option of {name} is of the wrong kind: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
