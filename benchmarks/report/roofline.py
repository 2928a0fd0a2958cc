"""The roofline picture of a benchmark's record: every step between the machine's memory and its arithmetic.

A mark is a peer of a case: operations per byte across, operations per second up, both from the case's count. The roofs
are the read bandwidth and the matrix rates that the same run measured. Matplotlib, without a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..record import RATED
from .canvas import GRID, INK, canvas, check_matplotlib, heading, machine_text, save, tidy

__all__ = ["Point", "draw", "points", "spread"]

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
ROOFS = {"float32": "#b42318", "bfloat16": "#7c4dbd"}
WIDTH, HEIGHT = 10.0, 6.8
NAME_WIDTH = 0.021  # of a name that stands upright, as a share of the picture


@dataclass(frozen=True)
class Point:
    """A case in the picture.

    Attributes:
        case: Its name.
        intensity: Operations per byte.
        rates: Operations per second of each peer.
    """

    case: str
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
    axes = figure.add_axes((0.075, 0.1, 0.905, 0.715))
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
    _draw_names(axes, found)
    return figure


def _decorate(axes: Any, machine: Mapping[str, Any], device: str) -> None:
    tidy(axes)
    axes.set_xlabel("operations per byte that the step must move", color=INK, fontsize=11)
    axes.set_ylabel("GFLOP/s", color=INK, fontsize=11)
    heading(axes, "One step, forward and backward, under the machine's roofline", machine_text(machine, device),
            heights=(1.185, 1.135))  # fmt: skip


def _draw_roofs(axes: Any, read: float, roofs: Mapping[str, float], low_x: float, high_x: float) -> None:
    top = max(roofs.values())
    axes.plot([low_x, top / read], [read * low_x / 1e9, top / 1e9], color=INK, linewidth=1.6, zorder=2,
              label=f"memory: read {read / 1e9:.1f} GB/s")  # fmt: skip
    for name, rate in roofs.items():
        axes.plot([rate / read, high_x], [rate / 1e9] * 2, color=ROOFS.get(name, INK), linewidth=1.6, zorder=2,
                  label=f"products: {name} {rate / 1e9:.0f} GFLOP/s")  # fmt: skip


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


def _draw_names(axes: Any, found: Sequence[Point]) -> None:
    """Write the names of the cases in a row above the picture, each with a line to the highest of its marks."""
    ordered = sorted(found, key=lambda point: (point.intensity, max(point.rates.values())))
    to_share = axes.transData + axes.transAxes.inverted()
    shares = [float(to_share.transform((point.intensity, 1.0))[0]) for point in ordered]
    for point, share in zip(ordered, spread(shares, min(NAME_WIDTH, 1 / len(ordered))), strict=True):
        axes.annotate(
            point.case, (point.intensity, max(point.rates.values()) / 1e9), (share, 1.012), textcoords="axes fraction",
            rotation=90, ha="center", va="bottom", color=INK, fontsize=9, zorder=2,
            arrowprops={"arrowstyle": "-", "color": "#9aa0aa", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Move growing numbers in 0 to 1 so far apart that neighbours differ by ``gap``, and leave them there else.

    From the left each is pushed to the right as far as it must, from the right to the left; the mean of both keeps the
    gap, because both do.
    """
    low, high, last = gap / 2, 1 - gap / 2, len(wanted) - 1
    right = [min(max(value, low), high) for value in wanted]
    left = list(right)
    for i in range(1, last + 1):
        right[i] = max(right[i], right[i - 1] + gap)
    for i in range(last - 1, -1, -1):
        left[i] = min(left[i], left[i + 1] - gap)
    # What was pushed over an end comes back to it, as many gaps before it as there are others in between.
    return [
        (min(a, high - (last - i) * gap) + max(b, low + i * gap)) / 2
        for i, (a, b) in enumerate(zip(right, left, strict=True))
    ]
