"""The EBM's score, against Python loops over every response; its checks and its copies."""

from __future__ import annotations

import copy
import math

import brute_force
import pytest
import torch
from brute_force import INF, log_softmax
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_policies import PROMPTS, SHAPES, Plain, close, everything, responses, scores_of, seeded

import rl_ebm
from rl_ebm.policies import Tabular, Uniform
from rl_ebm.rewards import Function
from rl_ebm.tokens import TokenSpace

in_all_spaces = pytest.mark.parametrize("shape", SHAPES, ids=str)


def sum_of_ids(tokens, lengths):
    return tokens.sum(1).double()


# log_weight = log_ref + R / beta ----------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    shape=st.sampled_from(SHAPES),
    beta=st.sampled_from([0.01, 0.7, 1.0, 30.0]),
    prompted=st.booleans(),
    forbid=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 10**6),
)
def test_log_weight_is_log_ref_plus_reward_over_beta(shape, beta, prompted, forbid, seed):
    space, prompts = TokenSpace(*shape), PROMPTS if prompted else None
    num_prompts = 3 if prompted else 1
    # The plain reference gives EOS no certainty at the last place, and NaN after an EOS.
    q = [
        torch.randn(num_prompts, len(states), space.vocab_size, generator=seeded(seed + t))
        for t in range(space.max_length)
        for states in [brute_force.prefixes(space.vocab_size, t, space.eos_id)]
    ]
    drop = [torch.rand(t.shape, generator=seeded(seed + 7)) < forbid for t in q]
    q = [t.masked_fill(d, -INF) for t, d in zip(q, drop, strict=True)]
    scores = scores_of(space, num_prompts, seed=seed)
    scores[torch.rand(scores.shape, generator=seeded(seed)) < forbid] = -INF
    scores[:, 0] = 1.0
    ebm = rl_ebm.EBM(space, scores if prompted else scores[0], beta, Plain(space, q), prompts)
    assert ebm.forbids == bool(torch.isneginf(scores).any())

    tokens, lengths, ids, pairs = everything(space, num_prompts)
    want = []
    for i, k in pairs:
        y, log_ref = responses(space)[k], 0.0
        for t, a in enumerate(y):
            if space.eos_id is None or t < space.max_length - 1:  # there log_ref(EOS) = 0
                log_ref += log_softmax(ebm.reference.rows[i, y[:t]])[a]
        want.append(log_ref + float(scores[i, k]) / beta)
    got = ebm.log_weight(tokens, lengths, ids)
    close(got, torch.tensor(want, dtype=torch.float64))


@in_all_spaces
@pytest.mark.parametrize("reference", [None, Uniform])
def test_without_reference_every_action_counts_one_and_a_uniform_one_shares(shape, reference):
    space = TokenSpace(*shape)
    scores = scores_of(space)
    ebm = rl_ebm.EBM(space, scores, 0.5, reference and reference(space))
    tokens, _ = brute_force.padded(responses(space), space.max_length)
    free = space.max_length - (space.eos_id is not None)  # the last EOS is forced
    decisions = torch.tensor([min(len(y), free) for y in responses(space)])
    log_ref = -decisions * math.log(space.vocab_size) if reference else 0.0
    close(ebm.log_weight(tokens), log_ref + scores / 0.5, 1e-6)  # log_ref is float32
    rows = ebm.log_ref_rows(tokens, torch.zeros(len(tokens), dtype=torch.int64))
    total = 1.0 if reference else space.action_mask().sum(1)
    want = total * torch.ones(tokens.shape)
    close(rows.exp().sum(-1).double(), want.double(), 1e-6)


def test_the_reference_of_eos_mode_is_a_distribution_over_responses():
    space = TokenSpace(3, 4, eos_id=2)
    reference = Tabular(space, scale=2.0, generator=seeded(), dtype=torch.float64)
    ebm = rl_ebm.EBM(space, lambda tokens, lengths: torch.zeros(len(tokens)), 1.0, reference)
    close(ebm.log_weight(*space.sequences()).exp().sum(), torch.tensor(1.0).double())


def test_scores_in_float32_are_weighed_in_float64():
    space = TokenSpace(2, 2)
    scores = scores_of(space, dtype=torch.float32)
    got = rl_ebm.EBM(space, scores, beta=0.1).log_weight(*space.sequences())
    close(got, scores.double() / 0.1, 1e-15)


def test_arguments_of_log_weight_are_checked():
    space = TokenSpace(3, 2, eos_id=0)
    ebm = rl_ebm.EBM(space, scores_of(space, 3), prompts=PROMPTS)
    tokens, lengths = space.sequences()
    with pytest.raises(ValueError, match=r"there are 3 prompts: give prompt_ids"):
        ebm.log_weight(tokens)
    with pytest.raises(ValueError, match=r"prompt_ids must be in \[0, 3\)"):
        ebm.log_weight(tokens, lengths, torch.full((3,), 3))
    with pytest.raises(ValueError, match="row 1 has no EOS"):
        ebm.log_weight(torch.tensor([[0, 0], [1, 2]]), prompt_ids=torch.zeros(2).long())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": 0.0}, ValueError, "beta must be a finite number > 0, got 0.0"),
        ({"beta": math.nan}, ValueError, "beta must be a finite number > 0, got nan"),
        ({"beta": INF}, ValueError, "beta must be a finite number > 0, got inf"),
        ({"prompts": []}, ValueError, "prompts is empty"),
        ({"prompts": [[0], [-1]]}, ValueError, "a prompt holds a negative token id"),
    ],
)
def test_an_ebm_that_cannot_be_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        rl_ebm.EBM(TokenSpace(2, 1), sum_of_ids, **arguments)


def test_reference_and_ebm_hold_equal_prompts():
    space = TokenSpace(2, 1)
    for theirs, ours in (([[0]], [[1]]), ([[0]], None), ([[], [0]], [[0], []])):
        with pytest.raises(ValueError, match="the reference was made for other prompts"):
            rl_ebm.EBM(space, Function(sum_of_ids), 1.0, Tabular(space, theirs), ours)
    for theirs, ours in (([[0]], [(0,)]), (None, [[1]]), ([[]], None)):
        rl_ebm.EBM(space, sum_of_ids, 1.0, Tabular(space, theirs), ours)


# Copies -----------------------------------------------------------------------------------------


def test_to_moves_the_table_and_the_reference_and_leaves_the_rest():
    space = TokenSpace(3, 2)
    scores = scores_of(space)
    scores[4] = -INF
    ebm = rl_ebm.EBM(space, scores, 0.3, Tabular(space), prompts=[[1]])
    moved = ebm.to("meta")
    assert moved.device.type == moved.reward_model.scores.device.type == "meta"
    assert moved.reference.table.device.type == "meta"
    assert (moved.beta, moved.space, moved.prompts) == (ebm.beta, ebm.space, ebm.prompts)
    assert moved.forbids
    assert ebm.device.type == ebm.reward_model.scores.device.type == "cpu"
    # A reference that is no module returns what it becomes.
    uniform = Uniform(space)
    uniform.to = lambda device: Tabular(space).to(device)
    assert rl_ebm.EBM(space, scores, 1.0, uniform).to("meta").reference.table.is_meta
    again = rl_ebm.EBM(space, scores).to("cpu")
    close(again.log_weight(*space.sequences()), scores, 0.0)
    function = rl_ebm.EBM(space, sum_of_ids, reference=Uniform(space)).to("cpu")
    assert function.log_weight(*space.sequences()).shape == (9,)


def test_a_deep_copy_shares_its_tensors_and_scores_alike():
    space = TokenSpace(3, 2)
    reference = Tabular(space, scale=1.0, generator=seeded())
    ebm = rl_ebm.EBM(space, scores_of(space), 0.3, reference)
    twin = copy.deepcopy({"ebm": ebm})["ebm"]
    assert twin is not ebm
    assert twin.reward_model.scores.data_ptr() == ebm.reward_model.scores.data_ptr()
    assert twin.reference is ebm.reference
    batch = space.sequences()
    close(twin.log_weight(*batch), ebm.log_weight(*batch), 0.0)
