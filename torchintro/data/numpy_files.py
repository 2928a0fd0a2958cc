"""NPY and NPZ files, read by NumPy: no package but the ones that are there anyway is needed for them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .columns import TableError, no_numbers
from .sources import Block, FileSource

__all__ = ["NpyFile", "NpzFile"]

# What is read at once, unless a row is longer.
READ_BYTES = 8 << 20


class _Arrays(FileSource):
    """What both formats have: columns of one dtype for each array."""

    dtypes: dict[str, np.dtype[Any]]

    def is_wide(self, names: Sequence[str]) -> bool:
        for name in names:
            if self.dtypes[name].kind not in "biuf":
                raise no_numbers(self.path, name, self.dtypes[name])
        return not all(np.can_cast(self.dtypes[name], np.float32) for name in names)

    def value(self, name: str, row: int) -> float:
        block = next(self.blocks([name], 1, wide=True, first=row, last=row + 1, rows=1))
        return float(block.X[0, 0])


class NpyFile(_Arrays):
    """A matrix: read by whole rows, or from an array in Fortran order by stretches of the wanted columns.

    Not by a memory map: its pages count as the process's memory, and a file that is cut short ends it by a signal.
    """

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(path, kind)
        try:
            with path.open("rb") as handle:
                version = np.lib.format.read_magic(handle)
                if version not in ((1, 0), (2, 0), (3, 0)):
                    raise ValueError(f"unknown version {version}")
                # 2.0 has a longer header, 3.0 another encoding of it; numbers have ASCII headers in all three.
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, self._by_columns, dtype = read(handle)
                self._offset = handle.tell()
            if dtype.hasobject:
                raise ValueError("Python objects")
        except (ValueError, EOFError, OSError) as error:
            raise TableError(f"{path} is not a NumPy .npy file of numbers") from error
        if len(shape) != 2:
            raise TableError(f"{path} must have two dimensions, but has shape {shape}")
        missing = self._offset + shape[0] * shape[1] * dtype.itemsize - self.size
        if missing > 0:
            raise TableError(f"{path} is cut short: {missing} bytes of its array are missing")
        self.rows, self._dtype = int(shape[0]), dtype
        self.names = tuple(str(i) for i in range(shape[1]))
        self.dtypes = dict.fromkeys(self.names, dtype)

    def blocks(
        self, names: Sequence[str], features: int, *, wide: bool, first: int, last: int | None, rows: int
    ) -> Iterator[Block]:
        """Seek to the range and read it piece by piece into memory that is used again."""
        last = self.count() if last is None else last
        wanted = np.array([int(name) for name in names])
        width = len(wanted) if self._by_columns else len(self.names)
        rows = max(1, min(rows, last - first, READ_BYTES // (width * self._dtype.itemsize)))
        matrix = np.empty((width, rows) if self._by_columns else (rows, width), self._dtype)
        with self.path.open("rb", buffering=0) as handle:
            for at in range(first, last, rows):
                n = min(rows, last - at)
                if self._by_columns:
                    for j, column in enumerate(wanted.tolist()):
                        self._read(handle, column * self.count() + at, matrix[j, :n])
                    chosen = matrix[:, :n].T
                else:
                    self._read(handle, at * width, matrix[:n])
                    chosen = matrix[:n] if np.array_equal(wanted, np.arange(width)) else matrix[:n, wanted]
                yield Block(at, *_converted(chosen, features, wide))

    def _read(self, handle: BinaryIO, element: int, into: npt.NDArray[Any]) -> None:
        view = memoryview(into.reshape(-1).view(np.uint8).data)
        handle.seek(self._offset + element * self._dtype.itemsize)
        while len(view):
            count = handle.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise TableError(f"{self.path} is cut short at byte {handle.tell()}")
            view = view[count:]


class NpzFile(_Arrays):
    """The arrays ``X`` and ``y``, which are read at once and stay in memory."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(path, kind)
        try:
            with np.load(path, allow_pickle=False) as loaded:
                arrays = dict(loaded)
        except (ValueError, EOFError, OSError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise TableError(f"{path} is not a NumPy .npz file of numbers") from error
        if set(arrays) != {"X", "y"}:
            raise TableError(f"{path} must hold the arrays X and y, but holds {', '.join(arrays) or 'none'}")
        # In a file one dimension is a column, since nothing else could be meant.
        arrays = {key: array[:, None] if array.ndim == 1 else array for key, array in arrays.items()}
        for key, array in arrays.items():
            if array.ndim != 2:
                raise TableError(f"array {key} of {path} must have two dimensions, but has shape {array.shape}")
        X, y = arrays["X"], arrays["y"]
        if len(X) != len(y):
            raise TableError(f"{path} must have as many rows in X as in y, but has {len(X)} and {len(y)}")
        self._columns = {f"{key}{i}": arrays[key][:, i] for key in ("X", "y") for i in range(arrays[key].shape[1])}
        self.names, self.rows = tuple(self._columns), len(X)
        self.dtypes = {name: column.dtype for name, column in self._columns.items()}

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The columns of ``y``."""
        return tuple(name for name in self.names if name.startswith("y"))

    def blocks(
        self, names: Sequence[str], features: int, *, wide: bool, first: int, last: int | None, rows: int
    ) -> Iterator[Block]:
        """Put the columns side by side."""
        last = self.count() if last is None else last
        for at in range(first, last, rows):
            columns = [self._columns[name][at : min(at + rows, last)] for name in names]
            yield Block(at, *_converted(np.stack(columns, 1), features, wide))


def _converted(matrix: npt.NDArray[Any], features: int, wide: bool) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return features and targets in memory of their own."""
    dtype = np.float64 if wide else np.float32
    with np.errstate(over="ignore"):  # values too large for the type become infinite, which is answered later
        X, y = (part.astype(dtype, order="C", copy=True) for part in (matrix[:, :features], matrix[:, features:]))
    return X, y
