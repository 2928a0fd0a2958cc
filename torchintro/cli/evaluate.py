"""``torchintro evaluate``: judge a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import evaluation
from ..data.datasets import Dataset
from ..data.table import Table
from ..saving import SavedModel, load_model
from . import options
from .problem import rows_of, split
from .report import metrics_table
from .shell import console, row_progress


def evaluate(
    model: options.ModelFile,
    data: options.Data = "diabetes",
    stream: options.Stream = None,
    held_out: Annotated[
        bool, typer.Option("--held-out/--all-rows", help="Only the rows that train or demo held out of this data.")
    ] = False,
) -> None:
    """Judge a saved model: mean squared error, its root, mean absolute error and R2."""
    saved = load_model(model)
    linear, rows = rows_of(saved, data, stream=stream)
    if held_out:
        _check_same(saved, data, _count(rows))
        _, rows = split(rows, {"--held-out": saved.metadata["test_fraction"]}, saved.metadata["seed"])
    count = _count(rows)
    console.print(f"{model} on {data}" + ("" if count is None else f", {count} rows"), soft_wrap=True)
    X_and_y = (rows,) if isinstance(rows, Table) else (rows.X, rows.y)
    with row_progress() as progress:
        metrics = evaluation.evaluate(linear, *X_and_y, progress=progress)
    console.print(metrics_table({"held out" if held_out else "all rows": metrics}))


def _count(rows: Dataset | Table) -> int | None:
    return rows.rows if isinstance(rows, Table) else len(rows)


def _check_same(saved: SavedModel, data: str, rows: int | None) -> None:
    """Raise a ValueError unless ``--data`` may be what rows were held out of when the model was trained."""
    kept = saved.metadata
    same = rows is None or kept.get("rows") == rows
    if not same or Path(str(kept.get("data"))).name != Path(data).name or not kept.get("test_fraction"):
        source = f"{kept.get('data')} with {kept.get('rows')} rows, {kept.get('test_fraction')} held out"
        raise ValueError(
            f"evaluate: --held-out needs the data that the model was trained on ({source}), but got {data}"
            + ("" if rows is None else f" with {rows} rows")
        )
