"""What the plain PyTorch loop would take: it is timed on a few epochs, not run in full."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .fit import fit
from .optimizers import Optimizer

__all__ = ["LR", "PlainLoop", "time_plain_loop"]

# For how long it is timed, and for at most how many epochs.
_SECONDS = 0.4
_MOST_EPOCHS = 50
_PARTS = 3
# With this learning rate nothing diverges while it is timed.
LR = 1e-30


@dataclass(frozen=True)
class PlainLoop:
    """How long the plain loop takes.

    Attributes:
        seconds_per_epoch: Of which validation is a part, where there are rows held out.
        epochs: How many epochs were timed.
    """

    seconds_per_epoch: float
    epochs: int


def time_plain_loop(
    initial: nn.Linear,
    X: Tensor,
    y: Tensor,
    *,
    validation: Sequence[Tensor] | None,
    optimizer: Optimizer,
    batch_size: int | None,
    shuffle: bool | None = None,
    seed: int | None = None,
    most_epochs: int = _MOST_EPOCHS,
) -> PlainLoop:
    """Time a few epochs of the engine ``"reference"``, for about half a second or one epoch.

    Args:
        initial: The parameters to begin with; stays as it is.
        X: As for :func:`torchintro.fit`, and so are the others.
        y: See there.
        validation: See there.
        optimizer: What :func:`torchintro.optimizers.parse_optimizer` returned.
        batch_size: See there.
        shuffle: See there.
        seed: See there.
        most_epochs: How many epochs are timed at most.

    Returns:
        The time of an epoch.
    """
    options = dict(optimizer.arguments)
    named = {name: options.pop(name, 0.0) for name in ("momentum", "weight_decay")}

    def seconds(epochs: int, rows: int | None = None) -> float:
        result = fit(
            copy.deepcopy(initial),
            X[:rows],
            y[:rows],
            lr=LR,
            epochs=epochs,
            batch_size=batch_size,
            shuffle=shuffle,
            optimizer=optimizer.class_name,
            optimizer_options=options,
            validation=validation,
            seed=seed,
            engine="reference",
            **named,
        )
        return result.seconds / epochs

    seconds(1, rows=1)  # pays for what is loaded on first use
    start = time.perf_counter()
    first = seconds(1)
    epochs = min(int(_SECONDS / (time.perf_counter() - start)), _MOST_EPOCHS, most_epochs)
    if epochs < _PARTS:
        return PlainLoop(seconds(epochs), epochs) if epochs > 0 else PlainLoop(first, 1)
    # The median of some parts: on a busy machine one of them may take many times as long.
    part = epochs // _PARTS
    return PlainLoop(statistics.median(seconds(part) for _ in range(_PARTS)), part * _PARTS)
