"""The operator in plain PyTorch: the oracle of the tests and the baseline of the benchmarks."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["linear_mse_loss"]


def linear_mse_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute ``mse_loss(linear(input, linear_weight, linear_bias), target)`` with PyTorch's own operators.

    Arguments, result and meaning are those of :func:`torchintro.linear_mse_loss`; there is no check of them beyond
    PyTorch's own.
    """
    # A 16-bit prediction against a float32 target: mse_loss promotes it itself, but its backward fails in torch 2.11.
    prediction = F.linear(input, linear_weight, linear_bias).to(target.dtype)
    if weight is None:
        return F.mse_loss(prediction, target, reduction=reduction)
    squared_error = (prediction - target).square()
    if weight.dim() < target.dim():
        weight = weight.unsqueeze(-1)
    weight = weight.expand_as(target)
    weighted = weight * squared_error
    if reduction == "none":
        return weighted
    total = weighted.sum()
    return total / weight.sum() if reduction == "mean" else total
