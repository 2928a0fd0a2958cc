"""Checks of arguments that several functions share: each raises one sentence naming function, argument and value."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = [
    "boolean",
    "check_finite",
    "fraction",
    "integer",
    "matrix",
    "non_negative",
    "one_of",
    "plain_linear",
    "positive",
    "positive_integer",
    "regression_data",
    "tensor",
]


def _number(function: str, name: str, value: object, kind: str, is_right: Callable[[float], bool]) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{function}: {name} must be {kind}, but got {value!r}")
    number = float(value)
    if not is_right(number):
        raise ValueError(f"{function}: {name} must be {kind}, but got {value!r}")
    return number


def positive(function: str, name: str, value: object) -> float:
    """Return ``value`` as a float greater than zero and finite."""
    return _number(function, name, value, "a positive, finite number", lambda number: 0 < number < math.inf)


def non_negative(function: str, name: str, value: object) -> float:
    """Return ``value`` as a float of at least zero and finite."""
    return _number(function, name, value, "a finite number of at least 0", lambda number: 0 <= number < math.inf)


def fraction(function: str, name: str, value: object) -> float:
    """Return ``value`` as a float strictly between zero and one."""
    return _number(function, name, value, "a fraction between 0 and 1", lambda number: 0 < number < 1)


def integer(function: str, name: str, value: object) -> int:
    """Return ``value`` as an int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{function}: {name} must be an integer, but got {value!r}")
    return int(value)


def positive_integer(function: str, name: str, value: object) -> int:
    """Return ``value`` as an int of at least one."""
    number = integer(function, name, value)
    if number < 1:
        raise ValueError(f"{function}: {name} must be at least 1, but got {value!r}")
    return number


def boolean(function: str, name: str, value: object) -> bool:
    """Return ``value``, True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be True or False, but got {value!r}")
    return value


def plain_linear(function: str, name: str, value: object) -> nn.Linear:
    """Return ``value`` if it is a layer that computes just ``F.linear(x, weight, bias)``."""
    if not isinstance(value, nn.Linear):
        raise TypeError(f"{function}: {name} must be an nn.Linear, but got {type(value).__name__}")
    # A lazy layer has a hook of its own, which makes its parameters. A parametrized one has nn.Linear's forward.
    lazy = any(is_lazy(parameter) for parameter in value.parameters())
    if type(value).forward is not nn.Linear.forward or (
        not lazy and (value._forward_hooks or value._forward_pre_hooks)
    ):
        raise TypeError(
            f"{function}: {name} must compute F.linear(x, weight, bias), but got {type(value).__name__} with "
            "a forward or forward hooks of its own, which would be passed over"
        )
    return value


def one_of(function: str, name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return ``value``, a member of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{function}: {name} must be one of {', '.join(choices)}, but got {value!r}")
    return value


def tensor(function: str, name: str, value: object) -> Tensor:
    """Return ``value`` as a dense tensor of real numbers outside any graph, sharing memory where NumPy allows it."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise TypeError(f"{function}: {name} must hold real numbers, but got a NumPy array of {value.dtype}")
        if not value.dtype.isnative or value.dtype.itemsize > 8:
            value = value.astype(np.float64)
        if not value.flags.writeable or any(stride < 0 for stride in value.strides):
            value = value.copy()  # torch shares neither read-only memory nor negative strides
        value = torch.as_tensor(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor or a NumPy array, but got {type(value).__name__}")
    if value.layout != torch.strided or value.is_complex() or value.is_quantized:
        kind = str(value.layout if value.layout != torch.strided else value.dtype).removeprefix("torch.")
        raise TypeError(f"{function}: {name} must be a dense tensor of real numbers, but got {kind}")
    return value.detach()


def check_finite(function: str, name: str, value: Tensor) -> None:
    """Raise a ValueError naming the first element of ``value`` that is NaN or infinite."""
    if value.numel() == 0 or not value.is_floating_point():
        return
    low, high = torch.aminmax(value)  # NaN wins both, so that one pass without a mask is enough where all is well
    if math.isfinite(low.item()) and math.isfinite(high.item()):
        return
    index = tuple(int(i) for i in (~torch.isfinite(value)).nonzero()[0])
    raise ValueError(f"{function}: {name} must be finite, but element {list(index)} is {value[index].item()}")


def matrix(
    function: str, name: str, value: object, *, dtype: torch.dtype, device: torch.device, finite: bool = True
) -> Tensor:
    """Return ``value`` as a matrix of at least one row in the given dtype on the given device.

    It is checked to be finite, unless ``finite`` is False, as the caller then will, and the dtype is right already.
    """
    given = tensor(function, name, value)
    if given.dim() != 2:
        hint = f": use {name}.unsqueeze(-1)" if given.dim() == 1 else ""
        raise ValueError(f"{function}: {name} must have two dimensions, but got shape {tuple(given.shape)}{hint}")
    if given.shape[0] == 0:
        raise ValueError(f"{function}: {name} must have at least one row, but got shape {tuple(given.shape)}")
    if finite or given.dtype != dtype:
        check_finite(function, name, given)
    if given.device == device and given.dtype == dtype:
        return given
    moved = given.to(device=device, dtype=dtype)
    if given.dtype != dtype:
        check_finite(function, f"{name} in the model's {str(dtype).removeprefix('torch.')}", moved)
    return moved


def regression_data(
    function: str,
    X: object,
    y: object,
    *,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device: torch.device,
    names: tuple[str, str] = ("X", "y"),
    finite: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return features ``(N, in_features)`` and targets ``(N, out_features)`` in the given dtype on the given device."""
    X_name, y_name = names
    features = matrix(function, X_name, X, dtype=dtype, device=device, finite=finite)
    if features.shape[1] != in_features:
        raise ValueError(
            f"{function}: {X_name} must have {in_features} columns, the model's in_features, "
            f"but got shape {tuple(features.shape)}"
        )
    expected = (features.shape[0], out_features)
    given = tensor(function, y_name, y)
    if tuple(given.shape) != expected:
        hint = f": use {y_name}.unsqueeze(-1)" if tuple(given.shape) == expected[:1] and out_features == 1 else ""
        raise ValueError(
            f"{function}: {y_name} must have shape {expected}, the prediction's, but got {tuple(given.shape)}{hint}"
        )
    return features, matrix(function, y_name, given, dtype=dtype, device=device, finite=finite)
