"""Data for regression in memory: two built-in sets, and the split in two parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from .columns import extra, spoken_by
from .split import Part, belongs, cut

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
        part: Which part of a larger data set they are, if :func:`split` or :meth:`torchintro.Table.split` made it.
        numbers: Each row's number in that data set ``(N,)``; None for ``0`` to ``N - 1``.
    """

    name: str
    X: Tensor
    y: Tensor
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    part: Part | None = None
    numbers: Tensor | None = None

    def __len__(self) -> int:
        return self.X.shape[0]

    def select(self, rows: Tensor) -> Dataset:
        """Return the data set of the given rows, a tensor of indices."""
        numbers = rows.cpu() if self.numbers is None else self.numbers[rows.cpu()]
        return replace(self, X=self.X[rows], y=self.y[rows], numbers=numbers)

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
    generator = None if seed is None else torch.Generator().manual_seed(_checks.integer("synthetic", "seed", seed))
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
    with spoken_by("diabetes"):
        bunch = extra("sklearn.datasets", "scikit-learn", "cli").load_diabetes(scaled=False)
    return Dataset(
        "diabetes",
        torch.as_tensor(bunch.data, dtype=dtype),
        torch.as_tensor(bunch.target, dtype=dtype).unsqueeze(-1),
        tuple(bunch.feature_names),
        ("progression",),
    )


def split(dataset: Dataset, test_fraction: float = 0.2, *, seed: int | None = 0) -> tuple[Dataset, Dataset]:
    """Cut a data set into a training part and a test part.

    A row belongs to the second if a hash of its number and of ``seed`` says so: the rows that
    :meth:`torchintro.Table.split` holds out of the same table when it is streamed. Their number is ``test_fraction`` of
    all but for chance. A part can be split again, by the same seed: what is held out then are other rows.

    Args:
        dataset: The rows.
        test_fraction: Share of the rows in the second part, between 0 and 1.
        seed: Another one holds out other rows; None draws it from PyTorch's global random state, or for a part of a
            data set takes the one that made the part.

    Returns:
        The training part and the test part, each in the order of the rows.

    Raises:
        ValueError: ``test_fraction`` is not between 0 and 1, ``seed`` is not that by which this part was split off,
            there are fewer than two rows, or one part would be empty.

    Example:
        >>> train, test = split(synthetic(100), 0.2)
        >>> len(train) + len(test)
        100
    """
    seed = dataset.part.seed if seed is None and dataset.part is not None else seed
    function, name = "split", "test_fraction"
    rows, parts = _split(function, name, len(dataset), test_fraction, seed, dataset.part, dataset.numbers)
    train, test = (replace(dataset.select(chosen), part=part) for chosen, part in zip(rows, parts, strict=True))
    return train, test


def split_rows(function: str, name: str, rows: int, value: object, seed: int | None) -> tuple[Tensor, Tensor]:
    """Return the row numbers of the two parts of ``rows`` rows, as :func:`split` chooses them.

    ``value`` is the second part's share, called ``name`` by the caller, ``function``.
    """
    return _split(function, name, rows, value, seed, None, None)[0]


def _split(
    function: str, name: str, rows: int, value: object, seed: int | None, part: Part | None, numbers: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[Part, Part]]:
    """Return the indices of the rows of both parts, and the parts."""
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()).item())
    parts = cut(function, name, part, value, seed)
    if rows < 2:
        raise ValueError(f"{function}: there must be at least 2 rows to split, but got {rows}")
    held_out = belongs(parts[1], np.arange(rows) if numbers is None else numbers.numpy())
    if held_out.all() or not held_out.any():
        raise ValueError(f"{function}: of the {rows} rows {name} {value} and seed {seed} leave none in one part")
    train, test = (torch.from_numpy(np.flatnonzero(mask)) for mask in (~held_out, held_out))
    return (train, test), parts
