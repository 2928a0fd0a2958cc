"""How far a stream of pieces has come: a bar on a terminal, lines elsewhere, or a function of the caller's."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from .._typing import RowProgress

__all__ = ["reported"]

# Between two lines where there is no terminal.
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
    elif not progress:
        yield lambda rows, total, seconds: None
    else:
        bar = _bar(total)
        if bar is None:
            lines = _Lines()
            yield lines.report
            lines.end()
        else:
            with bar:
                task = bar.add_task("rows", total=total, speed="")

                def report(rows: int, total: int | None, seconds: float) -> None:
                    bar.update(task, completed=rows, speed=f"{rows:,} rows, {rows / max(seconds, 1e-9):,.0f} rows/s")

                yield report


def _bar(total: int | None) -> Any:
    """Return rich's bar, None without rich or without a terminal."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        return None
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    left = [TimeElapsedColumn()] if total is None else [TimeElapsedColumn(), TimeRemainingColumn()]
    return Progress(BarColumn(), TextColumn("{task.fields[speed]}"), *left, console=console)


class _Lines:
    def __init__(self) -> None:
        self._printed = 0.0
        self._last = ""

    def report(self, rows: int, total: int | None, seconds: float) -> None:
        of = "" if total is None else f" of {total:,}"
        self._last = f"{rows:,}{of} rows in {seconds:.1f} s, {rows / max(seconds, 1e-9):,.0f} rows/s"
        if seconds - self._printed >= SECONDS_PER_LINE:
            self._printed = seconds
            self.end()

    def end(self) -> None:
        if self._last:
            print(self._last, file=sys.stderr, flush=True)
            self._last = ""
