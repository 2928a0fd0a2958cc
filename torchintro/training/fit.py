"""The training loop of a linear model: :func:`fit`, its result and the error that it raises when it diverges."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import _checks
from .._typing import ArrayLike, EpochProgress
from ..data.table import Table
from ..statistics import LinearStatistics
from .choice import ENGINES, Choice
from .optimizers import parse_optimizer
from .rows import MemoryRows, Rows, StatisticsRows, TableRows
from .train import Report, Wanted, train_models

if TYPE_CHECKING:
    from typing import TypeGuard

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


def fit(
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
        validation: ``(X_val, y_val)``: their loss is computed after each epoch. With a table also another table, or the
            share of the rows to hold out, chosen by ``seed``. With a table or statistics those of the rows held out.
        engine: ``"statistics"``, one pass over the rows for all epochs (full batch; sgd, adam and adamw; float32 and
            float64); ``"fused"``, all epochs in one operator (likewise, and mini-batches); ``"autograd"``, the fused
            loss in a PyTorch loop (everything else too); ``"reference"``, the same loop in plain PyTorch; ``"auto"``,
            the one that suits, which the result names, with the reason.
        seed: Seed of the permutations; None draws them from PyTorch's global random state.
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
    epochs = _checks.positive_integer("fit", "epochs", epochs)
    rates = learning_rates("fit", lr, epochs)
    if max(rates) > torch.finfo(model.weight.dtype).max:
        dtype = str(model.weight.dtype).removeprefix("torch.")
        raise ValueError(f"fit: lr must be within the model's {dtype}, but got {max(rates):g}")
    if batch_size is not None:
        batch_size = _checks.positive_integer("fit", "batch_size", batch_size)
    if shuffle is not None:
        _checks.boolean("fit", "shuffle", shuffle)
    if seed is not None:
        seed = _checks.integer("fit", "seed", seed)
    _checks.one_of("fit", "engine", engine, ENGINES)
    chosen = parse_optimizer("fit", optimizer, momentum, weight_decay, optimizer_options)
    chosen.check("fit", [parameter for parameter in model.parameters() if parameter.requires_grad], rates[0])
    begin, report, wanted = _reporter(progress, epochs)
    rows = _check_rows(model, X, y, validation, batch_size, shuffle, seed, checkpoint, progress is True)
    start = time.perf_counter()
    trained = train_models(
        rows,
        initial=model,
        lr=[rates],
        epochs=epochs,
        batch_size=batch_size,
        optimizers=[chosen],
        shuffle=not isinstance(rows, TableRows) if shuffle is None else shuffle,
        seed=seed,
        engine=engine,
        begin=begin,
        report=report,
        wanted=wanted,
        into=model,
    )
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
        epochs=epochs,
        seconds=time.perf_counter() - start,
    )


def learning_rates(function: str, lr: object, epochs: int) -> list[float]:
    """Return the learning rate of each epoch: ``lr`` is one for all, or a sequence of as many."""
    if isinstance(lr, Tensor) and lr.dim() > 0:
        lr = lr.tolist()
    if not isinstance(lr, (list, tuple)):
        return [_checks.positive(function, "lr", lr.item() if isinstance(lr, Tensor) else lr)] * epochs
    if len(lr) != epochs:
        raise ValueError(f"{function}: lr must be one number or one for each of {epochs} epochs, but got {len(lr)}")
    return [_checks.positive(function, f"lr[{epoch}]", rate) for epoch, rate in enumerate(lr)]


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


def _check_rows(
    model: nn.Linear,
    X: object,
    y: object,
    validation: object,
    batch_size: int | None,
    shuffle: bool | None,
    seed: int | None,
    checkpoint: str | Path | None,
    progress: bool,
) -> Rows:
    def checked(X: object, y: object, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
        return _checks.regression_data(
            "fit",
            X,
            y,
            in_features=model.in_features,
            out_features=model.out_features,
            dtype=model.weight.dtype,
            device=model.weight.device,
            names=names,
            finite=False,
        )

    if is_table(X):
        sizes = (X.in_features, X.out_features)
        if sizes != (model.in_features, model.out_features):
            raise ValueError(
                f"fit: X must be a table of {model.in_features} features and {model.out_features} targets, as the "
                f"model has, but has {sizes[0]} and {sizes[1]}"
            )
        if shuffle and batch_size is not None:
            raise ValueError("fit: shuffle must not be True for a table, whose rows are read in their order")
        return table_rows(
            "fit",
            X,
            y,
            validation,
            lambda pair: checked(*pair, ("validation[0]", "validation[1]")),
            dtype=model.weight.dtype,
            device=model.weight.device,
            seed=seed,
            checkpoint=checkpoint,
            progress=progress,
        )
    check_no_checkpoint("fit", checkpoint)
    if isinstance(X, LinearStatistics):
        sizes = (model.in_features, model.out_features)
        if (X.in_features, X.out_features) != sizes:
            raise ValueError(
                f"fit: X must be statistics of {sizes[0]} features and {sizes[1]} targets, as the model has, but has "
                f"{X.in_features} and {X.out_features}"
            )
        return statistics_rows("fit", X, y, validation, dtype=model.weight.dtype, device=model.weight.device)
    check_in_memory("fit", X, y)
    train = checked(X, y, ("X", "y"))
    if validation is None:
        return MemoryRows(*train)
    X_validation, y_validation = validation_pair("fit", validation)
    return MemoryRows(*train, checked(X_validation, y_validation, ("validation[0]", "validation[1]")))


def check_in_memory(function: str, X: object, y: object) -> None:
    """Raise a TypeError that says what to do if ``X`` is the path of a table, or ``y`` is missing."""
    if isinstance(X, (str, os.PathLike)):
        raise TypeError(f"{function}: X must be a tensor, an array or a table, but got a path: open it by open_table")
    if y is None:
        raise TypeError(
            f"{function}: y must be a tensor or a NumPy array, but got None, which only goes with a table or statistics"
        )


def check_no_checkpoint(function: str, checkpoint: object) -> None:
    """Raise a TypeError for a checkpoint without a table."""
    if checkpoint is not None:
        raise TypeError(f"{function}: checkpoint only goes with a table that is streamed, but got {checkpoint!r}")


def is_table(value: object) -> TypeGuard[Table]:
    """Say whether a value is a table that is streamed; without importing what only those need."""
    return isinstance(value, Table)


def table_rows(
    function: str,
    table: Table,
    y: object,
    validation: object,
    check_pair: Callable[[tuple[object, object]], tuple[Tensor, Tensor]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int | None,
    checkpoint: str | Path | None,
    progress: bool,
) -> TableRows:
    """Check what goes with a table; return its rows."""
    if y is not None:
        raise TypeError(
            f"{function}: y must be None with a table, which has its own targets, but got {type(y).__name__}"
        )
    if is_table(validation) or isinstance(validation, LinearStatistics):
        kind = "statistics" if isinstance(validation, LinearStatistics) else "a table"
        sizes = (validation.in_features, validation.out_features)
        if sizes != (table.in_features, table.out_features):
            raise ValueError(
                f"{function}: validation must be {kind} of {table.in_features} features and {table.out_features} "
                f"targets, as X has, but has {sizes[0]} and {sizes[1]}"
            )
        if isinstance(validation, LinearStatistics) and validation.count.item() == 0:
            raise ValueError(f"{function}: validation must have at least one row of positive weight, but has none")
    elif isinstance(validation, (int, float)):
        validation = _checks.fraction(function, "validation", validation)
    elif validation is not None:
        validation = check_pair(validation_pair(function, validation))
    return TableRows(
        table,
        validation,
        function=function,
        dtype=dtype,
        device=device,
        seed=seed,
        progress=progress,
        checkpoint=checkpoint,
    )


def statistics_rows(
    function: str,
    statistics: LinearStatistics,
    y: object,
    validation: object,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> StatisticsRows:
    """Check what goes with statistics; return them as rows."""
    if y is not None:
        raise TypeError(
            f"{function}: y must be None with LinearStatistics, which have their own targets, but got "
            f"{type(y).__name__}"
        )
    if validation is not None:
        if not isinstance(validation, LinearStatistics):
            raise TypeError(
                f"{function}: validation must be LinearStatistics or None, as X is, but got {type(validation).__name__}"
            )
        sizes = (validation.in_features, validation.out_features)
        if sizes != (statistics.in_features, statistics.out_features):
            raise ValueError(
                f"{function}: validation must be of {statistics.in_features} features and {statistics.out_features} "
                f"targets, as X is, but is of {sizes[0]} and {sizes[1]}"
            )
    return StatisticsRows(statistics, validation, function=function, dtype=dtype, device=device)


def validation_pair(function: str, validation: object) -> tuple[object, object]:
    """Return the two members of ``validation``, which must be a pair ``(X_val, y_val)``."""
    if not isinstance(validation, (tuple, list)) or len(validation) != 2:
        got = f"{len(validation)} elements" if isinstance(validation, (tuple, list)) else type(validation).__name__
        raise TypeError(f"{function}: validation must be a pair (X_val, y_val), but got {got}")
    return validation[0], validation[1]


def _reporter(progress: object, epochs: int) -> tuple[Callable[[Choice], None] | None, Report | None, Wanted | None]:
    """Return what is to be done before the first epoch, after an epoch, and for how many epochs there is nothing."""
    if callable(progress):
        announce = getattr(progress, "begin", None)
        report_one: Report = lambda epoch, losses: progress(epoch, losses.item())  # noqa: E731
        if announce is None:
            return None, report_one, lambda done: 1
        return lambda choice: announce(choice.engine, choice.reason), report_one, None
    if not isinstance(progress, bool):
        raise TypeError(f"fit: progress must be True, False or a callable, but got {progress!r}")
    if not progress:
        return None, None, None

    def is_shown(epoch: int) -> bool:
        return epoch * 10 // epochs > (epoch - 1) * 10 // epochs

    def report(epoch: int, losses: Tensor) -> None:
        if is_shown(epoch):
            print(f"Epoch [{epoch}/{epochs}], Loss: {losses.item():.4f}")

    def begin(choice: Choice) -> None:
        print(f"Engine: {choice.engine} ({choice.reason})")

    return begin, report, lambda done: next(epoch for epoch in range(done + 1, epochs + 1) if is_shown(epoch)) - done
