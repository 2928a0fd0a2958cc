"""Training one model or several at once by whichever engine suits: :func:`train_models`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .choice import choose
from .listener import Listener
from .loop import LOSS_FUNCTIONS, Loop, NonFiniteLossError
from .operators import FusedRun, OperatorRun, StatisticsRun, StreamedRun
from .optimizers import Optimizer
from .options import TrainingOptions
from .row_kinds import Rows

__all__ = ["Failure", "Trained", "train_models"]

# Seconds that one call of an operator may take: how long Ctrl-C waits.
_CALL_SECONDS = 0.25


@dataclass(frozen=True)
class Failure:
    """How the training of a model ended early."""

    epoch: int  # counted from 1
    loss: float  # the one that was not finite
    kind: str  # "loss" or "validation loss"
    finite: int  # how many epochs had a finite training loss


@dataclass(eq=False)
class Trained:
    """Models that were trained together.

    Attributes:
        weight: ``(K, out_features, in_features)``: of a model that failed, those of the last finite loss.
        bias: ``(K, out_features)``, or None for models without.
        losses: ``(epochs, K)``, float64 on the CPU; not finite from the epoch on in which a model failed.
        validation_losses: Likewise, or None without validation data.
        failures: One per model; None for those that reached the end.
        seconds: Wall-clock time.
        engine: The engine that ran.
        reason: Why it was chosen.
    """

    weight: Tensor
    bias: Tensor | None
    losses: Tensor
    validation_losses: Tensor | None
    failures: list[Failure | None]
    seconds: float
    engine: str = ""
    reason: str = ""


def _make_run(
    engine: str, rows: Rows, options: TrainingOptions, initial: nn.Linear, optimizers: Sequence[Optimizer]
) -> OperatorRun:
    rules = [rule for rule in (optimizer.rule() for optimizer in optimizers) if rule is not None]
    if engine == "statistics":
        return StatisticsRun(rows, initial, rules)
    if rows.in_memory is not None:
        return FusedRun(rows.in_memory, initial, rules, options)
    assert options.batch_size is not None  # which choose says
    return StreamedRun(rows, initial, rules, options.batch_size)


def _drive(run: OperatorRun, rows: Rows, lr: Tensor, listener: Listener | None) -> Trained:
    """Run all epochs, a part at a call; the results are those of one call to the bit."""
    epochs, models = lr.shape
    start = time.perf_counter()
    losses: list[Tensor] = []
    validation_losses: list[Tensor] = []
    size = max(1, int(_CALL_SECONDS / max(run.seconds_an_epoch, 1e-9)))
    while run.epoch < epochs:
        first = run.epoch
        patience = None if listener is None else listener.patience(first)
        count = min(size, epochs - first, patience or epochs)
        began = time.perf_counter()
        some, of_held_out = run.advance(lr if count == epochs else lr[first : first + count])
        size = max(1, int(count * min(2.0, _CALL_SECONDS / max(time.perf_counter() - began, 1e-9))))
        losses.append(some)
        validation_losses.append(of_held_out)
        stops = run.stopped.tolist()
        stopped = min(stops) >= 0
        if max(stops) >= 0:  # Second moments know losses that the model's own dtype does not.
            for series in (some, of_held_out):
                series.masked_fill_(series > torch.finfo(rows.dtype).max, math.inf)
        if first == 0 and 0 in stops:
            try:  # Where a value is not finite no loss is, so that no pass of its own had to look for one before.
                rows.check_finite()
            except ValueError:
                run.start_again()
                raise
        if listener is not None:
            # An epoch in which all models failed has no loss to report.
            last = max(stops) if stopped else first + count
            for epoch in range(first, min(first + count, last)):
                listener.epoch(epoch + 1, some[epoch - first])
        if stopped:
            break
    every = torch.cat(losses) if len(losses) > 1 else losses[0]
    held_out = torch.cat(validation_losses) if len(losses) > 1 else validation_losses[0]
    if every.shape[0] < epochs:
        rest = every.new_full((epochs - every.shape[0], models), math.nan)
        every = torch.cat([every, rest])
        held_out = torch.cat([held_out, rest]) if held_out.shape[0] else held_out
    failures = _failures(run, rows, every, held_out)
    return Trained(
        weight=run.weight.to(rows.device, rows.dtype),
        bias=None if run.bias is None else run.bias.to(rows.device, rows.dtype),
        losses=every,
        validation_losses=held_out if rows.has_validation else None,
        failures=failures,
        seconds=time.perf_counter() - start,
    )


def _failures(run: OperatorRun, rows: Rows, losses: Tensor, validation_losses: Tensor) -> list[Failure | None]:
    """Say of each model how it failed, and find out a last update that no later loss would."""
    epochs, models = losses.shape
    failures: list[Failure | None] = [None] * models
    largest = torch.finfo(rows.dtype).max
    parameters = [parameter for parameter in (run.weight, run.bias) if parameter is not None]
    extremes = [torch.linalg.vector_norm(parameter.flatten(1), math.inf, 1).tolist() for parameter in parameters]
    within = [all(extreme <= largest for extreme in of_model) for of_model in zip(*extremes, strict=True)]

    for k, stopped in enumerate(run.stopped.tolist()):
        if stopped >= 0:
            loss = losses[stopped, k].item()
            if math.isfinite(loss):
                loss = validation_losses[stopped, k].item()
                failures[k] = Failure(stopped + 1, loss, "validation loss", stopped + 1)
            else:
                failures[k] = Failure(stopped + 1, loss, "loss", stopped)
        elif not within[k]:
            bias = None if run.bias is None else run.bias[k]
            failures[k] = Failure(epochs, rows.loss(run.weight[k], bias), "loss", epochs)
            run.put_back(k)
    return failures


def train_models(
    rows: Rows,
    options: TrainingOptions,
    initial: nn.Linear,
    *,
    lr: Sequence[float] | Sequence[Sequence[float]],
    optimizers: Sequence[Optimizer],
    listener: Listener | None = None,
    into: nn.Linear | None = None,
) -> Trained:
    """Train K models that begin with the same parameters, each batch of rows read once for all of them.

    Args:
        rows: What to train on.
        options: How.
        initial: The parameters that all begin with, and which of them are trained; stays as it is.
        lr: One learning rate a model, or one a model and epoch.
        optimizers: One a model, all of one class.
        listener: Hears of the engine and of the epochs.
        into: A layer that is given the parameters of the only model, whatever ends the run.

    Returns:
        The models. One whose loss is not finite ends early and does not disturb the others.

    Raises:
        ValueError: The engine that was asked for cannot do it, or the rows are not finite.
    """
    choice = choose(rows, options, optimizers)
    if listener is not None:
        listener.begin(choice)
    table = _table(lr, options.epochs)
    if choice.engine in LOSS_FUNCTIONS:
        rows.check_finite()
        loops = (
            Loop(copy.deepcopy(initial) if into is None else into, optimizer, float(rate), choice.engine)
            for optimizer, rate in zip(optimizers, table[0], strict=True)
        )
        trained = _loop_through(rows, options, loops, table, listener)
    else:
        run = _make_run(choice.engine, rows, options, initial, optimizers)
        try:
            trained = _drive(run, rows, table, listener)
        except BaseException:
            run.put_back()
            raise
        finally:
            if into is not None:
                with torch.no_grad():
                    into.weight.copy_(run.weight[0])
                    if run.bias is not None:
                        into.bias.copy_(run.bias[0])
    trained.engine, trained.reason = choice.engine, choice.reason
    return trained


def _table(lr: Sequence[float] | Sequence[Sequence[float]], epochs: int) -> Tensor:
    """Return the learning rates ``(epochs, K)`` of K models: each is one number, or one an epoch."""
    rates = torch.tensor(lr, dtype=torch.float64)
    return (rates.t() if rates.dim() > 1 else rates.expand(epochs, -1)).contiguous()


def _loop_through(
    rows: Rows, options: TrainingOptions, loops: Iterable[Loop], lr: Tensor, listener: Listener | None
) -> Trained:
    """Train the models one after the other by the PyTorch loop."""
    start = time.perf_counter()
    losses = torch.full_like(lr, math.nan)
    held_out = losses.clone() if rows.has_validation else None
    failures: list[Failure | None] = []
    models: list[nn.Linear] = []
    for k, loop in enumerate(loops):
        generator, epoch, failure = options.generator(), 0, None
        try:
            with loop.guarded():
                for epoch, rate in enumerate(lr[:, k].tolist()):
                    loop.set_lr(rate)
                    losses[epoch, k] = loop.epoch(rows.batches(options, generator), rows.count)
                    if held_out is not None:
                        held_out[epoch, k] = _validate(loop, rows)
                    if listener is not None:
                        listener.epoch(epoch + 1, losses[epoch])
                if not loop.is_finite():
                    raise NonFiniteLossError(rows.loss(*loop.detached()), "loss")
        except NonFiniteLossError as error:
            failure = Failure(epoch + 1, error.loss, error.kind, int(losses[:, k].isfinite().sum()))
        failures.append(failure)
        models.append(loop.model)
    weight, bias = zip(*((model.weight.detach(), model.bias) for model in models), strict=True)
    return Trained(
        weight=torch.stack(weight),
        bias=None if bias[0] is None else torch.stack([one.detach() for one in bias]),
        losses=losses,
        validation_losses=held_out,
        failures=failures,
        seconds=time.perf_counter() - start,
    )


def _validate(loop: Loop, rows: Rows) -> float:
    loss = rows.validation_loss(loop.loss_function, *loop.detached())
    if not loss <= torch.finfo(rows.dtype).max:
        raise NonFiniteLossError(math.nan if math.isnan(loss) else math.inf, "validation loss")
    return loss
