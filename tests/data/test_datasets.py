"""Data sets, files and standardisation; files against what was written into them."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from torchintro.data.datasets import Dataset, diabetes, split, synthetic
from torchintro.data.open import open_table, read_table
from torchintro.nn import Standardize


def test_synthetic_is_three_x_plus_noise():
    dataset = synthetic()
    assert dataset.X.shape == dataset.y.shape == (100, 1)
    assert (dataset.name, dataset.feature_names, dataset.target_names) == ("synthetic", ("x",), ("y",))
    assert torch.equal(synthetic(noise=0).y, 3 * dataset.X)
    many = synthetic(10_000, noise=0.5, dtype=torch.float64)
    noise = many.y - 3 * many.X
    # Within five standard errors of the mean and of the deviation.
    assert abs(noise.mean()) < 5 * 0.5 / math.sqrt(10_000)
    assert abs(noise.std() - 0.5) < 5 * 0.5 / math.sqrt(20_000)
    assert torch.equal(synthetic(seed=4).X, synthetic(seed=4).X)
    assert not torch.equal(synthetic(seed=4).X, synthetic(seed=5).X)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 0}, ValueError, "synthetic: n must be at least 1, but got 0"),
        ({"noise": -1}, ValueError, "synthetic: noise must be a finite number of at least 0, but got -1"),
        ({"seed": 0.5}, TypeError, "synthetic: seed must be an integer, but got 0.5"),
    ],
)
def test_synthetic_bad_calls(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        synthetic(**arguments)


def test_diabetes_is_scikit_learns_in_its_own_units():
    datasets = pytest.importorskip("sklearn.datasets")
    dataset = diabetes(dtype=torch.float64)
    X, y = datasets.load_diabetes(return_X_y=True, scaled=False)
    assert np.array_equal(dataset.X.numpy(), X)
    assert np.array_equal(dataset.y.numpy(), y[:, None])
    assert diabetes().X.dtype == torch.float32
    assert (len(dataset), len(dataset.feature_names)) == (442, 10)
    assert dataset.X[:, dataset.feature_names.index("age")].max() == 79


@pytest.mark.parametrize(("rows", "fraction"), [(100, 0.2), (442, 0.2), (10, 0.5), (6, 0.9)])
def test_split_deals_out_every_row(rows, fraction):
    X = torch.arange(float(rows)).unsqueeze(-1)
    dataset = Dataset("rows", X, -X, ("x",), ("y",))
    train, test = split(dataset, fraction, seed=1)
    assert abs(len(test) - rows * fraction) < 5 * math.sqrt(rows * fraction * (1 - fraction))
    assert torch.equal(torch.cat([train.X, test.X]).sort(0).values, X)
    assert torch.equal(train.y, -train.X)
    assert torch.equal(test.y, -test.X)
    assert torch.equal(train.X.flatten(), train.numbers.float())
    assert torch.equal(split(dataset, fraction, seed=1)[0].X, train.X)
    if rows >= 100:
        assert not torch.equal(split(dataset, fraction, seed=2)[0].X, train.X)
        assert not torch.equal(train.X, X[: len(train)])


def test_split_without_a_seed_draws_one():
    dataset = synthetic(1000)
    torch.manual_seed(3)
    first, second = split(dataset, seed=None), split(dataset, seed=None)
    torch.manual_seed(3)
    assert torch.equal(split(dataset, seed=None)[1].X, first[1].X)
    assert not torch.equal(first[1].numbers, second[1].numbers)
    again = split(first[0], 0.5, seed=None)  # a part by its own seed
    assert len(again[0]) + len(again[1]) == len(first[0])


def test_split_is_that_of_the_table(tmp_path):
    matrix = np.random.default_rng(0).standard_normal((3000, 4)).astype(np.float32)
    np.save(tmp_path / "t.npy", matrix)
    table = open_table(tmp_path / "t.npy")
    for streamed, dataset in zip(table.split(0.2, seed=5), split(table.read(), 0.2, seed=5), strict=True):
        read = streamed.read()
        assert torch.equal(read.X, dataset.X)
        assert torch.equal(read.numbers, dataset.numbers)
        # And again, streamed, read and then split, or split all along.
        for parts in zip(
            streamed.split(0.25, seed=5), split(read, 0.25, seed=5), split(dataset, 0.25, seed=5), strict=True
        ):
            of_table, of_read, of_dataset = parts[0].read(), *parts[1:]
            assert torch.equal(of_table.X, of_read.X)
            assert torch.equal(of_table.X, of_dataset.X)
            assert torch.equal(of_table.numbers, of_dataset.numbers)
        with pytest.raises(
            ValueError, match=r"^split: seed must be 5 for a part of a table that was split by that one"
        ):
            split(dataset, 0.25)


@pytest.mark.parametrize(
    ("rows", "fraction", "error", "message"),
    [
        (10, 0, ValueError, "split: test_fraction must be a fraction between 0 and 1, but got 0"),
        (10, 1.0, ValueError, "split: test_fraction must be a fraction between 0 and 1, but got 1.0"),
        (10, math.nan, ValueError, "split: test_fraction must be a fraction between 0 and 1, but got nan"),
        (10, "0.2", TypeError, "split: test_fraction must be a fraction between 0 and 1, but got '0.2'"),
        (1, 0.5, ValueError, "split: there must be at least 2 rows to split, but got 1"),
        (10, 1e-9, ValueError, "split: of the 10 rows test_fraction 1e-09 and seed 0 leave none in one part"),
    ],
)
def test_split_bad_calls(rows, fraction, error, message):
    with pytest.raises(error, match=f"^{message}"):
        split(synthetic(rows), fraction)


class TestStandardize:
    def test_against_scikit_learn(self):
        preprocessing = pytest.importorskip("sklearn.preprocessing")
        X = diabetes(dtype=torch.float64).X
        standardize = Standardize.fit(X)
        expected = preprocessing.StandardScaler().fit(X.numpy())
        eps = torch.finfo(torch.float64).eps
        # Two sums over the rows in another order.
        assert standardize.mean.numpy() == pytest.approx(expected.mean_, rel=len(X) * eps)
        assert standardize.scale.numpy() == pytest.approx(expected.scale_, rel=len(X) * eps)
        assert standardize(X).numpy() == pytest.approx(expected.transform(X.numpy()), rel=1e-10, abs=1e-12)

    def test_features_far_from_zero(self):
        # The deviation, 1, is a hundred-thousandth of the mean: a float32 sum of squares would have lost it.
        X = 1e5 + torch.tensor([-1.0, 1.0]).repeat(5000).unsqueeze(-1)
        standardize = Standardize.fit(X)
        assert standardize.scale.item() == pytest.approx(1, rel=torch.finfo(torch.float32).eps)
        assert set(standardize(X).flatten().tolist()) == {-1.0, 1.0}

    @pytest.mark.parametrize("constant", [0.0, 0.1, -7.5, 1e6 + 0.1])
    def test_a_constant_column_is_only_shifted(self, constant):
        X = torch.full((7, 2), constant)
        X[:, 1] = torch.arange(7.0)
        standardize = Standardize.fit(X)
        assert standardize.scale.tolist() == [1, 2]
        assert standardize(X)[:, 0].tolist() == [0] * 7

    def test_inverse(self):
        X = torch.randn(100, 4, dtype=torch.float64) * torch.tensor([1e-3, 1, 50, 1e6]) + 10
        standardize = Standardize.fit(X)
        error = (standardize.inverse(standardize(X)) - X).abs()
        assert (error <= 4 * torch.finfo(torch.float64).eps * (X.abs() + standardize.mean.abs())).all()

    def test_is_a_module_without_parameters(self):
        standardize = Standardize.fit(torch.randn(10, 3))
        assert list(standardize.parameters()) == []
        assert set(standardize.state_dict()) == {"mean", "scale"}
        assert standardize.double()(torch.randn(2, 3).double()).dtype == torch.float64
        assert repr(standardize) == "Standardize(3)"

    def test_takes_integers_and_numpy(self):
        assert Standardize.fit(np.array([[1], [3]])).mean.tolist() == [2.0]
        assert Standardize.fit(torch.tensor([[1], [3]])).mean.dtype == torch.float32

    @pytest.mark.parametrize(
        ("X", "message"),
        [
            (torch.zeros(3), r"Standardize.fit: X must have two dimensions, but got shape \(3,\)"),
            (torch.zeros(0, 2), r"Standardize.fit: X must have at least one row, but got shape \(0, 2\)"),
            (torch.tensor([[math.nan]]), r"Standardize.fit: X must be finite, but element \[0, 0\] is nan"),
        ],
    )
    def test_bad_calls(self, X, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            Standardize.fit(X)

    def test_bad_buffers(self):
        with pytest.raises(ValueError, match=r"^Standardize: mean and scale must have one shape .*\(2,\) and \(3,\)"):
            Standardize(torch.zeros(2), torch.ones(3))
        with pytest.raises(ValueError, match=r"^Standardize: scale must not hold 0$"):
            Standardize(torch.zeros(2), torch.zeros(2))


TABLE = {"area": [50.0, 75.5, 120.0], "rooms": [2, 3, 5], "new": [True, False, True], "price": [1.5, 2.25, 4.0]}
CSV = "area,rooms,new,price\n50,2,true,1.5\n75.5,3,false,2.25\n120,5,true,4\n"


def write_table(path, table=TABLE):
    if path.suffix == ".csv":
        path.write_text(CSV)
    elif path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").table(table), path)
    elif path.suffix == ".npy":
        np.save(path, np.array(list(table.values()), dtype=np.float64).T)
    else:
        columns = np.array(list(table.values()), dtype=np.float64).T
        np.savez(path, X=columns[:, :3], y=columns[:, 3])
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npy", ".npz"])
def test_tables_hold_what_was_written(tmp_path, suffix):
    if suffix in (".csv", ".parquet"):
        pytest.importorskip("pyarrow")
    path = write_table(tmp_path / f"houses{suffix}")
    dataset = read_table(path)
    names = {
        ".npy": (("0", "1", "2"), ("3",)),
        ".npz": (("X0", "X1", "X2"), ("y0",)),
    }.get(suffix, (("area", "rooms", "new"), ("price",)))
    assert (dataset.feature_names, dataset.target_names) == names
    assert dataset.X.tolist() == [[50, 2, 1], [75.5, 3, 0], [120, 5, 1]]
    assert dataset.y.tolist() == [[1.5], [2.25], [4.0]]
    assert dataset.X.dtype == dataset.y.dtype == torch.float32
    assert dataset.name == str(path)
    only = read_table(path, target=(), features=names[0][1:2])
    assert (only.X.tolist(), only.y.shape, only.target_names) == ([[2], [3], [5]], (3, 0), ())
    chosen = read_table(path, target=[names[1][0], names[0][0]], features=[names[0][2]], dtype=torch.float64)
    assert chosen.y.tolist() == [[1.5, 50], [2.25, 75.5], [4, 120]]
    assert chosen.X.tolist() == [[1], [0], [1]]
    assert chosen.X.dtype == torch.float64


def test_columns_that_are_not_used_may_hold_anything(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "houses.csv"
    path.write_text("city,area,price\nBerlin,50,\n,75,2\n")
    assert read_table(path, target=(), features=["area"]).X.tolist() == [[50], [75]]
    with pytest.raises(ValueError, match=r"column 'city' of .* must be numeric, but holds 'Berlin' in row 1$"):
        read_table(path, target="area")


def bad_csv(text):
    return lambda path: path.with_suffix(".csv").write_text(text)


def bad_parquet(**columns):
    def write(path):
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path.with_suffix(".parquet"))

    return write


def bad_numpy(*arrays, **named):
    def write(path):
        if named:
            np.savez(path.with_suffix(".npz"), **named)
        else:
            np.save(path.with_suffix(".npy"), arrays[0], allow_pickle=True)

    return write


@pytest.mark.parametrize(
    ("suffix", "write", "arguments", "message"),
    [
        (".csv", bad_csv(CSV), {"target": "prize"}, "has no column 'prize'; it has area, rooms, new, price"),
        (".csv", bad_csv(CSV), {"features": ["garden"]}, "has no column 'garden'; it has area, rooms, new, price"),
        (".csv", bad_csv(CSV), {"features": ["price"]}, "column 'price' is named as a feature and as a target"),
        (".csv", bad_csv(CSV), {"features": ["area", "area"]}, "a column is named twice: area, area"),
        (".csv", bad_csv("price\n1\n2\n"), {}, "must have a column besides the target, but has only price"),
        (".csv", bad_csv("a,b\n1,2\nx,3\n"), {}, "column 'a' of .* must be numeric, but holds 'x' in row 2$"),
        (
            ".csv",
            bad_csv("a,b\n2026-01-02,2\n"),
            {},
            "column 'a' of .* must be numeric, but holds '2026-01-02' in row 1$",
        ),
        (".csv", bad_csv("a,b\n1,2\n,3\n,4\n"), {}, "column 'a' of .* has a missing value in row 2$"),
        (".csv", bad_csv("a,b\n1,2\n2,\n"), {}, "column 'b' of .* has a missing value in row 2$"),
        (".csv", bad_csv("a,b\n,2\n,3\n"), {}, "column 'a' of .* has a missing value in row 1$"),
        (".csv", bad_csv("a,b\n1,2\ninf,3\n"), {}, "column 'a' of .* has an infinite value in row 2$"),
        (".csv", bad_csv("a,b\n1,2\n1e300,3\n"), {}, "column 'a' of .* has a value beyond float32 in row 2$"),
        (".csv", bad_csv("a,a,b\n1,2,3\n"), {}, "has more than one column 'a'"),
        (".csv", bad_csv("a,b\n1,2\n1\n"), {}, "row 2 of .* must have 2 columns, but has 1$"),
        (".csv", bad_csv("a,b\n"), {}, "has no rows"),
        (".csv", bad_csv(""), {}, "is not a CSV table: .*[Ee]mpty"),
        (".parquet", lambda path: path.with_suffix(".parquet").write_text(CSV), {}, "is not a PARQUET table"),
        (".parquet", bad_parquet(a=[1, None], b=[1, 2]), {}, "column 'a' of .* has a missing value in row 2$"),
        (".parquet", bad_parquet(a=["x", "y"], b=[1, 2]), {}, "column 'a' of .* must be numeric, but holds string"),
        (".npy", bad_numpy(np.zeros(3)), {}, r"must have two dimensions, but has shape \(3,\)"),
        (".npy", bad_numpy(np.array([["a", "b"]])), {}, "column '0' of .* must be numeric, but holds <U1"),
        (".npy", bad_numpy(np.array([[{}, 1]])), {}, "is not a NumPy .npy file of numbers"),
        (".npy", bad_numpy(np.array([[1, 2], [math.nan, 3]])), {}, "column '0' of .* has a missing value in row 2"),
        (".npy", bad_numpy(np.zeros((0, 2))), {}, "has no rows"),
        (".npy", bad_numpy(np.zeros((2, 0))), {}, "has no columns"),
        (".npy", lambda path: path.with_suffix(".npy").write_text(CSV), {}, "is not a NumPy .npy file of numbers"),
        (".npz", lambda path: path.with_suffix(".npz").write_text(CSV), {}, "is not a NumPy .npz file of numbers"),
        (".npz", bad_numpy(X=np.zeros((2, 2))), {}, "must hold the arrays X and y, but holds X"),
        (".npz", bad_numpy(X=np.zeros((2, 2)), y=np.zeros(3)), {}, "as many rows in X as in y, but has 2 and 3"),
        (".npz", bad_numpy(X=np.zeros((2, 2, 2)), y=np.zeros(2)), {}, r"array X of .* has shape \(2, 2, 2\)"),
        (".xlsx", bad_csv(CSV), {}, "must end in one of .csv, .parquet, .npy, .npz"),
    ],
)
def test_bad_tables(tmp_path, suffix, write, arguments, message):
    if suffix in (".csv", ".parquet"):
        pytest.importorskip("pyarrow")
    write(tmp_path / "table")
    with pytest.raises(ValueError, match=message) as caught:
        read_table(tmp_path / f"table{suffix}", **arguments)
    assert re.match(r"read_table: ", str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^read_table: there is no file .*nothing\.csv$"):
        read_table(tmp_path / "nothing.csv")


@pytest.mark.parametrize(
    ("module", "call", "message"),
    [
        ("sklearn.datasets", diabetes, r'^diabetes: needs scikit-learn: pip install "torchintro\[cli\]"'),
        ("polars", lambda: read_table("houses.csv"), r'^read_table: needs polars: pip install "torchintro\[tables\]"'),
    ],
)
def test_without_the_extra_packages(monkeypatch, tmp_path, module, call, message):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "houses.csv")
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=message):
        call()


def test_numpy_files_need_no_extra_package(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "polars", None)
    assert len(read_table(write_table(tmp_path / "houses.npz"))) == 3


@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_standardize_broadcasts_nothing(method):
    standardize = Standardize.fit(torch.randn(10, 3))
    for shape in [(10, 1), (10, 2), ()]:
        with pytest.raises(ValueError, match=r"Standardize: input must have shape \(\*, 3\), but got"):
            getattr(standardize, method)(torch.zeros(shape))


def test_a_damaged_npz_is_answered(tmp_path):
    path = tmp_path / "table.npz"
    np.savez_compressed(path, X=np.ones((50, 3)), y=np.ones(50))
    whole = path.read_bytes()
    for damaged in (whole[:-30], whole[:60] + b"\xff" * 20 + whole[80:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is not a NumPy \.npz file"):
            read_table(path)
