"""Prefix trees against lists of tuples, and the map M on trees against enumeration."""

from __future__ import annotations

import math
import random

import brute_force
import pytest
import torch
from brute_force import INF, SPACES, log_softmax, log_sum_exp, random_tables
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_ebm import soft_bellman as sb
from rl_ebm.networks.prefix_tree import PrefixTree
from rl_ebm.tokens import TokenSpace

in_all_spaces = pytest.mark.parametrize("shape", SPACES, ids=str)


def prefixes_of(tree):
    """The prefix that each node stands for, read off its ancestors."""
    return [
        tuple(tree.tokens[node].item() for node in path[1 : depth + 1])
        for path, depth in zip(tree.ancestors.tolist(), tree.depth.tolist(), strict=True)
    ]


def check_consistent(tree, max_length):
    """Everything that a tree says about itself, from the prefixes of its nodes alone."""
    names = prefixes_of(tree)
    place = {s: i for i, s in enumerate(names)}
    assert len(place) == len(names) == len(tree)
    assert names[0] == ()
    for i, s in enumerate(names):
        ancestors = [place[s[:t]] for t in range(len(s) + 1)]
        assert ancestors == sorted(ancestors)  # parents stand before their children
        width = tree.ancestors.shape[1]
        assert tree.ancestors[i].tolist() == ancestors + [i] * (width - len(ancestors))
        assert tree.depth[i] == len(s)

    parents = {s[:-1] for s in names if s}
    leaves = [s for s in names if s not in parents]
    assert tree.is_leaf.tolist() == [s not in parents for s in names]
    assert tree.leaf_depth.tolist() == [len(s) for s in leaves]
    assert tree.leaf_tokens.tolist() == [[*s, *[0] * (max_length - len(s))] for s in leaves]
    owner, column = tree.owner
    assert column.tolist() == [len(s) for s in names]
    for s, leaf in zip(names, owner.tolist(), strict=True):
        assert leaves[leaf][: len(s)] == s
    return names


@in_all_spaces
def test_the_full_tree_lists_all_states_by_their_ids(shape):
    space = TokenSpace(*shape)
    tree = PrefixTree.full(space)
    want = [s for t in range(space.max_length) for s in brute_force.prefixes(shape[0], t, shape[2])]
    assert check_consistent(tree, space.max_length) == want
    assert len(tree) == space.num_states
    assert PrefixTree.full(space) is tree


@in_all_spaces
def test_a_tree_below_a_block_holds_ancestors_block_and_descendants(shape):
    space = TokenSpace(*shape)
    for end in range(1, space.max_length + 1):
        for depth in range(end):
            n = space.num_prefixes(depth)
            for start, stop in {(0, 1), (0, n), (n // 2, n), (n // 3, n // 3 + 1), (n - 1, n)}:
                check_block(space, depth, start, stop, end)


def check_block(space, depth, start, stop, end):
    tree, slices = PrefixTree.below(space, depth, start, stop, end)
    names = check_consistent(tree, space.max_length)
    level = [brute_force.prefixes(space.vocab_size, t, space.eos_id) for t in range(end)]
    block = level[depth][start:stop]
    want = []
    for t in range(end):
        if t < depth:
            nodes = [s for s in level[t] if any(b[:t] == s for b in block)]
        else:
            nodes = [s for s in level[t] if s[:depth] in block]
            assert names[slices[t - depth]] == nodes
        want += nodes
    assert names == want
    assert len(slices) == end - depth


def check_layout(tree):
    """Each node but the root is in one tile, and sees exactly its ancestors and itself."""
    names, layout = prefixes_of(tree), tree.layout
    assert layout.order[0] == 0
    assert sorted(layout.order.tolist()) == list(range(len(tree)))
    assert layout.order[layout.place].tolist() == list(range(len(tree)))
    nodes = [node for tile in layout.tiles for node in tile.nodes.flatten().tolist()]
    assert nodes == layout.order[1:].tolist()
    assert len(layout.tiles[0].nodes) == 1
    before = {0}
    for tile in layout.tiles:
        for group, above in zip(tile.nodes.tolist(), tile.above.tolist(), strict=True):
            over = [layout.order[place].item() for place in above]
            assert before.issuperset(over)
            for node, row in zip(group, tile.seen.tolist(), strict=True):
                sees = over + [other for other, seen in zip(group, row, strict=True) if seen]
                prefix = names[node]
                assert sorted(names[j] for j in sees) == [
                    prefix[:t] for t in range(1, len(prefix) + 1)
                ]
        before.update(tile.nodes.flatten().tolist())


# Top tile alone, several levels in a tile, one level, and node by node (wider than 64).
@pytest.mark.parametrize(("a", "t"), [(3, 3), (3, 9), (2, 9), (4, 5), (6, 4), (20, 3), (70, 3)])
@pytest.mark.parametrize("eos_id", [None, 1])
def test_the_layout_of_a_full_tree_shows_every_node_its_ancestors(a, t, eos_id):
    space = TokenSpace(a, t, eos_id)
    check_layout(PrefixTree.full(space))


@pytest.mark.parametrize(
    ("depth", "start", "stop"), [(1, 0, 4), (2, 3, 7), (4, 31, 33), (4, 0, 256)]
)
def test_the_layout_below_a_block_shows_every_node_its_ancestors(depth, start, stop):
    tree, _ = PrefixTree.below(TokenSpace(4, 7), depth, start, stop, min(depth + 3, 7))
    check_layout(tree)


def test_a_tree_of_any_shape_knows_its_leaves_and_their_tokens():
    names = [(), (2,), (1,), (2, 0), (1, 1), (2, 2), (2, 0, 1)]  # leaves of depths 2, 2 and 3
    place = {s: i for i, s in enumerate(names)}
    paths = [[place[s[: min(t, len(s))]] for t in range(4)] for s in names]
    last = [s[-1] if s else 7 for s in names]  # the root's token is not read
    depth = [len(s) for s in names]
    tree = PrefixTree(torch.tensor(last), torch.tensor(paths), torch.tensor(depth), max_length=5)
    assert check_consistent(tree, 5) == names
    check_layout(tree)


# The map M on trees ---------------------------------------------------------------------------


def children_of_the_full_tree(space):
    """Node of each action of each state; -1 where the response ends."""
    names = prefixes_of(PrefixTree.full(space))
    place = {s: i for i, s in enumerate(names)}
    return torch.tensor([[place.get((*s, a), -1) for a in range(space.vocab_size)] for s in names])


@in_all_spaces
@pytest.mark.parametrize("forbid", [0.0, 0.3])
def test_m_on_the_full_tree_is_m_on_tables(shape, forbid):
    space = TokenSpace(*shape)
    r, children = random_tables(*shape, seed=1, forbid=forbid), children_of_the_full_tree(space)
    q = sb.q_from_r(r, space)
    got = sb.q_from_r_tree(torch.cat(r), children)
    torch.testing.assert_close(got, torch.cat(q), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        sb.r_from_q_tree(got, children), torch.cat(sb.r_from_q(q, space)), rtol=1e-12, atol=1e-12
    )


def trie(weights, vocab_size):
    """Children (N, A) and r (N, A) of a set of sequences of which none begins another.

    Nodes are in a random order that keeps parents before children; what is paid is split at
    random over the tokens, so that a forgotten term on the way shows.
    """
    rng = random.Random(0)
    inner = sorted({y[:t] for y in weights for t in range(len(y))}, key=lambda s: (len(s), s))
    place = {s: i for i, s in enumerate(inner)}
    children = [[place.get((*s, a), -1) for a in range(vocab_size)] for s in inner]
    pay = {s: rng.gauss(0, 1) for s in inner if s}
    r = [[-INF] * vocab_size for _ in inner]
    for s in inner[1:]:
        r[place[s[:-1]]][s[-1]] = pay[s]
    for y, weight in weights.items():
        r[place[y[:-1]]][y[-1]] = weight - sum(pay[y[:t]] for t in range(1, len(y)))
    return inner, pay, torch.tensor(children), torch.tensor(r, dtype=torch.float64)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(2, 4),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=12),
    st.integers(0, 10**6),
)
def test_m_on_any_trie_is_the_log_sum_over_its_sequences(vocab_size, drawn, seed):
    chosen = {tuple(a % vocab_size for a in y) for y in drawn}
    chosen = sorted(y for y in chosen if not any(z != y and z[: len(y)] == y for z in chosen))
    rng = random.Random(seed)
    weights = {y: rng.gauss(0, 5) for y in chosen}
    inner, pay, children, r = trie(weights, vocab_size)
    q = sb.q_from_r_tree(r, children)
    for s, row in zip(inner, q.tolist(), strict=True):
        spent = sum(pay[s[:t]] for t in range(1, len(s) + 1))
        for a in range(vocab_size):
            below = [w for y, w in weights.items() if y[: len(s) + 1] == (*s, a)]
            assert row[a] == pytest.approx(log_sum_exp(below) - spent, abs=1e-10)
    back = sb.r_from_q_tree(q, children)
    torch.testing.assert_close(back, r, rtol=1e-12, atol=1e-10)
    # The policy of q is the EBM on the trie.
    log_pi = {s: log_softmax(row) for s, row in zip(inner, q.tolist(), strict=True)}
    log_z = log_sum_exp(list(weights.values()))
    for y, w in weights.items():
        got = sum(log_pi[y[:t]][y[t]] for t in range(len(y)))
        assert got == pytest.approx(w - log_z, abs=1e-10)


def test_m_on_a_forest_treats_each_root_alone():
    # Nodes 0 and 1 are roots; 2 is a child of 1 by action 0, and all other actions end.
    children = torch.tensor([[-1, -1], [2, -1], [-1, -1]])
    r = torch.tensor([[0.2, -0.4], [1.1, 0.3], [-0.7, 0.5]], dtype=torch.float64)
    want = r.clone()
    want[1, 0] += log_sum_exp([-0.7, 0.5])
    torch.testing.assert_close(sb.q_from_r_tree(r, children), want)


def test_the_gradient_of_the_root_value_is_the_probability_of_passing_by():
    space = TokenSpace(3, 3, eos_id=1)
    r = torch.cat(random_tables(3, 3, 1, seed=2)).requires_grad_()
    q = sb.q_from_r_tree(r, children_of_the_full_tree(space))
    (grad,) = torch.autograd.grad(sb.soft_value(q[0]), r)
    tables = [t.detach() for t in torch.split(r, [1, 2, 4])]
    truth = brute_force.EnumeratedEBM(tables, 1)
    want = [
        [math.exp(truth.prefix_log_prob((*s, a))) for a in range(3)]
        for states in truth.states
        for s in states
    ]
    want = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-12)


def test_children_before_their_parents_are_refused():
    r = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="children must stand after their parents"):
        sb.q_from_r_tree(r, torch.tensor([[-1, -1], [0, -1]]))
    with pytest.raises(ValueError, match="children must stand after their parents"):
        sb.q_from_r_tree(r, torch.tensor([[0, -1], [-1, -1]]))


def test_a_finite_q_before_a_dead_end_is_refused_on_trees_too():
    q = torch.tensor([[0.1, 0.2], [-INF, -INF]])
    with pytest.raises(ValueError, match="no r gives such a q"):
        sb.r_from_q_tree(q, torch.tensor([[1, -1], [-1, -1]]))
