"""How :func:`torchintro.tune` runs trials: a batch is asked for, trained together and recorded one by one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from .internals import is_stopped, stoppable
from .sampler import BatchSampler, batch_size_of
from .space import Space
from .study import finished, held_interrupts
from .trainer import Outcome, Trainer

__all__ = ["Trials"]

# After so many trials in a row that the optimizer refuses, the next are not asked for.
_MOST_REFUSED = 100

_logger = optuna.logging.get_logger("optuna.torchintro")


class Trials:
    """Asks a study for trials, trains them and records what came of them.

    ``lr`` and ``others`` are what is searched, ``seed`` is that of :class:`BatchSampler` for the first batch.
    """

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
        self._study, self._trainer, self._lr = study, trainer, lr
        self._space: Space = {**others, "lr": lr}  # what BatchSampler says of the order
        self._prunes, self._seed, self._benchmark, self._progress = prunes, seed, benchmark, progress
        self._refused = 0
        self._reasons: dict[str, str] = {}

    def run(self, n_trials: int, trials_per_batch: int | None) -> None:
        """Run batches until the study has as many finished trials, or is stopped."""
        with stoppable(self._study):
            while not is_stopped(self._study):
                with held_interrupts():
                    done = finished(self._study)
                if done >= n_trials:
                    break
                missing = n_trials - done
                size = trials_per_batch or batch_size_of(self._study.sampler, done) or missing
                self._run_batch(min(size, missing, self._trainer.most_models))

    def _run_batch(self, size: int) -> None:
        """Run a batch of trials; those that an exception leaves without a record are failed ones."""
        suggesting = BatchSampler(self._study.sampler, self._lr, size, self._seed)
        self._seed = None
        try:
            batch = []
            for trial, parameters in self._ask(suggesting, size):
                reason = self._trainer.refusal(parameters)
                if reason is None:
                    self._refused = 0
                    batch.append((trial, parameters))
                else:
                    with held_interrupts():
                        self._refuse(trial, parameters, reason)
            if batch:
                outcomes = self._trainer.train([parameters for _, parameters in batch])
                for (trial, parameters), outcome in zip(batch, outcomes, strict=True):
                    with held_interrupts():
                        self._record(trial, parameters, outcome)
        except BaseException:
            for number in suggesting.numbers:
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

    def _refuse(self, trial: Trial, parameters: Mapping[str, Any], reason: str) -> None:
        trial.set_user_attr("refused", reason)
        self._tell(trial, TrialState.FAIL)
        self._refused += 1
        if self._refused == _MOST_REFUSED:
            raise ValueError(
                f"tune: search_space must hold values that go together, but {_MOST_REFUSED} trials in a row were "
                f"refused, the last with {parameters}: {reason.removeprefix('tune: ')}"
            )

    def _record(self, trial: Trial, parameters: dict[str, Any], outcome: Outcome) -> None:
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
        loss = math.inf if diverged else outcome.loss
        if pruned:
            loss = outcome.losses[epochs - 1].item()
        attributes: dict[str, Any] = {"engine": outcome.engine, "epochs": epochs}
        attributes |= {"seconds_per_epoch": outcome.seconds_per_epoch, "train_loss": loss}
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
            self._tell(trial, TrialState.PRUNED)
        else:
            self._tell(trial, TrialState.COMPLETE, math.inf if diverged else outcome.value)

    def _tell(self, trial: Trial, state: TrialState, value: float | None = None) -> None:
        told = self._study.tell(trial, value, state)
        if self._progress is True:
            self._log(told)
        elif callable(self._progress):
            self._progress(self._study, told)

    def _log(self, told: FrozenTrial) -> None:
        """Log what ``study.optimize`` does."""
        if told.state == TrialState.PRUNED:
            _logger.info(f"Trial {told.number} pruned.")
        elif told.state == TrialState.FAIL:
            reason = told.user_attrs["refused"]
            failed = f"Trial {told.number} failed with parameters: {told.params}"
            _logger.warning(f"{failed} because of the following error: {reason}.")
        else:
            best = self._study.best_trial
            ended = f"Trial {told.number} finished with value: {told.value} and parameters: {told.params}."
            _logger.info(f"{ended} Best is trial {best.number} with value: {best.value}.")
