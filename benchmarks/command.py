"""The benchmark: every row of :mod:`torchintro.benchmark.rows`, verified, then timed against plain PyTorch.

The peers of a row run side by side in one process: ``eager`` (plain PyTorch), ``compile`` (the same through
``torch.compile``), ``jax`` (where it is installed) and ``fused`` (this package), beside a probe of what the machine
allows at most. A peer whose loss or gradient is further from float64's than the eager one's rounding explains fails the
run.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchintro import _C

from .cases import Row, count, quick_row, select
from .crossover import Crossover, run_crossover
from .grid import DTYPES, FULL_GRID, QUICK_GRID, Plane, run_grid
from .machine import (
    Limits,
    Probe,
    cpu_name,
    describe,
    dtype_name,
    matrix_probe,
    measure_limits,
    products_probe,
    traffic_probe,
)
from .memory import extra_peak
from .report.markdown import markdown
from .report.text import (
    READABLE,
    SCHEMA,
    Bound,
    RowResult,
    Verdict,
    header,
    json_text,
    machine_lines,
    row_lines,
    versus_lines,
)
from .step import Operator, StepWork, Work, make_work
from .timing import DISTURBED, FULL, QUICK, Effort, Interruptions, Measurement, disturbed_text, interleaved, once
from .trials import FULL_PLAN, QUICK_PLAN, Curve, run_trials

__all__ = ["main", "run_row"]


def main(
    device: str = "cpu",
    rows: list[str] | None = None,
    json_path: Path | None = None,
    quick: bool = False,
    *,
    grid: bool = False,
    dtype: str = "float32",
    no_rows: bool = False,
    plot: Path | None = None,
    record_path: Path | None = None,
    table: bool = False,
    crossover: bool = False,
    trials: bool = False,
) -> int:
    """Run the benchmark and print it: the command ``torchintro bench``.

    Args:
        device: ``"cpu"``, or ``"cuda"`` for the CPU, the GPU and the two against each other.
        rows: Names of rows, or what several begin with; None for all that are meant for the device.
        json_path: Where to write the record of the run.
        quick: Scale everything down to some seconds; the figures then mean nothing, and no target is judged.
        grid: Also compare the fused operator with plain PyTorch on a grid of shapes, on the GPU for ``"cuda"``.
        dtype: Of the grid.
        no_rows: Measure nothing but the grid and the trials.
        plot: A folder for the pictures: the roofline of the rows' steps, and time against trials.
        record_path: Measure nothing: draw the pictures of this record, or print its table. Also a record of
            ``make gpu-check``, which holds the benchmark's.
        table: Print a record's figures as the README's Markdown tables.
        crossover: On a GPU, also measure from how many rows on it wins over the CPU; done anyhow without ``rows``.
        trials: Also measure the time against the number of trials, on the GPU for ``"cuda"``.

    Returns:
        The exit code: 0, or 1 if a peer was wrong or broke down, or 2 if an argument is wrong. Missing a target is not
        a failure.
    """
    try:
        if record_path is not None:
            if not (plot or table) or rows or json_path or quick or grid or no_rows or crossover or trials:
                raise ValueError("bench: from shows a record; it takes plot or table, and nothing else")
            return _show(record_path, plot, table)
        if table:
            raise ValueError("bench: table needs from, the record to make it of")
        chosen = _check_arguments(device, rows, json_path, grid, dtype, no_rows, plot, trials)
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    no_gpu = _why_no_gpu() if device == "cuda" else ""
    if no_gpu:
        print(f"bench: {no_gpu}; only the CPU is measured.\n")
    host = torch.device("cpu")
    gpu = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" and not no_gpu else None
    machine = describe(gpu or host)
    print("\n".join(machine_lines(machine)), flush=True)

    everywhere = [row for row in chosen if row.device == "cpu"]
    limits: dict[str, Limits | None] = {}
    results: dict[str, list[RowResult]] = {}
    limits["cpu"], results["cpu"] = _run(everywhere, host, quick=quick, others=not quick and gpu is None)
    if gpu is not None:
        limits["cuda"], results["cuda"] = _run(chosen, gpu, quick=quick, others=not quick)
        print("\n".join(versus_lines(results["cpu"], results["cuda"])))
    for row in chosen:
        if row.device == "cuda" and rows and gpu is None:
            print(f"{row.id}: only for --device cuda on a machine with a GPU")

    crossovers: list[Crossover] = []
    if gpu is not None and (crossover or not (rows or no_rows)):
        crossovers = run_crossover(gpu, QUICK if quick else FULL, quick=quick)
    planes: list[Plane] = []
    if grid:
        planes = run_grid(QUICK_GRID if quick else FULL_GRID, gpu or host, DTYPES[dtype])
    curves: list[Curve] = []
    if trials:
        curves = run_trials(gpu or host, QUICK_PLAN if quick else FULL_PLAN)

    everything = [result for part in results.values() for result in part]
    print("\n" + "\n".join(_summary(everything, quick)), flush=True)
    record = {
        "schema": SCHEMA,
        "quick": quick,
        "machine": machine,
        "limits": {name: measured.record() for name, measured in limits.items() if measured is not None},
        "rows": [result.record() for result in everything],
        "grid": [plane.record() for plane in planes],
        "crossover": [one.record() for one in crossovers],
        "trials": [curve.record() for curve in curves],
    }
    if json_path is not None:
        json_path.write_text(json_text(record))
        print(f"written to {json_path}")
    failures = [
        f"{result.row.id} on {result.device} failed: {result.failures[0]}" for result in everything if result.failures
    ]
    failures += [f"grid {plane.name} failed: {sentence}" for plane in planes for sentence in plane.wrong]
    failures += [f"crossover {one.series.name} failed: {one.failure}" for one in crossovers if one.failure]
    failures += [f"trials {curve.shape.name} failed: {curve.failure}" for curve in curves if curve.failure]
    for failure in failures:
        print(f"bench: {failure}", file=sys.stderr)
    if plot is not None:
        try:
            _draw(record, plot)
        except ValueError as error:  # every row failed, or none is a step, and there are no trials
            print(error, file=sys.stderr)
            return 1
    return 1 if failures else 0


def _show(path: Path, plot: Path | None, table: bool) -> int:
    record = _read_record(path)
    if table:
        if record["quick"]:
            raise ValueError(f"bench: table needs a record of a full run, but got a quick one: {path}")
        print("\n".join(markdown(record)))
    return 0 if plot is None else _draw(record, plot)


def _draw(record: dict[str, Any], folder: Path) -> int:
    from .report import roofline
    from .report import trials as trials_picture

    written = [*roofline.draw(record, folder), *trials_picture.draw(record, folder)]
    if not written:
        raise ValueError(
            "bench: there is nothing to plot: the record holds no step whose limit was measured, and no trials"
        )
    for path in written:
        print(f"written to {path}")
    return 0


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"bench: from must be a record that bench --json wrote, but got {path}: {error}") from None
    if isinstance(record, dict) and "benchmarks" in record and "schema" not in record:  # that of make gpu-check
        if record["benchmarks"] is None:
            raise ValueError(f"bench: from must be a record with figures, but {path} says that no benchmark ran")
        record = record["benchmarks"]
    if not isinstance(record, dict) or record.get("schema") not in READABLE:
        schemas = " or ".join(map(str, READABLE))
        raise ValueError(f"bench: from must be a record of schema {schemas} that bench --json wrote, but got {path}")
    return record


def _check_arguments(
    device: str,
    rows: Sequence[str] | None,
    json_path: Path | None,
    grid: bool,
    dtype: str,
    no_rows: bool,
    plot: Path | None,
    trials: bool,
) -> list[Row]:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench: device must be cpu or cuda, but got {device!r}")
    chosen = select(rows or None)
    if dtype not in DTYPES:
        raise ValueError(f"bench: dtype must be one of {', '.join(DTYPES)}, but got {dtype!r}")
    if no_rows and (rows or not (grid or trials) or (plot is not None and not trials)):
        raise ValueError(
            "bench: no-rows leaves only the grid and the trials; it takes one of them and no row, and plot with trials"
        )
    # Now, and not after minutes of measuring.
    if plot is not None:
        from .report.canvas import check_matplotlib

        check_matplotlib()
        try:
            plot.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"bench: plot must be a folder that can be written to, but got {plot}: {error}") from None
    if json_path is not None:
        try:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.open("a").close()
        except OSError as error:
            raise ValueError(f"bench: json must be a file that can be written, but got {json_path}: {error}") from None
    return [] if no_rows else chosen


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"there is no GPU to use: torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "there is no GPU to use: torch finds none on this machine"
    if not _C.build_info()["cuda"]:
        return "this build of torchintro has no CUDA kernels"
    return ""


def _run(
    rows: Sequence[Row], device: torch.device, *, quick: bool, others: bool
) -> tuple[Limits | None, list[RowResult]]:
    """Measure the limits of a device, then the rows, and print each as it is done."""
    if not rows:
        return None, []
    effort = QUICK if quick else FULL
    limits = measure_limits(device, replace(effort, seconds=effort.seconds / 4), quick=quick)
    print(f"\n{device.type.upper()} limits: " + "; ".join(limits.lines()))
    print("\n".join(header()), flush=True)
    results = []
    said: set[str] = set()
    for row in rows:
        small = quick_row(row) if quick else row
        result = run_row(small, device, limits, effort, compile=others, jax=others, judge=not quick)
        print("\n".join(row_lines(result, said)), flush=True)
        results.append(result)
        gc.collect()  # the data of a row can hang in a cycle, and the next row needs the memory
    return limits, results


def run_row(
    row: Row,
    device: torch.device,
    limits: Limits,
    effort: Effort,
    *,
    compile: bool = True,
    jax: bool = True,
    judge: bool = True,
    fused: Operator | None = None,
) -> RowResult:
    """Verify the peers of a row, and if they are right, measure them.

    Args:
        row: The record.
        device: Where.
        limits: What the device can do at most.
        effort: How long to measure.
        compile: Whether to include ``torch.compile``.
        jax: Whether to include JAX.
        judge: Whether to compare with the row's targets.
        fused: What the peer ``"fused"`` of a step calls, by default :func:`torchintro.linear_mse_loss`.

    Returns:
        The figures, or in ``failures`` why there are none.
    """
    result = RowResult(row, device.type)
    try:
        work = make_work(row, device, compile=compile, jax=jax, fused=fused)
        result.skipped = work.skipped
        result.scales = {peer: scale for peer, scale in work.scales.items() if scale != 1}
        result.checks = work.verify()
        result.notes = work.notes
        result.failures = [
            f"{peer} computes {name} with an error of {check.error:.2e}, where {check.allowed:.2e} is allowed"
            for peer, checks in result.checks.items()
            for name, check in checks.items()
            if not check.passed
        ]
        if result.failures:
            return result
        if row.kind == "memory":
            _measure_memory(result, work)
        else:
            _measure_time(result, work, limits, effort)
            if device.type == "cuda" and row.device == "cpu":
                result.transfer_seconds = _transfer_seconds(work)
    except torch.OutOfMemoryError:
        result.notes.append("left out: the GPU has not enough memory for it")
        return result
    except Exception as error:  # the other rows are still worth having, and the exit code tells
        result.failures.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return result
    if judge and row.device == device.type:
        result.verdicts = _judge(result)
    return result


def _measure_memory(result: RowResult, work: Work) -> None:
    for peer in work.calls:
        try:
            result.measurements[peer] = Measurement((float(extra_peak(result.row, peer, work.device)),))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            result.skipped[peer] = str(error)


def _measure_time(result: RowResult, work: Work, limits: Limits, effort: Effort) -> None:
    row = result.row
    probe = _probe(work, limits)
    calls = {peer: call for peer, call in work.calls.items() if peer not in _ALONE and peer not in work.once}
    if probe is not None:
        probe.call()
        calls[_PROBE] = probe.call
    interruptions = Interruptions()
    timed = interleaved(calls, effort, work.device, cold=work.cold)
    result.interruptions = interruptions.per_second()
    if result.interruptions > DISTURBED:
        result.notes.append(disturbed_text(result.interruptions))
    if probe is not None:
        result.bound = _bound(row, probe, timed.pop(_PROBE), limits)
    alone = replace(effort, seconds=effort.seconds / len(work.calls))
    for peer in work.calls.keys() & _ALONE:
        timed.update(interleaved({peer: work.calls[peer]}, alone, work.device, cold=work.cold))
    timed.update((peer, once(work.calls[peer], work.device)) for peer in work.calls if peer in work.once)
    result.measurements = {peer: timed[peer].scaled(work.scales.get(peer, 1.0)) for peer in work.calls}


_PROBE = "probe"  # its name among the peers
# With threads of their own (XLA's, those of SciPy's BLAS): in turn with PyTorch, the threads of either still look for
# work while the other is timed. A study on 1M x 64 takes 49 ms, and 95 ms in turn with Ridge.
_ALONE = {"jax", "sklearn", "ridge"}


def _probe(work: Work, limits: Limits) -> Probe | None:
    """Return what to time among the peers of a row to know the row's limit at that moment and that size."""
    row = work.row
    floor = work.floor()
    if floor is not None:
        return Probe("W.sum().backward()" if row.limit == "call" else "a study with an empty objective", floor, 1)
    if row.limit in ("read", "copy"):
        return traffic_probe(row.limit, count(row).bytes, work.device)
    if row.limit == "matrix":
        dtype = limits.matrix_dtype(row.dtype)
        return matrix_probe(dtype, limits.ways[dtype_name(dtype)], limits.matrix_size, work.device)
    if row.limit == "products" and isinstance(work, StepWork):
        X, y = work.inputs()
        return products_probe(X, work.tensors["linear_weight"].detach(), y, row.gradients)
    return None


def _bound(row: Row, probe: Probe, timed: Measurement, limits: Limits) -> Bound:
    need = count(row)
    if row.limit == "products":
        return Bound(f"its {need.operations / 1e9:.3g} GFLOP of products by mm", timed.median, timed)
    if row.limit not in ("read", "copy", "matrix"):
        return Bound(probe.way, timed.median, timed)
    rate = probe.amount / timed.median
    if row.limit == "matrix":
        traffic, operations = need.bytes / limits.read, need.operations / rate
    else:
        traffic, operations = need.bytes / rate, need.operations / limits.rate(row.dtype)
    if operations > traffic:
        return Bound(f"{need.operations / 1e9:.3g} GFLOP of matrix products", operations, timed)
    return Bound(f"{row.limit} {need.bytes / 1e6:.3g} MB once", traffic, timed)


def _judge(result: RowResult) -> list[Verdict]:
    verdicts = []
    for target in result.row.targets:
        if target.cpu not in cpu_name():
            continue
        fused = result.measurements["fused"].median if "fused" in result.measurements else 0.0
        if target.of == "limit":
            other = result.bound.seconds if result.bound else 0.0
        else:
            other = result.measurements[target.of].median if target.of in result.measurements else 0.0
        if fused > 0 and other > 0:
            best = target.ratio(result.bound.seconds, other) if result.bound and target.of != "limit" else None
            verdicts.append(Verdict(target, target.ratio(fused, other), target.met(fused, other), best))
        else:
            verdicts.append(Verdict(target, None, None))
    return verdicts


def _transfer_seconds(work: Work, samples: int = 3) -> float:
    """Return how long it takes to bring a row's data from ordinary memory to the GPU."""
    host = [tensor.cpu() for tensor in work.inputs()]
    times = []
    for _ in range(samples):
        torch.cuda.synchronize(work.device)
        start = time.perf_counter()
        for tensor in host:
            tensor.to(work.device)
        torch.cuda.synchronize(work.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _summary(results: Sequence[RowResult], quick: bool) -> list[str]:
    failed, short = (
        [f"{result.row.id} ({result.device})" for result in results if result.status == status]
        for status in ("failed", "short of target")
    )
    judged = sum(any(verdict.met is not None for verdict in result.verdicts) for result in results)
    if not results:
        return []
    lines = [f"{len(results)} rows, {len(results) - len(failed)} verified against float64"]
    if failed:
        lines.append(f"FAILED: {', '.join(failed)}")
    if quick:
        lines.append("quick: shapes and repeats are scaled down, so no figure means anything and no target is judged")
    else:
        lines.append(f"rows judged by targets: {judged}; short of target: {', '.join(short) or 'none'}")
    return lines
