"""A peer: the fused loss as it can be written in plain PyTorch, over chunks of rows, with the gradients of the forward.

The plan is that of the chunked fused losses for language models: the prediction of a chunk is made, turned into its own
gradient in place and used up, so that nothing of N x O elements is ever held beyond one chunk. Products are PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["CHUNK_ELEMENTS", "ChunkedLinearMSE", "linear_mse_loss"]

# Predictions held at once: 32 MiB in 16 bits, which are thousands of rows of a product, enough to fill a GPU.
CHUNK_ELEMENTS = 1 << 24


class ChunkedLinearMSE(torch.autograd.Function):
    """The mean squared error of a linear layer, differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, chunk_elements: int
    ) -> Tensor:
        """Compute the loss, and with it the gradients that backward will be asked for."""
        rows, outputs = target.shape
        scale = 2.0 / target.numel()
        accumulator = torch.promote_types(target.dtype, torch.float32)
        total = torch.zeros((), dtype=accumulator, device=input.device)
        wanted = ctx.needs_input_grad
        d_input = torch.empty_like(input) if wanted[0] else None
        d_weight = torch.zeros_like(linear_weight) if wanted[1] else None
        d_target = torch.empty_like(target) if wanted[2] else None
        d_bias = torch.zeros(outputs, dtype=accumulator, device=input.device) if wanted[3] else None

        size = max(1, chunk_elements // outputs)
        for start in range(0, rows, size):
            part = slice(start, min(start + size, rows))
            X = input[part]
            transposed = linear_weight.t()
            # As eager does: where the library can, the bias is added before the product is written.
            error = torch.mm(X, transposed) if linear_bias is None else torch.addmm(linear_bias, X, transposed)
            error.sub_(target[part])
            total += torch.linalg.vector_norm(error, dtype=accumulator).square()
            gradient = error.mul_(scale)
            if d_input is not None:
                torch.mm(gradient, linear_weight, out=d_input[part])
            if d_weight is not None:
                d_weight.addmm_(gradient.t(), X)
            if d_bias is not None:
                d_bias += gradient.sum(0, dtype=accumulator)
            if d_target is not None:
                torch.neg(gradient, out=d_target[part])
            del error, gradient  # else this chunk is still held while the next is made
        if d_bias is not None and linear_bias is not None:
            d_bias = d_bias.to(linear_bias.dtype)
        ctx.save_for_backward(d_input, d_weight, d_target, d_bias)
        return (total / target.numel()).to(target.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients in place; to ask first whether the factor is 1 would make the host wait for a GPU."""
        gradients = ctx.saved_tensors
        return (*(gradient if gradient is None else gradient.mul_(upstream) for gradient in gradients), None)


def linear_mse_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Return the mean squared error of a linear layer.

    Args:
        input: ``(N, D)``.
        linear_weight: ``(O, D)``.
        target: ``(N, O)``.
        linear_bias: ``(O,)``.
        chunk_elements: Elements of the prediction that are held at once, at least one row.
    """
    loss: Tensor = ChunkedLinearMSE.apply(input, linear_weight, target, linear_bias, chunk_elements)  # type: ignore[no-untyped-call]
    return loss
