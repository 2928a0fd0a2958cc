"""Rows to train on and rows to validate with: in memory, in a table that is streamed, or what was gathered of them."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed
from torch import Tensor

from .. import _checks, functional
from ..data.gather import Pass, gather
from ..statistics import LinearStatistics
from .loop import batches

if TYPE_CHECKING:
    from .._typing import RowProgress
    from ..data.table import Table

__all__ = ["MemoryRows", "Rows", "StatisticsRows", "TableRows"]


class Rows(abc.ABC):
    """Rows to train on, and rows to validate with.

    Attributes:
        function: Whose arguments these are, for its sentences.
        in_features: D.
        out_features: O.
        dtype: Of the rows and of the model.
        device: Where the model is.
        has_validation: Whether there are rows to validate with.
    """

    function: str
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device
    has_validation: bool

    @property
    @abc.abstractmethod
    def count(self) -> int | None:
        """Number of rows to train on; None where only reading them all would tell."""

    @abc.abstractmethod
    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the second moments of the training rows and of those held out (or none), gathered once.

        Each is a list of six float64 tensors on the CPU (see :class:`torchintro.LinearStatistics`). Those of rows in
        memory are not finite if an element is not, and then no loss is: see :meth:`check_finite`.
        """

    @abc.abstractmethod
    def check_finite(self) -> None:
        """Raise the ValueError that names the first element that is NaN or infinite."""

    @abc.abstractmethod
    def loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return the loss of the training rows."""


class MemoryRows(Rows):
    """Matrices in one dtype on one device.

    Args:
        X: Features ``(N, D)``.
        y: Targets ``(N, O)``.
        validation: Features and targets of the rows held out, or None.
        function: Whose arguments these are.
        names: What the four matrices are called there.
    """

    def __init__(
        self,
        X: Tensor,
        y: Tensor,
        validation: tuple[Tensor, Tensor] | None = None,
        *,
        function: str = "fit",
        names: tuple[tuple[str, str], tuple[str, str]] = (("X", "y"), ("validation[0]", "validation[1]")),
    ) -> None:
        self.X, self.y, self.validation = X, y, validation
        self.function, self.names = function, names
        self.in_features, self.out_features = X.shape[1], y.shape[1]
        self.dtype, self.device = X.dtype, X.device
        self.has_validation = validation is not None
        self._is_finite = False
        self._moments: tuple[list[Tensor], list[Tensor]] | None = None

    @property
    def count(self) -> int:
        """Number of rows to train on."""
        return self.X.shape[0]

    def check_finite(self) -> None:
        """Raise the ValueError that names the first element that is NaN or infinite."""
        if not self._is_finite:
            for part, names in zip(((self.X, self.y), self.validation), self.names, strict=True):
                for matrix, name in zip(part or (), names, strict=False):
                    _checks.check_finite(self.function, name, matrix)
            self._is_finite = True

    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the second moments of the training rows and of those held out (or none), gathered once."""
        if self._moments is None:
            self._moments = _gather(self.X, self.y), [] if self.validation is None else _gather(*self.validation)
        return self._moments

    def loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return the loss of the training rows."""
        if bias is not None:
            bias = bias.to(self.device, self.dtype)
        with torch.no_grad():
            loss = functional.linear_mse_loss(self.X, weight.to(self.device, self.dtype), self.y, linear_bias=bias)
        return float(loss.item())

    def batches(
        self, batch_size: int | None, shuffle: bool, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut an epoch into mini-batches."""
        return batches(self.X, self.y, batch_size, shuffle, generator)


def _gather(X: Tensor, y: Tensor) -> list[Tensor]:
    return [moment.cpu() for moment in torch.ops.torchintro._linear_moments(X, y, None)]


class TableRows(Rows):
    """A table that is read piece by piece, as often as the engine needs.

    In a group of processes (``torch.distributed``) each gathers the second moments of its own share of the rows, and
    all end with those of all.

    Args:
        table: The rows to train on, or with a share held out, those and the others.
        validation: The share of the rows that is held out, another table, a pair of matrices, the statistics of other
            rows, or None.
        function: Whose arguments these are.
        dtype: Of the model.
        device: Of the model.
        seed: Decides which rows are held out.
        progress: How far a pass over the table has come, as :meth:`torchintro.Table.pieces` shows it.
        checkpoint: File from which a pass goes on, as for :meth:`torchintro.Table.statistics`; with ``.validation``
            behind its name that of a pass over another table, and with the rank, of several processes, that of one.
    """

    def __init__(
        self,
        table: Table,
        validation: float | Table | tuple[Tensor, Tensor] | LinearStatistics | None = None,
        *,
        function: str = "fit",
        dtype: torch.dtype,
        device: torch.device,
        seed: int | None = None,
        progress: RowProgress = None,
        checkpoint: str | Path | None = None,
    ) -> None:
        self.table, self.validation = table, validation
        self.function, self.dtype, self.device = function, dtype, device
        self.in_features, self.out_features = table.in_features, table.out_features
        self.has_validation = validation is not None
        self.seed, self.progress, self.checkpoint = seed or 0, progress, checkpoint
        self._statistics: LinearStatistics | None = None
        self._held_out: LinearStatistics | None = None

    @functools.cached_property
    def train(self) -> Table:
        """The rows that are not held out."""
        held_out = self.validation
        return self.table.split(held_out, seed=self.seed)[0] if isinstance(held_out, float) else self.table

    @property
    def count(self) -> int | None:
        """Number of rows to train on; None where only reading them all would tell."""
        return self.train.rows

    def check_finite(self) -> None:
        """Do nothing: a table's pieces are finite, or reading them says which value is not."""

    def statistics(self) -> LinearStatistics:
        """Return the statistics of the training rows of all processes, gathered once."""
        if self._statistics is None:
            fraction = self.validation if isinstance(self.validation, float) else None
            gathered = self._gather(self.table, fraction)
            if fraction is not None:  # of the same pass
                self._held_out = self._of_all(gathered.held_out, "validation")
            self._statistics = self._of_all(gathered.train, "X")
        return self._statistics

    def held_out(self) -> LinearStatistics | None:
        """Return the statistics of the rows held out of all processes (or none), gathered once."""
        given = self.validation
        if self._held_out is None and given is not None:
            if isinstance(given, float):
                self.statistics()
            elif isinstance(given, LinearStatistics):
                self._held_out = given
            elif isinstance(given, tuple):  # the same rows in each process
                self._held_out = LinearStatistics(self.in_features, self.out_features).update(*given)
            else:
                self._held_out = self._of_all(self._gather(given, suffix=".validation").train, "validation")
        return self._held_out

    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the second moments of the training rows and of those held out (or none), gathered once."""
        train, held_out = self.statistics(), self.held_out()
        return list(train.tensors), [] if held_out is None else [moment.cpu() for moment in held_out.tensors]

    def loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return the loss of the training rows."""
        return float(self.statistics().loss(weight, bias).item()) if torch.isfinite(weight).all() else math.nan

    def validation_loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return the loss of the rows held out, from their second moments."""
        held_out = self.held_out()
        assert held_out is not None
        return float(held_out.loss(weight, bias).item())

    def _gather(self, table: Table, fraction: float | None = None, suffix: str = "") -> Pass:
        """Gather the statistics of this process's share of a table, which has a checkpoint of its own."""
        rank, world_size = share = _share()
        checkpoint = self.checkpoint
        if checkpoint is not None:
            checkpoint = f"{checkpoint}{suffix}" + (f".{rank}" if world_size > 1 else "")
        return gather(
            self.function,
            table,
            fraction,
            seed=self.seed,
            share=share,
            progress=self.progress,
            checkpoint=checkpoint,
            dtype=self.dtype,
            device=self.device,
        )

    def _of_all(self, statistics: LinearStatistics, name: str) -> LinearStatistics:
        """Return the statistics of all processes on the CPU, given one's own."""
        if processes() > 1:
            statistics.reduce()
        if statistics.count.item() == 0:
            raise ValueError(f"{self.function}: {name} must have at least one row, but the table has none")
        return statistics.to("cpu")

    def pieces(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the training rows in pieces of whole mini-batches, the last one apart."""
        for X, y in self.train.pieces(multiple=batch_size):
            yield self._here(X, y)

    def batches(
        self, batch_size: int | None, shuffle: bool, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut an epoch into mini-batches, in the table's order."""
        assert batch_size is not None
        assert not shuffle
        for X, y in self.pieces(batch_size):
            yield from batches(X, y, batch_size, False, generator)

    def _here(self, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return X.to(self.device, self.dtype), y.to(self.device, self.dtype)


class StatisticsRows(Rows):
    """Second moments that were gathered before, in the place of rows.

    Args:
        train: Those of the rows to train on.
        validation: Those of the rows held out, or None.
        function: Whose arguments these are.
        dtype: Of the model.
        device: Of the model.
    """

    def __init__(
        self,
        train: LinearStatistics,
        validation: LinearStatistics | None = None,
        *,
        function: str = "fit",
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        for name, part in (("X", train), ("validation", validation)):
            if part is not None and part.count.item() == 0:
                raise ValueError(f"{function}: {name} must have at least one row of positive weight, but has none")
        self.train, self.validation = train, validation
        self.function, self.dtype, self.device = function, dtype, device
        self.in_features, self.out_features = train.in_features, train.out_features
        self.has_validation = validation is not None

    @property
    def count(self) -> None:
        """Number of rows to train on: a sum of weights does not tell."""
        return None

    def check_finite(self) -> None:
        """Do nothing: what is not finite is not let in."""

    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the second moments of the training rows and of those held out (or none)."""
        train, held_out = (
            [] if part is None else [moment.cpu() for moment in part.tensors] for part in (self.train, self.validation)
        )
        return train, held_out

    def loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return the loss of the training rows."""
        return float(self.train.loss(weight, bias).item()) if torch.isfinite(weight).all() else math.nan


def _share() -> tuple[int, int]:
    """Return this process's rank and how many there are."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def processes() -> int:
    """Return how many processes work together."""
    return _share()[1]
