"""``torchintro train``: fit a model, judge it and save it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from ..data.table import Table
from ..nn import initial_linear
from ..saving import save_model
from ..training.baseline import time_plain_loop
from ..training.fit import DivergedError, FitResult, fit
from ..training.optimizers import parse_optimizer
from ..training.options import TrainingOptions
from ..training.row_kinds import MemoryRows
from . import options, plots
from .parse import optimizer_options
from .problem import Problem, make_problem, open_rows
from .report import EpochReport, against_plain, duration, metrics_table, of_passes, write_csv
from .shell import console, interruption, made, run_folder


def train(  # noqa: PLR0913 (the options of a command)
    data: options.Data = "diabetes",
    target: options.Target = None,
    feature: options.Feature = None,
    stream: options.Stream = None,
    lr: Annotated[float, typer.Option(help="Learning rate, for standardised features.")] = 0.1,
    epochs: options.Epochs = 100,
    batch_size: options.BatchSize = None,
    shuffle: Annotated[
        bool | None,
        typer.Option(
            "--shuffle/--no-shuffle",
            help="Draw mini-batches from a permutation, or take them in order. Default: shuffle, unless streamed.",
            show_default=False,
        ),
    ] = None,
    optimizer: options.OptimizerName = "sgd",
    momentum: options.Momentum = 0.0,
    weight_decay: options.WeightDecay = 0.0,
    optimizer_option: options.OptimizerOption = None,
    engine: options.Engine = "auto",
    seed: options.Seed = 0,
    test_fraction: options.TestFraction = 0.2,
    benchmark: options.Benchmark = True,
    out: options.Folder = None,
) -> None:
    """Train a linear model on standardised features, judge it on held-out rows and save it.

    Writes model.pt (takes features in their own units), losses.csv and loss.png. A table that is streamed is read once,
    with --batch-size once more in every epoch; its mean absolute error would take another pass and is left out.
    """
    chosen = {
        "lr": lr,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "optimizer_options": optimizer_options("train", optimizer_option),
    }
    arguments = {**chosen, "shuffle": shuffle, "engine": engine, "seed": seed}
    folder = run_folder("train", out)
    problem = make_problem(
        "train",
        open_rows(data, target or None, feature or None, stream=stream, seed=seed),
        {"--test-fraction": test_fraction},
        seed,
        mini_batches=batch_size is not None,
        folder=folder,
        check=lambda table: _check(table, arguments),
    )
    linear = initial_linear(len(problem.feature_names), len(problem.target_names), seed=seed)
    settings = {"data": problem.name, "rows": problem.rows, "test_fraction": test_fraction, "seed": seed, **chosen}

    def save(**more: Any) -> Path:
        return save_model(
            folder / "model.pt",
            nn.Sequential(problem.standardize, linear),
            metadata={**settings, **more},
            feature_names=problem.feature_names,
            target_names=problem.target_names,
        )

    console.print(str(problem), soft_wrap=True)
    with made(folder):
        result = _fitted(linear, problem, arguments, save)
        metrics = problem.measure(linear)
        save(engine=result.engine, seconds=result.seconds, metrics=metrics)
        curves = {"training": result.losses.tolist()}
        if result.validation_losses is not None:
            curves["held out"] = result.validation_losses.tolist()
        plots.plot_loss_by_epoch(folder / "loss.png", curves, title=f"{problem.name}, lr = {lr:g}")
        write_csv(folder / "losses.csv", ["epoch", *curves], zip(range(1, epochs + 1), *curves.values(), strict=True))
    console.print(metrics_table(metrics))
    took = f"{duration(result.seconds)}, {duration(result.seconds / epochs)} each"
    console.print(f"{epochs} epochs took {took}, with the engine {result.engine}")
    if benchmark and (sentence := _plain_cost(problem, result, arguments)):
        console.print(sentence, soft_wrap=True)
    console.print(f"model.pt, losses.csv and loss.png are in {folder}", soft_wrap=True)


class _FirstEpochError(Exception):
    """``fit`` has nothing to object to, and would begin."""


class _Stop:
    """Ends a run of ``fit`` before it reads any rows."""

    def begin(self, engine: str, reason: str) -> None:
        raise _FirstEpochError

    def __call__(self, epoch: int, loss: float) -> None:
        """Hear of no epoch."""


def _check(table: Table, arguments: dict[str, Any]) -> None:
    """Raise the error of what ``fit`` would refuse, before a pass that may take hours and not after it."""
    linear = initial_linear(table.in_features, table.out_features, seed=0, dtype=table.dtype)
    with contextlib.suppress(_FirstEpochError):
        fit(linear, table, **arguments, progress=_Stop())


def _fitted(linear: nn.Linear, problem: Problem, arguments: dict[str, Any], save: Callable[..., Path]) -> FitResult:
    """Train the layer; on Ctrl-C save what it has become."""
    report = EpochReport(console, arguments["epochs"])

    def kept() -> str:
        if not report.done:
            return " in the first epochs; nothing was saved"
        path = save(engine=report.engine, interrupted=True, epochs=report.done)
        return f"; the model after {report.done} of {report.epochs} epochs is kept in {path}"

    with interruption(kept):
        try:
            return fit(linear, problem.X, problem.y, validation=problem.validation, progress=report, **arguments)
        except DivergedError as error:
            where = f"the {error.kind} became {error.loss} in epoch {error.epoch} with lr={error.lr:g}"
            raise ArithmeticError(f"{where}, nothing was saved: lower --lr, or let torchintro tune find one") from error


def _plain_cost(problem: Problem, result: FitResult, arguments: dict[str, Any]) -> str | None:
    """Say what the run would have taken in plain PyTorch, where that can be told."""
    epochs, batch_size = arguments["epochs"], arguments["batch_size"]
    if problem.pass_seconds is not None:
        return None if batch_size is not None else of_passes(problem.pass_seconds, epochs, "this run")
    if problem.y is None or result.engine == "reference":
        return None
    rows = MemoryRows(problem.X, problem.y, problem.validation)
    shared = TrainingOptions(**{name: arguments[name] for name in ("epochs", "batch_size", "shuffle", "seed")})
    linear = initial_linear(len(problem.feature_names), len(problem.target_names), seed=arguments["seed"])
    named = (arguments[name] for name in ("optimizer", "momentum", "weight_decay", "optimizer_options"))
    plain = time_plain_loop(rows, shared, linear, parse_optimizer("fit", *named), most_epochs=epochs)
    return against_plain(result.seconds, plain.seconds_per_epoch, plain.epochs, epochs)
