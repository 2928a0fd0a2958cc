"""How far a stream of pieces has come: a bar of tqdm's, or a function of the caller's."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Iterator
from typing import Any, TypeVar

from .._typing import RowProgress

__all__ = ["reported"]

# Between two bars where there is no terminal, on which each one is a line of its own.
SECONDS_PER_LINE = 10.0

Piece = TypeVar("Piece", bound="tuple[Any, ...]")


def reported(pieces: Iterator[Piece], progress: RowProgress, total: int | None) -> Iterator[Piece]:
    """Yield the pieces; each one's rows count as done when the next one is asked for."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(pieces))  # type: ignore[type-var]
        bar: Any = None
        if progress and not callable(progress):
            tqdm: Any = importlib.import_module("tqdm").tqdm  # which Optuna brings
            wait = 0.1 if sys.stderr.isatty() else SECONDS_PER_LINE
            bar = tqdm(total=total, unit=" rows", file=sys.stderr, mininterval=wait, maxinterval=wait)
            stack.enter_context(bar)
        begin, rows = time.perf_counter(), 0
        for piece in pieces:
            rows += piece[0].shape[0]
            yield piece
            del piece
            if callable(progress):
                progress(rows, total, time.perf_counter() - begin)
            elif bar is not None:
                bar.update(rows - bar.n)
