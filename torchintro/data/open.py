"""Tables in files or frames, opened to be streamed or read at once: :func:`open_table` and :func:`read_table`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..nn import Standardize
from .columns import TableError, choose, listed, spoken_by
from .csv_files import CsvFile
from .datasets import Dataset
from .numpy_files import NpyFile, NpzFile
from .sources import FileSource, Frame, PolarsFile, Source, files_of, partition_of
from .table import Table

__all__ = ["open_table", "read_table"]

# What reads each kind of file; all others are read by Polars.
FILES: dict[str, Callable[[Path, str], FileSource]] = {"CSV": CsvFile, "TSV": CsvFile, "NPY": NpyFile, "NPZ": NpzFile}


def open_table(
    source: Any,
    *,
    target: str | Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    standardize: Standardize | None = None,
) -> Table:
    """Open a table to be streamed, of any size: a file, a folder of files of one kind, or a frame in memory.

    Files: ``.csv`` and ``.tsv`` with a line of names (also ``.csv.gz``, ``.csv.zst``), ``.parquet``, Arrow IPC
    (``.arrow``, ``.feather``, ``.ipc``), ``.npy`` with a matrix whose columns are called ``0``, ``1``... and ``.npz``
    with arrays ``X`` and ``y``, whose columns are ``X0``, ``X1``... and ``y0``, ``y1``...

    A folder's files are taken in the order of their names, those of its sub-folders too, hidden ones and other kinds of
    file left out; all must have the same columns. In a folder of Parquet or Arrow files, sub-folders called
    ``name=value`` give a column ``name``, before the others.

    Args:
        source: The path of the file or folder; or a frame: a Polars DataFrame or LazyFrame, a pandas DataFrame, a
            pyarrow Table, or whatever else has ``__arrow_c_stream__``.
        target: Name or names of the target columns, ``()`` for none; by default the last column (in a ``.npz`` file
            those of ``y``).
        features: Names of the feature columns; by default all but the targets.
        dtype: Type of the tensors, a floating-point one.
        standardize: What shifts and scales the features, fitted before on such features. It does so in float64, before
            they are rounded to ``dtype``.

    Returns:
        The table, of which only what describes it has been read.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ImportError: It needs Polars, which is not installed.
        OSError: A file or a sub-folder cannot be read.
        TypeError: ``source`` is something else, or ``dtype`` no floating-point type.
        ValueError: It is no such table, or a column is missing or not numeric.

    Example:
        >>> table = open_table("houses.parquet", target="price")  # doctest: +SKIP
        >>> for X, y in table.pieces():  # doctest: +SKIP
        ...     statistics.update(X, y)
    """
    with spoken_by("open_table"):
        return _open(source, target, features, dtype, standardize)


def read_table(
    source: Any,
    *,
    target: str | Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    standardize: Standardize | None = None,
) -> Dataset:
    """Read a table into memory.

    Equivalent to ``open_table(source, ...).read()``.

    Args:
        source: As for :func:`open_table`.
        target: As for :func:`open_table`.
        features: As for :func:`open_table`.
        dtype: As for :func:`open_table`.
        standardize: As for :func:`open_table`.

    Returns:
        The data set, named after the file.

    Raises:
        ImportError: As for :func:`open_table`.
        OSError: The file cannot be read.
        TypeError: As for :func:`open_table`.
        ValueError: The file is no such table, or a column is missing, not numeric or has missing values.

    Example:
        >>> dataset = read_table("houses.csv", target="price")  # doctest: +SKIP
    """
    with spoken_by("read_table"):
        return _open(source, target, features, dtype, standardize).read_for("read_table")


def _open(
    source: Any,
    target: str | Sequence[str] | None,
    features: Sequence[str] | None,
    dtype: torch.dtype,
    standardize: Standardize | None,
) -> Table:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise TableError(f"dtype must be a floating-point type of 16 bits or more, but got {dtype!r}", TypeError)
    path, files = _sources(source)
    names = files[0].names
    if not names:
        raise TableError(f"{files[0].path} has no columns")
    for file in files[1:]:
        if file.names != names:
            raise TableError(
                f"{file.path} must have the columns of {files[0].path}, {listed(names)}, "
                f"but has {listed(file.names) or 'none'}"
            )
    if all(file.rows == 0 for file in files):
        raise TableError(f"{path} has no rows")
    feature_names, target_names = choose(path, names, target, features, files[0].default_targets)
    wide = [file.is_wide((*feature_names, *target_names)) for file in files]
    if standardize is not None:
        if not isinstance(standardize, Standardize):
            raise TableError(f"standardize must be a Standardize, but got {type(standardize).__name__}", TypeError)
        if standardize.mean.shape[0] != len(feature_names):
            raise TableError(
                f"standardize must be for {len(feature_names)} features, but is for {standardize.mean.shape[0]}"
            )
    return Table(path, files, feature_names, target_names, dtype, standardize, any(wide))


def _sources(given: Any) -> tuple[Path | str, tuple[Source, ...]]:
    """Return what a table is called and what it is read from: the one place that tells kinds of source apart."""
    if isinstance(given, str | Path):
        path = Path(given)
        files = files_of(path)
        base = path if path.is_dir() else path.parent
        return path, tuple(
            FILES[kind](file, kind) if kind in FILES else PolarsFile(file, kind, partition_of(file, base))
            for file, kind in files
        )
    if hasattr(given, "__arrow_c_stream__") or hasattr(given, "collect_schema"):
        frame = Frame(given)
        return frame.path, (frame,)
    raise TableError(
        f"source must be a path or a frame (Polars, pandas, pyarrow), but got {type(given).__name__}", TypeError
    )
