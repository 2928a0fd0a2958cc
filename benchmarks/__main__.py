"""The benchmark's command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .run import Options, main

__all__ = ["parse"]


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Return the options that a command line asks for, by default that of this process."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times eager PyTorch, torch.compile, JAX and the fused operator side by side, after checking that "
        "they agree.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda. Default: cpu.")
    add(
        "--row",
        action="append",
        dest="cases",
        metavar="NAME",
        default=[],
        help="Name of a row of the table, or what several begin with; repeat it for several. Default: all.",
    )
    add("--json", type=Path, metavar="FILE", help="Also write the figures to this file.")
    add("--quick", action="store_true", help="Smaller sizes and fewer repeats.")
    add("--grid", action="store_true", help="Also a grid of shapes, fused against eager.")
    add("--dtype", default="float32", help="Of the grid: float32, float64 or bfloat16. Default: float32.")
    add("--no-rows", action="store_true", help="Nothing but the grid and the trials.")
    add("--plot", type=Path, metavar="FOLDER", help="Folder for the pictures.")
    add(
        "--from",
        type=Path,
        dest="record",
        metavar="RECORD",
        help="Measure nothing: show this record. Needs --plot or --table.",
    )
    add("--table", action="store_true", help="Print the Markdown tables of the record.")
    add("--crossover", action="store_true", help="With cuda and --row, also from how many rows on the GPU wins.")
    add("--trials", action="store_true", help="Also time against the number of trials, 1 to 1000.")
    given = vars(parser.parse_args(arguments))
    return Options(**{**given, "cases": tuple(given["cases"])})


if __name__ == "__main__":
    sys.exit(main(parse()))
