"""The operator as a criterion that owns its linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from .functional import linear_mse_loss

__all__ = ["LinearMSELoss"]


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


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"LinearMSELoss: reduction must be 'mean', 'sum' or 'none', but got {reduction!r}")
