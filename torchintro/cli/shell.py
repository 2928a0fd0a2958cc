"""What surrounds a command: its console, its exit codes, errors told in one sentence, progress and the run folder."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

P = ParamSpec("P")
R = TypeVar("R")

BAD_INPUT, DIVERGED, INTERRUPTED = 2, 1, 130
# Between two lines that say how far a pass is, where there is no terminal for a bar.
SECONDS_PER_LINE = 10.0

# Results go to standard output, what is only of interest while it goes on to standard error.
console = Console(highlight=False, markup=False)
notices = Console(stderr=True, highlight=False, markup=False)


def answering(function: Callable[P, R]) -> Callable[P, R]:
    """Answer what the user can put right with one sentence on stderr and an exit code instead of a traceback."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ArithmeticError as error:
            raise failure(str(error), DIVERGED) from error
        except (ValueError, TypeError, ImportError) as error:
            raise failure(str(error), BAD_INPUT) from error
        except BrokenPipeError as error:  # the reader of a pipe has had enough, as `| head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from error
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            raise failure(f"{error.strerror or error}{where}", BAD_INPUT) from error
        except KeyboardInterrupt as error:
            raise failure("interrupted", INTERRUPTED) from error

    return wrapped


def failure(sentence: str, code: int) -> typer.Exit:
    """Print the sentence on stderr; return what ends the command with that exit code."""
    typer.echo(f"torchintro: {' '.join(sentence.split())}", err=True)
    return typer.Exit(code)


@contextlib.contextmanager
def interruption(sentence: Callable[[], str]) -> Iterator[None]:
    """Where Ctrl-C ends the block, say what has become of the work."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise failure(f"interrupted{sentence()}", INTERRUPTED) from error


def run_folder(command: str, out: Path | None) -> Path:
    """Return the folder for a command's files, ``--out`` or one of its own in ``runs``; it need not be there yet."""
    folder = out or Path("runs") / f"{command}-{datetime.now():%Y%m%d-%H%M%S}"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out must be a folder, but {folder} is a file")
    return folder


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder before the work that fills it; take it away again if nothing was put in it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def row_progress() -> Iterator[Callable[[int, int | None, float], None]]:
    """Give what shows on stderr how far a pass over a table is: a bar on a terminal, now and then a line elsewhere."""
    if not notices.is_terminal:
        printed = 0.0

        def line(rows: int, total: int | None, seconds: float) -> None:
            nonlocal printed
            if seconds - printed >= SECONDS_PER_LINE:
                printed = seconds
                notices.print(_speed(rows, seconds, total), soft_wrap=True)

        yield line
        return
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notices, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def move(rows: int, total: int | None, seconds: float) -> None:
            bar.update(task, completed=rows, total=total, description=_speed(rows, seconds))

        yield move


def _speed(rows: int, seconds: float, total: int | None = None) -> str:
    of = "" if total is None else f" of {total:,}"
    return f"{rows:,}{of} rows in {seconds:.1f} s, {rows / max(seconds, 1e-9):,.0f} rows/s"
