"""How many responses a step draws: fixed, or growing with the noise of the gradient."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rl_ebm
from rl_ebm import EBM, TokenSpace
from rl_ebm.agents import AGENTS
from rl_ebm.agents.shared.batch_size import EVERY, LOOKS, MOST, START, BatchSize, most_responses
from rl_ebm.policies import Tabular
from rl_ebm.training.config import TrainConfig

GROWING = ("vargrad", "soft-q", "path-consistency", "policy-gradient", "ppo", "dpg")


def _fed(sizes: BatchSize, signal: float, steps: int, seed: int = 0) -> None:
    """Gradients whose mean has norm ``signal``, and noise of variance 1 / batch."""
    generator = torch.Generator().manual_seed(seed)
    weights = nn.Parameter(torch.zeros(4000))
    mean = torch.randn(4000, generator=generator)
    mean *= signal / mean.norm()
    for _ in range(steps):
        noise = torch.randn(4000, generator=generator) / (4000 * sizes.now) ** 0.5
        weights.grad = mean + noise
        sizes.saw([weights])


@pytest.mark.parametrize("noise_scale", [200.0, 500.0, 1500.0])
def test_it_grows_until_noise_does_not_dominate(noise_scale: float) -> None:
    """B >= B_noise, the variance of one response over |G|^2, and no more than a look late."""
    sizes = BatchSize(None)
    _fed(sizes, noise_scale**-0.5, 1000)
    assert noise_scale / 1.3 <= sizes.now <= 2.6 * noise_scale


def test_it_stays_small_where_there_is_no_noise() -> None:
    sizes = BatchSize(None)
    _fed(sizes, 100.0, 500)
    assert sizes.now == START


def test_noise_alone_makes_it_as_large_as_it_may_be() -> None:
    sizes = BatchSize(None)
    _fed(sizes, 1e-9, EVERY * (LOOKS + 12))
    assert sizes.now == MOST


def test_a_fixed_one_is_never_looked_at() -> None:
    sizes = BatchSize(48)
    _fed(sizes, 1e-9, 200)
    assert (sizes.now, sizes.steps, sizes.state_dict()) == (48, 0, {})


@pytest.mark.parametrize(
    ("space", "prompts", "most"),
    [
        (TokenSpace(8, 4), 1, MOST),  # 585 states, which all responses share
        (TokenSpace(8, 4), 8, 1024),  # 4,680
        (TokenSpace(4, 8), 1, 512),
        (TokenSpace(64, 16), 1, 256),
        (TokenSpace(64, 500), 1, START),
    ],
)
def test_a_step_evaluates_only_so_many_states(space: TokenSpace, prompts: int, most: int) -> None:
    reward = CountReward()
    ebm = EBM(space, reward, prompts=[[i] for i in range(prompts)])
    assert most_responses(ebm) == most


class CountReward:
    """Length of a response: nothing is listed."""

    def __call__(self, tokens: Tensor, lengths: Tensor, prompt_ids: Tensor) -> Tensor:
        return lengths.double()


def test_least_goes_before_most() -> None:
    assert BatchSize(None, least=100).now == 100
    assert BatchSize(None, least=100, most=50).now == 100
    assert BatchSize(None, most=20).now == 20


@pytest.mark.parametrize("stop", [EVERY, EVERY + 1, EVERY * LOOKS + 5])
def test_it_goes_on_from_its_state(stop: int) -> None:
    """Also between the two steps of a look: the first gradient waits in the state."""
    whole, first, rest = BatchSize(None), BatchSize(None), BatchSize(None)
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(EVERY * (LOOKS + 3), 50, generator=generator)
    weights = nn.Parameter(torch.zeros(50))
    for i, gradient in enumerate(gradients):
        weights.grad = gradient
        whole.saw([weights])
        if i == stop:
            rest.load_state_dict(first.state_dict(), [weights])
        (first if i < stop else rest).saw([weights])
    assert rest.now == whole.now > START
    assert rest.cosine == whole.cosine


@pytest.mark.parametrize(
    "wrong",
    [
        {"now": 0},
        {"now": 2**20},
        {"steps": -1},
        {"looks": 5},
        {"cosine": 7.0},
        {"before": torch.ones(3)},
        {"before": torch.tensor([float("nan")])},
    ],
)
def test_a_state_that_it_never_has_is_refused(wrong: dict[str, Any]) -> None:
    state = BatchSize(None).state_dict()["batch_size"] | wrong
    with pytest.raises(ValueError, match="growing batch"):
        BatchSize(None).load_state_dict({"batch_size": state}, [nn.Parameter(torch.zeros(1))])


def test_what_grew_where_more_fits_stays_as_it_is() -> None:
    state = BatchSize(None).state_dict()["batch_size"] | {"now": 1024}
    small = BatchSize(None, most=256)
    small.load_state_dict({"batch_size": state}, [])
    assert small.now == 1024


def test_parameters_without_a_gradient_count_as_zero() -> None:
    """As of experts, of which each step has others."""
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(5, dtype=torch.float64))
    sizes = BatchSize(None)
    for step in range(1, EVERY * LOOKS + 2):
        a.grad, b.grad = (torch.ones(3), None) if step % 2 else (None, torch.ones(5).double())
        sizes.saw([a, b])
    assert sizes.looks == LOOKS
    assert sizes.cosine == 0
    assert sizes.now == 2 * START


def _ebm(seed: int = 0) -> EBM:
    space = TokenSpace(3, 3)
    generator = torch.Generator().manual_seed(seed)
    return EBM(space, torch.randn(space.num_sequences, generator=generator), beta=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", GROWING)
def test_by_default_agents_draw_more_as_they_learn(name: str) -> None:
    ebm, entry = _ebm(), AGENTS[name]
    policy = Tabular(ebm.space, logits_are_values=entry.agent.logits_are_values)
    generator = torch.Generator().manual_seed(0)
    agent = entry.agent(ebm, policy, entry.config(lr=0.05), generator)
    sizes = []
    for _ in range(400):
        batch = ebm.score(agent.sample())
        sizes.append(len(batch))
        agent.update(batch, 0.5)
    assert sizes[0] == START
    assert sizes == sorted(sizes)
    assert sizes[-1] > START


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("stop", [EVERY, 3 * EVERY + 4])
def test_an_agent_goes_on_to_the_last_bit(name: str, stop: int) -> None:
    """Also between the two steps of a look, and after the batch has grown."""
    ebm, entry = _ebm(), AGENTS[name]

    def made(seed: int) -> tuple[Any, Tabular, torch.Generator]:
        torch.manual_seed(seed)
        policy = Tabular(ebm.space, logits_are_values=entry.agent.logits_are_values)
        generator = torch.Generator().manual_seed(seed)
        return entry.agent(ebm, policy, entry.config(lr=0.05), generator), policy, generator

    def run(agent: Any, steps: int) -> None:
        for _ in range(steps):
            agent.update(ebm.score(agent.sample()), 0.5)

    whole, expected, _ = made(0)
    run(whole, 6 * EVERY)
    first, policy, generator = made(0)
    run(first, stop)
    rest, found, other = made(1)
    found.load_state_dict(policy.state_dict())
    other.set_state(generator.get_state())
    rest.load_state_dict(first.state_dict())
    run(rest, 6 * EVERY - stop)
    assert rest.batch_size.now == whole.batch_size.now
    for x, y in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(x, y)


def test_the_curves_are_of_what_was_drawn(tmp_path: Path) -> None:
    """Also of the step after which the batch grows: its first half is the explorer's."""
    run, config = tmp_path / "run", TrainConfig(steps=200, log_every=1, eval_every=1e9)
    rl_ebm.train(_ebm(), "vargrad", run, network="tabular", config=config, progress=False)
    rows = [row for row in read_csv(run) if row["charts/batch_size"]]
    assert len({row["charts/batch_size"] for row in rows}) > 1
    assert all(float(row["charts/episodic_length"]) == 3 for row in rows)


def test_a_run_of_responses_goes_on_with_steps(tmp_path: Path) -> None:
    run, config = tmp_path / "run", TrainConfig(responses=300)
    rl_ebm.train(_ebm(), "vargrad", run, network="tabular", config=config, progress=False)
    assert not rl_ebm.resume(run)[2]
    assert rl_ebm.resume(run, steps=40)[2]


def test_an_agent_that_draws_nothing_ends_as_well(tmp_path: Path) -> None:
    """Each of its steps counts as 4,096 responses."""
    run, config = tmp_path / "run", TrainConfig(responses=2 * 4096 + 1, log_every=1)
    rl_ebm.train(_ebm(), "exact", run, network="tabular", config=config, progress=False)
    assert max(int(row["step"]) for row in read_csv(run)) == 3


def test_a_tree_keeps_its_memory() -> None:
    ebm, entry = _ebm(), AGENTS["tree-backup"]
    options = entry.config(batch_size=None, memory=2 * (1 + 64 * 3))
    agent = entry.agent(ebm, Tabular(ebm.space), options, torch.Generator())
    assert agent.batch_size.most == 64


def test_a_run_ends_after_so_many_responses(tmp_path: Path) -> None:
    """With the step that reaches them, whatever its size."""
    ebm, run = _ebm(), tmp_path / "run"
    config = TrainConfig(responses=1000, log_every=1, eval_every=1e9)
    rl_ebm.train(ebm, "vargrad", run, network="tabular", config=config, progress=False)
    rows = read_csv(run)
    drawn = [int(row["reward_calls"]) for row in rows if row["reward_calls"]]
    assert max(drawn) >= 1000
    assert sorted(set(drawn))[-2] < 1000


def read_csv(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))
