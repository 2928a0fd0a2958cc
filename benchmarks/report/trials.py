"""The picture of time against the number of trials, from a benchmark's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .canvas import INK, QUIET, canvas, check_matplotlib, heading, machine_text, save, tidy

__all__ = ["draw"]

WIDTH, HEIGHT = 10.0, 4.9
LOOP = "loop"
# Lines in the order in which they are drawn, the last on top: name, label, marker, colour.
STYLES = (
    (LOOP, "plain PyTorch loop, one trial after the other", "o", "#8a8f98"),
    ("tune", "torchintro tune, with Optuna", "s", "#3f7fbf"),
    ("models", "torchintro, all learning rates in one call", "D", "#d9480f"),
)

Curve = Mapping[str, Any]


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``trials.png`` and ``trials.svg``, for a GPU ``trials-cuda.png`` and ``.svg``.

    Args:
        record: What ``bench --trials --json`` writes.
        folder: Where; it is made.

    Returns:
        The files; none if the record holds no such figures.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: The record is none of the benchmark's.
    """
    check_matplotlib()
    written: list[Path] = []
    try:
        for device in ("cpu", "cuda"):
            curves = [
                curve
                for curve in record.get("trials", [])
                if curve["device"] == device and any(curve["lines"].values())
            ]
            if curves:
                figure = _figure(record, device, curves)
                written += save(figure, folder, "trials" if device == "cpu" else "trials-cuda")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"bench: the record must be one that bench --json wrote, but it lacks {error}") from None
    return written


def _figure(record: Mapping[str, Any], device: str, curves: Sequence[Curve]) -> Any:
    figure = canvas(WIDTH, HEIGHT)
    left, right, gap = 0.095, 0.985, 0.075
    width = (right - left - gap * (len(curves) - 1)) / len(curves)
    for i, curve in enumerate(curves):
        axes = figure.add_axes((left + i * (width + gap), 0.225, width, 0.535))
        _draw_curve(axes, curve)
        if i == 0:
            axes.set_ylabel("seconds", color=INK, fontsize=11)
            title = f"Time to train with many learning rates, {curve['epochs']} epochs each, full batch"
            heading(axes, title, machine_text(record["machine"], device), heights=(1.285, 1.19))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    hollow = any(point["measured"] for curve in curves for point in curve["lines"].get(LOOP, []))
    figure.legend(handles, labels, loc="lower center", ncols=len(handles), frameon=False, labelcolor=INK, fontsize=9.5,
                  columnspacing=1.4, handletextpad=0.2, bbox_to_anchor=(0.53, 0.04 if hollow else 0.01))  # fmt: skip
    if hollow:
        figure.text(0.53, 0.02, "hollow: a part was run and scaled up; the ratios are against the loop", color=QUIET,
                    fontsize=9, ha="center")  # fmt: skip
    return figure


def _draw_curve(axes: Any, curve: Curve) -> None:
    axes.set(xscale="log", yscale="log")
    tidy(axes)
    axes.set_xlabel("trials", color=INK, fontsize=11)
    features = f"{curve['in_features']} feature{'s' if curve['in_features'] > 1 else ''}"
    axes.set_title(f"{curve['rows']:,} rows x {features}".replace(",", " "), color=INK, fontsize=11, loc="left")
    loop = {point["trials"]: point["seconds"] for point in curve["lines"].get(LOOP, [])}
    times = []
    for line, label, marker, colour in STYLES:
        points = curve["lines"].get(line, [])
        if not points:
            continue
        xs, ys = ([point[key] for point in points] for key in ("trials", "seconds"))
        times += ys
        axes.plot(xs, ys, color=colour, linewidth=1.4, zorder=3)
        axes.plot(xs, ys, marker, color=colour, markersize=6, label=label, zorder=4, linestyle="none",
                  markeredgecolor="white", markeredgewidth=0.7)  # fmt: skip
        scaled = [(point["trials"], point["seconds"]) for point in points if point["measured"]]
        if scaled:
            axes.plot(*zip(*scaled, strict=True), marker, color="white", markersize=5, zorder=5, linestyle="none",
                      markeredgecolor=colour, markeredgewidth=1.3)  # fmt: skip
        if line != LOOP and xs[-1] in loop:
            axes.annotate(_ratio(loop[xs[-1]] / ys[-1]), (xs[-1], ys[-1]), (8, 0), ha="left", va="center",
                          textcoords="offset points", color=colour, fontsize=10, fontweight="bold")  # fmt: skip
    most = max(point["trials"] for points in curve["lines"].values() for point in points)
    # To the right, room for the ratios.
    axes.set_xlim(0.8, most * 7)
    axes.set_ylim(min(times) / 2.5, max(times) * 2.5)


def _ratio(value: float) -> str:
    """Return a ratio with two digits, which is as much as a picture can say."""
    return f"{float(f'{value:.1e}'):,.10g}x".replace(",", " ")
