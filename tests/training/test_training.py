"""The loop: what its numbers depend on, and what stops it."""

from __future__ import annotations

import math

import pytest
import torch
from run_cases import (
    HANGS,
    NETWORK,
    differences,
    every_agent,
    load_state,
    small_options,
    start,
    train_args,
)

import rl_ebm
from rl_ebm.agents import AGENTS, SoftQConfig, TeacherForcingConfig
from rl_ebm.policies import Tabular, Transformer
from rl_ebm.training import loop as training
from rl_ebm.training.checkpoint import RunError
from rl_ebm.training.config import TrainConfig
from rl_ebm.training.directory import load
from rl_ebm.training.loop import NonFiniteError
from rl_ebm.training.run import resume, solution_for_training, train

SPACE = rl_ebm.TokenSpace(3, 3)


def table(space: rl_ebm.TokenSpace = SPACE) -> rl_ebm.EBM:
    generator = torch.Generator().manual_seed(1)
    return rl_ebm.EBM(space, torch.randn(space.num_sequences, generator=generator))


def weights(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in policy.state_dict().items()}


def short(agent: str = "soft-q", ebm: rl_ebm.EBM | None = None, **kwargs):
    """A tiny run: the policy's weights, and the report."""
    options = small_options(agent) if agent in AGENTS else None
    arguments = {"options": options, "network": NETWORK, "steps": 6} | kwargs
    policy, report = train(table() if ebm is None else ebm, agent, **arguments)
    return weights(policy), report


@every_agent
def test_the_same_seed_gives_the_same_run(agent):
    first, _ = short(agent, seed=3)
    assert differences(first, short(agent, seed=3)[0]) == []
    assert differences(first, short(agent, seed=4)[0])


@pytest.mark.slow
@every_agent
def test_looking_does_not_change_the_run(agent, tmp_path):
    """Evaluating, logging and checkpointing draw from no generator of the training."""
    rare = TrainConfig(steps=6, log_every=1000, eval_every=1e9, checkpoint_every=1e9)
    often = TrainConfig(steps=6, log_every=1, eval_every=1e-9, checkpoint_every=1e-9)
    want, _ = short(agent)
    for name, config in (("rare", rare), ("often", often)):
        got, _ = short(agent, steps=None, config=config, out=tmp_path / name)
        assert differences(want, got) == []
    assert differences(load_state(tmp_path / "rare"), load_state(tmp_path / "often")) == []


@every_agent
def test_the_global_generator_is_left_alone(agent, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, _ = short(agent, out=tmp_path / "r")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert differences(first, short(agent)[0]) == []


def test_the_counts(tmp_path):
    short(out=tmp_path / "r", options=SoftQConfig(batch_size=10))
    state = load_state(tmp_path / "r")
    assert (state["step"], state["reward_calls"], state["tokens"]) == (6, 60, 180)
    assert state["seconds"] > 0
    # The exact agent reads every state of every prompt, and calls no reward.
    short("exact", out=tmp_path / "e")
    state = load_state(tmp_path / "e")
    assert (state["step"], state["reward_calls"], state["tokens"]) == (6, 0, 6 * 13)


def test_tokens_of_eos_mode_are_the_real_ones(tmp_path):
    space = rl_ebm.TokenSpace(3, 4, 0)
    short(ebm=table(space), out=tmp_path / "r", options=SoftQConfig(batch_size=50))
    tokens = load_state(tmp_path / "r")["tokens"]
    assert 6 * 50 < tokens < 4 * 6 * 50


def test_nothing_is_written_without_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, report = short()
    assert report.mode == "exact-tree"
    assert list(tmp_path.iterdir()) == []


def test_no_steps_leave_the_start(tmp_path):
    got, report = short(steps=0, out=tmp_path / "r", seed=2)
    assert load_state(tmp_path / "r")["step"] == 0
    assert report.mode == "exact-tree"
    with torch.random.fork_rng():
        torch.manual_seed(2)
        policy = Transformer(SPACE, NETWORK, logits_are_values=True)
        assert differences(weights(policy), got) == []


def test_kinds_of_policies():
    policy, _ = train(table(), options=small_options("soft-q"), network="tabular", steps=1)
    assert isinstance(policy, Tabular)
    assert policy.logits_are_values
    policy, _ = train(table(), "policy-gradient", steps=1, network=NETWORK,
                      options=small_options("policy-gradient"))  # fmt: skip
    assert isinstance(policy, Transformer)
    assert not policy.logits_are_values


def test_seconds_limit_a_run(tmp_path):
    _, report = short(steps=None, seconds=0.2, out=tmp_path / "r")
    assert report.mode == "exact-tree"
    seconds = load_state(tmp_path / "r")["seconds"]
    assert 0.2 <= seconds < 5
    short(steps=3, seconds=1e6, out=tmp_path / "s")  # whichever comes first
    assert load_state(tmp_path / "s")["step"] == 3


def test_trained_seconds_add_up_over_processes(tmp_path):
    short(out=tmp_path / "r")
    torch.save(load_state(tmp_path / "r") | {"seconds": 100.0}, tmp_path / "r" / "state.pt")
    assert resume(tmp_path / "r", steps=7)[2]
    seconds = load_state(tmp_path / "r")["seconds"]
    assert 100 < seconds < 105
    assert not resume(tmp_path / "r", seconds=100.0)[2]
    assert resume(tmp_path / "r", seconds=seconds + 0.05)[2]
    assert seconds + 0.05 <= load_state(tmp_path / "r")["seconds"] < 110
    assert not resume(tmp_path / "r")[2]  # the new limit was written down


def test_progress_is_the_larger_share():
    config, generator = TrainConfig(steps=10, seconds=4.0), torch.Generator()
    agent = AGENTS["soft-q"].agent(table(), Tabular(SPACE), None, generator)
    trainer = training.Trainer(table(), agent, generator, config)
    trainer.step, trainer.seconds = 3, 1.0
    assert trainer.progress == 0.3
    trainer.seconds = 3.0
    assert trainer.progress == 0.75
    assert not trainer.finished
    trainer.step = 10
    assert trainer.finished


# Wrong arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps must be >= 0, got -1"),
        ({"seconds": -1.0}, "seconds must be a finite number >= 0, got -1"),
        ({"seconds": math.inf}, "seconds must be a finite number >= 0, got inf"),
        ({"seconds": math.nan}, "seconds must be a finite number >= 0, got nan"),
        ({"steps": 1, "log_every": 0}, "log_every must be >= 1, got 0"),
        ({"steps": 1, "eval_every": 0.0}, "must be > 0 seconds"),
        ({"steps": 1, "checkpoint_every": math.nan}, "must be > 0 seconds"),
    ],
)
def test_a_bad_config_dies_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"agent": "softq"}, "no agent 'softq': did you mean 'soft-q'"),
        ({"options": TeacherForcingConfig()}, "must be a SoftQConfig, got TeacherForcingConfig"),
        ({"network": "lstm"}, "policy must be .transformer.*tabular.*got .lstm."),
        ({"steps": -2}, "steps must be >= 0, got -2"),
    ],
)
def test_wrong_arguments_write_nothing(arguments, message, tmp_path):
    run = tmp_path / "r"
    with pytest.raises(ValueError, match=message):
        short(out=run, **arguments)
    assert not run.exists()


def test_a_run_is_not_overwritten_unasked(tmp_path):
    short(out=tmp_path / "r", seed=1)
    with pytest.raises(RunError, match=r"holds a run already.*--resume .*--overwrite"):
        short(out=tmp_path / "r")
    other = tmp_path / "r" / "events.out.tfevents.1700000000.host.7.0"
    other.write_text("mine")
    another = other.with_name("events.out.tfevents.1700000000.host.7.0123456789abcdef")
    another.write_text("another run's")
    short(out=tmp_path / "r", seed=2, overwrite=True)
    assert differences(short(seed=2)[0], load_state(tmp_path / "r")["policy"]) == []
    assert other.read_text() == "mine"
    assert another.read_text() == "another run's"
    assert len(list((tmp_path / "r").glob("events*"))) == 3


def test_a_run_that_cannot_begin_does_not_delete_another(tmp_path):
    short(out=tmp_path / "r")
    before = load_state(tmp_path / "r")
    forbids = rl_ebm.EBM(SPACE, torch.full((27,), -torch.inf).index_fill(0, torch.tensor(3), 0.0))
    with pytest.raises(ValueError, match="forbidden_log_weight"):
        short(ebm=forbids, out=tmp_path / "r", overwrite=True)
    assert differences(before, load_state(tmp_path / "r")) == []


def test_files_that_are_no_run_are_not_deleted(tmp_path):
    for name in (
        "metrics.csv",
        "report.json",
        "events.out.tfevents.1700000000.a.b.7.0123abcd01234567",
    ):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="folder"):
        short(out=tmp_path)
    assert {p.read_text() for p in tmp_path.iterdir()} == {"mine"}


# Too large, and not finite ----------------------------------------------------------------------


def by_sum(tokens, lengths):
    return tokens.double().sum(1)


def test_a_function_that_is_too_large_to_solve_trains_without_exact_metrics(tmp_path):
    ebm = rl_ebm.EBM(rl_ebm.TokenSpace(8, 8), by_sum)
    assert solution_for_training(ebm, needed=False) is None
    _, report = short(ebm=ebm, out=tmp_path / "r", config=TrainConfig(steps=6, log_every=2),
                      steps=None)  # fmt: skip
    assert report is None
    header = (tmp_path / "r" / "metrics.csv").read_text().splitlines()[0]
    assert "losses/loss" in header
    assert "exact/" not in header
    assert solution_for_training(table(), needed=False).mode == "exact-tree"


@pytest.mark.parametrize("where", ["files", "nowhere"])
@pytest.mark.parametrize("solved", [True, False])
def test_a_learning_rate_too_large_is_told(where, solved, tmp_path):
    """Without a log, an evaluation or a file on the way as well: no NaN is handed out."""
    ebm = table() if solved else rl_ebm.EBM(rl_ebm.TokenSpace(8, 8), by_sum)
    options = SoftQConfig(batch_size=8, lr=1e30, max_grad_norm=1e30)
    out = tmp_path / "r" if where == "files" else None
    with pytest.raises(NonFiniteError, match=r"NaN or infinite at step \d+.*learning rate"):
        short(ebm=ebm, options=options, out=out)
    if out is not None and solved:
        assert load_state(out)["step"] == 0
        policy, _ = load(out)
        assert all(bool(x.isfinite().all()) for x in policy.parameters())


@pytest.mark.parametrize("steps", [1, 2])
def test_weights_that_are_not_finite_are_never_saved(steps, tmp_path):
    """The loss of the last step is finite; what the step made of the weights is not."""
    options = SoftQConfig(batch_size=8, lr=1e38)
    with pytest.raises(NonFiniteError, match=r"step \d"):
        short(options=options, steps=steps, out=tmp_path / "r")
    policy, _ = load(tmp_path / "r")
    assert all(bool(x.isfinite().all()) for x in policy.parameters())


class Spoiled:
    """A reward that is spoiled from one training batch on."""

    def __init__(self, good_calls: int, bad: float) -> None:
        self.good_calls, self.bad = good_calls, bad
        self.calls = 0

    def __call__(self, tokens, lengths):
        values = tokens.double().sum(1)
        if len(tokens) != 16:  # solving
            return values
        self.calls += 1
        return values if self.calls <= self.good_calls else torch.full_like(values, self.bad)


@pytest.mark.usefixtures("saves_at_each_step")
@pytest.mark.parametrize("agent", ["soft-q", "policy-gradient"])
def test_an_infinite_loss_names_its_step_and_keeps_the_checkpoint(agent, tmp_path):
    often = TrainConfig(steps=30, log_every=4, checkpoint_every=1e-9)
    ebm = rl_ebm.EBM(SPACE, Spoiled(9, -math.inf))
    with pytest.raises(NonFiniteError, match=r"at step 10; the checkpoint of step 9 is kept in"):
        short(agent, ebm, steps=None, config=often, out=tmp_path / "r")
    assert load_state(tmp_path / "r")["step"] == 9
    load(tmp_path / "r", reward=by_sum)
    # Checked where the run is looked at, the first bad step is named all the same.
    rare = TrainConfig(steps=30, log_every=14, checkpoint_every=1e9)
    ebm = rl_ebm.EBM(SPACE, Spoiled(9, -math.inf))
    with pytest.raises(NonFiniteError, match=r"at step 10; the checkpoint of step 0 is kept in"):
        short(agent, ebm, steps=None, config=rare, out=tmp_path / "s")


@pytest.mark.usefixtures("saves_at_each_step")
def test_a_reward_that_becomes_nan_keeps_the_checkpoint(tmp_path):
    often = TrainConfig(steps=30, checkpoint_every=1e-9)
    with pytest.raises(ValueError, match="nan"):
        short(ebm=rl_ebm.EBM(SPACE, Spoiled(9, math.nan)), steps=None, config=often,
              out=tmp_path / "r")  # fmt: skip
    assert load_state(tmp_path / "r")["step"] == 9


def test_a_step_reads_no_number_from_the_device(monkeypatch):
    """No .item(), float(), int() or bool() of a tensor between two looks at a run."""
    reads = []

    def counted(name):
        real = getattr(torch.Tensor, name)

        def read(self, *args):
            reads.append(name)
            return real(self, *args)

        return read

    rare = TrainConfig(steps=12, log_every=10**9, eval_every=1e9, checkpoint_every=1e9)
    counts = {}
    monkeypatch.setattr(training, "MAX_EVALUATED", 0)
    for name in ("item", "tolist", "__int__", "__float__", "__bool__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    # A tree grows by what was drawn: how much that is must be known, on a device too.
    for agent in AGENTS.keys() - {"tree-backup"}:
        for steps in (3, 6):
            reads.clear()
            short(agent, config=rare, steps=steps)
            counts[agent, steps] = len(reads)
        assert counts[agent, 3] == counts[agent, 6], agent


@pytest.mark.slow
def test_compile_trains(tmp_path):
    """In a process of its own: what is compiled cannot be checked for shapes on the way."""
    process = start([*train_args(steps=2), "--compile", "--out", str(tmp_path / "r")])
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert load_state(tmp_path / "r")["step"] == 2
    assert load(tmp_path / "r")
