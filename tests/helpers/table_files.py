"""Small tables in files of every format, and what the tests of streaming look at."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from torchintro.data.table import Table

pl = pytest.importorskip("polars")

NAMES = ["area", "rooms", "age", "price"]
FORMATS = ["parquet", "csv", "npy", "npy by columns"]


def numbers(rows: int, columns: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns), np.float32)


def write(path: Path, kind: str, matrix: np.ndarray, group: int = 7) -> Path:
    """Write one file of a kind, a Parquet file in row groups of ``group`` rows."""
    path = path.with_suffix(f".{kind.split()[0]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    names = NAMES if matrix.shape[1] == 4 else [str(i) for i in range(matrix.shape[1])]
    if kind.startswith("npy"):
        np.save(path, np.asfortranarray(matrix) if kind == "npy by columns" else matrix)
        return path
    frame = pl.DataFrame({name: matrix[:, i] for i, name in enumerate(names)})
    if kind == "parquet":
        frame.write_parquet(path, row_group_size=group, compression="uncompressed")
    elif kind == "arrow":
        frame.write_ipc(path)
    elif kind == "csv.gz":
        path.write_bytes(gzip.compress(frame.write_csv().encode()))
    else:
        frame.write_csv(path)
    return path


def gather(table: Table, **arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
    pieces = list(table.pieces(**arguments))
    X = torch.cat([X for X, _ in pieces] or [torch.empty(0, table.in_features)])
    return X, torch.cat([y for _, y in pieces] or [torch.empty(0, table.out_features)])


def opened() -> list[Path]:
    """Return what this process has open."""
    return [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
