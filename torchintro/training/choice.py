"""Which engine trains: the only place that knows what ``"auto"`` means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .loop import LOSS_FUNCTIONS
from .optimizers import Optimizer
from .options import TrainingOptions
from .row_kinds import Rows, processes

__all__ = ["Choice", "choose", "seconds"]

# What `choose` reckons with: two cores of an Intel Xeon with AVX-512. It only has to be right where the engines are far
# apart, and a factor of two does not matter where they are near.
_READ = 25e9  # bytes a second that a pass over the rows reads
_PRODUCTS = 100e9  # multiplications a second in float32, of the fused loop
_MOMENTS = 40e9  # multiplications a second in float64, of the pass for the second moments
_MOMENT_EPOCHS = 8e9  # of the epochs on second moments
_STEP = 0.2e-6  # seconds that an update takes besides
# More features than this need more than a quarter of a gigabyte for their second moments.
_MOST_FEATURES = 4096
# Outputs of the fused loop's kernel; more of them are products of matrices, where the PyTorch loop is as good.
_FEW_OUTPUTS = 64
# Elements that one block of a GPU works through about as fast as the host can launch anything.
_SMALL = 1 << 16


@dataclass(frozen=True)
class Choice:
    """An engine's name and why it was taken, in a few words for the user."""

    engine: str
    reason: str


def choose(rows: Rows, options: TrainingOptions, optimizers: Sequence[Optimizer]) -> Choice:
    """Decide which engine trains.

    Args:
        rows: What to train on.
        options: How.
        optimizers: One a model.

    Raises:
        ValueError: The engine that was asked for cannot do it, or none can.
    """
    if not rows.has_rows:
        return _of_statistics(rows, options, optimizers)
    engine, batch_size = options.engine, options.batch_size
    streamed, full = rows.in_memory is None, rows.is_full_batch(batch_size)
    if streamed and options.shuffle and batch_size is not None:
        raise ValueError(f"{rows.function}: shuffle must not be True for a table, whose rows are read in their order")
    unknown = _why_not_operators(rows.dtype, optimizers)
    why_not = {
        "fused": unknown or ("a table has no full batch in memory" if streamed and full else ""),
        "statistics": unknown or ("" if full else f"it has no mini-batches, but batch_size is {batch_size}{_of(rows)}"),
        **dict.fromkeys(LOSS_FUNCTIONS, "a table has no full batch in memory" if streamed and full else ""),
    }
    if streamed and not full and processes() > 1:
        raise ValueError(
            f"{rows.function}: batch_size must be None for a table and several processes, which share the work of "
            f"gathering its statistics, but got {batch_size}"
        )
    if engine != "auto":
        if why_not[engine]:
            raise ValueError(
                f"{rows.function}: engine {engine!r} cannot do this: {why_not[engine]}; auto finds one that can"
            )
        return Choice(engine, "asked for")
    if streamed and all(why_not.values()):
        raise ValueError(
            f"{rows.function}: no engine trains on all rows of a table at once with {unknown}: give batch_size, or "
            "another optimizer"
        )
    if streamed:
        if full:
            return Choice("statistics", "a table, full batch: one pass over it serves all epochs")
        return Choice("autograd", unknown) if unknown else Choice("fused", "a table, mini-batches in its order")
    if unknown:
        return Choice("autograd", unknown)
    count = rows.count
    assert count is not None
    many_outputs = rows.out_features > _FEW_OUTPUTS
    if full and rows.dtype == torch.float64:
        if many_outputs:
            return Choice("autograd", "products of matrices, with so many targets")
        return Choice("fused", "full batch in float64, of which second moments would lose digits")
    models = len(optimizers)
    if full and rows.in_features <= _MOST_FEATURES:
        once, again, epoch = seconds(rows, count, models)
        if once + again * options.epochs < epoch * options.epochs:
            return Choice("statistics", "full batch: one pass over the rows serves all epochs")
    if many_outputs and models == 1:
        return Choice("autograd", "products of matrices, with so many targets")
    if rows.device.type != "cpu" and models == 1 and count * rows.in_features > _SMALL:
        return Choice("autograd", "each step is worth a launch of its own")
    return Choice("fused", "mini-batches" if not full else "so few rows that second moments are not worth it")


def _of(rows: Rows) -> str:
    return "" if rows.count is None else f" of {rows.count} rows"


def _of_statistics(rows: Rows, options: TrainingOptions, optimizers: Sequence[Optimizer]) -> Choice:
    engine = options.engine
    if options.batch_size is not None:
        raise ValueError(
            f"{rows.function}: batch_size must be None with LinearStatistics, which have no rows to cut, "
            f"but got {options.batch_size}"
        )
    if engine not in ("auto", "statistics"):
        raise ValueError(
            f"{rows.function}: engine must be 'statistics' or 'auto' with LinearStatistics, which have no rows, "
            f"but got {engine!r}"
        )
    if unknown := _why_not_operators(rows.dtype, optimizers):
        raise ValueError(f"{rows.function}: no engine trains on LinearStatistics with {unknown}")
    return Choice("statistics", "second moments instead of rows" if engine == "auto" else "asked for")


def _why_not_operators(dtype: torch.dtype, optimizers: Sequence[Optimizer]) -> str:
    """Return why the training-loop operators cannot do a run, or an empty string."""
    if dtype not in (torch.float32, torch.float64):
        return f"{str(dtype).removeprefix('torch.')} parameters, whose rounding in each step only the loop itself has"
    for optimizer in optimizers:
        if optimizer.rule() is None:
            return f"the optimizer {optimizer.class_name} with these options, none of plain sgd, adam and adamw"
    return ""


def seconds(rows: Rows, count: int, models: int) -> tuple[float, float, float]:
    """Estimate the seconds of gathering second moments, of an epoch on them, and of a fused epoch over the rows."""
    features, outputs = rows.in_features, rows.out_features
    once = count * (features + outputs) ** 2 / 2 / _MOMENTS
    again = models * (outputs * features * features / _MOMENT_EPOCHS + _STEP / 4)
    read = count * features * rows.dtype.itemsize / _READ
    epoch = max(read, 2 * count * features * outputs * models / _PRODUCTS) + models * _STEP
    return once, again, epoch
