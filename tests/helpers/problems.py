"""Random calls of the operator, and the comparison of its results with float64 and with eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from torchintro import linear_mse_loss, reference

NAMES = ("input", "linear_weight", "target", "linear_bias")
# Every device the operator has kernels for: one suite for all.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
# The dtypes of input (and parameters) and of target that the operator takes.
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """One call: the tensors as leaves, and which of them require a gradient (in the order of NAMES)."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None = None
    weight: Tensor | None = None
    reduction: str = "mean"
    requires_grad: tuple[bool, bool, bool, bool] = (True, True, True, True)

    def tensors(self) -> list[Tensor | None]:
        return [self.input, self.linear_weight, self.target, self.linear_bias]

    def map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """Apply a function to every tensor."""

        def apply(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        return replace(
            self,
            input=function(self.input),
            linear_weight=function(self.linear_weight),
            target=function(self.target),
            linear_bias=apply(self.linear_bias),
            weight=apply(self.weight),
        )

    def leaves(self) -> list[Tensor | None]:
        """Detach the four tensors, keeping their strides, with requires_grad as asked for."""
        return [
            None if tensor is None else tensor.detach().requires_grad_(wanted)
            for tensor, wanted in zip(self.tensors(), self.requires_grad, strict=True)
        ]

    def call(self, operator: Operator, leaves: Sequence[Tensor | None] | None = None) -> Tensor:
        x, w, t, b = self.tensors() if leaves is None else leaves
        return operator(x, w, t, linear_bias=b, weight=self.weight, reduction=self.reduction)

    def results(self, operator: Operator, upstream: float = 1.0) -> dict[str, Tensor]:
        """Compute the loss and the gradients of ``upstream * loss.sum()`` that exist."""
        leaves = self.leaves()
        loss = self.call(operator, leaves)
        results = {"loss": loss.detach()}
        if loss.requires_grad:
            (loss.sum() * upstream).backward()
        for name, leaf in zip(NAMES, leaves, strict=True):
            if leaf is not None and leaf.grad is not None:
                results[name] = leaf.grad
        return results


def make_problem(
    leading: Sequence[int] | int,
    in_features: int,
    out_features: int,
    *,
    bias: bool = True,
    weight: str | None = None,
    reduction: str = "mean",
    requires_grad: tuple[bool, bool, bool, bool] = (True, True, True, True),
    dtype: torch.dtype = torch.float64,
    target_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Problem:
    """Draw a problem whose target is near its prediction; ``weight`` is None, "element" or "row"."""
    rows = (leading,) if isinstance(leading, int) else tuple(leading)
    target_dtype = target_dtype or dtype

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype)

    return Problem(
        input=draw(*rows, in_features, dtype=dtype),
        linear_weight=draw(out_features, in_features, dtype=dtype),
        target=draw(*rows, out_features, dtype=target_dtype),
        linear_bias=draw(out_features, dtype=dtype) if bias else None,
        weight=None
        if weight is None
        else draw(*rows, *([out_features] * (weight == "element")), dtype=target_dtype).abs(),
        reduction=reduction,
        requires_grad=(*requires_grad[:3], requires_grad[3] and bias),
    )


# Views with the same values and other strides; what lies between the values is nan.


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def every_second(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], dim=-1)[..., 0]


def padded_rows(tensor: Tensor) -> Tensor:
    return torch.nn.functional.pad(tensor, (1, 2), value=float("nan"))[..., 1:-2]


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


def term_sums(problem: Problem, upstream: float = 1.0) -> dict[str, Tensor]:
    """Add up the absolute values of what each result is the sum of: the formula on them, with the target negated."""
    absolute = problem.map(lambda tensor: tensor.double().abs())
    return replace(absolute, target=-absolute.target).results(reference.linear_mse_loss, abs(upstream))


def in_blocks(*arguments: Tensor | None, **options: Any) -> Tensor:
    """Compute the reference with rows multiplied in blocks: some BLAS adds up all rows of a product in one long sum."""
    linear = F.linear

    def linear_in_blocks(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.numel() == 0:
            return linear(input, weight, bias)
        blocks = [linear(block, weight, bias) for block in input.reshape(-1, input.shape[-1]).split(1024)]
        return torch.cat(blocks).view(*input.shape[:-1], weight.shape[0])

    with mock.patch.object(F, "linear", linear_in_blocks):
        return reference.linear_mse_loss(*arguments, **options)


def assert_as_exact_as_eager(problem: Problem, *, upstream: float = 0.7, operator: Operator = linear_mse_loss) -> None:
    """Compare with float64: no error may be larger than a small multiple of eager PyTorch's in the same dtype.

    The bound has a second term, for what eager happens to hit exactly: a few roundings of every term of the sums that
    make a result, before anything cancels.
    """
    ours = problem.results(operator, upstream)
    # Side by side in memory: with AMX, eager's 16-bit products of torch 2.13 are NaN where NaN lies between the rows.
    eager = problem.map(Tensor.contiguous).results(reference.linear_mse_loss, upstream)
    exact = problem.map(Tensor.double).results(in_blocks, upstream)
    terms = term_sums(problem, upstream)
    assert ours.keys() == eager.keys() == exact.keys()
    for name, value in ours.items():
        assert value.shape == exact[name].shape, name
        assert value.dtype == eager[name].dtype, name
        # Not fused, "none" stores the prediction as eager does, and what eager's product rounds well is luck.
        rounded = problem.input.dtype if problem.reduction == "none" else value.dtype
        eps = max(torch.finfo(rounded).eps, torch.finfo(value.dtype).eps)
        assert_close_to_exact(value, eager[name], exact[name], eps * terms[name], name)


def assert_close_to_exact(ours: Tensor, eager: Tensor, exact: Tensor, roundings: Tensor, name: str) -> None:
    if exact.numel() == 0:
        return
    assert torch.equal(ours.isnan(), exact.isnan()), f"{name}: nan"
    defined = (exact.abs() <= torch.finfo(ours.dtype).max) & ~exact.isnan()  # beyond, inf is the right answer
    if not defined.any():
        return
    eager_error = (eager[defined].double() - exact[defined]).abs().nan_to_num(0.0, posinf=0.0).max()
    error = (ours[defined].double() - exact[defined]).abs().max()
    rounding = roundings[defined].abs().max()
    if ours.dtype == torch.float64:  # the yardstick is not more exact itself but for its shorter sums
        rounding *= 8
    bound = 4 * (eager_error + rounding)
    assert error <= bound, f"{name}: error {error:.3e} is above {bound:.3e} (eager's is {eager_error:.3e})"


def assert_sorted_rows_lose_no_digits(rows: int, out_features: int, dtype: torch.dtype, device: str) -> None:
    """Blocks of rows have large shares of the weight's gradient, which cancel: rounded, nothing would be left."""
    x = (1 + 0.5 * torch.randn(rows, 16)).to(dtype)
    w = torch.zeros(out_features, 16, dtype=dtype)
    t = (torch.linspace(-1, 1, rows)[:, None] + 0.01 * torch.randn(rows, out_features)).to(dtype)
    # Eager's float16 gradients of a mean underflow without a scale.
    scale = 1.0 if dtype == torch.bfloat16 else 2.0**15

    def gradient(operator: Operator, dtype: torch.dtype) -> Tensor:
        moved = [tensor.to(device, dtype, copy=True) for tensor in (x, w, t)]  # no gradient is added to another call's
        moved[1].requires_grad_()
        (operator(*moved) * scale).backward()
        return moved[1].grad.double() / scale

    exact = gradient(reference.linear_mse_loss, torch.float64)

    def error(operator: Operator) -> float:
        return ((gradient(operator, dtype) - exact).norm() / exact.norm()).item()

    assert error(linear_mse_loss) <= 1.2 * error(reference.linear_mse_loss) + torch.finfo(dtype).eps
