"""What all tables share: which columns are wanted, what is a number, and the sentences for the rest."""

from __future__ import annotations

import contextlib
import importlib
import math
import types
from collections.abc import Iterator, Sequence

__all__ = ["TableError", "choose", "extra", "listed", "no_numbers", "no_table", "not_finite", "spoken_by", "twice"]

SHOWN_NAMES = 12


class TableError(Exception):
    """What is wrong with a table, not yet with the name of the function whose caller gets an exception of ``kind``."""

    def __init__(self, message: str, kind: type[Exception] = ValueError) -> None:
        super().__init__(message)
        self.kind = kind


@contextlib.contextmanager
def spoken_by(function: str) -> Iterator[None]:
    """Turn a :class:`TableError` into the exception that the caller of ``function`` gets."""
    try:
        yield
    except TableError as error:
        raise error.kind(f"{function}: {error}") from error.__cause__


def extra(module: str, package: str, name: str) -> types.ModuleType:
    """Import a module of an optional package, or raise one sentence that says how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise TableError(f'needs {package}: pip install "torchintro[{name}]"', ImportError) from error


def choose(
    where: object,
    names: Sequence[str],
    target: str | Sequence[str] | None,
    features: Sequence[str] | None,
    default_targets: Sequence[str],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the feature columns and of the target columns, all of them among ``names``."""
    target = default_targets if target is None else target
    target_names = (target,) if isinstance(target, str) else tuple(target)
    feature_names = tuple(name for name in names if name not in target_names) if features is None else tuple(features)
    if not feature_names:
        raise TableError(f"{where} must have a column besides the target, but has only {', '.join(names)}")
    for name in feature_names:
        if name in target_names:
            raise TableError(f"column {name!r} is named as a feature and as a target")
    there = set(names)
    for wanted in (target_names, feature_names):
        missing = [name for name in wanted if name not in there]
        if missing:
            raise TableError(f"{where} has no column {missing[0]!r}; it has {listed(names)}")
        if len(set(wanted)) < len(wanted):
            raise TableError(f"a column is named twice: {', '.join(wanted)}")
    return feature_names, target_names


def listed(names: Sequence[str]) -> str:
    """Return the names as a sentence has them, the first few of many."""
    shown = names[:SHOWN_NAMES]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def twice(where: object, names: Sequence[str]) -> None:
    """Raise an error where two columns have one name."""
    if len(set(names)) < len(names):
        name = min(name for name in names if names.count(name) > 1)
        raise TableError(f"{where} has more than one column {name!r}")


def no_table(where: object, kind: str, reason: object) -> TableError:
    """Return the error for a file that its reader does not understand."""
    text = str(reason).strip()
    return TableError(f"{where} is not a {kind} table: {text.splitlines()[0].rstrip('.') if text else 'it is empty'}")


def no_numbers(where: object, name: str, kind: object) -> TableError:
    """Return the error for a column of something else than numbers."""
    return TableError(f"column {name!r} of {where} must be numeric, but holds {kind}")


def not_finite(where: object, name: str, value: float, row: int, dtype: str) -> TableError:
    """Return the error for a value, in a row counted from 1, that is missing, infinite or beyond the ``dtype``."""
    what = "a missing value" if math.isnan(value) else f"a value beyond {dtype}"
    what = "an infinite value" if math.isinf(value) else what
    return TableError(f"column {name!r} of {where} has {what} in row {row}")
