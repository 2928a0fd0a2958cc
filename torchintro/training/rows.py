"""What came in, as rows to train on or to judge by: :func:`as_rows`, the only place that looks at what kind it is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import _checks
from ..data.datasets import split_rows
from ..data.table import Table
from ..statistics import LinearStatistics
from .row_kinds import VALIDATION, MemoryRows, Rows, StatisticsRows, TableRows

__all__ = ["as_rows"]


def as_rows(
    function: str,
    X: object,
    y: object = None,
    validation: object = None,
    *,
    like: nn.Linear | None = None,
    any_shape: bool = False,
    seed: int | None = None,
    checkpoint: Any = None,
    progress: bool = False,
) -> Rows:
    """Decide what kind of data came in, and check it.

    Args:
        function: Whose arguments these are, for its sentences.
        X: A matrix, a table or :class:`torchintro.LinearStatistics`.
        y: The targets of a matrix; None with a table or statistics.
        validation: A pair of matrices or the share of the rows to hold out; with a table also another table; with a
            table or statistics those of the rows held out.
        like: The layer whose sizes the rows must have, and to whose dtype and device they are brought; None takes all
            that from ``X``.
        any_shape: Whether the rows are not to be trained on but to be judged, or without ``y`` predicted: tensors then
            may have any shape and keep their dtypes.
        seed: Decides which rows are held out.
        checkpoint: Of the pass over a table, as for :func:`torchintro.fit`.
        progress: Whether a pass over a table is shown.

    Returns:
        The rows. Matrices to train on are not looked through for what is not finite: :meth:`Rows.check_finite`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument has a wrong shape or value.
    """
    expected = None
    if like is not None:
        expected = _Layout(like.in_features, like.out_features, like.weight.dtype, like.weight.device)
    if isinstance(X, Table):
        _check_beside(function, y, "a table, which has its own")
        layout = expected or _Layout(X.in_features, X.out_features, X.dtype, torch.device("cpu"))
        layout.check(f"{function}: X must be a table", X, "the model")
        return TableRows(
            X,
            _validation_of_table(function, validation, layout, checkpoint, progress),
            function=function,
            dtype=layout.dtype,
            device=layout.device,
            seed=seed,
            progress=progress,
            checkpoint=checkpoint,
        )
    if checkpoint is not None:
        raise TypeError(f"{function}: checkpoint only goes with a table that is streamed, but got {checkpoint!r}")
    if isinstance(X, LinearStatistics):
        _check_beside(function, y, "LinearStatistics, which have their own")
        default = torch.get_default_dtype()
        layout = expected or _Layout(X.in_features, X.out_features, default, torch.device("cpu"))
        layout.check(f"{function}: X must be statistics", X, "the model")
        if validation is not None and not isinstance(validation, LinearStatistics):
            got = type(validation).__name__
            raise TypeError(f"{function}: validation must be LinearStatistics or None, as X is, but got {got}")
        if validation is not None:
            layout.check(f"{function}: validation must be", validation, "X")
        return StatisticsRows(X, validation, function=function, dtype=layout.dtype, device=layout.device)
    if isinstance(X, (str, os.PathLike)):
        raise TypeError(f"{function}: X must be a tensor, an array or a table, but got a path: open it by open_table")
    if any_shape:
        return _samples(function, X, y)
    if y is None:
        raise TypeError(
            f"{function}: y must be a tensor or a NumPy array, but got None, which only goes with a table or statistics"
        )
    return _matrices(function, X, y, validation, expected, seed)


class _Sized(Protocol):
    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...


@dataclass(frozen=True)
class _Layout:
    """The sizes, the dtype and the device that rows must have or are brought to."""

    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device

    def check(self, invariant: str, given: _Sized, whose: str) -> None:
        """Raise a ValueError for a table or statistics of other sizes."""
        features, targets = given.in_features, given.out_features
        if (features, targets) != (self.in_features, self.out_features):
            raise ValueError(
                f"{invariant} of {self.in_features} features and {self.out_features} targets, as {whose} has, but has "
                f"{features} and {targets}"
            )

    def matrices(
        self, function: str, X: object, y: object, names: tuple[str, str], *, finite: bool
    ) -> tuple[Tensor, Tensor]:
        """Return features and targets, checked and brought where they must be."""
        return _checks.regression_data(
            function,
            X,
            y,
            in_features=self.in_features,
            out_features=self.out_features,
            dtype=self.dtype,
            device=self.device,
            names=names,
            finite=finite,
        )


def _check_beside(function: str, y: object, what: str) -> None:
    if y is not None:
        raise TypeError(f"{function}: y must be None with {what} targets, but got {type(y).__name__}")


def _validation_of_table(
    function: str, given: object, layout: _Layout, checkpoint: Any, progress: bool
) -> float | Rows | None:
    """Return what was given to validate a table's training with: as rows, or as the share that is held out."""
    if given is None:
        return None
    if isinstance(given, (int, float)):
        return _checks.fraction(function, "validation", given)
    dtype, device = layout.dtype, layout.device
    if isinstance(given, Table):
        layout.check(f"{function}: validation must be a table", given, "X")
        return TableRows(
            given,
            function=function,
            name="validation",
            dtype=dtype,
            device=device,
            progress=progress,
            checkpoint=None if checkpoint is None else f"{checkpoint}.validation",
        )
    if isinstance(given, LinearStatistics):
        layout.check(f"{function}: validation must be statistics", given, "X")
        return StatisticsRows(given, function=function, name="validation", dtype=dtype, device=device)
    pair = layout.matrices(function, *_pair(function, given), VALIDATION, finite=True)
    return MemoryRows(*pair, function=function, names=VALIDATION)


def _pair(function: str, validation: object) -> tuple[object, object]:
    if not isinstance(validation, (tuple, list)) or len(validation) != 2:
        got = f"{len(validation)} elements" if isinstance(validation, (tuple, list)) else type(validation).__name__
        raise TypeError(f"{function}: validation must be a pair (X_val, y_val), but got {got}")
    return validation[0], validation[1]


def _matrices(
    function: str, X: object, y: object, validation: object, expected: _Layout | None, seed: int | None
) -> MemoryRows:
    """Return matrices to train on."""
    # Rows that are split are copied, and to name one that is not finite it is looked for before; else by the engine.
    finite = isinstance(validation, (int, float))
    layout = expected
    if layout is None:
        layout, X, y = _by_themselves(function, X, y, finite)
    features, targets = layout.matrices(function, X, y, ("X", "y"), finite=finite and expected is not None)
    held_out = None
    if isinstance(validation, (int, float)):
        parts = split_rows(function, "validation", features.shape[0], validation, seed)
        train, rest = (rows.to(features.device) for rows in parts)
        held_out = features[rest], targets[rest]
        features, targets = features[train], targets[train]
    elif validation is not None:
        held_out = layout.matrices(function, *_pair(function, validation), VALIDATION, finite=False)
    return MemoryRows(features, targets, held_out, function=function)


def _by_themselves(function: str, X: object, y: object, finite: bool) -> tuple[_Layout, Tensor, Tensor]:
    """Check two matrices, of which X says what the layout is; return it and them."""
    given = _checks.tensor(function, "X", X)
    dtype = given.dtype if given.is_floating_point() else torch.get_default_dtype()
    features, targets = (
        _checks.matrix(function, name, value, dtype=dtype, device=given.device, finite=finite)
        for name, value in (("X", given), ("y", y))
    )
    if targets.shape[0] != features.shape[0]:
        rows = features.shape[0]
        raise ValueError(f"{function}: y must have {rows} rows, as X has, but got shape {tuple(targets.shape)}")
    return _Layout(features.shape[1], targets.shape[1], dtype, given.device), features, targets


def _samples(function: str, X: object, y: object) -> MemoryRows:
    """Return tensors of any shape that are to be judged, or without targets predicted."""
    features = _checks.tensor(function, "X", X)
    targets = features.new_empty(*features.shape[:1], 0) if y is None else _checks.tensor(function, "y", y)
    for name, part in (("X", features), ("y", targets)):
        if part.dim() == 0 or part.shape[0] == 0:
            raise ValueError(f"{function}: {name} must have at least one row, but got shape {tuple(part.shape)}")
    rows = features.shape[0]
    if targets.shape[0] != rows:
        raise ValueError(f"{function}: y must have {rows} rows, as X has, but got shape {tuple(targets.shape)}")
    return MemoryRows(features, targets, function=function)
