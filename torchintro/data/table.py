"""A table, streamed in pieces or read at once: :class:`Table`."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from .._typing import RowProgress
from ..nn import Standardize
from ..statistics import LinearStatistics
from .columns import TableError, not_finite, spoken_by
from .datasets import Dataset
from .gather import gather
from .progress import reported
from .sources import Block, FileSource, Source, is_finite
from .split import MASK, Part, belongs, cut

__all__ = ["Table"]

# Of a piece, unless the caller says how many rows it has: enough for matrix products, little beside PyTorch itself.
PIECE_BYTES = 16 << 20
MOST_ROWS = 1 << 18
# Rows that are read at once where pieces are smaller.
READ_ROWS = 1 << 12
# A part of which so many rows are expected is not empty.
SURE = 1000
# Row numbers that are hashed at once.
HASHED = 1 << 18


class Table:
    """A table in files or in a frame, made by :func:`torchintro.open_table`, to be streamed as often as wanted.

    It holds no open file and can be sent to other processes.

    Attributes:
        path: The file or folder; for a frame what it is.
        files: The files, or the one frame, in order.
        feature_names: ``in_features`` names.
        target_names: ``out_features`` names.
        dtype: Type of the tensors.
    """

    def __init__(
        self,
        path: Path | str,
        files: tuple[Source, ...],
        feature_names: tuple[str, ...],
        target_names: tuple[str, ...],
        dtype: torch.dtype,
        standardize: Standardize | None,
        wide: bool,
    ) -> None:
        self.path, self.files, self.dtype = path, files, dtype
        self.feature_names, self.target_names = feature_names, target_names
        self._standardize, self._wide = standardize, wide
        self._part: Part | None = None
        self._rows: int | None = None

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
        """Size on disk, 0 for a frame."""
        return sum(file.size for file in self.files if isinstance(file, FileSource))

    @property
    def rows(self) -> int | None:
        """Number of rows; None for CSV that has not been counted, by shares or ``start``, yet."""
        if self._rows is None and all(file.rows is not None for file in self.files):
            self._rows = self._count(0, self._starts()[-1])
        return self._rows

    @property
    def gathered_dtype(self) -> torch.dtype:
        """Type in which statistics are best gathered: float64 where ``dtype`` would round what the files hold."""
        return torch.float64 if self._wide else self.dtype

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

        Nothing of the files is read, so that a change which leaves size and time of a file alone is not seen. Of a
        frame all numbers are read.
        """
        base = Path(self.path) if Path(self.path).is_dir() else Path(self.path).parent
        scaling = self._standardize
        what: list[object] = [file.identity(base) for file in self.files]
        what += [self.feature_names, self.target_names, str(self.dtype), self._part and tuple(self._part)]
        what += [] if scaling is None else [scaling.mean.tolist(), scaling.scale.tolist()]
        return hashlib.sha256(repr(what).encode()).hexdigest()[:32]

    def read(self) -> Dataset:
        """Read all rows into memory.

        Returns:
            The data set, named after the file. What :meth:`split` holds out of the table, :func:`torchintro.data.split`
            holds out of it.

        Raises:
            FileNotFoundError: As for :meth:`pieces`.
            ValueError: As for :meth:`pieces`.

        Example:
            >>> train, held_out = (part.read() for part in open_table("houses.csv").split(0.2))  # doctest: +SKIP
        """
        return self.read_for("Table.read")

    def read_for(self, function: str) -> Dataset:
        """Read all rows, as :meth:`read`, in the name of another function."""
        pieces = list(_pairs(self._stream(function, None, 1, (0, 1), 0, None)))
        if not pieces:
            raise ValueError(f"{function}: {self.path} has no rows")
        X, y = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*pieces, strict=True))
        numbers = None
        if self._part is not None:
            with spoken_by(function):
                numbers = torch.from_numpy(np.flatnonzero(self._belongs(0, self._starts()[-1])))
        return Dataset(str(self.path), X, y, self.feature_names, self.target_names, self._part, numbers)

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
        parts = cut("Table.split", "fraction", self._part, fraction, seed)
        for part, rows in zip((train, held_out), parts, strict=True):
            part._part, part._rows = rows, None
            # Hashes of many rows are not counted for what is sure to be there.
            known = sum(file.rows or 0 for file in self.files)
            if known * (rows.high - rows.low) / 2**64 < SURE and part.rows == 0:
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
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the table from its first row to its last, piece by piece.

        Polars' threads read ahead while the caller uses the piece it got. The tensors are the caller's, to keep or to
        change. Closing the iterator, or dropping it, ends the reading and closes the files.

        Args:
            rows: Rows of each piece but the last, which may have fewer; by default as many as make about 16 MB.
            multiple: A batch size that divides the rows of each piece but the last; ``rows`` is rounded to it.
            share: ``(rank, world_size)``: only this process's share of the rows. All shares together are the table,
                each row once. docs/tables.md says how they are cut.
            start: How many rows of these to leave out, because an earlier run has had them.
            progress: True shows a bar, by tqdm; a callable is given ``(rows_done, rows_total, seconds)`` after each
                piece, ``rows_total`` None where it is not known.
            dtype: Another type than the table's; float64 where the statistics of float64 rows are wanted.

        Yields:
            Features ``(n, in_features)`` and targets ``(n, out_features)``, both contiguous, all finite.

        Raises:
            FileNotFoundError: A file is no longer there.
            ValueError: A file is damaged or has changed, or a value is missing, infinite or no number: with its column
                and its row, counted from 1 in the file. Or an argument is out of its range.
        """
        return _pairs(self._stream("Table.pieces", rows, multiple, share, start, progress, dtype=dtype))

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
        dtype: torch.dtype | None = None,
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
            dtype: See there.

        Yields:
            Features, targets and a boolean tensor ``(n,)``, True for the rows that are held out.

        Raises:
            ValueError: As for :meth:`split` and :meth:`pieces`.
        """
        function = "Table.marked_pieces"
        _, part = cut(function, "fraction", self._part, fraction, seed)
        return self._stream(function, rows, multiple, share, start, progress, part, dtype)

    def statistics(
        self,
        *,
        share: tuple[int, int] = (0, 1),
        progress: RowProgress = None,
        checkpoint: str | Path | None = None,
        device: torch.device | str | None = None,
    ) -> LinearStatistics:
        """Gather the second moments of all rows in one pass over the files.

        Equivalent to ``LinearStatistics(in_features, out_features).update(table)``, but that it can be interrupted, and
        that numbers of more digits than the table's dtype holds are gathered in float64: a column far from zero, such
        as seconds since 1970, keeps its variance.

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
        function = "Table.split_statistics"
        gathered = gather(
            function, self, fraction, seed=seed, share=share, progress=progress, checkpoint=checkpoint, device=device
        )
        return gathered.train, gathered.held_out

    # Everything below speaks of rows by their number in the whole table, which the hash needs.

    def _starts(self) -> list[int]:
        """Return the number of the first row of each file, and of all rows; CSV is counted for it."""
        return [0, *np.cumsum([file.count() for file in self.files]).tolist()]

    def _count(self, first: int, last: int) -> int:
        """Return how many of the rows ``first`` to ``last`` belong to this part."""
        if self._part is None:
            return last - first
        return sum(int(self._belongs(a, min(a + HASHED, last)).sum()) for a in range(first, last, HASHED))

    def _belongs(self, first: int, last: int, part: Part | None = None) -> Any:
        return belongs(part or self._part or Part(0, 2**64, 0), np.arange(first, last))

    def _after(self, first: int, last: int, start: int) -> int:
        """Return the number of the row that follows ``start`` rows of this part from row ``first`` on."""
        if self._part is None:
            return min(first + start, last)
        for a in range(first, last, HASHED):
            if start == 0:
                return a
            there = np.flatnonzero(self._belongs(a, min(a + HASHED, last)))
            if len(there) >= start:
                return a + int(there[start - 1]) + 1
            start -= len(there)
        return last

    def _stream(
        self,
        function: str,
        rows: int | None,
        multiple: int,
        share: tuple[int, int],
        start: int,
        progress: RowProgress,
        mark: Part | None = None,
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        dtype = dtype or self.dtype
        multiple = _checks.positive_integer(function, "multiple", multiple)
        if rows is None:
            # By the table's dtype, so that a pass that goes on in another meets the same pieces.
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
        with spoken_by(function):
            for file in self.files:
                file.check()
            first, last, total = 0, None, None
            if world_size > 1 or start or self.rows is not None:
                everything = self._starts()[-1]
                first, last = (everything * k // world_size for k in (rank, rank + 1))
                first = self._after(first, last, start)
                total = self._count(first, last) if progress else None
        stream = self._pieces(function, self._blocks(first, last, rows, dtype), rows, mark, dtype)
        return reported(stream, progress, total)

    def _blocks(
        self, first: int, last: int | None, rows: int, dtype: torch.dtype
    ) -> Iterator[tuple[Source, int, Block]]:
        """Yield blocks of the rows ``first`` to ``last``, each with its file and the number of its first row."""
        names = (*self.feature_names, *self.target_names)
        wide = self._standardize is not None or (self._wide and dtype != torch.float32)
        at_once = rows * max(READ_ROWS // rows, 1)
        number = 0
        for file in self.files:
            low, high = max(first - number, 0), None if last is None else min(last - number, file.count())
            done = 0
            if high is None or low < high:
                file.check()
                blocks = file.blocks(names, self.in_features, wide=wide, first=low, last=high, rows=at_once)
                with contextlib.closing(blocks):  # type: ignore[type-var]
                    for block in blocks:
                        yield file, number + block.first, block
                        done = block.first + len(block.X)
            number += done if last is None else file.count()

    def _pieces(
        self,
        function: str,
        blocks: Iterator[tuple[Source, int, Block]],
        rows: int,
        mark: Part | None,
        dtype: torch.dtype,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Put blocks together to pieces of ``rows`` rows."""
        waiting: list[list[Tensor]] = []
        fill = 0
        with spoken_by(function), contextlib.closing(blocks):  # type: ignore[type-var]
            for file, number, block in blocks:
                parts, error = self._converted(file, block, dtype)
                n = len(parts[0])
                parts.append(torch.from_numpy(self._belongs(number, number + n, mark)) if mark else torch.empty(n, 0))
                if self._part is not None:
                    kept = torch.from_numpy(np.flatnonzero(self._belongs(number, number + n)))
                    parts = [torch.index_select(part, 0, kept) for part in parts]
                n, at = len(parts[0]), 0
                while at < n:
                    take = min(rows - fill, n - at)
                    waiting.append([part[at : at + take] for part in parts] if take < n else parts)
                    fill, at = fill + take, at + take
                    if fill == rows:
                        yield _together(waiting)
                        waiting, fill = [], 0
                del parts
                if error is not None:
                    raise error
            if waiting:
                yield _together(waiting)

    def _converted(self, file: Source, block: Block, dtype: torch.dtype) -> tuple[list[Tensor], TableError | None]:
        """Return a block's features, standardised, and targets in the wanted type, all finite.

        These are the rows before the first that has a value which is not; the second is the error that names it.
        """
        X, y = torch.from_numpy(block.X), torch.from_numpy(block.y)
        sound = is_finite(block.X, block.y)
        if self._standardize is not None:
            mean, scale = (part.to("cpu", X.dtype) for part in (self._standardize.mean, self._standardize.scale))
            X.sub_(mean).div_(scale)
        parts = [part.to(dtype) for part in (X, y)]
        if sound and (dtype.itemsize >= X.dtype.itemsize or all(_sums_up(part) for part in parts)):
            return parts, None
        bad = (~torch.cat(parts, 1).isfinite()).nonzero()
        if not len(bad):
            return parts, None
        row, column = bad[0].tolist()
        name, at = (*self.feature_names, *self.target_names)[column], block.first + row
        error = not_finite(file.path, name, file.value(name, at), at + 1, str(dtype).removeprefix("torch."))
        return [part[:row] for part in parts], error


def _together(parts: list[list[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a piece in memory of its own."""
    whole = len(parts) == 1 and parts[0][0]._base is None
    X, y, mark = parts[0] if whole else (torch.cat(column) for column in zip(*parts, strict=True))
    return X, y, mark


def _pairs(stream: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    with contextlib.closing(stream):  # type: ignore[type-var]
        for X, y, _ in stream:
            yield X, y
            del X, y, _  # else they would live on while the caller waits for the next ones


def _sums_up(tensor: Tensor) -> bool:
    """Return whether the sum is finite: then every value is."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32 if tensor.dtype.itemsize == 2 else None)))
