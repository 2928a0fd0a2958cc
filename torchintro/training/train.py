"""Training one model or several at once by whichever engine suits: :func:`train_models`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .choice import Choice, choose
from .loop import LOSS_FUNCTIONS, Loop, NonFiniteLossError
from .operators import FusedRun, OperatorRun, StatisticsRun, TableRun
from .optimizers import Optimizer
from .rows import MemoryRows, Rows, TableRows

__all__ = ["Failure", "Report", "Trained", "Wanted", "train_models"]

# Seconds that one call of an operator may take: how long Ctrl-C waits.
_CALL_SECONDS = 0.25

# Called after an epoch, counted from 1, with the models' losses (K,).
Report: TypeAlias = "Callable[[int, Tensor], None]"
# From the number of epochs done, how many more until somebody wants to hear of one.
Wanted: TypeAlias = "Callable[[int], int]"


@dataclass(frozen=True)
class Failure:
    """How the training of a model ended early.

    Attributes:
        epoch: Counted from 1.
        loss: The loss that was not finite.
        kind: ``"loss"`` or ``"validation loss"``.
        finite: How many epochs had a finite training loss.
    """

    epoch: int
    loss: float
    kind: str
    finite: int


@dataclass(eq=False)
class Trained:
    """Models that were trained together.

    Attributes:
        weight: ``(K, out_features, in_features)``: of a model that failed, those of the last finite loss.
        bias: ``(K, out_features)``, or None for models without.
        losses: ``(epochs, K)``, float64 on the CPU; not finite from the epoch on in which a model failed.
        validation_losses: Likewise, or None without validation data.
        failures: One per model; None for those that reached the end.
        engine: The engine that ran.
        reason: Why it was chosen.
        seconds: Wall-clock time.
    """

    weight: Tensor
    bias: Tensor | None
    losses: Tensor
    validation_losses: Tensor | None
    failures: list[Failure | None]
    engine: str
    reason: str
    seconds: float


def _make_run(
    choice: Choice,
    rows: Rows,
    initial: nn.Linear,
    optimizers: Sequence[Optimizer],
    batch_size: int | None,
    shuffle: bool,
    generator: torch.Generator | None,
) -> OperatorRun:
    rules = [rule for rule in (optimizer.rule() for optimizer in optimizers) if rule is not None]
    if choice.engine == "statistics":
        return StatisticsRun(rows, initial, rules)
    if isinstance(rows, TableRows):
        assert batch_size is not None
        return TableRun(rows, initial, rules, batch_size=batch_size)
    assert isinstance(rows, MemoryRows)
    return FusedRun(rows, initial, rules, batch_size=batch_size, shuffle=shuffle, generator=generator)


def _drive(run: OperatorRun, rows: Rows, lr: Tensor, report: Report | None, wanted: Wanted | None) -> Trained:
    """Run all epochs, a part at a call; the results are those of one call to the bit."""
    epochs, models = lr.shape
    start = time.perf_counter()
    losses: list[Tensor] = []
    validation_losses: list[Tensor] = []
    size = max(1, int(_CALL_SECONDS / max(run.seconds_an_epoch, 1e-9)))
    while run.epoch < epochs:
        first = run.epoch
        count = min(size, epochs - first, epochs if wanted is None else wanted(first))
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
        if report is not None:
            # An epoch in which all models failed has no loss to report.
            last = max(stops) if stopped else first + count
            for epoch in range(first, min(first + count, last)):
                report(epoch + 1, some[epoch - first])
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
        engine="",
        reason="",
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
    *,
    initial: nn.Linear,
    lr: Sequence[float] | Sequence[Sequence[float]],
    epochs: int,
    batch_size: int | None,
    optimizers: Sequence[Optimizer],
    shuffle: bool = True,
    seed: int | None = None,
    engine: str = "auto",
    begin: Callable[[Choice], None] | None = None,
    report: Report | None = None,
    wanted: Wanted | None = None,
    into: nn.Linear | None = None,
) -> Trained:
    """Train K models that begin with the same parameters, each batch of rows read once for all of them.

    Args:
        rows: What to train on.
        initial: The parameters that all begin with, and which of them are trained; stays as it is.
        lr: One learning rate a model, or one a model and epoch.
        epochs: Passes over the rows.
        batch_size: Rows of a step, None for all.
        optimizers: One a model, all of one class.
        shuffle: Whether mini-batches are cut from a permutation drawn each epoch, or from the rows as they are.
        seed: Seed of the permutations; None draws them from PyTorch's global random state.
        engine: One of :data:`ENGINES`.
        begin: Called with the choice before the first epoch.
        report: Called with the epoch, counted from 1, and the losses ``(K,)``.
        wanted: How many epochs may pass until ``report`` is called again; None if it can wait.
        into: A layer that is given the parameters of the only model, whatever ends the run.

    Returns:
        The models. One whose loss is not finite ends early and does not disturb the others.

    Raises:
        ValueError: The engine that was asked for cannot do it, or the rows are not finite.
    """
    choice = choose(rows, engine=engine, optimizers=optimizers, batch_size=batch_size, epochs=epochs)
    if begin is not None:
        begin(choice)
    table = _table(lr, epochs)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if choice.engine in LOSS_FUNCTIONS:
        rows.check_finite()
        trained = _loop_through(
            rows,
            initial,
            table.t().tolist(),
            epochs,
            batch_size,
            optimizers,
            shuffle,
            seed,
            choice.engine,
            report,
            into,
        )
    else:
        run = _make_run(choice, rows, initial, optimizers, batch_size, shuffle, generator)
        try:
            trained = _drive(run, rows, table, report, wanted)
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
    rows: Rows,
    initial: nn.Linear,
    lr: Sequence[Sequence[float]],
    epochs: int,
    batch_size: int | None,
    optimizers: Sequence[Optimizer],
    shuffle: bool,
    seed: int | None,
    engine: str,
    report: Report | None,
    into: nn.Linear | None,
) -> Trained:
    """Train the models one after the other by the PyTorch loop."""
    assert isinstance(
        rows, (MemoryRows, TableRows)
    )  # others have no rows that could be looped through, which choose says
    start = time.perf_counter()
    models = len(optimizers)
    losses = torch.full((epochs, models), math.nan, dtype=torch.float64)
    held_out = losses.clone() if rows.has_validation else None
    failures: list[Failure | None] = [None] * models
    trained = []
    for k, optimizer in enumerate(optimizers):
        model = copy.deepcopy(initial) if into is None else into
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loop = Loop(model, optimizer.make(rows.function, parameters, lr[k][0]), engine)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        epoch = 0
        try:
            with loop.guarded():
                for epoch in range(epochs):
                    loop.set_lr(lr[k][epoch])
                    losses[epoch, k] = loop.epoch(rows.batches(batch_size, shuffle, generator), rows.count)
                    if held_out is not None:
                        held_out[epoch, k] = _validate(loop, rows)
                    if report is not None:
                        report(epoch + 1, losses[epoch])
                if not loop.is_finite():
                    raise NonFiniteLossError(rows.loss(*_detached(model)), "loss")
        except NonFiniteLossError as error:
            failures[k] = Failure(epoch + 1, error.loss, error.kind, int(losses[:, k].isfinite().sum()))
        trained.append(model)
    bias = trained[0].bias
    return Trained(
        weight=torch.stack([model.weight.detach() for model in trained]),
        bias=None if bias is None else torch.stack([model.bias.detach() for model in trained]),
        losses=losses,
        validation_losses=held_out,
        failures=failures,
        engine="",
        reason="",
        seconds=time.perf_counter() - start,
    )


def _validate(loop: Loop, rows: Rows) -> float:
    if isinstance(rows, MemoryRows):
        assert rows.validation is not None
        return loop.validate(*rows.validation)
    assert isinstance(rows, TableRows)
    loss = rows.validation_loss(*_detached(loop.model))
    if not loss <= torch.finfo(rows.dtype).max:
        raise NonFiniteLossError(math.nan if math.isnan(loss) else math.inf, "validation loss")
    return loss


def _detached(model: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return model.weight.detach(), None if model.bias is None else model.bias.detach()
