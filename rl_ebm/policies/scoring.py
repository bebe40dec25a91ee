r"""The one path from a policy's logits to log-probabilities and samples.

Of several ways that a policy offers (:class:`rl_ebm.policies.base.FullPolicy`) the fastest is
taken; all give the same numbers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rl_ebm.messages.arguments import (
    ids_tensor,
    whole,
)
from rl_ebm.networks.prefix_tree import PrefixTree
from rl_ebm.policies.base import (
    Policy,
    crops,
    device_of,
    num_prompts,
    resolve_prompt_ids,
    space_of,
    tree_pass,
)
from rl_ebm.policies.outputs import check_kind
from rl_ebm.policies.outputs import check_shape as check_shape
from rl_ebm.soft_bellman import log_policy, sequence_log_prob
from rl_ebm.tokens import TokenSpace, check_space, length_mask


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
    tokens = space.check_tokens(tokens)
    if tree_is_smaller(policy, space, tokens.shape[0]):
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
    tokens = space.check_kind(tokens)
    prompt_ids = None if prompt_ids is None else ids_tensor("prompt_ids", prompt_ids, 1)
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
    for prompt in prompt_ids:
        rows = policy.logits(tokens, prompt.repeat(len(tokens)))
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
    tokens = space.check_kind(tokens)
    lengths = ids_tensor("lengths", lengths, 1)
    if lengths.shape != (len(tokens),):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected ({len(tokens)},)")
    # What stands past the end is never read: policies see a legal id there.
    tokens = tokens.masked_fill(~length_mask(lengths, space.max_length), 0)
    log_pi = log_pi_rows(policy, space, tokens, prompt_ids)
    return sequence_log_prob(log_pi, tokens, lengths)


def tree_is_smaller(policy: Policy, space: TokenSpace, rows: int) -> bool:
    """Whether a pass over all states takes fewer logits than so many rows of T."""
    if tree_pass(policy) is None:
        return False
    return num_prompts(policy) * space.num_states <= rows * space.max_length
