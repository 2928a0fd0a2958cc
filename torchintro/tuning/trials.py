"""How :func:`torchintro.tune` runs trials: a batch is asked for, trained together and recorded one by one."""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
import torch
from optuna.distributions import FloatDistribution
from optuna.study._tell import _tell_with_warning
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import Tensor, nn

from .. import _checks
from ..training import baseline as _plain
from ..training.baseline import PlainLoop, time_plain_loop
from ..training.choice import choose
from ..training.optimizers import Optimizer, parse_optimizer
from ..training.options import TrainingOptions
from ..training.row_kinds import Rows
from ..training.train import train_models
from .space import BatchSampler, Space

__all__ = ["Outcome", "Trainer", "Trials", "held_interrupts"]

# What the models of a batch may take: for each its parameters, its gradients and up to four rows of optimizer state.
_BATCH_BYTES = 2**28
_ROWS_A_MODEL = 6
# After so many trials in a row that the optimizer refuses, the next are not asked for.
_MOST_REFUSED = 100

_logger = optuna.logging.get_logger("optuna.torchintro")


@contextlib.contextmanager
def held_interrupts() -> Iterator[None]:
    """Hold a Ctrl-C back until the context ends, where a storage is at work; a second one comes through at once.

    SQLAlchemy lets KeyboardInterrupt pass through weak references' callbacks and clean-ups, where Python drops it,
    another error takes its place, or a connection is left with a lock that what comes next waits for. A handler of the
    caller's own is left alone.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def hold(number: int, frame: types.FrameType | None) -> None:
        nonlocal came
        if came:
            signal.default_int_handler(number, frame)
        came = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


@dataclass(frozen=True, eq=False)
class Outcome:
    """One trained model.

    Attributes:
        engine: The engine that ran.
        reason: Why it was the one.
        seconds_per_epoch: Its share of the time of the models trained with it.
        loss: The training loss of the last epoch.
        value: The objective after the last epoch.
        losses: The training loss of every epoch.
        values: The objective after every epoch.
        diverged: The epoch, counted from 1, in which it diverged, or None.
    """

    engine: str
    reason: str
    seconds_per_epoch: float
    loss: float
    value: float
    losses: Tensor
    values: Tensor
    diverged: int | None


class Trainer:
    """Trains a model of each of several parameters: what all trials of a study have in common.

    With rows that are shared, every rank trains the same models: rank 0 sends the others what to train.

    Attributes:
        epochs: Epochs of each trial.
        most_models: How many models may be trained together.
        rank: This process's rank; 0 with rows that are not shared.
    """

    def __init__(
        self,
        rows: Rows,
        options: TrainingOptions,
        initial: nn.Linear,
        *,
        optimizer: object,
        momentum: object,
        weight_decay: object,
        optimizer_options: object,
    ) -> None:
        self.epochs = options.epochs
        self._rows, self._training, self._initial = rows, options, initial
        self._optimizer = optimizer
        self._named = {"momentum": momentum, "weight_decay": weight_decay}
        self._optimizer_options = optimizer_options
        self._made: dict[tuple[tuple[str, Any], ...], Optimizer] = {}
        self._reference: dict[TrainingOptions, PlainLoop] = {}
        size = sum(parameter.numel() * parameter.element_size() for parameter in initial.parameters())
        self.most_models = max(1, _BATCH_BYTES // (size * _ROWS_A_MODEL))
        self._shared = rows.is_shared and torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if self._shared else 0

    def optimizer(self, parameters: Mapping[str, Any]) -> Optimizer:
        """Return the optimizer of a trial's parameters; raise a ValueError if torch refuses them."""
        chosen = {name: value for name, value in parameters.items() if name not in ("lr", "batch_size")}
        key = tuple(chosen.items())
        if key not in self._made:
            named = {name: chosen.pop(name, value) for name, value in self._named.items()}
            options = self._optimizer_options
            if chosen:
                options = {**(options if isinstance(options, Mapping) else {}), **chosen}
            made = parse_optimizer("tune", self._optimizer, named["momentum"], named["weight_decay"], options)
            made.check(list(self._initial.parameters()), parameters.get("lr", _plain.LR))
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
        self._send(batch)
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
        if rows is None:
            return None
        if options not in self._reference:
            self._reference[options] = time_plain_loop(rows, options, self._initial, self.optimizer(parameters))
        return self._reference[options]

    @contextlib.contextmanager
    def leading(self) -> Iterator[Callable[[optuna.Study], None]]:
        """Have the other ranks train along until the context ends; give a function to name the study by."""
        studies: list[optuna.Study] = []
        if self._shared:
            self._send({name: tensor.cpu() for name, tensor in self._initial.state_dict().items()})
        try:
            yield studies.append
        except BaseException as error:
            self._send(f"{type(error).__name__}: {error}")
            raise
        if self._shared:
            (study,) = studies
            self._send((study.study_name, study.user_attrs, study.trials))

    def follow(self) -> optuna.Study:
        """Train what rank 0 trains; return a copy of its study."""
        self._initial.load_state_dict(self._receive())
        while isinstance(message := self._receive(), list):
            for _ in self.train(message):
                pass
        if isinstance(message, str):
            raise RuntimeError(f"tune: rank 0 stopped the study: {message}")
        name, attributes, trials = message
        study = optuna.create_study(study_name=name, direction="minimize")
        study.add_trials(trials)
        for key, value in attributes.items():
            study.set_user_attr(key, value)
        return study

    def _send(self, message: Any) -> None:
        if self._shared and self.rank == 0:
            torch.distributed.broadcast_object_list([message], src=0)

    def _receive(self) -> Any:
        message: list[Any] = [None]
        torch.distributed.broadcast_object_list(message, src=0)
        return message[0]


class Trials:
    """Asks a study for trials, trains them and records what came of them."""

    def __init__(
        self,
        study: optuna.Study,
        trainer: Trainer,
        *,
        lr: FloatDistribution,
        others: Space,
        prunes: bool,
        seed: int | None,
        benchmark: bool,
        progress: bool | Callable[[optuna.Study, FrozenTrial], None],
    ) -> None:
        """Make it.

        Args:
            study: The study.
            trainer: Trains its trials.
            lr: The distribution of the learning rate.
            others: Those of the other parameters.
            prunes: Whether the pruner is asked.
            seed: As for :class:`BatchSampler`, for the first batch.
            benchmark: As for tune.
            progress: As for tune.
        """
        self._study = study
        self._trainer = trainer
        self._lr = lr
        self._space: Space = {**others, "lr": lr}  # what BatchSampler says of the order
        self._prunes = prunes
        self._seed = seed
        self._benchmark = benchmark
        self._progress = progress
        self._refused = 0
        self._reasons: dict[str, str] = {}

    def run(self, size: int) -> None:
        """Run a batch of trials; those that an exception leaves without a record are failed ones."""
        suggesting = BatchSampler(self._study.sampler, self._lr, size, self._seed)
        self._seed = None
        recorded: set[int] = set()
        try:
            batch = []
            for trial, parameters in self._ask(suggesting, size):
                reason = self._trainer.refusal(parameters)
                if reason is None:
                    self._refused = 0
                    batch.append((trial, parameters))
                else:
                    with held_interrupts():
                        self._refuse(trial, parameters, reason, recorded)
                        self._show(trial)
            if batch:
                outcomes = self._trainer.train([parameters for _, parameters in batch])
                for (trial, parameters), outcome in zip(batch, outcomes, strict=True):
                    with held_interrupts():
                        self._record(trial, parameters, outcome, recorded)
                        self._show(trial)
        except BaseException:
            for number in suggesting.numbers:
                if number not in recorded:
                    with contextlib.suppress(Exception), held_interrupts():  # the one on its way says more
                        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
            raise

    def _ask(self, suggesting: BatchSampler, size: int) -> list[tuple[Trial, dict[str, Any]]]:
        asked = []
        self._study.sampler = suggesting
        try:
            for _ in range(size):
                with held_interrupts():
                    trial = self._study.ask(self._space)
                    parameters = trial.params
                asked.append((trial, parameters))
                suggesting.take(parameters)
        finally:
            self._study.sampler = suggesting.base
        return asked

    def _refuse(self, trial: Trial, parameters: dict[str, Any], reason: str, recorded: set[int]) -> None:
        trial.set_user_attr("refused", reason)
        self._tell(trial, recorded, TrialState.FAIL)
        self._refused += 1
        if self._refused == _MOST_REFUSED:
            raise ValueError(
                f"tune: search_space must hold values that go together, but {_MOST_REFUSED} trials in a row were "
                f"refused, the last with {parameters}: {reason.removeprefix('tune: ')}"
            )

    def _record(self, trial: Trial, parameters: dict[str, Any], outcome: Outcome, recorded: set[int]) -> None:
        epochs = self._trainer.epochs
        pruned = False
        if self._prunes:
            for epoch, value in enumerate(outcome.values.tolist()):
                if not math.isfinite(value):
                    break
                trial.report(value, epoch)
                if trial.should_prune():
                    pruned, epochs = True, epoch + 1
                    break
        diverged = outcome.diverged is not None and not pruned
        attributes: dict[str, Any] = {
            "engine": outcome.engine,
            "epochs": epochs,
            "seconds_per_epoch": outcome.seconds_per_epoch,
            "train_loss": math.inf if diverged else outcome.loss,
        }
        if pruned:
            attributes["train_loss"] = outcome.losses[epochs - 1].item()
        if diverged:
            attributes |= {"diverged": True, "diverged_epoch": outcome.diverged}
        if self._benchmark and (plain := self._trainer.reference(parameters)) is not None:
            attributes |= {"reference_seconds_per_epoch": plain.seconds_per_epoch, "reference_epochs": plain.epochs}
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        if outcome.engine not in self._reasons:
            self._reasons[outcome.engine] = outcome.reason
            self._study.set_user_attr("engines", self._reasons)
        if pruned:
            self._tell(trial, recorded, TrialState.PRUNED)
        else:
            self._tell(trial, recorded, TrialState.COMPLETE, math.inf if diverged else outcome.value)

    def _tell(self, trial: Trial, recorded: set[int], state: TrialState, value: float | None = None) -> None:
        # As study.tell does, less its deep copy of the trial: that takes longer than all else here.
        _tell_with_warning(self._study, trial, value, state)
        recorded.add(trial.number)

    def _show(self, trial: Trial) -> None:
        if self._progress is True:
            self._log(self._study._storage.get_trial(trial._trial_id))
        elif callable(self._progress):
            self._progress(self._study, copy.deepcopy(self._study._storage.get_trial(trial._trial_id)))

    def _log(self, told: FrozenTrial) -> None:
        """Log what ``study.optimize`` does."""
        if told.state == TrialState.PRUNED:
            _logger.info(f"Trial {told.number} pruned.")
        elif told.state == TrialState.FAIL:
            _logger.warning(
                f"Trial {told.number} failed with parameters: {told.params} because of the following error: "
                f"{told.user_attrs['refused']}."
            )
        else:
            best = self._study.best_trial
            _logger.info(
                f"Trial {told.number} finished with value: {told.value} and parameters: {told.params}. "
                f"Best is trial {best.number} with value: {best.value}."
            )
