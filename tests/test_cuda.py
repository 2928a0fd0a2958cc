"""What only a GPU can show; values, gradients and errors are tested on every device in the other files."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from problems import (
    DTYPES,
    NAMES,
    Problem,
    assert_as_exact_as_eager,
    assert_sorted_rows_lose_no_digits,
    make_problem,
    transposed,
)
from torch import Tensor

from torchintro import _C, linear_mse_loss, reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(_C.build_info()["cuda"] == "", reason="built without CUDA"),
]

# Sizes at which the kernels change course: fewer threads a row from 32768 rows on, more than one pass and one split a
# block, rows longer than a block's share, one feature, sizes that no pack divides, and more than one chunk of rows.
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
]
# Few and many outputs: kernels of this package's own, and PyTorch's products around one.
REGIMES = [3, 40]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize(("dtype", "target_dtype"), DTYPES)
def test_every_dtype_at_sizes_of_a_gpu(shape: tuple, dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    rows, d, o = shape
    problem = make_problem(rows, d, o, weight="row", dtype=dtype, target_dtype=target_dtype, device="cuda")
    assert_as_exact_as_eager(problem)


@pytest.mark.parametrize("out_features", [1, 6, 16])
def test_column_major_input(out_features: int) -> None:
    problem = make_problem(3000, 37, out_features, dtype=torch.float32, device="cuda")
    assert_as_exact_as_eager(problem.map(transposed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_sorted_by_target_lose_no_digits(dtype: torch.dtype) -> None:
    assert_sorted_rows_lose_no_digits(20000, 8192, dtype, "cuda")  # in chunks of 2048 rows


def results_without_waiting(problem: Problem) -> dict[str, Tensor]:
    """Run forward and backward while PyTorch raises an error for every wait of the host for the device."""
    problem.results(linear_mse_loss)  # libraries that set themselves up may wait
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return problem.results(linear_mse_loss, upstream=0.5)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("weight", [None, "element", "row"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("out_features", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_host_never_waits(dtype: torch.dtype, out_features: int, reduction: str, weight: str | None) -> None:
    problem = make_problem(50, 7, out_features, weight=weight, reduction=reduction, dtype=dtype, device="cuda")
    assert results_without_waiting(problem).keys() == {"loss", *NAMES}


@pytest.mark.parametrize(("rows", "out_features"), [(0, 3), (0, 40), (5, 0)])
def test_the_host_never_waits_for_nothing(rows: int, out_features: int) -> None:
    results_without_waiting(make_problem(rows, 7, out_features, weight="row", device="cuda"))


def sgd_step(x: Tensor, w: Tensor, t: Tensor, b: Tensor, v: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        loss = linear_mse_loss(x, w, t, linear_bias=b, weight=v)
        grad_w, grad_b = torch.autograd.grad(loss, (w, b))
        with torch.no_grad():
            w.sub_(0.1 * grad_w)
            b.sub_(0.1 * grad_b)
        return loss.detach()

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_features", REGIMES)
def test_graph_of_a_training_step(out_features: int, dtype: torch.dtype) -> None:
    x = torch.randn(500, 20, device="cuda", dtype=dtype)
    t = torch.randn(500, out_features, device="cuda", dtype=dtype)
    v = torch.rand(500, device="cuda", dtype=dtype)
    w0, b0 = torch.randn(out_features, 20, device="cuda"), torch.randn(out_features, device="cuda")

    def parameters() -> tuple[Tensor, Tensor]:
        return w0.to(dtype, copy=True).requires_grad_(), b0.to(dtype, copy=True).requires_grad_()

    w, b = parameters()
    eager_step = sgd_step(x, w, t, b, v)
    expected = [eager_step() for _ in range(5)]

    captured_w, captured_b = parameters()
    step = sgd_step(x, captured_w, t, captured_b, v)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        captured_w.copy_(w0)
        captured_b.copy_(b0)
    losses = []
    for _ in range(5):
        graph.replay()
        losses.append(loss.clone())

    def check(captured: Tensor, eager: Tensor) -> None:
        if out_features <= 16:  # the same kernels in the same order; PyTorch may choose another product under capture
            assert torch.equal(captured, eager)
        else:
            rounding = 100 * torch.finfo(dtype).eps if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(captured, eager, rtol=rounding, atol=rounding)

    check(torch.stack(losses), torch.stack(expected))
    check(captured_w, w)
    check(captured_b, b)

    x.copy_(2 * x)  # a replay reads the tensors that are there now
    graph.replay()
    check(loss, eager_step())


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


def extra_memory(operator: Callable[..., Tensor], x: Tensor, w: Tensor, t: Tensor) -> int:
    """The peak of a training step's memory, beyond what is there before and the gradients that are there after it."""
    for _ in range(2):  # the first makes cuBLAS's workspace
        w.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        operator(x, w, t).backward()
        assert w.grad is not None
        extra = torch.cuda.max_memory_allocated() - before - w.grad.nbytes
    return extra


def test_memory_of_many_outputs_is_a_chunk() -> None:
    x, w, t = (torch.randn(*size, device="cuda") for size in ((32768, 64), (4096, 64), (32768, 4096)))
    w.requires_grad_()
    ours = extra_memory(linear_mse_loss, x, w, t)
    eager = extra_memory(reference.linear_mse_loss, x, w, t)
    assert ours <= 0.35 * eager, f"{ours / 2**20:.0f} MiB beside eager's {eager / 2**20:.0f} MiB"


BEYOND_32_BITS = 2**31


@pytest.fixture
def needs_20_gb() -> Iterator[None]:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB of free device memory")
    yield
    torch.cuda.empty_cache()


@pytest.mark.slow
@pytest.mark.usefixtures("needs_20_gb")
def test_input_beyond_32_bit_indices() -> None:
    d = 64
    x = torch.zeros(BEYOND_32_BITS // d + 3, d, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1  # all rows but the last predict 0, which is right
    x.requires_grad_()
    w = torch.ones(1, d, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    t = torch.zeros(x.shape[0], 1, device="cuda", requires_grad=True)
    loss = linear_mse_loss(x, w, t, reduction="sum")
    grad_x, grad_w, grad_t = torch.autograd.grad(loss, (x, w, t))
    assert loss.item() == d * d
    assert (grad_w == 2 * d).all()
    assert (grad_x[-1] == 2 * d).all()
    assert not grad_x[:-1].any()
    assert grad_t[-1].item() == -2 * d
    assert not grad_t[:-1].any()


@pytest.mark.slow
@pytest.mark.usefixtures("needs_20_gb")
@pytest.mark.parametrize("out_features", [1, 4096])
def test_target_beyond_32_bit_indices(out_features: int) -> None:
    rows = BEYOND_32_BITS // out_features + 3
    x = torch.ones(1, 1, dtype=torch.bfloat16, device="cuda").expand(rows, 1)
    w = torch.ones(out_features, 1, dtype=torch.bfloat16, device="cuda")
    t = torch.zeros(rows, out_features, dtype=torch.bfloat16, device="cuda")
    t[-1] = 3  # every prediction is 1
    t.requires_grad_()
    (grad_t,) = torch.autograd.grad(linear_mse_loss(x, w, t, reduction="sum"), t)
    assert (grad_t[-1] == 4).all()
    assert (grad_t[:-1] == -2).all()
