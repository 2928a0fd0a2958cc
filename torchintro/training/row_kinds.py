"""The kinds of rows that are trained on or judged by: in memory, in a table that is streamed, or gathered before.

Which kind it is, :func:`torchintro.training.rows.as_rows` decides. What can be done with the rows, they say themselves.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed
from torch import Tensor

from .. import _checks, functional
from .._typing import RowProgress
from ..data.gather import Pass, gather
from ..data.table import Table
from ..statistics import LinearStatistics
from .options import TrainingOptions

__all__ = ["VALIDATION", "MemoryRows", "Rows", "StatisticsRows", "TableRows", "processes"]

# What the two members of a validation pair are called in sentences.
VALIDATION = ("validation[0]", "validation[1]")

# Features and targets of some rows after the other; closing it ends what reads them.
Slices: TypeAlias = "Generator[tuple[Tensor, Tensor]]"


class Rows(abc.ABC):
    """Rows to train on, and rows to validate with.

    Attributes:
        function: Whose arguments these are, for its sentences.
        in_features: D.
        out_features: O.
        dtype: Of the rows and of the model.
        device: Where the model is.
        has_rows: Whether there are rows that can be read, or only what was gathered of them.
        has_validation: Whether there are rows to validate with.
        is_shared: Whether each process of ``torch.distributed`` holds a part of the rows.
    """

    function: str
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device
    has_rows = True
    has_validation = False
    is_shared = False

    @property
    def in_memory(self) -> MemoryRows | None:
        """These rows if all of them are in memory, otherwise None."""
        return None

    @property
    @abc.abstractmethod
    def count(self) -> int | None:
        """Number of rows to train on; None where only reading them all would tell."""

    def is_full_batch(self, batch_size: int | None) -> bool:
        """Say whether a batch is all of the rows, as far as their number is known."""
        return batch_size is None or (self.count is not None and batch_size >= self.count)

    def slices(self, size: int, progress: RowProgress = None) -> Slices:
        """Cut the training rows, in their order, into slices of at most ``size`` rows."""
        raise NotImplementedError

    def pieces(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the training rows, in their order, in pieces of whole mini-batches; the last batch may be shorter."""
        raise NotImplementedError

    def batches(
        self, options: TrainingOptions, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut an epoch into mini-batches."""
        raise NotImplementedError

    @abc.abstractmethod
    def check_finite(self) -> None:
        """Raise the ValueError that names the first element that is NaN or infinite."""

    @abc.abstractmethod
    def statistics(self) -> LinearStatistics:
        """Return the statistics of the training rows of all processes, gathered once."""

    def validation_statistics(self) -> LinearStatistics | None:
        """Return the statistics of the rows held out of all processes, gathered once; None without any."""
        return None

    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the second moments of the training rows and of those held out (or none), gathered once.

        Each is a list of six float64 tensors on the CPU (see :class:`torchintro.LinearStatistics`). Those of rows in
        memory are not finite if an element is not, and then no loss is: see :meth:`check_finite`.
        """
        train, held_out = self.statistics(), self.validation_statistics()
        of_held_out = () if held_out is None else held_out.tensors
        return [moment.cpu() for moment in train.tensors], [moment.cpu() for moment in of_held_out]

    def loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return the loss of the training rows."""
        return float(self.statistics().loss(weight, bias).item()) if torch.isfinite(weight).all() else math.nan

    def validation_loss(self, loss_function: Callable[..., Tensor], weight: Tensor, bias: Tensor | None) -> float:
        """Return the loss of the rows held out, by the engine's function where the rows themselves are there."""
        held_out = self.validation_statistics()
        assert held_out is not None
        return float(held_out.loss(weight, bias).item())

    @abc.abstractmethod
    def identity(self, contents: bool) -> dict[str, Any]:
        """Return what makes two trainings on these rows comparable, by name; ``contents`` too, which are all read."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Return a text that is another one for other rows."""


class MemoryRows(Rows):
    """Tensors in one dtype on one device: matrices, unless they are only to be judged or predicted.

    Args:
        X: Features ``(N, D)``.
        y: Targets ``(N, O)``.
        validation: Features and targets of the rows held out, or None.
        function: Whose arguments these are.
        names: What features and targets are called there.
    """

    def __init__(
        self,
        X: Tensor,
        y: Tensor,
        validation: tuple[Tensor, Tensor] | None = None,
        *,
        function: str = "fit",
        names: tuple[str, str] = ("X", "y"),
    ) -> None:
        self.X, self.y, self.validation = X, y, validation
        self.function, self.names = function, names
        self.in_features, self.out_features = (math.prod(part.shape[1:]) for part in (X, y))
        self.dtype, self.device = X.dtype, X.device
        self.has_validation = validation is not None
        self._is_finite = False

    @property
    def in_memory(self) -> MemoryRows:
        """These rows."""
        return self

    @property
    def count(self) -> int:
        """Number of rows to train on."""
        return self.X.shape[0]

    def slices(self, size: int, progress: RowProgress = None) -> Slices:
        """Cut the training rows, in their order, into slices of ``size`` rows; the last may be shorter."""
        yield from zip(torch.split(self.X, size), torch.split(self.y, size), strict=True)

    def pieces(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return all rows as one piece."""
        yield self.X, self.y

    def batches(
        self, options: TrainingOptions, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut an epoch into mini-batches, from a random permutation or from the rows as they are."""
        if options.batch_size is None or options.batch_size >= self.count:
            yield self.X, self.y
        elif options.shuffle is False:
            yield from self.slices(options.batch_size)
        else:
            order = torch.randperm(self.count, generator=generator).to(self.device)
            for rows in torch.split(order, options.batch_size):
                yield self.X.index_select(0, rows), self.y.index_select(0, rows)

    def check_finite(self) -> None:
        """Raise the ValueError that names the first element that is NaN or infinite."""
        if not self._is_finite:
            named = [*zip(self.names, (self.X, self.y), strict=True)]
            named += zip(VALIDATION, self.validation or (), strict=False)
            for name, matrix in named:
                _checks.check_finite(self.function, name, matrix)
            self._is_finite = True

    def statistics(self) -> LinearStatistics:
        """Return the statistics of the training rows."""
        return LinearStatistics(self.in_features, self.out_features).update(self.X, self.y)

    @functools.cached_property
    def _moments(self) -> tuple[list[Tensor], list[Tensor]]:
        train, held_out = (
            [] if part is None else [moment.cpu() for moment in torch.ops.torchintro._linear_moments(*part, None)]
            for part in ((self.X, self.y), self.validation)
        )
        return train, held_out

    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the second moments of the training rows and of those held out (or none), gathered once."""
        return self._moments

    def loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return the loss of the training rows."""
        return self._loss(functional.linear_mse_loss, self.X, self.y, weight, bias)

    def validation_loss(self, loss_function: Callable[..., Tensor], weight: Tensor, bias: Tensor | None) -> float:
        """Return the loss of the rows held out."""
        assert self.validation is not None
        return self._loss(loss_function, *self.validation, weight, bias)

    def _loss(
        self, loss_function: Callable[..., Tensor], X: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None
    ) -> float:
        here = (None if part is None else part.to(self.device, self.dtype) for part in (weight, bias))
        with torch.no_grad():
            weight_here, bias_here = here
            return float(loss_function(X, weight_here, y, linear_bias=bias_here).item())

    def identity(self, contents: bool) -> dict[str, Any]:
        """Return what makes two trainings on these rows comparable, by name."""
        shapes: dict[str, Any] = {"X": list(self.X.shape), "y": list(self.y.shape)}
        shapes["validation rows"] = 0 if self.validation is None else self.validation[0].shape[0]
        return shapes | ({"data (SHA-256)": self.fingerprint()} if contents else {})

    def fingerprint(self) -> str:
        """Return a text that is another one for other rows."""
        return _digest(self.X, self.y, *(self.validation or ()))


class TableRows(Rows):
    """A table that is read piece by piece, as often as the engine needs.

    In a group of processes (``torch.distributed``) each gathers the second moments of its own share of the rows, and
    all end with those of all.

    Args:
        table: The rows to train on, or with a share held out, those and the others.
        validation: The share of the rows that is held out, other rows, or None.
        function: Whose arguments these are.
        name: What the table is called there.
        dtype: Of the model.
        device: Of the model.
        seed: Decides which rows are held out.
        progress: How far a pass over the table has come, as :meth:`torchintro.Table.pieces` shows it.
        checkpoint: File from which a pass goes on, as for :meth:`torchintro.Table.statistics`; with the rank behind
            its name, of several processes, that of one.
    """

    is_shared = True

    def __init__(
        self,
        table: Table,
        validation: float | Rows | None = None,
        *,
        function: str = "fit",
        name: str = "X",
        dtype: torch.dtype,
        device: torch.device,
        seed: int | None = None,
        progress: RowProgress = None,
        checkpoint: str | Path | None = None,
    ) -> None:
        self.table = table
        self.share = validation if isinstance(validation, float) else None
        self.validation = None if isinstance(validation, float) else validation
        self.function, self.name, self.dtype, self.device = function, name, dtype, device
        self.in_features, self.out_features = table.in_features, table.out_features
        self.has_validation = validation is not None
        self.seed, self.progress, self.checkpoint = seed or 0, progress, checkpoint

    @functools.cached_property
    def train(self) -> Table:
        """The rows that are not held out."""
        return self.table if self.share is None else self.table.split(self.share, seed=self.seed)[0]

    @property
    def count(self) -> int | None:
        """Number of rows to train on; None where only reading them all would tell."""
        return self.train.rows

    def slices(self, size: int, progress: RowProgress = None) -> Slices:
        """Read the training rows, in their order, in slices of at most ``size`` rows."""
        for X, y in self._pieces(1, progress):
            yield from zip(torch.split(X, size), torch.split(y, size), strict=True)

    def pieces(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the training rows, in their order, in pieces of whole mini-batches; the last batch may be shorter."""
        return self._pieces(batch_size)

    def batches(
        self, options: TrainingOptions, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut an epoch into mini-batches, in the table's order."""
        assert options.batch_size is not None
        for X, y in self.pieces(options.batch_size):
            yield from zip(torch.split(X, options.batch_size), torch.split(y, options.batch_size), strict=True)

    def _pieces(self, multiple: int, progress: RowProgress = None) -> Iterator[tuple[Tensor, Tensor]]:
        with contextlib.closing(self.train.pieces(multiple=multiple, progress=progress)) as pieces:  # type: ignore[type-var]
            for X, y in pieces:
                yield X.to(self.device, self.dtype), y.to(self.device, self.dtype)

    def check_finite(self) -> None:
        """Do nothing: a table's pieces are finite, or reading them says which value is not."""

    @functools.cached_property
    def _statistics(self) -> tuple[LinearStatistics, LinearStatistics | None]:
        """Of the training rows and of the share held out, both gathered in one pass."""
        gathered = self._gather()
        held_out = None if self.share is None else self._of_all(gathered.held_out, "validation")
        return self._of_all(gathered.train, self.name), held_out

    def statistics(self) -> LinearStatistics:
        """Return the statistics of the training rows of all processes, gathered once."""
        return self._statistics[0]

    @functools.cached_property
    def _validation_statistics(self) -> LinearStatistics | None:
        return self._statistics[1] if self.validation is None else self.validation.statistics()

    def validation_statistics(self) -> LinearStatistics | None:
        """Return the statistics of the rows held out of all processes, gathered once; None without any."""
        return self._validation_statistics if self.has_validation else None

    def _gather(self) -> Pass:
        """Gather the statistics of this process's share of the table."""
        rank, world_size = share = _share()
        checkpoint = self.checkpoint
        if checkpoint is not None and world_size > 1:
            checkpoint = f"{checkpoint}.{rank}"
        return gather(
            self.function,
            self.table,
            self.share,
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

    def identity(self, contents: bool) -> dict[str, Any]:
        """Return what makes two trainings on these rows comparable, by name."""
        if self.validation is None:
            validation = repr(self.share)
        else:
            validation = self.validation.fingerprint() if contents else repr(self.validation.identity(False))
        settings = {"X": repr(self.table), "validation": validation}
        return settings | ({"table": self.fingerprint()} if contents else {})

    def fingerprint(self) -> str:
        """Return a text that is another one for other rows."""
        return self.table.fingerprint()


class StatisticsRows(Rows):
    """Second moments that were gathered before, in the place of rows.

    Args:
        train: Those of the rows to train on.
        validation: Those of the rows held out, or None.
        function: Whose arguments these are.
        name: What those of the rows to train on are called there.
        dtype: Of the model.
        device: Of the model.
    """

    has_rows = False

    def __init__(
        self,
        train: LinearStatistics,
        validation: LinearStatistics | None = None,
        *,
        function: str = "fit",
        name: str = "X",
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        for part_name, part in ((name, train), ("validation", validation)):
            if part is not None and part.count.item() == 0:
                raise ValueError(f"{function}: {part_name} must have at least one row of positive weight, but has none")
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

    def statistics(self) -> LinearStatistics:
        """Return the statistics of the training rows."""
        return self.train

    def validation_statistics(self) -> LinearStatistics | None:
        """Return the statistics of the rows held out."""
        return self.validation

    def identity(self, contents: bool) -> dict[str, Any]:
        """Return what makes two trainings on these rows comparable, by name."""
        settings = {"X": repr(self.train), "validation": repr(self.validation)}
        return settings | ({"statistics (SHA-256)": self.fingerprint()} if contents else {})

    def fingerprint(self) -> str:
        """Return a text that is another one for other rows."""
        return _digest(*self.train.tensors, *(() if self.validation is None else self.validation.tensors))


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _share() -> tuple[int, int]:
    """Return this process's rank and how many there are."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def processes() -> int:
    """Return how many processes work together."""
    return _share()[1]
