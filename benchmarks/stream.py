"""What a table larger than memory costs to stream: the readers alone, the stream, a pass over it.

    python benchmarks/stream.py                                    # 1 GB: Parquet (snappy and zstd), NPY, CSV
    python benchmarks/stream.py --gigabytes 10 --format parquet    # one format, larger
    python benchmarks/stream.py --cold                             # from the disk, not from the system's cache of it
    python benchmarks/stream.py --json record.json

A gigabyte is one of float32 numbers, 10^9 bytes as they come out of the reader; on disk the formats differ. The table
is written piece by piece into a temporary folder, or into one given, and deleted afterwards (--keep keeps it).

Four programs then read it, each in a process of its own, so that the peak of resident memory is its own, with Python
and what the program imports in it (VmHWM of /proc/self/status: getrusage's begins at that of the process before):
- polars: what Polars does alone, its batches turned to NumPy rows (`collect_batches`, `to_numpy`), types inferred;
- pyarrow: what pyarrow does alone, which leaves the columns as they are (`iter_batches`, `csv.open_csv`);
  for NPY both are `readinto`;
- stream: `torchintro.open_table(path).pieces()`, nothing done with the pieces;
- pass: `torchintro.open_table(path).statistics()`, all that linear regression needs of the rows.
They take turns, `--repeats` times. Of each the run with the least CPU time counts (user and system, of all threads),
because another process can only make one slower; "x polars" compares these, which other processes disturb least.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = ("parquet", "parquet-zstd", "npy", "csv")
PROGRAMS = ("polars", "pyarrow", "stream", "pass")
ROW_GROUP = 1 << 17


def names(features: int) -> list[str]:
    return [*(f"x{i}" for i in range(features)), "y"]


def matrices(rows: int, columns: int) -> Iterator[np.ndarray]:
    """Yield normally distributed features, the last column a sum of them, a row group at a time."""
    generator = np.random.default_rng(0)
    for at in range(0, rows, ROW_GROUP):
        matrix = generator.standard_normal((min(ROW_GROUP, rows - at), columns), dtype=np.float32)
        matrix[:, -1] += matrix[:, :-1].sum(1)
        yield matrix


def write(folder: Path, kind: str, rows: int, features: int) -> Path:
    columns = features + 1
    path = folder / f"table-{kind}.{kind.partition('-')[0]}"
    if kind == "npy":
        with path.open("wb") as handle:
            header = {"descr": "<f4", "fortran_order": False, "shape": (rows, columns)}
            np.lib.format.write_array_header_1_0(handle, header)
            for matrix in matrices(rows, columns):
                matrix.tofile(handle)
        return path
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    schema = pyarrow.schema([(name, pyarrow.float32()) for name in names(features)])
    if kind == "csv":
        writer: Any = pyarrow.csv.CSVWriter(path, schema)
    else:
        compression = kind.partition("-")[2] or "snappy"
        writer = pyarrow.parquet.ParquetWriter(path, schema, compression=compression)
    with writer:
        for matrix in matrices(rows, columns):
            arrays = [pyarrow.array(np.ascontiguousarray(column)) for column in matrix.T]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), ROW_GROUP)
    return path


def run_polars(path: Path) -> int:
    if path.suffix == ".npy":
        return run_readinto(path)
    import polars

    lazy = polars.scan_parquet(path) if path.suffix == ".parquet" else polars.scan_csv(path)
    frames = lazy.collect_batches(chunk_size=1 << 16, maintain_order=True, lazy=True)
    return sum(len(frame.to_numpy(order="c")) for frame in frames)


def run_pyarrow(path: Path) -> int:
    if path.suffix == ".npy":
        return run_readinto(path)
    import pyarrow.csv
    import pyarrow.parquet

    if path.suffix == ".csv":
        return sum(batch.num_rows for batch in pyarrow.csv.open_csv(path))
    return sum(batch.num_rows for batch in pyarrow.parquet.ParquetFile(path, pre_buffer=False).iter_batches(1 << 15))


def run_readinto(path: Path) -> int:
    rows, width = 0, np.load(path, mmap_mode="r").shape[1]
    buffer = np.empty((1 << 21) // (4 * width) * width, np.float32)
    with path.open("rb", buffering=0) as handle:
        handle.seek(128)  # the header that was written above
        while count := handle.readinto(buffer.view(np.uint8).data):
            rows += count // (4 * width)
    return rows


def run_stream(path: Path) -> int:
    import torchintro

    return sum(X.shape[0] for X, _ in torchintro.open_table(path).pieces())


def run_pass(path: Path) -> int:
    import torchintro

    return int(torchintro.open_table(path).statistics().count)


RUN: dict[str, Callable[[Path], int]] = {
    "polars": run_polars,
    "pyarrow": run_pyarrow,
    "stream": run_stream,
    "pass": run_pass,
}


def measure(program: str, path: Path) -> dict[str, float]:
    """Run a program in a process of its own."""
    command = [sys.executable, __file__, "--run", program, str(path)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    record: dict[str, float] = json.loads(result.stdout)
    return record


def forget(path: Path) -> None:
    """Have the system drop what it keeps of a file in memory."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def child(program: str, path: Path) -> None:
    # Before the clock starts.
    if program in ("stream", "pass"):
        import torchintro  # noqa: F401
    if program == "pyarrow":
        import pyarrow.csv
        import pyarrow.parquet  # noqa: F401
    else:
        import polars  # noqa: F401
    begin, used = time.perf_counter(), cpu_seconds()
    rows = RUN[program](path)
    record = {"rows": rows, "seconds": time.perf_counter() - begin, "cpu_seconds": cpu_seconds() - used}
    status = Path("/proc/self/status").read_text()
    print(json.dumps(record | {"peak_bytes": int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024}))


def line(cells: list[str]) -> str:
    return f"{cells[0]:<14}{cells[1]:>12}{cells[2]:>9}  {cells[3]:<8}" + "".join(f"{cell:>12}" for cell in cells[4:])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="stream", description="How fast, and in how much memory, a table is streamed."
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="Of float32 numbers. Default: 1.")
    parser.add_argument("--features", type=int, default=64, help="Columns besides the target. Default: 64.")
    parser.add_argument("--format", action="append", choices=FORMATS, help="Repeat it for several. Default: all.")
    parser.add_argument("--repeats", type=int, default=3, help="Runs of each program. Default: 3.")
    parser.add_argument("--folder", type=Path, help="Where the table is written. Default: a temporary folder.")
    parser.add_argument("--cold", action="store_true", help="Drop the file from the system's cache before each run.")
    parser.add_argument("--keep", action="store_true", help="Do not delete the table; needs --folder.")
    parser.add_argument("--json", type=Path, help="Write the record to this file.")
    parser.add_argument("--run", nargs=2, metavar=("PROGRAM", "PATH"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.run:
        child(chosen.run[0], Path(chosen.run[1]))
        return 0
    if chosen.keep and not chosen.folder:
        parser.error("--keep needs --folder")
    if chosen.gigabytes <= 0 or chosen.features < 1 or chosen.repeats < 1:
        parser.error("--gigabytes, --features and --repeats must be positive")
    width = 4 * (chosen.features + 1)
    rows = max(int(chosen.gigabytes * 1e9) // width, 1)
    record: dict[str, Any] = {"gigabytes": chosen.gigabytes, "rows": rows, "features": chosen.features}
    record |= {"cold": chosen.cold, "cores": os.cpu_count(), "formats": {}}
    print(f"{rows:,} rows of {chosen.features} float32 features and a target; {os.cpu_count()} cores")
    print("MB/s are of float32 numbers; load is the machine's, beside this program's own.")
    print(line(["format", "rows", "on disk", "program", "CPU s", "x polars", "wall s", "MB/s", "peak memory", "load"]))
    with tempfile.TemporaryDirectory(prefix="torchintro-stream-", dir=chosen.folder) as temporary:
        folder = chosen.folder if chosen.keep else Path(temporary)
        for kind in chosen.format or FORMATS:
            path = write(folder, kind, rows, chosen.features)
            size = path.stat().st_size
            runs: dict[str, list[dict[str, float]]] = {program: [] for program in PROGRAMS}
            for _ in range(chosen.repeats):
                for program in PROGRAMS:
                    if chosen.cold:
                        forget(path)
                    runs[program].append(measure(program, path) | {"load": os.getloadavg()[0]})
                    if runs[program][-1]["rows"] != rows:
                        raise RuntimeError(f"{program} read {runs[program][-1]['rows']} rows of {rows}")
            best = {program: min(samples, key=lambda run: run["cpu_seconds"]) for program, samples in runs.items()}
            for program in PROGRAMS:
                used, seconds = best[program]["cpu_seconds"], best[program]["seconds"]
                peak = max(run["peak_bytes"] for run in runs[program])
                cells = [kind, f"{rows:,}", f"{size / 1e9:.2f} GB"] if program == PROGRAMS[0] else ["", "", ""]
                cells += [program, f"{used:.2f}", f"{used / best['polars']['cpu_seconds']:.2f}", f"{seconds:.2f}"]
                cells += [f"{rows * width / seconds / 1e6:,.0f}", f"{peak / 1e6:,.0f} MB"]
                print(line([*cells, f"{best[program]['load']:.1f}"]), flush=True)
            record["formats"][kind] = {"bytes": size, "runs": runs}
            if not chosen.keep:
                path.unlink()
    if chosen.json:
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
