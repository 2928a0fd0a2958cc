"""One pass over a table for its statistics, kept in a file from time to time, from which a later pass goes on."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import saving
from .._typing import RowProgress, Streamable
from ..statistics import LinearStatistics, from_content, to_content

__all__ = ["Pass", "gather"]

_KIND = "pass"
_VERSION = 1
# What a killed process loses at most, in seconds of its pass. Saving takes a few milliseconds.
_SAVED_EVERY = 10.0


@dataclass
class Pass:
    """What a pass has gathered: the statistics of the rows that are not held out, and of those that are."""

    train: LinearStatistics
    held_out: LinearStatistics  # of no rows without a fraction
    rows: int = 0  # of both
    seconds: float = 0.0  # of the earlier runs too which this one went on from
    complete: bool = False


def gather(
    function: str,
    table: Streamable,
    fraction: float | None = None,
    *,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
    progress: RowProgress = None,
    checkpoint: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Pass:
    """Gather the statistics of a table's rows, or of both parts of it, in one pass.

    Args:
        function: Whose arguments these are, for its sentences.
        table: The rows.
        fraction: Share of the rows held out, as for ``Table.split``; None for none.
        seed: Which rows those are.
        share: ``(rank, world_size)``, as for ``Table.pieces``.
        progress: Likewise.
        checkpoint: File that keeps what was gathered: every ten seconds, when the pass is interrupted, and at its end.
            If it is there, the pass goes on from it. The bits of the result are those of a pass without interruption.
        dtype: What the rows are converted to first; by default the table says in which type they keep their digits.
        device: Where they are brought first, and where the statistics are.
    """
    sizes = (table.in_features, table.out_features)
    gathered = Pass(LinearStatistics(*sizes, device=device), LinearStatistics(*sizes, device=device))
    kept = None
    if checkpoint is not None:
        if not isinstance(checkpoint, str | Path):
            raise TypeError(f"{function}: checkpoint must be a path or None, but got {type(checkpoint).__name__}")
        identity = {
            "table": table.fingerprint(),
            "fraction": fraction,
            "seed": None if fraction is None else seed,
            "share": list(share) if isinstance(share, tuple) else share,  # `pieces` answers what is no pair
            "dtype": str(dtype or table.dtype),
        }
        kept = _Kept(function, Path(checkpoint), identity)
        gathered = kept.begin(gathered)
        if gathered.complete:
            return gathered
        if progress is True and gathered.rows:
            print(f"going on after the {gathered.rows:,} rows that {checkpoint} holds", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    options: dict[str, Any] = {"share": share, "start": gathered.rows, "progress": progress}
    if dtype is None:
        options["dtype"] = table.gathered_dtype
    pieces: Iterator[tuple[Tensor, ...]] = (
        table.pieces(**options) if fraction is None else table.marked_pieces(fraction, seed=seed, **options)
    )
    with contextlib.closing(pieces), kept or contextlib.nullcontext():  # type: ignore[type-var]
        for X, y, *marks in pieces:
            for mark in marks:
                held_out, rest = (_picked(X, y, chosen) for chosen in (mark, ~mark))
                gathered.held_out.update(*(rows.to(device, dtype) for rows in held_out))
                gathered.train.update(*(rows.to(device, dtype) for rows in rest))
            if not marks:
                gathered.train.update(X.to(device, dtype), y.to(device, dtype))
            gathered.rows += X.shape[0]
            if kept is not None:
                kept.reached(gathered)
        gathered.complete = True
        if kept is not None:
            kept.reached(gathered)
    gathered.seconds += time.perf_counter() - begin
    return gathered


def _picked(X: Tensor, y: Tensor, mark: Tensor) -> list[Tensor]:
    """Return the marked rows of a piece, as ``X[mark], y[mark]``.

    PyTorch's indexing wakes threads that then stay awake for milliseconds, on the cores that read the next piece.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # NumPy knows no bfloat16
    rows = np.flatnonzero(mark.numpy())
    bits = (np.take(part.view(integers[part.element_size()]).numpy(), rows, axis=0) for part in (X, y))
    return [torch.from_numpy(part).view(X.dtype) for part in bits]


class _Kept:
    """The file of a pass. Within it what was reached is saved from time to time, and in the end, however that comes."""

    def __init__(self, function: str, path: Path, identity: dict[str, Any]) -> None:
        self._function, self._path, self._identity = function, path, identity
        self._noted: tuple[Any, ...] | None = None  # what is not saved yet
        self._before, self._begin, self._saved = 0.0, 0.0, 0.0

    def begin(self, empty: Pass) -> Pass:
        """Return what the file holds, or without one what is empty."""
        function, path = self._function, self._path
        if path.is_dir():
            raise ValueError(f"{function}: checkpoint must be a file, but {path} is a folder")
        if not path.exists():
            if not path.parent.is_dir():
                raise FileNotFoundError(f"{function}: checkpoint {path} must be in a folder that is there")
            self._note(empty)
            return empty
        content = saving.read_file(function, path, _KIND, _VERSION, map_location=empty.train.device)
        other = content.get("identity")
        if not isinstance(other, dict) or not {"train", "held_out", "rows", "seconds", "complete"} <= set(content):
            raise ValueError(f"{function}: checkpoint {path} is damaged: delete it, or give another")
        if other != self._identity:
            what = next((name for name in self._identity if other.get(name) != self._identity[name]), "table")
            differs = (
                "the table is another one or has changed since"
                if what == "table"
                else f"it was made with {what}={other.get(what)!r}, but this pass has {self._identity[what]!r}"
            )
            raise ValueError(
                f"{function}: checkpoint {path} must be of the same pass, but {differs}: delete it, or give another"
            )
        found = Pass(empty.train, empty.held_out, int(content["rows"]), float(content["seconds"]), content["complete"])
        for name, part in (("train", found.train), ("held_out", found.held_out)):
            moments = from_content(function, path, content[name])
            if moments[4].shape != part.sxy.shape:
                raise ValueError(f"{function}: checkpoint {path} is damaged: delete it, or give another")
            part._set(moments)
        self._before = found.seconds
        return found

    def reached(self, gathered: Pass) -> None:
        """Note what was gathered of whole pieces; save it if the last time is a while ago, or it is all."""
        self._note(gathered)
        if gathered.complete or time.perf_counter() - self._saved >= _SAVED_EVERY:
            self._save()

    def __enter__(self) -> None:
        self._save()  # of a new file: a place that cannot be written is met before the pass
        self._begin = self._saved = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, ValueError):
            self._path.unlink(missing_ok=True)  # the table must change, and then it is another one
        else:
            self._save()

    def _note(self, gathered: Pass) -> None:
        # No tensor of statistics is written to again, so that what is noted stays what it is.
        self._noted = gathered.rows, gathered.complete, gathered.train.tensors, gathered.held_out.tensors

    def _save(self) -> None:
        if self._noted is None:
            return
        rows, complete, train, held_out = self._noted
        content = {
            "identity": self._identity,
            "rows": rows,
            "seconds": self._before + (time.perf_counter() - self._begin if self._begin else 0.0),
            "complete": complete,
            "train": to_content(train),
            "held_out": to_content(held_out),
        }
        saving.write_file(self._path, _KIND, _VERSION, content)
        self._noted, self._saved = None, time.perf_counter()
