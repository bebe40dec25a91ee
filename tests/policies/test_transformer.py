"""The Transformers against one that takes a prefix at a time: no padding, no cache, no batch.

Weights start random and large: near zero every wrong path looks right.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product

import brute_force
import pytest
import torch
from brute_force import log_softmax
from toy_policies import (
    PROMPTS,
    SHAPES,
    SMALL,
    close,
    randomised,
    responses,
    seeded,
    tabular,
    transformer,
)

from rl_ebm.networks.prefix_tree import PrefixTree
from rl_ebm.policies import Transformer, TransformerConfig
from rl_ebm.rewards import TransformerReward
from rl_ebm.tokens import TokenSpace

in_all_spaces = pytest.mark.parametrize("shape", SHAPES, ids=str)
with_and_without_prompts = pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["", "prompts"])


@torch.no_grad()
def naive_features(backbone, ids, sees):
    """Features (n, D) of one sequence; position i looks at the positions in ``sees(i)``."""
    x = backbone.token.weight[ids] + backbone.position.weight[: len(ids)]
    for block in backbone.blocks:
        qkv = block.qkv(block.norm1(x)).view(len(ids), 3, block.heads, -1)
        out = torch.zeros_like(qkv[:, 0])
        for i, h in product(range(len(ids)), range(block.heads)):
            q, scale = qkv[i, 0, h], math.sqrt(qkv.shape[-1])
            scores = [float(q @ qkv[j, 1, h]) / scale for j in sees(i)]
            for j, log_weight in zip(sees(i), log_softmax(scores), strict=True):
                out[i, h] += math.exp(log_weight) * qkv[j, 2, h]
        x = x + block.out(out.flatten(1))
        x = x + block.down(block.up(block.norm2(x)).clamp(min=0))
    return x


@lru_cache
def naive_logits(shape, prompted):
    """(prompt, prefix) to its logits, for the policy of :func:`transformer`."""
    space, prompts = TokenSpace(*shape), PROMPTS if prompted else [[]]
    policy = transformer(space, PROMPTS if prompted else None)
    bos, separator = (7, [8]) if prompted else (space.vocab_size, [])
    return {
        (i, s): policy.head(
            naive_features(policy.backbone, [bos, *prompt, *separator, *s], lambda j: range(j + 1))[
                -1
            ]
        ).detach()
        for i, prompt in enumerate(prompts)
        for t in range(space.max_length)
        for s in brute_force.prefixes(space.vocab_size, t, space.eos_id)
    }


@in_all_spaces
@with_and_without_prompts
def test_logits_are_those_of_the_naive_transformer(shape, prompts):
    space, want = TokenSpace(*shape), naive_logits(shape, prompts is not None)
    policy = transformer(space, prompts)
    tokens, lengths = brute_force.padded(responses(space), space.max_length, pad=1)
    for i in range(len(prompts or [[]])):
        rows = policy.logits(tokens, torch.full((len(tokens),), i))
        assert rows.shape == (*tokens.shape, space.vocab_size)
        for y, n, row in zip(tokens.tolist(), lengths.tolist(), rows, strict=True):
            close(row[:n], torch.stack([want[i, tuple(y[:t])] for t in range(n)]))


@in_all_spaces
@with_and_without_prompts
def test_tree_logits_are_those_of_the_naive_transformer(shape, prompts):
    space, want = TokenSpace(*shape), naive_logits(shape, prompts is not None)
    policy, last = transformer(space, prompts), space.max_length - 1
    states = [
        s
        for t in range(space.max_length)
        for s in brute_force.prefixes(space.vocab_size, t, space.eos_id)
    ]
    prompt_ids = torch.tensor([2, 0] if prompts else [0])
    full = policy.tree_logits(PrefixTree.full(space), prompt_ids)
    close(
        full, torch.stack([torch.stack([want[i, s] for s in states]) for i in prompt_ids.tolist()])
    )
    # A part of the deepest level, under its ancestors: nodes are read off the tree itself.
    stop = space.num_prefixes(last)
    tree, _ = PrefixTree.below(space, last, stop // 3, stop, space.max_length)
    rows = policy.tree_logits(tree, prompt_ids)
    paths = zip(tree.ancestors.tolist(), tree.depth.tolist(), strict=True)
    for node, (path, depth) in enumerate(paths):
        state = tuple(int(tree.tokens[a]) for a in path[1 : depth + 1])
        close(rows[:, node], torch.stack([want[i, state] for i in prompt_ids.tolist()]))


# Trees of several tiles: of many levels, of one, node by node.
@pytest.mark.parametrize("shape", [(2, 9, None), (4, 5, None), (6, 4, 2), (70, 3, None)], ids=str)
@with_and_without_prompts
def test_tree_logits_and_their_gradient_are_those_of_sequences(shape, prompts):
    space = TokenSpace(*shape)
    policy = transformer(space, prompts)
    tree = PrefixTree.full(space)
    assert len(tree.layout.tiles) > 1
    prompt_ids = torch.tensor([2, 0] if prompts else [0])
    weight = torch.randn(len(prompt_ids), len(tree), space.vocab_size).double()
    leaf, column = tree.owner

    rows = [
        policy.logits(tree.leaf_tokens, torch.full((len(tree.leaf_tokens),), i))[leaf, column]
        for i in prompt_ids.tolist()
    ]
    want, got = torch.stack(rows), policy.tree_logits(tree, prompt_ids)

    close(got, want)
    parameters = list(policy.parameters())
    gradients = [torch.autograd.grad((x * weight).sum(), parameters) for x in (got, want)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@in_all_spaces
@with_and_without_prompts
def test_cached_steps_are_those_of_the_naive_transformer(shape, prompts):
    space, want = TokenSpace(*shape), naive_logits(shape, prompts is not None)
    policy = transformer(space, prompts)
    num_prompts = len(prompts or [[]])
    rows = [(i, y) for y in responses(space) for i in range(num_prompts)]  # prompts in turn
    tokens, lengths = brute_force.padded([y for _, y in rows], space.max_length)
    state = policy.start(torch.tensor([i for i, _ in rows]))
    for t in range(space.max_length):
        got = policy.step(state, tokens[:, t - 1] if t else None)
        for (i, y), n, row in zip(rows, lengths.tolist(), got, strict=True):
            if t < n:
                close(row, want[i, y[:t]])


@with_and_without_prompts
@pytest.mark.parametrize("shape", [(3, 3, None), (3, 3, 1)], ids=str)
def test_the_reward_transformer_is_the_mean_over_the_real_positions(shape, prompts):
    space = TokenSpace(*shape)
    reward = randomised(TransformerReward(space, SMALL, prompts))
    bos, separator = (7, [8]) if prompts else (space.vocab_size, [])
    tokens, lengths = brute_force.padded(responses(space), space.max_length, pad=2)
    for i, prompt in enumerate(prompts or [[]]):
        got = reward(tokens, lengths, torch.full((len(tokens),), i))
        for y, r in zip(responses(space), got, strict=True):
            ids = [bos, *prompt, *separator, *y]
            everything = range(len(ids))
            x = naive_features(reward.backbone, ids, lambda _, seen=everything: seen)
            close(r, reward.head(x.mean(0))[0])


@pytest.mark.parametrize("make", [transformer, tabular])
@pytest.mark.parametrize("shape", [(3, 4, None), (3, 4, 2)], ids=str)
def test_row_t_does_not_change_with_tokens_from_t_on(make, shape):
    space = TokenSpace(*shape)
    policy = make(space)
    a, b = (torch.randint(3, (40, 4), generator=seeded(s)) for s in (1, 2))
    for t in range(4):
        mixed = torch.cat([a[:, :t], b[:, t:]], dim=1)
        close(policy.logits(mixed)[:, : t + 1], policy.logits(a)[:, : t + 1], 0.0)


@pytest.mark.parametrize(
    ("layers", "heads", "dim", "ebm_count", "arm_count"),
    [(2, 2, 16, 3_633, 3_752), (3, 4, 64, 76_609, 77_064)],
)
def test_parameter_counts_are_the_papers(layers, heads, dim, ebm_count, arm_count):
    """arXiv 2512.15605, App. C: V = 8, T = 4; its two counts are those of the EBM."""
    space, config = TokenSpace(8, 4), TransformerConfig(layers, heads, dim, hidden=dim)
    embeddings = (8 + 1) * dim + (4 + 1) * dim
    block = 4 * dim * (dim + 1) + 2 * dim * (dim + 1) + 2 * 2 * dim
    counts = [
        sum(p.numel() for p in module.parameters())
        for module in (TransformerReward(space, config), Transformer(space, config))
    ]
    assert counts == [ebm_count, arm_count]
    assert counts == [embeddings + layers * block + outputs * (dim + 1) for outputs in (1, 8)]


def test_a_config_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="heads must divide dim, got dim=10, heads=4"):
        TransformerConfig(dim=10)
    with pytest.raises(ValueError, match="layers must be an integer >= 1, got 0"):
        TransformerConfig(layers=0)


def test_a_prompt_is_no_response_that_has_begun():
    """The empty prompt with a response that begins with 1 is another input than the prompt 1."""
    space, prompts = TokenSpace(3, 3), [[], [1]]
    policy = randomised(Transformer(space, SMALL, prompts))
    begun = policy.logits(torch.tensor([[1, 2, 0]]), torch.tensor([0]))[0, 1:]
    other = policy.logits(torch.tensor([[2, 0, 0]]), torch.tensor([1]))[0, :2]
    assert float((begun - other).detach().abs().min()) > 1e-4
