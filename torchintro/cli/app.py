"""The commands of ``torchintro``. What each does is in the library; here is how it is asked for and shown."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, ParamSpec, TypeVar

import typer
from rich.console import Console
from torch import Tensor, nn

from .._version import __version__
from ..data import datasets
from ..evaluation import evaluate as measure
from ..evaluation import predict as apply
from ..nn import initial_linear
from ..saving import load_model, save_model
from ..training.baseline import time_plain_loop
from ..training.choice import ENGINES
from ..training.fit import DivergedError, fit
from ..training.optimizers import parse_optimizer
from . import plots
from .bench import bench
from .parse import make_pruner, optimizer_options, search_space
from .problem import (
    BUILT_IN,
    check_before_the_pass,
    check_study_before_the_pass,
    data_of,
    from_memory,
    from_table,
    is_streamed,
    read_data,
    read_streamed,
)
from .report import (
    against_plain,
    cost_of_study,
    duration,
    metrics_table,
    of_passes,
    show_study,
    state_of,
    write_csv,
    write_rows,
    write_trials,
)

if TYPE_CHECKING:
    import optuna

__all__ = ["app"]

P = ParamSpec("P")
R = TypeVar("R")

BAD_INPUT, DIVERGED, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, tune and judge linear regression models with a fused linear layer and mean squared error.",
)
console = Console(highlight=False, markup=False)

Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="synthetic, diabetes, or a file: .csv, .parquet, .npy, or .npz with X and y; or a folder of tables.",
    ),
]
Stream = Annotated[
    Optional[bool],  # noqa: UP045 (typer evaluates it)
    typer.Option(
        "--stream/--no-stream",
        help="Read the file piece by piece, not into memory. Default: folders, and files above 1 GB.",
        show_default=False,
    ),
]
Benchmark = Annotated[bool, typer.Option(help="Time plain PyTorch too, on a few epochs, for about half a second.")]
Target = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--target", help="Target column; repeat it for several. Default: the file's last column."),
]
Feature = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--feature", help="Feature column; repeat it for several. Default: all but the targets."),
]
Epochs = Annotated[int, typer.Option(help="Passes over the training rows.")]
BatchSize = Annotated[Optional[int], typer.Option(help="Rows per step. Default: all.")]  # noqa: UP045
OptimizerName = Annotated[str, typer.Option("--optimizer", help="An optimizer of torch.optim, such as sgd or adam.")]
Momentum = Annotated[float, typer.Option(help="The optimizer's momentum, where it has one.")]
WeightDecay = Annotated[float, typer.Option(help="The optimizer's weight decay, where it has one.")]
OptimizerOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--optimizer-option",
        help="Another argument of the optimizer, such as nesterov=true or betas=0.9,0.99; repeat it for several.",
        metavar="NAME=VALUE",
        show_default=False,
    ),
]
Engine = Annotated[
    str, typer.Option(help=f"One of {', '.join(ENGINES)}: what computes loss and gradients.", metavar="NAME")
]
Seed = Annotated[int, typer.Option(help="Seed of the split, the parameters, the mini-batches and the search.")]
TestFraction = Annotated[float, typer.Option(help="Share of the rows held out for the evaluation; 0 for none.")]
ModelFile = Annotated[Path, typer.Option("--model", help="A model.pt that train or demo wrote.")]
Folder = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", help="Run folder for the files written. Default: a new one in runs/.", show_default=False),
]


def _answering(function: Callable[P, R]) -> Callable[P, R]:
    """Answer what the user can put right with one sentence on stderr and an exit code instead of a traceback."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ArithmeticError as error:
            raise _failure(str(error), DIVERGED) from error
        except (ValueError, TypeError, ImportError) as error:
            raise _failure(str(error), BAD_INPUT) from error
        except BrokenPipeError as error:  # the reader of a pipe has had enough, as `| head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from error
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            raise _failure(f"{error.strerror or error}{where}", BAD_INPUT) from error
        except KeyboardInterrupt as error:
            raise _failure("interrupted", INTERRUPTED) from error

    return wrapped


def _failure(sentence: str, code: int) -> typer.Exit:
    typer.echo(f"torchintro: {' '.join(sentence.split())}", err=True)
    return typer.Exit(code)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"torchintro {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
@_answering
def demo(
    out: Folder = None,
    seed: Seed = 0,
    trials: Annotated[int, typer.Option(help="Learning rates to try.")] = 20,
) -> None:
    """Walk through PyTorch's six steps on the diabetes data, with the fused operator beside plain PyTorch.

    Takes a few seconds and leaves a model and two plots in a run folder.
    """
    from .introduction import run_demo

    run_demo(_folder("demo", out), seed=seed, trials=trials, console=console)


@app.command()
@_answering
def train(
    data: Data = "diabetes",
    target: Target = None,
    feature: Feature = None,
    stream: Stream = None,
    lr: Annotated[float, typer.Option(help="Learning rate, for standardised features.")] = 0.1,
    epochs: Epochs = 100,
    batch_size: BatchSize = None,
    shuffle: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--shuffle/--no-shuffle",
            help="Draw mini-batches from a permutation, or take them in order. Default: shuffle, unless streamed.",
            show_default=False,
        ),
    ] = None,
    optimizer: OptimizerName = "sgd",
    momentum: Momentum = 0.0,
    weight_decay: WeightDecay = 0.0,
    optimizer_option: OptimizerOption = None,
    engine: Engine = "auto",
    seed: Seed = 0,
    test_fraction: TestFraction = 0.2,
    benchmark: Benchmark = True,
    out: Folder = None,
) -> None:
    """Train a linear model on standardised features, judge it on held-out rows and save it.

    Writes model.pt (takes features in their own units), losses.csv and loss.png. A table that is streamed is read once,
    with --batch-size once more in every epoch; its mean absolute error would take another pass and is left out.
    """
    options: dict[str, Any] = {
        "lr": lr,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "optimizer_options": optimizer_options("train", optimizer_option or []) or None,
    }
    folder = _folder("train", out)
    shares = [("--test-fraction", test_fraction)]
    streamed = is_streamed(data, stream)
    if streamed:
        table = read_streamed(data, target, feature)
        check_before_the_pass(table, shuffle=shuffle, engine=engine, **options)
        with _pass_in(folder):
            problem = from_table(
                "train", table, shares, seed, mini_batches=batch_size is not None, progress=True, folder=folder
            )
    else:
        problem = from_memory(read_data(data, target, feature, seed), shares, seed)
    features, targets = len(problem.feature_names), len(problem.target_names)
    linear = initial_linear(features, targets, seed=seed)
    settings = {
        "data": problem.name,
        "rows": problem.rows,
        "test_fraction": test_fraction,
        "seed": seed,
        "streamed": streamed,
        **options,
    }

    def save(**more: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return save_model(
            folder / "model.pt",
            nn.Sequential(problem.standardize, linear),
            metadata={**settings, **more},
            feature_names=problem.feature_names,
            target_names=problem.target_names,
        )

    console.print(str(problem), soft_wrap=True)
    report = _Report(epochs)
    with _made(folder):  # before the work, not after it
        try:
            result = fit(
                linear,
                problem.X,
                problem.y,
                shuffle=shuffle,
                validation=problem.validation,
                engine=engine,
                seed=seed,
                progress=report,
                **options,
            )
        except KeyboardInterrupt as error:
            done = len(report.losses)
            if not done:
                raise _failure("interrupted in the first epochs; nothing was saved", INTERRUPTED) from error
            path = save(engine=report.engine, interrupted=True, epochs=done)
            kept = f"the model after {done} of {epochs} epochs is kept in {path}"
            raise _failure(f"interrupted; {kept}", INTERRUPTED) from error
        except DivergedError as error:
            where = f"the {error.kind} became {error.loss} in epoch {error.epoch} with lr={error.lr:g}"
            raise _failure(
                f"{where}, nothing was saved: lower --lr, or let torchintro tune find one", DIVERGED
            ) from error

    metrics = problem.measure(linear)
    curves = {"training": result.losses.tolist()}
    if result.validation_losses is not None:
        curves["held out"] = result.validation_losses.tolist()
    save(engine=result.engine, seconds=result.seconds, metrics=metrics)
    plots.plot_loss_by_epoch(folder / "loss.png", curves, title=f"{problem.name}, lr = {lr:g}")
    write_csv(folder / "losses.csv", ["epoch", *curves], zip(range(1, epochs + 1), *curves.values(), strict=True))
    console.print(metrics_table(metrics))
    a_epoch = duration(result.seconds / epochs)
    console.print(f"{epochs} epochs took {duration(result.seconds)}, {a_epoch} each, with the engine {result.engine}")
    if benchmark and result.engine != "reference" and problem.pass_seconds is None:
        plain = time_plain_loop(
            initial_linear(features, targets, seed=seed),
            problem.X,
            problem.y if isinstance(problem.y, Tensor) else problem.X,
            validation=problem.validation,
            optimizer=parse_optimizer("fit", optimizer, momentum, weight_decay, options["optimizer_options"]),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            most_epochs=epochs,
        )
        console.print(against_plain(result.seconds, plain.seconds_per_epoch, plain.epochs, epochs), soft_wrap=True)
    elif benchmark and problem.pass_seconds is not None and batch_size is None:
        console.print(of_passes(problem.pass_seconds, epochs, "this run"), soft_wrap=True)
    console.print(f"model.pt, losses.csv and loss.png are in {folder}", soft_wrap=True)


@app.command()
@_answering
def tune(
    data: Data = "diabetes",
    target: Target = None,
    feature: Feature = None,
    stream: Stream = None,
    trials: Annotated[int, typer.Option(help="Finished trials wanted, those of an earlier run included.")] = 20,
    lr_low: Annotated[float, typer.Option(help="Lowest learning rate.")] = 1e-4,
    lr_high: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-1,
    search: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--search",
            help="Search this too: NAME=LOW:HIGH or NAME=a,b,c, with momentum, weight_decay, batch_size or an option "
            "of the optimizer; repeat it for several.",
            metavar="NAME=...",
        ),
    ] = None,
    pruner: Annotated[
        str, typer.Option(help="median or hyperband: what marks trials that are not worth going on with; or none.")
    ] = "none",
    trials_per_batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Trials trained together. Default: what suits the sampler."),
    ] = None,
    epochs: Epochs = 100,
    batch_size: BatchSize = None,
    optimizer: OptimizerName = "sgd",
    momentum: Momentum = 0.0,
    weight_decay: WeightDecay = 0.0,
    optimizer_option: OptimizerOption = None,
    engine: Engine = "auto",
    seed: Seed = 0,
    test_fraction: TestFraction = 0.2,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the remaining rows that judge a trial; 0 to judge by the training loss.")
    ] = 0.2,
    benchmark: Benchmark = True,
    storage: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Optuna storage URL. Default: study.db (SQLite) in the run folder."),
    ] = None,
    study_name: Annotated[str, typer.Option(help="Name of the study in the storage.")] = "torchintro",
    out: Folder = None,
) -> None:
    """Search the learning rate, and with --search more, with Optuna; with the same --out it goes on where it stopped.

    Trials are trained many at a time. Rows held out by --test-fraction stay out of the search. Writes study.db,
    trials.csv and lr.png.
    """
    if lr_low >= lr_high:
        raise ValueError(f"tune: --lr-low must be below --lr-high, but got {lr_low:g} and {lr_high:g}")
    space = search_space(search or [])
    from ..tuning import tune as tuning  # Optuna takes a second to import

    options: dict[str, Any] = {
        "n_trials": trials,
        "epochs": epochs,
        "lr": (lr_low, lr_high),
        "search_space": space or None,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "optimizer_options": optimizer_options("tune", optimizer_option or []) or None,
        "pruner": make_pruner(pruner, epochs),
        "trials_per_batch": trials_per_batch,
        "seed": seed,
        "engine": engine,
    }
    folder = _folder("tune", out)
    shares = [("--test-fraction", test_fraction), ("--validation-fraction", validation_fraction)]
    if is_streamed(data, stream):
        table = read_streamed(data, target, feature)
        mini_batches = batch_size is not None or "batch_size" in space
        check_study_before_the_pass(table, **options)
        with _pass_in(folder):
            problem = from_table(
                "tune", table, shares, seed, "to judge by", mini_batches=mini_batches, progress=True, folder=folder
            )
    else:
        problem = from_memory(read_data(data, target, feature, seed), shares, seed, "to judge by")
    url = storage or f"sqlite:///{urllib.parse.quote(str(folder / 'study.db'))}"
    console.print(str(problem), soft_wrap=True)
    with _made(folder), _trial_counter(trials) as (count, numbers):
        start = time.perf_counter()
        try:
            study = tuning.tune(
                problem.X,
                problem.y,
                validation=problem.validation,
                storage=url,
                study_name=study_name,
                benchmark=benchmark,
                progress=count,
                **options,
            )
        except KeyboardInterrupt as error:
            again = f"the same command with --out {folder} goes on from there"
            raise _failure(f"interrupted; the finished trials are kept in {url}, {again}", INTERRUPTED) from error
        seconds = time.perf_counter() - start
        judged_by = "training loss" if problem.validation is None else "validation loss"
        show_study(console, study, judged_by)
        for sentence in cost_of_study(study, numbers, seconds, epochs, problem.pass_seconds if benchmark else None):
            console.print(sentence, soft_wrap=True)
        complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
        lrs, losses = [trial.params["lr"] for trial in complete], [trial.values[0] for trial in complete]
        plots.plot_loss_by_lr(folder / "lr.png", lrs, losses, title=problem.name, ylabel=judged_by)
        write_trials(folder / "trials.csv", study, judged_by)
    console.print(f"lr.png and trials.csv are in {folder}, the study in {url}", soft_wrap=True)
    if tuning.best_lr(study) is None:
        raise ArithmeticError("tune: every learning rate diverged: lower --lr-low and --lr-high")


@app.command()
@_answering
def evaluate(
    model: ModelFile,
    data: Data = "diabetes",
    stream: Stream = None,
    held_out: Annotated[
        bool, typer.Option("--held-out/--all-rows", help="Only the rows that train or demo held out of this data.")
    ] = False,
) -> None:
    """Judge a saved model: mean squared error, its root, mean absolute error and R2."""
    saved = load_model(model)
    kept = saved.metadata
    # Rows of a table that was streamed were held out by another rule.
    streamed = is_streamed(data, True if held_out and kept.get("streamed") and data not in BUILT_IN else stream)
    if streamed:
        table = read_streamed(data, saved.target_names, saved.feature_names)
        rows, where = table.rows, data
    else:
        dataset = data_of(saved, data)
        rows, where = len(dataset), dataset.name
    if held_out:
        known = rows is None or kept.get("rows") == rows
        same = known and Path(str(kept.get("data"))).name == Path(where).name
        if not same or not kept.get("test_fraction") or bool(kept.get("streamed")) != streamed:
            how = ", streamed" if kept.get("streamed") else ""
            source = f"{kept.get('data')} with {kept.get('rows')} rows{how}, {kept.get('test_fraction')} held out"
            raise ValueError(
                f"evaluate: --held-out needs the data that the model was trained on ({source}), "
                f"but got {where}" + ("" if rows is None else f" with {rows} rows") + (", streamed" * streamed)
            )
        if streamed:
            table = table.split(kept["test_fraction"], seed=kept["seed"])[1]
        else:
            _, dataset = datasets.split(dataset, kept["test_fraction"], seed=kept["seed"])
    name = "held out" if held_out else "all rows"
    counted = table.rows if streamed else len(dataset)
    console.print(f"{model} on {where}" + ("" if counted is None else f", {counted} rows"), soft_wrap=True)
    metrics = measure(saved.model, table, progress=True) if streamed else measure(saved.model, dataset.X, dataset.y)
    console.print(metrics_table({name: metrics}))


@app.command()
@_answering
def predict(
    model: ModelFile,
    data: Data = "diabetes",
    stream: Stream = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="CSV file to write. Default: standard output."),
    ] = None,
) -> None:
    """Predict the targets of rows and write them as CSV.

    The data needs the columns of the model's features; others may be there.
    """
    saved = load_model(model)
    if is_streamed(data, stream):
        from ..data.table import open_table

        pieces = open_table(data, target=(), features=saved.feature_names).pieces()
        predicted: Iterable[Tensor] = (apply(saved.model, X) for X, _ in pieces)
    else:
        predicted = [apply(saved.model, data_of(saved, data, with_targets=False).X)]
    rows = ([format(value, ".9g") for value in row] for part in predicted for row in part.tolist())
    if out is None:
        write_rows(sys.stdout, saved.target_names, rows)
    else:
        write_csv(out, saved.target_names, rows)


app.command()(_answering(bench))


@app.command()
@_answering
def info() -> None:
    """Print what a bug report needs: versions, what is built in, devices and the kernels that will be used."""
    from .info import collect

    report = collect()
    width = max(len(label) for label in report)
    for label, value in report.items():
        typer.echo(f"{label:<{width}}  {value}")


def _folder(command: str, out: Path | None) -> Path:
    folder = out or Path("runs") / f"{command}-{datetime.now():%Y%m%d-%H%M%S}"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out must be a folder, but {folder} is a file")
    return folder


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder; take it away again if nothing was put in it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _pass_in(folder: Path) -> Iterator[None]:
    """Make the folder in which a pass over a table is kept; say on Ctrl-C how to go on from there."""
    with _made(folder):
        try:
            yield
        except KeyboardInterrupt as error:
            kept = f"what was read of the table is kept in {folder}, the same command with --out {folder} goes on"
            raise _failure(f"interrupted; {kept} from there", INTERRUPTED) from error


@contextlib.contextmanager
def _trial_counter(
    trials: int,
) -> Iterator[tuple[Callable[[optuna.Study, optuna.trial.FrozenTrial], None], list[int]]]:
    """Give an Optuna callback that shows a moving count on a terminal, and the numbers of the trials that it saw."""
    numbers: list[int] = []
    with console.status("tuning...") as status:

        def count(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            numbers.append(trial.number)
            known = trial.value is not None and not trial.user_attrs.get("diverged")
            loss = f"loss {trial.value:.6g}" if known else state_of(trial)
            status.update(f"trial {trial.number + 1} of {trials}: lr {trial.params['lr']:.5f}, {loss}")

        yield count, numbers


class _Report:
    """Prints the engine, and the loss every tenth of the run; keeps all losses."""

    def __init__(self, epochs: int) -> None:
        self.epochs, self.engine = epochs, ""
        self.losses: list[float] = []

    def begin(self, engine: str, reason: str) -> None:
        self.engine = engine
        console.print(f"engine {engine}: {reason}", soft_wrap=True)

    def __call__(self, epoch: int, loss: float) -> None:
        self.losses.append(loss)
        if epoch * 10 // self.epochs > (epoch - 1) * 10 // self.epochs:
            console.print(f"Epoch [{epoch}/{self.epochs}], Loss: {loss:.4f}")
