"""Least squares from second moments gathered in one pass: :class:`LinearStatistics`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import _checks, saving
from .nn import Standardize

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LinearStatistics"]

_ArrayLike: TypeAlias = "Tensor | npt.NDArray[Any]"
_Moments: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]"

_KIND = "statistics"
_VERSION = 1
_NAMES = ("count", "mean_x", "mean_y", "sxx", "sxy", "syy")

# A column that deviates from its mean by no more than this part of it is a constant one, but for the rounding of sums.
_CONSTANT = 16 * torch.finfo(torch.float64).eps

# What the operator reads itself; everything else real becomes float64 first.
_READ = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LinearStatistics:
    """Count, means and centred second moments of the rows of a regression problem, in float64.

    They are all that the mean squared error of a linear model depends on: once they are gathered, its loss, its
    gradients and its least-squares solution cost a few products of ``D x D`` numbers, however many rows there were.
    Rows are read once, in any number of parts, on any number of machines::

        statistics = LinearStatistics(D, O)
        for X, y in parts:
            statistics.update(X, y)
        weight, bias = statistics.solve()

    Attributes:
        in_features: ``D``.
        out_features: ``O``.
        count: ``()``, the number of rows, or the sum of their weights ``v``.
        mean_x: ``(D,)``, the weighted mean of the features, in their units.
        mean_y: ``(O,)``, that of the targets.
        sxx: ``(D, D)``, the sum of ``v (x - mean_x) (x - mean_x)'``.
        sxy: ``(D, O)``, the sum of ``v (x - mean_x) (y - mean_y)'``.
        syy: ``(O,)``, the sum of ``v (y - mean_y)**2``.

    Parts are merged as in Chan, Golub and LeVeque, "Algorithms for computing the sample variance: analysis and
    recommendations", The American Statistician 37 (1983), 242-247. docs/statistics.md derives the formulas and says
    which digits are kept.

    Args:
        in_features: Number of features.
        out_features: Number of targets.
        device: Where the statistics are kept; rows may come from any device.

    Raises:
        TypeError: A number of features or targets is not an integer.
        ValueError: It is less than 1.

    Example:
        >>> X = torch.linspace(-1, 1, 50).unsqueeze(-1)
        >>> statistics = LinearStatistics(1, 1).update(X, 3 * X + 2)
        >>> weight, bias = statistics.solve()
        >>> round(weight.item(), 6), round(bias.item(), 6)
        (3.0, 2.0)
    """

    count: Tensor
    mean_x: Tensor
    mean_y: Tensor
    sxx: Tensor
    sxy: Tensor
    syy: Tensor

    def __init__(self, in_features: int, out_features: int, *, device: torch.device | str | None = None) -> None:
        self.in_features = _checks.positive_integer("LinearStatistics", "in_features", in_features)
        self.out_features = _checks.positive_integer("LinearStatistics", "out_features", out_features)
        shapes = _shapes(self.in_features, self.out_features)
        self._set(tuple(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))  # type: ignore[arg-type]

    @property
    def tensors(self) -> _Moments:
        """The six tensors ``count, mean_x, mean_y, sxx, sxy, syy``."""
        return self.count, self.mean_x, self.mean_y, self.sxx, self.sxy, self.syy

    @property
    def device(self) -> torch.device:
        """Where the statistics are."""
        return self.count.device

    def update(self, X: Any, y: _ArrayLike | None = None, weight: _ArrayLike | None = None) -> Self:
        """Add rows.

        Equivalent to gathering the statistics of all rows so far together, to rounding.

        Args:
            X: Features ``(N, in_features)``, tensor or NumPy array on any device, of any strides; ``N`` may be 0. Or a
                table whose ``pieces()`` yields pairs ``(X, y)``, all of which are added or, if one is wrong, none; long
                passes are better left to :meth:`torchintro.Table.statistics`, which goes on after an interruption.
            y: Targets ``(N, out_features)``; a target of shape ``(N,)`` is an error. None with a table.
            weight: One number of at least 0 for each row, ``(N,)``: a row of weight 2 counts as two rows. None with a
                table; by default every row counts once.

        Returns:
            The object itself.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: An argument has a wrong shape, a value that is not finite or, squared and summed, is beyond
                float64, or a negative weight. Nothing was changed.
        """
        function = "LinearStatistics.update"
        if not isinstance(X, (Tensor, np.ndarray)) and callable(getattr(X, "pieces", None)):
            for name, value in (("y", y), ("weight", weight)):
                if value is not None:
                    raise TypeError(f"{function}: {name} must be None with a table, but got {type(value).__name__}")
            gathered = LinearStatistics(self.in_features, self.out_features, device=self.device)
            for X_piece, y_piece in X.pieces():
                gathered.update(X_piece, y_piece)
            self._set(self._merged(function, gathered.tensors))
            return self
        if y is None:
            raise TypeError(f"{function}: y must be a tensor or a NumPy array, but got None")
        given_X, given_y, given_weight = self._rows(function, X, y, weight)
        moments = torch.ops.torchintro._linear_moments(_readable(given_X), _readable(given_y), given_weight)
        # Elements are looked at only where something is wrong: what is not finite makes its column's square so.
        if not _finite(moments):
            _checks.check_finite(function, "X", given_X)
            _checks.check_finite(function, "y", given_y)
            if given_weight is not None:
                _checks.check_finite(function, "weight", given_weight)
            raise _overflow(function)
        self._set(self._merged(function, tuple(moment.to(self.device) for moment in moments)))
        return self

    def merge(self, other: LinearStatistics) -> Self:
        """Add all rows of ``other``, which stays as it is.

        Args:
            other: Statistics of the same numbers of features and targets, on any device.

        Returns:
            The object itself.

        Raises:
            TypeError: ``other`` is something else.
            ValueError: Its numbers of features or targets are others, or the sums are beyond float64. Nothing was
                changed.
        """
        function = "LinearStatistics.merge"
        if not isinstance(other, LinearStatistics):
            raise TypeError(f"{function}: other must be LinearStatistics, but got {type(other).__name__}")
        if (other.in_features, other.out_features) != (self.in_features, self.out_features):
            raise ValueError(
                f"{function}: other must have {self.in_features} features and {self.out_features} targets, "
                f"but got {other.in_features} and {other.out_features}"
            )
        self._set(self._merged(function, tuple(moment.to(self.device) for moment in other.tensors)))  # type: ignore[arg-type]
        return self

    def reduce(self, group: Any = None) -> Self:
        """Make these the statistics of the rows of all processes of a group, on each of them.

        Every process gets the statistics of all and merges them in the order of the ranks: all end with the same bits.

        Args:
            group: A ``torch.distributed`` process group, by default the one of all processes. With the backend nccl the
                statistics must be on the GPU (see :meth:`to`).

        Returns:
            The object itself.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialised.
            ValueError: The processes' numbers of features or targets differ (on all of them), the statistics are on the
                wrong device for the backend, or the sums are beyond float64. Nothing was changed.
        """
        function = "LinearStatistics.reduce"
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized():
            raise RuntimeError(
                f"{function}: torch.distributed must be initialised, but is not: call init_process_group first"
            )
        on_gpu = distributed.get_backend(group) == "nccl"
        if on_gpu and self.device.type != "cuda":
            raise ValueError(
                f"{function}: the statistics must be on the GPU with the backend nccl, but are on {self.device}: "
                'use .to("cuda")'
            )
        device = self.device if on_gpu else torch.device("cpu")
        sizes = torch.tensor([self.in_features, self.out_features], device=device)
        all_sizes = [torch.empty_like(sizes) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(all_sizes, sizes, group=group)
        for rank, other in enumerate(all_sizes):
            if other.tolist() != all_sizes[0].tolist():
                raise ValueError(
                    f"{function}: all processes must have the same numbers of features and targets, but rank 0 has "
                    f"{all_sizes[0].tolist()} and rank {rank} has {other.tolist()}"
                )
        own = torch.cat([moment.flatten() for moment in self.tensors]).to(device)
        parts = [torch.empty_like(own) for _ in all_sizes]
        distributed.all_gather(parts, own, group=group)
        merged = LinearStatistics(self.in_features, self.out_features, device=self.device)
        shapes = _shapes(self.in_features, self.out_features)
        lengths = [math.prod(shape) for shape in shapes]
        for part in parts:
            flat = torch.split(part.to(self.device), lengths)
            moments = tuple(moment.view(shape) for moment, shape in zip(flat, shapes, strict=True))
            merged._set(merged._merged(function, moments))  # type: ignore[arg-type]
        self._set(merged.tensors)
        return self

    def to(self, device: torch.device | str) -> Self:
        """Move the statistics to a device, in place; return the object itself."""
        self._set(tuple(moment.to(device) for moment in self.tensors))  # type: ignore[arg-type]
        return self

    def save(self, path: str | Path) -> Path:
        """Write the statistics to one file, whole or not at all; ``torch.load(path, weights_only=True)`` reads it too.

        Args:
            path: The file; an existing one is replaced.

        Returns:
            The path.

        Raises:
            OSError: The file cannot be written; an existing one is as it was.
        """
        return saving.write_file(path, _KIND, _VERSION, to_content(self.tensors))

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> Self:
        """Read a file that :meth:`save` wrote; no code of the file is run.

        Args:
            path: The file.
            device: Where the statistics are to be.

        Returns:
            The statistics.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is not such a file.
        """
        function = "LinearStatistics.load"
        content = saving.read_file(function, path, _KIND, _VERSION, map_location=device)
        moments = from_content(function, path, content)
        statistics = cls(moments[1].numel(), moments[2].numel(), device=device)
        statistics._set(moments)
        return statistics

    def loss(self, W: _ArrayLike, b: _ArrayLike | None = None) -> Tensor:
        """Compute the mean squared error of a linear model on all rows.

        Equivalent to ``F.mse_loss(F.linear(X, W, b), y)`` in float64; with weights, the mean over the rows is the
        weighted one. The result is part of autograd's graph if ``W`` or ``b`` require a gradient. Where the fit is near
        perfect the terms cancel: the absolute error is about 1e-16 times the targets' variance.

        Args:
            W: ``(out_features, in_features)``.
            b: ``(out_features,)``; None for a model without a bias.

        Returns:
            The loss, ``()``, float64, never negative.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: A shape is wrong, or no rows were added.
        """
        function = "LinearStatistics.loss"
        weight, bias = self._parameters(function, W, b)
        self._check_rows(function)
        offset = torch.mv(weight, self.mean_x) - self.mean_y
        if bias is not None:
            offset = offset + bias
        half = weight @ self.sxx - self.sxy.T
        squares = (weight * (half - self.sxy.T)).sum(1) + self.syy
        # Rounding may leave less than nothing. The gradient is that of the formula in either case.
        squares = squares + (squares.clamp_min(0) - squares).detach()
        return (squares / self.count + offset * offset).mean()

    def gradient(self, W: _ArrayLike, b: _ArrayLike | None = None) -> tuple[Tensor, Tensor]:
        """Compute the gradients of :meth:`loss`.

        Equivalent to ``torch.autograd.grad(F.mse_loss(F.linear(X, W, b), y), (W, b))`` in float64.

        Args:
            W: ``(out_features, in_features)``.
            b: ``(out_features,)``; None for a model without a bias, whose gradient is then the one at 0.

        Returns:
            The gradients for ``W`` ``(out_features, in_features)`` and for ``b`` ``(out_features,)``, float64.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: A shape is wrong, or no rows were added.
        """
        function = "LinearStatistics.gradient"
        weight, bias = self._parameters(function, W, b)
        self._check_rows(function)
        with torch.no_grad():
            offset = torch.mv(weight, self.mean_x) - self.mean_y
            if bias is not None:
                offset = offset + bias
            scale = 2.0 / self.out_features
            centred = (weight @ self.sxx - self.sxy.T) / self.count
            return scale * (centred + torch.outer(offset, self.mean_x)), scale * offset

    def solve(self, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
        """Compute the linear model of the least penalised squared error, in closed form.

        For each target it minimises over ``w`` and ``b``, with the rows' weights ``v``::

            sum over n of v_n (w @ x_n + b - y_n)**2 + ridge * (w @ w)

        The bias is not penalised, and the sum is not divided by the number of rows: with ``ridge=0`` it is ordinary
        least squares with an intercept, and in general what ``sklearn.linear_model.Ridge(alpha=ridge)`` fits.

        Columns are scaled to unit variance for the computation, so that their units do not matter. Directions in which
        the features do not vary beyond rounding (eigenvalues of the scaled matrix up to ``10 D`` times 2.2e-16 of the
        largest: constant and collinear columns) are left out, and the solution is the one of least norm ``w @ w``.

        Args:
            ridge: The penalty, finite and at least 0, in units of ``sxx``.

        Returns:
            ``weight`` ``(out_features, in_features)`` and ``bias`` ``(out_features,)``, float64.

        Raises:
            TypeError: ``ridge`` is not a number.
            ValueError: It is negative or not finite, or no rows were added.
        """
        function = "LinearStatistics.solve"
        ridge = _checks.non_negative(function, "ridge", ridge)
        self._check_rows(function)
        with torch.no_grad():
            matrix = self.sxx.clone()
            matrix.diagonal().add_(ridge)
            scale = matrix.diagonal().sqrt()
            scale = torch.where(scale > 0, scale, 1.0)
            values, vectors = torch.linalg.eigh(matrix / scale.unsqueeze(0) / scale.unsqueeze(1))
            cutoff = 10 * self.in_features * torch.finfo(torch.float64).eps
            kept = values > cutoff * values[-1].clamp_min(0)
            inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
            right = self.sxy / scale.unsqueeze(1)
            solution = (vectors @ (inverse.unsqueeze(1) * (vectors.T @ right))) / scale.unsqueeze(1)
            if not bool(kept.all()):
                # Of least norm in the columns' own units, not in the scaled ones.
                free, _ = torch.linalg.qr(vectors[:, ~kept] / scale.unsqueeze(1))
                solution = solution - free @ (free.T @ solution)
            weight = solution.T.contiguous()
            return weight, self.mean_y - torch.mv(weight, self.mean_x)

    def standardized(
        self, standardize: Standardize | None = None, *, dtype: torch.dtype | None = None
    ) -> tuple[LinearStatistics, Standardize]:
        """Compute the statistics of the rows after their features were shifted and scaled, without the rows.

        Equivalent to ``standardize = Standardize.fit(X)`` and to gathering ``standardize(X)`` and ``y``, to rounding,
        with the weighted mean and deviation if the rows have weights.

        Args:
            standardize: What shifts and scales, such as that of the training rows for statistics of rows held out; by
                default the one of these rows, by which a constant column is shifted only.
            dtype: Of a module that is made, a floating-point type, by default ``torch.get_default_dtype()``. The
                statistics are those of shifting and scaling by its rounded numbers.

        Returns:
            New statistics on the same device, and the module, on that device if it is made here.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: ``standardize`` has another number of features, no rows were added, or a mean or deviation is
                beyond ``dtype``.

        Example:
            >>> X = torch.tensor([[1.0], [3.0]])
            >>> statistics, standardize = LinearStatistics(1, 1).update(X, X).standardized()
            >>> statistics.mean_x, standardize(torch.tensor([[3.0]]))
            (tensor([0.], dtype=torch.float64), tensor([[1.]]))
        """
        function = "LinearStatistics.standardized"
        self._check_rows(function)
        deviation = (self.sxx.diagonal() / self.count).clamp_min(0).sqrt()
        rounding = _CONSTANT * self.mean_x.abs()
        varies = deviation > rounding
        if standardize is None:
            dtype = torch.get_default_dtype() if dtype is None else dtype
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise TypeError(f"{function}: dtype must be a floating-point type, but got {dtype!r}")
            scale = torch.where(varies, deviation, 1.0).to(dtype)
            mean = self.mean_x.to(dtype)
            if not bool(torch.isfinite(mean).all() and torch.isfinite(scale).all()):
                kind = str(dtype).removeprefix("torch.")
                raise ValueError(f"{function}: the means and deviations of the features must be within {kind}")
            standardize = Standardize(mean, torch.where(scale == 0, torch.ones_like(scale), scale))
        elif not isinstance(standardize, Standardize):
            raise TypeError(f"{function}: standardize must be a Standardize, but got {type(standardize).__name__}")
        elif standardize.mean.shape[0] != self.in_features:
            raise ValueError(
                f"{function}: standardize must be for {self.in_features} features, but is for "
                f"{standardize.mean.shape[0]}"
            )
        mean, scale = (moment.to(self.device, torch.float64) for moment in (standardize.mean, standardize.scale))
        scaled = LinearStatistics(self.in_features, self.out_features, device=self.device)
        # What is left of a constant column would be rounding, perhaps of large numbers.
        offset = self.mean_x - mean
        inverse = torch.where(varies, 1 / scale, 0.0)
        mean_x = torch.where(offset.abs() > rounding, offset / scale, 0.0)
        sxy, sxx = self.sxy * inverse.unsqueeze(1), self.sxx * inverse * inverse.unsqueeze(1)
        moments = (self.count.clone(), mean_x, self.mean_y.clone(), sxx, sxy, self.syy.clone())
        if not _finite(moments):
            raise _overflow(function)
        scaled._set(moments)
        return scaled, standardize

    def __repr__(self) -> str:
        return (
            f"LinearStatistics(in_features={self.in_features}, out_features={self.out_features}, "
            f"count={self.count.item():g}, device='{self.device}')"
        )

    def _set(self, moments: _Moments) -> None:
        self.count, self.mean_x, self.mean_y, self.sxx, self.sxy, self.syy = moments

    def _merged(self, function: str, other: _Moments) -> _Moments:
        """Return the statistics of our rows and those of ``other``, which is on our device."""
        if self.count.item() == 0:
            return other
        if other[0].item() == 0:
            return self.tensors
        count, mean_x, mean_y, sxx, sxy, syy = other
        total = self.count + count
        x, y = mean_x - self.mean_x, mean_y - self.mean_y
        share = count / total
        between = self.count * share
        merged = (
            total,
            self.mean_x + x * share,
            self.mean_y + y * share,
            self.sxx + sxx + torch.outer(x, x) * between,
            self.sxy + sxy + torch.outer(x, y) * between,
            self.syy + syy + y * y * between,
        )
        if not _finite(merged):
            raise _overflow(function)
        return merged

    def _rows(self, function: str, X: object, y: object, weight: object) -> tuple[Tensor, Tensor, Tensor | None]:
        given_X, given_y = _checks.tensor(function, "X", X), _checks.tensor(function, "y", y)
        if given_X.dim() != 2 or given_X.shape[1] != self.in_features:
            hint = ": use X.unsqueeze(-1)" if given_X.dim() == 1 and self.in_features == 1 else ""
            raise ValueError(
                f"{function}: X must have shape (N, {self.in_features}), but got {tuple(given_X.shape)}{hint}"
            )
        rows = given_X.shape[0]
        if tuple(given_y.shape) != (rows, self.out_features):
            hint = ": use y.unsqueeze(-1)" if tuple(given_y.shape) == (rows,) and self.out_features == 1 else ""
            raise ValueError(
                f"{function}: y must have shape {(rows, self.out_features)}, but got {tuple(given_y.shape)}{hint}"
            )
        # A device without float64 cannot gather.
        device = given_X.device if given_X.device.type in ("cpu", "cuda") else torch.device("cpu")
        given_X, given_y = given_X.to(device), given_y.to(device)
        if weight is None:
            return given_X, given_y, None
        given_weight = _readable(_checks.tensor(function, "weight", weight)).to(device)
        if tuple(given_weight.shape) != (rows,):
            raise ValueError(
                f"{function}: weight must have shape {(rows,)}, one number per row, but got {tuple(given_weight.shape)}"
            )
        _checks.check_finite(function, "weight", given_weight)
        if rows > 0 and given_weight.min().item() < 0:
            row = int((given_weight < 0).nonzero()[0])
            raise ValueError(
                f"{function}: weight must be at least 0, but element [{row}] is {given_weight[row].item()}"
            )
        return given_X, given_y, given_weight

    def _parameters(self, function: str, W: object, b: object) -> tuple[Tensor, Tensor | None]:
        found = []
        for name, value, shape in (
            ("W", W, (self.out_features, self.in_features)),
            ("b", b, (self.out_features,)),
        ):
            if name == "b" and value is None:
                continue
            checked = _checks.tensor(function, name, value)
            if tuple(checked.shape) != shape:
                raise ValueError(f"{function}: {name} must have shape {shape}, but got {tuple(checked.shape)}")
            kept = value if isinstance(value, Tensor) else checked  # with its graph
            found.append(kept.to(device=self.device, dtype=torch.float64))
        return found[0], found[1] if len(found) > 1 else None

    def _check_rows(self, function: str) -> None:
        if self.count.item() == 0:
            raise ValueError(f"{function}: the statistics must have at least one row of positive weight, but have none")


def to_content(moments: _Moments) -> dict[str, Tensor]:
    """Return what a file keeps of statistics, given their six tensors."""
    return {name: moment.cpu().clone() for name, moment in zip(_NAMES, moments, strict=True)}


def from_content(function: str, path: object, content: dict[str, Any]) -> _Moments:
    """Return the six tensors of statistics that a file keeps, on the device that it was read to.

    Raises:
        ValueError: The file is damaged; the sentence begins with ``function``.
    """
    moments = tuple(m for m in map(content.get, _NAMES) if isinstance(m, Tensor) and m.dtype == torch.float64)
    if len(moments) < len(_NAMES) or moments[1].dim() != 1 or moments[2].dim() != 1 or 0 in moments[4].shape:
        raise ValueError(f"{function}: {path} is damaged: it must hold six tensors of float64")
    shapes = _shapes(moments[1].numel(), moments[2].numel())
    for name, moment, shape in zip(_NAMES, moments, shapes, strict=True):
        if tuple(moment.shape) != shape or not bool(torch.isfinite(moment).all()):
            raise ValueError(
                f"{function}: {path} is damaged: {name} must be finite and have shape {shape}, "
                f"but has {tuple(moment.shape)}"
            )
    return moments  # type: ignore[return-value]


def _shapes(d: int, o: int) -> tuple[tuple[int, ...], ...]:
    return (), (d,), (o,), (d, d), (d, o), (o,)


def _readable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in _READ else tensor.to(torch.float64)


def _finite(moments: _Moments) -> bool:
    """Whether all is finite: the squares of the columns bound their products."""
    count, _, _, sxx, _, syy = moments
    if math.isfinite((count + sxx.diagonal().sum() + syy.sum()).item()):
        return True
    return all(bool(torch.isfinite(moment).all()) for moment in moments)  # a sum of finite squares may overflow


def _overflow(function: str) -> ValueError:
    return ValueError(
        f"{function}: the weights, and the squares of X and y about their means, must have sums within float64, but "
        "these overflow: scale them down"
    )
