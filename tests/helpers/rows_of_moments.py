"""Rows for LinearStatistics, their moments by two passes in float64, and how near these must be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchintro import LinearStatistics

EPS = torch.finfo(torch.float64).eps
NAMES = ("count", "mean_x", "mean_y", "sxx", "sxy", "syy")
# Every way to compute them: by columns, by rows, with and without whole vectors, by products.
SIZES = [(1, 1, 1), (100, 1, 1), (300, 3, 2), (700, 16, 1), (1000, 17, 3), (2500, 64, 1), (900, 130, 5), (300, 520, 2)]
SIZES += [(200, 5, 70)]


def make(
    rows: int, d: int, o: int, *, dtype: torch.dtype = torch.float64, offset: float = 3.0
) -> tuple[Tensor, Tensor]:
    X = offset + torch.randn(rows, d, dtype=torch.float64)
    y = X @ torch.randn(d, o, dtype=torch.float64) + 0.3 * torch.randn(rows, o, dtype=torch.float64) - offset
    return X.to(dtype), y.to(dtype)


def direct(X: Tensor, y: Tensor, weight: Tensor | None = None) -> list[Tensor]:
    """Compute the six tensors by two passes in float64."""
    X, y = X.double().cpu(), y.double().cpu()
    v = torch.ones(len(X), dtype=torch.float64) if weight is None else weight.double().cpu()
    count = v.sum()
    mean_x, mean_y = (v @ X) / count, (v @ y) / count
    # The mean's own rounding is taken out of the deviations.
    x, z = X - mean_x, y - mean_y
    x, z = x - (v @ x) / count, z - (v @ z) / count
    return [count, mean_x, mean_y, x.T @ (v[:, None] * x), x.T @ (v[:, None] * z), (v[:, None] * z * z).sum(0)]


def assert_close(statistics: LinearStatistics, expected: list[Tensor], factor: float = 30.0) -> None:
    """Compare with a bound of some roundings: of the means themselves, and of the sums of squares that bound a sum."""
    count, mean_x, mean_y, sxx, sxy, syy = (moment.cpu() for moment in statistics.tensors)
    assert all(moment.dtype == torch.float64 for moment in statistics.tensors)
    x, y = expected[3].diagonal(), expected[5]
    rounding = factor * EPS * max(1.0, math.log2(1 + expected[0].item()))
    bounds = [
        rounding * expected[0],
        rounding * (expected[1].abs() + (x / expected[0]).sqrt()),
        rounding * (expected[2].abs() + (y / expected[0]).sqrt()),
        rounding * torch.outer(x, x).sqrt(),
        rounding * torch.outer(x, y).sqrt(),
        rounding * y,
    ]
    for name, ours, exact, bound in zip(NAMES, (count, mean_x, mean_y, sxx, sxy, syy), expected, bounds, strict=True):
        assert ours.shape == exact.shape, name
        assert bool(((ours - exact).abs() <= bound).all()), (name, (ours - exact).abs().max(), bound.max())
    assert torch.equal(sxx, sxx.T)


def same(a: LinearStatistics, b: LinearStatistics) -> bool:
    return all(torch.equal(ours, others) for ours, others in zip(a.tensors, b.tensors, strict=True))
