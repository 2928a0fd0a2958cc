"""Which rows are held out: decided by a hash of each row's number, the same ones however the rows are read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .. import _checks

__all__ = ["MASK", "Part", "belongs", "cut", "mix"]

MASK = 2**64 - 1


class Part(NamedTuple):
    """Which rows of the data are meant: those whose hash, of 64 bits, is in a range."""

    low: int
    high: int  # beyond it
    seed: int


def cut(function: str, name: str, part: Part | None, fraction: object, seed: object) -> tuple[Part, Part]:
    """Return the rows of a part (None for all) that are not held out, and those that are: the begin of its range.

    ``function`` calls the share that is held out ``name``.
    """
    share = _checks.fraction(function, name, fraction)
    number = _checks.integer(function, "seed", seed)
    part = part or Part(0, 2**64, number)
    if part.seed != number:
        raise ValueError(
            f"{function}: seed must be {part.seed} for a part of a table that was split by that one, but got {number}"
        )
    at = part.low + int(share * (part.high - part.low))
    return part._replace(low=at), part._replace(high=at)


def mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return splitmix64's output for each state."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def belongs(part: Part, numbers: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Return for each row, given by its number in the whole data, whether it belongs to the part.

    Row r gets number r of the splitmix64 sequence whose state begins at a hash of the seed.
    """
    if part.low >= part.high:
        return np.zeros(len(numbers), np.bool_)
    key = mix(np.array([part.seed & MASK], np.uint64))
    value = mix((numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key)
    below: npt.NDArray[np.bool_] = value <= np.uint64(part.high - 1)
    return below & (value >= np.uint64(part.low)) if part.low else below
