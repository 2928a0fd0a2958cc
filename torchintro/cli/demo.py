"""``torchintro demo``: the introduction, step by step."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .introduction import run_demo
from .shell import console, run_folder


def demo(
    out: options.Folder = None,
    seed: options.Seed = 0,
    trials: Annotated[int, typer.Option(help="Learning rates to try.")] = 20,
) -> None:
    """Walk through PyTorch's six steps on the diabetes data, with the fused operator beside plain PyTorch.

    Takes a few seconds and leaves a model and two plots in a run folder.
    """
    run_demo(run_folder("demo", out), seed=seed, trials=trials, console=console)
