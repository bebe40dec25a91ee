"""Pictures of a policy against the exact one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from rl_ebm.verification.verify import State


def error_figure(states: Sequence[State], max_columns: int = 64) -> Figure:
    """Logit error by depth and prefix, and learned against exact logits.

    Left: rows are depths; the prefixes of a depth stand in enumeration order, those that share
    a cell show the largest error among them. Right: centred logits of every allowed action,
    darker where p* goes.

    Args:
        states: the per-depth errors of :func:`rl_ebm.verification.verify.logit_errors`.
        max_columns: cells in a row.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _heat_map(left, states, max_columns)
    _scatter(right, states)
    return figure


def figure_image(figure: Figure) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A figure as (height, width, 3) bytes."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _heat_map(axes: Any, states: Sequence[State], max_columns: int) -> None:
    width = min(max_columns, max(len(s.linf) for s in states))
    grid = torch.stack([_cells(s.linf.float().cpu(), width) for s in states])
    finite = grid[torch.isfinite(grid)]
    top = float(finite.max()) if len(finite) else 1.0
    image = axes.imshow(grid.numpy(), aspect="auto", cmap="magma", vmin=0, vmax=max(top, 1e-12))
    axes.figure.colorbar(image, ax=axes, label="max |q* - q| over actions (nats)")
    axes.set(
        title="Logit error by prefix",
        xlabel="prefixes of a depth, in enumeration order",
        ylabel="depth",
        yticks=range(len(states)),
        xticks=[],
    )


def _cells(errors: Tensor, width: int) -> Tensor:
    """Errors of one depth stretched, or reduced by their maxima, to a row of cells."""
    if len(errors) <= width:
        return errors.repeat_interleave(-(-width // len(errors)))[:width]
    edges = torch.linspace(0, len(errors), width + 1).long()
    return torch.stack([errors[a:b].max() for a, b in pairwise(edges.tolist())])


def _scatter(axes: Any, states: Sequence[State]) -> None:
    exact = torch.cat([s.q_star[s.allowed] for s in states]).cpu()
    learned = torch.cat([s.q[s.allowed] for s in states]).cpu()
    mass = torch.cat([s.log_edge[s.allowed] for s in states]).cpu()
    order = mass.argsort()
    points = axes.scatter(
        exact[order].numpy(),
        learned[order].numpy(),
        c=mass[order].numpy(),
        s=6,
        cmap="viridis_r",
        linewidths=0,
    )
    axes.figure.colorbar(points, ax=axes, label="log p*(prefix and action) (nats)")
    low, high = float(exact.min()), float(exact.max())
    axes.plot([low, high], [low, high], color="black", linewidth=0.8)
    axes.set(
        title="Learned against exact logits",
        xlabel="exact q*, centred (nats)",
        ylabel="learned q, centred (nats)",
    )
