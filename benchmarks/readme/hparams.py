"""TensorBoard's hparams view of a benchmark, as a picture: every run a line through its options.

    python -m benchmarks.readme.hparams runs/methods     # any folder of runs

What is drawn is read from the event files, as TensorBoard reads them: the view itself is at
``tensorboard --logdir runs/methods``, tab HPARAMS, "parallel coordinates". Writes
``benchmarks/results/hparams.png``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

AXES = (
    "task",
    "agent/name",
    "options: lr",
    "options: batch_size",
    "hparam/kl_policy_target",
    "hparam/expected_reward_policy",
)
KL = "hparam/kl_policy_target"
UNITS = {KL: "nats"}
_BELOW = -0.05


@dataclass(frozen=True)
class Options:
    """Flags of this script."""

    folder: tyro.conf.Positional[Path]
    """where the runs are, at any depth"""
    out: Path = Path(__file__).parents[1] / "results" / "hparams.png"
    """the picture"""


def read(folder: Path) -> list[dict[str, Any]]:
    """The hyperparameters and final metrics of every run that has them."""
    found = []
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        if "hparams" not in events._plugin_to_tag_to_content:
            continue
        content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
        start = HParamsPluginData.FromString(content).session_start_info
        row: dict[str, Any] = {
            name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()
        }
        for name, value in _options(row.get("agent/options", "")).items():
            row[f"options: {name}"] = value
        for tag in events.Tags()["scalars"]:
            if tag.startswith("hparam/"):
                row[tag] = events.Scalars(tag)[-1].value
        if KL in row:
            found.append(row)
    return found


def _options(text: str) -> dict[str, Any]:
    """The agent's options, from the text of their dictionary."""
    import ast

    return dict(ast.literal_eval(text)) if text else {}


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Parallel coordinates: one axis for each option and metric, one line for each run."""
    axes_names = [name for name in AXES if any(name in row for row in rows)]
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots()
    places: list[list[float]] = []
    for i, name in enumerate(axes_names):
        column = [row.get(name) for row in rows]
        heights, ticks = _scale(column, name)
        places.append(heights)
        axes.axvline(i, color="0.7", lw=0.8, zorder=0)
        for height, text in ticks:
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
            axes.text(i - 0.02, height, text, ha="right", va="center", fontsize=7, bbox=box)
    kl = [math.log10(max(row[KL], 1e-9)) for row in rows]
    low, high = min(kl), max(kl)
    for j, height in enumerate(zip(*places, strict=True)):
        share = (kl[j] - low) / (high - low or 1.0)
        colour = colormaps["viridis_r"](share)
        axes.plot(range(len(height)), height, color=colour, lw=0.7, alpha=0.6)
    labels = [
        name.removeprefix("hparam/").removeprefix("options: ")
        + (f", {UNITS[name]}" if name in UNITS else "")
        for name in axes_names
    ]
    axes.set_xticks(range(len(axes_names)), labels)
    axes.set_yticks([])
    axes.set_xlim(-0.6, len(axes_names) - 0.9)
    axes.set_title(
        f"{len(rows)} runs, coloured by KL(policy, target): yellow is closest to the EBM"
    )
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def _scale(column: list[Any], name: str) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in [0, 1] and labelled ticks; a missing value, "none", stands below all others."""
    known = [x for x in column if x is not None]
    missing = [(_BELOW, "none")] if None in column else []
    if any(isinstance(x, str) for x in known) or len(set(known)) <= 6:
        names = sorted(set(known))
        at = {x: (i + 0.5) / len(names) for i, x in enumerate(names)}
        ticks = [(height, x if isinstance(x, str) else f"{x:g}") for x, height in at.items()]
        return [at[x] if x is not None else _BELOW for x in column], ticks + missing
    log = name == KL

    def number(x: float) -> float:
        return math.log10(max(x, 1e-9)) if log else x

    low, high = min(map(number, known)), max(map(number, known))
    width = high - low or 1.0
    ticks = []
    for i in range(6):
        value = low + width * i / 5
        ticks.append((i / 5, f"{10**value:.2g}" if log else f"{value:.3g}"))
    return [(number(x) - low) / width if x is not None else _BELOW for x in column], ticks + missing


def main(options: Options) -> None:
    rows = read(options.folder)
    if not rows:
        raise SystemExit(f"{options.folder} holds no finished run with hparams")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture(rows).savefig(options.out, dpi=110)
    print(f"{len(rows)} runs: {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
