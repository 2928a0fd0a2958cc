"""The roofline picture of a benchmark's record: every step between the machine's memory and its arithmetic.

A point is a peer of a row: operations per byte across, operations per second up, both from the row's count. The roofs
are the read bandwidth and the matrix rates that the same run measured. Matplotlib, without a display.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..record import RATED
from .canvas import DPI, GRID, INK, canvas, check_matplotlib, heading, machine_text, save, tidy

__all__ = ["Point", "draw", "points"]

# Peers in the order in which they are drawn, the last on top: name, marker, colour, size.
STYLES = (
    ("eager", "plain PyTorch", "o", "#8a8f98", 5.5),
    ("compile", "torch.compile", "s", "#3f7fbf", 5.0),
    ("max-autotune", "torch.compile, max-autotune", "P", "#1f4e79", 5.0),
    ("triton", "torch.compile, Triton products", "X", "#7c4dbd", 5.0),
    ("chunked", "PyTorch in chunks", "v", "#b8860b", 5.5),
    ("jax", "JAX", "^", "#3a9a5b", 6.0),
    ("fused", "torchintro", "D", "#d9480f", 6.0),
)
ROOFS = {"float32": "#22272e", "bfloat16": "#7c4dbd"}
WIDTH, HEIGHT = 10.0, 6.4


@dataclass(frozen=True)
class Point:
    """A row in the picture.

    Attributes:
        row: Its name.
        intensity: Operations per byte.
        rates: Operations per second of each peer.
    """

    row: str
    intensity: float
    rates: dict[str, float]


def points(record: Mapping[str, Any], device: str) -> list[Point]:
    """Return the steps of a record that have a place in the picture: all but those that are only overhead.

    Raises:
        ValueError: The record is none of the benchmark's.
    """
    try:
        return [
            Point(
                row["id"],
                row["count"]["operations"] / row["count"]["bytes"],
                {peer: row["count"]["operations"] / measured["median"] for peer, measured in row["peers"].items()},
            )
            for row in record["rows"]
            if row["kind"] == "step" and row["device"] == device and row["peers"]
            if row["limit"] is not None and row["limit"]["kind"] in RATED
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"bench: the record must be one that bench --json wrote, but it lacks {error}") from None


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``roofline.png`` and ``roofline.svg``, for a GPU ``roofline-cuda.png`` and ``.svg``.

    Args:
        record: What ``bench --json`` writes.
        folder: Where; it is made.

    Returns:
        The files; none if the record holds no step whose limit was measured.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: The record is none of the benchmark's.
    """
    check_matplotlib()
    written = []
    for device in ("cpu", "cuda"):
        found = points(record, device)
        if not found:
            continue
        written += save(_figure(record, device, found), folder, "roofline" if device == "cpu" else "roofline-cuda")
    return written


def _figure(record: Mapping[str, Any], device: str, found: Sequence[Point]) -> Any:
    figure = canvas(WIDTH, HEIGHT)
    axes = figure.add_axes((0.075, 0.105, 0.905, 0.775))
    machine, limits = record["machine"], record["limits"][device]
    read = limits["read_bytes_per_second"]
    roofs = {name.removeprefix("torch."): rate for name, rate in limits["matrix_operations_per_second"].items()}

    xs = [point.intensity for point in found]
    ys = [rate for point in found for rate in point.rates.values()]
    low_x, high_x = min(xs) / 2.2, max(*xs, max(roofs.values()) / read) * 3
    low_y, high_y = min(*ys, read * low_x * 1.5) / 1.7, max(*ys, *roofs.values()) * 2.2
    axes.set(xscale="log", yscale="log", xlim=(low_x, high_x), ylim=(low_y / 1e9, high_y / 1e9))
    _decorate(axes, machine, device)
    _draw_roofs(axes, read, roofs, low_x, high_x)
    _draw_points(axes, found)
    _draw_labels(figure, axes, found, read, roofs)
    return figure


def _decorate(axes: Any, machine: Mapping[str, Any], device: str) -> None:
    tidy(axes)
    axes.set_xlabel("operations per byte that the step must move", color=INK, fontsize=11)
    axes.set_ylabel("GFLOP/s", color=INK, fontsize=11)
    heading(axes, "One step, forward and backward, under the machine's roofline", machine_text(machine, device))


def _draw_roofs(axes: Any, read: float, roofs: Mapping[str, float], low_x: float, high_x: float) -> None:
    top = max(roofs.values())
    axes.plot([low_x, top / read], [read * low_x / 1e9, top / 1e9], color=INK, linewidth=1.6, zorder=2)
    slope = axes.transData.transform([(1, 1), (10, 10)])
    angle = math.degrees(math.atan2(slope[1][1] - slope[0][1], slope[1][0] - slope[0][0]))
    x = low_x * 1.12
    axes.annotate(f"memory: read {read / 1e9:.1f} GB/s", (x, read * x / 1e9), (0, 5), textcoords="offset points",
                  rotation=angle, rotation_mode="anchor", color=INK, fontsize=10, va="bottom")  # fmt: skip
    for name, rate in roofs.items():
        colour = ROOFS.get(name, INK)
        axes.plot([rate / read, high_x], [rate / 1e9] * 2, color=colour, linewidth=1.6, zorder=2)
        axes.annotate(f"products: {name} {rate / 1e9:.0f} GFLOP/s", (high_x, rate / 1e9), (-2, 4), va="bottom",
                      textcoords="offset points", color=colour, fontsize=10, ha="right")  # fmt: skip


def _draw_points(axes: Any, found: Sequence[Point]) -> None:
    for point in found:
        rates = [rate / 1e9 for rate in point.rates.values()]
        axes.plot([point.intensity] * 2, [min(rates), max(rates)], color="#d4d7dd", linewidth=1.2, zorder=1)
    for peer, label, marker, colour, size in STYLES:
        pairs = [(point.intensity, point.rates[peer] / 1e9) for point in found if peer in point.rates]
        if pairs:
            axes.plot(*zip(*pairs, strict=True), marker, color=colour, markersize=size, label=label, zorder=4,
                      markeredgecolor="white", markeredgewidth=0.7)  # fmt: skip
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="lower right", frameon=True, facecolor="white", edgecolor=GRID,
                framealpha=1, labelcolor=INK, fontsize=10.5)  # fmt: skip


Box = tuple[float, float, float, float]


def _draw_labels(figure: Any, axes: Any, found: Sequence[Point], read: float, roofs: Mapping[str, float]) -> None:
    """Write each row's name where it hides least: near its fused point, away from marks, roofs and other names."""
    figure.canvas.draw()
    scale = DPI / 72  # pixels of a point of type
    taken: list[Box] = []
    for text in axes.texts:
        extent = text.get_window_extent()
        if text.get_rotation():  # along its diagonal: the corners of its box are free
            taken += _dots((extent.x0, extent.y0), (extent.x1, extent.y1), 6 * scale)
        else:
            taken.append(_inflate(extent, 2))
    taken.append(_inflate(axes.get_legend().get_window_extent(), 6))
    marks: list[Box] = []
    for point in found:
        for rate in point.rates.values():
            x, y = axes.transData.transform((point.intensity, rate / 1e9))
            marks.append((x - 3.5 * scale, y - 3.5 * scale, x + 3.5 * scale, y + 3.5 * scale))
    lines = []
    top = max(roofs.values())
    for i in range(161):  # the roofs as a row of dots
        x = axes.get_xlim()[0] * (axes.get_xlim()[1] / axes.get_xlim()[0]) ** (i / 160)
        heights = [min(read * x, top), *(rate for rate in roofs.values() if read * x > rate)]
        for height in heights:
            px, py = axes.transData.transform((x, height / 1e9))
            lines.append((px - 1, py - 1, px + 1, py + 1))
    left, bottom, right, upper = _inflate(axes.get_window_extent(), 0)

    # Points in a crowd choose first.
    places = {
        point.row: axes.transData.transform(
            (point.intensity, point.rates.get("fused", max(point.rates.values())) / 1e9)
        )
        for point in found
    }
    crowd = {
        row: sum(math.dist(place, other) < 90 * scale for other in places.values()) for row, place in places.items()
    }
    for row in sorted(places, key=lambda row: (-crowd[row], places[row][1])):
        x, y = places[row]
        text = axes.text(0.5, 0.5, row, transform=axes.transAxes, color=INK, fontsize=9, fontweight="bold",
                         ha="center", va="center", zorder=5)  # fmt: skip
        extent = text.get_window_extent()
        half_width, half_height = extent.width / 2, extent.height / 2
        best: tuple[float, float, float] = (math.inf, x, y)
        for distance in (8.5, 12, 16, 21, 28, 36, 47, 60, 76, 94):
            for step in range(24):
                angle = 2 * math.pi * step / 24
                cx = x + math.cos(angle) * (distance * scale + half_width * abs(math.cos(angle)))
                cy = y + math.sin(angle) * distance * scale
                box = (cx - half_width - 2, cy - half_height - 1, cx + half_width + 2, cy + half_height + 1)
                if box[0] < left + 4 or box[1] < bottom + 4 or box[2] > right or box[3] > upper + 10 * scale:
                    continue
                lead = _dots((x + (cx - x) * 0.3, y + (cy - y) * 0.3), (cx, cy), 1)
                cost = distance + 400 * _hits(box, taken) + 250 * _hits(box, marks) + 60 * _hits(box, lines)
                cost += sum(40 * _hits(dot, taken) + 15 * _hits(dot, marks) for dot in lead)
                # Beside a point rather than on its line, and rather on the right.
                cost += 8 * abs(math.sin(angle)) * (distance < 20) + 3 * (math.cos(angle) < 0)
                best = min(best, (cost, cx, cy))
        _, cx, cy = best
        # In shares of the axes: an SVG has other pixels.
        text.set_position(axes.transAxes.inverted().transform((cx, cy)))
        gap = 5 * scale  # between names: two side by side would read as one
        taken.append((cx - half_width - gap, cy - half_height - 1, cx + half_width + gap, cy + half_height + 1))
        lines += _dots((x, y), (cx, cy), 1)
        _lead(axes, (x, y), (cx, cy), half_width, half_height, scale)


def _lead(
    axes: Any,
    start: tuple[float, float],
    centre: tuple[float, float],
    half_width: float,
    half_height: float,
    scale: float,
) -> None:
    """Draw a thin line from a point to the edge of its name, unless they are close."""
    dx, dy = start[0] - centre[0], start[1] - centre[1]
    share = min(half_width / abs(dx) if dx else math.inf, half_height / abs(dy) if dy else math.inf, 1.0)
    end = (centre[0] + dx * share, centre[1] + dy * share)
    if math.dist(start, end) > 12 * scale:
        ends = axes.transData.inverted().transform([start, end])
        axes.plot(ends[:, 0], ends[:, 1], color="#9aa0aa", linewidth=0.7, zorder=3, scalex=False, scaley=False)


def _dots(start: tuple[float, float], end: tuple[float, float], radius: float) -> list[Box]:
    """Return a line as a row of small boxes."""
    shares = [i / 11 for i in range(12)]
    middles = [(start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share) for share in shares]
    return [(x - radius, y - radius, x + radius, y + radius) for x, y in middles]


def _inflate(extent: Any, by: float) -> Box:
    return extent.x0 - by, extent.y0 - by, extent.x1 + by, extent.y1 + by


def _hits(box: Box, others: Sequence[Box]) -> int:
    return sum(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)
