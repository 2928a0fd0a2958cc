"""Who suggests the trials of :func:`torchintro.tune`, how many at once, and what keeps their learning rates apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, GridSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from .internals import grid_size, startup_trials
from .space import Space

__all__ = ["BatchSampler", "batch_size_of", "default_sampler"]

# How close two learning rates of a batch may be, in logarithmic range.
_APART = 0.02
# Samplers that draw: theirs may be moved. Others prescribe, as a grid does.
_DRAWING = (TPESampler, RandomSampler, GPSampler, CmaEsSampler)
# Of samplers that learn, how many are asked for at once when results are there: of TPE at least 5 or a quarter of them.
_TPE_BATCH = 5
_TPE_SHARE = 4
_OTHER_BATCH = 4


def batch_size_of(sampler: BaseSampler, finished: int) -> int | None:
    """Return how many trials to ask a sampler for at once, None for all: the more, the less it learns from each."""
    if isinstance(sampler, (RandomSampler, QMCSampler)):
        return None
    if isinstance(sampler, GridSampler):
        # Past its last point it would hand out again what the batch holds.
        return max(1, grid_size(sampler) - finished)
    startup = startup_trials(sampler)
    if finished < startup:
        return startup - finished
    if isinstance(sampler, TPESampler):
        return max(_TPE_BATCH, finished // _TPE_SHARE)
    return _OTHER_BATCH


class BatchSampler(BaseSampler):
    """Another sampler's suggestions for one batch, in which no two learning rates are nearly equal.

    A learning rate that is within 2 % of the range (on its logarithmic scale) of one that the batch already has, all
    other parameters being equal, is moved to the nearest that is not. It must be suggested last.
    """

    def __init__(self, base: BaseSampler, lr: FloatDistribution, size: int, seed: int | None = None) -> None:
        """Make it; ``seed`` is that of a :func:`default_sampler` that has not drawn yet, None for any other."""
        self.base = base
        self.numbers: list[int] = []  # of the trials asked for
        self._seed = seed
        self._lr = lr
        self._gap = min(_APART, 0.4 / size)  # so that there always is a place left
        self._moves = isinstance(base, _DRAWING)
        self._taken: list[tuple[dict[str, Any], float]] = []
        self._drawn: float | None = None

    def take(self, parameters: Mapping[str, Any]) -> None:
        """Take a trial of the batch into account."""
        others = {name: value for name, value in parameters.items() if name != "lr"}
        self._taken.append((others, self._position(parameters["lr"])))

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Note the trial's number; a seed that has not drawn yet begins at it."""
        if self._seed is not None and not self.numbers and trial.number > 0:
            # No other process ever has a trial of this number: the same seed draws other learning rates there, and in
            # the next call.
            self.base = default_sampler(self._seed + trial.number)
        self.numbers.append(trial.number)
        self._drawn = None
        self.base.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        """Return that of the other sampler."""
        return self.base.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        """Return what the other sampler suggests, but for the learning rate, which comes last."""
        drawn = self.base.sample_relative(study, trial, search_space)
        if self._moves and "lr" in drawn:
            # What is left out here is asked for on its own, once the others are settled.
            drawn = dict(drawn)
            self._drawn = drawn.pop("lr")
        return drawn

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return what the other sampler suggests, a learning rate moved where it is too close."""
        if param_name == "lr" and self._drawn is not None:
            return self._apart(self._drawn, trial.params)
        drawn = self.base.sample_independent(study, trial, param_name, param_distribution)
        return self._apart(drawn, trial.params) if param_name == "lr" and self._moves else drawn

    def _position(self, lr: float) -> float:
        return math.log(lr / self._lr.low) / math.log(self._lr.high / self._lr.low) if lr > 0 else math.inf

    def _apart(self, lr: float, others: Mapping[str, Any]) -> float:
        position = below = above = self._position(lr)
        taken = sorted(place for parameters, place in self._taken if parameters == others)
        # Past all that are too close, upwards and downwards.
        for place in taken:
            if abs(place - above) < self._gap:
                above = place + self._gap
        for place in reversed(taken):
            if abs(place - below) < self._gap:
                below = place - self._gap
        if above == position:
            return lr
        nearest = min((edge for edge in (below, above) if 0 <= edge <= 1), key=lambda edge: abs(edge - position))
        moved: float = self._lr.low * (self._lr.high / self._lr.low) ** nearest
        return min(max(moved, self._lr.low), self._lr.high)


def default_sampler(seed: int | None) -> BaseSampler:
    """Return the sampler of studies that are given none."""
    # Its constant liar, which takes running trials for bad ones, is off: BatchSampler keeps a batch apart without, the
    # losses found came out the same, and it writes once more a trial and believes what killed processes left behind.
    return TPESampler(seed=seed, constant_liar=False)
