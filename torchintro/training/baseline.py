"""What the plain PyTorch loop would take: it is timed on a few epochs, not run in full."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass, replace

from torch import nn

from .optimizers import Optimizer
from .options import TrainingOptions
from .row_kinds import MemoryRows
from .train import train_models

__all__ = ["LR", "PlainLoop", "time_plain_loop"]

# For how long it is timed, and for at most how many epochs.
_SECONDS = 0.4
_MOST_EPOCHS = 50
_PARTS = 3
# With this learning rate nothing diverges while it is timed.
LR = 1e-30


@dataclass(frozen=True)
class PlainLoop:
    """How long an epoch of the plain loop takes, validation included, and how many epochs were timed."""

    seconds_per_epoch: float
    epochs: int


def time_plain_loop(
    rows: MemoryRows,
    options: TrainingOptions,
    initial: nn.Linear,
    optimizer: Optimizer,
    *,
    most_epochs: int = _MOST_EPOCHS,
) -> PlainLoop:
    """Time a few epochs of the engine ``"reference"``, for about half a second or one epoch.

    Args:
        rows: What to train on.
        options: How, but for the number of epochs.
        initial: The parameters to begin with; stays as it is.
        optimizer: Its update.
        most_epochs: How many epochs are timed at most.

    Returns:
        The time of an epoch.
    """

    def seconds(rows: MemoryRows, epochs: int) -> float:
        plain = replace(options, epochs=epochs, engine="reference")
        model = copy.deepcopy(initial)
        return train_models(rows, plain, model, lr=[LR], optimizers=[optimizer], into=model).seconds / epochs

    seconds(MemoryRows(rows.X[:1], rows.y[:1], rows.validation), 1)  # pays for what is loaded on first use
    start = time.perf_counter()
    first = seconds(rows, 1)
    epochs = min(int(_SECONDS / (time.perf_counter() - start)), _MOST_EPOCHS, most_epochs)
    if epochs < _PARTS:
        return PlainLoop(seconds(rows, epochs), epochs) if epochs > 0 else PlainLoop(first, 1)
    # The median of some parts: on a busy machine one of them may take many times as long.
    part = epochs // _PARTS
    return PlainLoop(statistics.median(seconds(rows, part) for _ in range(_PARTS)), part * _PARTS)
