"""Device memory: what a step takes besides its results, and tensors of more elements than 32 bits can count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchintro import _C, linear_mse_loss, reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(_C.build_info()["cuda"] == "", reason="built without CUDA"),
]

MIB = 2**20


@pytest.fixture
def device() -> str:
    return "cuda"


def extra_memory(step: Callable[[], object], leaves: list[Tensor]) -> int:
    """The peak of a step's memory, beyond what is there before it and the leaves' gradients that are there after it."""
    for _ in range(2):  # the first makes cuBLAS's workspace
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        kept = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
        extra = torch.cuda.max_memory_allocated() - before - kept
    return extra


# The sums of linear_weight's gradient are float32 whatever the dtype: it takes some times as many rows as features for
# them to be small beside the predictions that eager stores.
@pytest.mark.parametrize("with_input_gradient", [False, True])
@pytest.mark.parametrize(
    ("rows", "d", "o", "dtype"),
    [
        (32768, 64, 4096, torch.float32),
        (16384, 256, 8192, torch.bfloat16),
        (16384, 1024, 4096, torch.bfloat16),
        (65536, 4096, 8192, torch.bfloat16),
    ],
)
def test_memory_of_many_outputs_is_a_chunk(
    rows: int, d: int, o: int, dtype: torch.dtype, with_input_gradient: bool
) -> None:
    x, w, t = (torch.randn(size, device="cuda", dtype=dtype) for size in ((rows, d), (o, d), (rows, o)))
    x.requires_grad_(with_input_gradient)
    w.requires_grad_()

    def extra(operator: Callable[..., Tensor]) -> int:
        return extra_memory(lambda: operator(x, w, t).backward(), [x, w])

    ours, eager = extra(linear_mse_loss), extra(reference.linear_mse_loss)
    assert ours <= 0.35 * eager, f"{ours / MIB:.0f} MiB beside eager's {eager / MIB:.0f} MiB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_features", [1, 4, 40])
def test_only_gradients_asked_for_take_memory(out_features: int, dtype: torch.dtype) -> None:
    """With few rows' worth of everything else, what is as large as the input can only be its gradient."""
    x, w, t = (
        torch.randn(size, device="cuda", dtype=dtype)
        for size in ((65536, 512), (out_features, 512), (65536, out_features))
    )

    def extra(*wanted: Tensor) -> int:
        for leaf in (x, w, t):
            leaf.requires_grad_(any(leaf is one for one in wanted))
        losses = []

        def step() -> None:
            losses[:] = [linear_mse_loss(x, w, t)]  # holds the gradients that the forward pass has computed

        return extra_memory(step, [])

    assert extra() <= 0.25 * x.nbytes
    assert extra(w) <= 0.25 * x.nbytes
    assert extra(w, t) <= 0.25 * x.nbytes
    assert x.nbytes <= extra(x) <= 1.25 * x.nbytes
    assert x.nbytes <= extra(x, w) <= 1.25 * x.nbytes


BEYOND_32_BITS = 2**31


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_features", [3, 40])
def test_gradient_of_the_input_beyond_32_bit_indices(out_features: int, dtype: torch.dtype) -> None:
    """Several outputs. The input is one row, expanded: only its gradient has memory of its own."""
    d = 64
    rows = BEYOND_32_BITS // d + 3
    x = torch.ones(1, d, dtype=dtype, device="cuda").expand(rows, d).requires_grad_()
    w = torch.ones(out_features, d, dtype=dtype, device="cuda", requires_grad=True)
    t = torch.full((rows, out_features), d, dtype=dtype, device="cuda")
    t[-1] = 0  # every prediction is d, and right but in the last row; all numbers are whole and exact in either dtype
    loss = linear_mse_loss(x, w, t, reduction="sum")
    grad_x, grad_w = torch.autograd.grad(loss, (x, w))
    assert loss.item() == out_features * d * d
    assert (grad_w == 2 * d).all()
    assert (grad_x[-1] == 2 * d * out_features).all()
    assert not grad_x[:-1].any()


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
