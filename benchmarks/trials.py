"""Time against the number of trials: many learning rates at once beside the plain loop, one training after the other.

A training of the loop is independent of the others, so that many take as many times as long as one: what would take too
long is scaled up and marked. What shares work between the trials is only measured.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchintro.nn import initial_linear

from .peers import fused, loops
from .study import exact_losses
from .timing import DISTURBED, Interruptions, disturbed_text, once
from .units import ratio_text, time_text
from .work import Check, Unavailable, first_line, relative_error

__all__ = ["FULL_PLAN", "LINES", "QUICK_PLAN", "SHAPES", "Curve", "Plan", "Point", "Shape", "measure", "run_trials"]

LR = (1e-4, 1e-1)
LINES = ("loop", "models", "tune")
CHECKED = 3  # trials, before any is timed


@dataclass(frozen=True)
class Shape:
    """The data that is trained on, by full batches in float32.

    Attributes:
        rows: N.
        in_features: D.
    """

    rows: int
    in_features: int

    @property
    def name(self) -> str:
        """The shape in a few characters."""
        return f"{self.rows} x {self.in_features} -> 1"


SHAPES = (Shape(100, 1), Shape(1_000_000, 64))


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        trials: The numbers of trials, growing.
        epochs: Of every trial.
        part: Epochs of the loop that are run where all of a single trial would take too long.
        seconds: Before a point that would take longer by the one before it, a line ends, or the loop is scaled up.
        sample: A point is measured again until this time is spent.
        samples: At most so often.
        rows: At most so many rows.
    """

    trials: tuple[int, ...] = (1, 3, 10, 30, 100, 300, 1000)
    epochs: int = 100
    part: int = 3
    seconds: float = 8.0
    sample: float = 0.5
    samples: int = 5
    rows: int = 1_000_000


FULL_PLAN = Plan()
QUICK_PLAN = Plan(trials=(1, 3), epochs=10, seconds=0.5, sample=0.0, samples=1, rows=1000)


@dataclass(frozen=True)
class Point:
    """The time of so many trials.

    Attributes:
        trials: How many.
        seconds: The median.
        samples: What was measured, in seconds; empty where the time was scaled up.
        part: What was measured instead: ``(trials, epochs)``; None where all of it was.
    """

    trials: int
    seconds: float
    samples: tuple[float, ...] = ()
    part: tuple[int, int] | None = None

    def record(self) -> dict[str, Any]:
        """Return the point for JSON."""
        return {
            "trials": self.trials,
            "seconds": self.seconds,
            "samples": list(self.samples),
            "measured": None if self.part is None else {"trials": self.part[0], "epochs": self.part[1]},
        }


@dataclass
class Curve:
    """What was measured of a shape.

    Attributes:
        shape: Which.
        device: Where.
        epochs: Of every trial.
        lines: The points of each line, by growing numbers of trials.
        engines: The engine that ran a line, where it says so.
        checks: The error of each line's losses.
        skipped: Why lines are missing, or where they end.
        failure: What was wrong, or an empty string.
        interruptions: How often a second another process took a core in the meantime.
    """

    shape: Shape
    device: str
    epochs: int
    lines: dict[str, list[Point]] = field(default_factory=dict)
    engines: dict[str, str] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failure: str = ""
    interruptions: float | None = None

    def record(self) -> dict[str, Any]:
        """Return the curve for JSON."""
        return {
            "rows": self.shape.rows,
            "in_features": self.shape.in_features,
            "out_features": 1,
            "dtype": "float32",
            "device": self.device,
            "epochs": self.epochs,
            "lines": {line: [point.record() for point in points] for line, points in self.lines.items()},
            "engines": self.engines,
            "verification": {line: check.record() for line, check in self.checks.items()},
            "skipped": self.skipped,
            "failure": self.failure,
            "interruptions_per_second": self.interruptions,
        }


class _Trainings:
    """The data of a shape, and the ways to train many learning rates on it; each returns its rates and last losses."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"device": device, "generator": generator}
        self.X = torch.randn(shape.rows, shape.in_features, **options)
        truth = torch.randn(shape.in_features, 1, **options) / math.sqrt(shape.in_features)
        self.y = self.X @ truth + 0.1 * torch.randn(shape.rows, 1, **options)
        self.initial = initial_linear(shape.in_features, 1, seed=0).to(device)
        self.engines: dict[str, str] = {}

    def loop(self, trials: int, epochs: int) -> tuple[Tensor, Tensor]:
        """Train one model after the other, by hand."""
        lrs = loops.learning_rates(*LR, trials)
        losses = []
        for lr in lrs:
            model = initial_linear(self.X.shape[1], 1, seed=0).to(self.X.device)
            losses.append(loops.train(model, self.X, self.y, lr, epochs).item())
        return torch.tensor(lrs, dtype=torch.float64), torch.tensor(losses, dtype=torch.float64)

    def models(self, trials: int, epochs: int) -> tuple[Tensor, Tensor]:
        """Train all models in one call of the engines."""
        lrs = loops.learning_rates(*LR, trials)
        trained = fused.ModelsAtOnce(self.X, self.y, self.initial, epochs=epochs, batch_size=None)(lrs)
        self.engines["models"] = trained.engine
        return torch.tensor(lrs, dtype=torch.float64), trained.losses[-1]

    def tune(self, trials: int, epochs: int) -> tuple[Tensor, Tensor]:
        """Let Optuna choose the learning rates."""
        study = fused.tuned(self.X, self.y, trials=trials, epochs=epochs, lr=LR)
        found = torch.tensor([(trial.params["lr"], trial.value) for trial in study.trials], dtype=torch.float64)
        self.engines["tune"] = str(study.trials[-1].user_attrs.get("engine", ""))
        lrs, losses = found.unbind(1)
        return lrs, losses

    def check(self, lrs: Tensor, losses: Tensor, epochs: int) -> Check:
        """Return the error of the losses, and how large it may be: half the digits."""
        exact = exact_losses(self.X.double(), self.y.double(), self.initial.double(), lrs, epochs)
        self.initial.float()
        return Check(relative_error(losses, exact), math.sqrt(torch.finfo(torch.float32).eps))


Run = Callable[[int, int], tuple[Tensor, Tensor]]


def measure(shape: Shape, device: torch.device, plan: Plan, *, clock: Callable[[], float] = time.perf_counter) -> Curve:
    """Verify all lines of a shape, then measure them.

    Args:
        shape: The data.
        device: Where.
        plan: How much.
        clock: What tells the time, to decide how much is run.
    """
    curve = Curve(shape, device.type, plan.epochs)
    data = _Trainings(shape, device)
    interruptions = Interruptions()
    ways: Mapping[str, Run] = {"loop": data.loop, "models": data.models, "tune": data.tune}
    for line, run in ways.items():
        try:
            start = clock()
            epochs = plan.part if line == "loop" else plan.epochs
            lrs, losses = run(CHECKED, epochs)
            a_trial = (clock() - start) / CHECKED  # too long by what is loaded on first use, but of the right size
            curve.checks[line] = check = data.check(lrs, losses, epochs)
            if not check.passed:
                curve.failure = (
                    f"{line} computes losses with an error of {check.error:.2e}, {check.allowed:.2e} is allowed"
                )
                continue
            if line == "loop":
                curve.lines[line] = _measure_loop(run, a_trial, device, plan)
            else:
                points, ended = _measure_line(run, device, plan)
                curve.lines[line] = points
                if ended:
                    curve.skipped[line] = ended
        except Unavailable as error:
            curve.skipped[line] = str(error)
        except Exception as error:  # what was measured before is still worth having
            curve.failure = f"{line}: {type(error).__name__}: {first_line(error)}"
    curve.engines = dict(data.engines)
    curve.interruptions = interruptions.per_second()
    return curve


def _samples(call: Callable[[], object], device: torch.device, plan: Plan) -> tuple[float, ...]:
    samples: list[float] = []
    while not samples or (len(samples) < plan.samples and sum(samples) < plan.sample):
        samples.append(once(call, device).median)
    return tuple(samples)


def _point(run: Run, trials: int, device: torch.device, plan: Plan) -> Point:
    samples = _samples(functools.partial(run, trials, plan.epochs), device, plan)
    return Point(trials, statistics.median(samples), samples)


def _measure_loop(run: Run, seconds_of_part: float, device: torch.device, plan: Plan) -> list[Point]:
    """Measure the loop as far as it does not take too long, and scale the rest up from the last that was measured."""
    points: list[Point] = []
    part, seconds = (1, plan.part), 0.0
    if seconds_of_part / plan.part * plan.epochs > plan.seconds:  # even a single trial takes too long
        seconds = statistics.median(_samples(lambda: run(1, plan.part), device, plan)) / plan.part * plan.epochs
    for trials in plan.trials:
        if seconds and trials / part[0] * seconds > plan.seconds:
            points.append(Point(trials, trials / part[0] * seconds, part=part))
            continue
        points.append(_point(run, trials, device, plan))
        part, seconds = (trials, plan.epochs), points[-1].seconds
    return points


def _measure_line(run: Run, device: torch.device, plan: Plan) -> tuple[list[Point], str]:
    """Measure until the next number of trials could take too long; return the points and why there are no more."""
    points: list[Point] = []
    for trials in plan.trials:
        if points and points[-1].seconds * trials / points[-1].trials > plan.seconds:
            return points, f"not measured from {trials} trials on, which would take too long"
        points.append(_point(run, trials, device, plan))
    return points, ""


def run_trials(device: torch.device, plan: Plan, shapes: Sequence[Shape] = SHAPES) -> list[Curve]:
    """Measure all shapes and print each as it is done.

    Args:
        device: Where.
        plan: How much.
        shapes: Which data.
    """
    print("\n" + "\n".join(_head(plan)), flush=True)
    curves = []
    for shape in shapes:
        curves.append(measure(Shape(min(shape.rows, plan.rows), shape.in_features), device, plan))
        print("\n".join(lines(curves[-1])), flush=True)
    return curves


def _head(plan: Plan) -> list[str]:
    return [
        f"time against trials, {plan.epochs} epochs each, full batch; loop: plain PyTorch, one after the other;",
        "models: all learning rates in one call; tune: a study of as many trials; x: the loop / that;",
        "*: not run in full, but scaled up",
        "",
        f"{'data':<18}  {'trials':>6}  {'loop':>12}   {'models':>12}  {'x':>8}  {'tune':>12}  {'x':>8}",
    ]


def lines(curve: Curve) -> list[str]:
    """Return the lines of a shape: one for each number of trials, then what is to be said besides."""
    text, name = [], curve.shape.name
    found = {line: {point.trials: point for point in points} for line, points in curve.lines.items()}
    for trials in sorted({trials for points in found.values() for trials in points}):
        loop = found.get("loop", {}).get(trials)
        cells = [f"{time_text(loop.seconds):>12}{'*' if loop.part else ' '}" if loop else f"{'-':>12} "]
        for line in LINES[1:]:
            point = found.get(line, {}).get(trials)
            cells.append(f"{time_text(point.seconds) if point else '-':>12}")
            cells.append(f"{ratio_text(loop.seconds / point.seconds) + 'x' if loop and point else '-':>8}")
        text.append(f"{name:<18}  {trials:>6}  {'  '.join(cells)}")
        name = ""
    scaled = [point for point in curve.lines.get("loop", []) if point.part]
    if scaled:
        trials, epochs = scaled[0].part or (0, 0)
        text.append(f"{name:<18}  *: scaled up from {trials} trial{'s' * (trials > 1)} x {epochs} epochs")
    text += [f"{'':<18}  {line} ran {engine!r}" for line, engine in curve.engines.items() if engine]
    text += [f"{'':<18}  {line}: {reason}" for line, reason in curve.skipped.items()]
    if curve.interruptions is not None and curve.interruptions > DISTURBED:
        text.append(f"{'':<18}  {disturbed_text(curve.interruptions)}")
    if curve.failure:
        text.append(f"{'':<18}  FAILED: {curve.failure}")
    return text
