"""Streamed tables: every format against read_table, whatever the pieces and shares, and the answers to bad files."""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from table_files import FORMATS, NAMES, gather, numbers, opened, write

from torchintro.data.open import open_table, read_table
from torchintro.data.split import Part, belongs, mix
from torchintro.data.table import Table
from torchintro.nn import Standardize

pyarrow = pytest.importorskip("pyarrow")
csv = pytest.importorskip("pyarrow.csv")
parquet = pytest.importorskip("pyarrow.parquet")


# Of what runs the tests, and tqdm's own, which stays for the next bar.
THREADS = set(threading.enumerate())


@pytest.fixture(autouse=True)
def _threads() -> None:
    THREADS.update(threading.enumerate())


def assert_closed(path: Path) -> None:
    """Assert that nothing of ours runs and the file is closed: Polars' threads do so when they see that they may."""
    assert set(threading.enumerate()) <= THREADS
    deadline = time.monotonic() + 30
    while path in opened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_streamed_table_is_what_read_table_reads(tmp_path, kind, dtype):
    path = write(tmp_path / "houses", kind, numbers(100))
    table, read = open_table(path, dtype=dtype), read_table(path, dtype=dtype)
    X, y = gather(table, rows=17)
    assert (X.dtype, y.dtype) == (dtype, dtype)
    assert torch.equal(X, read.X)
    assert torch.equal(y, read.y)
    assert (table.feature_names, table.target_names) == (read.feature_names, read.target_names)
    assert (table.in_features, table.out_features) == (3, 1)
    assert table.rows == (None if kind == "csv" else 100)
    assert table.bytes == path.stat().st_size


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.usefixtures("_small")
def test_columns_are_chosen_by_name(tmp_path, kind):
    path = write(tmp_path / "houses", kind, numbers(50))
    names = [str(i) for i in range(4)] if kind.startswith("npy") else NAMES
    for features, target in [
        (None, names[1]),
        ([names[3], names[0]], [names[2], names[1]]),
        ([names[1], names[2]], names[0]),
        ([names[2]], [names[0], names[1]]),
    ]:
        table, read = (
            open_table(path, features=features, target=target),
            read_table(path, features=features, target=target),
        )
        X, y = gather(table, rows=9)
        assert torch.equal(X, read.X)
        assert torch.equal(y, read.y)


@pytest.mark.parametrize("kind", ["parquet", "npy", "npy by columns"])
@pytest.mark.parametrize("source", ["float16", "float64", "int8", "int64", "uint16", "bool", ">f4", ">i2"])
def test_other_numbers_are_converted(tmp_path, kind, source):
    if kind == "parquet" and source.startswith(">"):
        pytest.skip("Parquet has one byte order")
    matrix = (numbers(40) * 5).astype(source)
    path = write(tmp_path / "numbers", kind, matrix)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        read = read_table(path, dtype=dtype)
        X, y = gather(open_table(path, dtype=dtype), rows=11)
        assert torch.equal(X, read.X)
        assert torch.equal(y, read.y)


def test_decimals_and_truth_values(tmp_path):
    table = pyarrow.table(
        {
            "a": pyarrow.array([1, 2, 3]).cast(pyarrow.decimal128(21, 2)),
            "b": [True, False, True],
            "c": pyarrow.array([1.5, 2.5, 3.5], pyarrow.float32()),
        }
    )
    parquet.write_table(table, tmp_path / "t.parquet")
    csv.write_csv(table, tmp_path / "t.csv")
    for path in (tmp_path / "t.parquet", tmp_path / "t.csv"):
        X, y = gather(open_table(path))
        assert X.tolist() == [[1, 1], [2, 0], [3, 1]]
        assert y.tolist() == [[1.5], [2.5], [3.5]]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.usefixtures("_small")
def test_pieces_have_the_rows_asked_for_and_are_the_caller_s(tmp_path, kind):
    matrix = numbers(100)
    table = open_table(write(tmp_path / "houses", kind, matrix))
    for arguments, sizes in [
        ({"rows": 40}, [40, 40, 20]),
        ({"rows": 40, "multiple": 16}, [32, 32, 32, 4]),
        ({"rows": 5, "multiple": 16}, [16] * 6 + [4]),
        ({"rows": 50}, [50, 50]),
        ({"rows": 1000}, [100]),
        ({}, [100]),
        ({"rows": 40, "start": 30}, [40, 30]),
        ({"rows": 40, "start": 99}, [1]),
        ({"start": 100}, []),
        ({"start": 1000}, []),
    ]:
        pieces = []
        for X, y in table.pieces(**arguments):
            assert X.is_contiguous()
            assert y.is_contiguous()
            pieces.append((X, y))
        assert [len(X) for X, _ in pieces] == sizes
        if pieces:  # kept to the end, none has been written to again
            start = arguments.get("start", 0)
            assert np.array_equal(torch.cat([X for X, _ in pieces]).numpy(), matrix[start:, :3])
            assert np.array_equal(torch.cat([y for _, y in pieces]).numpy(), matrix[start:, 3:])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_folder_is_its_files_in_order(tmp_path, kind):
    matrix = numbers(60)
    folder = tmp_path / "houses"
    for name, first, last in [("a", 0, 20), ("b/2020", 20, 35), ("b/2021", 35, 35), ("c", 35, 60)]:
        write(folder / name, kind, matrix[first:last])
    write(folder / ".hidden" / "old", kind, matrix)
    write(folder / ".part", kind, matrix)
    (folder / "README.txt").write_text("houses")
    table = open_table(folder)
    X, y = gather(table, rows=13)
    assert np.array_equal(X.numpy(), matrix[:, :3])
    assert np.array_equal(y.numpy(), matrix[:, 3:])
    assert [file.path.stem for file in table.files] == ["a", "2020", "2021", "c"]
    assert "4 files" in repr(table)
    assert torch.equal(gather(table, rows=13, start=25)[0], X[25:])


# A CSV file whose records do not end where its lines do: the column of text has line ends, commas and quotation marks.
def write_quoted(path: Path, matrix: np.ndarray, end: str = "\n", blank: bool = False) -> Path:
    lines = ["note,a,b"]
    for i, (a, b) in enumerate(matrix.tolist()):
        note = ['"one\ntwo"', "plain", '"a ""word"", and more\n\n"', ""][i % 4]
        lines.append(f"{note},{a!r},{b!r}" + (end if blank and i % 3 == 0 else ""))
    path.write_bytes((end.join(lines) + (end if len(matrix) % 2 else "")).encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.usefixtures("_small")
def test_csv_records_that_span_lines(tmp_path, end, blank):
    matrix = numbers(101, 2).astype(np.float64)
    path = write_quoted(tmp_path / "notes.csv", matrix, end, blank)
    table = open_table(path, features=["a"], target="b", dtype=torch.float64)
    X, y = gather(table, rows=10)
    assert np.array_equal(torch.cat([X, y], 1).numpy(), matrix)
    for world_size in (2, 3, 7):
        shares = [gather(table, rows=10, share=(rank, world_size))[0] for rank in range(world_size)]
        assert torch.equal(torch.cat(shares), X)
        assert sum(len(share) > 0 for share in shares) > 1
    for start in (1, 50, 100, 101):
        assert torch.equal(gather(table, start=start)[0], X[start:])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.usefixtures("_small")
def test_csv_line_ends(tmp_path, end, blank):
    path = tmp_path / "t.csv"
    for last in ("", end):
        path.write_bytes(((end * (1 + blank)).join(["a,b", *(f"{i},{-i}" for i in range(40))]) + last).encode())
        table = open_table(path)
        assert gather(table)[0].flatten().tolist() == list(range(40))
        assert gather(table, start=33)[0].flatten().tolist() == list(range(33, 40))
        shares = [gather(table, share=(rank, 3))[0] for rank in range(3)]
        assert torch.cat(shares).flatten().tolist() == list(range(40))


def test_a_quotation_mark_that_is_meant_literally(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("pipe,a,b\n" + "".join(f"{5 * (i == 3)}{chr(34) * (i in (3, 60))},{i},{i}\n" for i in range(100)))
    table = open_table(path, features=["a"])
    assert gather(table, rows=10)[0].flatten().tolist() == list(range(100))
    assert gather(table, rows=10, start=50)[0].flatten().tolist() == list(range(50, 100))
    assert torch.cat([gather(table, share=(rank, 3))[0] for rank in range(3)]).flatten().tolist() == list(range(100))


def test_a_record_of_many_columns(tmp_path):
    matrix = numbers(3, 10_000)
    path = write(tmp_path / "wide", "csv", matrix)
    X, _ = gather(open_table(path))
    assert np.array_equal(X.numpy(), matrix[:, :-1])


@pytest.mark.usefixtures("_small")
class TestShares:
    """Small blocks, so that shares are cut everywhere."""

    @settings(max_examples=40, deadline=None)
    @given(
        kind=st.sampled_from(FORMATS),
        files=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
        world_size=st.integers(1, 9),
        group=st.integers(1, 60),
        rows=st.integers(1, 50),
        seed=st.integers(-(2**70), 2**70),
    )
    def test_shares_and_parts_are_the_table(self, tmp_path_factory, kind, files, world_size, group, rows, seed):
        folder = tmp_path_factory.mktemp("shares")
        try:
            matrix = numbers(sum(files))
            cuts = np.cumsum([0, *files])
            for i in range(len(files)):
                write(folder / str(i), kind, matrix[cuts[i] : cuts[i + 1]], group)
            table = open_table(folder)
            whole = torch.cat(gather(table, rows=rows), 1)
            assert np.array_equal(whole.numpy(), matrix)
            shares = [torch.cat(gather(table, rows=rows, share=(r, world_size)), 1) for r in range(world_size)]
            assert torch.equal(torch.cat(shares), whole)
            # Again: where a share of a CSV begins is remembered.
            again = [torch.cat(gather(table, rows=rows, share=(r, world_size)), 1) for r in range(world_size)]
            assert all(torch.equal(a, b) for a, b in zip(shares, again, strict=True))
            mask = torch.from_numpy(belongs(Part(0, int(0.3 * 2**64), seed), np.arange(len(whole))))
            with contextlib.suppress(ValueError):  # few rows may all be on one side
                for part, expected in zip(table.split(0.3, seed=seed), (whole[~mask], whole[mask]), strict=True):
                    parts = [torch.cat(gather(part, rows=rows, share=(r, world_size)), 1) for r in range(world_size)]
                    assert torch.equal(torch.cat(parts), expected)
                    start = len(expected) // 3
                    assert torch.equal(torch.cat(gather(part, rows=rows, start=start), 1), expected[start:])
            marks = [
                mark
                for r in range(world_size)
                for _, _, mark in table.marked_pieces(0.3, seed=seed, rows=rows, share=(r, world_size))
            ]
            assert torch.equal(torch.cat(marks), mask)
        finally:
            shutil.rmtree(folder)

    @pytest.mark.parametrize("kind", FORMATS)
    def test_shares_are_equal(self, tmp_path, kind):
        table = open_table(write(tmp_path / "t", kind, numbers(1000), 10))
        sizes = [len(gather(table, share=(rank, 3))[0]) for rank in range(3)]
        assert sum(sizes) == 1000
        assert max(sizes) - min(sizes) <= 1
        assert table.rows == 1000


class TestSplit:
    """Which rows are held out."""

    def test_it_is_a_fraction_of_the_rows_without_pattern(self):
        rows = 100_000
        masks = [belongs(Part(0, int(0.2 * 2**64), seed), np.arange(rows)) for seed in (0, 1)]
        for mask in masks:
            # Within five standard errors: the fraction, and how often two neighbours are held out both.
            assert abs(mask.mean() - 0.2) < 5 * math.sqrt(0.16 / rows)
            assert abs((mask[1:] & mask[:-1]).mean() - 0.04) < 5 * math.sqrt(0.04 / rows)
        assert abs((masks[0] & masks[1]).mean() - 0.04) < 5 * math.sqrt(0.04 / rows)

    def test_it_never_changes(self):
        mask = belongs(Part(0, 2**63, 7), 10**12 + np.arange(12))
        assert "".join(str(int(value)) for value in mask) == "011110111101"

    def test_the_first_numbers_are_splitmix64_s(self):
        # The generator's published first outputs for the state 1234567.
        state = (np.arange(3, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1234567)
        assert mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]

    def test_rows_are_counted_without_reading(self, tmp_path):
        table = open_table(write(tmp_path / "t", "npy", numbers(1000)))
        train, held_out = table.split(0.25, seed=3)
        assert train.rows is not None
        assert held_out.rows is not None
        assert train.rows + held_out.rows == 1000
        assert len(gather(train)[0]) == train.rows
        assert len({t.fingerprint() for t in (table, train, held_out, table.split(0.25, seed=4)[0])}) == 4
        assert repr(held_out).endswith("held out)")

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"fraction": 1.0}, ValueError, "Table.split: fraction must be a fraction between 0 and 1, but got 1.0"),
            ({"seed": 0.5}, TypeError, "Table.split: seed must be an integer, but got 0.5"),
            ({"fraction": 1e-30}, ValueError, "Table.split: of the 10 rows of .* leave none in one part"),
        ],
    )
    def test_bad_calls(self, tmp_path, arguments, error, message):
        table = open_table(write(tmp_path / "t", "npy", numbers(10)))
        with pytest.raises(error, match=f"^{message}"):
            table.split(**arguments)

    def test_a_part_is_split_again_by_the_same_hash(self, tmp_path):
        matrix = numbers(5000)
        table = open_table(write(tmp_path / "t", "npy", matrix))
        rest, test = table.split(0.2, seed=5)
        train, held_out = rest.split(0.25, seed=5)
        parts = [gather(part, rows=64)[0] for part in (train, held_out, test)]
        assert abs(len(parts[1]) - 1000) < 5 * math.sqrt(5000 * 0.2 * 0.8)
        together = torch.cat(parts)
        assert torch.equal(together.sort(0).values, gather(table)[0].sort(0).values)
        X, y, mark = (torch.cat(part) for part in zip(*rest.marked_pieces(0.25, seed=5, rows=64), strict=True))
        assert len(X) == len(y) == train.rows + held_out.rows
        assert torch.equal(X[mark], parts[1])
        assert torch.equal(X[~mark], parts[0])
        assert [repr(part).count(", held out") for part in (train, held_out, test, rest)] == [0, 1, 1, 0]
        with pytest.raises(ValueError, match=r"^Table\.split: seed must be 5 for a part of a table that was split by"):
            rest.split(seed=4)
        with pytest.raises(ValueError, match=r"^Table\.marked_pieces: seed must be 5 for a part of a table"):
            rest.marked_pieces()


def test_standardize(tmp_path):
    path = write(tmp_path / "t", "parquet", numbers(100) * 3 + 7)
    scaling = Standardize.fit(read_table(path).X)
    X, y = gather(open_table(path, standardize=scaling), rows=30)
    exact = (read_table(path, dtype=torch.float64).X - scaling.mean.double()) / scaling.scale.double()
    assert torch.equal(X, exact.float())
    assert torch.equal(X, read_table(path, standardize=scaling).X)
    assert torch.equal(y, read_table(path).y)
    assert open_table(path, standardize=scaling).fingerprint() != open_table(path).fingerprint()
    with pytest.raises(ValueError, match=r"^open_table: standardize must be for 3 features, but is for 2"):
        open_table(path, standardize=Standardize(torch.zeros(2), torch.ones(2)))
    with pytest.raises(TypeError, match=r"^open_table: standardize must be a Standardize, but got bool"):
        open_table(path, standardize=True)


def test_fingerprint(tmp_path):
    path = write(tmp_path / "t", "npy", numbers(100))
    first = open_table(path).fingerprint()
    assert first == open_table(path).fingerprint()
    assert first != open_table(path, target="0").fingerprint()
    os.utime(path, ns=(0, 0))
    assert first != open_table(path).fingerprint()
    folder = tmp_path / "moved"
    shutil.copytree(tmp_path, folder)  # with its times
    assert open_table(folder / "t.npy").fingerprint() == open_table(path).fingerprint()


def _gather(table: Table, rank: int) -> list[list[float]]:
    return gather(table, share=(rank, 2))[0].tolist()


def test_a_table_goes_to_other_processes(tmp_path):
    matrix = numbers(100)
    table = open_table(write(tmp_path / "t", "parquet", matrix))
    assert torch.equal(gather(pickle.loads(pickle.dumps(table)))[0], gather(table)[0])
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        shares = pool.starmap(_gather, [(table, 0), (table, 1)])
    assert np.array_equal(np.array(shares[0] + shares[1], np.float32), matrix[:, :3])


class TestLeaving:
    """What a stream leaves behind."""

    @pytest.mark.parametrize("kind", [*FORMATS, "arrow", "csv.gz"])
    @pytest.mark.parametrize("leave", ["close", "drop", "throw"])
    def test_an_early_stop_closes_the_file(self, tmp_path, kind, leave):
        path = write(tmp_path / "t", kind, numbers(20_000))
        pieces = open_table(path).pieces(rows=10)
        next(pieces)
        if leave == "close":
            pieces.close()
        elif leave == "throw":
            with pytest.raises(KeyboardInterrupt):
                pieces.throw(KeyboardInterrupt)
        del pieces
        gc.collect()
        assert_closed(path)

    @pytest.mark.parametrize("kind", FORMATS)
    def test_nothing_is_left_open(self, tmp_path, kind):
        path = write(tmp_path / "t", kind, numbers(1000))
        gather(open_table(path), rows=10)
        assert_closed(path)

    def test_a_program_that_leaves_a_stream_unfinished_ends(self, tmp_path):
        path = write(tmp_path / "t", "parquet", numbers(1000))
        program = f"import torchintro; p = torchintro.open_table({str(path)!r}).pieces(rows=5); print(len(next(p)[0]))"
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, "5\n", "")


class TestProgress:
    """Who is told how far it is."""

    def test_a_callable(self, tmp_path):
        path = write(tmp_path / "t", "npy", numbers(100))
        calls: list[tuple[int, int | None, float]] = []
        gather(open_table(path), rows=40, progress=lambda *arguments: calls.append(arguments))
        assert [call[:2] for call in calls] == [(40, 100), (80, 100), (100, 100)]
        assert calls[0][2] <= calls[1][2] <= calls[2][2]
        calls.clear()
        gather(
            open_table(write(tmp_path / "t", "csv", numbers(100))), progress=lambda *arguments: calls.append(arguments)
        )
        assert [call[:2] for call in calls] == [(100, None)]

    def test_a_bar(self, tmp_path, capsys):
        gather(open_table(write(tmp_path / "t", "npy", numbers(2000))), rows=400, progress=True)
        shown = capsys.readouterr()
        assert re.search(r"100%.* 2000/2000 \[.* rows/s\]\n$", shown.err)
        assert shown.out == ""

    def test_a_bar_of_unknown_length(self, tmp_path, capsys):
        gather(open_table(write(tmp_path / "t", "csv", numbers(20))), rows=10, progress=True)
        assert re.search(r"20 rows \[.* rows/s\]\n$", capsys.readouterr().err)

    def test_what_it_raises_stops_the_stream(self, tmp_path):
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            gather(open_table(write(tmp_path / "t", "npy", numbers(100))), rows=10, progress=stop)


# Prints by how many MB streaming the file makes the peak of the resident memory grow, after a first short stream.
# VmHWM, because getrusage's peak begins at that of the process that started this one.
MEASURE = """
import re, sys
from pathlib import Path
import torchintro
def peak():
    return int(re.findall(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0])
table = torchintro.open_table(sys.argv[1])
next(table.pieces(rows=100))
before = peak()
rows = sum(X.shape[0] for X, y in table.pieces())
print((peak() - before) / 1024, rows)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FORMATS, "parquet in one row group"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    rows, columns = (300_000 if kind == "csv" else 1_500_000), 65
    path = write(
        tmp_path / "t",
        kind.removesuffix(" in one row group"),
        numbers(rows, columns),
        rows if "one" in kind else 50_000,
    )
    size = path.stat().st_size / 2**20
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, path], capture_output=True, text=True, timeout=300, check=True
    )
    grown, streamed = result.stdout.split()
    assert int(streamed) == rows
    # A piece of 8 MB, and what Polars has under way.
    assert float(grown) < 160
    assert size > (370 if kind != "csv" else 190)
