"""The operator as a function."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.jit import _builtins as _script_builtins

from . import _extension as _library
from ._dtensor import register_when_imported

__all__ = ["linear_full_batch_fit", "linear_mse_loss"]


def linear_mse_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the mean squared error of a linear layer, and in training its gradients, in one pass over ``input``.

    Equal to ``F.mse_loss(F.linear(input, linear_weight, linear_bias), target, reduction=reduction)``, without the
    prediction ever being stored. The gradients of :math:`s \sum v (x W^\top + b - t)^2` are computed in the forward
    pass; the backward pass scales them.

    Args:
        input: :math:`(*, D)`, D = ``in_features``; any leading shape, any strides. float64, float32, bfloat16 or
            float16.
        linear_weight: :math:`(O, D)`, O = ``out_features``; ``input``'s dtype.
        target: :math:`(*, O)`, the prediction's shape: nothing is broadcast. ``input``'s dtype, or float32 for a 16-bit
            ``input``; the loss has the dtype of ``target``.
        linear_bias: :math:`(O,)`, or None.
        weight: How much each error counts: :math:`(*, O)` per element or :math:`(*)` per row, ``target``'s dtype; takes
            no gradient.
        reduction: ``"mean"`` (over the elements; weighted, divided by the sum of the weights over all elements),
            ``"sum"``, or ``"none"`` (the squared errors, not fused: they are as large as the prediction).

    Returns:
        The loss: a 0-dim tensor, or of ``target``'s shape for ``reduction="none"``. Differentiable in ``input``,
        ``linear_weight``, ``target`` and ``linear_bias``, any number of times; only gradients asked for are computed.

    Raises:
        ValueError: A shape, a device or ``reduction`` is wrong, or ``weight`` requires a gradient.
        TypeError: A dtype or layout is not supported, or dtypes are mixed.

    Example:
        >>> x, w, t = torch.ones(4, 3), torch.zeros(1, 3, requires_grad=True), torch.ones(4, 1)
        >>> loss = linear_mse_loss(x, w, t)
        >>> loss.backward()
        >>> loss.item(), w.grad
        (1.0, tensor([[-2., -2., -2.]]))
    """
    if not is_dynamo_compiling():  # torch.compile knows operators, not Python's C functions
        direct = _direct_call(input, linear_weight, target, linear_bias, weight, reduction)
        if direct is not None:
            return direct
    loss: Tensor = _operator(input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction)
    return loss


def linear_full_batch_fit(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, lr: Tensor
) -> Tensor:
    r"""Train a linear layer in place by gradient descent on all rows, every epoch of it in this one call.

    Equivalent, within rounding, to as many steps of ``torch.optim.SGD`` on ``linear_mse_loss`` as ``lr`` has elements.
    It is the least that :func:`torchintro.fit` with the engine ``"statistics"`` does, without its checks, options and
    callbacks: for the smallest problems, and for programs without Python, where it is the operator
    ``torchintro::linear_full_batch_fit`` (which takes the other optimizers too: see ``csrc/fit/fit.h``).

    Args:
        input: :math:`(N, D)`, D = ``in_features``; float64, float32, bfloat16 or float16.
        linear_weight: :math:`(O, D)`, O = ``out_features``, float32 or float64; trained in place, outside autograd.
        target: :math:`(N, O)`; ``input``'s dtype or float32.
        linear_bias: :math:`(O,)`, ``linear_weight``'s dtype, trained in place, or None.
        lr: :math:`(E,)`, float64 on the CPU: the learning rate of each epoch.

    Returns:
        The loss of each epoch before its update, :math:`(E,)`, float64 on the CPU. From the epoch on in which it is not
        finite, NaN or infinite; the parameters are then those of the last finite loss.

    Raises:
        ValueError: A shape or a device is wrong.
        TypeError: A dtype is not supported.

    Example:
        >>> x, w = torch.ones(4, 1), torch.zeros(1, 1)
        >>> linear_full_batch_fit(x, w, 3 * x, lr=torch.full((2,), 0.5, dtype=torch.float64))
        tensor([9., 0.], dtype=torch.float64)
        >>> w
        tensor([[3.]])
    """
    direct = _direct_fit(input, target, linear_weight, linear_bias, lr)
    if direct is None:
        direct = torch.ops.torchintro.linear_full_batch_fit(input, target, linear_weight, linear_bias, lr)
    losses: Tensor = direct
    return losses


_operator = torch.ops.torchintro.linear_mse_loss.default
_direct_call, _direct_fit = _library.direct_calls

# TorchScript compiles no function with keyword-only defaults; as torch.nn.functional does for its own, the function is
# named as the operator's Python face, and a script calls the operator.
_script_builtins._register_builtin(linear_mse_loss, "torchintro::linear_mse_loss")
register_when_imported()
