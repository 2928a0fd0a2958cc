"""What trains the trials of :func:`torchintro.tune`: models of one study, as many together as the engine can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .. import _checks
from ..training import baseline
from ..training.baseline import PlainLoop, time_plain_loop
from ..training.choice import choose
from ..training.optimizers import Optimizer, parse_optimizer
from ..training.options import TrainingOptions
from ..training.row_kinds import Rows
from ..training.train import train_models

__all__ = ["Outcome", "Trainer"]

# What the models of a batch may take: for each its parameters, its gradients and up to four rows of optimizer state.
_BATCH_BYTES = 2**28
_ROWS_A_MODEL = 6


@dataclass(frozen=True, eq=False)
class Outcome:
    """One trained model: its training losses, and the values of the objective, in the last epoch and in every one."""

    engine: str
    reason: str
    seconds_per_epoch: float  # its share of the time of the models trained with it
    loss: float
    value: float
    losses: Tensor
    values: Tensor
    diverged: int | None  # the epoch, counted from 1


class Trainer:
    """Trains a model of each of several parameters, of which ``optimizer`` holds what all have in common."""

    def __init__(self, rows: Rows, options: TrainingOptions, initial: nn.Linear, optimizer: Mapping[str, Any]) -> None:
        self.epochs = options.epochs
        self._rows, self._training, self._initial, self._given = rows, options, initial, optimizer
        self._made: dict[tuple[tuple[str, Any], ...], Optimizer] = {}
        self._reference: dict[TrainingOptions, PlainLoop] = {}
        size = sum(parameter.numel() * parameter.element_size() for parameter in initial.parameters())
        self.most_models = max(1, _BATCH_BYTES // (size * _ROWS_A_MODEL))

    def optimizer(self, parameters: Mapping[str, Any]) -> Optimizer:
        """Return the optimizer of a trial's parameters; raise a ValueError if torch refuses them."""
        chosen = {name: value for name, value in parameters.items() if name not in ("lr", "batch_size")}
        key = tuple(chosen.items())
        if key not in self._made:
            momentum, weight_decay = (chosen.pop(name, self._given[name]) for name in ("momentum", "weight_decay"))
            options = self._given["optimizer_options"]
            if chosen:
                options = {**(options if isinstance(options, Mapping) else {}), **chosen}
            made = parse_optimizer("tune", self._given["optimizer"], momentum, weight_decay, options)
            made.check(list(self._initial.parameters()), parameters.get("lr", baseline.LR))
            self._made[key] = made
        return self._made[key]

    def refusal(self, parameters: Mapping[str, Any]) -> str | None:
        """Say why a trial cannot have these parameters; None if it can."""
        try:
            if "lr" in parameters:
                _checks.positive("tune", "lr", parameters["lr"])
            if parameters.get("batch_size") is not None:
                _checks.positive_integer("tune", "batch_size", parameters["batch_size"])
            self.optimizer(parameters)
        except (TypeError, ValueError) as error:
            return str(error)
        return None

    def check(self) -> None:
        """Raise the ValueError of an optimizer or an engine that cannot do this."""
        choose(self._rows, self._training, [self.optimizer({})])

    def _options(self, parameters: Mapping[str, Any]) -> TrainingOptions:
        return replace(self._training, batch_size=parameters.get("batch_size", self._training.batch_size))

    def train(self, batch: Sequence[Mapping[str, Any]]) -> Iterator[Outcome]:
        """Train a model of each parameters; give their outcomes in order, as soon as they and those before are there.

        Models of an equal batch size are trained together, unless the engine trains one after the other anyway.
        """
        optimizers = [self.optimizer(parameters) for parameters in batch]
        groups: dict[TrainingOptions, list[int]] = {}
        for index, parameters in enumerate(batch):
            groups.setdefault(self._options(parameters), []).append(index)
        jobs: list[tuple[list[int], TrainingOptions]] = []
        for options, members in groups.items():
            engine = choose(self._rows, options, [optimizers[index] for index in members]).engine
            alone = engine in ("autograd", "reference")
            jobs += [([index], options) for index in members] if alone else [(members, options)]
        outcomes: dict[int, Outcome] = {}
        done = 0
        for members, options in sorted(jobs, key=lambda job: job[0][0]):
            trained = train_models(
                self._rows,
                options=options,
                initial=self._initial,
                lr=[batch[index]["lr"] for index in members],
                optimizers=[optimizers[index] for index in members],
            )
            failed = [None if failure is None else failure.epoch for failure in trained.failures]
            epochs = sum(epoch or self.epochs for epoch in failed)
            values = trained.losses if trained.validation_losses is None else trained.validation_losses
            columns = (trained.losses[-1].tolist(), values[-1].tolist(), trained.losses.T, values.T, failed)
            for index, *column in zip(members, *columns, strict=True):
                outcomes[index] = Outcome(trained.engine, trained.reason, trained.seconds / epochs, *column)
            while done in outcomes:
                yield outcomes.pop(done)
                done += 1

    def reference(self, parameters: Mapping[str, Any]) -> PlainLoop | None:
        """Return what an epoch of the plain loop takes, measured on a few at the first call for a batch size."""
        rows, options = self._rows.in_memory, self._options(parameters)
        if rows is not None and options not in self._reference:
            self._reference[options] = time_plain_loop(rows, options, self._initial, self.optimizer(parameters))
        return self._reference.get(options)
