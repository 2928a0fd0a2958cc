"""``torchintro bench``: implementations of the loss and of training, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["bench"]


def bench(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    row: Annotated[
        list[str] | None,
        typer.Option("--row", help="Name of a row of the table; repeat it for several. Default: all."),
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes and fewer repeats.")] = False,
    grid: Annotated[bool, typer.Option("--grid", help="Also a grid of shapes, fused against eager.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the grid: float32, float64 or bfloat16.")] = "float32",
    no_rows: Annotated[bool, typer.Option("--no-rows", help="Nothing but the grid and the trials.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Folder for the pictures.")] = None,
    record: Annotated[
        Path | None,
        typer.Option("--from", help="Measure nothing: show this record. Needs --plot or --table."),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Print the Markdown tables of the record.")] = False,
    crossover: Annotated[
        bool, typer.Option("--crossover", help="With cuda and --row, also from how many rows on the GPU wins.")
    ] = False,
    trials: Annotated[
        bool, typer.Option("--trials", help="Also time against the number of trials, 1 to 1000.")
    ] = False,
) -> None:
    """Time eager PyTorch, torch.compile, JAX and the fused operator side by side, after checking that they agree."""
    from benchmarks.command import main

    code = main(
        device,
        row,
        json,
        quick,
        grid=grid,
        dtype=dtype,
        no_rows=no_rows,
        plot=plot,
        record_path=record,
        table=table,
        crossover=crossover,
        trials=trials,
    )
    raise typer.Exit(code)
