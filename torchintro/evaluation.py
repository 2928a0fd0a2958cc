"""The quality of a regression model on given rows: :func:`evaluate`."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from . import _checks
from ._typing import ArrayLike
from .data.table import Table
from .statistics import LinearStatistics
from .training.fit import is_table

__all__ = ["evaluate", "predict"]

# Rows whose features, predictions and errors exist at one time; a chunk of 64 float32 features is 4 MiB.
_CHUNK_ROWS = 16384


def evaluate(
    model: nn.Module, X: ArrayLike | Table, y: ArrayLike | None = None, *, progress: bool = False
) -> dict[str, float]:
    """Measure how well a model predicts ``y`` from ``X``.

    Equivalent to scikit-learn's ``mean_squared_error``, its root, ``mean_absolute_error`` and ``r2_score`` of
    ``model(X)``. The model runs in evaluation mode without gradients and is left in the mode it was in; sums are
    accumulated in float64, some thousand rows at a time.

    Args:
        model: Any module that turns ``(N, ...)`` features into predictions of the shape of ``y``.
        X: Features, ``N`` rows; converted to the dtype and device of the model's parameters. Or a table
            (:func:`torchintro.open_table`) of any size, which is streamed once.
        y: Targets ``(N, out_features)`` or whatever shape the model predicts; None with a table, which has its own.
        progress: Show how far the pass over a table is.

    Returns:
        ``mse``; ``rmse``, the root of mse, in the units of ``y``; ``mae``; and ``r2``, the share of the variance
        explained, averaged over the targets (NaN for a single row; a constant target counts 1 if it is predicted
        exactly, otherwise 0, as in scikit-learn).

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument has a wrong value or the prediction's shape is not that of ``y``.

    Example:
        >>> evaluate(nn.Identity(), torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]]))["mse"]
        2.0
    """
    if is_table(X):
        if y is not None:
            raise TypeError(
                f"evaluate: y must be None with a table, which has its own targets, but got {type(y).__name__}"
            )
        return _evaluate_table(model, X, _checks.boolean("evaluate", "progress", progress))
    if y is None:
        raise TypeError("evaluate: y must be a tensor or a NumPy array, but got None, which only goes with a table")
    features, targets = _checks.tensor("evaluate", "X", X), _checks.tensor("evaluate", "y", y)
    for name, value in (("X", features), ("y", targets)):
        if value.dim() == 0 or value.shape[0] == 0:
            raise ValueError(f"evaluate: {name} must have at least one row, but got shape {tuple(value.shape)}")
        _checks.check_finite("evaluate", name, value)
    rows = features.shape[0]
    if targets.shape[0] != rows:
        raise ValueError(f"evaluate: y must have {rows} rows, as X has, but got shape {tuple(targets.shape)}")

    columns = targets.reshape(rows, -1)
    mean = sum((chunk.double().sum(0) for chunk in torch.split(columns, _CHUNK_ROWS)), start=torch.zeros(())) / rows
    squared, absolute, spread = (torch.zeros(columns.shape[1], dtype=torch.float64) for _ in range(3))
    start = 0
    with _predictor("evaluate", model, features) as predict_chunk:
        for chunk in torch.split(features, _CHUNK_ROWS):
            prediction = predict_chunk(chunk)
            stop = start + chunk.shape[0]
            if prediction.shape != targets[start:stop].shape:
                expected = (rows, *prediction.shape[1:])
                hint = ": use y.unsqueeze(-1)" if expected == (*targets.shape, 1) else ""
                raise ValueError(
                    f"evaluate: y must have shape {expected}, the prediction's, but got {tuple(targets.shape)}{hint}"
                )
            target = columns[start:stop].to(device=prediction.device, dtype=torch.float64)
            error = prediction.double().reshape(target.shape) - target
            squared += error.square().sum(0).cpu()
            absolute += error.abs().sum(0).cpu()
            spread += (target - mean.to(target.device)).square().sum(0).cpu()
            start = stop

    # By comparison, because the rounding of the mean gives a constant column a spread.
    varies = (columns.amin(0) != columns.amax(0)).cpu()
    return _summary(rows, squared, absolute, spread, varies)


def _summary(rows: int, squared: Tensor, absolute: Tensor, spread: Tensor, varies: Tensor) -> dict[str, float]:
    """Return the metrics from sums over the rows, one for each target."""
    # A comparison with NaN is false, and an error of NaN must stay one.
    by_spread = (varies & (squared > 0)) | squared.isnan()
    r2_by_target = torch.where(by_spread, 1 - squared / spread, (squared == 0).double())
    mse = squared.mean().item() / rows
    r2 = r2_by_target.mean().item() if rows > 1 else math.nan
    return {"mse": mse, "rmse": math.sqrt(mse), "mae": absolute.mean().item() / rows, "r2": r2}


def _evaluate_table(model: nn.Module, table: Table, progress: bool) -> dict[str, float]:
    squared, absolute, spread, mean = torch.zeros(4, table.out_features, dtype=torch.float64)
    low, high = torch.full((2, table.out_features), math.nan, dtype=torch.float64)
    rows = 0
    pieces = table.pieces(progress=progress)
    with contextlib.closing(pieces), _predictor("evaluate", model, torch.empty(0, dtype=table.dtype)) as predict_chunk:  # type: ignore[type-var]
        for X, y in pieces:
            for chunk, some in zip(torch.split(X, _CHUNK_ROWS), torch.split(y, _CHUNK_ROWS), strict=True):
                prediction = predict_chunk(chunk)
                if prediction.shape != some.shape:
                    raise ValueError(
                        f"evaluate: X must be a table of as many targets as the model predicts, but of "
                        f"{len(chunk)} rows the targets have shape {tuple(some.shape)} and the prediction "
                        f"{tuple(prediction.shape)}"
                    )
                target = some.double()
                error = prediction.cpu().double() - target
                squared += error.square().sum(0)
                absolute += error.abs().sum(0)
                # Merged as in LinearStatistics: the mean of all is not known before the end.
                own, total = target.mean(0), rows + len(target)
                offset = own - mean
                spread += (target - own).square().sum(0) + offset.square() * (rows * len(target) / total)
                mean += offset * (len(target) / total)
                low, high = low.fmin(target.amin(0)), high.fmax(target.amax(0))
                rows = total
    if rows == 0:
        raise ValueError("evaluate: X must have at least one row, but the table has none")
    return _summary(rows, squared, absolute, spread, low != high)


def predict(model: nn.Module, X: ArrayLike) -> Tensor:
    """Apply a model to rows in evaluation mode, without gradients, some thousand rows at a time.

    Equivalent to ``model(X)`` under ``model.eval()`` and ``torch.no_grad()``.

    Args:
        model: Any module that takes ``(N, ...)`` features.
        X: Features, ``N`` rows; converted to the dtype and device of the model's parameters.

    Returns:
        The predictions, on the CPU.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: ``X`` has no rows.

    Example:
        >>> predict(nn.Identity(), torch.ones(1, 2))
        tensor([[1., 1.]])
    """
    features = _checks.tensor("predict", "X", X)
    if features.dim() == 0 or features.shape[0] == 0:
        raise ValueError(f"predict: X must have at least one row, but got shape {tuple(features.shape)}")
    with _predictor("predict", model, features) as predict_chunk:
        return torch.cat([predict_chunk(chunk).cpu() for chunk in torch.split(features, _CHUNK_ROWS)])


@contextlib.contextmanager
def _predictor(function: str, model: object, X: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give a function that applies the model, in evaluation mode without gradients, to rows like those of ``X``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, but got {type(model).__name__}")
    held = next((t for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point()), None)
    dtype = held.dtype if held is not None else X.dtype if X.is_floating_point() else torch.get_default_dtype()
    device = X.device if held is None else held.device

    def predict_chunk(chunk: Tensor) -> Tensor:
        prediction = model(chunk.to(device=device, dtype=dtype))
        if not isinstance(prediction, Tensor):
            raise TypeError(f"{function}: model must return a tensor, but returned {type(prediction).__name__}")
        return prediction

    # Each submodule's own mode, because a frozen part of a model may be in evaluation mode while the rest trains.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield predict_chunk
    finally:
        for module, mode in modes:
            module.training = mode


def of_statistics(statistics: LinearStatistics, linear: nn.Linear) -> dict[str, float]:
    """Return what :func:`evaluate` would of the rows, but for the mean absolute error, which second moments lack."""
    weight = linear.weight.detach().double()
    bias = linear.bias.detach().double()
    correlated = statistics.sxy.T
    squares = (weight * (weight @ statistics.sxx - 2 * correlated)).sum(1) + statistics.syy
    offset = bias + weight @ statistics.mean_x - statistics.mean_y
    squared = squares.clamp_min(0) + statistics.count * offset * offset
    explained = [
        1 - error / spread if spread > 0 else float(error == 0)
        for error, spread in zip(squared.tolist(), statistics.syy.tolist(), strict=True)
    ]
    mse = squared.mean().item() / statistics.count.item()
    r2 = math.fsum(explained) / len(explained) if statistics.count.item() > 1 else math.nan
    return {"mse": mse, "rmse": math.sqrt(mse), "r2": r2}
