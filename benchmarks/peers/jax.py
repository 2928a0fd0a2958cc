"""The work of a case in JAX: ``jit`` for a step, ``scan`` for a training run, ``vmap`` for the trainings of a study.

JAX is an extra. It is imported where a case wants it and never before, and gets as many threads as PyTorch has. The
data are PyTorch's own memory, results are waited for, and what is compiled is compiled before any time is taken.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..work import Unavailable, first_line

__all__ = ["JaxFit", "JaxStep", "JaxStudy", "made", "why_not"]

T = TypeVar("T")


def why_not(device: torch.device) -> str:
    """Return why JAX cannot be one of the peers, or an empty string."""
    if device.type != "cpu":
        # Its kernels run on streams of its own, which neither the events nor the cache flushes of the timing reach.
        return "JAX is compared on the CPU only"
    if importlib.util.find_spec("jax") is None:
        return 'JAX is not installed: pip install "torchintro[jax]"'
    return ""


def made(wanted: bool, device: torch.device, make: Callable[[], T]) -> T:
    """Make JAX's side of a case.

    Raises:
        Unavailable: It is left out of this run, it cannot run here, or it failed.
    """
    reason = why_not(device) if wanted else "JAX is left out of this run"
    if reason:
        raise Unavailable(reason)
    try:
        return make()
    except Exception as error:  # whatever XLA raises
        raise Unavailable(f"JAX failed here: {first_line(error)}") from None


@functools.cache
def _jax() -> Any:
    # XLA reads the size of its thread pool from here, once.
    before = os.environ.get("NPROC")
    os.environ["NPROC"] = str(torch.get_num_threads())
    try:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.devices()
    finally:
        if before is None:
            del os.environ["NPROC"]
        else:
            os.environ["NPROC"] = before
    return jax


@contextlib.contextmanager
def _precision(dtype: torch.dtype) -> Iterator[Any]:
    """Allow JAX float64 where it is meant; without being asked it makes float32 of it."""
    jax = _jax()
    if dtype != torch.float64:
        yield jax
        return
    if hasattr(jax, "enable_x64"):
        context = jax.enable_x64(True)
    else:
        from jax.experimental import enable_x64

        context = enable_x64()
    with context:
        yield jax


def _array(tensor: Tensor) -> Any:
    return _jax().numpy.from_dlpack(tensor.detach())


def _tensor(array: Any) -> Tensor:
    return from_dlpack(array).clone()


def _loss(X: Any, weight: Any, bias: Any, y: Any) -> Any:
    numpy = _jax().numpy
    return numpy.mean(numpy.square(X @ weight.T + bias - y))


class JaxStep:
    """Loss and gradients of one batch: ``jit(value_and_grad(...))``."""

    def __init__(self, tensors: dict[str, Tensor], gradients: Sequence[str]) -> None:
        names = ("input", "linear_weight", "linear_bias", "target")
        self.gradients = tuple(gradients)
        self.dtype = tensors["input"].dtype
        with _precision(self.dtype) as jax:
            self.arguments = [_array(tensors[name]) for name in names]
            self.step = jax.jit(jax.value_and_grad(_loss, argnums=tuple(names.index(name) for name in gradients)))
        self.outcome()

    def __call__(self) -> Any:
        """Run the step and wait for its results."""
        with _precision(self.dtype) as jax:
            return jax.block_until_ready(self.step(*self.arguments))

    def outcome(self) -> dict[str, Tensor]:
        """Run the step; return its results as tensors."""
        loss, gradients = self()
        return {"loss": _tensor(loss), **dict(zip(self.gradients, map(_tensor, gradients), strict=True))}


def _descend(X: Any, y: Any, lr: Any) -> Callable[[Any, Any], Any]:
    """Return a step of gradient descent as ``scan`` wants it.

    Its batch is None for all rows, or the numbers of some, or a pair: its rows of ``X`` and of ``y`` themselves.
    """
    value_and_grad = _jax().value_and_grad(lambda parameters, X, y: _loss(X, parameters[0], parameters[1], y))

    def step(parameters: Any, batch: Any) -> Any:
        if batch is None:
            batch = X, y
        elif not isinstance(batch, tuple):
            batch = X[batch], y[batch]
        loss, gradients = value_and_grad(parameters, *batch)
        return tuple(p - (lr * g).astype(p.dtype) for p, g in zip(parameters, gradients, strict=True)), loss

    return step


class JaxFit:
    """A training run in one call: ``jit`` of a ``scan`` over the epochs, and of one over the mini-batches.

    With several learning rates it is one run for each at once, by ``vmap``. Every run starts from the same parameters.
    NumPy shuffles the mini-batches: it is quicker at it than JAX.

    Attributes:
        parameters: Weight and bias at the end of the last run, with several learning rates those of all models.
    """

    def __init__(
        self,
        X: Tensor,
        y: Tensor,
        initial: Sequence[Tensor],
        *,
        lr: float | Sequence[float],
        epochs: int,
        batch_size: int,
        shuffle: bool = True,
    ) -> None:
        self.dtype, self.epochs, self.rows, self.batch_size = X.dtype, epochs, X.shape[0], batch_size
        self.shuffle = shuffle
        with _precision(self.dtype) as jax:
            self.arguments = tuple(map(_array, initial)), _array(X), _array(y)
            whole = self.rows // batch_size * batch_size if batch_size else 0

            def pieces(array: Any) -> tuple[Any, Any]:
                return array[:whole].reshape(-1, batch_size, *array.shape[1:]), array[whole:]

            def one_epoch(step: Any, parameters: Any, batches: Any, rest: Any) -> Any:
                parameters, losses = jax.lax.scan(step, parameters, batches)
                if whole < self.rows:
                    parameters, last = step(parameters, rest)
                    losses = jax.numpy.append(losses, last)
                return parameters, losses

            def run(lr: Any, parameters: Any, X: Any, y: Any, orders: Any) -> Any:
                step = _descend(X, y, lr)
                if not batch_size:
                    return jax.lax.scan(step, parameters, None, length=epochs)
                if shuffle:
                    return jax.lax.scan(lambda p, order: one_epoch(step, p, *pieces(order)), parameters, orders)
                batches, rest = zip(pieces(X), pieces(y), strict=True)
                return jax.lax.scan(lambda p, _: one_epoch(step, p, batches, rest), parameters, None, length=epochs)

            if isinstance(lr, (int, float)):
                self.run = jax.jit(functools.partial(run, lr))
            else:
                lrs = np.array(lr, np.float64 if self.dtype == torch.float64 else np.float32)
                models = jax.vmap(run, in_axes=(0, None, None, None, None))
                self.run = jax.jit(functools.partial(models, lrs))
        self.parameters: Any = None
        self()

    def __call__(self) -> None:
        """Train and wait for the end."""
        with _precision(self.dtype) as jax:
            self.parameters, _ = jax.block_until_ready(self.run(*self.arguments, self.orders()))

    def orders(self) -> Any:
        """Return the order of the rows in each epoch, or None where they stay as they are; the same each time."""
        if not self.batch_size or not self.shuffle:
            return None
        generator = np.random.default_rng(0)
        return np.stack([generator.permutation(self.rows) for _ in range(self.epochs)]).astype(np.int32)

    def outcome(self) -> Tensor:
        """Run; return all parameters as one vector, or of several models as one each."""
        self()
        weight, bias = map(_tensor, self.parameters)
        return torch.cat([weight.flatten(-2), bias], dim=-1)


class JaxStudy:
    """The trainings of a study at once: ``jit`` of a ``scan`` over the epochs, ``vmap`` over the learning rates."""

    def __init__(self, X: Tensor, y: Tensor, initial: Sequence[Tensor], *, trials: int, epochs: int) -> None:
        self.dtype = X.dtype
        with _precision(self.dtype) as jax:
            self.arguments = tuple(map(_array, initial)), _array(X), _array(y)

            def train(lr: Any, parameters: Any, X: Any, y: Any) -> Any:
                _, losses = jax.lax.scan(_descend(X, y, lr), parameters, None, length=epochs)
                return losses[-1]

            self.train = jax.jit(jax.vmap(train, in_axes=(0, None, None, None)))
        self([0.0] * trials)

    def __call__(self, lrs: Sequence[float]) -> list[float]:
        """Train once with each learning rate; return the losses of the last epoch."""
        with _precision(self.dtype) as jax:
            losses: list[float] = jax.block_until_ready(
                self.train(np.array(lrs, np.float64 if self.dtype == torch.float64 else np.float32), *self.arguments)
            ).tolist()
        return losses
