"""The one training loop, for every agent: sample, score, update; log, verify, checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from rl_ebm.agents import Agent
from rl_ebm.agents.shared.account import scored
from rl_ebm.ebm import EBM
from rl_ebm.exact import LISTED, Solution
from rl_ebm.files import METRICS, POLICY, REPORT, STATE, RunError, own_files, write_text
from rl_ebm.files.tensors import holds, save_tensors
from rl_ebm.training.board import Board
from rl_ebm.training.charts import Drawn, batch_charts, drawn_charts
from rl_ebm.training.checkpoint import save_state
from rl_ebm.training.config import LOG_SECONDS, UNDRAWN
from rl_ebm.training.config import TrainConfig as TrainConfig
from rl_ebm.training.directory import cut_back, forget, keep_weights, remove_parts
from rl_ebm.training.metrics_csv import MetricsFile, read_kept
from rl_ebm.training.pace import Pace
from rl_ebm.training.reward_calls import calls_of
from rl_ebm.training.saved_state import restored
from rl_ebm.training.stopping import Asked, Interrupted, stops_between_steps
from rl_ebm.verification.along_samples import samples_at
from rl_ebm.verification.sampled_report import AnyReport, SampledReport
from rl_ebm.verification.verify import logit_errors, verify

MAX_EVALUATED = 2**17
"""more states than this are listed only when asked to: it would take longer than training"""
SMALL = 2**20
"""parameters below which a checkpoint, up to 16 MB beside what is remembered, is never put off"""


def looks_at_all(ebm: EBM) -> bool:
    """Whether looks at a run go through every prefix, unasked; else along samples."""
    states = ebm.num_prompts * ebm.space.num_states
    return states <= MAX_EVALUATED and states * ebm.space.vocab_size <= LISTED


class NonFiniteError(RunError):
    """A loss or a gradient became NaN or infinite."""


class Trainer:
    """Trains one agent on one EBM, into a run directory or into nothing.

    Everything that the run depends on is in its checkpoints: a run that is killed and goes on
    ends as one that was not (bit by bit on a CPU, where steps alone limit it).

    Args:
        ebm: what is distilled.
        agent: an agent whose policy is trained.
        generator: the generator that the agent draws from.
        config: when to stop and to look.
        solution: the exact solution, for exact metrics on the way; None for none. Calls of the
            reward that it took are counted apart from those of the training.
        run: directory of the files; None writes nothing.
        description: the run's whole configuration, shown in TensorBoard.
        progress: show a bar; None where standard error is a terminal.

    Raises:
        ValueError: a config without an end.
    """

    def __init__(
        self,
        ebm: EBM,
        agent: Agent,
        generator: torch.Generator,
        config: TrainConfig,
        solution: Solution | None = None,
        run: Path | None = None,
        description: Mapping[str, Any] | None = None,
        progress: bool | None = None,
    ) -> None:
        if config.endless:
            raise ValueError("a run needs an end: give its TrainConfig steps, seconds or responses")
        self.ebm, self.agent, self.generator, self.config = ebm, agent, generator, config
        self.solution, self.run, self.description = solution, run, description
        self.progress_bar = progress
        self.step = self.reward_calls = self.looked_up = 0
        self.solution_calls = calls_of(solution)
        self.seconds = 0.0  # of training, over all the run's processes
        self.tokens = torch.zeros((), dtype=torch.int64, device=ebm.device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=ebm.device)
        self.report: AnyReport | None = None
        self.lists = looks_at_all(ebm)
        self.evaluates = solution is not None and (self.lists or not solution.lists_all)
        self.drawn: Drawn | None = None  # in the last step
        self.board: Board | None = None
        self.metrics_file: MetricsFile | None = None
        self.saved_step: int | None = None
        self.complete = False  # ended, with the last look at it written
        self.kept_rows, self.kept_events = 0, dict[str, int]()
        # Raises where another folder has come into the place of the run's.
        self.check_held: Callable[[], None] = lambda: None

    # The loop -----------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the run that is done: what schedules depend on."""
        limits = self.config
        drawn = self.reward_calls + self.looked_up or UNDRAWN * self.step
        return max(
            0.0 if limits.steps is None else self.step / max(limits.steps, 1),
            0.0 if limits.seconds is None else self.seconds / max(limits.seconds, 1e-9),
            0.0 if limits.responses is None else drawn / limits.responses,
        )

    @property
    def finished(self) -> bool:
        """Whether a limit has been reached."""
        return self.progress >= 1 or self.config.steps == 0

    def train(self) -> AnyReport | None:
        """Go on to the end of the run; the last exact report.

        Raises:
            NonFiniteError: a loss or gradient became NaN or infinite; the last good checkpoint
                stays.
            OSError, RunError: the files could not be written.
            KeyboardInterrupt, Terminated: a signal, after a checkpoint of what was done.
        """
        try:
            self._open()
            if self.run is None:
                return self._train(Asked())
            with stops_between_steps() as asked:
                report = self._train(asked)
                asked.kept(self.run, self.step, self.complete)
                return report
        finally:
            self._close()

    def _train(self, asked: Asked) -> AnyReport | None:
        started, before = time.monotonic(), self.seconds
        logged_time, logged_tokens = started, int(self.tokens)
        # A run that goes on was looked at where it stopped.
        evaluated, evaluation = (-math.inf if self.saved_step is None else started), 0.0
        self.complete = False
        looked = self.step if self.saved_step is not None else -1
        small = sum(p.numel() for p in self.agent.policy.parameters()) < SMALL
        # Before an optimiser has stepped it has no moments: a third of what is saved later.
        took = self.save() if self.saved_step is None else 0.0
        pace = Pace(self.config.checkpoint_every, started, (took, 3 * took), small)
        bar = self._bar()
        metrics: dict[str, Tensor] = {}
        try:
            while not self.finished and not asked:
                now = time.monotonic()
                due = now - evaluated >= max(self.config.eval_every, 9 * evaluation)
                if self.evaluates and due and self.step != looked:
                    self._evaluate(asked)
                    evaluated = time.monotonic()
                    evaluation = evaluated - now
                    self._show(bar, metrics)
                metrics = self._update()
                now = time.monotonic()
                self.seconds = before + now - started
                asked_for = self.step == 1 or self.step % self.config.log_every == 0
                if asked_for or self.finished or now - logged_time >= LOG_SECONDS:
                    tokens = int(self.tokens)  # waits for the device
                    self._log(metrics, (tokens - logged_tokens) / max(now - logged_time, 1e-9))
                    logged_time, logged_tokens = now, tokens
                    self._show(bar, metrics)
                if pace.due(now):
                    pace.did(now, now + self.save())
            if asked and not self.finished:
                self.save()
                return self.report
            if self.evaluates:
                self._evaluate(asked, pictures=True)
                self._show(bar, metrics)
            self.check_finite()
            if self.board is not None and self.report is not None and self.description is not None:
                self.board.hparams(self.description, self.report)
            if self.run is not None and self.report is not None:
                self.check_held()
                write_text(self.run / REPORT, json.dumps(self.report.to_dict(), indent=1) + "\n")
            self.complete = True
            self.save()
        except Interrupted:
            self.save()
        finally:
            bar.close()
        return self.report

    def _update(self) -> dict[str, Tensor]:
        """One step: no number leaves the device."""
        batch = self.agent.sample()
        self.drawn = None
        if batch is None:
            metrics = self.agent.update(None, self.progress)
            self.tokens += self.ebm.num_prompts * self.ebm.space.num_states
        else:
            batch, asked = scored(self.agent, self.ebm, batch)
            self.reward_calls += asked
            self.looked_up += len(batch) - asked
            self.drawn = Drawn.of(self.agent, batch)
            metrics = self.agent.update(batch, self.progress)
            self.tokens += batch.lengths.sum()
        self.step += 1
        bad = ~torch.isfinite(metrics["losses/loss"] + metrics["losses/grad_norm"])
        self.first_bad = torch.where((self.first_bad < 0) & bad, self.step, self.first_bad)
        return metrics

    def check_finite(self) -> None:
        """Raise NonFiniteError if a loss or gradient has been NaN or infinite."""
        step = int(self.first_bad)
        if step < 0:
            # The weights too: the last step can have spoiled them.
            if all(bool(torch.isfinite(p).all()) for p in self.agent.policy.parameters()):
                return
            step = self.step
        raise self._stop(step, "the loss or its gradient became NaN or infinite")

    def _stop(self, step: int, reason: str) -> NonFiniteError:
        kept = ""
        if self.run is not None and self.saved_step is not None:
            kept = f"; the checkpoint of step {self.saved_step} is kept in {self.run}"
        return NonFiniteError(
            f"{reason} at step {step}{kept}: lower the learning rate, or look for rewards that are "
            "huge, or -inf (forbidden_log_weight stands in for those)"
        )

    # Looking ------------------------------------------------------------------------------------

    def _log(self, metrics: Mapping[str, Tensor], tokens_per_second: float) -> None:
        self.check_finite()
        found = dict(metrics)
        if self.drawn is not None:
            found |= batch_charts(self.drawn, self.ebm.num_prompts)
            found |= drawn_charts(self.agent, self.ebm, self.step)
        values = {name: float(value) for name, value in found.items()}
        values |= {
            "charts/tokens_per_second": tokens_per_second,
            "charts/learning_rate": self.agent.learner.lr,
            "charts/step": self.step,
        }
        self._write(values)

    def _evaluate(self, asked: Asked, pictures: bool = False) -> None:
        assert self.solution is not None
        self.check_finite()
        policy: Any = self.agent.policy
        try:
            most = self.config.samples or samples_at(self.solution.space.max_length)
            samples = None if self.lists else most
            generator = torch.Generator(self.solution.device).manual_seed(self.step)
            with asked.looking():  # and not writing: a signal waits for the end of that
                report = verify(policy, self.solution, samples=samples, generator=generator)
            self.report = report
        except ValueError as error:  # finite weights, too large for finite logits
            raise self._stop(self.step, str(error)) from None
        values = {f"exact/{name}": value for name, value in report.scalars().items()}
        # What bounds log Z from both sides (arXiv 2512.15605, App. A.8), here exactly.
        values["eval/elbo"] = report.log_z - values["exact/kl_policy_target"]
        values["eval/eubo"] = report.log_z + values["exact/kl_target_policy"]
        ends: dict[str, float] = {}
        if isinstance(report, SampledReport):
            ends = {f"sampled/{name}": value for name, value in report.ends().items()}
            ends["sampled/num_samples"] = report.num_samples
        self._write(values, ends)
        if pictures and self.lists and self.board is not None:
            with asked.looking():
                errors = logit_errors(policy, self.solution)
            self.board.states(errors, int(self.tokens))

    def _write(self, values: Mapping[str, float], ends: Mapping[str, float] | None = None) -> None:
        """A row of metrics.csv, and curves of ``values`` alone."""
        if self.metrics_file is None or self.board is None:
            return
        tokens = int(self.tokens)
        row: dict[str, float | int] = {
            "step": self.step,
            "seconds": round(self.seconds, 3),
            "tokens": tokens,
            "reward_calls": self.reward_calls,
            "solution_calls": self.solution_calls,
        }
        if self.looked_up:
            row["looked_up"] = self.looked_up
        self.check_held()
        self.metrics_file.write(row | dict(values) | dict(ends or {}))
        self.board.scalars({k: v for k, v in values.items() if math.isfinite(v)}, tokens)

    def _bar(self) -> Any:
        hide = None if self.progress_bar is None else not self.progress_bar
        style = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        return tqdm(total=1000, disable=hide, bar_format=style)

    def _show(self, bar: Any, metrics: Mapping[str, Tensor]) -> None:
        if bar.disable:
            return
        bar.n = min(1000, round(1000 * self.progress))
        text = f"step {self.step}"
        if "losses/loss" in metrics:
            text += f", loss {float(metrics['losses/loss']):.4g}"
        if self.report is not None:
            text += f", KL(target, policy) {self.report.kl_target_policy:.3g}"
        text += f", {int(self.tokens) / max(self.seconds, 1e-9):,.0f} tokens/s"
        bar.set_postfix_str(text)

    # Files --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, and where its files end."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": int(self.tokens),
            "reward_calls": self.reward_calls,
            "looked_up": self.looked_up,
            "complete": self.complete,
            "kind": self.kind(),
            "policy": self.agent.policy.state_dict(),
            "agent": self.agent.state_dict(),
            "generator": self.generator.get_state(),
            "metrics_rows": 0 if self.metrics_file is None else self.metrics_file.flush(),
            "event_sizes": {} if self.board is None else self.board.positions(),
        }

    def save(self) -> float:
        """Write a checkpoint, then the policy's weights derived from it; the seconds it took."""
        if self.run is None:
            return 0.0
        began = time.monotonic()
        self.check_finite()
        self.check_held()
        save_state(self.run / STATE, self.state_dict())
        self.saved_step = self.step
        save_tensors(self.run / POLICY, self.agent.policy.state_dict())
        return time.monotonic() - began

    def restore_policy(self) -> None:
        """Write the policy's weights, where they are not those in the file already."""
        assert self.run is not None
        remove_parts(self.run)
        if not holds(self.run / POLICY, weights := self.agent.policy.state_dict()):
            save_tensors(self.run / POLICY, weights)

    def kind(self) -> str:
        """Which agent and policy a checkpoint is of."""
        shapes = [tuple(p.shape) for p in self.agent.policy.parameters()]
        return f"{type(self.agent).__name__} {shapes}"

    def resume(self) -> None:
        """Continue from the run's checkpoint; from step 0 where there is none yet.

        Raises:
            RunError: a damaged or foreign checkpoint.
        """
        assert self.run is not None
        own_files(self.run)  # checked before anything is read or written
        path = self.run / STATE
        if not path.exists():
            keep_weights(self.run)
            return
        state = restored(path, self)
        self.step, self.seconds = state["step"], float(state["seconds"])
        self.tokens.fill_(state["tokens"])
        self.reward_calls, self.complete = state["reward_calls"], state["complete"]
        self.looked_up = state.get("looked_up", 0)  # older runs had none
        self.kept_rows, self.kept_events = state["metrics_rows"], state["event_sizes"]
        self.saved_step = self.step
        if not (self.finished and self.complete):
            read_kept(self.run / METRICS, self.kept_rows)  # refused before anything is changed

    def _open(self) -> None:
        """Open the logs, cut back to the checkpoint."""
        if self.run is None:
            return
        cut_back(self.run, self.kept_events)
        self.metrics_file = MetricsFile(self.run / METRICS, self.kept_rows)
        resumed = self.saved_step is not None
        self.board = Board(self.run, int(self.tokens) if resumed else None, self.kept_events)
        if not resumed and self.description is not None:
            self.board.config(self.description)
        forget(self.run)  # only now: a disk may be full

    def _close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.metrics_file is not None:
            self.metrics_file.close()
