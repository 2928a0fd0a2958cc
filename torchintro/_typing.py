"""Types that several modules name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["ArrayLike", "EpochProgress", "RowProgress", "Streamable"]

ArrayLike: TypeAlias = "Tensor | npt.NDArray[Any]"
# After an epoch: its number, counted from 1, and its loss.
EpochProgress: TypeAlias = "bool | Callable[[int, float], None]"
# After some rows: how many are done, how many there are (None where that is not known), and the seconds taken.
RowProgress: TypeAlias = "bool | Callable[[int, int | None, float], None] | None"


class Streamable(Protocol):
    """Rows that are read piece by piece, as often as wanted, always in the same order: a :class:`torchintro.Table`."""

    dtype: torch.dtype

    @property
    def in_features(self) -> int:
        """Number of features."""

    @property
    def out_features(self) -> int:
        """Number of targets."""

    @property
    def gathered_dtype(self) -> torch.dtype:
        """Type in which statistics are best gathered."""

    def fingerprint(self) -> str:
        """Return a text that is another one for other rows."""

    def pieces(
        self,
        *,
        share: tuple[int, int] = (0, 1),
        start: int = 0,
        progress: RowProgress = None,
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features ``(n, in_features)`` and targets ``(n, out_features)``."""

    def marked_pieces(
        self,
        fraction: float,
        *,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
        start: int = 0,
        progress: RowProgress = None,
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield features, targets and a mark ``(n,)`` on the rows held out."""
