"""What :func:`torchintro.tune` searches: the distributions of its parameters, and who suggests a batch of them."""

from __future__ import annotations

import inspect
import itertools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from .. import _checks
from ..training.optimizers import optimizer_names

__all__ = ["BatchSampler", "batch_size_of", "check_values", "default_sampler", "learning_rates", "other_parameters"]

Space = dict[str, BaseDistribution]

_KINDS = "a pair (low, high), a list of choices or an Optuna distribution"
# Ranges of these are of many magnitudes.
_LOGARITHMIC = ("weight_decay", "eps", "batch_size")
# Beyond as many combinations the values are only tried when a trial has them.
_MOST_COMBINATIONS = 1024

# How close two learning rates of a batch may be, in logarithmic range.
_APART = 0.02
# Samplers that draw: theirs may be moved. Others prescribe, as a grid does.
_DRAWING = (
    optuna.samplers.TPESampler,
    optuna.samplers.RandomSampler,
    optuna.samplers.GPSampler,
    optuna.samplers.CmaEsSampler,
)
# Of samplers that learn, how many are asked for at once when results are there: of TPE at least 5 or a quarter of them.
_TPE_BATCH = 5
_TPE_SHARE = 4
_OTHER_BATCH = 4


def learning_rates(lr: object) -> FloatDistribution:
    """Return the distribution of the learning rate between the two of the pair ``lr``."""
    if not isinstance(lr, (tuple, list)) or len(lr) != 2:
        raise TypeError(f"tune: lr must be a pair (lowest, highest), but got {lr!r}")
    low, high = (_checks.positive("tune", f"lr[{i}]", bound) for i, bound in enumerate(lr))
    if low >= high:
        raise ValueError(f"tune: lr must be a pair (lowest, highest), but got {lr!r}")
    return FloatDistribution(low, high, log=True)


def other_parameters(search_space: object, *, optimizer: object, given: Mapping[str, Any]) -> Space:
    """Return the distributions of the parameters beside the learning rate.

    Args:
        search_space: The argument of ``tune``.
        optimizer: The argument of ``tune``.
        given: The parameters that ``tune`` was given as arguments of their own.
    """
    if search_space is None:
        return {}
    if not isinstance(search_space, Mapping):
        raise TypeError(f"tune: search_space must be a mapping, but got {type(search_space).__name__}")
    known = {name.lower(): name for name in optimizer_names()}
    class_name = known.get(optimizer.lower()) if isinstance(optimizer, str) else None
    if class_name is None:
        raise ValueError(f"tune: optimizer must be one of {', '.join(known.values())}, but got {optimizer!r}")
    accepted = inspect.signature(getattr(torch.optim, class_name)).parameters
    space = {}
    for name, value in search_space.items():
        if name == "lr":
            raise ValueError("tune: search_space holds 'lr', which is a named argument")
        if name != "batch_size" and (name not in accepted or name == "params"):
            raise ValueError(f"tune: search_space holds {name!r}, which is not an argument of {class_name}")
        if name in given:
            raise ValueError(f"tune: search_space holds {name!r}, which is given as {given[name]!r} too")
        whole = name == "batch_size" or accepted[name].annotation in (int, "int")
        space[name] = _distribution(f"search_space[{name!r}]", name, value, whole)
    return space


def _distribution(where: str, name: str, value: object, whole: bool) -> BaseDistribution:
    if isinstance(value, BaseDistribution):
        distribution = value
    elif isinstance(value, tuple) and len(value) == 2:
        distribution = _range(where, name, value, whole)
    elif isinstance(value, list) and value:
        for choice in value:
            if choice is not None and not isinstance(choice, (bool, int, float, str)):
                raise TypeError(f"tune: {where} must hold numbers, booleans, None or strings, but got {choice!r}")
        distribution = CategoricalDistribution(value)
    else:
        raise TypeError(f"tune: {where} must be {_KINDS}, but got {value!r}")
    if name == "batch_size":
        for bound in _corners(distribution):
            if isinstance(bound, bool) or not (bound is None or (isinstance(bound, int) and bound >= 1)):
                raise ValueError(f"tune: {where} must hold integers of at least 1 or None, but got {bound!r}")
    return distribution


def _range(where: str, name: str, pair: tuple[Any, Any], whole: bool) -> BaseDistribution:
    kind = numbers.Integral if whole else numbers.Real
    if any(isinstance(bound, bool) or not isinstance(bound, kind) for bound in pair):
        raise TypeError(f"tune: {where} must be a pair of {'integers' if whole else 'numbers'}, but got {pair!r}")
    low, high = pair
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"tune: {where} must be a pair (low, high) of finite numbers, low < high, but got {pair!r}")
    log = name in _LOGARITHMIC and low > 0
    return IntDistribution(int(low), int(high), log=log) if whole else FloatDistribution(low, high, log=log)


def _corners(distribution: BaseDistribution) -> Sequence[Any]:
    """Return the choices of a distribution, or its two ends."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return (distribution.low, distribution.high)


def check_values(space: Space, refusal: Callable[[Mapping[str, Any]], str | None]) -> None:
    """Raise a ValueError for a choice, or an end of a range, that no combination with the others makes acceptable.

    Args:
        space: The distributions.
        refusal: Says why parameters are refused; None if they are not.
    """
    corners = {name: _corners(distribution) for name, distribution in space.items() if name != "batch_size"}
    if math.prod(map(len, corners.values())) > _MOST_COMBINATIONS:
        return
    refused: dict[tuple[str, int], str] = {}
    accepted: set[tuple[str, int]] = set()
    for indices in itertools.product(*(range(len(values)) for values in corners.values())):
        places = list(zip(corners, indices, strict=True))
        reason = refusal({name: corners[name][index] for name, index in places})
        if reason is None:
            accepted.update(places)
        else:
            refused.update(dict.fromkeys(places, reason))
    for (name, index), reason in refused.items():
        if (name, index) not in accepted:
            raise ValueError(
                f"tune: search_space[{name!r}] must hold values that the optimizer takes, but got "
                f"{corners[name][index]!r}: {reason.removeprefix('tune: ')}"
            )


def batch_size_of(sampler: BaseSampler, finished: int) -> int | None:
    """Return how many trials to ask a sampler for at once, None for all: the more, the less it learns from each.

    Args:
        sampler: The sampler.
        finished: How many trials are finished.
    """
    if isinstance(sampler, (optuna.samplers.RandomSampler, optuna.samplers.QMCSampler)):
        return None
    if isinstance(sampler, optuna.samplers.GridSampler):
        # Past its last point it would hand out again what the batch holds.
        return max(1, len(getattr(sampler, "_all_grids", ())) - finished)
    startup = getattr(sampler, "_n_startup_trials", 0)
    if finished < startup:
        return int(startup) - finished
    if isinstance(sampler, optuna.samplers.TPESampler):
        return max(_TPE_BATCH, finished // _TPE_SHARE)
    return _OTHER_BATCH


class BatchSampler(BaseSampler):
    """Another sampler's suggestions for one batch, in which no two learning rates are nearly equal.

    A learning rate that is within 2 % of the range (on its logarithmic scale) of one that the batch already has, all
    other parameters being equal, is moved to the nearest that is not. It must be suggested last.

    Attributes:
        base: The other sampler.
        numbers: The numbers of the trials asked for.
    """

    def __init__(self, base: BaseSampler, lr: FloatDistribution, size: int, seed: int | None = None) -> None:
        """Make it.

        Args:
            base: The other sampler.
            lr: The distribution of the learning rate.
            size: Of the batch.
            seed: The seed of a :func:`default_sampler` that has not drawn yet, None for any other.
        """
        self.base = base
        self.numbers: list[int] = []
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
    return optuna.samplers.TPESampler(seed=seed, constant_liar=False)
