"""What the benchmark's pictures have in common: their colours, their files, and Matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "DPI",
    "FORMATS",
    "GRID",
    "INK",
    "QUIET",
    "SPINE",
    "canvas",
    "check_matplotlib",
    "heading",
    "machine_text",
    "save",
    "tidy",
]

FORMATS = ("png", "svg")
INK, QUIET, GRID, SPINE = "#22272e", "#6b7280", "#e5e7eb", "#c4c8cf"
DPI = 150


def check_matplotlib() -> None:
    """Raise an ImportError in words if there is no Matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError('bench: plot needs matplotlib: pip install "torchintro[cli]"') from error


def canvas(width: float, height: float) -> Any:
    """Return an empty figure, of so many inches."""
    # Not pyplot: it keeps figures and a choice of display for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Any) -> None:
    """Leave of two logarithmic axes what is needed to read them."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, which="major", color=GRID, linewidth=0.8)
    axes.tick_params(which="both", colors=QUIET, labelsize=10)
    axes.tick_params(which="minor", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(SPINE)


def heading(axes: Any, title: str, machine: str, *, heights: tuple[float, float] = (1.095, 1.045)) -> None:
    """Write a title and, below it, which machine the figures are from."""
    axes.text(0, heights[0], title, transform=axes.transAxes, fontsize=14, fontweight="bold", color=INK, va="bottom")
    # A processor's name may hold dollar signs for all we know.
    axes.text(0, heights[1], machine, transform=axes.transAxes, fontsize=10, color=QUIET, va="bottom", parse_math=False)


def machine_text(machine: Mapping[str, Any], device: str) -> str:
    """Return which machine a record is from, for a heading."""
    name = machine["gpu"]["name"] if device == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
    return f"{name}; torch {machine['torch']}; {machine['date'][:10]}"


def save(figure: Any, folder: Path, stem: str) -> list[Path]:
    """Write a figure in each format; the same record gives the same file."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix in FORMATS:
        path = folder / f"{stem}.{suffix}"
        # No date, and no random names inside.
        metadata = {"Date": None} if suffix == "svg" else {}
        with matplotlib.rc_context({"svg.hashsalt": "torchintro", "svg.fonttype": "path"}):
            figure.savefig(path, dpi=DPI, metadata=metadata, facecolor="white")
        paths.append(path)
    return paths
