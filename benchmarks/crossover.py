"""From how many rows on a GPU is worth it: the fused step on the CPU and on the GPU, over growing numbers of rows.

On the GPU a step is timed twice: with its data there already, and with input and target brought from ordinary,
pageable memory first. Times are those of the host's clock around a loop, so that the launches count, as they do for a
user.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torchintro import functional
from torchintro.nn import initial_linear

from .machine import free_memory
from .timing import Call, Effort, interleaved
from .units import ratio_text, time_text
from .work import first_line

__all__ = ["SERIES", "WAYS", "Crossover", "Series", "lines", "measure", "run_crossover", "wins_from", "wins_text"]

GROWTH = 4
MOST_ROWS = 1 << 20
SERIES_SECONDS = 60.0
MOST_MEMORY = 0.4  # of what is free

WAYS = ("CPU", "GPU", "GPU with transfer")


@dataclass(frozen=True)
class Series:
    """Steps of one shape over growing numbers of rows.

    Attributes:
        in_features: D.
        out_features: O.
    """

    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        """The shape of a step, without its rows."""
        return f"{self.in_features} -> {self.out_features}"


SERIES = (Series(64, 1), Series(1024, 1), Series(1024, 1024))


@dataclass
class Crossover:
    """What was measured of a series.

    Attributes:
        series: Which.
        seconds: For each way, the median of a step by the number of rows, in growing order.
        ended: Where and why it stopped early, or an empty string.
    """

    series: Series
    seconds: dict[str, dict[int, float]] = field(default_factory=lambda: {way: {} for way in WAYS})
    ended: str = ""
    failure: str = ""  # an error that ended it

    def wins_from(self, way: str) -> int | None:
        """Return the smallest measured number of rows from which on a way of the GPU beats the CPU."""
        return wins_from(self.seconds["CPU"], self.seconds[way])

    def sentence(self, way: str) -> str:
        """Say from where on a way of the GPU beats the CPU."""
        return wins_text(self.wins_from(way), max(self.seconds[way], default=0))

    def record(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {
            "in_features": self.series.in_features,
            "out_features": self.series.out_features,
            "dtype": "float32",
            "rows": list(self.seconds["CPU"]),
            "seconds": {way: list(times.values()) for way, times in self.seconds.items()},
            "wins_from": {way: self.wins_from(way) for way in WAYS[1:]},
            "ended": self.ended,
            "failure": self.failure,
        }


def wins_from(slow: Mapping[int, float], fast: Mapping[int, float]) -> int | None:
    """Return the smallest number of rows from which on, as far as was measured, one time is below the other.

    Args:
        slow: Seconds by the number of rows, of what is to be beaten.
        fast: Seconds by the number of rows, of what is to beat it.

    Returns:
        The number, or None if the largest number of rows that both have is not won.
    """
    first = None
    for rows in sorted(slow.keys() & fast.keys(), reverse=True):
        if fast[rows] >= slow[rows]:
            break
        first = rows
    return first


def wins_text(rows: int | None, most: int) -> str:
    """Say from which number of rows on something wins, of up to ``most`` that were measured."""
    if rows is not None:
        return f"from N = {rows} on"
    return f"never up to N = {most}" if most else "not measured"


def _calls(series: Series, rows: int, device: torch.device) -> Mapping[str, Call]:
    """Make the data and the three ways of one step; the data of the host serves both sides."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, series.in_features, generator=generator)
    y = torch.randn(rows, series.out_features, generator=generator)

    def step(side: torch.device, data: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        model = initial_linear(series.in_features, series.out_features, seed=0).to(side)

        def call() -> dict[str, Tensor]:
            model.zero_grad(set_to_none=True)
            input, target = data()
            loss = functional.linear_mse_loss(input, model.weight, target, linear_bias=model.bias)
            loss.backward()  # type: ignore[no-untyped-call]
            assert model.weight.grad is not None
            return {"loss": loss.detach(), "linear_weight": model.weight.grad}

        return call

    there = (X.to(device), y.to(device))
    calls = {
        "CPU": step(torch.device("cpu"), lambda: (X, y)),
        "GPU": step(device, lambda: there),
        "GPU with transfer": step(device, lambda: (X.to(device, copy=True), y.to(device, copy=True))),
    }
    expected = {name: result.double() for name, result in calls["CPU"]().items()}
    for way in WAYS[1:]:
        for name, result in calls[way]().items():
            difference = torch.linalg.vector_norm(result.cpu().double() - expected[name])
            if not difference <= 1e-3 * torch.linalg.vector_norm(expected[name]):
                raise RuntimeError(f"the {name} of {way} is not that of the CPU")
    return calls


def _too_large(series: Series, rows: int, device: torch.device) -> bool:
    """Say whether the data, once on the host and twice on the device, is more than should be taken of the memory."""
    size = 4 * rows * (series.in_features + series.out_features)
    return size > MOST_MEMORY * free_memory(torch.device("cpu")) or 2 * size > MOST_MEMORY * free_memory(device)


def measure(
    series: Series,
    device: torch.device,
    effort: Effort,
    *,
    most_rows: int = MOST_ROWS,
    seconds: float = SERIES_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Crossover:
    """Measure a series from one row on, until a number of rows, a time, or the memory is reached.

    Args:
        series: The shape.
        device: The GPU, or the CPU in its place, to try the loop.
        effort: How long to measure each number of rows.
        most_rows: The largest number.
        seconds: For the whole series, as far as it can be foreseen.
        clock: What tells the time.
    """
    result = Crossover(series)
    start = before = clock()
    rows = 1
    while rows <= most_rows:
        now = clock()
        # So many times the rows may take as many times as long as the last did.
        if rows > 1 and now - start + GROWTH * (now - before) > seconds:
            result.ended = f"before N = {rows}, which would take too long"
            break
        if _too_large(series, rows, device):
            result.ended = f"before N = {rows}, for want of memory"
            break
        before = now
        # Each sample ends with waiting for the GPU, so that it is idle when the CPU's turn comes.
        try:
            timed = interleaved(_calls(series, rows, device), effort, device, cold=False)
        except torch.OutOfMemoryError:
            result.ended = f"before N = {rows}, for want of memory"
            break
        except Exception as error:  # what was measured before is still worth having
            result.failure = f"N = {rows}: {type(error).__name__}: {first_line(error)}"
            break
        for way in WAYS:
            result.seconds[way][rows] = timed[way].median
        rows *= GROWTH
    return result


def run_crossover(
    device: torch.device, effort: Effort, *, quick: bool = False, series: Sequence[Series] = SERIES
) -> list[Crossover]:
    """Measure all series and print each as it is done.

    Args:
        device: The GPU.
        effort: How long to measure a series of samples.
        quick: A few numbers of rows only.
        series: Which.
    """
    print("\n" + "\n".join(_head()), flush=True)
    each = replace(effort, seconds=effort.seconds / 6, rounds=(3, effort.rounds[1]))
    run = functools.partial(measure, device=device, effort=each, most_rows=64 if quick else MOST_ROWS)
    results = []
    for one in series:
        results.append(run(one))
        print("\n".join(lines(results[-1])), flush=True)
    return results


def _head() -> list[str]:
    return [
        "CPU and GPU, fused step, float32, over the number of rows N; times of the host's clock, launches included;",
        "with transfer: input and target from pageable host memory every time",
        "",
        f"{'shape':<14}  {'N':>9}  {'CPU':>12}  {'GPU':>12}  {'CPU / GPU':>10}  {'with transfer':>13}  "
        f"{'CPU / that':>10}",
    ]


def lines(result: Crossover) -> list[str]:
    """Return the lines of a series: one for each number of rows, and from where on the GPU wins."""
    name = result.series.name
    text = []
    for rows, cpu in result.seconds["CPU"].items():
        gpu, moved = (result.seconds[way][rows] for way in WAYS[1:])
        text.append(
            f"{name:<14}  {rows:>9}  {time_text(cpu):>12}  {time_text(gpu):>12}  {ratio_text(cpu / gpu) + 'x':>10}  "
            f"{time_text(moved):>13}  {ratio_text(cpu / moved) + 'x':>10}"
        )
        name = ""
    ended = f"; it ended {result.ended}" if result.ended else ""
    if result.failure:
        text.append(f"{name:<14}  FAILED: {result.failure}")
    there, moved_there = (result.sentence(way) for way in WAYS[1:])
    text.append(f"{'':<14}  the GPU wins: {there}; with the transfer: {moved_there}{ended}")
    return text
