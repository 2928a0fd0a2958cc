"""What the commands train on: rows in memory, or the statistics and mini-batches of a table that is streamed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..data import datasets
from ..data.gather import gather
from ..data.table import read_table
from ..evaluation import evaluate, of_statistics
from ..nn import Standardize, initial_linear
from ..statistics import LinearStatistics
from ..training.choice import ENGINES, choose
from ..training.fit import learning_rates
from ..training.optimizers import parse_optimizer
from ..training.rows import TableRows

if TYPE_CHECKING:
    from ..data.table import Table
    from ..saving import SavedModel

__all__ = [
    "BUILT_IN",
    "STREAMED_BYTES",
    "Problem",
    "check_before_the_pass",
    "check_study_before_the_pass",
    "data_of",
    "from_memory",
    "from_table",
    "is_streamed",
    "read_data",
    "read_streamed",
]

BUILT_IN = ("synthetic", "diabetes")
# A larger file is streamed unless the user says otherwise: in memory it may take several times its size.
STREAMED_BYTES = 10**9

Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True, eq=False)
class Problem:
    """Rows to train on and rows held out, with standardised features.

    Attributes:
        name: Of the data.
        rows: How many it has.
        feature_names: Names of the features.
        target_names: Names of the targets.
        parts: How many rows each part has, by its name.
        standardize: What shifts and scales the features, from the rows to train on.
        X: For fit and tune: a matrix, a table, or statistics.
        y: Likewise.
        validation: Likewise.
        pass_seconds: What one pass over the table took; None for rows in memory.
    """

    name: str
    rows: int
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    parts: dict[str, int]
    standardize: Standardize
    X: Any
    y: Tensor | None
    validation: Any
    pass_seconds: float | None = None
    _judged: dict[str, Any] | None = None

    def measure(self, linear: nn.Linear) -> Metrics:
        """Judge a layer behind ``standardize`` by the rows of each part; without the mean absolute error of a table."""
        model = nn.Sequential(self.standardize, linear)
        return {
            name: of_statistics(part, linear) if isinstance(part, LinearStatistics) else evaluate(model, part.X, part.y)
            for name, part in (self._judged or {}).items()
        }

    def __str__(self) -> str:
        count = len(self.feature_names)
        columns = f"{count} feature{'s' if count > 1 else ''} -> {', '.join(self.target_names)}"
        parts = ", ".join(f"{rows} {name}" for name, rows in self.parts.items())
        return f"{self.name}: {self.rows} rows, {columns}; {parts}"


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


def read_data(data: str, target: Sequence[str] | None, feature: Sequence[str] | None, seed: int) -> datasets.Dataset:
    """Read what ``--data`` names into memory."""
    if data not in BUILT_IN:
        if not Path(data).suffix:
            raise ValueError(f"--data must be synthetic, diabetes, a file with a suffix or a folder, but got {data!r}")
        return read_table(data, target=target or None, features=feature or None)
    dataset = datasets.synthetic(seed=seed) if data == "synthetic" else datasets.diabetes()
    if target and tuple(target) != dataset.target_names:
        raise ValueError(f"--target must be {dataset.target_names[0]} for {data}, but got {', '.join(target)}")
    return dataset if not feature else _with_features(dataset, feature)


def read_streamed(data: str, target: Sequence[str] | None, feature: Sequence[str] | None) -> Table:
    """Open what ``--data`` names as a table to be streamed."""
    from ..data.table import open_table

    return open_table(data, target=target or None, features=feature or None)


def _with_features(dataset: datasets.Dataset, names: Sequence[str]) -> datasets.Dataset:
    known = dataset.feature_names
    for name in names:
        if name not in known:
            raise ValueError(f"{dataset.name} has no feature {name!r}; it has {', '.join(known)}")
    columns = [known.index(name) for name in names]
    return datasets.Dataset(dataset.name, dataset.X[:, columns], dataset.y, tuple(names), dataset.target_names)


def data_of(saved: SavedModel, data: str, with_targets: bool = True) -> datasets.Dataset:
    """Return the data in the columns that the model was trained with; without targets, ``y`` is empty."""
    if data in BUILT_IN:
        dataset = read_data(data, None, None, seed=int(saved.metadata.get("seed", 0)))
        if with_targets and dataset.target_names != saved.target_names:
            wanted = ", ".join(saved.target_names)
            raise ValueError(f"the model predicts {wanted}, but {data} has the target {dataset.target_names[0]}")
        return _with_features(dataset, saved.feature_names)
    if with_targets:
        return read_table(data, target=saved.target_names, features=saved.feature_names)
    return read_table(data, target=(), features=saved.feature_names)


def from_memory(
    dataset: datasets.Dataset, shares: Sequence[tuple[str, float]], seed: int, purpose: str = "held out"
) -> Problem:
    """Split a data set once for each share; what the last one holds out is for ``validation``.

    Args:
        dataset: The rows.
        shares: Option and share of the rows; those of all but the last are left aside.
        seed: Of the splits.
        purpose: What the rows held out last are for.
    """
    rest, held_out = dataset, None
    for option, share in shares:
        if _fraction(option, share) > 0:
            rest, held_out = datasets.split(rest, share, seed=seed)
        else:
            held_out = None
    standardize = Standardize.fit(rest.X)
    parts = {"to train": len(rest)} | ({} if held_out is None else {purpose: len(held_out)})
    judged = {"training": rest} | ({} if held_out is None else {"held out": held_out})
    return Problem(
        name=dataset.name,
        rows=len(dataset),
        feature_names=dataset.feature_names,
        target_names=dataset.target_names,
        parts=parts,
        standardize=standardize,
        X=standardize(rest.X),
        y=rest.y,
        validation=None if held_out is None else (standardize(held_out.X), held_out.y),
        _judged=judged,
    )


def from_table(
    command: str,
    table: Table,
    shares: Sequence[tuple[str, float]],
    seed: int,
    purpose: str = "held out",
    *,
    mini_batches: bool,
    progress: bool,
    folder: Path,
) -> Problem:
    """Gather the statistics of a table's parts in one pass.

    Args:
        command: For sentences.
        table: Of features in their own units.
        shares: As for :func:`from_memory`, but for a hash of the row's number that decides.
        seed: Of the hash.
        purpose: As for :func:`from_memory`.
        mini_batches: Whether what is trained on is the table again, standardised, and not its statistics.
        progress: Whether to show how far the pass is.
        folder: Where a file keeps the pass, for this command to go on after an interruption, and for others on the same
            parts of the table, which then read nothing.
    """
    from ..data.table import open_table

    for option, share in shares:
        _fraction(option, share)

    def rest_of(table: Table) -> Table:
        for _, share in shares[:-1]:
            table = table.split(share, seed=seed)[0] if share > 0 else table
        return table

    share = shares[-1][1]
    rest = rest_of(table)
    parts_of = hashlib.sha256(repr((rest.fingerprint(), share, seed)).encode()).hexdigest()[:8]
    gathered = gather(
        command,
        rest,
        share if share > 0 else None,
        seed=seed,
        progress=progress,
        checkpoint=folder / f"pass-{parts_of}.pt",
    )
    train, held_out = gathered.train, gathered.held_out
    counts = [int(part.count.item()) for part in (train, held_out)]
    for count, part in zip(counts, ("to train on", "held out"), strict=True):
        if count == 0 and (share > 0 or part == "to train on"):
            raise ValueError(f"{shares[-1][0]} {share:g} leaves no rows {part} of the few that {table.path} has")
    scaled, standardize = train.standardized(dtype=table.dtype)
    validation = held_out.standardized(standardize)[0] if share > 0 else None
    X_or_statistics: Any = scaled
    if mini_batches:
        again = open_table(
            table.path,
            target=table.target_names,
            features=table.feature_names,
            dtype=table.dtype,
            standardize=standardize,
        )
        X_or_statistics = rest_of(again).split(share, seed=seed)[0] if share > 0 else rest_of(again)
    judged = {"training": scaled} | ({} if validation is None else {"held out": validation})
    return Problem(
        name=str(table.path),
        rows=table.rows or sum(counts),
        feature_names=table.feature_names,
        target_names=table.target_names,
        parts={"to train": counts[0]} | ({} if validation is None else {purpose: counts[1]}),
        standardize=standardize,
        X=X_or_statistics,
        y=None,
        validation=validation,
        pass_seconds=gathered.seconds,
        _judged=judged,
    )


def check_before_the_pass(
    table: Table,
    *,
    lr: float,
    epochs: int,
    batch_size: int | None,
    shuffle: bool | None,
    optimizer: str,
    momentum: float,
    weight_decay: float,
    optimizer_options: dict[str, Any] | None,
    engine: str,
) -> None:
    """Raise the error of what ``fit`` would refuse, before a pass that may take hours and not after it."""
    epochs = _checks.positive_integer("fit", "epochs", epochs)
    rates = learning_rates("fit", lr, epochs)
    if batch_size is not None:
        batch_size = _checks.positive_integer("fit", "batch_size", batch_size)
    if shuffle and batch_size is not None:
        raise ValueError("fit: shuffle must not be True for a table, whose rows are read in their order")
    chosen = parse_optimizer("fit", optimizer, momentum, weight_decay, optimizer_options)
    linear = initial_linear(table.in_features, table.out_features, seed=0, dtype=table.dtype)
    chosen.check("fit", list(linear.parameters()), rates[0])
    _checks.one_of("fit", "engine", engine, ENGINES)
    rows = TableRows(table, dtype=table.dtype, device=linear.weight.device)
    choose(rows, engine=engine, optimizers=[chosen], batch_size=batch_size, epochs=epochs)


def check_study_before_the_pass(table: Table, **options: Any) -> None:
    """Raise the error of what ``tune`` would refuse, before a pass that may take hours: by a study of one trial."""
    from ..tuning.tune import tune

    sizes = (table.in_features, table.out_features)
    batch_size, space = options["batch_size"], options["search_space"] or {}
    if isinstance(batch_size, int) and batch_size > 1:
        options["batch_size"] = 1
    X, y = (torch.zeros(2, size, dtype=table.dtype) for size in sizes)
    once = {"n_trials": min(options["n_trials"], 1), "epochs": min(options["epochs"], 1)}
    if batch_size is None and "batch_size" not in space:
        tune(LinearStatistics(*sizes).update(X, y), **options | once)
    else:
        tune(X, y, **options | once)


def _fraction(option: str, share: float) -> float:
    if not 0 <= share < 1:
        raise ValueError(f"{option} must be at least 0 and below 1, but got {share}")
    return share
