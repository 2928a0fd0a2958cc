"""How the benchmark writes times, ratios and dtypes."""

from __future__ import annotations

import torch

__all__ = ["dtype_name", "ratio_text", "time_text"]


def time_text(seconds: float) -> str:
    """Return a time in milliseconds, or seconds if it is long."""
    if seconds >= 10:
        return f"{seconds:.1f} s"
    milliseconds = seconds * 1e3
    digits = 4 if milliseconds < 1 else 3 if milliseconds < 10 else 2 if milliseconds < 100 else 1
    return f"{milliseconds:.{digits}f} ms"


def ratio_text(value: float) -> str:
    """Return a ratio with as many digits as mean something."""
    return (
        f"{value:.3f}"
        if value < 0.1
        else f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
        if value < 100
        else f"{value:.0f}"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without its module."""
    return str(dtype).removeprefix("torch.")
