"""What a run shows in TensorBoard. The only module that writes there; x is global tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rl_ebm.report_sampled import AnyReport
from rl_ebm.verify import State

EVENTS = "events.out.tfevents.*"


class Board:
    """Writes scalars, histograms, a picture, the configuration and the final hparams.

    Args:
        run: the run directory; the event file goes into it.
        resume_at: global tokens of the checkpoint that a run goes on from; what TensorBoard
            has beyond is purged.
    """

    def __init__(self, run: Path, resume_at: int | None = None) -> None:
        # Imported here: it takes a second, and reading a run does not need it.
        from torch.utils.tensorboard import SummaryWriter

        self.run = run
        self.writer: Any = SummaryWriter(
            str(run), purge_step=None if resume_at is None else resume_at + 1
        )

    def config(self, config: Mapping[str, Any]) -> None:
        text = json.dumps(config, indent=1)
        self.writer.add_text("config", "\n".join("    " + line for line in text.splitlines()), 0)

    def scalars(self, values: Mapping[str, float], tokens: int) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, tokens)

    def states(self, depths: list[State], tokens: int) -> None:
        """Histograms of per-state logit errors by depth, and the picture of both logits."""
        from rl_ebm.plots import error_figure, figure_image

        for t, state in enumerate(depths):
            errors = state.linf[torch.isfinite(state.linf)]
            if len(errors):
                self.writer.add_histogram(f"exact_logit_error/depth_{t}", errors, tokens)
        image = figure_image(error_figure(depths))
        self.writer.add_image("exact/logits", image, tokens, dataformats="HWC")

    def hparams(self, config: Mapping[str, Any], report: AnyReport) -> None:
        """The configuration with the final exact metrics, in the hparams view."""
        from torch.utils.tensorboard.summary import hparams

        flat = {
            f"{part}/{name}": value if isinstance(value, (int, float, str, bool)) else str(value)
            for part in ("policy", "agent", "train")
            for name, value in config[part].items()
            if value is not None
        }
        reward = config["ebm"]["reward"]
        flat |= {
            "task": reward["task"] if isinstance(reward, dict) else reward,
            "beta": config["ebm"]["beta"],
        }
        metrics = {f"hparam/{name}": value for name, value in report.scalars().items()}
        for summary in hparams(flat, metrics):
            self.writer.file_writer.add_summary(summary)
        self.scalars(metrics, 0)

    def positions(self) -> dict[str, int]:
        """Size of every event file of the run, once all is on its way to the disk."""
        self.writer.flush()
        return {path.name: path.stat().st_size for path in self.run.glob(EVENTS)}

    def close(self) -> None:
        self.writer.close()
