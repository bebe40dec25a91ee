"""What a run shows: event files as TensorBoard reads them, metrics.csv, the pictures."""

from __future__ import annotations

import csv
import math
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from run_cases import (
    AGENT_PARAMS,
    NETWORK,
    killed_before_operation,
    load_state,
    small_options,
    train_args,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rl_ebm
from rl_ebm.cli import main
from rl_ebm.policies import Tabular
from rl_ebm.training.config import TrainConfig
from rl_ebm.training.metrics_csv import MetricsFile
from rl_ebm.training.pictures import error_figure, figure_image
from rl_ebm.training.run import train
from rl_ebm.verification.verify import logit_errors, verify

LOOK_OFTEN = {"steps": 6, "log_every": 2, "eval_every": 1e-9, "checkpoint_every": 1e-9}
EVENTS = "events.out.tfevents.*"


def read_events(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def read_rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", params=AGENT_PARAMS)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("events") / request.param
    assert main([*train_args(request.param, **LOOK_OFTEN), "--out", str(folder)]) == 0
    return folder


def test_the_promised_tags(run):
    tags = read_events(run).Tags()
    scalars = set(tags["scalars"])
    want = {"charts/tokens_per_second", "charts/learning_rate", "losses/loss", "losses/grad_norm"}
    if run.name != "exact":
        want |= {"charts/episodic_return", "charts/episodic_length"}
    want |= {"eval/elbo", "eval/eubo"}
    space = rl_ebm.TokenSpace(3, 3)
    policy = Tabular(space, logits_are_values=run.name == "soft-q")
    report = verify(policy, rl_ebm.solve(rl_ebm.EBM(space, torch.randn(27))))
    want |= {f"exact/{name}" for name in report.scalars()}
    want |= {f"hparam/{name}" for name in report.scalars()}
    assert want <= scalars
    assert {tag.split("/")[0] for tag in scalars} <= {"charts", "losses", "exact", "eval", "hparam"}
    assert tags["images"] == ["exact/logits"]
    assert tags["histograms"] == [f"exact_logit_error/depth_{t}" for t in range(3)]
    assert tags["tensors"] == ["config/text_summary"]


def test_the_configuration_and_hparams_are_shown(run):
    events = read_events(run)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert run.name in text
    assert "vocab_size" in text
    metadata = events.SummaryMetadata
    assert metadata("_hparams_/session_start_info").plugin_data.plugin_name == "hparams"
    final = read_rows(run)[-1]
    shown = events.Scalars("hparam/kl_target_policy")[0].value
    assert shown == pytest.approx(float(final["exact/kl_target_policy"]), rel=1e-6)


def test_x_is_global_tokens_and_the_files_agree(run):
    events, rows = read_events(run), read_rows(run)
    assert rows[-1]["step"] == "6"
    assert int(rows[-1]["tokens"]) == load_state(run)["tokens"]
    for tag in ("losses/loss", "exact/kl_target_policy"):
        filled = [row for row in rows if row[tag]]
        shown = events.Scalars(tag)
        assert [e.step for e in shown] == [int(row["tokens"]) for row in filled]
        for event, row in zip(shown, filled, strict=True):
            assert event.value == pytest.approx(float(row[tag]), rel=1e-6)
        assert all(x < y for x, y in pairwise(e.step for e in shown))
    for row in rows:
        assert float(row["seconds"]) >= 0
        assert None not in row
        assert not row["losses/loss"] or int(row["step"]) % 2 == 0 or row["step"] == "1"
    calls = 0 if run.name == "exact" else 16
    found = [int(row["reward_calls"]) + int(row.get("looked_up") or 0) for row in rows]
    assert found == [calls * int(row["step"]) for row in rows]


def test_the_report_of_the_end_is_the_verified_one(run):
    """The last exact row is that of the policy that is saved."""
    policy, ebm = rl_ebm.load(run)
    report = verify(policy, rl_ebm.solve(ebm))
    last = [row for row in read_rows(run) if row["exact/tv"]][-1]
    for name, value in report.scalars().items():
        assert float(last[f"exact/{name}"]) == pytest.approx(value, rel=1e-6, abs=1e-9), name
    events = read_events(run)
    shown = [events.Images("exact/logits"), events.Histograms("exact_logit_error/depth_2")]
    assert [[e.step for e in x] for x in shown] == [[int(last["tokens"])]] * 2
    elbo, eubo = float(last["eval/elbo"]), float(last["eval/eubo"])
    assert elbo == pytest.approx(report.log_z - report.kl_policy_target)
    assert eubo == pytest.approx(report.log_z + report.kl_target_policy)


@pytest.mark.slow
@pytest.mark.parametrize("number", [5, 9])
def test_after_a_kill_nothing_is_shown_twice(number, tmp_path):
    run = tmp_path / "run"
    args = [*train_args(**LOOK_OFTEN), "--out", str(run)]
    assert killed_before_operation(number, args, run, "state.pt")
    time.sleep(1.1)  # TensorBoard reads files in the order of their seconds
    assert main(["train", "--resume", str(run)]) == 0
    events, rows = read_events(run), read_rows(run)
    for tag in ("losses/loss", "exact/kl_target_policy", "charts/learning_rate"):
        steps = [e.step for e in events.Scalars(tag)]
        assert all(x < y for x, y in pairwise(steps)), (tag, steps)
        assert steps == [int(row["tokens"]) for row in rows if row[tag]]
    assert len(events.Images("exact/logits")) == 1
    looks = [(row["step"], bool(row["losses/loss"])) for row in rows]
    assert len(looks) == len(set(looks))


def test_an_extended_run_shows_nothing_twice(tmp_path):
    run = tmp_path / "run"
    assert main([*train_args(**LOOK_OFTEN), "--out", str(run)]) == 0
    time.sleep(1.1)  # TensorBoard reads files in the order of their seconds
    assert main(["train", "--resume", str(run), "--steps", "9"]) == 0
    steps = [e.step for e in read_events(run).Scalars("exact/kl_target_policy")]
    assert all(x < y for x, y in pairwise(steps)), steps
    looks = [(row["step"], bool(row["losses/loss"])) for row in read_rows(run)]
    assert len(looks) == len(set(looks))


def test_infinite_figures_are_in_the_table_and_break_nothing(tmp_path):
    space = rl_ebm.TokenSpace(2, 2)
    ebm = rl_ebm.EBM(space, torch.tensor([0.0, 1.0, -torch.inf, 2.0]))
    train(ebm, "exact", tmp_path, options=small_options("exact"), network=NETWORK, steps=2)
    assert read_rows(tmp_path)[-1]["exact/kl_policy_target"] == "inf"
    for tag in read_events(tmp_path).Tags()["scalars"]:
        if tag.startswith("exact/"):
            assert all(math.isfinite(e.value) for e in read_events(tmp_path).Scalars(tag))


def test_one_event_file_for_one_process(tmp_path):
    config = TrainConfig(steps=3, log_every=1)
    ebm = rl_ebm.EBM(rl_ebm.TokenSpace(2, 2), torch.zeros(4))
    train(ebm, out=tmp_path, options=small_options("soft-q"), network=NETWORK, config=config)
    assert len(list(tmp_path.glob(EVENTS))) == 1


# metrics.csv ------------------------------------------------------------------------------------


def test_a_new_name_becomes_a_column(tmp_path):
    path = tmp_path / "m.csv"
    metrics = MetricsFile(path)
    metrics.write({"step": 1, "a": 0.5})
    metrics.write({"step": 2, "b": 1.5})
    metrics.write({"b": 2.5, "step": 3})
    assert metrics.flush() == metrics.rows == 3
    metrics.close()
    assert path.read_text().split() == ["step,a,b", "1,0.5,", "2,,1.5", "3,,2.5"]


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_rows_that_follow_are_cut_off(keep, tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("step,a\r\n1,0.5\r\n2,0.25\r\n3,0.1")
    metrics = MetricsFile(path, keep)
    metrics.write({"step": 9, "a": 1.0})
    assert metrics.flush() == keep + 1
    metrics.close()
    with open(path, newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == [*["1", "2"][:keep], "9"]


def test_a_missing_metrics_file_begins_anew(tmp_path):
    metrics = MetricsFile(tmp_path / "m.csv", 4)
    metrics.write({"step": 5})
    assert metrics.flush() == 1
    metrics.close()


# Pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "scores"),
    [
        (rl_ebm.TokenSpace(3, 3), torch.randn(27)),
        (rl_ebm.TokenSpace(3, 3, 1), torch.randn(7)),
        (rl_ebm.TokenSpace(3, 1), torch.randn(3)),
        (rl_ebm.TokenSpace(3, 1, 0), torch.randn(1)),
        (rl_ebm.TokenSpace(2, 8), torch.randn(256)),
        (rl_ebm.TokenSpace(2, 2), torch.tensor([-torch.inf, -torch.inf, 0.0, -torch.inf])),
    ],
    ids=["fixed", "EOS", "T = 1", "one response", "wide", "-inf"],
)
def test_the_picture_of_errors(space, scores):
    solution = rl_ebm.solve(rl_ebm.EBM(space, scores))
    for policy in (Tabular(space), solution):  # a policy with errors, and one without
        image = figure_image(error_figure(logit_errors(policy, solution)))
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert image.min() < 50 < 200 < image.max()


def test_the_picture_shows_each_depth_and_the_largest_error_of_a_cell():
    space = rl_ebm.TokenSpace(2, 8)
    solution = rl_ebm.solve(rl_ebm.EBM(space, torch.randn(256)))
    states = logit_errors(Tabular(space), solution)
    axes = error_figure(states, max_columns=16).axes
    grid = np.asarray(axes[0].images[0].get_array())
    assert grid.shape == (8, 16)
    for t, state in enumerate(states):
        cells = state.linf.view(min(16, 2**t), -1).amax(1)
        cells = cells.repeat_interleave(16 // len(cells))
        np.testing.assert_allclose(grid[t], cells.numpy(), rtol=1e-6)
    points = axes[1].collections[0].get_offsets()
    assert points.shape == (2 * 255, 2)
    exact = torch.cat([s.q_star[s.allowed] for s in states]).numpy()
    learned = torch.cat([s.q[s.allowed] for s in states]).numpy()
    np.testing.assert_allclose(np.sort(points[:, 0]), np.sort(exact))
    np.testing.assert_allclose(np.sort(points[:, 1]), np.sort(learned))
