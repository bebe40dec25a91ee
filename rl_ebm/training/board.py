"""What a run shows in TensorBoard. The only module that writes there; x is global tokens."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from rl_ebm.files import EVENTS, create, marks, own_events
from rl_ebm.training.kinds import name_said
from rl_ebm.verification.sampled_report import AnyReport
from rl_ebm.verification.verify import State


class EventFile:
    """An event file, written by this process itself.

    TensorBoard's own writer opens its file by its name, whatever stands there, and dies of a full
    disk or a deleted folder in a thread of its own.

    Args:
        run: the run directory.
        of: names of event files of the same run.
    """

    def __init__(self, run: Path, of: Iterable[str] = ()) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.run = run
        self.mark = min(marks(of), default=secrets.token_hex(4))
        # The last part cannot be known before, so nothing can lie in wait under this name.
        end = f"{os.getpid()}.{self.mark}{secrets.token_hex(4)}"
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{end}"
        self.path = run / EVENTS.replace("*", name)
        self.file = create(self.path)
        self.records = RecordWriter(self.file)
        self.add_event(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.flush()

    def get_logdir(self) -> str:
        return str(self.run)

    def add_event(self, event: Any) -> None:
        self._told(lambda: self.records.write(event.SerializeToString()))

    def flush(self) -> None:
        self._told(self.records.flush)

    def close(self) -> None:
        self._told(self.records.close)

    def _told(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


class Board:
    """Writes scalars, histograms, a picture, the configuration and the final hparams.

    Args:
        run: the run directory; the event file goes into it.
        resume_at: global tokens of the checkpoint that a run goes on from; what TensorBoard
            has beyond is purged.
        of: names of the run's event files so far.
    """

    def __init__(self, run: Path, resume_at: int | None = None, of: Iterable[str] = ()) -> None:
        # Imported here: it takes a second, and reading a run does not need it.
        from torch.utils.tensorboard import FileWriter, SummaryWriter

        events = EventFile(run, of)

        class OwnFile(FileWriter):
            def __init__(self) -> None:
                self.event_writer = events

        class Writer(SummaryWriter):
            file_writer: Any
            all_writers: Any

            def _get_file_writer(self) -> Any:
                if self.file_writer is None:
                    self.file_writer = OwnFile()
                    self.all_writers = {str(run): self.file_writer}
                return self.file_writer

        self.run, self.mark = run, events.mark
        self.writer: Any = Writer(str(run))
        if resume_at is not None:
            self._purge(resume_at + 1)

    def _purge(self, step: int) -> None:
        """Make TensorBoard forget what it has seen from a step on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        files = self.writer.file_writer
        files.add_event(Event(step=step, file_version="brain.Event:2"))
        files.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def config(self, config: Mapping[str, Any]) -> None:
        text = json.dumps(config, indent=1)
        self.writer.add_text("config", "\n".join("    " + line for line in text.splitlines()), 0)

    def scalars(self, values: Mapping[str, float], tokens: int) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, tokens)
        self.writer.flush()

    def states(self, depths: list[State], tokens: int) -> None:
        """Histograms of per-state logit errors by depth, and the picture of both logits."""
        from rl_ebm.training.pictures import error_figure, figure_image

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
        flat |= {
            "task": name_said(config["ebm"]["reward"]),
            "beta": config["ebm"]["beta"],
        }
        metrics = {f"hparam/{name}": value for name, value in report.scalars().items()}
        for summary in hparams(flat, metrics):
            self.writer.file_writer.add_summary(summary)
        self.scalars(metrics, 0)

    def positions(self) -> dict[str, int]:
        """Size of every event file of the run, once all is on its way to the disk."""
        self.writer.flush()
        own = [path for path in own_events(self.run) if marks([path.name]) == {self.mark}]
        return {path.name: path.stat().st_size for path in own}

    def close(self) -> None:
        self.writer.close()
