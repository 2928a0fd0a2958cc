"""Modules: the operator as a criterion that owns its linear layer, and the layer that standardises features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from ._typing import ArrayLike
from .functional import linear_mse_loss

__all__ = ["LinearMSELoss", "Standardize", "initial_linear"]


class LinearMSELoss(nn.Module):
    """A linear layer and its mean squared error in one module.

    ``LinearMSELoss(d, o)(x, y)`` equals ``nn.MSELoss()(nn.Linear(d, o)(x), y)``; ``criterion.linear(x)`` predicts. The
    sibling for regression of :class:`torch.nn.LinearCrossEntropyLoss`.

    Args:
        in_features: Size of each input row.
        out_features: Size of each target row.
        bias: Whether the layer has a bias.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; see :func:`torchintro.linear_mse_loss`.
        device: Where the parameters live.
        dtype: The parameters' dtype.

    Attributes:
        linear: The :class:`torch.nn.Linear`, whose parameters are the module's only ones.

    Example:
        >>> criterion = LinearMSELoss(3, 1)
        >>> criterion(torch.randn(8, 3), torch.randn(8, 1)).backward()
        >>> criterion.linear.weight.grad.shape
        torch.Size([1, 3])
    """

    __constants__ = ["reduction"]  # noqa: RUF012 (TorchScript reads it from the class)
    reduction: str

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        reduction: str = "mean",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_reduction(reduction)
        self.linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.reduction = reduction

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, reduction: str = "mean") -> LinearMSELoss:
        """Wrap an existing layer, sharing its parameters: the drop-in for the head of a model.

        Args:
            linear: The layer; it is used, not copied, and keeps its device and dtype.
            reduction: As in the constructor.

        Raises:
            TypeError: ``linear`` is not an :class:`torch.nn.Linear`, or has a forward or forward hooks of its own.
        """
        linear = _checks.plain_linear("LinearMSELoss.from_linear", "linear", linear)
        _check_reduction(reduction)
        criterion = cls.__new__(cls)
        nn.Module.__init__(criterion)
        criterion.linear = linear
        criterion.reduction = reduction
        return criterion

    def forward(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Compute the loss of ``linear(input)`` against ``target``; shapes as in :func:`torchintro.linear_mse_loss`."""
        return linear_mse_loss(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show what the layer's own line does not."""
        return f"reduction={self.reduction!r}"


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


def initial_linear(
    in_features: int,
    out_features: int,
    *,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Linear:
    """Make an ``nn.Linear`` whose initial parameters depend on ``seed`` alone.

    Equivalent to ``torch.manual_seed(seed); nn.Linear(in_features, out_features)`` on the CPU, except that the global
    random state is left as it was.

    Args:
        in_features: Number of features.
        out_features: Number of targets.
        seed: Seed of the parameters; None draws them from the global random state.
        dtype: Type of the parameters, by default ``torch.get_default_dtype()``.
        device: Where the parameters are moved.

    Returns:
        The layer.

    Example:
        >>> bool((initial_linear(3, 1, seed=0).weight == initial_linear(3, 1, seed=0).weight).all())
        True
    """
    if seed is None:
        return nn.Linear(in_features, out_features, dtype=dtype, device=device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Linear(in_features, out_features, dtype=dtype).to(device)


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"LinearMSELoss: reduction must be 'mean', 'sum' or 'none', but got {reduction!r}")
