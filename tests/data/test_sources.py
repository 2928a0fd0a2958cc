"""What a table can be read from: every kind of file and frame, folders, and CSV files with odd things in them."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from table_files import NAMES, gather, numbers, write

from torchintro.data.open import open_table, read_table
from torchintro.nn import Standardize

pl = pytest.importorskip("polars")

MATRIX = numbers(60)


def both(source, **arguments):
    """Return the rows, once the streamed ones are those that are read."""
    read = read_table(source, **arguments)
    X, y = gather(open_table(source, **arguments), rows=13)
    assert torch.equal(X, read.X)
    assert torch.equal(y, read.y)
    return torch.cat([X, y], 1).numpy()


def frame(matrix=MATRIX):
    return pl.DataFrame({name: matrix[:, i] for i, name in enumerate(NAMES)})


@pytest.mark.parametrize("end", [".arrow", ".feather", ".ipc", ".tsv", ".csv.gz", ".csv.zst", ".tsv.gz", ".CSV"])
@pytest.mark.usefixtures("_small")
def test_every_kind_of_file(tmp_path, end):
    path = tmp_path / f"houses{end}"
    if end in (".arrow", ".feather", ".ipc"):
        frame().write_ipc(path, compression="zstd" if end == ".feather" else "uncompressed")
    elif end == ".csv.zst":
        frame().write_csv(path, compression="zstd", check_extension=False)
    else:
        text = frame().write_csv(separator="\t" if "tsv" in end else ",").encode()
        path.write_bytes(gzip.compress(text) if end.endswith(".gz") else text)
    assert np.array_equal(both(path), MATRIX)
    table = open_table(path)
    assert table.feature_names == tuple(NAMES[:3])
    assert np.array_equal(torch.cat([gather(table, share=(rank, 3))[0] for rank in range(3)]).numpy(), MATRIX[:, :3])
    assert np.array_equal(gather(table, start=33)[0].numpy(), MATRIX[33:, :3])
    assert table.rows == 60


def test_npz_is_streamed_too(tmp_path):
    np.savez(tmp_path / "t.npz", X=MATRIX[:, :2], y=MATRIX[:, 2:])
    assert np.array_equal(both(tmp_path / "t.npz"), MATRIX)
    assert open_table(tmp_path / "t.npz").target_names == ("y0", "y1")


class TestFrames:
    """Tables in memory."""

    @pytest.mark.parametrize("kind", ["DataFrame", "LazyFrame", "pyarrow", "pandas", "pandas with an index"])
    def test_every_kind(self, kind):
        if kind == "pyarrow":
            given = pytest.importorskip("pyarrow").table({name: MATRIX[:, i] for i, name in enumerate(NAMES)})
        elif kind.startswith("pandas"):
            pytest.importorskip("pyarrow")
            given = pytest.importorskip("pandas").DataFrame(MATRIX, columns=NAMES)
            if "index" in kind:
                given.index = [f"house {i}" for i in range(60)]
        else:
            given = frame().lazy() if kind == "LazyFrame" else frame()
        assert np.array_equal(both(given), MATRIX)
        table = open_table(given, target="area")
        assert table.feature_names == tuple(NAMES[1:])
        assert table.rows == 60
        assert table.fingerprint() == open_table(given, target="area").fingerprint()
        assert table.fingerprint() != open_table(frame(MATRIX + 1), target="area").fingerprint()
        streamed, dataset = table.split(0.3)[1], read_table(given, target="area")
        assert torch.equal(gather(streamed)[0], streamed.read().X)
        assert len(streamed.read()) < len(dataset)
        assert np.array_equal(gather(pickle.loads(pickle.dumps(table)))[0].numpy(), MATRIX[:, 1:])

    def test_pieces_are_the_caller_s(self):
        given = frame()
        X, y = next(open_table(given).pieces())
        X.zero_()
        y.zero_()
        assert given.equals(frame())

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"a": ["x"], "b": [1.0]}, "column 'a' of the DataFrame must be numeric, but holds string$"),
            ({"a": [datetime.date(2020, 1, 1)], "b": [1.0]}, "column 'a' of .* must be numeric, but holds date$"),
            ({"a": [1, None], "b": [1.0, 2.0]}, "column 'a' of the DataFrame has a missing value in row 2$"),
            ({"a": [1.0, 2.0], "b": [1.0, float("inf")]}, "column 'b' of .* has an infinite value in row 2$"),
            ({"a": [1.0, 1e300], "b": [1.0, 2.0]}, "column 'a' of .* has a value beyond float32 in row 2$"),
            ({"a": [], "b": []}, "the DataFrame has no rows$"),
            ({}, "the DataFrame has no columns$"),
        ],
    )
    def test_bad_frames(self, columns, message):
        with pytest.raises(ValueError, match=f"^read_table: {message}"):
            read_table(pl.DataFrame(columns))

    def test_what_is_neither_is_refused(self):
        with pytest.raises(TypeError, match=r"^open_table: source must be a path or a frame .*, but got list$"):
            open_table([1, 2])


class TestFolders:
    """A folder is read whole or refused."""

    def test_hive(self, tmp_path):
        for i, year in enumerate(("2019", "2020")):
            write(tmp_path / f"year={year}" / "city=3.5" / "part", "parquet", MATRIX[30 * i : 30 * i + 30])
        table = open_table(tmp_path)
        assert table.feature_names == ("year", "city", *NAMES[:3])
        assert table.target_names == ("price",)
        rows = both(tmp_path)
        assert np.array_equal(rows[:, 2:], MATRIX)
        assert rows[:, :2].tolist() == [[2019, 3.5]] * 30 + [[2020, 3.5]] * 30
        assert np.array_equal(both(tmp_path, features=["area"], target="year")[:, 1], rows[:, 0])
        write(tmp_path / "year=x" / "city=1" / "part", "parquet", MATRIX)
        with pytest.raises(
            ValueError, match=r"^open_table: column 'year' of .*year=x.* must be numeric, but holds str"
        ):
            open_table(tmp_path)

    def test_links_to_folders_are_followed_once(self, tmp_path):
        write(tmp_path / "all" / "b", "csv", MATRIX[:20])
        write(tmp_path / "elsewhere" / "c", "csv", MATRIX[20:])
        (tmp_path / "all" / "link").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "all" / "link again").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "all")
        assert np.array_equal(both(tmp_path / "all"), MATRIX)

    @pytest.mark.parametrize("name", ["part.csv", "folder"])
    def test_a_dangling_link(self, tmp_path, name):
        write(tmp_path / "a", "csv", MATRIX)
        (tmp_path / name).symlink_to(tmp_path / "gone")
        with pytest.raises(FileNotFoundError, match=rf"^open_table: {tmp_path / name} is a link to what is not there$"):
            open_table(tmp_path)

    def test_a_pipe(self, tmp_path):
        write(tmp_path / "a", "csv", MATRIX)
        os.mkfifo(tmp_path / "b.csv")
        with pytest.raises(
            ValueError, match=r"^open_table: .*b\.csv must be a file or a folder, but is something else"
        ):
            open_table(tmp_path)

    @pytest.mark.parametrize("name", ["b.csv", "folder"])
    def test_what_may_not_be_read(self, tmp_path, name):
        write(tmp_path / "a", "csv", MATRIX)
        path = tmp_path / name
        path.write_text("a,b\n1,2\n") if name == "b.csv" else path.mkdir()
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(PermissionError, match=rf"^open_table: .*{name} cannot be read: Permission denied$"):
            open_table(tmp_path)


class TestNumbersInCsv:
    """What is a number, whatever the first rows hold."""

    def rows(self, tmp_path, text, **arguments):
        (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return both(tmp_path / "t.csv", **arguments).tolist()

    def test_a_type_does_not_depend_on_the_first_rows(self, tmp_path):
        text = "a,b,c\n" + "1,true,0\n" * 3000 + "2.5,false,true\n 1e3 ,1, False\n"
        assert self.rows(tmp_path, text)[-3:] == [[1, 1, 0], [2.5, 0, 1], [1000, 1, 0]]

    def test_quoted_and_signed_numbers(self, tmp_path):
        assert self.rows(tmp_path, 'a,b\n"1","+2"\n-3,.5\n4.,1E2\n') == [[1, 2], [-3, 0.5], [4, 100]]

    def test_a_byte_order_mark_and_other_encodings(self, tmp_path):
        text = "\ufeffa,city,b\n1,Köln,2\n3,Oslo,4\n"
        assert self.rows(tmp_path, text, features=["a"]) == [[1, 2], [3, 4]]
        assert self.rows(tmp_path, text[1:].encode("latin1"), features=["a"]) == [[1, 2], [3, 4]]

    def test_a_short_or_long_row_is_found_where_its_columns_are_not_wanted(self, tmp_path):
        for bad, count in (("1,2", 2), ("1,2,3,4", 4), ("1,2,3,", 4)):
            with pytest.raises(ValueError, match=rf"row 2 of .* must have 3 columns, but has {count}$"):
                self.rows(tmp_path, f"a,b,note\n1,2,x\n{bad}\n1,2,y\n", features=["a"], target="b")

    def test_empty_notes_at_the_end_are_no_short_rows(self, tmp_path):
        text = "a,b,note\n" + "1,2,\n3,4,x\n" * 100
        assert self.rows(tmp_path, text, features=["a"], target="b") == [[1, 2], [3, 4]] * 100

    def test_rows_of_separators_only_are_missing_values(self, tmp_path):
        with pytest.raises(ValueError, match=r"column 'a' of .* has a missing value in row 2$"):
            self.rows(tmp_path, "a,b\n1,2\n,\n\n3,4\n")

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_it_is_what_python_s_csv_module_reads(self, tmp_path_factory, data):
        notes = st.text(st.sampled_from(['"', ",", "\n", "x", "é", " "]), max_size=6)
        rows = data.draw(
            st.lists(st.tuples(st.integers(-999, 999), notes, st.floats(-1e6, 1e6)), min_size=1, max_size=40)
        )
        literal = data.draw(st.booleans())
        text = io.StringIO()
        for record in [("a", "note", "b"), *rows]:
            if literal:  # a quotation mark within a field that is not in quotation marks
                note = str(record[1]).replace(",", "").replace("\n", "").lstrip('"')
                text.write(f"{record[0]},{note},{record[2]}\n")
            else:
                csv.writer(text, lineterminator=data.draw(st.sampled_from(["\n", "\r\n"]))).writerow(record)
            text.write("\n" * data.draw(st.integers(0, 3)) * data.draw(st.booleans()))
        path = tmp_path_factory.mktemp("csv") / "t.csv"
        path.write_text(text.getvalue(), newline="")
        expected = np.array([(a, b) for a, _, b in rows], np.float64)
        at_once = data.draw(st.integers(1, 20))
        table = open_table(path, features=["a"], dtype=torch.float64)
        assert np.array_equal(torch.cat(gather(table, rows=at_once), 1).numpy(), expected)
        shares = [torch.cat(gather(table, rows=at_once, share=(rank, 3)), 1) for rank in range(3)]
        assert np.array_equal(torch.cat(shares).numpy(), expected)
        assert table.rows == len(rows)

    @pytest.mark.parametrize("rows", ['0,x",0\n1,y,2\n', '0,x",0\n1,y",2\n', '0,x,0\n1,y""z",2\n'])
    def test_a_quotation_mark_within_a_field(self, tmp_path, rows):
        assert self.rows(tmp_path, f"a,note,b\n{rows}", features=["a"], target="b") == [[0, 0], [1, 2]]


class TestFarFromZero:
    """A column of Unix seconds: float32 numbers are 128 apart there."""

    SECONDS = 1.7e9 + np.random.default_rng(0).uniform(0, 1000, (4000, 1))

    @pytest.fixture(params=["parquet", "csv", "npy"])
    def path(self, request, tmp_path):
        matrix = np.concatenate([self.SECONDS, self.SECONDS - 1.7e9], 1)
        path = tmp_path / f"t.{request.param}"
        if request.param == "npy":
            np.save(path, matrix)
        else:
            table = pl.DataFrame({"seconds": matrix[:, 0], "y": matrix[:, 1]})
            table.write_csv(path) if request.param == "csv" else table.write_parquet(path)
        return path

    def test_it_is_standardised_in_float64(self, path):
        standardize = Standardize.fit(torch.from_numpy(self.SECONDS))
        expected = (self.SECONDS - self.SECONDS.mean()) / self.SECONDS.std()
        for X in (read_table(path, standardize=standardize).X, gather(open_table(path, standardize=standardize))[0]):
            assert X.dtype == torch.float32
            assert np.abs(X.numpy() - expected).max() < 1e-6 * np.abs(expected).max()

    def test_statistics_keep_its_variance(self, path):
        table = open_table(path)
        assert table.gathered_dtype == torch.float64
        for statistics in (table.statistics(), *table.split_statistics(0.3)):
            weight, bias = statistics.solve()
            assert weight.item() == pytest.approx(1, rel=1e-6)
            assert bias.item() == pytest.approx(-1.7e9, rel=1e-6)

    def test_float32_files_are_gathered_as_they_are(self, tmp_path):
        assert open_table(write(tmp_path / "t", "parquet", MATRIX)).gathered_dtype == torch.float32
