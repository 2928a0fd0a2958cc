"""scikit-learn's way to a linear model: a stochastic descent by rows, and the closed form of a ridge regression.

Neither does the same work as a training run of this package, so each has a check of its own.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from ..work import Check, Unavailable, relative_error

__all__ = ["DescentByRows", "RidgeSolve", "least_squares"]

ALPHA = 1.0  # scikit-learn's default

# The learning rate of the descent by rows, times the number of rows: so many time constants of a feature of variance 1
# are in one epoch, after which what is left of the start does not show.
TIME_CONSTANTS = 8.0


def _check(device: torch.device) -> None:
    if device.type != "cpu":
        raise Unavailable("scikit-learn is compared on the CPU only")
    if importlib.util.find_spec("sklearn") is None:
        raise Unavailable('scikit-learn is not installed: pip install "torchintro[cli]"')


class DescentByRows:
    """One epoch of ``SGDRegressor``: an update a row, on one core.

    Attributes:
        NOTE: What a reader should know.
    """

    NOTE = "sklearn is SGDRegressor: an update a row, not one a batch; checked is that its loss ends close to the least"

    def __init__(self, X: Tensor, y: Tensor, *, shuffle: bool) -> None:
        _check(X.device)
        self.X, self.y = X, y
        self.lr = TIME_CONSTANTS / X.shape[0]
        self.shuffle = shuffle
        self.arguments = X.numpy(), y.squeeze(1).numpy()
        self.model: Any = None

    def __call__(self) -> None:
        """Train one epoch from the start."""
        from sklearn.linear_model import SGDRegressor

        self.model = SGDRegressor(
            penalty=None,
            learning_rate="constant",
            eta0=self.lr,
            max_iter=1,
            tol=None,
            shuffle=self.shuffle,
            random_state=0,
        ).fit(*self.arguments)

    def check(self) -> dict[str, Check]:
        """Run; return how much the loss exceeds the least one, relative to that.

        A descent by rows of features of variance 1 ends about ``lr * in_features / 2`` above it, from its own noise.
        """
        self()
        X, y = self.X.double(), self.y.double()
        least = _mean_squared(X, y, *least_squares(X, y))
        weight = torch.as_tensor(self.model.coef_, dtype=torch.float64)[None]
        loss = _mean_squared(X, y, weight, torch.as_tensor(self.model.intercept_, dtype=torch.float64))
        return {"loss": Check(loss / least - 1, self.lr * X.shape[1] + 0.01)}


class RidgeSolve:
    """The closed form, once: ``Ridge(solver="cholesky")``.

    Attributes:
        NOTE: What a reader should know.
    """

    NOTE = (
        f'ridge is one fit of Ridge(alpha={ALPHA:g}, solver="cholesky"), the closed form and no study: the least loss '
        "at once; checked are its parameters"
    )

    def __init__(self, X: Tensor, y: Tensor) -> None:
        _check(X.device)
        self.X, self.y = X, y
        self.arguments = X.numpy(), y.numpy()
        self.model: Any = None

    def __call__(self) -> None:
        """Solve."""
        from sklearn.linear_model import Ridge

        self.model = Ridge(alpha=ALPHA, solver="cholesky").fit(*self.arguments)

    def check(self) -> dict[str, Check]:
        """Run; return the error of the parameters."""
        self()
        weight, bias = least_squares(self.X.double(), self.y.double(), ALPHA)
        found = [torch.as_tensor(array).reshape(-1) for array in (self.model.coef_, self.model.intercept_)]
        error = relative_error(torch.cat(found), torch.cat([weight.reshape(-1), bias]))
        return {"parameters": Check(error, math.sqrt(torch.finfo(self.X.dtype).eps))}


def least_squares(X: Tensor, y: Tensor, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the weight ``(O, D)`` and bias ``(O,)`` of the least sum of squares plus ``ridge`` times the weight's."""
    x_mean, y_mean = X.mean(0), y.mean(0)
    Xc = X - x_mean
    moments = Xc.T @ Xc
    moments.diagonal().add_(ridge)
    weight = torch.linalg.solve(moments, Xc.T @ (y - y_mean)).T
    return weight, y_mean - weight @ x_mean


def _mean_squared(X: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> float:
    return (X @ weight.T + bias - y).square().mean().item()
