"""How models are trained, checked once and carried as one object: :class:`TrainingOptions`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks

__all__ = ["ENGINES", "TrainingOptions", "check_options", "learning_rates"]

ENGINES = ("auto", "fused", "statistics", "autograd", "reference")


@dataclass(frozen=True)
class TrainingOptions:
    """What all models that are trained together share. Each has its own learning rate and optimizer besides.

    Attributes:
        epochs: Passes over the rows.
        batch_size: Rows of a step; None for all.
        shuffle: Whether mini-batches are cut from a permutation drawn each epoch, or from the rows as they are; None
            for whichever the rows can do.
        engine: One of :data:`ENGINES`.
        seed: Seed of the permutations; None draws them from PyTorch's global random state.
    """

    epochs: int
    batch_size: int | None = None
    shuffle: bool | None = None
    engine: str = "auto"
    seed: int | None = None

    def generator(self) -> torch.Generator | None:
        """Return a new generator of the permutations; None is PyTorch's global one."""
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)


def check_options(
    function: str,
    *,
    epochs: object,
    batch_size: object = None,
    shuffle: object = None,
    engine: object = "auto",
    seed: object = None,
) -> TrainingOptions:
    """Check what ``function`` was told about a training run, but for the learning rate and the optimizer.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument has a wrong value.
    """
    return TrainingOptions(
        epochs=_checks.positive_integer(function, "epochs", epochs),
        batch_size=None if batch_size is None else _checks.positive_integer(function, "batch_size", batch_size),
        shuffle=None if shuffle is None else _checks.boolean(function, "shuffle", shuffle),
        engine=_checks.one_of(function, "engine", engine, ENGINES),
        seed=None if seed is None else _checks.integer(function, "seed", seed),
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
