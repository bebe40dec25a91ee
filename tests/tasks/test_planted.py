"""The planted tasks: what is planted is there, and nothing else pays."""

from __future__ import annotations

import itertools

import pytest
import torch

import rl_ebm
from rl_ebm.envs import make_task
from rl_ebm.tasks.planted import STAR_ARMS, planted_modes


def scores_of(ebm):
    tokens, lengths = ebm.space.sequences()
    return tokens.tolist(), ebm.reward(tokens, lengths, torch.zeros_like(lengths)).tolist()


def test_scores_fall_with_the_distance_to_the_nearest_mode():
    space = rl_ebm.TokenSpace(2, 6)
    scores = planted_modes(space, 3, modes=4).tolist()
    rows = space.sequences()[0].tolist()
    modes = [y for y, s in zip(rows, scores, strict=True) if s == 0]
    assert 1 <= len(modes) <= 4
    for y, s in zip(rows, scores, strict=True):
        nearest = min(sum(a != b for a, b in zip(y, m, strict=True)) for m in modes)
        assert s == -2 * nearest
    assert scores != planted_modes(space, 4, modes=4).tolist()


def test_the_first_token_decides_what_the_last_may_be():
    ebm = make_task("lookahead", vocab_size=4, max_length=3, task_seed=1)
    good = {}
    for y, s in zip(*scores_of(ebm), strict=True):
        assert s in (0.0, -8.0)
        good.setdefault((y[0], y[-1]), set()).add(s)
    assert all(len(v) == 1 for v in good.values())  # the middle token changes nothing
    ways = [sum(good[a, b] == {0.0} for b in range(4)) for a in range(4)]
    assert all(1 <= n <= 3 for n in ways)


def test_one_response_in_ten_thousand_pays():
    _, scores = scores_of(make_task("sparse"))
    assert sorted(scores)[-2:] == [0.0, 12.0]
    assert len(scores) == 10_000
    _, scores = scores_of(make_task("sparse", vocab_size=3, max_length=2))
    assert sum(s > 0 for s in scores) == 1


def test_the_arm_of_the_goal_pays_most_and_no_node_is_on_two_arms():
    ebm = make_task("star", task_seed=2)
    tokens, lengths = ebm.space.sequences()
    arms = []
    for p in range(ebm.num_prompts):
        scores = ebm.reward(tokens, lengths, torch.full_like(lengths, p))
        assert sorted(scores[scores > 0].tolist()) == [2.0] * (STAR_ARMS - 1) + [8.0]
        arms.append(tokens[scores.argmax()].tolist())
    nodes = list(itertools.chain(*arms))
    assert len(set(nodes)) == len(nodes) == STAR_ARMS * 3


@pytest.mark.parametrize("name", ["planted", "lookahead", "sparse", "star"])
def test_sizes_that_a_task_does_not_have_are_refused(name):
    with pytest.raises(ValueError, match="fixed length"):
        make_task(name, eos_id=0)
    with pytest.raises(ValueError, match=r"smaller|vocab_size"):
        make_task(name, vocab_size=2 if name == "star" else 8, max_length=30)
