"""No result is further from float64's than eager PyTorch's of the same dtype.

Single errors are luck, so each case is drawn several times and the root mean squares are compared. What nobody can be
blamed for is one more rounding, half a unit, of the terms that a result is the sum of.
"""

from __future__ import annotations

import math

import pytest
import torch
from problems import DTYPES, Problem, make_problem, term_sums
from torch import Tensor

from torchintro import linear_mse_loss, reference

DRAWS = 5

# Both regimes, both kinds of panels, sizes that are no multiple of anything, sums that are long in each direction.
SHAPES = [
    (100, 1, 1),
    (1000, 3, 1),
    (20000, 5, 3),
    (5000, 16, 4),
    (3000, 17, 2),
    (3000, 64, 1),
    (2000, 64, 16),
    (2000, 100, 24),
    (300, 1000, 1),
    (700, 257, 64),
    (1500, 64, 65),
    (1100, 30, 300),
    (257, 300, 400),
    (64, 1030, 1030),
]


def norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def squared_errors(problem: Problem) -> dict[str, tuple[float, float, float]]:
    """Of each result, relative to the size of its terms: our error, eager's, and half a unit of the dtype, squared."""
    ours, eager = problem.results(linear_mse_loss), problem.results(reference.linear_mse_loss)
    exact = problem.map(Tensor.double).results(reference.linear_mse_loss)
    terms = term_sums(problem)
    return {
        name: (
            (norm(ours[name].double() - exact[name]) / norm(terms[name])) ** 2,
            (norm(eager[name].double() - exact[name]) / norm(terms[name])) ** 2,
            (torch.finfo(ours[name].dtype).eps / 2) ** 2,
        )
        for name in exact
    }


# Eager PyTorch in float64 is the yardstick itself: there is nothing to be more exact than.
ROUNDED = [pair for pair in DTYPES if pair[0] != torch.float64]
# Every dtype at every shape; each of them with every kind of weight, though not at once.
CASES = [
    pytest.param(shape, *dtypes, (None, "element", "row")[(i + j) % 3], id=f"{'x'.join(map(str, shape))}-{j}")
    for i, shape in enumerate(SHAPES)
    for j, dtypes in enumerate(ROUNDED)
]


@pytest.mark.parametrize(("shape", "dtype", "target_dtype", "weight"), CASES)
def test_no_error_is_larger_than_eagers(
    device: str, shape: tuple[int, int, int], dtype: torch.dtype, target_dtype: torch.dtype, weight: str | None
) -> None:
    assert_no_error_is_larger_than_eagers(device, shape, dtype, target_dtype, weight)


# So many rows that a sum of them one by one in float32 would lose digits. On the CPU they would only take long.
@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3000000, 8, 1), (1000000, 8, 3), (300000, 64, 16), (300000, 64, 40)])
@pytest.mark.parametrize(("dtype", "target_dtype"), ROUNDED)
def test_no_error_is_larger_than_eagers_over_millions_of_rows(
    shape: tuple[int, int, int], dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    assert_no_error_is_larger_than_eagers("cuda", shape, dtype, target_dtype, None)


def assert_no_error_is_larger_than_eagers(
    device: str, shape: tuple[int, int, int], dtype: torch.dtype, target_dtype: torch.dtype, weight: str | None
) -> None:
    rows, in_features, out_features = shape
    draws = [
        squared_errors(
            make_problem(
                rows, in_features, out_features, weight=weight, dtype=dtype, target_dtype=target_dtype, device=device
            )
        )
        for _ in range(DRAWS)
    ]
    for name in draws[0]:
        ours, eager, unit = (math.sqrt(sum(draw[name][i] for draw in draws) / DRAWS) for i in range(3))
        if math.isfinite(eager):  # its float16 mean can overflow
            assert ours <= eager + unit, f"{name}: {ours:.3e}, eager {eager:.3e}, half a unit {unit:.3e}"
        else:
            assert ours <= 2 * unit, f"{name}: {ours:.3e}, eager has none, half a unit {unit:.3e}"
