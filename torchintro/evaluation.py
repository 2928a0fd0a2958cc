"""The quality of a regression model on given rows, :func:`evaluate`, and its predictions, :func:`predict`."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from . import _checks
from ._typing import ArrayLike, RowProgress
from .data.table import Table
from .nn import Standardize
from .statistics import LinearStatistics
from .training.row_kinds import Rows
from .training.rows import as_rows

__all__ = ["evaluate", "predict"]

# Rows whose features, predictions and errors exist at one time; a chunk of 64 float32 features is 4 MiB.
_CHUNK_ROWS = 16384


def evaluate(
    model: nn.Module,
    X: ArrayLike | Table | LinearStatistics,
    y: ArrayLike | None = None,
    *,
    progress: RowProgress = False,
) -> dict[str, float]:
    """Measure how well a model predicts ``y`` from ``X``.

    Equivalent to scikit-learn's ``mean_squared_error``, its root, ``mean_absolute_error`` and ``r2_score`` of
    ``model(X)``. The model runs in evaluation mode without gradients and is left in the mode it was in; sums are
    accumulated in float64, some thousand rows at a time.

    Args:
        model: Any module that turns ``(N, ...)`` features into predictions of the shape of ``y``. With statistics an
            ``nn.Linear``, or ``nn.Sequential(Standardize, nn.Linear)``.
        X: Features, ``N`` rows; converted to the dtype and device of the model's parameters. Or a table
            (:func:`torchintro.open_table`) of any size, which is streamed once. Or
            :class:`torchintro.LinearStatistics`, in place of the rows that were added to them.
        y: Targets ``(N, out_features)`` or whatever shape the model predicts; None with a table or statistics, which
            have their own.
        progress: How far the pass over a table is, as for :meth:`torchintro.Table.pieces`.

    Returns:
        ``mse``; ``rmse``, the root of mse, in the units of ``y``; ``mae``, but not of statistics, because second
        moments do not have it; and ``r2``, the share of the variance explained, averaged over the targets (NaN for a
        single row; a constant target counts 1 if it is predicted exactly, otherwise 0, as in scikit-learn). The rows of
        statistics count by their weights.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument has a wrong value or the prediction's shape is not that of ``y``.

    Example:
        >>> evaluate(nn.Identity(), torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]]))["mse"]
        2.0
    """
    _check_progress("evaluate", progress)
    rows = as_rows("evaluate", X, y, any_shape=True)
    if not rows.has_rows:
        return _of_moments(rows, model)
    if y is None and rows.in_memory is not None:
        raise TypeError(
            "evaluate: y must be a tensor or a NumPy array, but got None, which only goes with a table or statistics"
        )
    rows.check_finite()
    sums = _Sums(rows.out_features)
    slices = rows.slices(_CHUNK_ROWS, progress)
    with contextlib.closing(slices), _predictor(model, rows) as predict_slice:
        for features, targets in slices:
            prediction = predict_slice(features)
            if prediction.shape != targets.shape:
                raise _wrong_shape(rows, targets, prediction)
            target = targets.to(prediction.device, torch.float64).reshape(len(targets), -1)
            sums.add(prediction.double().reshape(target.shape), target)
    if sums.rows == 0:
        raise ValueError("evaluate: X must have at least one row, but the table has none")
    return _metrics(sums.rows, sums.squared, sums.spread, sums.low != sums.high, sums.absolute)


def predict(model: nn.Module, X: ArrayLike | Table, *, progress: RowProgress = False) -> Tensor:
    """Apply a model to rows in evaluation mode, without gradients, some thousand rows at a time.

    Equivalent to ``model(X)`` under ``model.eval()`` and ``torch.no_grad()``.

    Args:
        model: Any module that takes ``(N, ...)`` features.
        X: Features, ``N`` rows; converted to the dtype and device of the model's parameters. Or a table
            (:func:`torchintro.open_table`), with or without targets, which is streamed once.
        progress: How far the pass over a table is, as for :meth:`torchintro.Table.pieces`.

    Returns:
        The predictions of all rows, on the CPU.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: ``X`` has no rows.

    Example:
        >>> predict(nn.Identity(), torch.ones(1, 2))
        tensor([[1., 1.]])
    """
    _check_progress("predict", progress)
    rows = as_rows("predict", X, any_shape=True)
    if not rows.has_rows:
        raise TypeError(
            "predict: X must be a tensor, an array or a table, but got LinearStatistics, which have no rows"
        )
    slices = rows.slices(_CHUNK_ROWS, progress)
    with contextlib.closing(slices), _predictor(model, rows) as predict_slice:
        predictions = [predict_slice(features).cpu() for features, _ in slices]
    if not predictions:
        raise ValueError("predict: X must have at least one row, but the table has none")
    return torch.cat(predictions)


def _check_progress(function: str, progress: object) -> None:
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"{function}: progress must be True, False or a callable, but got {progress!r}")


def _wrong_shape(rows: Rows, targets: Tensor, prediction: Tensor) -> ValueError:
    """Return the error of a slice whose prediction has another shape than its targets."""
    if rows.in_memory is None:
        return ValueError(
            f"evaluate: X must be a table of as many targets as the model predicts, but of {len(targets)} rows the "
            f"targets have shape {tuple(targets.shape)} and the prediction {tuple(prediction.shape)}"
        )
    expected, given = (rows.in_memory.count, *prediction.shape[1:]), tuple(rows.in_memory.y.shape)
    hint = ": use y.unsqueeze(-1)" if expected == (*given, 1) else ""
    return ValueError(f"evaluate: y must have shape {expected}, the prediction's, but got {given}{hint}")


class _Sums:
    """What the metrics are made of: sums over the rows, one for each target, in float64 on the CPU."""

    def __init__(self, targets: int) -> None:
        self.rows = 0
        self.squared, self.absolute, self.spread, self._mean = torch.zeros(4, targets, dtype=torch.float64)
        self.low, self.high = torch.full((2, targets), math.nan, dtype=torch.float64)

    def add(self, prediction: Tensor, target: Tensor) -> None:
        """Add rows: two matrices in float64."""
        error, own, rows = prediction - target, target.mean(0), len(target)
        self.squared += error.square().sum(0).cpu()
        self.absolute += error.abs().sum(0).cpu()
        # Merged as in LinearStatistics: the mean of all is not known before the end.
        offset, total = own.cpu() - self._mean, self.rows + rows
        self.spread += (target - own).square().sum(0).cpu() + offset.square() * (self.rows * rows / total)
        self._mean += offset * (rows / total)
        # By comparison, because the rounding of the mean gives a constant target a spread.
        self.low, self.high = self.low.fmin(target.amin(0).cpu()), self.high.fmax(target.amax(0).cpu())
        self.rows = total


def _metrics(
    rows: float, squared: Tensor, spread: Tensor, varies: Tensor, absolute: Tensor | None = None
) -> dict[str, float]:
    """Return the metrics from sums over the rows, one for each target."""
    # A comparison with NaN is false, and an error of NaN must stay one.
    by_spread = (varies & (squared > 0)) | squared.isnan()
    r2_by_target = torch.where(by_spread, 1 - squared / spread, (squared == 0).double())
    mse = squared.mean().item() / rows
    mae = {} if absolute is None else {"mae": absolute.mean().item() / rows}
    return {"mse": mse, "rmse": math.sqrt(mse), **mae, "r2": r2_by_target.mean().item() if rows > 1 else math.nan}


def _of_moments(rows: Rows, model: object) -> dict[str, float]:
    """Return the metrics of a linear model from second moments."""
    standardize, linear = _linear_parts(model)
    sizes, given = (linear.in_features, linear.out_features), (rows.in_features, rows.out_features)
    if sizes != given:
        raise ValueError(
            f"evaluate: X must be statistics of {sizes[0]} features and {sizes[1]} targets, as the model has, but has "
            f"{given[0]} and {given[1]}"
        )
    (count, mean_x, mean_y, sxx, sxy, syy), _ = rows.moments()
    weight = linear.weight.detach().cpu().double()
    if standardize is not None:
        weight = weight / standardize.scale.detach().cpu().double()
        mean_x = mean_x - standardize.mean.detach().cpu().double()
    offset = weight @ mean_x - mean_y
    if linear.bias is not None:
        offset = offset + linear.bias.detach().cpu().double()
    squares = (weight * (weight @ sxx - 2 * sxy.T)).sum(1) + syy
    squared = squares.clamp_min(0) + count * offset * offset  # rounding may leave less than nothing
    return _metrics(count.item(), squared, syy, syy > 0)


def _linear_parts(model: object) -> tuple[Standardize | None, nn.Linear]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"evaluate: model must be an nn.Module, but got {type(model).__name__}")
    standardize, linear = model if type(model) is nn.Sequential and len(model) == 2 else (None, model)
    if not isinstance(standardize, Standardize | None) or not isinstance(linear, nn.Linear):
        raise TypeError(
            "evaluate: model must be an nn.Linear, or nn.Sequential(Standardize, nn.Linear), with LinearStatistics, "
            f"but got {type(model).__name__}"
        )
    return standardize, _checks.plain_linear("evaluate", "model", linear)


@contextlib.contextmanager
def _predictor(model: object, rows: Rows) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give a function that applies the model, in evaluation mode without gradients, to slices of the rows."""
    function = rows.function
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, but got {type(model).__name__}")
    held = next((t for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point()), None)
    like = torch.empty(0, dtype=rows.dtype, device=rows.device) if held is None else held
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()

    def predict_slice(features: Tensor) -> Tensor:
        prediction = model(features.to(device=like.device, dtype=dtype))
        if not isinstance(prediction, Tensor):
            raise TypeError(f"{function}: model must return a tensor, but returned {type(prediction).__name__}")
        return prediction

    # Each submodule's own mode, because a frozen part of a model may be in evaluation mode while the rest trains.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield predict_slice
    finally:
        for module, mode in modes:
            module.training = mode
