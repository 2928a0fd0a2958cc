"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..training.options import ENGINES

Data = Annotated[
    str,
    typer.Option(
        help="synthetic, diabetes, or a file: .csv, .parquet, .npy, or .npz with X and y; or a folder of files."
    ),
]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Read the file piece by piece, not into memory. Default: folders, and files above 1 GB.",
        show_default=False,
    ),
]
Target = Annotated[
    list[str] | None, typer.Option(help="Target column; repeat it for several. Default: the file's last column.")
]
Feature = Annotated[
    list[str] | None, typer.Option(help="Feature column; repeat it for several. Default: all but the targets.")
]
Epochs = Annotated[int, typer.Option(help="Passes over the training rows.")]
BatchSize = Annotated[int | None, typer.Option(help="Rows per step. Default: all.")]
OptimizerName = Annotated[str, typer.Option("--optimizer", help="An optimizer of torch.optim, such as sgd or adam.")]
Momentum = Annotated[float, typer.Option(help="The optimizer's momentum, where it has one.")]
WeightDecay = Annotated[float, typer.Option(help="The optimizer's weight decay, where it has one.")]
OptimizerOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Another argument of the optimizer, such as nesterov=true or betas=0.9,0.99; repeat it for several.",
        metavar="NAME=VALUE",
        show_default=False,
    ),
]
Engine = Annotated[
    str, typer.Option(help=f"One of {', '.join(ENGINES)}: what computes loss and gradients.", metavar="NAME")
]
Seed = Annotated[int, typer.Option(help="Seed of the split, the parameters, the mini-batches and the search.")]
TestFraction = Annotated[float, typer.Option(help="Share of the rows held out for the evaluation; 0 for none.")]
Benchmark = Annotated[bool, typer.Option(help="Time plain PyTorch too, on a few epochs, for about half a second.")]
ModelFile = Annotated[Path, typer.Option("--model", help="A model.pt that train or demo wrote.")]
Folder = Annotated[
    Path | None,
    typer.Option("--out", help="Run folder for the files written. Default: a new one in runs/.", show_default=False),
]
