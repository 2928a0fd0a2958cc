"""The commands there are, and their help."""

from __future__ import annotations

import pytest
from command_line import app
from typer.testing import CliRunner

COMMANDS = ["demo", "train", "tune", "evaluate", "predict", "bench", "info"]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(run, command):
    result = run(*([command] if command else []), "--help")
    assert "Usage: " in result.output
    for word in [command] if command else COMMANDS:
        assert word in result.output


def test_no_arguments_print_the_help():
    assert "Usage: " in CliRunner().invoke(app, []).output


def test_version(run):
    import torchintro

    assert run("--version").output == f"torchintro {torchintro.__version__}\n"
