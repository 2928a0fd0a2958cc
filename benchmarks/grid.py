"""The fused operator against plain PyTorch on a grid of shapes: where it wins, where it does not, and the worst place.

A cell is one step, forward and backward, of both in turn. Their results are compared before any time is taken. A cell
that seems slower than plain PyTorch, or hardly faster after few rounds, is measured again, longer, and the second
measurement counts.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torchintro import functional, reference

from .cases import Case, count
from .machine import free_memory
from .timing import Effort, Measurement, interleaved
from .units import dtype_name, ratio_text, time_text

__all__ = ["DTYPES", "FULL_GRID", "PLANES", "QUICK_GRID", "Cell", "Grid", "Plane", "plan", "run_grid"]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
PLANES = (("linear_weight", "linear_bias"), ("input", "linear_weight", "linear_bias"))
SHORT = {"input": "dX", "linear_weight": "dW", "linear_bias": "db"}

FIRST_LOOK = Effort(block=0.003, seconds=0.25, rounds=(7, 15))
SECOND_LOOK = Effort(block=0.01, seconds=1.0, rounds=(11, 31))
# A step that takes seconds is not disturbed by milliseconds: where it wins clearly, fewer rounds do.
SLOW_SECONDS = 0.5  # of both peers, with what their first calls cost
SLOW_ROUNDS = ((3, 3), (9, 9))
CLEAR_WIN = 1.25
QUICK_LOOK = Effort(block=0.0002, seconds=0.01, rounds=(5, 5))

BLOCK_ELEMENTS = (1 << 20) + 7  # of random numbers, with which larger tensors are filled


@dataclass(frozen=True)
class Grid:
    """What is to be measured.

    Attributes:
        batches: The numbers of rows N.
        features: The numbers of input and of output features, D and O.
        operations: A step of more operations is left out.
        looks: How long to measure each cell, and how long again those that seem slower.
    """

    batches: tuple[int, ...]
    features: tuple[int, ...]
    operations: float
    looks: tuple[Effort, Effort]


FULL_GRID = Grid((1, 16, 256, 4096, 65536, 1_000_000), (1, 4, 16, 64, 256, 1024, 4096), 2e11, (FIRST_LOOK, SECOND_LOOK))
QUICK_GRID = Grid((1, 256), (1, 16, 64), 2e11, (QUICK_LOOK, QUICK_LOOK))


@dataclass(frozen=True)
class Cell:
    """One shape, measured.

    Attributes:
        rows: N.
        in_features: D.
        out_features: O.
        eager: Plain PyTorch's times.
        fused: This package's, of the same rounds.
        again: Whether this is the second measurement.
    """

    rows: int
    in_features: int
    out_features: int
    eager: Measurement
    fused: Measurement
    again: bool = False

    @property
    def ratio(self) -> float:
        """How many times faster the fused peer is, by the medians."""
        return self.eager.median / self.fused.median

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the median of the rounds' ratios."""
        pairs = zip(self.eager.samples, self.fused.samples, strict=True)
        return _median_interval([eager / fused for eager, fused in pairs])

    @property
    def mark(self) -> str:
        """``"!"`` for a cell that is slower than plain PyTorch, ``"~"`` for one that may be, else nothing."""
        if self.ratio >= 1:
            return ""
        return "!" if self.interval[1] < 1 else "~"

    @property
    def text(self) -> str:
        """The cell in a sentence."""
        low, high = self.interval
        return (
            f"N={self.rows}, D={self.in_features}, O={self.out_features}: {ratio_text(self.ratio)}x (eager "
            f"{time_text(self.eager.median)}, fused {time_text(self.fused.median)}; 95 % interval of "
            f"{len(self.eager.samples)} rounds: {ratio_text(low)}x to {ratio_text(high)}x)"
        )


@dataclass
class Plane:
    """All shapes with the same gradients.

    Attributes:
        gradients: The tensors that require a gradient.
        dtype: Of all tensors.
        cells: The measured shapes.
        left_out: ``(N, D, O)`` and the reason for those that are not.
        wrong: Shapes where the peers disagree, in a sentence each.
        seconds: What it all took.
    """

    gradients: tuple[str, ...]
    dtype: torch.dtype
    cells: list[Cell] = field(default_factory=list)
    left_out: dict[tuple[int, int, int], str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """What distinguishes it from other planes."""
        return f"{' '.join(SHORT[name] for name in self.gradients)}, {dtype_name(self.dtype)}"

    @property
    def worst(self) -> Cell | None:
        """The cell with the smallest ratio."""
        return min(self.cells, key=lambda cell: cell.ratio, default=None)

    def table(self, batch: int, grid: Grid) -> list[str]:
        """Return the table of one number of rows."""
        cells = {(cell.in_features, cell.out_features): cell for cell in self.cells if cell.rows == batch}
        lines = ["", f"N = {batch}", " " * 9 + "".join(f"{f'O = {o}':>10}" for o in grid.features)]
        for d in grid.features:
            entries = [
                f"{ratio_text(cells[d, o].ratio) + (cells[d, o].mark or ' '):>10}" if (d, o) in cells else f"{'- ':>10}"
                for o in grid.features
            ]
            lines.append((f"D = {d}".ljust(9) + "".join(entries)).rstrip())
        return lines

    def summary(self) -> list[str]:
        """Return what is to be said after the tables."""
        lines = [f"grid {self.name}: {len(self.cells)} cells in {self.seconds:.0f} s"]
        reasons: dict[str, int] = {}
        for reason in self.left_out.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        lines += [f"left out: {number} cells, {reason}" for reason, number in reasons.items()]
        worst = self.worst
        if worst is not None:
            marks = [cell.mark for cell in self.cells]
            middle = statistics.median(cell.ratio for cell in self.cells)
            lines.append(
                f"slower than eager: {marks.count('!')} cells; below 1 within noise: {marks.count('~')}; measured "
                f"again: {sum(cell.again for cell in self.cells)}; median of all: {ratio_text(middle)}x"
            )
            lines.append(f"worst cell: {worst.text}")
        return lines + [f"WRONG: {sentence}" for sentence in self.wrong]

    def record(self) -> dict[str, Any]:
        """Return the plane for JSON: a list for each cell, with a heading."""
        worst = self.worst
        return {
            "gradients": list(self.gradients),
            "dtype": dtype_name(self.dtype),
            "columns": [
                "rows",
                "in_features",
                "out_features",
                "eager",
                "fused",
                "ratio",
                "low",
                "high",
                "rounds",
                "again",
            ],
            "cells": [
                [
                    *(cell.rows, cell.in_features, cell.out_features, cell.eager.median, cell.fused.median, cell.ratio),
                    *(*cell.interval, len(cell.eager.samples), cell.again),
                ]
                for cell in self.cells
            ],
            "left_out": [[*shape, reason] for shape, reason in self.left_out.items()],
            "wrong": self.wrong,
            "slower": sum(cell.mark == "!" for cell in self.cells),
            "within_noise": sum(cell.mark == "~" for cell in self.cells),
            "worst": None if worst is None else [worst.rows, worst.in_features, worst.out_features, worst.ratio],
            "seconds": self.seconds,
        }


def plan(grid: Grid, gradients: Sequence[str], dtype: torch.dtype, memory: float) -> dict[tuple[int, int, int], str]:
    """Return every shape of the grid and why it is left out, or an empty string.

    Args:
        grid: The shapes.
        gradients: The tensors that require a gradient.
        dtype: Of all tensors.
        memory: Bytes that plain PyTorch's step may take with its data.
    """
    shapes = {}
    for n in grid.batches:
        for d in grid.features:
            for o in grid.features:
                operations = count(Case("", "step", n, d, o, dtype, tuple(gradients))).operations
                # The target, the prediction, its squared errors and its gradient; the input, its gradient; and so on.
                elements = 4 * n * o + (1 + ("input" in gradients)) * n * d + 2 * d * o
                reason = ""
                if elements * dtype.itemsize > memory:
                    reason = f"which would take more than {memory / 2**30:.1f} GiB of memory"
                elif operations > grid.operations:
                    reason = f"of more than {grid.operations:.0e} operations a step"
                shapes[n, d, o] = reason
    return shapes


def run_grid(
    grid: Grid,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    planes: Sequence[tuple[str, ...]] = PLANES,
    show: Callable[[str], object] = print,
) -> list[Plane]:
    """Measure all planes of a grid, and print each table as it is done.

    Args:
        grid: The shapes.
        device: Where.
        dtype: Of all tensors.
        planes: The gradients of each plane.
        show: Prints a line.
    """
    memory = free_memory(device) / 2
    done = []
    for gradients in planes:
        plane = Plane(tuple(gradients), dtype)
        start = time.perf_counter()
        shapes = plan(grid, gradients, dtype, memory)
        plane.left_out = {shape: reason for shape, reason in shapes.items() if reason}
        show(f"\n{device.type.upper()} grid, {plane.name}: eager / fused, forward and backward")
        show("!: slower than eager; ~: below 1, but within noise; -: left out")
        for batch in grid.batches:
            wanted = [shape for shape, reason in shapes.items() if shape[0] == batch and not reason]
            for shape, cell in _cells(wanted, grid, plane, device):
                if isinstance(cell, Cell):
                    plane.cells.append(cell)
                else:
                    plane.left_out[shape] = cell
            for line in plane.table(batch, grid):
                show(line)
        plane.seconds = time.perf_counter() - start
        show("")
        for line in plane.summary():
            show(line)
        done.append(plane)
    return done


def _cells(
    shapes: Sequence[tuple[int, int, int]], grid: Grid, plane: Plane, device: torch.device
) -> Iterator[tuple[tuple[int, int, int], Cell | str]]:
    X = torch.empty(0)
    for n, d, o in shapes:
        if X.shape != (n, d):
            X = torch.empty(0)  # first gone, then made
            X = _random((n, d), plane.dtype, device)
        try:
            steps = _steps(X, o, plane.gradients)
            start = time.perf_counter()
            error = _disagreement(steps, plane.gradients, n)
            slow = time.perf_counter() - start > SLOW_SECONDS
            looks = [
                replace(look, rounds=rounds) if slow else look
                for look, rounds in zip(grid.looks, SLOW_ROUNDS, strict=True)
            ]
            if error:
                plane.wrong.append(f"N={n}, D={d}, O={o}: {error}")
                yield (n, d, o), "where the peers disagree"
                continue
            cell = _measured((n, d, o), steps, looks[0], device)
            if cell.ratio < (CLEAR_WIN if slow else 1):
                cell = replace(_measured((n, d, o), steps, looks[1], device), again=True)
        except torch.OutOfMemoryError:
            yield (n, d, o), "for which the GPU has not enough memory"
        else:
            yield (n, d, o), cell


Step = Callable[[], tuple[Tensor, ...]]


def _steps(X: Tensor, out_features: int, gradients: Sequence[str]) -> dict[str, Step]:
    (n, d), o, dtype, device = X.shape, out_features, X.dtype, X.device
    tensors = {
        "input": X.detach(),
        "linear_weight": _random((o, d), dtype, device) / math.sqrt(d),
        "linear_bias": _random((o,), dtype, device),
        "target": _random((n, o), dtype, device),
    }
    leaves = [tensors[name].requires_grad_() for name in gradients]
    operators: dict[str, Callable[..., Tensor]] = {
        "eager": reference.linear_mse_loss,
        "fused": functional.linear_mse_loss,
    }

    def step(operator: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        for leaf in leaves:
            leaf.grad = None
        loss = operator(
            tensors["input"], tensors["linear_weight"], tensors["target"], linear_bias=tensors["linear_bias"]
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return (loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))

    return {peer: functools.partial(step, operator) for peer, operator in operators.items()}


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return normal random numbers, which repeat in a large tensor: making them would take longer than the rest."""
    total = math.prod(shape)
    block = torch.randn(min(total, BLOCK_ELEMENTS), device=device).to(dtype)
    flat = torch.empty(total, dtype=dtype, device=device)
    for start in range(0, total, BLOCK_ELEMENTS):
        part = flat[start : start + BLOCK_ELEMENTS]
        part.copy_(block[: len(part)])
    return flat.view(shape)


def _disagreement(steps: dict[str, Step], gradients: Sequence[str], rows: int) -> str:
    """Run both peers; return in words where the results differ by more than rounding, or nothing."""
    expected, found = steps["eager"](), steps["fused"]()
    unit = torch.finfo(expected[0].dtype).eps
    # As for a case's other peers: half the digits, or two where the sum is long.
    allowed = math.sqrt(unit) + min(rows * unit, 0.01)
    for name, ours, theirs in zip(("loss", *gradients), found, expected, strict=True):
        difference = float(torch.linalg.vector_norm((ours - theirs).float()) / torch.linalg.vector_norm(theirs.float()))
        if not difference <= allowed:
            return f"{name} is {difference:.2e} from plain PyTorch's, where {allowed:.2e} is allowed"
    return ""


def _measured(shape: tuple[int, int, int], steps: dict[str, Step], effort: Effort, device: torch.device) -> Cell:
    timed = interleaved(steps, effort, device)
    return Cell(*shape, timed["eager"], timed["fused"])


def _median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return the order statistics between which the median lies, whatever the distribution."""
    ordered, n = sorted(values), len(values)
    rank = 1
    while 2 * sum(math.comb(n, i) for i in range(rank + 1)) / 2**n <= 1 - confidence:
        rank += 1
    return ordered[rank - 1], ordered[n - rank]
