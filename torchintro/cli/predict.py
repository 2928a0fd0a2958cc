"""``torchintro predict``: apply a saved model to rows."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import evaluation
from ..data.table import Table
from ..saving import load_model
from . import options
from .problem import rows_of
from .report import write_csv, write_rows
from .shell import row_progress


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
    # Lines of predictions on a terminal show how far they are; a bar would be in their way.
    with contextlib.nullcontext() if out is None else row_progress() as progress:
        # Of a table no more than a piece is in memory.
        pieces = (X for X, _ in source.pieces(progress=progress)) if isinstance(source, Table) else iter([source.X])
        predictions = (evaluation.predict(linear, X) for X in pieces)
        rows = ([format(value, ".9g") for value in row] for part in predictions for row in part.tolist())
        if out is None:
            write_rows(sys.stdout, saved.target_names, rows)
        else:
            write_csv(out, saved.target_names, rows)
