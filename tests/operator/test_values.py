"""Loss and gradients against float64, in every dtype, regime, shape and stride."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import (
    DTYPES,
    assert_as_exact_as_eager,
    every_second,
    expanded,
    make_problem,
    padded_rows,
    transposed,
)
from torch import Tensor

import torchintro

# (leading sizes, in_features, out_features): one row, sizes around the vectors and groups of rows, blocks of rows, few
# and many outputs around the border between the regimes, several chunks of rows.
SHAPES = [
    ((1,), 1, 1),
    ((100,), 1, 1),
    ((7,), 3, 1),
    ((8,), 16, 1),
    ((257,), 17, 2),
    ((1030,), 33, 5),
    ((520,), 64, 16),
    ((300,), 40, 17),
    ((1,), 1, 300),
    ((1100,), 30, 300),
    ((3000,), 8, 1),
    ((), 5, 3),
    ((2, 3), 4, 2),
    ((2, 3, 4), 5, 20),
]
ids = [f"{'x'.join(map(str, leading)) or 'none'}-{d}-{o}" for leading, d, o in SHAPES]


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize(("dtype", "target_dtype"), DTYPES)
def test_every_dtype(device: str, shape: tuple, dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    """Any two of shape, dtype, reduction and weight meet, and so do dtype, reduction and weight."""
    leading, d, o = shape
    first = SHAPES.index(shape) + DTYPES.index((dtype, target_dtype))
    for i, reduction in enumerate(["mean", "sum", "none"]):
        weight = (None, "element", "row")[(first + i) % 3]
        problem = make_problem(
            leading, d, o, weight=weight, reduction=reduction, dtype=dtype, target_dtype=target_dtype, device=device
        )
        assert_as_exact_as_eager(problem)


@pytest.mark.parametrize("requires_grad", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("out_features", [3, 40])
def test_only_gradients_asked_for(device: str, out_features: int, requires_grad: tuple) -> None:
    for bias, weight, reduction in itertools.product([False, True], [None, "row"], ["mean", "sum", "none"]):
        problem = make_problem(
            (5, 7),
            11,
            out_features,
            bias=bias,
            weight=weight,
            reduction=reduction,
            requires_grad=requires_grad,
            device=device,
        )
        assert_as_exact_as_eager(problem)  # compares which gradients exist, too


@pytest.mark.parametrize("stride", [transposed, every_second, padded_rows, expanded])
@pytest.mark.parametrize("out_features", [1, 4, 33])
@pytest.mark.parametrize(("dtype", "target_dtype"), DTYPES)
def test_strides(device: str, stride, out_features: int, dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    problem = make_problem(
        310, 19, out_features, weight="element", dtype=dtype, target_dtype=target_dtype, device=device
    ).map(stride)
    assert_as_exact_as_eager(problem)


@pytest.mark.parametrize("out_features", [2, 24])
def test_leading_sizes_that_do_not_merge(device: str, out_features: int) -> None:
    problem = make_problem((4, 5, 6), 7, out_features, weight="row", device=device)
    problem = problem.map(lambda tensor: tensor.transpose(0, 1) if tensor.dim() > 2 else tensor)
    assert_as_exact_as_eager(problem)


@pytest.mark.parametrize(
    ("leading", "d", "o"), [((0,), 3, 2), ((0,), 3, 40), ((2, 0), 3, 1), ((4,), 0, 2), ((4,), 0, 40), ((4,), 3, 0)]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, "element", "row"])
def test_empty_sizes(device: str, leading: tuple, d: int, o: int, reduction: str, weight: str | None) -> None:
    assert_as_exact_as_eager(make_problem(leading, d, o, reduction=reduction, weight=weight, device=device))


def test_a_mean_over_weights_of_zero_is_nan_as_in_pytorch(device: str) -> None:
    problem = make_problem(6, 3, 2, weight="row", device=device)
    assert problem.weight is not None
    problem.weight.zero_()
    assert_as_exact_as_eager(problem)


def test_nan_and_infinity_reach_the_loss_and_only_their_gradients(device: str) -> None:
    for value in (float("nan"), float("inf")):
        problem = make_problem(40, 5, 3, device=device)
        problem.input[17, 2] = value
        results = problem.results(torchintro.linear_mse_loss)
        assert not results["loss"].isfinite()
        wrong_rows = (~results["input"].isfinite()).any(-1).nonzero().flatten().tolist()
        assert wrong_rows == [17]


@pytest.mark.parametrize("loss_scale", [2.0**16, 2.0**-10])
@pytest.mark.parametrize("out_features", [1, 48])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_gradients_survive_large_batches_and_loss_scales(
    device: str, out_features: int, reduction: str, loss_scale: float
) -> None:
    """The mean's gradients underflow float16 and the sum's overflow it unless the upstream factor comes first."""
    rows = 4096
    problem = make_problem(
        rows, 64, out_features, reduction=reduction, dtype=torch.float16, target_dtype=torch.float32, device=device
    )
    upstream = loss_scale if reduction == "mean" else loss_scale / rows / 2**16
    ours = problem.results(torchintro.linear_mse_loss, upstream)
    exact = problem.map(Tensor.double).results(torchintro.linear_mse_loss, upstream)
    info = torch.finfo(torch.float16)
    for name in ("input", "linear_weight", "linear_bias"):
        in_range = exact[name].abs() < info.max
        assert in_range.any()
        error = (ours[name].double() - exact[name])[in_range].abs().max()
        spacing = info.smallest_normal * info.eps  # of subnormal numbers: small results are multiples of it
        assert error <= 4 * info.eps * exact[name][in_range].abs().max() + 2 * spacing, name


@pytest.mark.parametrize("out_features", [1, 48])
def test_float16_gradients_survive_terms_that_cancel(device: str, out_features: int) -> None:
    """Far below its terms, a sum over rows must not be stored in float16 before the loss scale has multiplied it."""
    problem = make_problem(200000, 16, out_features, dtype=torch.float16, target_dtype=torch.float32, device=device)
    problem.target.mul_(1e-5)
    for parameter in (problem.linear_weight, problem.linear_bias):
        parameter.zero_()
    ours = problem.results(torchintro.linear_mse_loss, 2.0**16)
    exact = problem.map(Tensor.double).results(torchintro.linear_mse_loss, 2.0**16)
    for name in ("linear_weight", "linear_bias"):
        error = (ours[name].double() - exact[name]).norm() / exact[name].norm()
        assert error <= 4 * torch.finfo(torch.float16).eps, name


@pytest.mark.parametrize("per", ["row", "element"])
@pytest.mark.parametrize("out_features", [1, 48])
def test_float16_mean_over_few_weights(device: str, out_features: int, per: str) -> None:
    """Its terms are large before the upstream gradient is known: as many times as there are weights that are zero."""
    problem = make_problem(100000, 8, out_features, weight=per, dtype=torch.float16, device=device)
    assert problem.weight is not None
    problem.weight.zero_()
    problem.weight[7] = 1
    assert_as_exact_as_eager(problem)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_gradients_survive_many_outputs(device: str, reduction: str) -> None:
    """The input's gradient sums over the outputs: more than float16 holds, were it not for the mean's factor."""
    problem = make_problem(64, 16, 8200, weight="row", reduction=reduction, dtype=torch.float16, device=device)
    problem.linear_weight.abs_().add_(1)
    problem.input.abs_()  # large residuals, all of one sign
    ours = problem.results(torchintro.linear_mse_loss, 1e-6 if reduction == "sum" else 1.0)
    assert all(value.isfinite().all() for name, value in ours.items() if name != "loss")
    assert ours["input"].abs().max() > 0


@pytest.mark.parametrize(("rows", "d", "o"), [(100, 1, 1), (5000, 70, 3), (5000, 70, 40)])
def test_same_bits_from_run_to_run(device: str, rows: int, d: int, o: int) -> None:
    problem = make_problem(rows, d, o, dtype=torch.float32, device=device)
    first = problem.results(torchintro.linear_mse_loss)
    for _ in range(3):
        again = problem.results(torchintro.linear_mse_loss)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("rows", "d", "o"), [(5000, 70, 1), (40000, 9, 3)])
def test_few_outputs_give_the_same_bits_for_any_number_of_threads(rows: int, d: int, o: int) -> None:
    problem = make_problem(rows, d, o, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(problem.results(torchintro.linear_mse_loss))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("out_features", [5, 17, 20, 33])
def test_an_infinite_row_weight_is_not_nan(device: str, out_features: int) -> None:
    """Vectors that reach beyond the last output hold zeros there, and infinity times zero would be NaN."""
    leaves = [torch.ones(3, 2), torch.ones(out_features, 2), torch.zeros(3, out_features)]
    x, w, t = (tensor.to(device) for tensor in leaves)
    weight = torch.tensor([1.0, float("inf"), 1.0], device=device)
    assert torchintro.linear_mse_loss(x, w.requires_grad_(), t, weight=weight, reduction="sum").item() == float("inf")


def test_the_sum_of_weights_over_many_pieces(device: str) -> None:
    weight = torch.rand(3000, 900, device=device)
    x, w, t = torch.zeros(3000, 2), torch.zeros(900, 2), torch.ones(3000, 900)
    x, w, t = (tensor.to(device) for tensor in (x, w, t))
    for given in (weight, weight[:, 0]):
        loss = torchintro.linear_mse_loss(x, w, t, weight=given)
        torch.testing.assert_close(loss, torch.ones_like(loss))
