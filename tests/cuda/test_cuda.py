"""What only a GPU can show; values, gradients and errors are tested on every device in the other files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from problems import (
    DTYPES,
    NAMES,
    Problem,
    assert_as_exact_as_eager,
    assert_sorted_rows_lose_no_digits,
    make_problem,
    padded_rows,
    transposed,
)
from torch import Tensor

from torchintro import _C, LinearMSELoss, linear_mse_loss

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(_C.build_info()["cuda"] == "", reason="built without CUDA"),
]

# Sizes at which the kernels change course: fewer threads a row from 32768 rows on, more than one pass and one split a
# block, rows longer than a block's share, one feature, sizes that no pack divides, more than one chunk of rows, and
# more rows than a float accumulator may add one by one.
SHAPES = [
    (33000, 64, 1),
    (40000, 33, 3),
    (70000, 1, 1),
    (100000, 4, 2),
    (3, 5000, 2),
    (1000, 4097, 5),
    (5000, 256, 16),
    (45000, 8, 400),
    (18000, 8, 1000),
    (3000000, 8, 1),
]
# Few and many outputs: kernels of this package's own, and PyTorch's products around one.
REGIMES = [3, 40]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize(("dtype", "target_dtype"), DTYPES)
def test_every_dtype_at_sizes_of_a_gpu(shape: tuple, dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    rows, d, o = shape
    problem = make_problem(rows, d, o, weight="row", dtype=dtype, target_dtype=target_dtype, device="cuda")
    assert_as_exact_as_eager(problem)


# Rows that no block of threads holds at once, and one row, for which nothing is shared.
@pytest.mark.parametrize("out_features", [1, 3, 16])
@pytest.mark.parametrize(("rows", "d"), [(40, 20000), (40, 70001), (1, 70001), (1, 8), (1, 1)])
@pytest.mark.parametrize(("dtype", "target_dtype"), DTYPES)
def test_long_rows_and_one_row(
    rows: int, d: int, out_features: int, dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    assert_as_exact_as_eager(
        make_problem(rows, d, out_features, weight="row", dtype=dtype, target_dtype=target_dtype, device="cuda")
    )


def aligned_rows(tensor: Tensor) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 8), value=float("nan"))[..., :-8]


# Sizes at which bfloat16 goes to the tensor cores, and their neighbours that do not. Rows that start at multiples of 16
# bytes can be loaded in packs, and others cannot.
@pytest.mark.parametrize("layout", [Tensor.contiguous, aligned_rows, padded_rows])
@pytest.mark.parametrize("out_features", [1, 2, 3, 4, 8, 9, 16, 17])
@pytest.mark.parametrize("d", [8, 20, 64, 128, 136, 1024, 2048, 4096])
def test_bfloat16_products(d: int, out_features: int, layout: Callable[[Tensor], Tensor]) -> None:
    masks = [(True, True, True, True), (False, True, False, True), (True, False, False, False)]
    for rows, requires_grad in itertools.product([1, 129, 1037], masks):
        for target_dtype in (torch.bfloat16, torch.float32):
            problem = make_problem(
                rows,
                d,
                out_features,
                weight="row" if rows == 129 else None,
                requires_grad=requires_grad,
                dtype=torch.bfloat16,
                target_dtype=target_dtype,
                device="cuda",
            )
            problem = replace(problem, input=layout(problem.input))
            assert_as_exact_as_eager(problem)
            first, again = (problem.results(linear_mse_loss) for _ in range(2))
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("out_features", [1, 6, 16])
def test_column_major_input(out_features: int) -> None:
    problem = make_problem(3000, 37, out_features, dtype=torch.float32, device="cuda")
    assert_as_exact_as_eager(problem.map(transposed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_sorted_by_target_lose_no_digits(dtype: torch.dtype) -> None:
    assert_sorted_rows_lose_no_digits(20000, 8192, dtype, "cuda")  # in chunks of 2048 rows


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """Let PyTorch raise an error for every wait of the host for the device."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def results_without_waiting(problem: Problem) -> dict[str, Tensor]:
    problem.results(linear_mse_loss)  # libraries that set themselves up may wait
    with waits_are_errors():
        return problem.results(linear_mse_loss, upstream=0.5)


@pytest.mark.parametrize("weight", [None, "element", "row"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("out_features", REGIMES)
@pytest.mark.parametrize(("dtype", "target_dtype"), DTYPES)
def test_the_host_never_waits(
    dtype: torch.dtype, target_dtype: torch.dtype, out_features: int, reduction: str, weight: str | None
) -> None:
    problem = make_problem(
        50,
        7,
        out_features,
        weight=weight,
        reduction=reduction,
        dtype=dtype,
        target_dtype=target_dtype,
        device="cuda",
    )
    assert results_without_waiting(problem).keys() == {"loss", *NAMES}


@pytest.mark.parametrize(("rows", "out_features"), [(0, 3), (0, 40), (5, 0)])
def test_the_host_never_waits_for_nothing(rows: int, out_features: int) -> None:
    results_without_waiting(make_problem(rows, 7, out_features, weight="row", device="cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_features", REGIMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_host_never_waits_in_a_training_step_under_autocast(
    dtype: torch.dtype, out_features: int, weighted: bool
) -> None:
    body = torch.nn.Linear(7, 7, device="cuda")
    criterion = LinearMSELoss(7, out_features, device="cuda")
    x, y = torch.randn(50, 7, device="cuda"), torch.randn(50, out_features, device="cuda")
    weight = torch.rand(50, device="cuda") if weighted else None
    optimizer = torch.optim.SGD([*body.parameters(), *criterion.parameters()], lr=0.1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype):
            loss = criterion(body(x), y, weight)
        loss.backward()
        optimizer.step()

    step()
    before = criterion.linear.weight.detach().clone()
    with waits_are_errors():
        step()
    assert not torch.equal(criterion.linear.weight, before)


@pytest.mark.parametrize("out_features", REGIMES)
def test_runs_on_the_current_stream(out_features: int) -> None:
    ready = make_problem(1000, 30, out_features, weight="row", device="cuda")
    expected = ready.results(linear_mse_loss)
    late = ready.map(torch.zeros_like)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # a kernel on any other stream would be done before the data arrive
        for name in ("input", "linear_weight", "target", "linear_bias", "weight"):
            getattr(late, name).copy_(getattr(ready, name))
        results = late.results(linear_mse_loss)
    torch.cuda.synchronize()
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("out_features", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward_on_another_stream_than_forward(dtype: torch.dtype, out_features: int) -> None:
    problem = make_problem(1000, 30, out_features, dtype=dtype, device="cuda")
    leaves = problem.leaves()
    expected = torch.autograd.grad(problem.call(linear_mse_loss, leaves), leaves)
    factor = 0.5  # exact in every dtype
    upstream = torch.full((), float("nan"), dtype=dtype, device="cuda")
    forward_stream, backward_stream = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(forward_stream):
        torch.cuda._sleep(100_000_000)  # a backward pass that did not wait for the forward pass would read nothing
        loss = problem.call(linear_mse_loss, leaves)
    with torch.cuda.stream(backward_stream):
        torch.cuda._sleep(200_000_000)  # and one on the forward pass's stream alone, no upstream gradient yet
        upstream.fill_(factor)
        results = [gradient.clone() for gradient in torch.autograd.grad(loss, leaves, upstream)]
    torch.cuda.synchronize()
    for result, gradient in zip(results, expected, strict=True):
        torch.testing.assert_close(result, factor * gradient)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("out_features", REGIMES)
def test_runs_on_the_device_of_its_arguments(out_features: int) -> None:
    first = make_problem(1000, 30, out_features, weight="row", device="cuda:0")
    second = first.map(lambda tensor: tensor.to("cuda:1"))
    expected = first.results(linear_mse_loss)
    results = second.results(linear_mse_loss)
    assert torch.cuda.current_device() == 0
    assert {result.device for result in results.values()} == {torch.device("cuda:1")}
    torch.testing.assert_close({name: result.to("cuda:0") for name, result in results.items()}, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_features", [1, 7, 16, 40])
def test_same_bits_from_run_to_run(out_features: int, dtype: torch.dtype) -> None:
    problem = make_problem(20000, 65, out_features, weight="element", dtype=dtype, device="cuda")
    first = problem.results(linear_mse_loss)
    for _ in range(5):
        again = problem.results(linear_mse_loss)
        for name, result in again.items():
            assert torch.equal(result, first[name]), name
