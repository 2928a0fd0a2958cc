"""What all readers of tables share: which columns are wanted, what is a number, and the sentences for the rest."""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["check_names", "choose", "extra", "is_numeric", "listed", "no_numbers", "no_table", "not_finite", "twice"]

SHOWN_NAMES = 12


def extra(module: str, purpose: str, package: str, name: str = "cli") -> types.ModuleType:
    """Import a module of an optional package, or raise one sentence that says how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f'{purpose}: needs {package}: pip install "torchintro[{name}]"') from error


def choose(
    function: str,
    where: object,
    names: Sequence[str],
    target: str | Sequence[str] | None,
    features: Sequence[str] | None,
    default_targets: Sequence[str],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the feature columns and of the target columns, all of them among ``names``."""
    if target is None:
        target_names = tuple(default_targets)
    else:
        target_names = (target,) if isinstance(target, str) else tuple(target)
        if not target_names:
            raise ValueError(f"{function}: target must name at least one column, but got none")
    feature_names = tuple(name for name in names if name not in target_names) if features is None else tuple(features)
    if not feature_names:
        raise ValueError(f"{function}: {where} must have a column besides the target, but has only {', '.join(names)}")
    for name in feature_names:
        if name in target_names:
            raise ValueError(f"{function}: column {name!r} is named as a feature and as a target")
    check_names(function, where, names, target_names)
    check_names(function, where, names, feature_names)
    return feature_names, target_names


def check_names(function: str, where: object, names: Iterable[str], wanted: Sequence[str]) -> None:
    """Raise a ValueError where one of the ``wanted`` columns is not there, or is wanted twice."""
    there = dict.fromkeys(names)
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ValueError(f"{function}: {where} has no column {missing[0]!r}; it has {listed(tuple(there))}")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"{function}: a column is named twice: {', '.join(wanted)}")


def listed(names: Sequence[str]) -> str:
    """Return the names as a sentence has them, the first few of many."""
    shown = names[:SHOWN_NAMES]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def twice(function: str, where: object, names: Sequence[str]) -> None:
    """Raise a ValueError where two columns have one name."""
    if len(set(names)) < len(names):
        name = min(name for name in names if names.count(name) > 1)
        raise ValueError(f"{function}: {where} has more than one column {name!r}")


def no_table(function: str, where: Path, error: BaseException) -> ValueError:
    """Return the error for a file that its reader does not understand."""
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else "it is empty"
    return ValueError(f"{function}: {where} is not a {where.suffix[1:].upper()} table: {reason}")


def no_numbers(function: str, where: object, name: str, kind: object, row: int | None = None) -> ValueError:
    """Return the error for a column, or its value in a row counted from 1, that is no number."""
    place = "" if row is None else f" in row {row}"
    return ValueError(f"{function}: column {name!r} of {where} must be numeric, but holds {kind}{place}")


def not_finite(
    function: str, where: object, name: str, values: npt.NDArray[Any], *, first_row: int = 1, count: bool = True
) -> ValueError | None:
    """Return the error for the first missing or infinite value, None if there is none.

    Rows are numbered from ``first_row`` on; ``count`` says how many more there are.
    """
    bad = np.flatnonzero(~np.isfinite(values))
    if not len(bad):
        return None
    what = "a missing value" if np.isnan(values[bad[0]]) else "an infinite value"
    more = f" and {len(bad) - 1} more" if count and len(bad) > 1 else ""
    return ValueError(f"{function}: column {name!r} of {where} has {what} in row {first_row + int(bad[0])}{more}")


def is_numeric(kind: Any) -> bool:
    """Return whether a pyarrow type holds numbers; a column of missing values only has the type null."""
    is_a = extra("pyarrow", "is_numeric", "pyarrow").types
    tests = (is_a.is_floating, is_a.is_integer, is_a.is_boolean, is_a.is_decimal, is_a.is_null)
    return any(test(kind) for test in tests)
