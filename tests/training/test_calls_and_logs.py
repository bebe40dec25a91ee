"""What a run costs and shows without being asked: calls of the reward, and rows of metrics."""

from __future__ import annotations

import math

import pytest
import torch
from run_cases import NETWORK, load_state, rows, small_options
from toy_policies import seeded

import rl_ebm
from rl_ebm.rewards import Automaton, TransformerReward
from rl_ebm.training import loop as training
from rl_ebm.training.config import TrainConfig
from rl_ebm.training.run import CALLED_UNASKED, is_cheap


class Counted:
    """A user's function, and how many responses it was asked about."""

    def __init__(self):
        self.calls = 0

    def __call__(self, tokens, lengths):
        self.calls += len(tokens)
        return tokens.double().sum(1)


def run(ebm, out, **arguments):
    given = {"options": small_options("soft-q"), "network": NETWORK, "steps": 2} | arguments
    return rl_ebm.train(ebm, out=out, **given)


@pytest.mark.parametrize(
    ("a", "t", "solve", "solved"),
    [
        (32, 4, None, False),  # a million sequences
        (4, 6, None, True),  # 4,096
        (4, 7, None, False),
        (4, 7, True, True),
        (4, 6, False, False),
    ],
)
def test_every_call_of_a_function_is_counted_and_solving_is_asked_for(
    a, t, solve, solved, tmp_path
):
    reward = Counted()
    ebm = rl_ebm.EBM(rl_ebm.TokenSpace(a, t), reward)
    _, report = run(ebm, tmp_path / "r", solve=solve)
    assert (report is not None) is solved
    last = rows(tmp_path / "r")[-1]
    counted = int(last["reward_calls"]), int(last["solution_calls"])
    assert counted == (32, a**t if solved else 0)
    assert reward.calls == sum(counted)
    assert load_state(tmp_path / "r")["reward_calls"] == 32


def test_an_agent_that_needs_the_solution_has_it_counted_or_says_so(tmp_path):
    reward = Counted()
    ebm = rl_ebm.EBM(rl_ebm.TokenSpace(4, 7), reward)
    _, report = rl_ebm.train(ebm, "exact", tmp_path / "r", network=NETWORK, steps=2)
    assert report.num_sequences == 4**7
    assert int(rows(tmp_path / "r")[-1]["solution_calls"]) == reward.calls == 4**7
    with pytest.raises(ValueError, match="leave out solve=False"):
        rl_ebm.train(ebm, "exact", network=NETWORK, steps=2, solve=False)


def test_what_is_solved_unasked():
    large = rl_ebm.TokenSpace(4, 7)
    assert CALLED_UNASKED < 4**7
    assert is_cheap(rl_ebm.EBM(large, torch.zeros(4**7)))
    assert is_cheap(rl_ebm.EBM(rl_ebm.TokenSpace(9, 99), Automaton.contains(
        rl_ebm.TokenSpace(9, 99), [1, 2])))  # fmt: skip
    assert is_cheap(rl_ebm.envs.make_task("pairwise"))
    network = TransformerReward(large, NETWORK)
    assert not is_cheap(rl_ebm.EBM(large, network))
    trl = rl_ebm.rewards.from_trl(lambda prompts, completions: [0.0] * len(prompts), str)
    assert not is_cheap(rl_ebm.EBM(large, trl))
    with pytest.raises(rl_ebm.TooLargeError):
        run(rl_ebm.EBM(rl_ebm.TokenSpace(50, 50), Counted()), None, solve=True)


def test_a_resumed_run_solves_as_it_was_asked_to(tmp_path):
    reward = Counted()
    ebm = rl_ebm.EBM(rl_ebm.TokenSpace(4, 7), reward)
    run(ebm, tmp_path / "r", solve=True)
    _, report, _ = rl_ebm.resume(tmp_path / "r", steps=3, reward=Counted())
    assert report.num_sequences == 4**7


@pytest.mark.parametrize(("steps", "want"), [(1, [1]), (7, [1, 4, 7]), (8, [1, 4, 8])])
def test_the_first_and_the_last_step_are_logged(steps, want, tmp_path):
    ebm = rl_ebm.EBM(rl_ebm.TokenSpace(3, 3), torch.randn(27, generator=seeded()))
    config = TrainConfig(steps=steps, log_every=4, eval_every=1e9)
    run(ebm, tmp_path / "r", steps=None, config=config)
    logged = [int(row["step"]) for row in rows(tmp_path / "r") if row["losses/loss"]]
    assert logged == want
    # Gone on with, nothing is there twice, and the new end is logged as well.
    rl_ebm.resume(tmp_path / "r", steps=steps + 2)
    logged = [int(row["step"]) for row in rows(tmp_path / "r") if row["losses/loss"]]
    assert logged == sorted(set(logged))
    assert logged[-1] == steps + 2


def test_slow_steps_are_logged_by_seconds(tmp_path, monkeypatch):
    ebm = rl_ebm.EBM(rl_ebm.TokenSpace(3, 3), torch.randn(27, generator=seeded()))
    monkeypatch.setattr(training, "LOG_SECONDS", 0.0)
    often, _ = run(ebm, tmp_path / "r", steps=6, config=TrainConfig(steps=6, log_every=1000))
    logged = [int(row["step"]) for row in rows(tmp_path / "r") if row["losses/loss"]]
    assert logged == [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(training, "LOG_SECONDS", math.inf)
    rare, _ = run(ebm, tmp_path / "s", steps=6, config=TrainConfig(steps=6, log_every=1000))
    logged = [int(row["step"]) for row in rows(tmp_path / "s") if row["losses/loss"]]
    assert logged == [1, 6]
    for one, other in zip(often.parameters(), rare.parameters(), strict=True):
        assert torch.equal(one, other)
