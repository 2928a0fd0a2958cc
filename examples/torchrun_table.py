"""Train on a table by several processes, each of which reads its own share of the rows once.

    torchrun --standalone --nproc-per-node=2 examples/torchrun_table.py  # a table of its own
    torchrun --standalone --nproc-per-node=2 examples/torchrun_table.py rows/  # .parquet, .csv or .npy

On several machines, which all must see the table: ``torchrun --nnodes=... --rdzv-backend=c10d --rdzv-endpoint=...``.
Without torchrun it is one process that reads all rows.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed

from torchintro import fit, initial_linear, open_table


def write_table(folder: Path) -> None:
    """Write 40,000 rows of four features in their own units, and a target that follows them but for noise."""
    generator = np.random.default_rng(0)
    for k in range(4):
        X = generator.standard_normal((10_000, 4)) * [1, 10, 100, 0.1] + [0, 5, 1000, 0]
        y = X @ [1, 0.2, 0.03, 5] + 3 + generator.standard_normal(10_000)
        np.save(folder / f"{k}.npy", np.column_stack([X, y]).astype(np.float32))


def main(path: Path, rank: int, world_size: int) -> None:
    """Train on the table at ``path``; every process calls this and ends with the same model."""
    table = open_table(path)
    train, held_out = table.split_statistics(0.2, seed=0, share=(rank, world_size))
    read = int(train.count + held_out.count)
    if world_size > 1:
        train.reduce()
        held_out.reduce()
    print(f"rank {rank} read {read} of {int(train.count + held_out.count)} rows")

    # The features are standardised without another pass, and no epoch reads a row.
    scaled, standardize = train.standardized()
    linear = initial_linear(table.in_features, table.out_features, seed=0)
    result = fit(linear, scaled, lr=0.1, epochs=200, validation=held_out.standardized(standardize)[0])
    exact = scaled.loss(*scaled.solve())
    if rank == 0:
        print(f"engine {result.engine}: {result.reason}")
        print(f"held-out mean squared error {result.validation_losses[-1]:.4f} (noise alone: 1)")
        print(f"training rows: {result.losses[-1]:.4f} after 200 epochs, {exact:.4f} in closed form")


if __name__ == "__main__":
    several = "RANK" in os.environ
    if several:
        torch.distributed.init_process_group("gloo")
    rank, world_size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)
    with tempfile.TemporaryDirectory() as folder:
        shared = [sys.argv[1] if len(sys.argv) > 1 else folder]
        if rank == 0 and shared[0] == folder:
            write_table(Path(folder))
        if several:  # rank 0's folder is the table, and all wait until it is written
            torch.distributed.broadcast_object_list(shared, src=0)
        main(Path(shared[0]), rank, world_size)
        if several:
            torch.distributed.barrier()  # the folder goes once all have read it
    if several:
        torch.distributed.destroy_process_group()
