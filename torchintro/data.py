"""Data for regression: two built-in sets, tables in files, the split in two parts, and standardisation."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from . import _checks, _columns
from .training import ArrayLike

__all__ = ["Dataset", "Standardize", "diabetes", "read_features", "read_table", "split", "synthetic"]

TABLE_SUFFIXES = (".csv", ".parquet", ".npy", ".npz")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows for regression.

    Attributes:
        name: Where they come from.
        X: Features ``(N, D)``.
        y: Targets ``(N, T)``.
        feature_names: ``D`` names.
        target_names: ``T`` names.
    """

    name: str
    X: Tensor
    y: Tensor
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]

    def __len__(self) -> int:
        return self.X.shape[0]

    def select(self, rows: Tensor) -> Dataset:
        """Return the data set of the given rows, a tensor of indices."""
        return replace(self, X=self.X[rows], y=self.y[rows])

    def to(self, device: torch.device | str) -> Dataset:
        """Return the data set on a device."""
        return replace(self, X=self.X.to(device), y=self.y.to(device))


def synthetic(n: int = 100, *, noise: float = 0.1, seed: int | None = 0, dtype: torch.dtype = torch.float32) -> Dataset:
    """Make the introduction's data: one feature ``x`` and ``y = 3 x + noise``.

    Equivalent to ``X = torch.randn(n, 1); y = 3 * X + noise * torch.randn(n, 1)``.

    Args:
        n: Number of rows.
        noise: Standard deviation of the noise.
        seed: Seed of the random numbers; None draws from PyTorch's global random state.
        dtype: Type of the tensors.

    Returns:
        ``n`` rows with the feature ``x`` and the target ``y``.

    Raises:
        ValueError: ``n`` is below 1 or ``noise`` is negative.

    Example:
        >>> synthetic().X.shape
        torch.Size([100, 1])
    """
    n = _checks.positive_integer("synthetic", "n", n)
    noise = _checks.non_negative("synthetic", "noise", noise)
    generator = _generator("synthetic", seed)
    X = torch.randn(n, 1, generator=generator, dtype=dtype)
    y = 3 * X + noise * torch.randn(n, 1, generator=generator, dtype=dtype)
    return Dataset("synthetic", X, y, ("x",), ("y",))


def diabetes(*, dtype: torch.dtype = torch.float32) -> Dataset:
    """Load scikit-learn's diabetes data: 442 patients, 10 measurements, the disease's progression after one year.

    Equivalent to ``sklearn.datasets.load_diabetes(scaled=False)``: the features are in their own units.

    Args:
        dtype: Type of the tensors.

    Returns:
        442 rows with 10 features and one target.

    Raises:
        ImportError: scikit-learn is not installed.

    Example:
        >>> diabetes().feature_names[:3]  # doctest: +SKIP
        ('age', 'sex', 'bmi')
    """
    bunch = _columns.extra("sklearn.datasets", "diabetes", "scikit-learn").load_diabetes(scaled=False)
    return Dataset(
        "diabetes",
        torch.as_tensor(bunch.data, dtype=dtype),
        torch.as_tensor(bunch.target, dtype=dtype).unsqueeze(-1),
        tuple(bunch.feature_names),
        ("progression",),
    )


def read_table(
    path: str | Path,
    *,
    target: str | Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """Read features and targets from a file.

    A ``.csv`` file has a line of column names; a ``.parquet`` file has them too; the columns of a two-dimensional
    ``.npy`` array are called ``0``, ``1`` and so on. A ``.npz`` file holds an array ``X`` and an array ``y``, whose
    columns are called ``X0``, ``X1``... and ``y0``, ``y1``...

    Args:
        path: The file; its suffix says what it holds.
        target: Name or names of the target columns; by default the last column (in a ``.npz`` file those of ``y``).
        features: Names of the feature columns; by default all but the targets.
        dtype: Type of the tensors.

    Returns:
        The data set, named after the file.

    Raises:
        ImportError: The file needs pyarrow, which is not installed.
        OSError: The file cannot be read.
        ValueError: The file is no such table, or a column is missing, not numeric or has missing values.

    Example:
        >>> dataset = read_table("houses.csv", target="price")  # doctest: +SKIP
    """
    path = Path(path)
    columns = _read_columns("read_table", path)
    names = tuple(columns)
    of_y = tuple(name for name in names if name.startswith("y")) if path.suffix.lower() == ".npz" else names[-1:]
    feature_names, target_names = _columns.choose("read_table", path, names, target, features, of_y)
    X = _matrix("read_table", path, columns, feature_names, dtype)
    y = _matrix("read_table", path, columns, target_names, dtype)
    return Dataset(str(path), X, y, feature_names, target_names)


def read_features(path: str | Path, feature_names: Sequence[str], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Read the named columns of a file, whatever else it holds.

    Args:
        path: A file as :func:`read_table` takes it.
        feature_names: Names of the columns, in the order wanted.
        dtype: Type of the tensor.

    Returns:
        Features ``(N, len(feature_names))``.

    Raises:
        ImportError: The file needs pyarrow, which is not installed.
        OSError: The file cannot be read.
        ValueError: The file is no such table, or a column is missing, not numeric or has missing values.

    Example:
        >>> X = read_features("new_houses.csv", ["area", "rooms"])  # doctest: +SKIP
    """
    path = Path(path)
    return _matrix("read_features", path, _read_columns("read_features", path), tuple(feature_names), dtype)


def split(dataset: Dataset, test_fraction: float = 0.2, *, seed: int | None = 0) -> tuple[Dataset, Dataset]:
    """Cut a data set into a training part and a test part by a random permutation of its rows.

    Args:
        dataset: The rows.
        test_fraction: Share of the rows in the second part, between 0 and 1; each part gets at least one row.
        seed: Seed of the permutation; None draws it from PyTorch's global random state.

    Returns:
        The training part and the test part.

    Raises:
        ValueError: ``test_fraction`` is not between 0 and 1, or there are fewer than two rows.

    Example:
        >>> [len(part) for part in split(synthetic(100), 0.2)]
        [80, 20]
    """
    train, test = split_rows("split", "test_fraction", len(dataset), test_fraction, seed)
    return dataset.select(train), dataset.select(test)


def split_rows(function: str, name: str, rows: int, value: object, seed: int | None) -> tuple[Tensor, Tensor]:
    """Return the row numbers of the two parts of ``rows`` rows, as :func:`split` chooses them.

    ``value`` is the second part's share, called ``name`` by the caller, ``function``.
    """
    share = _checks.fraction(function, name, value)
    if rows < 2:
        raise ValueError(f"{function}: there must be at least 2 rows to split, but got {rows}")
    test_rows = min(max(round(rows * share), 1), rows - 1)
    order = torch.randperm(rows, generator=_generator(function, seed))
    return order[test_rows:], order[:test_rows]


class Standardize(nn.Module):
    """Shift and scale each feature: ``(input - mean) / scale``.

    Fitted on the training rows it is the first layer of a model that takes features in their own units::

        standardize = Standardize.fit(X_train)
        linear = nn.Linear(X_train.shape[1], 1)
        fit(linear, standardize(X_train), y_train, lr=0.1)
        model = nn.Sequential(standardize, linear)

    Args:
        mean: ``(D,)``, what is subtracted.
        scale: ``(D,)``, what is divided by; none may be 0.

    Example:
        >>> Standardize.fit(torch.tensor([[1.0], [3.0]]))(torch.tensor([[3.0]]))
        tensor([[1.]])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        if mean.dim() != 1 or mean.shape != scale.shape:
            raise ValueError(
                f"Standardize: mean and scale must have one shape (D,), but got {tuple(mean.shape)} and "
                f"{tuple(scale.shape)}"
            )
        if not bool((scale != 0).all()):
            raise ValueError("Standardize: scale must not hold 0")
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    @classmethod
    def fit(cls, X: ArrayLike) -> Standardize:
        """Take the mean and the population standard deviation of each column; a constant column gets scale 1.

        Args:
            X: Training features ``(N, D)``; the module has their dtype and device.

        Returns:
            The fitted module.

        Raises:
            ValueError: ``X`` is not a finite matrix with at least one row.
        """
        given = _checks.tensor("Standardize.fit", "X", X)
        dtype = given.dtype if given.is_floating_point() else torch.get_default_dtype()
        features = _checks.matrix("Standardize.fit", "X", given, dtype=dtype, device=given.device)
        # In float64, because the deviations of a feature far from zero are small beside it.
        variance, mean = torch.var_mean(features.double(), dim=0, correction=0)
        scale = variance.sqrt().to(dtype)
        # By comparison, because the rounding of the mean gives a constant column a variance.
        constant = features.amin(0) == features.amax(0)
        return cls(mean.to(dtype), torch.where(constant | (scale == 0), torch.ones_like(scale), scale))

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(input - mean) / scale``."""
        self._check(input)
        return (input - self.mean) / self.scale

    def inverse(self, input: Tensor) -> Tensor:
        """Return ``input * scale + mean``, which undoes :meth:`forward`."""
        self._check(input)
        return input * self.scale + self.mean

    def _check(self, input: Tensor) -> None:
        features = self.mean.shape[0]
        if input.dim() == 0 or input.shape[-1] != features:
            raise ValueError(f"Standardize: input must have shape (*, {features}), but got {tuple(input.shape)}")

    def extra_repr(self) -> str:
        """Return the number of features, as printed in a model's description."""
        return f"{self.mean.shape[0]}"


def _generator(function: str, seed: object) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(_checks.integer(function, "seed", seed))


def _read_columns(function: str, path: Path) -> dict[str, Any]:
    """Return the columns of a file by name, as NumPy arrays of one dimension or as pyarrow columns."""
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{function}: {path} must end in one of {', '.join(TABLE_SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{function}: there is no file {path}")
    columns = _read_arrow(function, path) if suffix in (".csv", ".parquet") else _read_numpy(function, path)
    if not columns:
        raise ValueError(f"{function}: {path} has no columns")
    if len(next(iter(columns.values()))) == 0:
        raise ValueError(f"{function}: {path} has no rows")
    return columns


def _read_arrow(function: str, path: Path) -> dict[str, Any]:
    pyarrow = _columns.extra("pyarrow", function, "pyarrow")
    try:
        if path.suffix.lower() == ".csv":
            table = _columns.extra("pyarrow.csv", function, "pyarrow").read_csv(path)
        else:
            # One file, not a data set of files: the path is taken literally.
            table = _columns.extra("pyarrow.parquet", function, "pyarrow").ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise _columns.no_table(function, path, error) from error
    _columns.twice(function, path, table.column_names)
    return dict(zip(table.column_names, table.columns, strict=True))


def _read_numpy(function: str, path: Path) -> dict[str, Any]:
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{function}: {path} is not a NumPy {path.suffix} file of numbers") from error
    if path.suffix.lower() == ".npz":
        if set(arrays) != {"X", "y"}:
            raise ValueError(
                f"{function}: {path} must hold the arrays X and y, but holds {', '.join(arrays) or 'none'}"
            )
        # In a file one dimension is a column, since nothing else could be meant.
        arrays = {key: array[:, None] if array.ndim == 1 else array for key, array in arrays.items()}
    for key, array in arrays.items():
        if array.ndim != 2:
            what = f"array {key} of {path}" if key else str(path)
            raise ValueError(f"{function}: {what} must have two dimensions, but has shape {array.shape}")
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{function}: {path} must have as many rows in X as in y, but has {lengths['X']} and {lengths['y']}"
        )
    return {f"{key}{i}": array[:, i] for key, array in arrays.items() for i in range(array.shape[1])}


def _matrix(function: str, path: Path, columns: dict[str, Any], names: tuple[str, ...], dtype: torch.dtype) -> Tensor:
    _columns.check_names(function, path, columns, names)
    arrays = [_numbers(function, path, name, columns[name]) for name in names]
    matrix = torch.as_tensor(np.stack(arrays, axis=1)).to(dtype)
    for name, column in zip(names, matrix.unbind(1), strict=True):
        if not math.isfinite(column.abs().max().item()):
            raise ValueError(
                f"{function}: column {name!r} of {path} has values beyond {str(dtype).removeprefix('torch.')}"
            )
    return matrix


def _numbers(function: str, path: Path, name: str, column: Any) -> npt.NDArray[np.float64]:
    if isinstance(column, np.ndarray):
        kind, numeric, array = str(column.dtype), column.dtype.kind in "biuf", column
    else:
        pyarrow = _columns.extra("pyarrow", function, "pyarrow")
        kind = str(column.type)
        numeric = _columns.is_numeric(column.type) or column.null_count == len(column)
        array = column.cast(pyarrow.float64(), safe=False).to_numpy() if numeric else np.empty(0)
    if not numeric:
        raise _columns.no_numbers(function, path, name, kind)
    values = np.asarray(array, dtype=np.float64)
    error = _columns.not_finite(function, path, name, values)
    if error is not None:
        raise error
    return values
