"""CSV files as blocks: cut at the ends of records here, parsed by pyarrow on all cores, with every row's number.

The blocks follow from the file alone, not from who reads which of them, so that several processes can share one file: a
block that is another's is cut and counted, which takes a fraction of the time of parsing it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import columns as _columns
from .readers import ColumnBlock, File, _numbers, state_of

__all__ = ["CsvReader", "RawBlock", "raw_blocks"]

# What is read at once. pyarrow shares it among its threads in parts of PARSED_BYTES.
RAW_BYTES = 8 << 20
PARSED_BYTES = 1 << 20
# What a file's types and names are taken from, if its records are short enough.
SAMPLE_BYTES = 1 << 16
# A quoted field that has not ended after so many bytes never will: its quotation mark was meant literally.
LONGEST_FIELD = 64 << 20


@dataclass(frozen=True)
class RawBlock:
    """Whole records of a file.

    Attributes:
        offset: Where they begin in the file.
        data: The records, in the first block after the line of names.
        quoted: Whether there is a quotation mark, so that a line end need not end a record.
    """

    offset: int
    data: bytes
    quoted: bool


def raw_blocks(path: Path, block_bytes: int, offset: int = 0) -> Iterator[RawBlock]:
    """Cut a file at the ends of records, at most ``block_bytes`` bytes apart unless a record is longer.

    Where a block ends depends on where it begins only, so that reading on from ``offset``, the beginning of a block,
    gives the same blocks again.
    """
    with path.open("rb", buffering=0) as handle:
        handle.seek(offset)
        rest, wanted, ended = b"", block_bytes, False
        while not ended:
            read = handle.read(wanted)
            ended = not read
            data = rest + read
            cut = len(data) if ended else _last_end(data)
            if cut:
                block = data[:cut]
                yield RawBlock(offset, block, b'"' in block)
            offset, rest = offset + cut, data[cut:]
            wanted = block_bytes - len(rest) if cut else block_bytes


def _last_end(data: bytes) -> int:
    """Return how many bytes make whole records; 0 if the first one may not have ended yet."""
    end = b"\n" if b"\n" in data else b"\r"
    at = data.rfind(end, 0, len(data) - 1 if end == b"\r" else None)  # the last \r may be half of \r\n
    if b'"' not in data:
        return at + 1
    # Within a field in quotation marks an odd number of them has come before; one that is doubled counts twice.
    last, marks, after = at, data.count(b'"'), len(data)
    while at >= 0:
        marks -= data.count(b'"', at, after)
        if marks % 2 == 0:
            return at + 1
        after, at = at, data.rfind(end, 0, at)
    return last + 1 if len(data) > LONGEST_FIELD else 0


class CsvReader:
    """CSV with a line of names, comma-separated, quotation marks doubled within quotation marks."""

    def describe(self, function: str, path: Path) -> File:
        """Parse the first records for the names, and for the columns that hold true and false."""
        state = state_of(function, path)
        try:
            first = next(raw_blocks(path, SAMPLE_BYTES), RawBlock(0, b"", False))
        except OSError as error:
            raise _columns.no_table(function, path, error) from error
        # A row of another length is passed over here: it is named when it is read.
        table = _parse(function, path, first, None, {}, lambda row: "skip")
        names = tuple(table.column_names)
        _columns.twice(function, path, names)
        is_boolean = _columns.extra("pyarrow", function, "pyarrow", "tables").types.is_boolean
        booleans = frozenset(name for name, kind in zip(names, table.schema.types, strict=True) if is_boolean(kind))
        rows = 0 if len(first.data) == state.st_size and not table.num_rows else None
        return File(path, state.st_size, state.st_mtime_ns, names, rows, (), booleans)

    def check_numeric(self, function: str, file: File, names: Sequence[str]) -> None:
        """Say nothing: the first value that is no number is found when it is read, with its row."""

    def parse(
        self, function: str, file: File, block: RawBlock, names: Sequence[str], features: int, first: int
    ) -> ColumnBlock:
        """Return the numbers of a block whose first row is row ``first`` of the file."""
        pyarrow = _columns.extra("pyarrow", function, "pyarrow", "tables")
        types = {name: pyarrow.bool_() if name in file.detail else pyarrow.float64() for name in names}
        try:
            table = _parse(function, file.path, block, file.names, types)
        except ValueError:
            self._find_text(function, file, block, names, types, first)
            _find_length(function, file, block, first)
            raise
        arrays = [_numbers(pyarrow, column.combine_chunks()) for column in table.columns]
        return ColumnBlock(first, table.num_rows, arrays[:features], arrays[features:])

    def count(self, function: str, file: File, block: RawBlock) -> int:
        """Return how many rows a block has."""
        pyarrow = _columns.extra("pyarrow", function, "pyarrow", "tables")
        data = block.data
        plain = not block.quoted and data.count(b"\r") == data.count(b"\r\n")
        # Empty lines are no rows; only the parser knows what a file with some, or one with quotation marks, means.
        if plain and b"\n\n" not in data and b"\n\r\n" not in data and not data.startswith((b"\n", b"\r\n")):
            return data.count(b"\n") + (not data.endswith(b"\n")) - (block.offset == 0)
        name = file.names[0]
        return int(_parse(function, file.path, block, file.names, {name: pyarrow.string()}).num_rows)

    def _find_text(
        self, function: str, file: File, block: RawBlock, names: Sequence[str], types: dict[str, Any], first: int
    ) -> None:
        """Raise the error that names the first value that is no number, if that is what is wrong."""
        pyarrow = _columns.extra("pyarrow", function, "pyarrow", "tables")
        compute = _columns.extra("pyarrow.compute", function, "pyarrow", "tables")
        strings = dict.fromkeys(names, pyarrow.string())
        try:
            table = _parse(function, file.path, block, file.names, strings)
        except ValueError:
            return
        for name, chunks in zip(names, table.columns, strict=True):
            column = compute.utf8_trim_whitespace(chunks.combine_chunks())
            start, end = 0, len(column)
            if _casts(pyarrow, column, types[name]):
                continue
            while end - start > 1:
                middle = (start + end) // 2
                start, end = (middle, end) if _casts(pyarrow, column[start:middle], types[name]) else (start, middle)
            text = column[start].as_py()
            raise _columns.no_numbers(function, file.path, name, repr(text[:40]), first + start + 1)


def _find_length(function: str, file: File, block: RawBlock, first: int) -> None:
    """Raise the error that names the first row with too few or too many values, if that is what is wrong."""
    found: list[Any] = []

    def keep(row: Any) -> str:
        found.append(row)
        return "skip"

    try:
        _parse(function, file.path, block, file.names, {}, keep)
    except ValueError:
        return
    if found:
        # pyarrow counts from 1 and from the line of names.
        row = first + found[0].number - (block.offset == 0)
        raise ValueError(
            f"{function}: row {row} of {file.path} must have {found[0].expected_columns} columns, "
            f"but has {found[0].actual_columns}"
        )


def _casts(pyarrow: Any, column: Any, kind: Any) -> bool:
    try:
        column.cast(kind)
    except pyarrow.ArrowException:
        return False
    return True


def _parse(
    function: str, path: Path, block: RawBlock, names: Sequence[str] | None, types: dict[str, Any], bad: Any = None
) -> Any:
    """Return the columns of ``types`` of a block, all of them where ``names`` is None, as a pyarrow table.

    ``bad`` is given the rows of another length, and each one's number, which pyarrow knows if it uses one thread.
    """
    pyarrow = _columns.extra("pyarrow", function, "pyarrow", "tables")
    csv = _columns.extra("pyarrow.csv", function, "pyarrow", "tables")
    convert = csv.ConvertOptions(
        column_types=types, include_columns=None if names is None else list(types), strings_can_be_null=True
    )
    # In the first block the names stand before the rows.
    header = None if names is None or block.offset == 0 else list(names)
    largest = len(block.data) + 1
    for size in (min(PARSED_BYTES, largest), largest):
        try:
            return csv.read_csv(
                io.BytesIO(block.data),
                read_options=csv.ReadOptions(column_names=header, block_size=size, use_threads=bad is None),
                parse_options=csv.ParseOptions(newlines_in_values=block.quoted, invalid_row_handler=bad),
                convert_options=convert,
            )
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            # A record longer than what pyarrow parses at once.
            if size < largest and any(text in str(error) for text in ("straddling", "cannot infer")):
                continue
            raise _columns.no_table(function, path, error) from error
    raise AssertionError  # not reached: the last size is answered above
