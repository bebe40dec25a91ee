"""Named tasks: EBMs that need nothing but a name, a size and a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from rl_ebm.ebm import EBM, check_ebm
from rl_ebm.messages.arguments import Int, Number, shown, whole
from rl_ebm.packages.plugins import Registry
from rl_ebm.policies import Policy, Uniform
from rl_ebm.rewards.base import Prompts, Reward
from rl_ebm.tasks import chains, planted
from rl_ebm.tasks import drawn as scores
from rl_ebm.tokens import TokenSpace


@dataclass(frozen=True)
class Task:
    """How a named EBM is made."""

    name: str
    description: str
    """one line"""
    vocab_size: int
    """A where none is asked for"""
    max_length: int
    """T where none is asked for"""
    reward: Callable[[TokenSpace, int], Tensor | Reward | Callable[..., Tensor]]
    """(space, task_seed) to a reward"""
    prompts: Prompts | None = None
    eos_id: int | None = None
    """the id that ends a response where none is asked for"""
    reference: Callable[[TokenSpace, int], Policy] | None = None
    """(space, task_seed) to p_ref where none is asked for; None for the counting measure"""


class Pairwise:
    """R(y) = 2 / sqrt(P) * sum over i < j of J_ij[y_i, y_j], with P = T (T - 1) / 2 pairs.

    No score depends on a prefix alone, and the sum of standard-normal couplings keeps the
    standard deviation 2 at any length.

    Args:
        couplings: J, one (A, A) matrix for each pair, pairs (i, j) in lexicographic order.
        space: fixed-length responses of at least two tokens.
    """

    forbids = False
    called = False

    def __init__(self, couplings: Float64[Tensor, "pairs A A"], space: TokenSpace) -> None:
        pairs = list(combinations(range(space.max_length), 2))
        self.couplings = couplings
        self.space = space
        self.first, self.second = torch.tensor(pairs, device=couplings.device).unbind(1)

    def __call__(
        self,
        tokens: Int64[Tensor, "B T"],
        lengths: Int64[Tensor, "B"],
        prompt_ids: Int64[Tensor, "B"],
    ) -> Float64[Tensor, "B"]:
        """Rewards of complete responses, on the couplings' device."""
        pair = torch.arange(len(self.couplings), device=self.couplings.device)
        tokens = tokens.long()  # uint8 as an index is a mask
        terms = self.couplings[pair, tokens[:, self.first], tokens[:, self.second]]
        return 2 / math.sqrt(len(pair)) * terms.sum(1)

    def bind(self, space: TokenSpace, prompts: Prompts | None) -> Pairwise:
        if space != self.space:
            raise ValueError(f"the reward was made for {self.space}, the EBM has {space}")
        return self

    def to(self, device: torch.device | str) -> Pairwise:
        return Pairwise(self.couplings.to(device), self.space)


def pairwise(space: TokenSpace, task_seed: int) -> Pairwise:
    """:class:`Pairwise` with standard-normal couplings, drawn pair after pair.

    Raises:
        ValueError: EOS mode, or responses of one token.
    """
    if space.eos_id is not None:
        raise ValueError("task 'pairwise' has responses of fixed length: leave out eos_id")
    if space.max_length < 2:
        raise ValueError(f"task 'pairwise' needs max_length >= 2, got {space.max_length}")
    pairs = math.comb(space.max_length, 2)
    rng = np.random.default_rng(task_seed + 1)
    couplings = rng.standard_normal((pairs, space.vocab_size, space.vocab_size))
    return Pairwise(torch.from_numpy(couplings), space)


BUILT_IN = (
    Task(
        "random",
        "a random score for each sequence: nothing to generalise, everything to verify",
        vocab_size=8,
        max_length=4,
        reward=scores.normal,
    ),
    Task(
        "pairwise",
        "random couplings between all pairs of positions: long-range, of any length",
        vocab_size=4,
        max_length=8,
        reward=pairwise,
    ),
    Task(
        "prompts",
        "a random score for each of three prompts and each sequence: a conditional EBM",
        vocab_size=4,
        max_length=4,
        reward=scores.normal_of_prompts,
        prompts=scores.PROMPTS,
    ),
    Task(
        "zipf",
        "the law of arXiv 2512.15605, Figs. 2 to 4: Zipf in enumeration order, smooth",
        vocab_size=8,
        max_length=4,
        reward=scores.zipf,
    ),
    Task(
        "peaked",
        "the law of its Fig. 5, softmax(N(0, I) / 0.1): a few sequences hold it all",
        vocab_size=8,
        max_length=4,
        reward=scores.peaked,
    ),
    Task(
        "planted",
        "bit sequences near one of eight planted modes: who finds one may miss the others",
        vocab_size=2,
        max_length=12,
        reward=planted.planted_modes,
    ),
    Task(
        "lookahead",
        "the first token decides what the last may be: V differs at the root alone",
        vocab_size=8,
        max_length=4,
        reward=planted.lookahead,
    ),
    Task(
        "sparse",
        "one sequence in ten thousand pays, the others nothing: exploration",
        vocab_size=10,
        max_length=4,
        reward=planted.sparse,
    ),
    Task(
        "star",
        "a path on a star graph to the goal in the prompt: the first step decides",
        vocab_size=12,
        max_length=3,
        reward=planted.star,
        prompts=planted.STAR_PROMPTS,
    ),
    Task(
        "potts",
        "couplings of neighbours, 8e28 responses: beyond enumeration, exact as an automaton",
        vocab_size=64,
        max_length=16,
        reward=chains.potts,
    ),
    Task(
        "phrases",
        "one phrase wanted and one not, over bigrams that were fitted: 1e55 responses, exact",
        vocab_size=256,
        max_length=24,
        reward=chains.phrases,
        eos_id=0,
        reference=chains.fitted,
    ),
)


def register(task: Any) -> Task:
    """Make a task known by its name: to :func:`make_task`, the environments, bench and flags.

    In this process alone. An installed package does it for every process, the command line's too,
    by an entry point ``name = "module:TASK"`` in the group ``rl_ebm.tasks``: that is a
    :class:`Task` of that name, or a function of no arguments that returns one.

    Args:
        task: a :class:`Task`. Its name is lower case, words joined by "-". A run keeps the name and
            the seed alone: the same ``reward(space, task_seed)`` must be made of them again.

    Raises:
        ValueError: a name that is taken, or no name.
        TypeError: no task.
    """
    found = _checked(task)
    return TASKS.add(found.name, found, ", or del rl_ebm.tasks.TASKS[name] first")


def _checked(task: Any) -> Task:
    """Raise what is wrong with a task, as :func:`register` says."""
    if not isinstance(task, Task) or not callable(task.reward):
        raise TypeError(
            f"a task is an rl_ebm.tasks.Task whose reward is a function, got {shown(task)}"
        )
    name: Any = task.name
    if not isinstance(name, str) or not name or set(name) & set(" _,\t\n") or name != name.lower():
        raise ValueError(f"a task's name is lower case, its words joined by '-', got {shown(name)}")
    return task


def _read(name: str, found: Any) -> Task:
    """The task that an entry point refers to; raises as :func:`register` does."""
    task = _checked(found() if callable(found) else found)
    if task.name != name:
        raise ValueError(f"the task's own name is {task.name!r}, and must be the entry point's")
    return task


TASKS: Registry[Task] = Registry("task", "rl_ebm.tasks", _read)
"""the named tasks"""
TASKS.update((task.name, task) for task in BUILT_IN)


def make_task(
    name: str | Task,
    *,
    vocab_size: Int | None = None,
    max_length: Int | None = None,
    eos_id: Int | None = None,
    beta: Number = 1.0,
    reference: Policy | str | None = None,
    task_seed: Int = 0,
) -> EBM:
    """The EBM of a named task, on the CPU.

    Args:
        name: one of :data:`TASKS`, or a task of your own.
        vocab_size: A; None for the task's own.
        max_length: T; None for the task's own.
        eos_id: the id that ends a response; None for the task's own, of most none: responses of
            exactly T tokens.
        beta: temperature, in reward units per nat.
        reference: p_ref: a policy, "uniform" (over the allowed tokens of each state), or None for
            the task's own, of most the counting measure.
        task_seed: of what the task draws.

    Raises:
        ValueError: an unknown name or reference, or a size that the task does not have.
    """
    task = find_task(name) if isinstance(name, str) else name
    if not isinstance(task, Task):
        raise TypeError(f"name must be a task or its name, got {shown(name)}")
    task_seed = whole("task_seed", task_seed, 0)
    space = TokenSpace(
        task.vocab_size if vocab_size is None else vocab_size,
        task.max_length if max_length is None else max_length,
        task.eos_id if eos_id is None else eos_id,
    )
    if reference is None and task.reference is not None:
        reference = task.reference(space, task_seed)
    if isinstance(reference, str):
        if reference != "uniform":
            raise ValueError(
                f"unknown reference {shown(reference)}: give 'uniform', a policy, or None for the "
                "counting measure"
            )
        reference = Uniform(space)
    return EBM(space, task.reward(space, task_seed), beta, reference, task.prompts)


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name in TASKS:
        return TASKS[name]
    nearest = get_close_matches(name[:80], TASKS, n=1, cutoff=0.0)[0]
    raise ValueError(
        TASKS.fault(name)
        or f"unknown task {shown(name)}: did you mean {nearest!r}? There are {', '.join(TASKS)}"
    )


def find_ebm(ebm: object, task: object, task_kwargs: Mapping[str, Any] | None) -> EBM:
    """The EBM of an environment's arguments.

    Raises:
        ValueError: not exactly one of ``ebm`` and ``task``, or ``task_kwargs`` without a task.
        TypeError: one of them is of another kind.
    """
    if not (task_kwargs is None or isinstance(task_kwargs, Mapping)):
        raise TypeError(f"task_kwargs must be a dict of arguments, got {shown(task_kwargs)}")
    if (ebm is None) == (task is None):
        raise ValueError("give exactly one of ebm=, an rl_ebm.EBM, and task=, a task or its name")
    if isinstance(task, str | Task):
        return make_task(task, **(task_kwargs or {}))
    if task is not None:
        raise TypeError(f"task must be a name or a Task, got {type(task).__name__}")
    found = check_ebm(ebm)
    if task_kwargs:
        raise ValueError("task_kwargs are arguments of a task: leave them out with ebm=")
    return found
