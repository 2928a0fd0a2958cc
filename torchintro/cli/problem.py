"""What the commands train on and are judged by: rows in memory, or a table that is streamed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ..data import datasets
from ..data.datasets import Dataset
from ..data.gather import gather
from ..data.open import open_table, read_table
from ..data.table import Table
from ..evaluation import evaluate
from ..nn import Standardize
from .shell import interruption, made, notices, row_progress

if TYPE_CHECKING:
    from ..saving import SavedModel

BUILT_IN = ("synthetic", "diabetes")
# A larger file is streamed unless the user says otherwise: in memory it may take several times its size.
STREAMED_BYTES = 10**9
# Of the model. What is read into memory is float64 until it is standardised.
DTYPE = torch.float32

Source: TypeAlias = "Dataset | Table"


@dataclass(frozen=True, eq=False)
class Problem:
    """Rows to train on and rows held out, with standardised features: what ``fit``, ``tune`` and ``evaluate`` take."""

    name: str
    rows: int | None  # None for CSV that is streamed and of which a part was left aside uncounted
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    parts: Mapping[str, int]  # how many rows each has, by its name
    standardize: Standardize  # from the rows to train on
    X: Any  # a matrix, a table, or statistics
    y: Tensor | None  # of a matrix
    validation: Any  # a pair of matrices, or statistics; None if nothing is held out
    judged: Mapping[str, tuple[Any, ...]]  # arguments of ``evaluate``, by the name of the rows
    pass_seconds: float | None = None  # of one pass over a table

    def measure(self, linear: nn.Linear) -> dict[str, dict[str, float]]:
        """Judge the layer behind ``standardize`` by each part's rows; of a table without the mean absolute error."""
        return {name: evaluate(linear, *part) for name, part in self.judged.items()}

    def __str__(self) -> str:
        count = len(self.feature_names)
        known = "" if self.rows is None else f"{self.rows} rows, "
        columns = f"{count} feature{'s' if count > 1 else ''} -> {', '.join(self.target_names)}"
        parts = ", ".join(f"{rows} {name}" for name, rows in self.parts.items())
        return f"{self.name}: {known}{columns}; {parts}"


def is_streamed(data: str, stream: bool | None) -> bool:
    """Say whether ``--data`` is streamed; None leaves it to what it is."""
    path = Path(data)
    if data in BUILT_IN or path.suffix.lower() == ".npz":
        if stream:
            kind = data if data in BUILT_IN else "a .npz file"
            raise ValueError(f"--stream needs a .csv, .parquet or .npy file or a folder of them, but --data is {kind}")
        return False
    if stream is False and path.is_dir():
        raise ValueError(f"--no-stream needs a file, but --data {data} is a folder, which is always streamed")
    if stream is not None:
        return stream
    return path.is_dir() or (path.is_file() and path.stat().st_size > STREAMED_BYTES)


def open_rows(
    data: str, target: Sequence[str] | None, feature: Sequence[str] | None, *, stream: bool | None, seed: int
) -> Source:
    """Open what ``--data`` names: a table to be streamed, or rows in memory in float64.

    ``target=()`` is for no targets, None for the default; ``seed`` is of the synthetic data.
    """
    if is_streamed(data, stream):
        return open_table(data, target=target, features=feature)
    if data in BUILT_IN:
        return _chosen(_built_in(data, seed), target, feature)
    if not Path(data).suffix:
        raise ValueError(f"--data must be synthetic, diabetes, a file with a suffix or a folder, but got {data!r}")
    return read_table(data, target=target, features=feature, dtype=torch.float64)


def _built_in(name: str, seed: int) -> Dataset:
    return datasets.synthetic(seed=seed) if name == "synthetic" else datasets.diabetes()


def _chosen(dataset: Dataset, target: Sequence[str] | None, feature: Sequence[str] | None) -> Dataset:
    if target and tuple(target) != dataset.target_names:
        raise ValueError(f"--target must be {dataset.target_names[0]} for {dataset.name}, but got {', '.join(target)}")
    known = dataset.feature_names
    chosen = known if feature is None else tuple(feature)
    for name in chosen:
        if name not in known:
            raise ValueError(f"{dataset.name} has no feature {name!r}; it has {', '.join(known)}")
    X = dataset.X[:, [known.index(name) for name in chosen]]
    return dataclasses.replace(dataset, X=X.double(), y=dataset.y.double(), feature_names=chosen)


def rows_of(saved: SavedModel, data: str, *, stream: bool | None, with_targets: bool = True) -> tuple[nn.Linear, Any]:
    """Return a saved model's layer, and the rows of ``--data`` as that layer takes them."""
    layers: Any = saved.model if isinstance(saved.model, nn.Sequential) else (None, saved.model)
    standardize, linear = layers
    seed = int(saved.metadata.get("seed", 0))
    if data in BUILT_IN and with_targets and (own := _built_in(data, seed).target_names) != saved.target_names:
        raise ValueError(f"the model predicts {', '.join(saved.target_names)}, but {data} has the target {own[0]}")
    target = saved.target_names if with_targets else ()
    rows = open_rows(data, target, saved.feature_names, stream=stream, seed=seed)
    # Not in 16 bits, in which the targets would be rounded.
    return linear, standardized(rows, standardize, torch.promote_types(linear.weight.dtype, DTYPE))


def standardized(rows: Any, standardize: Standardize | None, dtype: torch.dtype = DTYPE) -> Any:
    """Return a table or a data set with its features standardised in float64, if so wanted, and then in ``dtype``."""
    if isinstance(rows, Table):
        names = {"target": rows.target_names, "features": rows.feature_names}
        return open_table(rows.path, **names, dtype=dtype, standardize=standardize)
    X = rows.X if standardize is None else standardize(rows.X)
    return dataclasses.replace(rows, X=X.to(dtype), y=rows.y.to(dtype))


def split(rows: Any, shares: Mapping[str, float], seed: int) -> tuple[Any, Any]:
    """Hold out a share of the rows for each option; return the rest, and what the last option holds out or None."""
    held_out = None
    for share in shares.values():
        cut: Any = rows.split if isinstance(rows, Table) else functools.partial(datasets.split, rows)
        rows, held_out = cut(share, seed=seed) if share > 0 else (rows, None)
    return rows, held_out


def make_problem(
    command: str,
    rows: Source,
    shares: Mapping[str, float],
    seed: int,
    *,
    purpose: str = "held out",
    mini_batches: bool = False,
    folder: Path,
    check: Callable[[Table], None],
) -> Problem:
    """Hold out rows and standardise the features; of a table, gather the statistics of both parts in one pass.

    Args:
        command: For sentences.
        rows: What :func:`open_rows` returned.
        shares: Option and share of the rows; those of all but the last are left aside.
        seed: Of the splits.
        purpose: What the rows held out last are for.
        mini_batches: Whether a table is trained on again, piece by piece, and not by its statistics.
        folder: Where a file keeps the pass, for this command to go on after an interruption, and for others on the same
            parts of the table, which then read nothing.
        check: Raises what is wrong with the other options before a pass that may take hours.
    """
    for option, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{option} must be at least 0 and below 1, but got {share}")
    if isinstance(rows, Dataset):
        return _in_memory(rows, shares, seed, purpose)
    check(rows)
    kept = f"; what was read of the table is kept in {folder}, the same command with --out {folder} goes on from there"
    with made(folder), interruption(lambda: kept):
        return _streamed(command, rows, shares, seed, purpose, mini_batches, folder)


def _in_memory(dataset: Dataset, shares: Mapping[str, float], seed: int, purpose: str) -> Problem:
    train, held_out = split(dataset, shares, seed)
    fitted = Standardize.fit(train.X)
    # Numbers of the model's dtype, by which rows of float64 are then shifted and scaled.
    mean, scale = fitted.mean.to(DTYPE), fitted.scale.to(DTYPE)
    standardize = Standardize(mean, torch.where(scale == 0, torch.ones_like(scale), scale))
    named = {"training": train} | ({} if held_out is None else {"held out": held_out})
    scaled = {name: standardized(part, standardize) for name, part in named.items()}
    judged = {name: (part.X, part.y) for name, part in scaled.items()}
    X, y = judged["training"]
    return Problem(
        name=dataset.name,
        rows=len(dataset),
        feature_names=dataset.feature_names,
        target_names=dataset.target_names,
        parts={"to train": len(train)} | ({} if held_out is None else {purpose: len(held_out)}),
        standardize=standardize,
        X=X,
        y=y,
        validation=judged.get("held out"),
        judged=judged,
    )


def _streamed(
    command: str, table: Table, shares: Mapping[str, float], seed: int, purpose: str, mini_batches: bool, folder: Path
) -> Problem:
    option, share = list(shares.items())[-1]
    rest, _ = split(table, {name: shares[name] for name in shares if name != option}, seed)
    identity = hashlib.sha256(repr((rest.fingerprint(), share, seed)).encode()).hexdigest()[:8]
    checkpoint = folder / f"pass-{identity}.pt"
    if checkpoint.exists():
        notices.print(f"what {checkpoint} holds of the table is not read again", soft_wrap=True)
    with row_progress() as progress:
        gathered = gather(command, rest, share or None, seed=seed, progress=progress, checkpoint=checkpoint)
    counts = [int(part.count.item()) for part in (gathered.train, gathered.held_out)]
    for count, part in zip(counts, ("to train on", "held out"), strict=True):
        if count == 0 and (share > 0 or part == "to train on"):
            raise ValueError(f"{option} {share:g} leaves no rows {part} of the few that {table.path} has")
    scaled, standardize = gathered.train.standardized(dtype=DTYPE)
    held_out = gathered.held_out.standardized(standardize)[0] if share > 0 else None
    return Problem(
        name=str(table.path),
        rows=sum(counts) if rest is table else table.rows,
        feature_names=table.feature_names,
        target_names=table.target_names,
        parts={"to train": counts[0]} | ({} if held_out is None else {purpose: counts[1]}),
        standardize=standardize,
        X=split(standardized(table, standardize), shares, seed)[0] if mini_batches else scaled,
        y=None,
        validation=held_out,
        judged={"training": (scaled,)} | ({} if held_out is None else {"held out": (held_out,)}),
        pass_seconds=gathered.seconds,
    )
