"""What a policy is, and what it may have besides: every member that the library asks for.

A **policy** is any object with :meth:`Policy.logits`. All else is optional, each member by itself,
and makes work faster or tells what is known: it must agree with ``logits``, which
:func:`rl_ebm.policies.check` tries. What there is stands in :class:`FullPolicy`, once, with its
shape and what it must equal; the functions below are the only readers of these members.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from rl_ebm.automata import Machine
from rl_ebm.messages.arguments import Int, ids_tensor, whole
from rl_ebm.networks.prefix_tree import PrefixTree
from rl_ebm.networks.values import ValueHead
from rl_ebm.tokens import TokenSpace


@runtime_checkable
class Policy(Protocol):
    """What every policy can do."""

    def logits(self, tokens: Tensor, prompt_ids: Tensor | None = None) -> Tensor:
        """Logits before every token, (B, T, A), neither normalised nor masked.

        Row t depends on ``tokens[:, :t]`` and the row's prompt alone: not on later tokens, other
        rows of the batch, or chance. Rows past an EOS are unspecified, never an error.

        Args:
            tokens: (B, T) int64 in [0, A), what is unread filled with a legal id.
            prompt_ids: (B,) int64; None where there is one prompt.
        """
        ...


@runtime_checkable
class Trainable(Policy, Protocol):
    """A policy with weights: any ``torch.nn.Module`` with ``logits``."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    @property
    def state_dict(self) -> Any: ...

    @property
    def load_state_dict(self) -> Any: ...


@runtime_checkable
class Steps(Protocol):
    """Decoding with a cache, one token for each row at a time: both methods, or neither."""

    def start(self, prompt_ids: Tensor) -> Any:
        """A state of (B,) rows that have read nothing; :meth:`step` may change it in place."""
        ...

    def step(self, state: Any, tokens: Tensor | None) -> Tensor:
        """Logits of the next position, (B, A), after one more token of each row, (B,) int64.

        None instead of tokens at the first call alone. They equal ``logits`` at that position, up
        to a constant of each row.
        """
        ...


class FullPolicy(Policy, Steps, Protocol):
    """A policy with all that one may have. None of it is needed, and each is used where it is."""

    space: TokenSpace
    """the only space that it is for; without it, any space that it is called with"""

    @property
    def prompts(self) -> Sequence[Sequence[int]] | None:
        """What ``prompt_ids`` count, equal to the EBM's; None or absent: it reads no prompts."""

    @property
    def device(self) -> torch.device | str:
        """Where it takes tokens and gives logits. Of a module its weights' goes first; else CPU."""
        ...

    @property
    def forbids(self) -> bool | None:
        """Whether some allowed action may have logit ``-inf``; None or absent: not known.

        False is a promise, by which masks are never asked for and no KL is taken for infinite.
        """

    @property
    def logits_are_values(self) -> bool:
        """Whether raw logits are q, not log pi + c(s) alone; absent: no. No trial can tell."""
        ...

    @property
    def value_head(self) -> ValueHead | None:
        """What makes q of its logits, with weights that are those of V alone; absent: None."""

    @property
    def crops(self) -> bool:
        """Whether ``logits`` also takes w < T columns, and gives the first w rows; absent: no."""
        ...

    def tree_logits(self, tree: PrefixTree, prompt_ids: Tensor) -> Tensor:
        """Logits at all N nodes of a tree for each of P prompts, (P, N, A), in one pass.

        They equal ``logits``: the values themselves where ``logits_are_values``, else up to a
        constant of each node.
        """
        ...

    @property
    def tree_bytes_per_node(self) -> int:
        """About what a node takes without gradients, for those who cut trees; absent: 4,096."""
        ...

    def log_probs(self, tokens: Tensor, prompt_ids: Tensor | None = None) -> Tensor:
        """log pi of each token after those before it, (B, T): of tokens that the space allows.

        At the last position of EOS mode it is not read. For those who have a cheaper way than all
        A logits of each row.
        """
        ...

    @property
    def machine(self) -> Machine:
        """The automaton whose tokens have these probabilities: by it EBMs of any size are solved.

        At every position but the last of EOS mode, which is forced.
        """
        ...

    def log_ref_constants(self) -> list[float]:
        """log pi of every allowed action by depth, T numbers: of a law that is uniform."""
        ...

    def read_tensors(self) -> list[Tensor]:
        """The tensors that its numbers are made of; absent: all that are found in it."""
        ...

    def to(self, device: torch.device | str) -> Any:
        """The same on another device; of a module a copy is asked. Absent: it is everywhere."""
        ...


# Readers of the optional members, each of them once -------------------------------------------

BYTES_PER_NODE = 4096
"""what a node of a tree, or a token of a sequence, takes where the policy does not say"""


def is_policy(thing: object) -> bool:
    """Whether something has the method of a policy; a class has it for others."""
    return callable(getattr(thing, "logits", None)) and not isinstance(thing, type)


def space_of(policy: object) -> TokenSpace | None:
    """The space that a policy is for; None where it does not say."""
    space = getattr(policy, "space", None)
    return space if isinstance(space, TokenSpace) else None


def prompts_of(policy: object) -> Sequence[Sequence[int]] | None:
    """The prompts that a policy was made for; None where it reads none."""
    prompts: Any = getattr(policy, "prompts", None)
    return None if prompts is None else cast("Sequence[Sequence[int]]", prompts)


def num_prompts(policy: object) -> int:
    """How many prompts a policy tells apart: 1 for one that reads none."""
    return len(prompts_of(policy) or [[]])


def device_of(thing: object) -> torch.device:
    """Where a policy or a reward computes: its weights' device, else its ``device``, else CPU."""
    if isinstance(thing, nn.Module):
        # The first alone: to list them all takes as long as a small network's step.
        for tensor in chain(thing.parameters(), thing.buffers()):
            return tensor.device
    return torch.device(getattr(thing, "device", None) or "cpu")


def forbids_of(policy: object) -> bool | None:
    """Whether some allowed action may have logit ``-inf``; None where it is not known."""
    told: Any = getattr(policy, "forbids", None)
    return None if told is None else bool(told)


def logits_are_values(policy: object) -> bool:
    """Whether a policy's raw logits are declared to be q."""
    return bool(getattr(policy, "logits_are_values", False))


def value_head(policy: object) -> ValueHead | None:
    """The weights of a policy's V alone; None where V is in those of its logits."""
    head: Any = getattr(policy, "value_head", None)
    return head if isinstance(head, ValueHead) else None


def crops(policy: object) -> bool:
    """Whether ``logits`` takes fewer columns than T."""
    return bool(getattr(policy, "crops", False))


def steps_of(policy: object) -> Steps | None:
    """The policy as one that decodes with a cache; None where it has none."""
    return cast("Steps", policy) if hasattr(policy, "step") else None


def tree_pass(policy: object) -> Callable[[PrefixTree, Tensor], Tensor] | None:
    """The policy's ``tree_logits``; None where it has none."""
    return getattr(policy, "tree_logits", None)


def tree_bytes_per_node(policy: object) -> int:
    """About what a node of a tree takes, bytes."""
    return int(getattr(policy, "tree_bytes_per_node", BYTES_PER_NODE))


def token_pass(policy: object) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """The policy's ``log_probs``; None where it has none."""
    return getattr(policy, "log_probs", None)


def machine_of(policy: object) -> Machine | None:
    """The policy's automaton; None where it has none."""
    machine: Machine | None = getattr(policy, "machine", None)
    return machine


def constants_of(policy: object) -> Callable[[], list[float]] | None:
    """The policy's ``log_ref_constants``; None where it has none."""
    return getattr(policy, "log_ref_constants", None)


def parameters_of(policy: object) -> list[nn.Parameter]:
    """The weights of a policy, none where it has none."""
    return list(getattr(policy, "parameters", list)())


def tensors_read_by(thing: object) -> list[Tensor] | None:
    """What an object says that its numbers are made of; None where it does not."""
    own: Any = getattr(thing, "read_tensors", None)
    return list(own()) if callable(own) else None


# Prompts, modes, devices ------------------------------------------------------------------------


def prompt_rows(
    policy: object, n: int, prompt_ids: Int64[Tensor, "n"] | None
) -> Int64[Tensor, "n"]:
    """Which of a policy's prompts each of n rows answers: the only one, where it reads none."""
    if prompts_of(policy) is None:
        prompt_ids = None
    return resolve_prompt_ids(n, prompt_ids, num_prompts(policy), device_of(policy))


def resolve_prompt_ids(
    n: Int,
    prompt_ids: Int64[Tensor, "..."] | None,
    num_prompts: int | None,
    device: torch.device | str,
) -> Int64[Tensor, "n"]:
    """Check ``prompt_ids``, or make those of a single prompt; None for any number of prompts.

    Raises:
        TypeError: no tensor.
        ValueError: missing with several prompts, of another length, or out of range; an n that
            is no number of rows.
    """
    n = whole("n", n, 0, 2**31)
    if prompt_ids is None:
        if num_prompts is not None and num_prompts > 1:
            raise ValueError(
                f"there are {num_prompts} prompts: give prompt_ids, one index for each of the "
                f"{n} rows"
            )
        return torch.zeros(n, dtype=torch.int64, device=device)
    prompt_ids = ids_tensor("prompt_ids", prompt_ids, 1)
    if prompt_ids.shape != (n,):
        raise ValueError(f"prompt_ids has shape {tuple(prompt_ids.shape)}, expected ({n},)")
    # Reading the values waits for a GPU: there the gather that uses them does the checking.
    if num_prompts is None or prompt_ids.device.type != "cpu" or n == 0:
        return prompt_ids
    ids = prompt_ids.detach().numpy()
    if ids.min() < 0 or ids.max() >= num_prompts:
        raise ValueError(f"prompt_ids must be in [0, {num_prompts})")
    return prompt_ids


@contextmanager
def evaluating(policy: object) -> Iterator[None]:
    """A module in evaluation mode, and each part of it back in the mode it was in."""
    modules = list(policy.modules()) if isinstance(policy, nn.Module) else []
    modes = [(module, module.training) for module in modules]
    for module, training in modes:
        if training:  # setting an attribute of a module costs more than asking
            module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            if module.training is not training:
                module.training = training


def on_device(thing: Any, device: torch.device | str) -> Any:
    """A reward or policy on a device; a module that is elsewhere is copied, not moved."""
    if not hasattr(thing, "to"):
        return thing
    if isinstance(thing, nn.Module):
        if device_of(thing) == torch.device(device):
            return thing
        thing = copy.deepcopy(thing)
    return thing.to(device)
