"""The command line: each command is a function in the file of its name, registered here."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from .bench import bench
from .demo import demo
from .evaluate import evaluate
from .info import info
from .predict import predict
from .shell import answering
from .train import train
from .tune import tune

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, tune and judge linear regression models with a fused linear layer and mean squared error.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"torchintro {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


for _command in (demo, train, tune, evaluate, predict, bench, info):
    app.command()(answering(_command))
