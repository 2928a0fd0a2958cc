"""How far a stream of pieces has come: a bar of tqdm's, or a function of the caller's."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
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
        report = stack.enter_context(_reporter(progress, total))
        begin, rows = time.perf_counter(), 0
        for piece in pieces:
            rows += piece[0].shape[0]
            yield piece
            del piece
            report(rows, total, time.perf_counter() - begin)


@contextlib.contextmanager
def _reporter(progress: RowProgress, total: int | None) -> Iterator[Callable[[int, int | None, float], None]]:
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda rows, total, seconds: None
        return
    tqdm: Any = importlib.import_module("tqdm").tqdm  # which Optuna brings
    seconds = 0.1 if sys.stderr.isatty() else SECONDS_PER_LINE
    with tqdm(total=total, unit=" rows", file=sys.stderr, mininterval=seconds, maxinterval=seconds) as bar:

        def report(rows: int, total: int | None, seconds: float) -> None:
            bar.update(rows - bar.n)

        yield report
