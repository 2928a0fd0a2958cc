"""Running the commands: in this process, or as processes of their own."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")

from rich.console import Console
from typer.testing import CliRunner

from torchintro.cli.app import app

__all__ = ["app", "houses", "printed", "run", "start"]


def run(*arguments, code=0):
    """Run one command in this process and check its exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code != code:
        pytest.fail(f"exit code {result.exit_code}: {result.output}\n{result.exception!r}")
    return result


def printed(what):
    """Return what rich prints of it."""
    file = io.StringIO()
    Console(file=file, width=100).print(what)
    return file.getvalue()


@contextlib.contextmanager
def start(*arguments, cwd, env=None):
    """Run one command as a process, for what signals and streams do to it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "torchintro", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the suite runs in the background, the shell has it ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        try:
            yield process
        finally:  # a failed test does not wait for a million trials
            process.kill()


def houses(path):
    """Write a CSV file of 80 rows whose price follows from area and rooms."""
    generator = np.random.default_rng(0)
    area, rooms = generator.uniform(40, 160, 80), generator.integers(1, 7, 80)
    price = 2.5 * area + 9 * rooms + 20
    lines = [f"{a:.4f},{r},{p:.4f},h{i}" for i, (a, r, p) in enumerate(zip(area, rooms, price, strict=True))]
    path.write_text("\n".join(["area,rooms,price,id", *lines]) + "\n")
    return path
