"""What the options of the commands mean to :func:`torchintro.fit` and :func:`torchintro.tune`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna


def optimizer_options(command: str, options: Sequence[str] | None) -> dict[str, Any] | None:
    """Return what ``--optimizer-option`` options mean: a value with commas in it is a tuple, as ``betas`` is."""
    found: dict[str, Any] = {}
    for option in options or ():
        name, equals, value = option.partition("=")
        name = name.strip().replace("-", "_")
        parts = [part.strip() for part in value.split(",")]
        if not name or not equals or not all(parts):
            raise ValueError(f"{command}: --optimizer-option must be NAME=VALUE, but got {option!r}")
        if name in found:
            raise ValueError(f"{command}: --optimizer-option must name each argument once, but names {name} twice")
        values = tuple(_literal(part) for part in parts)
        found[name] = values[0] if len(values) == 1 else values
    return found or None


def search_space(options: Sequence[str]) -> dict[str, Any]:
    """Return what ``--search`` options mean to :func:`torchintro.tune`."""
    space: dict[str, Any] = {}
    for option in options:
        name, equals, values = option.partition("=")
        name = name.strip().replace("-", "_")
        low, colon, high = values.partition(":")
        parts = [part.strip() for part in ([low, high] if colon else values.split(","))]
        if not name or not equals or not all(parts) or (colon and ":" in high):
            raise ValueError(f"tune: --search must be NAME=LOW:HIGH or NAME=a,b,c, but got {option!r}")
        if name == "lr":
            raise ValueError("tune: --search must not be of lr, whose range is --lr-low and --lr-high")
        if name in space:
            raise ValueError(f"tune: --search must name each parameter once, but names {name} twice")
        choices = [_literal(part) for part in parts]
        if colon and not all(type(bound) in (int, float) for bound in choices):
            raise ValueError(f"tune: --search {name}=LOW:HIGH must have two numbers, but got {values!r}")
        space[name] = tuple(choices) if colon else choices
    return space


def _literal(text: str) -> bool | int | float | str | None:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def make_pruner(name: str, epochs: int) -> optuna.pruners.BasePruner | None:
    """Return the pruner of that name, None for none."""
    import optuna

    if name == "none":
        return None
    if name == "median":
        return optuna.pruners.MedianPruner()
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=max(epochs, 1))
    raise ValueError(f"tune: --pruner must be median, hyperband or none, but got {name!r}")
