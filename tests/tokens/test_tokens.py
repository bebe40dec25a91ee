"""Token spaces: the enumeration against itertools, the rules of the MDP, the checks."""

from __future__ import annotations

from itertools import pairwise, product

import brute_force
import jaxtyping
import pytest
import torch
from brute_force import SPACES
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_policies import OTHER_INTEGERS

from rl_ebm.tokens import Batch, TokenSpace, length_mask

in_all_spaces = pytest.mark.parametrize("shape", SPACES, ids=str)
GARBAGE = 10**6  # what unread places hold: no legal id


def rows(tokens, lengths):
    return [tuple(y[:n]) for y, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]


# Enumeration ----------------------------------------------------------------------------------


@in_all_spaces
def test_sequences_are_those_of_itertools_in_order_of_length_then_lexicographic(shape):
    space = TokenSpace(*shape)
    tokens, lengths = space.sequences()
    want = brute_force.sequences(*shape)
    assert rows(tokens, lengths) == want
    assert space.num_sequences == len(want)
    assert all((len(y), y) < (len(z), z) for y, z in pairwise(want))
    assert (tokens[~length_mask(lengths, space.max_length)] == 0).all()


@in_all_spaces
def test_prefixes_are_those_of_itertools_and_are_counted(shape):
    space = TokenSpace(*shape)
    seen = 0
    for t in range(space.max_length):
        want = brute_force.prefixes(space.vocab_size, t, space.eos_id)
        assert [tuple(s) for s in space.prefixes(t).tolist()] == want
        assert space.num_prefixes(t) == len(want)
        assert space.state_offset(t) == seen
        seen += len(want)
    assert space.num_states == seen


@pytest.mark.parametrize("shape", [(3, 4, None), (3, 4, 1), (2, 5, 0)], ids=str)
def test_a_range_of_sequences_or_prefixes_is_that_slice_of_all(shape):
    space = TokenSpace(*shape)
    tokens, lengths = space.sequences()
    n = space.num_sequences
    for start, stop in [(0, 1), (n - 1, n), (1, n - 1), (2, 4), (0, n), (0, 0), (3, 3)]:
        part, part_lengths = space.sequences(start, stop)
        torch.testing.assert_close(part, tokens[start:stop])
        torch.testing.assert_close(part_lengths, lengths[start:stop])
    for t in range(space.max_length):
        m = space.num_prefixes(t)
        torch.testing.assert_close(space.prefixes(t, m // 3, m), space.prefixes(t)[m // 3 :])
        torch.testing.assert_close(space.prefixes(t, 0, 1), space.prefixes(t)[:1])


def test_counts_of_proposition_4():
    # Eight tokens besides EOS, at most four tokens with it: 1 + 8 + 64 + 512.
    space = TokenSpace(9, 4, eos_id=8)
    assert space.num_sequences == sum(8**t for t in range(4)) == 585
    assert len(brute_force.sequences(9, 4, 8)) == 585
    assert TokenSpace(8, 4).num_sequences == 8**4
    assert TokenSpace(2, 7, eos_id=0).num_sequences == 7  # one token besides EOS


@pytest.mark.parametrize("shape", SPACES, ids=str)
def test_decisions_count_what_is_not_forced(shape):
    space = TokenSpace(*shape)
    free = [int(row.sum()) > 1 for row in space.action_mask()]
    assert space.num_decisions == sum(free)


@in_all_spaces
def test_indices_invert_the_enumeration_whatever_stands_past_the_end(shape):
    space = TokenSpace(*shape)
    tokens, lengths = space.sequences()
    for pad in (0, space.vocab_size - 1, GARBAGE):
        dirty = tokens.masked_fill(~length_mask(lengths, space.max_length), pad)
        indices = space.sequence_indices(dirty, lengths)
        torch.testing.assert_close(indices, torch.arange(space.num_sequences))


@in_all_spaces
def test_prefix_indices_and_state_ids_are_places_in_the_enumeration(shape):
    space = TokenSpace(*shape)
    tokens, _ = space.sequences()
    index, ids = space.prefix_indices(tokens), space.state_ids(tokens)
    states = []
    for t in range(space.max_length):
        level = brute_force.prefixes(space.vocab_size, t, space.eos_id)
        for row, y in enumerate(brute_force.sequences(*shape)):
            if t < len(y):
                assert level[index[row, t]] == y[:t]
        states += level
    for row, y in enumerate(brute_force.sequences(*shape)):
        assert [states[i] for i in ids[row, : len(y)]] == [y[:t] for t in range(len(y))]
        # Past the end the index means nothing, but a table can be read at it.
        assert all(0 <= index[row, t] < space.num_prefixes(t) for t in range(space.max_length))


@pytest.mark.parametrize("eos_id", [None, 0, 2, 4])
def test_rank_and_unrank_are_inverse_and_skip_eos(eos_id):
    space = TokenSpace(5, 2, eos_id)
    words = [a for a in range(5) if a != eos_id]
    ranks = torch.arange(space.branching)
    assert space.branching == len(words)
    torch.testing.assert_close(space.rank(torch.tensor(words)), ranks)
    torch.testing.assert_close(space.unrank(ranks), torch.tensor(words))
    if eos_id is not None:
        assert 0 <= space.rank(torch.tensor(eos_id)) < space.branching


@in_all_spaces
def test_spread_puts_each_state_under_its_parent_and_gather_children_undoes_it(shape):
    space = TokenSpace(*shape)
    for t in range(space.max_length - 1):
        parents = brute_force.prefixes(space.vocab_size, t, space.eos_id)
        states = brute_force.prefixes(space.vocab_size, t + 1, space.eos_id)
        values = torch.arange(2.0 * len(states)).reshape(2, -1) + 10
        spread = space.spread(values, fill=-7.0)
        assert spread.shape == (2, len(parents), space.vocab_size)
        for row, a in product(range(len(parents)), range(space.vocab_size)):
            want = values[:, states.index((*parents[row], a))] if a != space.eos_id else -7.0
            assert (spread[:, row, a] == want).all()
        torch.testing.assert_close(space.gather_children(spread), values)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_every_response_is_found_again_at_its_index(data):
    vocab_size = data.draw(st.integers(2, 7))
    eos_id = data.draw(st.none() | st.integers(0, vocab_size - 1))
    space = TokenSpace(vocab_size, data.draw(st.integers(1, 9)), eos_id)
    index = data.draw(st.integers(0, space.num_sequences - 1))
    tokens, lengths = space.sequences(index, index + 1)
    assert space.check(tokens, lengths).equal(lengths)
    assert space.sequence_indices(tokens, lengths).tolist() == [index]


# Rules of the MDP -----------------------------------------------------------------------------


def test_action_mask_leaves_only_eos_at_the_last_position_and_only_in_eos_mode():
    assert TokenSpace(3, 2).action_mask().all()
    mask = TokenSpace(3, 4, eos_id=1).action_mask()
    assert mask.shape == (4, 3)
    assert mask[:3].all()  # EOS too: EOS alone is a response
    assert mask[3].tolist() == [False, True, False]


@in_all_spaces
def test_every_state_has_the_actions_of_its_depth(shape):
    space = TokenSpace(*shape)
    want = [
        space.action_mask()[t].tolist()
        for t in range(space.max_length)
        for _ in brute_force.prefixes(shape[0], t, shape[2])
    ]
    assert space.state_action_mask().tolist() == want


@pytest.mark.parametrize("eos_id", [None, 0, 1, 2])
def test_ends_and_replaces_follow_the_rules(eos_id):
    space = TokenSpace(3, 3, eos_id)
    for a, t in product(range(3), range(3)):
        action, time = torch.tensor([a]), torch.tensor([t])
        last = t == 2
        assert bool(space.ends(action, time)) == (last or a == eos_id)
        assert bool(space.replaces(action, time)) == (eos_id is not None and last and a != eos_id)


# Checks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 0, -3, True])
def test_constructor_refuses_a_vocabulary_that_is_no_count(vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size must be an integer >= 2, got {vocab_size}"):
        TokenSpace(vocab_size, 3)


@pytest.mark.parametrize("max_length", [0, -1, True])
def test_constructor_refuses_a_length_that_is_no_count(max_length):
    with pytest.raises(ValueError, match=f"max_length must be an .* >= 1, got {max_length}"):
        TokenSpace(3, max_length)


@pytest.mark.parametrize("eos_id", [-1, 3, True])
def test_constructor_refuses_an_eos_that_is_no_token(eos_id):
    with pytest.raises(ValueError, match=r"eos_id must be a token id in \[0, 3\), or None"):
        TokenSpace(3, 3, eos_id)


def test_constructor_refuses_floats():
    # The type checks of the test run come before the constructor's own ValueError.
    for arguments, name in [
        ((2.0, 3), "vocab_size"),
        ((2, 3.0), "max_length"),
        ((2, 3, 1.0), "eos_id"),
    ]:
        with pytest.raises((ValueError, TypeError), match=name):
            TokenSpace(*arguments)


def test_check_finds_the_lengths_up_to_the_first_eos():
    space = TokenSpace(4, 4, eos_id=2)
    tokens = torch.tensor([[2, 0, 0, 0], [1, 3, 2, 2], [0, 0, 0, 2], [1, 2, GARBAGE, -5]])
    assert space.check(tokens).tolist() == [1, 3, 4, 2]
    assert space.check(tokens, torch.tensor([1, 3, 4, 2])).tolist() == [1, 3, 4, 2]
    assert space.find_lengths(tokens).tolist() == [1, 3, 4, 2]
    assert TokenSpace(4, 4).check(tokens[:3]).tolist() == [4, 4, 4]


@pytest.mark.parametrize("eos_id", [None, 1])
def test_check_takes_no_rows(eos_id):
    empty = torch.empty(0, 3, dtype=torch.int64)
    assert TokenSpace(3, 3, eos_id).check(empty).shape == (0,)


@pytest.mark.parametrize(
    ("eos_id", "tokens", "lengths", "message"),
    [
        (None, [[0, 1]], None, r"tokens has shape \(1, 2\), expected \(B, 3\)"),
        (None, 7, None, r"tokens has shape \(\), expected \(B, 3\)"),
        (None, [0, 1, 2], None, r"tokens has shape \(3,\), expected \(B, 3\)"),
        (None, [[0, 1, 2]], [3, 3], r"lengths has shape \(2,\), expected \(1,\)"),
        (None, [[0, 1, 2]], [0], r"lengths must be in \[1, 3\], got 0 to 0; they count the EOS"),
        (None, [[0, 1, 2], [0, 0, 0]], [3, 4], r"lengths must be in \[1, 3\], got 3 to 4"),
        (None, [[0, 1, 2], [0, 0, 0]], [3, 2], r"without an EOS every length is 3, got \[3, 2\]"),
        (None, [[0, 1, 3]], None, r"token ids must be in \[0, 3\), got 0 to 3"),
        (None, [[0, 1, -1]], None, r"token ids must be in \[0, 3\), got -1 to 1"),
        (2, [[0, 3, 2]], None, r"token ids must be in \[0, 3\), got 0 to 3"),
        (2, [[0, 0, 2], [0, 1, 0]], None, r"row 1 has no EOS \(id 2\): in EOS mode every"),
        (2, [[0, 0, 2]], [2], r"row 0 has no EOS"),  # the EOS stands past the end
        (2, [[0, 2, 2]], [3], "a response ends with its first EOS"),
    ],
)
def test_check_refuses_what_is_no_response(eos_id, tokens, lengths, message):
    lengths = None if lengths is None else torch.tensor(lengths)
    with pytest.raises(ValueError, match=message):
        TokenSpace(3, 3, eos_id).check(torch.tensor(tokens), lengths)


# Integers of other sizes ----------------------------------------------------------------------

in_other_integers = pytest.mark.parametrize("dtype", OTHER_INTEGERS, ids=str)


@pytest.fixture
def as_users_have_it(monkeypatch):
    """Annotations, which say int64, are checked in the tests alone."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@in_other_integers
@pytest.mark.parametrize("shape", [(8, 4, None), (8, 4, 5)], ids=str)
@pytest.mark.usefixtures("as_users_have_it")
def test_integers_of_any_size_count_as_int64(shape, dtype):
    space = TokenSpace(*shape)
    start = space.num_sequences - 300
    tokens, lengths = space.sequences(start)
    small, short, last = (x.to(dtype) for x in (tokens, lengths, lengths - 1))
    pairs = [
        (space.rank(small), space.rank(tokens)),
        (space.unrank(space.rank(tokens).to(dtype)), space.unrank(space.rank(tokens))),
        (space.prefix_indices(small), space.prefix_indices(tokens)),
        (space.state_ids(small), space.state_ids(tokens)),
        (space.sequence_indices(small, short), torch.arange(300) + start),
        (space.check(small, short), lengths),
        (space.check(small), lengths),
        (space.find_lengths(small), lengths),
        (length_mask(short, 4), length_mask(lengths, 4)),
        (space.ends(small[:, 0], last), space.ends(tokens[:, 0], lengths - 1)),
        (space.replaces(small[:, 0], last), space.replaces(tokens[:, 0], lengths - 1)),
    ]
    for got, want in pairs:
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.usefixtures("as_users_have_it")
def test_an_eos_past_the_small_integers_is_met_by_none_of_them():
    space = TokenSpace(400, 2, 300)
    small = torch.tensor([[44, 44]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="row 0 has no EOS"):
        space.find_lengths(small)
    last = torch.zeros(1, dtype=torch.uint8)
    assert not space.ends(small[:, 0], last).any()
    assert space.replaces(small[:, 0], last + 1).all()
    assert space.rank(small).tolist() == [[44, 44]]


@pytest.mark.usefixtures("as_users_have_it")
def test_what_are_no_integers_is_told():
    space, ids = TokenSpace(3, 2), torch.zeros(1, 2)
    for call in (space.prefix_indices, space.state_ids, space.find_lengths, space.check):
        with pytest.raises(TypeError, match="tokens must hold integers"):
            call(ids)
    with pytest.raises(TypeError, match="lengths must hold integers"):
        space.sequence_indices(ids.long(), torch.ones(1))


# Batches --------------------------------------------------------------------------------------


@in_other_integers
@pytest.mark.usefixtures("as_users_have_it")
def test_a_batch_of_any_integers_holds_int64(dtype):
    made = batch(3, True)
    small = Batch(*(x.to(dtype) for x in (made.tokens, made.lengths, made.prompt_ids)))
    for name in ("tokens", "lengths", "prompt_ids"):
        assert getattr(small, name).dtype == torch.int64
        assert torch.equal(getattr(small, name), getattr(made, name))


def batch(n, reward):
    tokens = torch.arange(3 * n).reshape(n, 3)
    rewards = torch.arange(n) / 7 if reward else None
    return Batch(tokens, 1 + torch.arange(n) % 3, torch.arange(n) % 2, rewards)


def test_mask_comes_from_the_lengths():
    assert len(batch(4, False)) == 4
    want = [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch(4, False).mask.int().tolist() == want


def test_cat_keeps_the_rows_in_order_and_rewards_only_where_all_have_them():
    both = Batch.cat([batch(2, True), batch(3, True)])
    for name in ("tokens", "lengths", "prompt_ids", "reward"):
        want = torch.cat([getattr(batch(2, True), name), getattr(batch(3, True), name)])
        torch.testing.assert_close(getattr(both, name), want)
    assert Batch.cat([batch(2, True), batch(3, False)]).reward is None
    assert Batch.cat([batch(2, False), batch(3, False)]).reward is None


def test_with_reward_and_to_leave_the_rest_alone():
    paid = batch(3, False).with_reward(torch.tensor([1.0, -2.0, 3.0]))
    assert paid.reward.tolist() == [1.0, -2.0, 3.0]
    assert paid.tokens.equal(batch(3, False).tokens)
    moved = paid.to("cpu")
    for name in ("tokens", "lengths", "prompt_ids", "reward"):
        assert getattr(moved, name).equal(getattr(paid, name))
    assert batch(3, False).to("cpu").reward is None
