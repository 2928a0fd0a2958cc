"""``torchintro predict``: apply a saved model to rows."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from .. import evaluation
from ..data.table import Table
from ..saving import load_model
from . import options
from .problem import rows_of
from .report import write_csv, write_rows

__all__ = ["predict"]


def predict(
    model: options.ModelFile,
    data: options.Data = "diabetes",
    stream: options.Stream = None,
    out: Annotated[Path | None, typer.Option(help="CSV file to write. Default: standard output.")] = None,
) -> None:
    """Predict the targets of rows and write them as CSV.

    The data needs the columns of the model's features; others may be there.
    """
    saved = load_model(model)
    linear, source = rows_of(saved, data, stream=stream, with_targets=False)
    # Of a table no more than a piece is in memory.
    pieces: Iterable[Tensor] = (X for X, _ in source.pieces()) if isinstance(source, Table) else [source.X]
    predictions = (evaluation.predict(linear, X) for X in pieces)
    rows = ([format(value, ".9g") for value in row] for part in predictions for row in part.tolist())
    if out is None:
        write_rows(sys.stdout, saved.target_names, rows)
    else:
        write_csv(out, saved.target_names, rows)
