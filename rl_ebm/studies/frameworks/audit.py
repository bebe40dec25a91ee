"""Every row of a framework through :func:`rl_ebm.audit_loss`, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from rl_ebm.exact import Solution
from rl_ebm.studies import audit as ours
from rl_ebm.studies.frameworks import (
    openrlhf_models,
    torchrl_llm,
    trl_distillation,
    trl_dpo,
    trl_grpo,
    trl_kto,
    trl_online_dpo,
    trl_pairs,
    verl_distillation,
    verl_ppo,
)
from rl_ebm.studies.frameworks.rows import Case, FrameworkError, Row, Rows, quiet, version_of
from rl_ebm.studies.frameworks.same import Seen
from rl_ebm.studies.losses.audit import audit_loss
from rl_ebm.studies.losses.contract import LossError
from rl_ebm.studies.losses.responses import responses_of
from rl_ebm.studies.problems import problems

FRAMEWORKS: dict[str, tuple[Rows, ...]] = {
    "trl": (
        trl_grpo.rows, trl_dpo.rows, trl_pairs.rows, trl_kto.rows, trl_online_dpo.rows,
        trl_distillation.rows,
    ),
    "verl": (verl_ppo.rows, verl_distillation.rows),
    "torchrl": (torchrl_llm.rows,),
    "openrlhf": (openrlhf_models.rows,),
}  # fmt: skip
"""package to what makes its rows"""
UNKNOWN: dict[str, Any] = {
    "degenerate": None, "is_target": None, **dict.fromkeys(ours.MEASURES), "other_roots": [],
    "depends_on_sampler": None, "accuracy": None,
}  # fmt: skip
KEYS = (
    "degenerate", "is_target", *ours.MEASURES, "how", "other_roots", "depends_on_sampler",
    "accuracy",
)  # fmt: skip


def audit_framework(
    name: str, solution: Solution, only: Callable[[Row], bool] | None = None
) -> list[dict[str, Any]]:
    """The limit of every loss that an installed framework ships, with its options.

    Its KL coefficient is the EBM's beta; groups and batches are large.

    Args:
        name: one of :data:`FRAMEWORKS`.
        only: whether a row is asked for; None for all.

    Returns:
        a dict for each: ``framework``, ``version``, ``name`` (qualified, of what was called),
        ``options``, ``default`` (they are what the framework ships, beta apart), the keys of
        :func:`rl_ebm.audit`, ``accuracy`` (total variation that the limit may be off by), and,
        where the limit is not the EBM, ``instead``: ``name`` and ``options`` of another row, and
        the ``sentence`` that says what to set.

    Raises:
        ValueError: another name; a framework that is not installed, too old, or changed inside.
    """
    return list(audited(name, solution, only))


def audited(
    name: str, solution: Solution, only: Callable[[Row], bool] | None = None
) -> Iterator[dict[str, Any]]:
    """What :func:`audit_framework` returns, row by row: some take many minutes."""
    if name not in FRAMEWORKS:
        raise ValueError(_unknown(name, FRAMEWORKS))
    version = version_of(name)
    case = case_of(solution)
    with quiet():
        rows = [row for make in FRAMEWORKS[name] for row in make(case) if only is None or only(row)]
    seen = Seen(tuple(responses_of(problem) for problem in problems(solution)))
    # On a terminal: a row may take many minutes.
    for row in tqdm(rows, desc=name, unit="row", disable=None):
        with quiet():
            line = _line(name, version, row, solution, seen)
        yield line


def audit_named(
    name: str | None, solution: Solution, words: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], list[str]]:
    """:func:`audit_framework`, or of "all" that are installed: and a sentence for each that is not.

    Args:
        words: what a row's name and options ("loss_type=dapo") have in them, whatever the case.

    Raises:
        ValueError: as there; none of all is installed; no row has these words, or no framework is
            named for them.
    """
    if name is None:
        raise ValueError(f"only picks losses of a framework: name it, {', '.join(FRAMEWORKS)}")
    if name != "all" and name not in FRAMEWORKS:
        raise ValueError(_unknown(name, [*FRAMEWORKS, "all"]))
    lines, missing, asked = [], [], _Having(tuple(word.lower() for word in words))
    for framework in FRAMEWORKS if name == "all" else [name]:
        try:
            lines += audit_framework(framework, solution, asked)
        except FrameworkError as error:
            if name != "all":
                raise
            missing.append(str(error))
    if not lines and asked.names:
        raise ValueError(
            f"only finds none of {name}'s losses that has {' and '.join(map(repr, words))} in its "
            f"name and options; their names are {', '.join(sorted(asked.names))}"
        )
    if not lines:
        raise FrameworkError("; ".join(missing))
    return lines, missing


@dataclass(frozen=True)
class _Having:
    """Whether a row has all of these words; and the names of those that were looked at."""

    words: tuple[str, ...]
    names: set[str] = field(default_factory=set)

    def __call__(self, row: Row) -> bool:
        self.names.add(_short(row.name))
        said = " ".join([row.name, *(f"{k}={v}" for k, v in row.options.items())]).lower()
        return all(word in said for word in self.words)


def _unknown(name: str, known: Iterable[str]) -> str:
    return f"framework must be one of {', '.join(known)}, got {name!r}"


def case_of(solution: Solution) -> Case:
    """What the rows depend on."""
    ebm, space = solution.ebm, solution.space
    return Case(ebm.beta, space.max_length, space.eos_id is None, ebm.num_prompts)


def _line(framework: str, version: str, row: Row, solution: Solution, seen: Seen) -> dict[str, Any]:
    head = {"framework": framework, "version": version, "name": row.name, "objective": row.name}
    found = UNKNOWN | {"how": row.unknown} if row.unknown is not None else seen.find(row)
    if found is None:
        found = _limit(framework, version, row, solution)
        seen.keep(row, found)
    line = head | {"options": row.options, "default": row.default} | found
    elsewhere = line["is_target"] is False or line["tv"] is None
    if row.instead is not None and elsewhere:
        advice = row.instead
        line["instead"] = {
            "name": advice.name, "options": advice.options, "sentence": advice.sentence,
        }  # fmt: skip
    return line


def _limit(framework: str, version: str, row: Row, solution: Solution) -> dict[str, Any]:
    """The keys of our own audit.

    Raises:
        FrameworkError: its code asks for something that it was not given.
    """
    try:
        found = audit_loss(
            row.loss,
            solution,
            row.kind,
            advantages=row.advantages,
            sampler=row.sampler,
            pairs=row.pairs,
            beyond=False,
        )
    except LossError as error:
        if isinstance(error.__cause__, AttributeError | KeyError | TypeError):
            raise FrameworkError(
                f"{framework} {version} is not the release that this adapter knows: {row.name} was "
                f"expected to run on what it is given here, and gives {error.__cause__!r}"
            ) from error
        return UNKNOWN | {"how": f"{error}"}
    known = vars(found)
    return {key: known[key] for key in KEYS}


def _short(name: str) -> str:
    """The class or module, and what is called of it."""
    return ".".join(name.split(".")[-2:])


def to_text(lines: list[dict[str, Any]], reference: bool = True) -> str:
    """A table for people: a head for each framework, and below it what to set instead.

    Args:
        reference: as of :func:`rl_ebm.studies.audit.to_text`.
    """
    parts = []
    for name in dict.fromkeys(x["framework"] for x in lines):
        own = [x for x in lines if x["framework"] == name]
        shown = [
            x | {"objective": _short(x["name"])}
            | {"options": {k: f"{k}={v}" for k, v in x["options"].items()}}
            for x in own
        ]  # fmt: skip
        parts.append(f"{name} {own[0]['version']}\n{ours.to_text(shown, reference)}")
        advice = dict.fromkeys(x["instead"]["sentence"] for x in own if "instead" in x)
        parts += [f"to end at the EBM: {sentence}" for sentence in advice]
    return "\n\n".join(parts)
