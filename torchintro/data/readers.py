"""Files of tables, read block by block: Parquet and CSV by pyarrow, NPY by seeking and reading.

A reader knows one format. It describes a file without reading it (:class:`File`) and yields the rows of a range as
blocks of a few megabytes, each with the number of its first row, so that memory does not grow with the file.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import columns as _columns

__all__ = ["READERS", "Block", "File", "NpyReader", "ParquetReader", "Reader"]

Array = npt.NDArray[Any]

# Decoded bytes of a block. Smaller ones cost pyarrow's fixed work a column more often, larger ones leave the caches.
BLOCK_BYTES = 8 << 20
# Elements that are transposed at once: they stay in the second-level cache between the columns' copy and the rows' one.
TRANSPOSED = 1 << 18
# A row group larger than this is read through a buffer for each column; a smaller one at once, which is faster.
WHOLE_ROW_GROUP = 64 << 20


@dataclass(frozen=True)
class File:
    """One file of a table.

    Attributes:
        path: Where it is.
        size: Bytes on disk.
        modified: Time of its last change, in nanoseconds.
        names: Its columns.
        rows: How many it has; None where only reading it would tell.
        edges: Rows at which it is cut best: 0, the ends of the row groups, the number of rows.
        detail: What its reader wants to remember.
    """

    path: Path
    size: int
    modified: int
    names: tuple[str, ...]
    rows: int | None
    edges: tuple[int, ...] = ()
    detail: Any = None

    def check(self, function: str) -> None:
        """Raise an error where the file is gone or is no longer the one that was opened."""
        try:
            state = self.path.stat()
        except OSError as error:
            raise FileNotFoundError(f"{function}: {self.path} is no longer there") from error
        if (state.st_size, state.st_mtime_ns) != (self.size, self.modified):
            raise ValueError(f"{function}: {self.path} has changed since the table was opened")


class Block(Protocol):
    """Rows of a file; the first is row ``first`` of it, counted from 0."""

    first: int
    rows: int

    def write(self, start: int, X: Tensor, y: Tensor) -> None:
        """Write the rows from ``start`` on to the features ``X (n, D)`` and targets ``y (n, T)``, row by row."""

    def values(self, column: int, start: int, rows: int) -> npt.NDArray[np.float64]:
        """Return values of a column, features first, in float64; a missing one is NaN."""


class Reader(Protocol):
    """A format."""

    def describe(self, function: str, path: Path) -> File:
        """Return what can be known of a file without reading it all."""

    def check_numeric(self, function: str, file: File, names: Sequence[str]) -> None:
        """Raise a ValueError where a column is known to hold no numbers."""

    def blocks(
        self, function: str, file: File, names: Sequence[str], features: int, first: int, last: int
    ) -> Iterator[Block]:
        """Yield rows ``first`` to ``last`` in order; the first ``features`` of ``names`` are the features."""


def cells(rows: int, columns: int) -> int:
    """Return how many of a block's rows are transposed at once."""
    return max(1, min(rows, TRANSPOSED // max(columns, 1)))


class ColumnBlock:
    """A block whose columns lie one after the other: one array of numbers each."""

    def __init__(self, first: int, rows: int, features: Sequence[Array], targets: Sequence[Array]) -> None:
        self.first, self.rows = first, rows
        self._features, self._targets = features, targets

    def write(self, start: int, X: Tensor, y: Tensor) -> None:
        step = cells(X.shape[0], X.shape[1])
        for out, columns in ((X, self._features), (y, self._targets)):
            scratch = np.empty(len(columns) * step, _scratch_type(out.dtype, columns))
            for a in range(0, out.shape[0], step):
                n = min(step, out.shape[0] - a)
                # Contiguous, whatever n is: then torch transposes it by blocks.
                cut = scratch[: len(columns) * n].reshape(len(columns), n)
                with np.errstate(
                    over="ignore"
                ):  # values too large for the type become infinite, which is answered later
                    for j, column in enumerate(columns):
                        cut[j] = column[start + a : start + a + n]
                out[a : a + n].copy_(torch.from_numpy(cut).t())

    def values(self, column: int, start: int, rows: int) -> npt.NDArray[np.float64]:
        arrays = [*self._features, *self._targets]
        return arrays[column][start : start + rows].astype(np.float64)


class RowBlock:
    """A block whose rows lie one after the other, with more columns than are wanted."""

    def __init__(self, first: int, matrix: Array, features: Array | slice, targets: Array | slice) -> None:
        self.first, self.rows = first, matrix.shape[0]
        self._matrix, self._features, self._targets = matrix, features, targets

    def write(self, start: int, X: Tensor, y: Tensor) -> None:
        for out, columns in ((X, self._features), (y, self._targets)):
            given = self._matrix[start : start + out.shape[0], columns]
            scratch = _scratch_type(out.dtype, [given[:0]])
            with np.errstate(over="ignore"):
                if out.dtype in (torch.float32, torch.float64):
                    np.copyto(out.numpy(), given, casting="unsafe")
                else:
                    out.copy_(torch.from_numpy(given.astype(scratch)))

    def values(self, column: int, start: int, rows: int) -> npt.NDArray[np.float64]:
        width = self._matrix.shape[1]
        order = np.concatenate([np.arange(width)[self._features], np.arange(width)[self._targets]])
        return self._matrix[start : start + rows, order[column]].astype(np.float64)


def _scratch_type(dtype: torch.dtype, columns: Sequence[Array]) -> type[np.floating[Any]]:
    """Return the NumPy type on the way to ``dtype``: the same one, or one that rounds nothing before torch does."""
    if dtype in (torch.float32, torch.float64):
        return np.float32 if dtype == torch.float32 else np.float64
    return np.float32 if all(np.can_cast(column.dtype, np.float32) for column in columns) else np.float64


def state_of(function: str, path: Path) -> os.stat_result:
    """Return a file's size and times, or raise one sentence."""
    try:
        return path.stat()
    except OSError as error:
        raise FileNotFoundError(f"{function}: there is no file {path}") from error


class ParquetReader:
    """Parquet, of which the wanted columns only are read and decoded, a batch of rows at a time."""

    def describe(self, function: str, path: Path) -> File:
        """Read the file's metadata."""
        pyarrow = _columns.extra("pyarrow", function, "pyarrow", "tables")
        state = state_of(function, path)
        try:
            with _columns.extra("pyarrow.parquet", function, "pyarrow", "tables").ParquetFile(path) as parquet:
                metadata, schema = parquet.metadata, parquet.schema_arrow
                groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except (pyarrow.ArrowException, OSError) as error:
            raise _columns.no_table(function, path, error) from error
        names = tuple(schema.names)
        _columns.twice(function, path, names)
        kinds = {name: (_columns.is_numeric(kind), str(kind)) for name, kind in zip(names, schema.types, strict=True)}
        edges = tuple(itertools.accumulate(groups, initial=0))
        return File(path, state.st_size, state.st_mtime_ns, names, edges[-1], edges, kinds)

    def check_numeric(self, function: str, file: File, names: Sequence[str]) -> None:
        """Look at the types in the file's metadata."""
        for name in names:
            numeric, kind = file.detail[name]
            if not numeric:
                raise _columns.no_numbers(function, file.path, name, kind)

    def blocks(
        self, function: str, file: File, names: Sequence[str], features: int, first: int, last: int
    ) -> Iterator[Block]:
        """Read the row groups that have rows of the range, and drop what comes before and after it."""
        pyarrow = _columns.extra("pyarrow", function, "pyarrow", "tables")
        parquet = _columns.extra("pyarrow.parquet", function, "pyarrow", "tables")
        groups = [i for i in range(len(file.edges) - 1) if file.edges[i] < last and file.edges[i + 1] > first]
        if not groups:
            return
        try:
            with parquet.ParquetFile(file.path) as opened:
                metadata = opened.metadata
            largest = max(metadata.row_group(i).total_byte_size for i in groups)
            buffer = 0 if largest <= WHOLE_ROW_GROUP else min(max(WHOLE_ROW_GROUP // len(names), 1 << 14), 1 << 20)
            rows = min(max(BLOCK_BYTES // (4 * len(names)), 1 << 10), 1 << 16)
            # pre_buffer, pyarrow's default, would keep the compressed bytes of all row groups.
            with parquet.ParquetFile(file.path, metadata=metadata, buffer_size=buffer, pre_buffer=False) as opened:
                at = file.edges[groups[0]]
                for batch in opened.iter_batches(rows, row_groups=groups, columns=list(names)):
                    start, end = max(first - at, 0), min(last - at, batch.num_rows)
                    if start < end:
                        # By position: pyarrow looks for a name among all names.
                        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                        arrays = [_numbers(pyarrow, columns[name].slice(start, end - start)) for name in names]
                        yield ColumnBlock(at + start, end - start, arrays[:features], arrays[features:])
                    at += batch.num_rows
                    if at >= last:
                        break
        except (pyarrow.ArrowException, OSError) as error:
            raise _columns.no_table(function, file.path, error) from error


def _numbers(pyarrow: Any, column: Any) -> Array:
    """Return an Arrow column as an array of numbers, by reference where that is possible; what is missing is NaN."""
    is_a = pyarrow.types
    if column.null_count or not (is_a.is_floating(column.type) or is_a.is_integer(column.type)):
        column = column.cast(pyarrow.float64(), safe=False)
    return np.asarray(column.to_numpy(zero_copy_only=False))


@dataclass(frozen=True)
class _Layout:
    """Where the numbers of an NPY file are."""

    offset: int
    shape: tuple[int, int]
    by_columns: bool
    dtype: str


class NpyReader:
    """NPY: whole rows by readinto, or of an array in Fortran order a stretch of each wanted column.

    Not by a memory map: its pages count as the process's memory, and a file that is cut short ends it by a signal.
    """

    def describe(self, function: str, path: Path) -> File:
        """Read the array's header."""
        state = state_of(function, path)
        try:
            with path.open("rb") as handle:
                version = np.lib.format.read_magic(handle)
                if version not in ((1, 0), (2, 0), (3, 0)):
                    raise ValueError(f"unknown version {version}")
                # 2.0 has a longer header, 3.0 another encoding of it; numbers have ASCII headers in all three.
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, by_columns, dtype = read(handle)
                offset = handle.tell()
            if dtype.hasobject:
                raise ValueError("Python objects")
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{function}: {path} is not a NumPy .npy file of numbers") from error
        if len(shape) != 2:
            raise ValueError(f"{function}: {path} must have two dimensions, but has shape {shape}")
        missing = offset + shape[0] * shape[1] * dtype.itemsize - state.st_size
        if missing > 0:
            raise ValueError(f"{function}: {path} is cut short: {missing} bytes of its array are missing")
        layout = _Layout(offset, (int(shape[0]), int(shape[1])), bool(by_columns), dtype.str)
        names = tuple(str(i) for i in range(shape[1]))
        return File(path, state.st_size, state.st_mtime_ns, names, layout.shape[0], (0, layout.shape[0]), layout)

    def check_numeric(self, function: str, file: File, names: Sequence[str]) -> None:
        """Look at the array's dtype."""
        dtype = np.dtype(file.detail.dtype)
        if dtype.kind not in "biuf":
            raise _columns.no_numbers(function, file.path, names[0], dtype)

    def blocks(
        self, function: str, file: File, names: Sequence[str], features: int, first: int, last: int
    ) -> Iterator[Block]:
        """Seek to the range and read it piece by piece into memory that is used again."""
        layout: _Layout = file.detail
        dtype, (_, columns) = np.dtype(layout.dtype), layout.shape
        wanted = np.array([int(name) for name in names])
        with file.path.open("rb", buffering=0) as handle:
            if layout.by_columns:
                yield from self._by_columns(function, file, handle, dtype, wanted, features, first, last)
                return
            rows = max(1, min(BLOCK_BYTES // 4 // (columns * dtype.itemsize), last - first))
            matrix = np.empty((rows, columns), dtype)
            chosen = _as_slice(wanted[:features]), _as_slice(wanted[features:])
            for at in range(first, last, rows):
                n = min(rows, last - at)
                _read(function, file, handle, layout.offset + at * columns * dtype.itemsize, matrix[:n])
                yield RowBlock(at, matrix[:n], *chosen)

    def _by_columns(
        self,
        function: str,
        file: File,
        handle: BinaryIO,
        dtype: np.dtype[Any],
        wanted: Array,
        features: int,
        first: int,
        last: int,
    ) -> Iterator[Block]:
        total = file.detail.shape[0]
        # Short stretches would be slow to read, so a wide table takes some more memory.
        rows = min(max(BLOCK_BYTES // (len(wanted) * dtype.itemsize), 1 << 12), last - first)
        matrix = np.empty((len(wanted), rows), dtype)
        for at in range(first, last, rows):
            n = min(rows, last - at)
            for j, column in enumerate(wanted.tolist()):
                offset = file.detail.offset + (column * total + at) * dtype.itemsize
                _read(function, file, handle, offset, matrix[j, :n])
            yield ColumnBlock(at, n, list(matrix[:features, :n]), list(matrix[features:, :n]))


def _as_slice(columns: Array) -> Array | slice:
    """Return neighbouring columns as a slice, which needs no copy."""
    if not len(columns):  # of no targets
        return slice(0, 0)
    run = np.array_equal(columns, np.arange(columns[0], columns[0] + len(columns)))
    return slice(int(columns[0]), int(columns[0]) + len(columns)) if run else columns


def _read(function: str, file: File, handle: BinaryIO, offset: int, into: Array) -> None:
    view = memoryview(into.reshape(-1).view(np.uint8).data)
    handle.seek(offset)
    while len(view):
        count = handle.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"{function}: {file.path} is cut short at byte {handle.tell()}")
        view = view[count:]


READERS: dict[str, Reader] = {".parquet": ParquetReader(), ".npy": NpyReader()}
