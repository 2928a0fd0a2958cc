"""Tables larger than memory: Parquet, CSV and NPY files, streamed in pieces while the last piece is used."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import _checks
from .._typing import RowProgress
from ..nn import Standardize
from ..statistics import LinearStatistics
from . import columns as _columns
from . import csv as _csv
from .background import ahead
from .gather import gather
from .progress import reported
from .readers import READERS, Block, File, Reader, cells
from .split import MASK, Part, belongs

__all__ = ["Table", "open_table"]

SUFFIXES = (".parquet", ".csv", ".npy")

# Of a piece, unless the caller says how many rows it has: enough for matrix products, little beside PyTorch itself.
PIECE_BYTES = 16 << 20
MOST_ROWS = 1 << 18
CSV = _csv.CsvReader()
# A share is cut at the end of a row group that is not further away than this part of it: no group is read twice then.
SLACK = 0.1
# A part of which so many rows are expected is not empty.
SURE = 1000
# Row numbers that are hashed at once.
HASHED = 1 << 18


def open_table(
    path: str | Path,
    *,
    target: str | Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    standardize: Standardize | None = None,
) -> Table:
    """Open a table to be streamed, of any size: a ``.parquet``, ``.csv`` or ``.npy`` file, or a folder of one kind.

    Streamed it gives the rows that :func:`torchintro.data.read_table` reads at once. A folder's files are taken in the
    order of their names, those of its sub-folders too, hidden ones and other kinds of file left out; all must have the
    same columns.

    Args:
        path: The file or folder.
        target: Name or names of the target columns, ``()`` for none; by default the last column.
        features: Names of the feature columns; by default all but the targets.
        dtype: Type of the tensors, a floating-point one.
        standardize: What shifts and scales the features, fitted before on such features.

    Returns:
        The table, of which only what describes it has been read.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ImportError: The files need pyarrow, which is not installed.
        TypeError: ``dtype`` is no floating-point type.
        ValueError: It is no such table, or a column is missing or not numeric.

    Example:
        >>> table = open_table("houses.parquet", target="price")  # doctest: +SKIP
        >>> for X, y in table.pieces():  # doctest: +SKIP
        ...     statistics.update(X, y)
    """
    function = "open_table"
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"{function}: dtype must be a floating-point type of 16 bits or more, but got {dtype!r}")
    if not isinstance(path, str | Path):
        raise TypeError(f"{function}: path must be a string or a path, but got {type(path).__name__}")
    path = Path(path)
    paths = _find(function, path)
    reader = _reader(paths[0].suffix.lower())
    files = tuple(reader.describe(function, found) for found in paths)
    names = files[0].names
    if not names:
        raise ValueError(f"{function}: {paths[0]} has no columns")
    for file in files[1:]:
        if file.names != names:
            raise ValueError(
                f"{function}: {file.path} must have the columns of {paths[0]}, {_columns.listed(names)}, "
                f"but has {_columns.listed(file.names) or 'none'}"
            )
    if all(file.rows == 0 for file in files):
        raise ValueError(f"{function}: {path} has no rows")
    if target is None or len(target):
        feature_names, target_names = _columns.choose(function, path, names, target, features, names[-1:])
    else:
        feature_names, target_names = names if features is None else tuple(features), ()
        _columns.check_names(function, path, names, feature_names)
    for file in files:
        reader.check_numeric(function, file, (*feature_names, *target_names))
    if standardize is not None:
        if not isinstance(standardize, Standardize):
            raise TypeError(f"{function}: standardize must be a Standardize, but got {type(standardize).__name__}")
        if standardize.mean.shape[0] != len(feature_names):
            raise ValueError(
                f"{function}: standardize must be for {len(feature_names)} features, "
                f"but is for {standardize.mean.shape[0]}"
            )
    return Table(path, files, feature_names, target_names, dtype, standardize)


class Table:
    """A table in files, made by :func:`open_table`, to be streamed as often as wanted.

    It holds no open file and can be sent to other processes.

    Attributes:
        path: The file or folder.
        files: Its files, in order.
        feature_names: ``in_features`` names.
        target_names: ``out_features`` names.
        dtype: Type of the tensors.
    """

    def __init__(
        self,
        path: Path,
        files: tuple[File, ...],
        feature_names: tuple[str, ...],
        target_names: tuple[str, ...],
        dtype: torch.dtype,
        standardize: Standardize | None,
    ) -> None:
        self.path, self.files, self.dtype = path, files, dtype
        self.feature_names, self.target_names = feature_names, target_names
        self._standardize = standardize
        self._suffix = files[0].path.suffix.lower()
        self._part: Part | None = None
        self._rows: int | None = None
        # CSV: where a share begins, once that has been counted.
        self._found: dict[tuple[int, int], tuple[int, int, int, int]] = {}

    @property
    def in_features(self) -> int:
        """Number of features."""
        return len(self.feature_names)

    @property
    def out_features(self) -> int:
        """Number of targets."""
        return len(self.target_names)

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(file.size for file in self.files)

    @property
    def rows(self) -> int | None:
        """Number of rows; None for CSV, whose rows nothing but reading counts."""
        if self._rows is None and self._suffix != ".csv":
            self._rows = self._count(0, self._starts()[-1])
        return self._rows

    def __repr__(self) -> str:
        rows = "unknown rows" if self.rows is None else f"{self.rows} rows"
        part = "" if self._part is None else ", not held out" if self._part.high > MASK else ", held out"
        return (
            f"Table({str(self.path)!r}, {len(self.files)} file{'s' * (len(self.files) > 1)}, {rows}, "
            f"{self.in_features} feature{'s' * (self.in_features > 1)}, "
            f"{self.out_features} target{'s' * (self.out_features > 1)}{part})"
        )

    def fingerprint(self) -> str:
        """Return a text that is another one for other data: of names, sizes and times of the files, and of the columns.

        Nothing of the files is read, so that a change which leaves size and time of a file alone is not seen.
        """
        base = self.path if self.path.is_dir() else self.path.parent
        scaling = self._standardize
        what: list[object] = [(file.path.relative_to(base).as_posix(), file.size, file.modified) for file in self.files]
        what += [self.feature_names, self.target_names, str(self.dtype), self._part and tuple(self._part)]
        what += [] if scaling is None else [scaling.mean.tolist(), scaling.scale.tolist()]
        return hashlib.sha256(repr(what).encode()).hexdigest()[:32]

    def split(self, fraction: float = 0.2, *, seed: int = 0) -> tuple[Table, Table]:
        """Cut the table into a training part and a held-out part, without reading it.

        A row belongs to the second if a hash of its number in the table and of ``seed`` says so: always the same rows,
        whatever the pieces, the shares and the number of processes. Their number is ``fraction`` of all but for chance.
        Streaming both parts reads the files twice; :meth:`marked_pieces` gives both in one pass. A part can be split
        again, by the same seed: what is held out then are other rows.

        Args:
            fraction: Share of the rows held out, between 0 and 1.
            seed: Another one holds out other rows.

        Returns:
            The two parts, tables themselves.

        Raises:
            ValueError: ``fraction`` is not between 0 and 1, ``seed`` is not that by which this part was split off, or
                one part would be empty.

        Example:
            >>> train, held_out = open_table("houses.parquet").split(0.2)  # doctest: +SKIP
        """
        train, held_out = copy.copy(self), copy.copy(self)
        for part, rows in zip((train, held_out), self._cut("Table.split", fraction, seed), strict=True):
            part._part, part._rows = rows, None
            # Hashes of many rows are not counted for what is sure to be there.
            share = (rows.high - rows.low) / 2**64
            if (self._starts()[-1] if self._suffix != ".csv" else 0) * share < SURE and part.rows == 0:
                raise ValueError(
                    f"Table.split: of the {self.rows} rows of {self.path} fraction {fraction} and seed {seed} leave "
                    "none in one part"
                )
        return train, held_out

    def pieces(
        self,
        *,
        rows: int | None = None,
        multiple: int = 1,
        share: tuple[int, int] = (0, 1),
        start: int = 0,
        progress: RowProgress = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the table from its first row to its last, piece by piece.

        The next piece is read in a thread while the caller uses the one it got. The tensors are the caller's, to keep
        or to change. Closing the iterator, or dropping it, ends the thread and closes the files.

        Args:
            rows: Rows of each piece but the last, which may have fewer; by default as many as make about 16 MB.
            multiple: A batch size that divides the rows of each piece but the last; ``rows`` is rounded to it.
            share: ``(rank, world_size)``: only this process's share of the rows. All shares together are the table,
                each row once. docs/tables.md says how they are cut.
            start: How many rows of these to leave out, because an earlier run has had them.
            progress: True shows a bar on a terminal and prints a line now and then elsewhere; a callable is given
                ``(rows_done, rows_total, seconds)`` after each piece, ``rows_total`` None where it is not known.

        Yields:
            Features ``(n, in_features)`` and targets ``(n, out_features)``, both contiguous, all finite.

        Raises:
            FileNotFoundError: A file is no longer there.
            ValueError: A file is damaged or has changed, or a value is missing, infinite or no number: with its column
                and its row, counted from 1 in the file. Or an argument is out of its range.
        """
        return _pairs(self._stream("Table.pieces", rows, multiple, share, start, progress))

    def marked_pieces(
        self,
        fraction: float = 0.2,
        *,
        seed: int = 0,
        rows: int | None = None,
        multiple: int = 1,
        share: tuple[int, int] = (0, 1),
        start: int = 0,
        progress: RowProgress = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Read the table as :meth:`pieces` does, with a mark on each row that :meth:`split` would hold out.

        Args:
            fraction: As for :meth:`split`.
            seed: As for :meth:`split`.
            rows: This and the others as for :meth:`pieces`.
            multiple: See there.
            share: See there.
            start: See there.
            progress: See there.

        Yields:
            Features, targets and a boolean tensor ``(n,)``, True for the rows that are held out.

        Raises:
            ValueError: As for :meth:`split` and :meth:`pieces`.
        """
        _, part = self._cut("Table.marked_pieces", fraction, seed)
        return self._stream("Table.marked_pieces", rows, multiple, share, start, progress, part)

    def statistics(
        self,
        *,
        share: tuple[int, int] = (0, 1),
        progress: RowProgress = None,
        checkpoint: str | Path | None = None,
        device: torch.device | str | None = None,
    ) -> LinearStatistics:
        """Gather the second moments of all rows in one pass over the files.

        Equivalent to ``LinearStatistics(in_features, out_features).update(table)``, but that it can be interrupted.

        Args:
            share: As for :meth:`pieces`.
            progress: As for :meth:`pieces`.
            checkpoint: A file that keeps what was gathered, written every ten seconds, on Ctrl-C and at the end. If it
                is there, the pass goes on from it, with the same bits in the end as one that was never interrupted;
                after a whole pass nothing is read again. It is deleted where a value of the table is wrong. With
                shares, give each a file of its own.
            device: Where the rows are added up and the statistics are kept.

        Returns:
            The statistics.

        Raises:
            FileNotFoundError: The folder of ``checkpoint`` or a file of the table is not there.
            OSError: ``checkpoint`` cannot be read or written.
            ValueError: ``checkpoint`` is that of another pass or no such file at all; or as for :meth:`pieces`.

        Example:
            >>> table = open_table("houses/")  # doctest: +SKIP
            >>> weight, bias = table.statistics(checkpoint="houses.pass").solve()  # doctest: +SKIP
        """
        function = "Table.statistics"
        gathered = gather(function, self, share=share, progress=progress, checkpoint=checkpoint, device=device)
        return gathered.train

    def split_statistics(
        self,
        fraction: float = 0.2,
        *,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
        progress: RowProgress = None,
        checkpoint: str | Path | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[LinearStatistics, LinearStatistics]:
        """Gather the second moments of the two parts that :meth:`split` makes, in one pass over the files.

        Args:
            fraction: As for :meth:`split`.
            seed: As for :meth:`split`.
            share: As for :meth:`pieces`.
            progress: As for :meth:`pieces`.
            checkpoint: As for :meth:`statistics`.
            device: As for :meth:`statistics`.

        Returns:
            The statistics of the rows that are not held out, and of those that are.

        Raises:
            ValueError: As for :meth:`split` and :meth:`statistics`.
        """
        gathered = gather(
            "Table.split_statistics",
            self,
            fraction,
            seed=seed,
            share=share,
            progress=progress,
            checkpoint=checkpoint,
            device=device,
        )
        return gathered.train, gathered.held_out

    def _cut(self, function: str, fraction: float, seed: int) -> tuple[Part, Part]:
        """Return the two parts of this table."""
        share = _checks.fraction(function, "fraction", fraction)
        seed = _checks.integer(function, "seed", seed)
        part = self._part or Part(0, 2**64, seed)
        if part.seed != seed:
            raise ValueError(
                f"{function}: seed must be {part.seed} for a part of a table that was split by that one, but got {seed}"
            )
        return part.cut(share)

    # Everything below speaks of rows by their number in the whole table, which the hash needs.

    def _starts(self) -> list[int]:
        """Return the number of the first row of each file, and of all rows; not for CSV."""
        return [0, *np.cumsum([file.rows or 0 for file in self.files]).tolist()]

    def _count(self, first: int, last: int) -> int:
        """Return how many of the rows ``first`` to ``last`` belong to this part."""
        if self._part is None:
            return last - first
        return sum(int(belongs(self._part, a, min(HASHED, last - a)).sum()) for a in range(first, last, HASHED))

    def _after(self, first: int, last: int, start: int) -> int:
        """Return the number of the row that follows ``start`` rows of this part from row ``first`` on."""
        if self._part is None:
            return min(first + start, last)
        for a in range(first, last, HASHED):
            if start == 0:
                return a
            there = np.flatnonzero(belongs(self._part, a, min(HASHED, last - a)))
            if len(there) >= start:
                return a + int(there[start - 1]) + 1
            start -= len(there)
        return last

    def _range(self, rank: int, world_size: int) -> tuple[int, int]:
        """Return the rows of a share: as many for each, but cut at a row group's end where one is near."""
        starts = self._starts()
        edges = np.array(
            sorted({start + edge for file, start in zip(self.files, starts, strict=False) for edge in file.edges})
        )
        total = starts[-1]

        def cut(k: int) -> int:
            at = total * k // world_size
            nearest = int(edges[np.abs(edges - at).argmin()])
            return nearest if abs(nearest - at) <= SLACK * total / world_size else at

        return cut(rank), cut(rank + 1)

    def _stream(
        self,
        function: str,
        rows: int | None,
        multiple: int,
        share: tuple[int, int],
        start: int,
        progress: RowProgress,
        mark: Part | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        multiple = _checks.positive_integer(function, "multiple", multiple)
        if rows is None:
            width = (self.in_features + self.out_features) * self.dtype.itemsize
            rows = min(max(PIECE_BYTES // width, 16), MOST_ROWS)
            rows = 1 << (rows.bit_length() - 1)
        rows = _checks.positive_integer(function, "rows", rows)
        rows = max(rows // multiple, 1) * multiple
        if not isinstance(share, tuple) or len(share) != 2:
            raise TypeError(f"{function}: share must be a pair (rank, world_size), but got {share!r}")
        rank = _checks.integer(function, "share's rank", share[0])
        world_size = _checks.positive_integer(function, "share's world_size", share[1])
        if not 0 <= rank < world_size:
            raise ValueError(f"{function}: share must have a rank from 0 to {world_size - 1}, but got {share!r}")
        start = _checks.integer(function, "start", start)
        if start < 0:
            raise ValueError(f"{function}: start must be at least 0, but got {start}")
        if not (progress is None or isinstance(progress, bool) or callable(progress)):
            raise TypeError(f"{function}: progress must be True, False or a callable, but got {progress!r}")
        total = None
        if self._suffix == ".csv":
            find = functools.partial(self._csv_blocks, function, rank, world_size, start)
        else:
            first, last = self._range(rank, world_size)
            first = self._after(first, last, start)
            total = self._count(first, last) if progress else None
            find = functools.partial(self._blocks, function, first, last)
        return reported(ahead(lambda: self._assemble(function, find(), rows, mark)), progress, total)

    def _blocks(self, function: str, first: int, last: int) -> Iterator[tuple[File, int, Block]]:
        """Yield the blocks of the rows ``first`` to ``last``, each with its file and the number of its first row."""
        reader, names = READERS[self._suffix], (*self.feature_names, *self.target_names)
        for file, start in zip(self.files, self._starts(), strict=False):
            low, high = max(first - start, 0), min(last - start, file.rows or 0)
            if low < high:
                file.check(function)
                read = functools.partial(reader.blocks, function, file, names, self.in_features, low, high)
                # pyarrow decodes the next batch while this one is turned to rows. NPY's blocks share their memory.
                blocks = ahead(read) if self._suffix == ".parquet" else read()
                with contextlib.closing(blocks):  # type: ignore[type-var]
                    for block in blocks:
                        yield file, start + block.first, block

    def _csv_blocks(self, function: str, rank: int, world_size: int, skip: int) -> Iterator[tuple[File, int, Block]]:
        """Yield the blocks that begin in a share of the bytes; those before are counted only."""
        reader, names = CSV, (*self.feature_names, *self.target_names)
        first, last = (self.bytes * k // world_size for k in (rank, rank + 1))
        size = min(max(self.bytes // (32 * world_size), _csv.SAMPLE_BYTES), _csv.RAW_BYTES)
        ends = np.cumsum([file.size for file in self.files]).tolist()
        # Where the share was found before, else at the beginning: file, byte in it, row in it, and row in the table.
        index, offset, row, number = self._found.get((rank, world_size), (0, 0, 0, 0))
        for file, end in zip(self.files[index:], ends[index:], strict=True):
            file.check(function)
            for raw in _csv.raw_blocks(file.path, size, offset):
                at = end - file.size + raw.offset
                if at >= last:
                    return
                if at >= first:
                    self._found.setdefault((rank, world_size), (index, raw.offset, row, number))
                count = reader.count(function, file, raw) if at < first or skip else None
                here = 0 if at < first or count is None else self._count(number, number + count)
                if at >= first and (count is None or here > skip):
                    block: Block = reader.parse(function, file, raw, names, self.in_features, row)
                    count = block.rows
                    if skip:
                        gone = self._after(number, number + count, skip) - number
                        yield file, number + gone, _Tail(block, gone)
                    else:
                        yield file, number, block
                skip = max(skip - here, 0)
                row, number = row + (count or 0), number + (count or 0)
            index, offset, row = index + 1, 0, 0

    def _assemble(
        self, function: str, blocks: Iterator[tuple[File, int, Block]], rows: int, mark: Part | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Put blocks together to pieces of ``rows`` rows."""
        shapes = (self.in_features, self.out_features)
        limit = cells(rows, sum(shapes))
        spare = None if self._part is None else [torch.empty(limit, n, dtype=self.dtype) for n in shapes]
        piece: list[Tensor] | None = None
        fill = 0
        for file, number, block in blocks:
            a = 0
            while a < block.rows:
                if piece is None:
                    piece = [torch.empty(rows, n, dtype=self.dtype) for n in shapes]
                    piece.append(torch.empty(rows if mark else 0, dtype=torch.bool))
                    fill = 0
                n = min(block.rows - a, limit, rows - fill)
                if spare is None or self._part is None:
                    out = [tensor[fill : fill + n] for tensor in piece]
                    block.write(a, out[0], out[1])
                    self._check(function, file, block, a, out)
                    if mark is not None:
                        out[2].copy_(torch.from_numpy(belongs(mark, number + a, n)))
                    fill += n
                else:
                    out = [tensor[:n] for tensor in spare]
                    block.write(a, out[0], out[1])
                    self._check(function, file, block, a, out)
                    kept = torch.from_numpy(np.flatnonzero(belongs(self._part, number + a, n)))
                    for tensor, given in zip(piece, out, strict=False):
                        torch.index_select(given, 0, kept, out=tensor[fill : fill + len(kept)])
                    if mark is not None:
                        marks = torch.from_numpy(belongs(mark, number + a, n))
                        torch.index_select(marks, 0, kept, out=piece[2][fill : fill + len(kept)])
                    fill += len(kept)
                a += n
                if fill == rows:
                    yield self._finish(piece)
                    piece = None
        if piece is not None and fill:
            # A copy, unless it is nearly the whole: a short last piece need not hold the memory of a long one.
            ends = [tensor[:fill] for tensor in piece]
            yield self._finish([end.clone() for end in ends] if fill < rows // 2 else ends)

    def _finish(self, piece: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        X, y, mark = piece
        if self._standardize is not None:
            scaling = self._standardize
            X.sub_(scaling.mean.to(X)).div_(scaling.scale.to(X))
        return X, y, mark

    def _check(self, function: str, file: File, block: Block, start: int, out: list[Tensor]) -> None:
        """Raise an error that names the first value that is not finite."""
        if all(_sums_up(tensor) for tensor in out[:2]):
            return
        first = block.first + start + 1
        found: list[tuple[int, ValueError]] = []
        matrix = torch.cat(out[:2], 1)
        for column, name in enumerate((*self.feature_names, *self.target_names)):
            bad = (~matrix[:, column].isfinite()).nonzero()
            if not len(bad):
                continue
            row = int(bad[0])
            error = _columns.not_finite(
                function, file.path, name, block.values(column, start + row, 1), first_row=first + row, count=False
            )
            kind = str(self.dtype).removeprefix("torch.")
            beyond = f"{function}: column {name!r} of {file.path} has a value beyond {kind} in row {first + row}"
            found.append((row, error or ValueError(beyond)))
        if found:  # else the values are finite and only their sum is not
            raise min(found, key=lambda pair: pair[0])[1]


class _Tail:
    """A block without its first rows."""

    def __init__(self, block: Block, start: int) -> None:
        self.first, self.rows = block.first + start, block.rows - start
        self._block, self._start = block, start

    def write(self, start: int, X: Tensor, y: Tensor) -> None:
        self._block.write(self._start + start, X, y)

    def values(self, column: int, start: int, rows: int) -> npt.NDArray[np.float64]:
        return self._block.values(column, self._start + start, rows)


def _pairs(stream: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    with contextlib.closing(stream):  # type: ignore[type-var]
        for X, y, _ in stream:
            yield X, y
            del X, y  # else they would live on while the caller waits for the next ones


def _find(function: str, path: Path) -> list[Path]:
    """Return the files of a table, in order."""
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{function}: {path} must end in one of {', '.join(SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{function}: there is no file or folder {path}")
    files = [
        file
        for file in sorted(path.rglob("*"), key=lambda file: file.relative_to(path).parts)
        if file.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    ]
    if not files:
        raise ValueError(f"{function}: {path} must hold files that end in one of {', '.join(SUFFIXES)}, but has none")
    suffix = files[0].suffix.lower()
    for file in files:
        if file.suffix.lower() != suffix:
            raise ValueError(f"{function}: {path} must hold files of one kind, but has {files[0].name} and {file.name}")
    return files


def _reader(suffix: str) -> Reader | _csv.CsvReader:
    return CSV if suffix == ".csv" else READERS[suffix]


def _sums_up(tensor: Tensor) -> bool:
    """Return whether the sum is finite: then every value is."""
    if tensor.dtype in (torch.float32, torch.float64):
        with np.errstate(over="ignore", invalid="ignore"):
            return bool(np.isfinite(tensor.numpy().sum()))
    return math.isfinite(tensor.sum(dtype=torch.float32).item())
