"""Tables in files, read into memory: :func:`read_table`."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import columns as _columns
from .datasets import Dataset

__all__ = ["read_features", "read_table"]

TABLE_SUFFIXES = (".csv", ".parquet", ".npy", ".npz")


def read_table(
    path: str | Path,
    *,
    target: str | Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """Read features and targets from a file.

    A ``.csv`` file has a line of column names; a ``.parquet`` file has them too; the columns of a two-dimensional
    ``.npy`` array are called ``0``, ``1`` and so on. A ``.npz`` file holds an array ``X`` and an array ``y``, whose
    columns are called ``X0``, ``X1``... and ``y0``, ``y1``...

    Args:
        path: The file; its suffix says what it holds.
        target: Name or names of the target columns; by default the last column (in a ``.npz`` file those of ``y``).
        features: Names of the feature columns; by default all but the targets.
        dtype: Type of the tensors.

    Returns:
        The data set, named after the file.

    Raises:
        ImportError: The file needs pyarrow, which is not installed.
        OSError: The file cannot be read.
        ValueError: The file is no such table, or a column is missing, not numeric or has missing values.

    Example:
        >>> dataset = read_table("houses.csv", target="price")  # doctest: +SKIP
    """
    path = Path(path)
    columns = _read_columns("read_table", path)
    names = tuple(columns)
    of_y = tuple(name for name in names if name.startswith("y")) if path.suffix.lower() == ".npz" else names[-1:]
    feature_names, target_names = _columns.choose("read_table", path, names, target, features, of_y)
    X = _matrix("read_table", path, columns, feature_names, dtype)
    y = _matrix("read_table", path, columns, target_names, dtype)
    return Dataset(str(path), X, y, feature_names, target_names)


def read_features(path: str | Path, feature_names: Sequence[str], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Read the named columns of a file, whatever else it holds.

    Args:
        path: A file as :func:`read_table` takes it.
        feature_names: Names of the columns, in the order wanted.
        dtype: Type of the tensor.

    Returns:
        Features ``(N, len(feature_names))``.

    Raises:
        ImportError: The file needs pyarrow, which is not installed.
        OSError: The file cannot be read.
        ValueError: The file is no such table, or a column is missing, not numeric or has missing values.

    Example:
        >>> X = read_features("new_houses.csv", ["area", "rooms"])  # doctest: +SKIP
    """
    path = Path(path)
    return _matrix("read_features", path, _read_columns("read_features", path), tuple(feature_names), dtype)


def _read_columns(function: str, path: Path) -> dict[str, Any]:
    """Return the columns of a file by name, as NumPy arrays of one dimension or as pyarrow columns."""
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{function}: {path} must end in one of {', '.join(TABLE_SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{function}: there is no file {path}")
    columns = _read_arrow(function, path) if suffix in (".csv", ".parquet") else _read_numpy(function, path)
    if not columns:
        raise ValueError(f"{function}: {path} has no columns")
    if len(next(iter(columns.values()))) == 0:
        raise ValueError(f"{function}: {path} has no rows")
    return columns


def _read_arrow(function: str, path: Path) -> dict[str, Any]:
    pyarrow = _columns.extra("pyarrow", function, "pyarrow")
    try:
        if path.suffix.lower() == ".csv":
            table = _columns.extra("pyarrow.csv", function, "pyarrow").read_csv(path)
        else:
            # One file, not a data set of files: the path is taken literally.
            table = _columns.extra("pyarrow.parquet", function, "pyarrow").ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise _columns.no_table(function, path, error) from error
    _columns.twice(function, path, table.column_names)
    return dict(zip(table.column_names, table.columns, strict=True))


def _read_numpy(function: str, path: Path) -> dict[str, Any]:
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{function}: {path} is not a NumPy {path.suffix} file of numbers") from error
    if path.suffix.lower() == ".npz":
        if set(arrays) != {"X", "y"}:
            raise ValueError(
                f"{function}: {path} must hold the arrays X and y, but holds {', '.join(arrays) or 'none'}"
            )
        # In a file one dimension is a column, since nothing else could be meant.
        arrays = {key: array[:, None] if array.ndim == 1 else array for key, array in arrays.items()}
    for key, array in arrays.items():
        if array.ndim != 2:
            what = f"array {key} of {path}" if key else str(path)
            raise ValueError(f"{function}: {what} must have two dimensions, but has shape {array.shape}")
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{function}: {path} must have as many rows in X as in y, but has {lengths['X']} and {lengths['y']}"
        )
    return {f"{key}{i}": array[:, i] for key, array in arrays.items() for i in range(array.shape[1])}


def _matrix(function: str, path: Path, columns: dict[str, Any], names: tuple[str, ...], dtype: torch.dtype) -> Tensor:
    _columns.check_names(function, path, columns, names)
    arrays = [_numbers(function, path, name, columns[name]) for name in names]
    matrix = torch.as_tensor(np.stack(arrays, axis=1)).to(dtype)
    for name, column in zip(names, matrix.unbind(1), strict=True):
        if not math.isfinite(column.abs().max().item()):
            raise ValueError(
                f"{function}: column {name!r} of {path} has values beyond {str(dtype).removeprefix('torch.')}"
            )
    return matrix


def _numbers(function: str, path: Path, name: str, column: Any) -> npt.NDArray[np.float64]:
    if isinstance(column, np.ndarray):
        kind, numeric, array = str(column.dtype), column.dtype.kind in "biuf", column
    else:
        pyarrow = _columns.extra("pyarrow", function, "pyarrow")
        kind = str(column.type)
        numeric = _columns.is_numeric(column.type) or column.null_count == len(column)
        array = column.cast(pyarrow.float64(), safe=False).to_numpy() if numeric else np.empty(0)
    if not numeric:
        raise _columns.no_numbers(function, path, name, kind)
    values = np.asarray(array, dtype=np.float64)
    error = _columns.not_finite(function, path, name, values)
    if error is not None:
        raise error
    return values
