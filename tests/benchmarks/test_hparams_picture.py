"""The picture of TensorBoard's hparams view is made of what event files hold."""

from __future__ import annotations

import pytest

import rl_ebm
from benchmarks.readme.hparams import Options as HparamsOptions
from benchmarks.readme.hparams import main, picture, read
from rl_ebm.envs import make_task


@pytest.mark.slow
def test_runs_are_read_from_their_event_files(tmp_path):
    task = make_task("lookahead", beta=0.5)
    reports = {}
    for agent, batch in (("vargrad", 16), ("grpo", 32), ("exact", None)):
        config = rl_ebm.agents.AGENTS[agent].config
        options = config() if batch is None else config(batch_size=batch)
        network = rl_ebm.policies.TransformerConfig(1, 1, 8, 8)
        source = {"task": "lookahead", "task_seed": 0}
        _, report = rl_ebm.train(
            task,
            agent,
            tmp_path / agent,
            options=options,
            steps=2,
            network=network,
            source=source,
        )
        reports[agent] = (batch, report.kl_policy_target)
    rows = read(tmp_path)
    assert len(rows) == 3
    for row in rows:
        batch, kl = reports[row["agent/name"]]
        assert row.get("options: batch_size") == batch
        assert row["hparam/kl_policy_target"] == pytest.approx(kl, rel=1e-5)
        assert row["task"] == "lookahead"
        assert row["beta"] == 0.5
    lines = picture(rows).axes[0].lines
    # One for each axis, and one for each run.
    assert len(lines) >= 3 + 4
    main(HparamsOptions(tmp_path, tmp_path / "h.png"))
    assert (tmp_path / "h.png").stat().st_size > 1000


def test_a_folder_without_runs_is_told(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        main(HparamsOptions(tmp_path, tmp_path / "h.png"))
