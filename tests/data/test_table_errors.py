"""Tables that are streamed: wrong calls, and files that are no such tables."""

from __future__ import annotations

import math
import re
import sys

import numpy as np
import pytest
import torch
from table_files import FORMATS, NAMES, gather, numbers, write

import torchintro
from torchintro.data.open import open_table

pyarrow = pytest.importorskip("pyarrow")
csv = pytest.importorskip("pyarrow.csv")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows": 0}, ValueError, "rows must be at least 1, but got 0"),
        ({"rows": 1.5}, TypeError, "rows must be an integer, but got 1.5"),
        ({"multiple": 0}, ValueError, "multiple must be at least 1, but got 0"),
        ({"start": -1}, ValueError, "start must be at least 0, but got -1"),
        ({"share": 3}, TypeError, r"share must be a pair \(rank, world_size\), but got 3"),
        ({"share": (2, 2)}, ValueError, r"share must have a rank from 0 to 1, but got \(2, 2\)"),
        ({"share": (0, 0)}, ValueError, "share's world_size must be at least 1, but got 0"),
        ({"progress": 1}, TypeError, "progress must be True, False or a callable, but got 1"),
    ],
)
def test_bad_calls_of_pieces(tmp_path, arguments, error, message):
    table = open_table(write(tmp_path / "t", "npy", numbers(10)))
    with pytest.raises(error, match=rf"^Table\.pieces: {message}$"):
        table.pieces(**arguments)


def text(content: str | bytes):
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def arrow(**columns: object):
    return lambda path: parquet.write_table(pyarrow.table(columns), path)


def array(matrix: object):
    return lambda path: np.save(path, np.array(matrix))


@pytest.mark.parametrize(
    ("suffix", "make", "arguments", "message"),
    [
        (".csv", text("a,b\n1,2\n"), {"target": "c"}, "has no column 'c'; it has a, b$"),
        (".csv", text("a,b\n1,2\n"), {"features": ["c"]}, "has no column 'c'; it has a, b$"),
        (".csv", text("a,b\n1,2\n"), {"features": ["b"]}, "column 'b' is named as a feature and as a target$"),
        (".csv", text("a,b\n1,2\n"), {"features": ["a", "a"]}, "a column is named twice: a, a$"),
        (".csv", text("a,a\n1,2\n"), {}, "has more than one column 'a'$"),
        (".csv", text("a\n1\n"), {}, "must have a column besides the target, but has only a$"),
        (".csv", text("a,b\n"), {}, "has no rows$"),
        (".csv", text(""), {}, "is not a CSV table: it is empty$"),
        (".parquet", text(""), {}, "is not a PARQUET table: "),
        (".parquet", text("a,b\n1,2\n"), {}, "is not a PARQUET table: "),
        (".parquet", arrow(a=[], b=[]), {}, "has no rows$"),
        (".parquet", arrow(a=["x"], b=[1]), {}, "column 'a' of .* must be numeric, but holds string$"),
        (".parquet", arrow(a=[[1]], b=[1]), {}, "column 'a' of .* must be numeric, but holds list"),
        (".npy", text("a,b\n"), {}, r"is not a NumPy \.npy file of numbers$"),
        (".npy", text(b"\x93NUMPY\x07\x00"), {}, r"is not a NumPy \.npy file of numbers$"),
        (".npy", array([1.0]), {}, r"must have two dimensions, but has shape \(1,\)$"),
        (".npy", array([["a", "b"]]), {}, "column '0' of .* must be numeric, but holds <U1$"),
        (".npy", array([[{}, 1]]), {}, r"is not a NumPy \.npy file of numbers$"),
        (".npy", array(np.zeros((0, 2))), {}, "has no rows$"),
        (".npy", array(np.zeros((2, 0))), {}, "has no columns$"),
        (".npz", text(""), {}, r"is not a NumPy \.npz file of numbers$"),
        (
            ".txt",
            text("a,b\n1,2\n"),
            {},
            r"must end in one of \.csv, \.parquet, \.npy, \.npz, .* \(.csv and .tsv also in ",
        ),
    ],
)
def test_bad_tables(tmp_path, suffix, make, arguments, message):
    path = tmp_path / f"table{suffix}"
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        open_table(path, **arguments)
    assert re.match(r"open_table: [^\n]*$", str(caught.value))


# The bad value is in the hundredth row of the second file.
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("value", "what"), [(math.nan, "a missing value"), (-math.inf, "an infinite value")])
@pytest.mark.parametrize("column", [1, 3])
@pytest.mark.usefixtures("_small")
def test_a_bad_value_is_named_with_file_column_and_row(tmp_path, kind, value, what, column):
    folder = tmp_path / "t"
    write(folder / "a", kind, numbers(50))
    matrix = numbers(200)
    matrix[99, column] = value
    matrix[150, 0] = math.nan
    path = write(folder / "b", kind, matrix)
    name = str(column) if kind.startswith("npy") else NAMES[column]
    for arguments in ({}, {"rows": 11}, {"start": 60}, {"share": (1, 2)}, {"rows": 1000, "start": 149}):
        with pytest.raises(ValueError, match=rf"^Table\.pieces: column '{name}' of {path} has {what} in row 100$"):
            list(open_table(folder).pieces(**arguments))
    # Rows that come before it are good.
    good = next(open_table(folder).pieces(rows=120))
    assert len(good[0]) == 120
    # Not asked for, it does no harm.
    others = [str(i) if kind.startswith("npy") else NAMES[i] for i in (0, 1, 2, 3) if i not in (0, column)]
    assert len(gather(open_table(folder, features=others[:1], target=others[1]))[0]) == 250


@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_a_value_beyond_the_type(tmp_path, kind):
    matrix = numbers(50).astype(np.float64)
    matrix[20, 2] = 1e39
    path = write(tmp_path / "t", kind, matrix)
    name = "2" if kind == "npy" else NAMES[2]
    for dtype, called in ((torch.float32, "float32"), (torch.float16, "float16")):
        with pytest.raises(ValueError, match=rf"column '{name}' of .* has a value beyond {called} in row 21$"):
            gather(open_table(path, dtype=dtype))
    assert gather(open_table(path, dtype=torch.float64))[0].max() == 1e39


def test_large_values_whose_sum_overflows_are_fine(tmp_path):
    path = write(tmp_path / "t", "npy", np.full((10, 2), 3e38, np.float32))
    assert len(gather(open_table(path))[0]) == 10


def test_missing_values_of_every_kind_in_parquet(tmp_path):
    for values in ([1, None], [True, None], [None, None], pyarrow.array([1, None]).cast(pyarrow.decimal128(20, 1))):
        arrow(a=values, b=[1.0, 2.0])(tmp_path / "t.parquet")
        row = 2 if values[0] is not None and str(values[0]) != "None" else 1
        with pytest.raises(ValueError, match=f"column 'a' of .* has a missing value in row {row}$"):
            gather(open_table(tmp_path / "t.parquet"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("7,oops", "column 'b' of .* must be numeric, but holds 'oops' in row 61$"),
        ("2020-01-01,1", "column 'a' of .* must be numeric, but holds '2020-01-01' in row 61$"),
        ("7,", "column 'b' of .* has a missing value in row 61$"),
        ("NA,1", "column 'a' of .* has a missing value in row 61$"),
        ("7,inf", "column 'b' of .* has an infinite value in row 61$"),
        ("7,8,9", "row 61 of .* must have 2 columns, but has 3$"),
        ("7", "row 61 of .* must have 2 columns, but has 1$"),
    ],
)
@pytest.mark.parametrize("rows", [0, 60])
def test_a_bad_row_of_a_csv(tmp_path, bad, message, rows):
    path = tmp_path / "t.csv"
    good = "".join(f"{i},{i}\n" for i in range(60))
    path.write_text(f"a,b\n{good[: None if rows else 0]}{bad}\n{good}")
    with pytest.raises(ValueError, match=message.replace("61", str(rows + 1))):
        gather(open_table(path))


@pytest.mark.parametrize("kind", FORMATS)
def test_files_must_have_the_same_columns(tmp_path, kind):
    write(tmp_path / "t" / "a", kind, numbers(10))
    write(tmp_path / "t" / "b", kind, numbers(10, 3))
    names = "0, 1, 2, 3" if kind.startswith("npy") else ", ".join(NAMES)
    with pytest.raises(
        ValueError, match=rf"^open_table: .*b\.\w+ must have the columns of .*a\.\w+, {names}, but has 0, 1, 2$"
    ):
        open_table(tmp_path / "t")


def test_a_folder_must_hold_one_kind(tmp_path):
    with pytest.raises(ValueError, match=r"holds no table: its files must end in one of "):
        open_table(tmp_path)
    write(tmp_path / "a", "csv", numbers(10))
    write(tmp_path / "b", "npy", numbers(10))
    with pytest.raises(ValueError, match=r"must hold files of one kind, but has a\.csv and b\.npy$"):
        open_table(tmp_path)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_vanishes_or_changes(tmp_path, kind):
    path = write(tmp_path / "t", kind, numbers(100))
    table = open_table(path)
    write(tmp_path / "t", kind, numbers(90))
    with pytest.raises(ValueError, match=rf"^Table\.pieces: {path} has changed since the table was opened$"):
        gather(table)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"^Table\.pieces: {path} is no longer there$"):
        gather(table)
    with pytest.raises(FileNotFoundError, match=f"^open_table: there is no file or folder {path}$"):
        open_table(path)


def test_a_damaged_parquet_file(tmp_path):
    path = write(tmp_path / "t", "parquet", numbers(5000), 5000)
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + b"\xff" * 20_000 + whole[20_200:])
    with pytest.raises(ValueError, match=rf"^Table\.pieces: {path} is not a PARQUET table: .*$"):
        gather(open_table(path))


def test_an_npy_file_cut_short(tmp_path):
    path = write(tmp_path / "t", "npy", numbers(100))
    table = open_table(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"is cut short: 10 bytes of its array are missing$"):
        open_table(path)
    # While it is being read.
    object.__setattr__(table.files[0], "size", path.stat().st_size)
    object.__setattr__(table.files[0], "modified", path.stat().st_mtime_ns)
    with pytest.raises(ValueError, match=r"is cut short at byte \d+$"):
        gather(table)


@pytest.mark.parametrize(("path", "dtype"), [(3, torch.float32), ("t.npy", torch.int64), ("t.npy", "float32")])
def test_bad_types(path, dtype):
    with pytest.raises(TypeError, match=r"^open_table: (source|dtype) must be "):
        open_table(path, dtype=dtype)


def test_without_polars(tmp_path, monkeypatch):
    for kind in ("parquet", "csv"):
        write(tmp_path / kind, kind, numbers(10))
    path = write(tmp_path / "t", "npy", numbers(10))
    monkeypatch.setitem(sys.modules, "polars", None)
    for kind in ("parquet", "csv"):
        with pytest.raises(ImportError, match=r'^open_table: needs polars: pip install "torchintro\[tables\]"'):
            open_table(tmp_path / f"{kind}.{kind}")
    assert len(gather(open_table(path))[0]) == 10
    assert torchintro.open_table is open_table
