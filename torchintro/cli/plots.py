"""Two plots as PNG files: the loss by epoch and the loss against the learning rate. Matplotlib, without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_loss_by_epoch(path: Path, losses: Mapping[str, Sequence[float]], *, title: str) -> None:
    """Draw the losses of the epochs 1, 2, ... by the name of the series; logarithmic where all are positive."""
    figure, axes = _figure(title, "epoch")
    for name, series in losses.items():
        axes.plot(range(1, len(series) + 1), series, label=name)
    if all(loss > 0 for series in losses.values() for loss in series):
        axes.set_yscale("log")
    _save(figure, axes, path)


def plot_loss_by_lr(path: Path, lrs: Sequence[float], losses: Sequence[float], *, ylabel: str, title: str) -> None:
    """Draw the loss of each learning rate and mark the lowest; infinite ones stand as crosses at the top."""
    figure, axes = _figure(title, "learning rate", ylabel)
    finite = sorted((lr, loss) for lr, loss in zip(lrs, losses, strict=True) if math.isfinite(loss))
    diverged = [lr for lr, loss in zip(lrs, losses, strict=True) if not math.isfinite(loss)]
    axes.set_xscale("log")
    if finite:
        axes.plot(*zip(*finite, strict=True), marker="o", markersize=4, linewidth=0.8, label="trial")
        best_lr, best_loss = min(finite, key=lambda point: point[1])
        label = f"best: lr = {best_lr:.3g}, loss = {best_loss:.4g}"
        axes.plot([best_lr], [best_loss], marker="*", markersize=13, linestyle="none", label=label)
        if all(loss > 0 for _, loss in finite):
            axes.set_yscale("log")
    if diverged:
        heights = [0.97] * len(diverged)
        axes.plot(diverged, heights, "x", color="tab:red", transform=axes.get_xaxis_transform(), label="diverged")
    _save(figure, axes, path)


def _figure(title: str, xlabel: str, ylabel: str = "loss") -> tuple[Any, Any]:
    try:
        # Not pyplot: it keeps figures and a choice of display for the whole process.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError('plots: needs matplotlib: pip install "torchintro[cli]"') from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, parse_math=False)  # a file's name may hold dollar signs
    axes.grid(visible=True, which="major", alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
