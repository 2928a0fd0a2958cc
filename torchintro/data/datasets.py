"""Data for regression in memory: two built-in sets, and the split in two parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import _checks
from . import columns as _columns

__all__ = ["Dataset", "diabetes", "split", "split_rows", "synthetic"]


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


def _generator(function: str, seed: object) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(_checks.integer(function, "seed", seed))
