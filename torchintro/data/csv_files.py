"""CSV and TSV files, plain or compressed: read by Polars, and where something is odd by Python's csv module.

Polars reads the columns as numbers and is strict about it. What it refuses, and what has a missing number in it, is
read again as text. Then empty lines, spaces around a number and ``true`` and ``false`` are understood, and what is
wrong gets its column and its row. That takes some times as long, for the rows concerned only unless they are many.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .columns import TableError, no_numbers, no_table, not_finite, twice
from .sources import Block, FileSource, batches, is_finite, matrices, polars_, polars_errors

if TYPE_CHECKING:
    import polars

__all__ = ["CsvFile"]

# What stands for a missing value, besides nothing at all: the words that pyarrow and pandas know.
MISSING = {"", "NA", "N/A", "n/a", "#N/A", "#N/A N/A", "#NA", "NULL", "null", "NaN", "nan", "-NaN", "-nan"}
MISSING |= {"1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}
TRUTH = {"true": 1.0, "True": 1.0, "TRUE": 1.0, "false": 0.0, "False": 0.0, "FALSE": 0.0}
# Records that are looked at for columns of true and false, so that these need not be read as text.
SAMPLE = 1000
# What is read as text at once, in lines and in fields.
LINES, FIELDS = 1 << 13, 1 << 19


class _Counted(NamedTuple):
    """What counting finds."""

    rows: int
    blanks: npt.NDArray[np.int64]  # the records that are empty lines, which are no rows
    literal: bool  # whether quotation marks within fields are meant literally, which Polars does not understand


class CsvFile(FileSource):
    """A line of names, then records; a field in quotation marks may hold separators and line ends.

    A "record" is whatever follows the names, an empty line too; a "row" is a record with values.
    """

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(path, kind)
        self._separator = "\t" if kind == "TSV" else ","
        with path.open("rb") as handle:
            start = handle.read(1 << 16)
        compressed = path.suffix.lower() in (".gz", ".zst")
        self._end = "\r" if not compressed and b"\r" in start and b"\n" not in start else "\n"
        self._before = 0  # empty lines before the names
        self._lines_at_once = 64
        self._quoted: bool | None = None
        self._odd: bool | None = None
        self._counted: _Counted | None = None
        records = self._parsed(0) if self.size else iter(())
        names: list[str] = []
        for names in records:
            if names:
                break
            self._before += 1
        if not names:
            raise no_table(path, kind, "it is empty")
        self.names = tuple(names)
        twice(path, self.names)
        sample = [record for record in itertools.islice(records, SAMPLE) if record]
        # Columns of true and false, which Polars would not take for numbers.
        self._truth = frozenset(
            name
            for name, *texts in zip(self.names, *sample, strict=False)
            if (words := {text.strip() for text in texts} - MISSING) and words <= TRUTH.keys()
        )
        self._is_empty = not sample and not any(records)
        self._lines_at_once = max(16, min(LINES, FIELDS // len(self.names)))

    @property
    def rows(self) -> int | None:  # type: ignore[override]
        """How many there are, once they were counted."""
        return 0 if self._is_empty else None if self._counted is None else self._counted.rows

    def count(self) -> int:
        """Return how many rows there are."""
        return 0 if self._is_empty else self._count().rows

    def is_wide(self, names: Sequence[str]) -> bool:
        """Return True: a text may have any number of digits."""
        return True

    def value(self, name: str, row: int) -> float:
        """Read it again."""
        return float(self._numbers([name], _Text(self).take(self._record_of(row), 1), row)[0][0, 0])

    def blocks(
        self, names: Sequence[str], features: int, *, wide: bool, first: int, last: int | None, rows: int
    ) -> Iterator[Block]:
        """Have Polars read the file, and what it refuses as text."""
        pl = polars_()
        record = self._record_of(first)
        end = None if last is None else self._record_of(last)
        kind, dtype = (pl.Float64, np.float64) if wide else (pl.Float32, np.float32)
        schema = {name: kind if name in names and name not in self._truth else pl.String for name in self.names}
        truth = [pl.col(name).replace_strict(TRUTH, default=None, return_dtype=kind) for name in self._truth]
        text, stretch = _Text(self), 1

        def as_text(count: int) -> tuple[list[Block], int, TableError | None]:
            """Return the good rows, how many records they were, and what is wrong with the next."""
            taken = text.take(record, count if end is None else min(count, end - record))
            matrix, error = self._numbers(names, taken, first)
            with np.errstate(over="ignore"):  # the table answers a value too large for its type
                X, y = (part.astype(dtype, order="C") for part in (matrix[:, :features], matrix[:, features:]))
            return [Block(first, X, y)] * (len(X) > 0), len(taken), error

        while True:
            # Polars takes a quotation mark within a field for the beginning of one, and without an error loses rows.
            refused = self._count().literal if self._has_odd_quotes() else False
            try:
                # All columns: of fewer, Polars does not look at the number of fields.
                scan = self._scan(schema=schema, has_header=True, skip_rows=self._before, separator=self._separator)
                wanted = scan.slice(record, None if end is None else end - record)
                for frame in batches(wanted, rows) if not refused else ():
                    blocks, error = [Block(first, *matrices(frame.with_columns(truth), names, features))], None
                    # Of a record with too few fields the last one is missing.
                    if frame[self.names[-1]].null_count() or not is_finite(blocks[0].X, blocks[0].y):
                        blocks, _, error = as_text(frame.height)
                    record += frame.height
                    for block in blocks:
                        first += len(block.X)
                        yield block
                    if error is not None:
                        raise error
                if not refused:
                    return
            except polars_errors():
                # Where there are quotation marks Polars may count other records: what follows is read as text.
                refused = refused or self._has_quotes()
            for _ in itertools.count() if refused else range(stretch):
                blocks, count, error = as_text(rows)
                record += count
                for block in blocks:
                    first += len(block.X)
                    yield block
                if error is not None:
                    raise error
                if count < rows:
                    return
            stretch *= 2

    def _numbers(
        self, names: Sequence[str], records: list[list[str]], first: int
    ) -> tuple[npt.NDArray[np.float64], TableError | None]:
        """Return the numbers of the rows before the first that is wrong, and the error for that one.

        ``first`` is the number of the first row, counted from 0.
        """
        pl = polars_()
        rows = [record for record in records if record]
        width, error = len(self.names), None
        good = next((i for i, row in enumerate(rows) if len(row) != width), len(rows))
        if good < len(rows):
            error = TableError(
                f"row {first + good + 1} of {self.path} must have {width} columns, but has {len(rows[good])}"
            )
        matrix = np.empty((good, len(names)))
        where = {name: i for i, name in enumerate(self.names)}
        for j, name in enumerate(names):
            texts = pl.Series([row[where[name]] for row in rows[:good]], dtype=pl.String).str.strip_chars()
            matrix[:good, j] = texts.cast(pl.Float64, strict=False).to_numpy()[:good]
            for i in np.flatnonzero(~np.isfinite(matrix[:good, j])).tolist():
                word, row = texts[i], first + i + 1
                if word in TRUTH:
                    matrix[i, j] = TRUTH[word]
                    continue
                if word in MISSING or math.isinf(matrix[i, j]):
                    error = not_finite(self.path, name, math.inf if math.isinf(matrix[i, j]) else math.nan, row, "")
                else:
                    error = no_numbers(self.path, name, f"{word[:40]!r} in row {row}")
                good = i
                break
        return matrix[:good], error

    def _scan(self, **options: Any) -> polars.LazyFrame:
        # Lossy: what is no UTF-8 may be in a column that is not wanted.
        lazy: polars.LazyFrame = polars_().scan_csv(
            self.path, eol_char=self._end, encoding="utf8-lossy", glob=False, **options
        )
        return lazy

    def _lines(self) -> polars.LazyFrame:
        """Return the lines of the file, of which only those of records with quotation marks differ from records."""
        schema = {"line": polars_().String}
        return self._scan(
            schema=schema, has_header=False, separator="\x1f", quote_char=None, empty_string_is_null=False
        )

    def _parsed(self, lines: int) -> Iterator[list[str]]:
        """Yield the records after so many lines, the names among them, as texts; of an empty line none."""
        frames = batches(self._lines().slice(lines), self._lines_at_once)
        texts = (f"{text}\n" for frame in frames for text in frame["line"].to_list())
        try:
            if lines == 0:
                first = next(texts, "").removeprefix("\ufeff")
                texts = itertools.chain([first], texts)  # type: ignore[assignment]
            yield from csv.reader(texts, delimiter=self._separator)
        except polars_errors(csv.Error) as error:
            raise no_table(self.path, self.kind, error) from error

    def records(self, first: int) -> Iterator[list[str]]:
        """Yield the records from number ``first`` on as texts."""
        first += self._before + 1
        return itertools.islice(self._parsed(0), first, None) if self._has_quotes() else self._parsed(first)

    def _has_quotes(self) -> bool:
        if self._quoted is None:
            quotes = polars_().col("line").str.contains('"', literal=True).any()
            self._quoted = bool(self._collect(self._lines().select(quotes)))
        return self._quoted

    def _has_odd_quotes(self) -> bool:
        """Return whether a line has a quotation mark that is not at the ends of a field and not doubled within one."""
        if self._odd is None:
            field = f'(?:"(?:[^"]|"")*"|[^"{self._separator}]*)'
            well_formed = f"^{field}(?:{self._separator}{field})*$"
            line = polars_().col("line").str.strip_chars_end("\r")
            odd = line.str.contains('"', literal=True) & ~line.str.contains(well_formed)
            self._odd = bool(self._collect(self._lines().select(odd.any())))
        return self._odd

    def _count(self) -> _Counted:
        """Count the rows, and find the empty lines among the records."""
        if self._counted is None:
            pl, line, start = polars_(), polars_().col("line"), self._before + 1
            if self._has_quotes():
                blanks, records = [], -1
                for records, record in enumerate(self.records(0)):
                    if not record:
                        blanks.append(records)
                records += 1
                schema = dict.fromkeys(self.names, pl.String)
                scan = self._scan(schema=schema, has_header=True, skip_rows=self._before, separator=self._separator)
                try:
                    literal = bool(scan.select(pl.len()).collect(engine="streaming").item() != records)
                except polars_errors():
                    literal = True
            else:
                literal, blanks = False, []
                records = int(self._collect(self._lines().select(pl.len()))) - start
                if self._collect(self._lines().slice(start).select((line == "").sum())):
                    numbered = self._lines().slice(start).with_row_index("number").filter(line == "")
                    blanks = numbered.select("number").collect(engine="streaming")["number"].to_list()
            self._counted = _Counted(records - len(blanks), np.array(blanks, np.int64), literal)
        return self._counted

    def _collect(self, query: polars.LazyFrame) -> Any:
        try:
            return query.collect(engine="streaming").item()
        except polars_errors() as error:
            raise no_table(self.path, self.kind, error) from error

    def _record_of(self, row: int) -> int:
        """Return the number of a row's record."""
        if row == 0:
            return 0
        blanks = self._count().blanks
        return row + int(np.searchsorted(blanks - np.arange(len(blanks)), row, side="right"))


class _Text:
    """Records as texts, to be taken in the order of the file."""

    def __init__(self, file: CsvFile) -> None:
        self._file = file
        self._records: Iterator[list[str]] | None = None
        self._next = 0

    def take(self, record: int, count: int) -> list[list[str]]:
        """Return so many records from number ``record`` on, or those that are left."""
        if self._records is None:
            self._records, self._next = self._file.records(record), record
        skip = record - self._next
        self._next = record + count
        return list(itertools.islice(self._records, skip, skip + count))
