r"""The one path from a policy's logits to log-probabilities and samples.

A **policy** is any object with ``logits(tokens, prompt_ids=None) -> (B, T, A)``: row t depends
on ``tokens[:, :t]`` alone, and need be neither normalised nor masked. Some optional members
make it faster, and nothing else: they must give the same numbers.

* ``tree_logits(tree, prompt_ids) -> (P, N, A)``: all prefixes of a tree in one pass
  (``tree_bytes_per_node`` says what a node takes, for those who cut trees to size);
* ``start(prompt_ids) -> state`` and ``step(state, tokens | None) -> (B, A)``: decoding with a
  cache, one token for each row at a time;
* ``log_probs(tokens, prompt_ids) -> (B, T)``: log pi of the tokens alone, for those who have a
  cheaper way than all A of each row;
* ``crops = True``: ``logits`` also takes fewer than T columns, and gives as many rows; then what
  stands past the longest response of a batch is not computed;
* ``logits_are_values = True`` declares that the raw logits are q, not just log pi + c(s).

A policy that reads prompts was given them when it was made and shows them as ``prompts``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.messages.arguments import (
    Int,
    Number,
    check_generator,
    finite,
    ids_tensor,
    is_number,
    shown,
    whole,
)
from rl_ebm.messages.memory import check_fits
from rl_ebm.networks.prefix_tree import PrefixTree
from rl_ebm.policies.outputs import check_kind, check_output
from rl_ebm.policies.outputs import check_shape as check_shape
from rl_ebm.soft_bellman import log_policy, sequence_log_prob
from rl_ebm.tokens import Batch, TokenSpace, check_space, length_mask


@runtime_checkable
class Policy(Protocol):
    """What every policy can do; see the module's docstring."""

    def logits(self, tokens: Tensor, prompt_ids: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class Trainable(Policy, Protocol):
    """A policy with weights: any ``torch.nn.Module`` with ``logits``."""

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]: ...

    @property
    def state_dict(self) -> Any: ...

    @property
    def load_state_dict(self) -> Any: ...


def mask_logits(logits: Float[Tensor, "B T A"], space: TokenSpace) -> Float[Tensor, "B T A"]:
    """Logits in float32 at least, ``-inf`` where the space allows no action.

    Raises:
        ValueError: logits of another space.
    """
    check_shape(logits, space)
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    return logits.masked_fill(~space.action_mask(logits.device), -torch.inf)


def q_values(
    policy: Policy,
    space: TokenSpace,
    tokens: Int64[Tensor, "B T"],
    prompt_ids: Int64[Tensor, "B"] | None = None,
) -> Float[Tensor, "B T A"]:
    """Masked logits before every token; what stands past the longest response is unspecified.

    Where the whole tree has fewer prefixes than the batch has tokens, and the policy can
    evaluate trees, the tree is evaluated and the batch reads its rows from it.
    """
    check_kind(policy)
    check_space(space)
    space.check_kind(tokens)
    if _tree_is_smaller(policy, space, tokens.shape[0]):
        rows = tree_q_values(policy, space, num_prompts(policy)).flatten(0, 1)
        ids = space.state_ids(tokens)
        if num_prompts(policy) > 1:
            prompt_ids = resolve_prompt_ids(
                len(tokens), prompt_ids, num_prompts(policy), tokens.device
            )
            ids = ids + prompt_ids[:, None] * space.num_states
        # embedding: its backward is a parallel scatter-add, that of indexing is not.
        return torch.nn.functional.embedding(ids, rows)
    return mask_logits(row_logits(policy, space, tokens, prompt_ids), space)


def row_logits(
    policy: Policy,
    space: TokenSpace,
    tokens: Int64[Tensor, "B T"],
    prompt_ids: Int64[Tensor, "B"] | None = None,
) -> Float[Tensor, "B T A"]:
    """A policy's ``logits``, of no more columns than are read where it takes fewer; 0 beyond."""
    width = _longest(policy, space, tokens)
    if width == space.max_length:
        return policy.logits(tokens, prompt_ids)
    logits = policy.logits(tokens[:, :width], prompt_ids)
    return torch.nn.functional.pad(logits, (0, 0, 0, space.max_length - width))


def _longest(policy: Policy, space: TokenSpace, tokens: Int64[Tensor, "B T"]) -> int:
    """Columns of some responses that a policy has to read: all but those past every EOS.

    Only of policies that say that they take fewer (``crops``): T is promised to all others.
    """
    if space.eos_id is None or not getattr(policy, "crops", False) or not len(tokens):
        return space.max_length
    is_eos = tokens == space.eos_id
    ends = torch.where(is_eos.any(1), is_eos.long().argmax(1) + 1, space.max_length)
    return int(ends.max())


def tree_q_values(policy: Policy, space: TokenSpace, prompts: int = 1) -> Float[Tensor, "P S A"]:
    """Masked logits at every state of the space, shallow states first, for each of the prompts."""
    check_kind(policy)
    check_space(space)
    prompts = whole("prompts", prompts, 1, 2**31)
    device = device_of(policy)
    prompt_ids = torch.arange(prompts, device=device)
    logits = tree_logits(policy, PrefixTree.full(space, str(device)), prompt_ids, space)
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    return logits.masked_fill(~space.state_action_mask(device), -torch.inf)


def tree_logits(
    policy: Policy, tree: PrefixTree, prompt_ids: Int64[Tensor, "P"], space: TokenSpace
) -> Float[Tensor, "P N A"]:
    """Raw logits at every node of a tree: by the policy's own tree pass where it has one.

    Otherwise from sequences: one for each leaf, whose rows are the logits of its ancestors.
    """
    other = getattr(policy, "space", space)
    if other != space:
        raise ValueError(f"the policy is for {other}, and {space} is asked for")
    own: Any = getattr(policy, "tree_logits", None)
    if own is not None:
        logits: Tensor = own(tree, prompt_ids)
        return logits
    tokens = tree.leaf_tokens
    leaf, column = tree.owner
    parts = []
    for prompt in prompt_ids.tolist():
        ids = torch.full((len(tokens),), prompt, device=tokens.device)
        rows = policy.logits(tokens, ids)
        check_shape(rows, space)
        parts.append(rows[leaf, column])
    return torch.stack(parts)


def log_pi_rows(
    policy: Policy,
    space: TokenSpace,
    tokens: Int64[Tensor, "B T"],
    prompt_ids: Int64[Tensor, "B"] | None = None,
) -> Float[Tensor, "B T A"]:
    """log pi(.|s) before every token: masked and normalised."""
    return log_policy(q_values(policy, space, tokens, prompt_ids))


def log_prob(
    policy: Policy,
    space: TokenSpace,
    tokens: Int64[Tensor, "B T"],
    lengths: Int64[Tensor, "B"],
    prompt_ids: Int64[Tensor, "B"] | None = None,
) -> Float[Tensor, "B"]:
    """log pi(y|x): the sum over the real tokens."""
    check_space(space)
    space.check_kind(tokens)
    lengths = ids_tensor("lengths", lengths, 1)
    if lengths.shape != (len(tokens),):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected ({len(tokens)},)")
    # What stands past the end is never read: policies see a legal id there.
    tokens = tokens.masked_fill(~length_mask(lengths, space.max_length), 0)
    log_pi = log_pi_rows(policy, space, tokens, prompt_ids)
    return sequence_log_prob(log_pi, tokens, lengths)


LOOK = 16
"""tokens between two looks at whether all responses have ended, where a look waits"""


@torch.no_grad()
def sample(
    policy: Policy,
    space: TokenSpace,
    n: Int,
    generator: torch.Generator | None = None,
    prompt_ids: Int64[Tensor, "n"] | None = None,
    temperature: Number = 1.0,
    epsilon: Number = 0.0,
) -> Batch:
    """Draw responses, by Gumbel-max on the masked logits: a forbidden token is never drawn.

    Decoding ends with the longest response. Whether all have ended is looked at after every token
    on a CPU, and every 16 tokens elsewhere, where each look would wait for the device.

    Args:
        n: how many.
        generator: on the policy's device; None for the global one.
        prompt_ids: which prompt each row answers, (n,); needed where the policy has several.
        temperature: of the draw; 1 samples the policy itself.
        epsilon: chance of each token to be drawn uniformly from the allowed ones instead.

    Raises:
        TypeError: no policy.
        ValueError: ``prompt_ids`` missing or of another length, or a number out of range.
    """
    check_kind(policy)
    check_space(space)
    temperature = finite("temperature", temperature, 0.0, above=True)
    if not (is_number(epsilon) and 0 <= epsilon <= 1):
        raise ValueError(f"epsilon must be in [0, 1], got {shown(epsilon)}")
    # A policy without prompts answers any the same.
    count = None if getattr(policy, "prompts", None) is None else num_prompts(policy)
    device = device_of(policy)
    n = check_draws(n, space, device)
    prompt_ids = resolve_prompt_ids(n, prompt_ids, count, device)
    device = prompt_ids.device
    check_generator(generator, device)
    next_logits = _next_logits(policy, space, n, prompt_ids)
    mask = space.action_mask(device)
    tokens = torch.zeros(n, space.max_length, dtype=torch.int64, device=device)
    lengths = torch.full((n,), space.max_length, device=device)
    running = torch.ones(n, dtype=torch.bool, device=device)
    look = LOOK if device.type != "cpu" else 1
    for t in range(space.max_length):
        if space.eos_id is not None and t and t % look == 0 and not bool(running.any()):
            break
        logits = next_logits(t, tokens)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits / temperature
        if epsilon:
            anything = torch.rand(n, 1, generator=generator, device=device) < epsilon
            logits = logits.masked_fill(anything, 0.0)
        logits = logits.masked_fill(~mask[t], -torch.inf)
        # Gumbel noise is -log(Exponential); argmax of logits + noise is a draw from softmax.
        noise = torch.empty_like(logits).exponential_(generator=generator).log_()
        action = (logits - noise).argmax(-1)
        tokens[:, t] = torch.where(running, action, tokens[:, t])
        ends = running & space.ends(action, torch.full_like(action, t))
        lengths = torch.where(ends, t + 1, lengths)
        running = running & ~ends
    return Batch(tokens, lengths, prompt_ids)


def check_draws(n: Int, space: TokenSpace, device: torch.device) -> int:
    """How many responses are to be drawn.

    Raises:
        TypeError: no integer.
        ValueError: a negative one, or more than fit into memory at a time.
    """
    n = whole("n", n, 0, 2**31)
    if n > 2**20 and device.type == "cpu":
        need = 8 * n * (space.max_length + space.vocab_size + 2)
        check_fits(need, f"drawing {n:,} responses at a time", "draw fewer")
    return n


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


def num_prompts(policy: object) -> int:
    """How many prompts a policy tells apart: 1 for one that reads none."""
    return len(getattr(policy, "prompts", None) or [[]])


def device_of(policy: object) -> torch.device:
    """Where a policy computes: its parameters' device, else its ``device``, else the CPU."""
    if isinstance(policy, torch.nn.Module):
        for tensor in (*policy.parameters(), *policy.buffers()):
            return tensor.device
    return torch.device(getattr(policy, "device", "cpu"))


@contextmanager
def evaluating(policy: object) -> Iterator[None]:
    """A module in evaluation mode, and each part of it back in the mode it was in."""
    modules = list(policy.modules()) if isinstance(policy, torch.nn.Module) else []
    training = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


def on_device(thing: Any, device: torch.device | str) -> Any:
    """A reward or policy on a device; a module that is elsewhere is copied, not moved."""
    if not hasattr(thing, "to"):
        return thing
    if isinstance(thing, torch.nn.Module):
        if device_of(thing) == torch.device(device):
            return thing
        thing = copy.deepcopy(thing)
    return thing.to(device)


def _tree_is_smaller(policy: Policy, space: TokenSpace, rows: int) -> bool:
    if not hasattr(policy, "tree_logits"):
        return False
    return num_prompts(policy) * space.num_states <= rows * space.max_length


def _next_logits(policy: Any, space: TokenSpace, n: int, prompt_ids: Tensor) -> Any:
    """A function (t, tokens) -> (n, A): the fastest way this policy has."""
    if _tree_is_smaller(policy, space, n):
        rows = tree_q_values(policy, space, num_prompts(policy)).flatten(0, 1)
        row = prompt_ids * space.num_states if num_prompts(policy) > 1 else 0

        def from_tree(t: int, tokens: Tensor) -> Tensor:
            index = torch.zeros_like(prompt_ids)
            for i in range(t):
                index = index * space.branching + space.rank(tokens[:, i])
            return rows[row + space.state_offset(t) + index]

        return from_tree
    if hasattr(policy, "step"):
        state = policy.start(prompt_ids)

        def from_cache(t: int, tokens: Tensor) -> Tensor:
            logits: Tensor = policy.step(state, tokens[:, t - 1] if t else None)
            return logits

        return from_cache

    def from_scratch(t: int, tokens: Tensor) -> Tensor:
        logits = policy.logits(tokens, prompt_ids)
        check_output(logits, len(tokens), space)
        rows: Tensor = logits[:, t]
        return rows

    return from_scratch
