"""``torchintro tune``: search the learning rate and more, in a study that can be gone on with."""

from __future__ import annotations

import contextlib
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ..data.table import Table
from ..statistics import LinearStatistics
from . import options, plots
from .parse import make_pruner, optimizer_options, search_space
from .problem import make_problem, open_rows
from .report import cost_of_study, show_study, state_of, write_trials
from .shell import console, interruption, made, notices, run_folder

if TYPE_CHECKING:
    import optuna


def tune(  # noqa: PLR0913 (the options of a command)
    data: options.Data = "diabetes",
    target: options.Target = None,
    feature: options.Feature = None,
    stream: options.Stream = None,
    trials: Annotated[int, typer.Option(help="Finished trials wanted, those of an earlier run included.")] = 20,
    lr_low: Annotated[float, typer.Option(help="Lowest learning rate.")] = 1e-4,
    lr_high: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-1,
    search: Annotated[
        list[str] | None,
        typer.Option(
            help="Search this too: NAME=LOW:HIGH or NAME=a,b,c, with momentum, weight_decay, batch_size or an option "
            "of the optimizer; repeat it for several.",
            metavar="NAME=...",
        ),
    ] = None,
    pruner: Annotated[
        str, typer.Option(help="median or hyperband: what marks trials that are not worth going on with; or none.")
    ] = "none",
    trials_per_batch: Annotated[
        int | None, typer.Option(help="Trials trained together. Default: what suits the sampler.")
    ] = None,
    epochs: options.Epochs = 100,
    batch_size: options.BatchSize = None,
    optimizer: options.OptimizerName = "sgd",
    momentum: options.Momentum = 0.0,
    weight_decay: options.WeightDecay = 0.0,
    optimizer_option: options.OptimizerOption = None,
    engine: options.Engine = "auto",
    seed: options.Seed = 0,
    test_fraction: options.TestFraction = 0.2,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the remaining rows that judge a trial; 0 to judge by the training loss.")
    ] = 0.2,
    benchmark: options.Benchmark = True,
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage: a URL or a journal. Default: study.journal in the run folder.")
    ] = None,
    study_name: Annotated[str, typer.Option(help="Name of the study in the storage.")] = "torchintro",
    out: options.Folder = None,
) -> None:
    """Search the learning rate, and with --search more, with Optuna; with the same --out it goes on where it stopped.

    Trials are trained many at a time. Rows held out by --test-fraction stay out of the search. Writes
    study.journal, trials.csv and lr.png.
    """
    if lr_low >= lr_high:
        raise ValueError(f"tune: --lr-low must be below --lr-high, but got {lr_low:g} and {lr_high:g}")
    space = search_space(search or [])
    from ..tuning import tune as tuning  # Optuna takes a second to import

    arguments: dict[str, Any] = {
        "n_trials": trials,
        "lr": (lr_low, lr_high),
        "search_space": space or None,
        "pruner": make_pruner(pruner, epochs),
        "trials_per_batch": trials_per_batch,
        "seed": seed,
        "engine": engine,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "optimizer_options": optimizer_options("tune", optimizer_option),
    }
    folder = run_folder("tune", out)
    problem = make_problem(
        "tune",
        open_rows(data, target or None, feature or None, stream=stream, seed=seed),
        {"--test-fraction": test_fraction, "--validation-fraction": validation_fraction},
        seed,
        purpose="to judge by",
        mini_batches=batch_size is not None or "batch_size" in space,
        folder=folder,
        check=lambda table: _check(table, arguments),
    )
    database = folder / "study.db"  # which an earlier version began
    url = f"sqlite:///{urllib.parse.quote(str(database))}"
    where = storage or (url if database.exists() else str(folder / "study.journal"))
    kept = f"; the finished trials are kept in {where}, the same command with --out {folder} goes on from there"
    console.print(str(problem), soft_wrap=True)
    with made(folder):
        start = time.perf_counter()
        with interruption(lambda: kept), _trial_counter(trials) as (count, numbers):
            study = tuning.tune(
                problem.X,
                problem.y,
                validation=problem.validation,
                storage=where,
                study_name=study_name,
                benchmark=benchmark,
                progress=count,
                **arguments,
            )
        seconds = time.perf_counter() - start
        judged_by = "training loss" if problem.validation is None else "validation loss"
        show_study(console, study, judged_by)
        for sentence in cost_of_study(study, numbers, seconds, epochs, problem.pass_seconds if benchmark else None):
            console.print(sentence, soft_wrap=True)
        complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
        lrs, losses = [trial.params["lr"] for trial in complete], [trial.values[0] for trial in complete]
        plots.plot_loss_by_lr(folder / "lr.png", lrs, losses, title=problem.name, ylabel=judged_by)
        write_trials(folder / "trials.csv", study, judged_by)
    console.print(f"lr.png and trials.csv are in {folder}, the study in {where}", soft_wrap=True)
    if tuning.best_lr(study) is None:
        raise ArithmeticError("tune: every learning rate diverged: lower --lr-low and --lr-high")


def _check(table: Table, arguments: dict[str, Any]) -> None:
    """Raise the error of what ``tune`` would refuse, before a pass that may take hours: by a study of one trial."""
    from ..tuning.tune import tune

    sizes = (table.in_features, table.out_features)
    batch_size, space = arguments["batch_size"], arguments["search_space"] or {}
    once = arguments | {"n_trials": min(arguments["n_trials"], 1), "epochs": min(arguments["epochs"], 1)}
    if isinstance(batch_size, int) and batch_size > 1:
        once["batch_size"] = 1
    X, y = (torch.zeros(2, size, dtype=table.dtype) for size in sizes)
    if batch_size is None and "batch_size" not in space:
        tune(LinearStatistics(*sizes).update(X, y), **once)
    else:
        tune(X, y, **once)


@contextlib.contextmanager
def _trial_counter(trials: int) -> Iterator[tuple[Callable[[optuna.Study, optuna.trial.FrozenTrial], None], list[int]]]:
    """Give an Optuna callback that shows a moving count on a terminal, and the numbers of the trials that it saw."""
    numbers: list[int] = []
    with notices.status("tuning...") as status:

        def count(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            numbers.append(trial.number)
            known = trial.value is not None and not trial.user_attrs.get("diverged")
            loss = f"loss {trial.value:.6g}" if known else state_of(trial)
            status.update(f"trial {trial.number + 1} of {trials}: lr {trial.params['lr']:.5f}, {loss}")

        yield count, numbers
