"""The curves of a run are those of the batch that was drawn."""

from __future__ import annotations

import csv

import pytest
import torch
from run_cases import small_options
from toy_policies import seeded

import rl_ebm
from rl_ebm.agents import AGENTS
from rl_ebm.policies import Tabular
from rl_ebm.training.config import TrainConfig
from rl_ebm.training.loop import Trainer

SPACE = rl_ebm.TokenSpace(3, 3)


def trained_by(kind, options, run):
    """The rows of a run of two steps of an agent of this kind."""
    ebm = rl_ebm.EBM(SPACE, lambda tokens, lengths: tokens.double().sum(1))
    g = torch.Generator().manual_seed(0)
    agent = kind(ebm, Tabular(SPACE, generator=seeded(4)), options, g)
    Trainer(ebm, agent, g, TrainConfig(steps=2, log_every=1), run=run).train()
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_an_agent_that_does_not_say_shows_no_episodic_return(tmp_path):
    class Silent(AGENTS["soft-q"].agent):
        own_rows = None

    rows = trained_by(Silent, small_options("soft-q"), tmp_path)
    assert len(rows) == 2
    assert "charts/episodic_return" not in rows[0]
    assert all(row["charts/behaviour_return"] for row in rows)


def test_curves_are_those_of_the_batch_that_was_drawn_though_the_next_is_larger(tmp_path):
    class Growing(AGENTS["soft-q"].agent):
        def update(self, batch, progress):
            drawn.append((len(batch), batch.rewards(), batch.rewards()[self.own_rows]))
            found = super().update(batch, progress)
            self.batch_size.now *= 2
            return found

    drawn = []
    rows = trained_by(Growing, AGENTS["soft-q"].config(batch_size=16, explore=0.5), tmp_path)
    assert [len(own) for _, _, own in drawn] == [8, 16]
    for row, (size, rewards, own) in zip(rows, drawn, strict=True):
        assert float(row["charts/batch_size"]) == size
        assert float(row["charts/behaviour_return"]) == pytest.approx(float(rewards.mean()))
        assert float(row["charts/episodic_return"]) == pytest.approx(float(own.mean()))
