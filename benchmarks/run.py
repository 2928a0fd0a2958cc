"""A run of the benchmark: every case of :mod:`benchmarks.cases`, verified, then timed against plain PyTorch.

The peers of a case run side by side in one process: ``eager`` (plain PyTorch), ``compile`` (the same through
``torch.compile``), ``jax`` (where it is installed) and ``fused`` (this package), beside a probe of what the machine
allows at most. A peer whose loss or gradient is further from float64's than the eager one's rounding explains fails the
run.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from torchintro import _C

from .cases import Case, quick_case, select
from .crossover import Crossover, run_crossover
from .grid import DTYPES, FULL_GRID, QUICK_GRID, Plane, run_grid
from .machine import Limits, describe, measure_limits
from .measure import run_case
from .record import SCHEMA, CaseResult, json_text, read_record
from .report.canvas import check_matplotlib
from .report.markdown import markdown
from .report.roofline import draw as draw_roofline
from .report.text import case_lines, header, machine_lines, versus_lines
from .report.trials import draw as draw_trials
from .timing import FULL, QUICK
from .trials import FULL_PLAN, QUICK_PLAN, Curve, run_trials

__all__ = ["Options", "main"]


@dataclass(frozen=True)
class Options:
    """What a run is to do.

    Attributes:
        device: ``"cpu"``, or ``"cuda"`` for the CPU, the GPU and the two against each other.
        cases: Names of cases, or what several begin with; none for all that are meant for the device.
        json: Where to write the record of the run.
        quick: Scale everything down to some seconds; the figures then mean nothing, and no target is judged.
        grid: Also compare the fused operator with plain PyTorch on a grid of shapes, on the GPU for ``"cuda"``.
        dtype: Of the grid.
        no_rows: Measure nothing but the grid and the trials.
        plot: A folder for the pictures: the roofline of the cases' steps, and time against trials.
        record: Measure nothing: draw the pictures of this record, or print its table. Also a record of
            ``make gpu-check``, which holds the benchmark's.
        table: Print a record's figures as Markdown tables.
        crossover: On a GPU, also measure from how many rows on it wins over the CPU; done anyhow without ``cases``.
        trials: Also measure the time against the number of trials, on the GPU for ``"cuda"``.
    """

    device: str = "cpu"
    cases: Sequence[str] = ()
    json: Path | None = None
    quick: bool = False
    grid: bool = False
    dtype: str = "float32"
    no_rows: bool = False
    plot: Path | None = None
    record: Path | None = None
    table: bool = False
    crossover: bool = False
    trials: bool = False


@dataclass
class _Measured:
    """All that a run has measured so far."""

    limits: dict[str, Limits]
    results: list[CaseResult]
    crossovers: Sequence[Crossover] = ()
    planes: Sequence[Plane] = ()
    curves: Sequence[Curve] = ()

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "limits": {device: limits.record() for device, limits in self.limits.items()},
            "rows": [result.record() for result in self.results],
            "grid": [plane.record() for plane in self.planes],
            "crossover": [one.record() for one in self.crossovers],
            "trials": [curve.record() for curve in self.curves],
        }

    def failures(self) -> list[str]:
        """Return what was wrong or broke down, in a sentence each."""
        return [
            *(f"{one.case.id} on {one.device} failed: {one.failures[0]}" for one in self.results if one.failures),
            *(f"grid {plane.name} failed: {sentence}" for plane in self.planes for sentence in plane.wrong),
            *(f"crossover {one.series.name} failed: {one.failure}" for one in self.crossovers if one.failure),
            *(f"trials {curve.shape.name} failed: {curve.failure}" for curve in self.curves if curve.failure),
        ]


def main(options: Options) -> int:
    """Run the benchmark and print it: the command ``python -m benchmarks``.

    Returns:
        The exit code: 0, or 1 if a peer was wrong or broke down, or 2 if an option is wrong. Missing a target is not a
        failure.
    """
    try:
        if options.record is not None:
            return _show(options.record, options)
        chosen = _checked(options)
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    no_gpu = _why_no_gpu() if options.device == "cuda" else ""
    if no_gpu:
        print(f"bench: {no_gpu}; only the CPU is measured.\n")
    gpu = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" and not no_gpu else None
    machine = describe(gpu or torch.device("cpu"))
    print("\n".join(machine_lines(machine)), flush=True)
    measured = _measure(chosen, gpu, options)
    print("\n" + "\n".join(_summary(measured.results, options.quick)), flush=True)
    record = {"schema": SCHEMA, "quick": options.quick, "machine": machine, **measured.record()}
    if options.json is not None:
        options.json.write_text(json_text(record))
        print(f"written to {options.json}")
    failures = measured.failures()
    for failure in failures:
        print(f"bench: {failure}", file=sys.stderr)
    if options.plot is not None:
        try:
            _draw(record, options.plot)
        except ValueError as error:  # every case failed, or none is a step, and there are no trials
            print(error, file=sys.stderr)
            return 1
    return 1 if failures else 0


def _show(path: Path, options: Options) -> int:
    """Show a record: its table, or its pictures."""
    plot, table = options.plot, options.table
    measuring = (options.cases, options.json, options.quick, options.grid, options.no_rows, options.crossover)
    if not (plot or table) or any(measuring) or options.trials:
        raise ValueError("bench: from shows a record; it takes plot or table, and nothing else")
    record = read_record(path)
    if table:
        if record["quick"]:
            raise ValueError(f"bench: table needs a record of a full run, but got a quick one: {path}")
        print("\n".join(markdown(record)))
    if plot is not None:
        _draw(record, plot)
    return 0


def _draw(record: dict[str, Any], folder: Path) -> None:
    written = [*draw_roofline(record, folder), *draw_trials(record, folder)]
    if not written:
        raise ValueError(
            "bench: there is nothing to plot: the record holds no step whose limit was measured, and no trials"
        )
    for path in written:
        print(f"written to {path}")


def _checked(options: Options) -> list[Case]:
    """Check the options of a run that measures; return its cases."""
    if options.table:
        raise ValueError("bench: table needs from, the record to make it of")
    if options.device not in ("cpu", "cuda"):
        raise ValueError(f"bench: device must be cpu or cuda, but got {options.device!r}")
    chosen = select(options.cases or None)
    if options.dtype not in DTYPES:
        raise ValueError(f"bench: dtype must be one of {', '.join(DTYPES)}, but got {options.dtype!r}")
    anything = options.grid or options.trials
    if options.no_rows and (options.cases or not anything or (options.plot is not None and not options.trials)):
        raise ValueError(
            "bench: no-rows leaves only the grid and the trials; it takes one of them and no row, and plot with trials"
        )
    # Now, and not after minutes of measuring.
    if options.plot is not None:
        check_matplotlib()
        try:
            options.plot.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"bench: plot must be a folder that can be written to, but got {options.plot}: {error}"
            ) from None
    if options.json is not None:
        try:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.open("a").close()
        except OSError as error:
            raise ValueError(
                f"bench: json must be a file that can be written, but got {options.json}: {error}"
            ) from None
    return [] if options.no_rows else chosen


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"there is no GPU to use: torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "there is no GPU to use: torch finds none on this machine"
    if not _C.build_info()["cuda"]:
        return "this build of torchintro has no CUDA kernels"
    return ""


def _measure(chosen: Sequence[Case], gpu: torch.device | None, options: Options) -> _Measured:
    """Measure all that the options ask for, and print each part as it is done."""
    quick, device = options.quick, gpu or torch.device("cpu")
    everywhere = [case for case in chosen if case.device == "cpu"]
    measured = _Measured({}, [])
    on_cpu = _run_cases(everywhere, torch.device("cpu"), measured, quick=quick, others=not quick and gpu is None)
    if gpu is not None:
        on_gpu = _run_cases(chosen, gpu, measured, quick=quick, others=not quick)
        print("\n".join(versus_lines(on_cpu, on_gpu)))
    for case in chosen:
        if case.device == "cuda" and options.cases and gpu is None:
            print(f"{case.id}: only for --device cuda on a machine with a GPU")
    if gpu is not None and (options.crossover or not (options.cases or options.no_rows)):
        measured.crossovers = run_crossover(gpu, QUICK if quick else FULL, quick=quick)
    if options.grid:
        measured.planes = run_grid(QUICK_GRID if quick else FULL_GRID, device, DTYPES[options.dtype])
    if options.trials:
        measured.curves = run_trials(device, QUICK_PLAN if quick else FULL_PLAN)
    return measured


def _run_cases(
    cases: Sequence[Case], device: torch.device, measured: _Measured, *, quick: bool, others: bool
) -> list[CaseResult]:
    """Measure the limits of a device, then the cases, and print each as it is done."""
    if not cases:
        return []
    effort = QUICK if quick else FULL
    limits = measure_limits(device, replace(effort, seconds=effort.seconds / 4), quick=quick)
    measured.limits[device.type] = limits
    print(f"\n{device.type.upper()} limits: " + "; ".join(limits.lines()))
    print("\n".join(header()), flush=True)
    results = []
    said: set[str] = set()
    for case in cases:
        small = quick_case(case) if quick else case
        result = run_case(small, device, limits, effort, compile=others, jax=others, judge=not quick)
        print("\n".join(case_lines(result, said)), flush=True)
        results.append(result)
        gc.collect()  # the data of a case can hang in a cycle, and the next case needs the memory
    measured.results += results
    return results


def _summary(results: Sequence[CaseResult], quick: bool) -> list[str]:
    failed, short = (
        [f"{result.case.id} ({result.device})" for result in results if result.status == status]
        for status in ("failed", "short of target")
    )
    judged = sum(any(verdict.met is not None for verdict in result.verdicts) for result in results)
    if not results:
        return []
    verified = sum(bool(result.checks) and not result.failures for result in results)  # not what was left out
    lines = [f"{len(results)} rows, {verified} verified against float64"]
    if failed:
        lines.append(f"FAILED: {', '.join(failed)}")
    if quick:
        lines.append("quick: shapes and repeats are scaled down, so no figure means anything and no target is judged")
    else:
        lines.append(f"rows judged by targets: {judged}; short of target: {', '.join(short) or 'none'}")
    return lines
