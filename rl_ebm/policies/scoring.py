r"""The one path from a policy's logits to log-probabilities and samples.

Of several ways that a policy offers (:class:`rl_ebm.policies.base.FullPolicy`) the fastest is
taken; all give the same numbers.
"""

from __future__ import annotations

from typing import Any

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
from rl_ebm.policies.base import (
    Policy,
    crops,
    device_of,
    num_prompts,
    prompts_of,
    resolve_prompt_ids,
    space_of,
    steps_of,
    tree_pass,
)
from rl_ebm.policies.outputs import check_kind, check_output
from rl_ebm.policies.outputs import check_shape as check_shape
from rl_ebm.soft_bellman import log_policy, sequence_log_prob
from rl_ebm.tokens import Batch, TokenSpace, check_space, length_mask


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
    if space.eos_id is None or not crops(policy) or not len(tokens):
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
    other = space_of(policy)
    if other not in (None, space):
        raise ValueError(f"the policy is for {other}, and {space} is asked for")
    own = tree_pass(policy)
    if own is not None:
        return own(tree, prompt_ids)
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
    count = None if prompts_of(policy) is None else num_prompts(policy)
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


def _tree_is_smaller(policy: Policy, space: TokenSpace, rows: int) -> bool:
    if tree_pass(policy) is None:
        return False
    return num_prompts(policy) * space.num_states <= rows * space.max_length


def _next_logits(policy: Policy, space: TokenSpace, n: int, prompt_ids: Tensor) -> Any:
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
    stepping = steps_of(policy)
    if stepping is not None:
        state = stepping.start(prompt_ids)

        def from_cache(t: int, tokens: Tensor) -> Tensor:
            return stepping.step(state, tokens[:, t - 1] if t else None)

        return from_cache

    def from_scratch(t: int, tokens: Tensor) -> Tensor:
        logits = policy.logits(tokens, prompt_ids)
        check_output(logits, len(tokens), space)
        rows: Tensor = logits[:, t]
        return rows

    return from_scratch
