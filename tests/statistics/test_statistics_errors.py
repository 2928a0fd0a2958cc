"""LinearStatistics and its operator: wrong calls."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from rows_of_moments import make, same
from torch import Tensor

from torchintro import LinearStatistics

# --- wrong calls

X5, Y5 = torch.randn(5, 3), torch.randn(5, 1)
BAD_X = X5.clone()
BAD_X[2, 1] = math.nan
BAD_Y = Y5.clone()
BAD_Y[4] = -math.inf
OVERFLOW = (
    "the weights, and the squares of X and y about their means, must have sums within float64, but these overflow: "
    "scale them down"
)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], Y5), TypeError, "X must be a tensor or a NumPy array, but got list"),
        ((X5,), TypeError, "y must be a tensor or a NumPy array, but got None"),
        ((X5, Y5, [1.0]), TypeError, "weight must be a tensor or a NumPy array, but got list"),
        ((X5.to(torch.complex64), Y5), TypeError, "X must be a dense tensor of real numbers, but got complex64"),
        ((X5[:, :2], Y5), ValueError, r"X must have shape \(N, 3\), but got \(5, 2\)"),
        ((X5[0], Y5), ValueError, r"X must have shape \(N, 3\), but got \(3,\)"),
        ((X5, Y5[:, 0]), ValueError, r"y must have shape \(5, 1\), but got \(5,\): use y.unsqueeze\(-1\)"),
        ((X5, Y5[:4]), ValueError, r"y must have shape \(5, 1\), but got \(4, 1\)"),
        ((X5, Y5, Y5), ValueError, r"weight must have shape \(5,\), one number per row, but got \(5, 1\)"),
        ((X5, Y5, torch.arange(5.0) - 1), ValueError, r"weight must be at least 0, but element \[0\] is -1.0"),
        ((X5, Y5, BAD_Y[:, 0]), ValueError, r"weight must be finite, but element \[4\] is -inf"),
        ((BAD_X, Y5), ValueError, r"X must be finite, but element \[2, 1\] is nan"),
        ((X5, BAD_Y), ValueError, r"y must be finite, but element \[4, 0\] is -inf"),
        ((X5.to_sparse(), Y5), TypeError, "X must be a dense tensor of real numbers, but got sparse_coo"),
        ((X5.double() * 1e200, Y5), ValueError, OVERFLOW),
        ((X5, Y5, torch.full((5,), 1e308, dtype=torch.float64)), ValueError, OVERFLOW),
    ],
)
def test_bad_rows_leave_the_statistics_unchanged(device, arguments, error, message):
    statistics = LinearStatistics(3, 1, device=device).update(X5, Y5)
    before = copy.deepcopy(statistics)
    moved = [value.to(device) if isinstance(value, Tensor) else value for value in arguments]
    with pytest.raises(error, match=f"^LinearStatistics.update: {message}$"):
        statistics.update(*moved)
    assert same(statistics, before)


def test_parts_too_far_from_each_other():
    low = LinearStatistics(3, 1).update(X5, Y5)
    before = copy.deepcopy(low)
    high = LinearStatistics(3, 1).update(X5.double() + 1e200, Y5)
    with pytest.raises(ValueError, match=f"^LinearStatistics.merge: {OVERFLOW}$"):
        low.merge(high)
    assert same(low, before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.merge(3), TypeError, "merge: other must be LinearStatistics, but got int"),
        (
            lambda s: s.merge(LinearStatistics(2, 1)),
            ValueError,
            "merge: other must have 3 features and 1 targets, but got 2 and 1",
        ),
        (lambda s: s.loss(torch.ones(3)), ValueError, r"loss: W must have shape \(1, 3\), but got \(3,\)"),
        (lambda s: s.loss(3.0), TypeError, "loss: W must be a tensor or a NumPy array, but got float"),
        (
            lambda s: s.gradient(torch.ones(1, 3), torch.ones(1, 1)),
            ValueError,
            r"gradient: b must have shape \(1,\), but got \(1, 1\)",
        ),
        (lambda s: s.solve(-1.0), ValueError, "solve: ridge must be a finite number of at least 0, but got -1.0"),
        (lambda s: s.solve("a"), TypeError, "solve: ridge must be a finite number of at least 0, but got 'a'"),
        (
            lambda s: s.reduce(),
            RuntimeError,
            "reduce: torch.distributed must be initialised, but is not: call init_process_group first",
        ),
    ],
)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=f"^LinearStatistics.{message}$"):
        call(LinearStatistics(3, 1).update(X5, Y5))


@pytest.mark.parametrize(
    "call",
    [lambda s: s.loss(torch.ones(1, 3)), lambda s: s.gradient(torch.ones(1, 3)), lambda s: s.solve()],
    ids=["loss", "gradient", "solve"],
)
def test_statistics_of_no_rows(call):
    with pytest.raises(ValueError, match="must have at least one row of positive weight, but have none"):
        call(LinearStatistics(3, 1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1), ValueError, "in_features must be at least 1, but got 0"),
        ((1, 1.5), TypeError, "out_features must be an integer, but got 1.5"),
    ],
)
def test_bad_sizes(arguments, error, message):
    with pytest.raises(error, match=f"^LinearStatistics: {message}$"):
        LinearStatistics(*arguments)


# --- the operator


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X5[0], Y5), ValueError, r"input must have shape \(N, in_features\), but got \(3,\)"),
        ((X5, Y5[:, 0]), ValueError, r"target must have shape \(5, out_features\), but got \(5,\)"),
        ((X5, Y5[:4]), ValueError, r"target must have 5 rows, as input has, but got shape \(4, 1\)"),
        ((X5, Y5, Y5), ValueError, r"weight must have shape \(5,\), one per row, but got \(5, 1\)"),
        ((X5, Y5, Y5[:3, 0]), ValueError, r"weight must have shape \(5,\), one per row, but got \(3,\)"),
        ((X5.int(), Y5), TypeError, "input must have dtype float64, float32, bfloat16 or float16, but got Int"),
    ],
)
def test_bad_operator_calls(device, arguments, error, message):
    moved = [value.to(device) for value in arguments]
    with pytest.raises(error, match=f"^_linear_moments: {message}"):
        torch.ops.torchintro._linear_moments(*moved)


@pytest.mark.parametrize("d", [3, 40])
def test_opcheck(device, d):
    X, y = (tensor.to(device) for tensor in make(30, d, 2, dtype=torch.float32))
    torch.library.opcheck(torch.ops.torchintro._linear_moments, (X, y, None))
    torch.library.opcheck(torch.ops.torchintro._linear_moments, (X, y, torch.rand(30, device=device)))


@pytest.mark.parametrize("sizes", [(0, 3, 1), (5, 0, 1), (5, 3, 0)])
def test_operator_on_nothing(device, sizes):
    rows, d, o = sizes
    moments = torch.ops.torchintro._linear_moments(
        torch.randn(rows, d, device=device), torch.randn(rows, o, device=device)
    )
    assert [tuple(moment.shape) for moment in moments] == [(), (d,), (o,), (d, d), (d, o), (o,)]
    assert moments[0].item() == rows
    assert all(bool(torch.isfinite(moment).all()) for moment in moments)
