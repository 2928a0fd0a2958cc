"""Optimizers of ``torch.optim`` as the training functions are told them: a name and options, checked first."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import _checks

__all__ = ["Optimizer", "Rule", "optimizer_names", "parse_optimizer"]

# These take gradients that a dense linear layer does not have.
_UNSUITABLE_OPTIMIZERS = {"SparseAdam"}

# Arguments that say how, not what, torch.optim computes.
_WAYS = {"foreach", "fused", "capturable"}
# The defaults of torch.optim, in the order of the operators' columns (csrc/fit/fit.h).
_SGD: dict[str, Any] = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
_ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False}


@dataclass(frozen=True)
class Rule:
    """An optimizer as the training-loop operators know it.

    Attributes:
        name: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        options: One row of the operators' ``options``.
        memory: How many numbers it remembers of each parameter.
    """

    name: str
    options: tuple[float, ...]
    memory: int


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of ``torch.optim`` with its arguments, all but the learning rate.

    ``function`` is the one whose argument it is, for its sentences.
    """

    class_name: str
    arguments: Mapping[str, Any]
    function: str = "fit"

    def make(self, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer of some parameters.

        Raises:
            ValueError: It refuses these parameters or its arguments.
        """
        make: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, self.class_name)
        try:
            return make(parameters, lr=lr, **self.arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.function}: optimizer {self.class_name} refused this model or its options: {error}"
            ) from error

    def check(self, parameters: Sequence[nn.Parameter], lr: float) -> None:
        """Raise the ValueError that :meth:`make` would."""
        # Making one takes longer than a small training run, and these two are checked already.
        if self.class_name != "SGD" or not self.arguments.keys() <= {"momentum", "weight_decay"}:
            self.make(parameters, lr)

    def rule(self) -> Rule | None:
        """Return what the training-loop operators make of it, or None if it is none of theirs."""
        return self._rule

    @functools.cached_property  # models that are trained together often share one
    def _rule(self) -> Rule | None:
        known = {"SGD": _SGD, "Adam": _ADAM, "AdamW": _ADAM}.get(self.class_name)
        if known is None:
            return None
        given = {key: value for key, value in self.arguments.items() if key not in _WAYS and value is not None}
        # `maximize=False` and the like are the default, and change nothing.
        other = [value for key, value in given.items() if key not in known and value is not False]
        if other or any(isinstance(value, torch.Tensor) for value in given.values()):
            return None
        values = {**known, **{key: value for key, value in given.items() if key in known}}
        if self.class_name == "SGD":
            options = (*(float(values[key]) for key in _SGD), 0.0)
            return Rule("sgd", options, 1 if options[0] != 0 else 0)
        if any(isinstance(beta, torch.Tensor) for beta in values["betas"]):
            return None
        beta1, beta2 = map(float, values["betas"])
        amsgrad = bool(values["amsgrad"])
        options = (beta1, beta2, float(values["weight_decay"]), float(values["eps"]), float(amsgrad))
        return Rule("adam" if self.class_name == "Adam" else "adamw", options, 3 if amsgrad else 2)


@functools.cache
def optimizer_names() -> tuple[str, ...]:
    """Return the class names of the optimizers of ``torch.optim`` that can train a linear layer."""
    classes = {
        name: value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    return tuple(sorted(classes.keys() - _UNSUITABLE_OPTIMIZERS))


@functools.cache
def _accepted(class_name: str) -> frozenset[str]:
    return frozenset(inspect.signature(getattr(torch.optim, class_name)).parameters)


@functools.cache
def _class_names() -> dict[str, str]:
    return {class_name.lower(): class_name for class_name in optimizer_names()}


def parse_optimizer(function: str, name: object, momentum: object, weight_decay: object, options: object) -> Optimizer:
    """Check what ``function`` was told about its optimizer.

    Args:
        function: The caller, for its sentences.
        name: Class name of an optimizer of ``torch.optim``, in any case.
        momentum: The optimizer's argument; an error where it has none.
        weight_decay: Likewise.
        options: Further keyword arguments, or None.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument has a wrong value.
    """
    known = _class_names()
    if not isinstance(name, str) or name.lower() not in known:
        raise ValueError(f"{function}: optimizer must be one of {', '.join(known.values())}, but got {name!r}")
    class_name = known[name.lower()]
    accepted = _accepted(class_name)
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"{function}: optimizer_options must be a mapping, but got {type(options).__name__}")
    arguments: dict[str, Any] = dict(options or {})
    for key in arguments:
        if key not in accepted or key in ("params", "lr", "momentum", "weight_decay"):
            known_as = "is a named argument" if key in accepted else f"is not an argument of {class_name}"
            raise ValueError(f"{function}: optimizer_options holds {key!r}, which {known_as}")
    for key, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        number = _checks.non_negative(function, key, value)
        if key in accepted:
            arguments[key] = number
        elif number != 0:
            raise ValueError(
                f"{function}: {key} must be 0 for {class_name}, which has no such argument, but got {value!r}"
            )
    return Optimizer(class_name, arguments, function)
