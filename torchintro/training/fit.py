"""The training loop of a linear model: :func:`fit`, its result and the error that it raises when it diverges."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import _checks
from .._typing import ArrayLike, EpochProgress
from ..data.table import Table
from ..statistics import LinearStatistics
from .listener import listener_of
from .optimizers import parse_optimizer
from .options import check_options, learning_rates
from .rows import as_rows
from .train import train_models

__all__ = ["DivergedError", "FitResult", "fit"]


@dataclass(frozen=True, eq=False)
class FitResult:
    """What :func:`fit` did.

    Attributes:
        losses: One training loss per epoch, float64 on the CPU. With the full batch it is the loss before that epoch's
            update; with mini-batches, the row-weighted mean of the batch losses met during the epoch, each before its
            own update.
        validation_losses: One validation loss per epoch, after that epoch's update, or None without validation data.
        engine: The engine that ran.
        reason: Why it was the one, in a few words.
        epochs: The number of epochs.
        seconds: Wall-clock time of the loop, validation included.
    """

    losses: Tensor
    validation_losses: Tensor | None
    engine: str
    reason: str
    epochs: int
    seconds: float


class DivergedError(ArithmeticError):
    """The loss of a training run became infinite or NaN.

    The model keeps the parameters of the last moment at which its loss was finite.

    Attributes:
        epoch: The epoch, counted from 1, in which it happened.
        loss: The non-finite loss.
        lr: The learning rate.
        losses: The finite training losses, one per epoch until then, float64.
        engine: The engine that ran.
        kind: ``"loss"`` or ``"validation loss"``.
    """

    def __init__(self, epoch: int, loss: float, lr: float, losses: Tensor, engine: str, kind: str = "loss") -> None:
        super().__init__(
            f"fit: the {kind} became {loss} in epoch {epoch} with lr={lr:g}, and the model keeps the parameters of the "
            "last finite loss: lower lr, or standardise the features"
        )
        self.epoch = epoch
        self.loss = loss
        self.lr = lr
        self.losses = losses
        self.engine = engine
        self.kind = kind

    def __reduce__(self) -> tuple[type[DivergedError], tuple[int, float, float, Tensor, str, str]]:
        return type(self), (self.epoch, self.loss, self.lr, self.losses, self.engine, self.kind)


def fit(  # noqa: PLR0913 (a public function)
    model: nn.Linear,
    X: ArrayLike | Table | LinearStatistics,
    y: ArrayLike | None = None,
    *,
    lr: float | Sequence[float] | Tensor,
    epochs: int = 100,
    batch_size: int | None = None,
    shuffle: bool | None = None,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    optimizer_options: Mapping[str, Any] | None = None,
    validation: Sequence[ArrayLike] | Table | LinearStatistics | float | None = None,
    engine: str = "auto",
    seed: int | None = None,
    checkpoint: str | Path | None = None,
    progress: EpochProgress = False,
) -> FitResult:
    """Train a linear layer in place to the least mean squared error.

    Equivalent to the ordinary loop::

        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for epoch in range(epochs):
            optimizer.zero_grad()
            loss = F.mse_loss(model(X), y)
            loss.backward()
            optimizer.step()

    Every engine follows it within rounding. Whatever ends the run early (a non-finite loss, Ctrl-C, an exception from
    ``progress``), the model is left with the parameters at which the last finite training loss was computed.

    Args:
        model: The layer to train. Parameters that do not require a gradient stay as they are.
        X: Features ``(N, in_features)``, tensor or NumPy array; converted to the model's dtype and device. Or a table
            (:func:`torchintro.open_table`) of any size, which is streamed: once for all epochs with the full batch,
            once an epoch with mini-batches. Where ``torch.distributed`` is initialised, every process streams its own
            share of the table, and all end with the same model.
        y: Targets ``(N, out_features)``; a target of shape ``(N,)`` is an error. None with a table, which has its own.
        lr: Learning rate, or one for each epoch.
        epochs: Number of passes over the rows.
        batch_size: Rows a step; None or anything from N up means all rows in their own order.
        shuffle: Whether mini-batches are cut from one random permutation an epoch, or from the rows in their own order;
            the last batch may be shorter. By default True, but for a table, where it cannot be.
        optimizer: Class name of an optimizer of ``torch.optim``, in any case.
        momentum: The optimizer's argument; an error where the optimizer has none.
        weight_decay: The optimizer's argument, zero by default whatever the optimizer's own default.
        optimizer_options: Further keyword arguments of the optimizer, such as ``{"nesterov": True}``.
        validation: ``(X_val, y_val)``: their loss is computed after each epoch. Or the share of the rows to hold out,
            chosen by ``seed``. With a table also another table; with a table or statistics those of the rows held out.
        engine: ``"statistics"``, one pass over the rows for all epochs (full batch; sgd, adam and adamw; float32 and
            float64); ``"fused"``, all epochs in one operator (likewise, and mini-batches); ``"autograd"``, the fused
            loss in a PyTorch loop (everything else too); ``"reference"``, the same loop in plain PyTorch; ``"auto"``,
            the one that suits, which the result names, with the reason.
        seed: Seed of the permutations and of the rows held out; None draws both from PyTorch's global random state, but
            for the rows of a table, where it is 0.
        checkpoint: With a table, a file from which the pass that gathers its statistics goes on after an interruption,
            as for :meth:`torchintro.Table.statistics`. Where ``torch.distributed`` is initialised every process has its
            own, with its rank behind the name.
        progress: True prints the engine and the loss every tenth of the run, and how far the pass over a table is; a
            callable is given ``(epoch, loss)`` after every epoch. If it has a method ``begin``, that is given
            ``(engine, reason)`` before the first epoch, and epochs come in groups, up to a quarter of a second late.

    Returns:
        The losses, the engine and the time taken.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument has a wrong value, or the engine that was asked for cannot do it. Nothing was changed.
        DivergedError: The loss became infinite or NaN.

    Example:
        >>> X = torch.linspace(-1, 1, 50).unsqueeze(-1)
        >>> model = nn.Linear(1, 1)
        >>> result = fit(model, X, 3 * X, lr=0.5, epochs=100)
        >>> round(model.weight.item(), 3)
        3.0
    """
    _check_model(model)
    options = check_options("fit", epochs=epochs, batch_size=batch_size, shuffle=shuffle, engine=engine, seed=seed)
    rates = learning_rates("fit", lr, options.epochs)
    if max(rates) > torch.finfo(model.weight.dtype).max:
        dtype = str(model.weight.dtype).removeprefix("torch.")
        raise ValueError(f"fit: lr must be within the model's {dtype}, but got {max(rates):g}")
    chosen = parse_optimizer("fit", optimizer, momentum, weight_decay, optimizer_options)
    chosen.check([parameter for parameter in model.parameters() if parameter.requires_grad], rates[0])
    listener = listener_of("fit", progress, options.epochs)
    shown = progress is True
    rows = as_rows("fit", X, y, validation, like=model, seed=options.seed, checkpoint=checkpoint, progress=shown)
    start = time.perf_counter()
    trained = train_models(rows, options, model, lr=[rates], optimizers=[chosen], listener=listener, into=model)
    losses = trained.losses[:, 0]
    failure = trained.failures[0]
    if failure is not None:
        finite = losses[: failure.finite]
        raise DivergedError(failure.epoch, failure.loss, rates[failure.epoch - 1], finite, trained.engine, failure.kind)
    return FitResult(
        losses=losses,
        validation_losses=None if trained.validation_losses is None else trained.validation_losses[:, 0],
        engine=trained.engine,
        reason=trained.reason,
        epochs=options.epochs,
        seconds=time.perf_counter() - start,
    )


def _check_model(model: object) -> None:
    model = _checks.plain_linear("fit", "model", model)
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError("fit: model must have initialised parameters, but got a lazy layer: call it on a batch first")
    if not model.weight.is_floating_point():
        raise TypeError(f"fit: model must have floating-point parameters, but got {model.weight.dtype}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("fit: model must have a parameter that requires a gradient, but all are frozen")
    for name, parameter in model.named_parameters():
        _checks.check_finite("fit", f"model.{name}", parameter.detach())
