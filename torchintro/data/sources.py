"""What a table is read from: the files of a folder, and the rows of one file or frame as blocks, by Polars.

A source describes itself without being read, and yields the rows of a range as blocks of numbers, so that memory does
not grow with it. NPY and NPZ are in `numpy_files.py`, CSV, which has no types and no row numbers, in `csv_files.py`.
"""

from __future__ import annotations

import abc
import hashlib
import stat
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from .columns import TableError, extra, no_numbers, no_table, twice

if TYPE_CHECKING:
    import polars

__all__ = [
    "Block",
    "FileSource",
    "Frame",
    "PolarsFile",
    "Source",
    "batches",
    "files_of",
    "is_finite",
    "matrices",
    "partition_of",
    "polars_",
    "polars_errors",
]

# The kinds of file, by the ends of their names.
SUFFIXES = {".csv": "CSV", ".parquet": "PARQUET", ".npy": "NPY", ".npz": "NPZ", ".tsv": "TSV"}
SUFFIXES |= dict.fromkeys((".arrow", ".feather", ".ipc"), "ARROW")
COMPRESSED = (".gz", ".zst")
# Arrow files are mapped into memory, and what was read of a map stays there: so many rows at a time are.
MAPPED_ROWS = 1 << 17
# What float32 holds without rounding.
NARROW = ("Float16", "Float32", "Int8", "Int16", "UInt8", "UInt16", "Boolean", "Null")


class Block(NamedTuple):
    """Rows of a source; the first is row ``first`` of it, counted from 0. What is missing is NaN."""

    first: int
    X: npt.NDArray[Any]
    y: npt.NDArray[Any]


class Source(abc.ABC):
    """One file or frame."""

    path: Path | str  # for a frame what it is
    names: tuple[str, ...]  # its columns
    rows: int | None  # None where only reading it would tell, see `count`

    @property
    def default_targets(self) -> tuple[str, ...]:
        """Which columns are the targets if the caller names none: the last one."""
        return self.names[-1:]

    @abc.abstractmethod
    def check(self) -> None:
        """Raise an error where the source is no longer what was opened."""

    def count(self) -> int:
        """Return how many rows it has, counting them if need be."""
        assert self.rows is not None
        return self.rows

    @abc.abstractmethod
    def identity(self, base: Path) -> object:
        """Return what is another one for other rows."""

    @abc.abstractmethod
    def is_wide(self, names: Sequence[str]) -> bool:
        """Return whether float32 would round numbers of these columns; raise an error where one holds no numbers."""

    @abc.abstractmethod
    def blocks(
        self, names: Sequence[str], features: int, *, wide: bool, first: int, last: int | None, rows: int
    ) -> Iterator[Block]:
        """Yield rows ``first`` to ``last`` (None: the end) in order, ``rows`` or fewer at a time.

        The first ``features`` of ``names`` are the features. They come in float64 where ``wide``, else in float32.
        """

    @abc.abstractmethod
    def value(self, name: str, row: int) -> float:
        """Return the value of a column in a row, counted from 0, in float64."""


class FileSource(Source):
    """A file, with what tells whether it is still the same one."""

    path: Path

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind
        state = path.stat()
        self.size, self.modified = state.st_size, state.st_mtime_ns

    def check(self) -> None:
        """Raise an error where the file is gone or is no longer the one that was opened."""
        try:
            state = self.path.stat()
        except OSError as error:
            raise TableError(f"{self.path} is no longer there", FileNotFoundError) from error
        if (state.st_size, state.st_mtime_ns) != (self.size, self.modified):
            raise TableError(f"{self.path} has changed since the table was opened")

    def identity(self, base: Path) -> object:
        """Return name, size and time."""
        return self.path.relative_to(base).as_posix(), self.size, self.modified


class _Polars(Source):
    """What Polars knows the types and row numbers of."""

    schema: dict[str, Any]
    kind = "POLARS"

    @abc.abstractmethod
    def lazy(self) -> polars.LazyFrame:
        """Return the rows."""

    def describe(self) -> None:
        pl = polars_()
        try:
            lazy = self.lazy()
            self.schema = dict(lazy.collect_schema())
            self.rows = int(lazy.select(pl.len()).collect().item()) if self.schema else 0
        except polars_errors() as error:
            raise no_table(self.path, self.kind, error) from error
        self.names = tuple(self.schema)

    def is_wide(self, names: Sequence[str]) -> bool:
        kinds = [str(self.schema[name]) for name in names]
        for name, kind in zip(names, kinds, strict=True):
            if not (self.schema[name].is_numeric() or kind in ("Boolean", "Null")):
                raise no_numbers(self.path, name, kind.lower())
        return any(kind not in NARROW for kind in kinds)

    def blocks(
        self, names: Sequence[str], features: int, *, wide: bool, first: int, last: int | None, rows: int
    ) -> Iterator[Block]:
        pl = polars_()
        last = self.count() if last is None else last
        wanted = [pl.col(name).cast(pl.Float64 if wide else pl.Float32) for name in names]
        step = MAPPED_ROWS if self.kind == "ARROW" else last - first
        try:
            for at in range(first, last, max(step, 1)):
                for frame in batches(self.lazy().slice(at, min(step, last - at)).select(wanted), rows):
                    yield Block(at, *matrices(frame, names, features))
                    at += frame.height
        except polars_errors() as error:
            raise no_table(self.path, self.kind, error) from error

    def value(self, name: str, row: int) -> float:
        pl = polars_()
        value = self.lazy().slice(row, 1).select(pl.col(name).cast(pl.Float64)).collect().item()
        return float("nan") if value is None else float(value)


class PolarsFile(_Polars, FileSource):
    """Parquet or Arrow IPC. ``partition`` are the columns that the names of a hive folder's sub-folders give."""

    def __init__(self, path: Path, kind: str, partition: dict[str, float | str | None]) -> None:
        super().__init__(path, kind)
        self.partition = partition
        if not self.size:
            raise no_table(path, kind, "it is empty")
        self.describe()
        twice(path, self.names)

    def lazy(self) -> polars.LazyFrame:
        """Return the file's rows."""
        pl = polars_()
        scan = pl.scan_ipc if self.kind == "ARROW" else pl.scan_parquet
        lazy: polars.LazyFrame = scan(self.path, glob=False, hive_partitioning=False)
        # Before the file's own columns, the last of which is the target if none is named.
        columns = [pl.lit(value).alias(name) for name, value in self.partition.items()]
        return lazy.select(*columns, pl.all().exclude(list(self.partition))) if columns else lazy


class Frame(_Polars):
    """Rows in memory, or a lazy frame of Polars: whatever follows the Arrow C stream interface."""

    def __init__(self, given: Any) -> None:
        pl = polars_()
        self.kind = type(given).__name__
        self.path = f"the {self.kind}"
        if hasattr(given, "reset_index"):
            given = given.reset_index(drop=True)  # pandas' index is no column
        try:
            if not isinstance(given, pl.LazyFrame):
                # The Arrow stream and nothing else of it, so that Polars takes this way whatever it is.
                given = pl.DataFrame(types.SimpleNamespace(__arrow_c_stream__=given.__arrow_c_stream__)).lazy()
        except polars_errors(TypeError, ValueError) as error:
            raise no_table(self.path, self.kind, error) from error
        self._lazy: polars.LazyFrame = given
        self.describe()

    def lazy(self) -> polars.LazyFrame:
        """Return the rows."""
        return self._lazy

    def check(self) -> None:
        """Find nothing: a frame stays what it is."""

    def identity(self, base: Path) -> object:
        """Return a hash of the numbers, all of which are read."""
        digest = hashlib.sha256()
        names = [name for name, kind in self.schema.items() if kind.is_numeric() or str(kind) == "Boolean"]
        for block in self.blocks(names, len(names), wide=True, first=0, last=None, rows=MAPPED_ROWS):
            digest.update(block.X.tobytes())
        return tuple(names), self.rows, digest.hexdigest()


def polars_() -> Any:
    """Import Polars."""
    return extra("polars", "polars", "tables")


def polars_errors(*others: type[BaseException]) -> tuple[type[BaseException], ...]:
    """Return what Polars raises for a file that it cannot read, and the others."""
    exceptions = polars_().exceptions
    return exceptions.PolarsError, exceptions.PanicException, OSError, *others


def batches(lazy: polars.LazyFrame, rows: int) -> Iterator[polars.DataFrame]:
    """Yield a query's rows in order, ``rows`` at a time, while Polars' threads read ahead a bounded number of rows."""
    yield from lazy.collect_batches(chunk_size=rows, maintain_order=True, lazy=True)


def matrices(frame: polars.DataFrame, names: Sequence[str], features: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return features and targets, each one row after the other, in memory of their own."""
    X, y = (
        frame.select(part).to_numpy(order="c", writable=True) if part else np.empty((frame.height, 0), np.float32)
        for part in (names[:features], names[features:])
    )
    return X, y


def is_finite(*matrices: npt.NDArray[Any]) -> bool:
    """Return whether no value is missing or infinite: by the sum, and by each value only if that is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return all(bool(np.isfinite(matrix.sum()) or np.isfinite(matrix).all()) for matrix in matrices)


def kind_of(name: str) -> str | None:
    """Return what a file of this name holds, None for no table."""
    path = Path(name.lower())
    if path.suffix not in COMPRESSED:
        return SUFFIXES.get(path.suffix)
    kind = SUFFIXES.get(Path(path.stem).suffix)
    return kind if kind in ("CSV", "TSV") else None


def files_of(path: Path) -> list[tuple[Path, str]]:
    """Return the files of a table and the kind that they all are, in the order of their names."""
    allowed = f"must end in one of {', '.join(SUFFIXES)} (.csv and .tsv also in {' or '.join(COMPRESSED)})"
    if not path.is_dir():
        kind = kind_of(path.name)
        if kind is None and (path.suffix or path.exists()):
            raise TableError(f"{path} {allowed}")
        if kind is None or not path.is_file():
            raise TableError(f"there is no file or folder {path}", FileNotFoundError)
        _check_readable(path)
        return [(path, kind)]
    files = list(_walk(path, set()))
    if not files:
        raise TableError(f"{path} holds no table: its files {allowed}")
    first, kind = files[0]
    for file, other in files:
        if other != kind:
            raise TableError(f"{path} must hold files of one kind, but has {first.name} and {file.name}")
    return files


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[Path, str]]:
    """Yield the tables under a folder. What is hidden or of another kind is left out; what cannot be read is an error.

    ``seen`` are the folders met so far: one that several links lead to, or that holds a link to itself, is read once.
    """
    state = folder.stat()
    if (state.st_dev, state.st_ino) in seen:
        return
    seen.add((state.st_dev, state.st_ino))
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise TableError(f"the folder {folder} cannot be read: {error.strerror}", type(error)) from error
    for path in entries:
        if path.name.startswith("."):
            continue
        try:
            mode = path.stat().st_mode
        except OSError as error:
            what = "is a link to what is not there" if path.is_symlink() else f"cannot be read: {error.strerror}"
            raise TableError(f"{path} {what}", type(error)) from error
        kind = kind_of(path.name)
        if stat.S_ISDIR(mode):
            yield from _walk(path, seen)
        elif not stat.S_ISREG(mode):
            raise TableError(f"{path} must be a file or a folder, but is something else, such as a pipe or a device")
        elif kind is not None:
            _check_readable(path)
            yield path, kind


def _check_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise TableError(f"{path} cannot be read: {error.strerror}", type(error)) from error


def partition_of(path: Path, base: Path) -> dict[str, float | str | None]:
    """Return the columns that ``name=value`` in the names of the folders between ``base`` and the file stand for."""
    columns: dict[str, float | str | None] = {}
    for part in path.relative_to(base).parts[:-1]:
        name, equals, text = part.partition("=")
        if not equals:
            continue
        value = unquote(text)
        try:
            columns[unquote(name)] = float(value)
        except ValueError:
            columns[unquote(name)] = None if value == "__HIVE_DEFAULT_PARTITION__" else value
    return columns
