"""Which rows of a table are held out: by a hash of their numbers, the same ones however they are read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["MASK", "Part", "belongs", "mix"]

MASK = 2**64 - 1


class Part(NamedTuple):
    """Which rows of a table are meant: those whose hash, of 64 bits, is in a range."""

    low: int
    high: int  # beyond it
    seed: int

    def cut(self, share: float) -> tuple[Part, Part]:
        """Return the rows that are not held out and those that are, a share of the range from its begin on."""
        at = self.low + int(share * (self.high - self.low))
        return self._replace(low=at), self._replace(high=at)


def mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return splitmix64's output for each state."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def belongs(part: Part, first: int, rows: int) -> npt.NDArray[np.bool_]:
    """Return for each of the rows from number ``first`` on whether it belongs to the part.

    Row r gets number r of the splitmix64 sequence whose state begins at a hash of the seed.
    """
    key = mix(np.array([part.seed & MASK], np.uint64))
    state = (np.arange(first, first + rows, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    if part.low >= part.high:
        return np.zeros(rows, np.bool_)
    value = mix(state + key)
    below: npt.NDArray[np.bool_] = value <= np.uint64(part.high - 1)
    return below & (value >= np.uint64(part.low)) if part.low else below
