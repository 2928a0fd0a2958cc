"""Who hears of a training run while it goes on: :func:`listener_of` makes it of the argument ``progress``."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .choice import Choice

__all__ = ["Listener", "listener_of"]


class Listener(abc.ABC):
    """Hears of the engine and of epochs."""

    @abc.abstractmethod
    def begin(self, choice: Choice) -> None:
        """Hear of the engine, before the first epoch."""

    @abc.abstractmethod
    def epoch(self, epoch: int, losses: Tensor) -> None:
        """Hear of an epoch, counted from 1, and of the models' losses ``(K,)``."""

    @abc.abstractmethod
    def patience(self, done: int) -> int | None:
        """Return for how many epochs after those that are done it can wait to hear of them; None for any number."""


class _Printer(Listener):
    """Prints the engine and the loss of every tenth of the run."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs

    def begin(self, choice: Choice) -> None:
        print(f"Engine: {choice.engine} ({choice.reason})")

    def epoch(self, epoch: int, losses: Tensor) -> None:
        if self._is_shown(epoch):
            print(f"Epoch [{epoch}/{self._epochs}], Loss: {losses.item():.4f}")

    def patience(self, done: int) -> int:
        return next(epoch for epoch in range(done + 1, self._epochs + 1) if self._is_shown(epoch)) - done

    def _is_shown(self, epoch: int) -> bool:
        return epoch * 10 // self._epochs > (epoch - 1) * 10 // self._epochs


class _Caller(Listener):
    """Calls what the user gave; if that has no method ``begin``, after every single epoch."""

    def __init__(self, progress: Callable[[int, float], Any]) -> None:
        self._progress = progress
        self._begin = getattr(progress, "begin", None)

    def begin(self, choice: Choice) -> None:
        if self._begin is not None:
            self._begin(choice.engine, choice.reason)

    def epoch(self, epoch: int, losses: Tensor) -> None:
        self._progress(epoch, losses.item())

    def patience(self, done: int) -> int | None:
        return 1 if self._begin is None else None


def listener_of(function: str, progress: object, epochs: int) -> Listener | None:
    """Return who hears of a run of one model; None if nobody does."""
    if callable(progress):
        return _Caller(progress)
    if not isinstance(progress, bool):
        raise TypeError(f"{function}: progress must be True, False or a callable, but got {progress!r}")
    return _Printer(epochs) if progress else None
