"""What :func:`torchintro.tune` searches: the distributions of its parameters."""

from __future__ import annotations

import inspect
import itertools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from .. import _checks
from ..training.optimizers import optimizer_names

__all__ = ["Space", "check_values", "learning_rates", "other_parameters"]

Space = dict[str, BaseDistribution]

_KINDS = "a pair (low, high), a list of choices or an Optuna distribution"
# Ranges of these are of many magnitudes.
_LOGARITHMIC = ("weight_decay", "eps", "batch_size")
# Beyond as many combinations the values are only tried when a trial has them.
_MOST_COMBINATIONS = 1024


def learning_rates(lr: object) -> FloatDistribution:
    """Return the distribution of the learning rate between the two of the pair ``lr``."""
    if not isinstance(lr, (tuple, list)) or len(lr) != 2:
        raise TypeError(f"tune: lr must be a pair (lowest, highest), but got {lr!r}")
    low, high = (_checks.positive("tune", f"lr[{i}]", bound) for i, bound in enumerate(lr))
    if low >= high:
        raise ValueError(f"tune: lr must be a pair (lowest, highest), but got {lr!r}")
    return FloatDistribution(low, high, log=True)


def other_parameters(search_space: object, *, optimizer: object, given: Mapping[str, Any]) -> Space:
    """Return the distributions of the parameters beside the learning rate, none of which may be ``given`` too."""
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

    ``refusal`` says why parameters are refused; None if they are not.
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
