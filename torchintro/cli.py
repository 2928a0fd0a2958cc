"""The commands of ``torchintro``. What each does is in the library; here is how it is asked for and shown."""

from __future__ import annotations

import contextlib
import csv
import functools
import os
import statistics
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from . import data as datasets
from . import plots
from ._version import __version__
from .artifacts import SavedModel, load_model, save_model
from .evaluation import evaluate as measure
from .evaluation import predict as apply
from .training import ENGINES, DivergedError, fit, initial_linear

if TYPE_CHECKING:
    import optuna

__all__ = ["app"]

P = ParamSpec("P")
R = TypeVar("R")

BUILT_IN = ("synthetic", "diabetes")
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
    str, typer.Option("--data", help="synthetic, diabetes, or a file: .csv, .parquet, .npy, or .npz with X and y.")
]
Target = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer evaluates it)
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
    from .demo import run_demo

    run_demo(_folder("demo", out), seed=seed, trials=trials, console=console)


@app.command()
@_answering
def train(
    data: Data = "diabetes",
    target: Target = None,
    feature: Feature = None,
    lr: Annotated[float, typer.Option(help="Learning rate, for standardised features.")] = 0.1,
    epochs: Epochs = 100,
    batch_size: BatchSize = None,
    optimizer: OptimizerName = "sgd",
    momentum: Momentum = 0.0,
    weight_decay: WeightDecay = 0.0,
    engine: Engine = "auto",
    seed: Seed = 0,
    test_fraction: TestFraction = 0.2,
    out: Folder = None,
) -> None:
    """Train a linear model on standardised features, judge it on held-out rows and save it.

    Writes model.pt (takes features in their own units), losses.csv and loss.png.
    """
    dataset = _dataset(data, target, feature, seed)
    train_part, test_part = _split(dataset, test_fraction, seed)
    standardize = datasets.Standardize.fit(train_part.X)
    linear = initial_linear(train_part.X.shape[1], train_part.y.shape[1], seed=seed)
    losses: list[float] = []

    def report(epoch: int, loss: float) -> None:
        losses.append(loss)
        if epoch * 10 // epochs > (epoch - 1) * 10 // epochs:
            console.print(f"Epoch [{epoch}/{epochs}], Loss: {loss:.4f}")

    folder = _folder("train", out)
    settings = {
        "data": dataset.name,
        "rows": len(dataset),
        "test_fraction": test_fraction,
        "seed": seed,
        "lr": lr,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "momentum": momentum,
        "weight_decay": weight_decay,
    }
    model = nn.Sequential(standardize, linear)

    def save(**more: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {**settings, **more}
        names = {"feature_names": dataset.feature_names, "target_names": dataset.target_names}
        return save_model(folder / "model.pt", model, metadata=metadata, **names)

    console.print(_describe(dataset, train_part, test_part))
    with _made(folder):  # before the work, not after it
        try:
            result = fit(
                linear,
                standardize(train_part.X),
                train_part.y,
                lr=lr,
                epochs=epochs,
                batch_size=batch_size,
                optimizer=optimizer,
                momentum=momentum,
                weight_decay=weight_decay,
                validation=None if test_part is None else (standardize(test_part.X), test_part.y),
                engine=engine,
                seed=seed,
                progress=report,
            )
        except KeyboardInterrupt as error:
            if not losses:
                raise _failure("interrupted in the first epoch; nothing was saved", INTERRUPTED) from error
            path = save(engine=engine, interrupted=True, epochs=len(losses))
            kept = f"the model after {len(losses)} of {epochs} epochs is kept in {path}"
            raise _failure(f"interrupted; {kept}", INTERRUPTED) from error
        except DivergedError as error:
            where = f"the {error.kind} became {error.loss} in epoch {error.epoch} with lr={error.lr:g}"
            raise _failure(
                f"{where}, nothing was saved: lower --lr, or let torchintro tune find one", DIVERGED
            ) from error

    parts = {"training": train_part} if test_part is None else {"training": train_part, "held out": test_part}
    metrics = {name: measure(model, part.X, part.y) for name, part in parts.items()}
    curves = {"training": result.losses.tolist()}
    if result.validation_losses is not None:
        curves["held out"] = result.validation_losses.tolist()
    save(engine=result.engine, seconds=result.seconds, metrics=metrics)
    plots.plot_loss_by_epoch(folder / "loss.png", curves, title=f"{dataset.name}, lr = {lr:g}")
    _write_csv(folder / "losses.csv", ["epoch", *curves], zip(range(1, epochs + 1), *curves.values(), strict=True))
    console.print(_metrics_table(metrics))
    console.print(f"{result.seconds / epochs * 1e6:.0f} us per epoch with the engine {result.engine}")
    console.print(f"model.pt, losses.csv and loss.png are in {folder}", soft_wrap=True)


@app.command()
@_answering
def tune(
    data: Data = "diabetes",
    target: Target = None,
    feature: Feature = None,
    trials: Annotated[int, typer.Option(help="Finished trials wanted, those of an earlier run included.")] = 20,
    lr_low: Annotated[float, typer.Option(help="Lowest learning rate.")] = 1e-4,
    lr_high: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-1,
    epochs: Epochs = 100,
    batch_size: BatchSize = None,
    optimizer: OptimizerName = "sgd",
    momentum: Momentum = 0.0,
    weight_decay: WeightDecay = 0.0,
    engine: Engine = "auto",
    seed: Seed = 0,
    test_fraction: TestFraction = 0.2,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the remaining rows that judge a trial; 0 to judge by the training loss.")
    ] = 0.2,
    benchmark: Annotated[bool, typer.Option(help="Time every trial in plain PyTorch too.")] = True,
    storage: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Optuna storage URL. Default: study.db (SQLite) in the run folder."),
    ] = None,
    study_name: Annotated[str, typer.Option(help="Name of the study in the storage.")] = "torchintro",
    out: Folder = None,
) -> None:
    """Search the learning rate with Optuna; the same command with the same --out goes on where it stopped.

    Rows held out by --test-fraction stay out of the search. Writes study.db, trials.csv and lr.png.
    """
    if lr_low >= lr_high:
        raise ValueError(f"tune: --lr-low must be below --lr-high, but got {lr_low:g} and {lr_high:g}")
    from . import tuning  # Optuna takes a second to import

    dataset = _dataset(data, target, feature, seed)
    rest, _ = _split(dataset, test_fraction, seed)
    train_part, validation_part = _split(rest, validation_fraction, seed, name="--validation-fraction")
    standardize = datasets.Standardize.fit(train_part.X)
    folder = _folder("tune", out)
    url = storage or f"sqlite:///{urllib.parse.quote(str(folder / 'study.db'))}"
    console.print(_describe(dataset, train_part, validation_part, "to judge by"))
    with _made(folder), _trial_counter(trials) as count:
        try:
            study = tuning.tune(
                standardize(train_part.X),
                train_part.y,
                n_trials=trials,
                epochs=epochs,
                lr=(lr_low, lr_high),
                batch_size=batch_size,
                optimizer=optimizer,
                momentum=momentum,
                weight_decay=weight_decay,
                validation=None if validation_part is None else (standardize(validation_part.X), validation_part.y),
                storage=url,
                study_name=study_name,
                seed=seed,
                engine=engine,
                benchmark=benchmark,
                progress=count,
            )
        except KeyboardInterrupt as error:
            again = f"the same command with --out {folder} goes on from there"
            raise _failure(f"interrupted; the finished trials are kept in {url}, {again}", INTERRUPTED) from error
        judged_by = "training loss" if validation_part is None else "validation loss"
        _show_study(study, judged_by, tuning.best_lr(study))
        trials_done = [trial for trial in study.trials if trial.value is not None]
        lrs, losses = [trial.params["lr"] for trial in trials_done], [trial.values[0] for trial in trials_done]
        plots.plot_loss_by_lr(folder / "lr.png", lrs, losses, title=dataset.name, ylabel=judged_by)
        rows = zip((trial.number for trial in trials_done), lrs, losses, strict=True)
        _write_csv(folder / "trials.csv", ["trial", "lr", judged_by], rows)
    console.print(f"lr.png and trials.csv are in {folder}, the study in {url}", soft_wrap=True)
    if tuning.best_lr(study) is None:
        raise ArithmeticError("tune: every learning rate diverged: lower --lr-low and --lr-high")


@app.command()
@_answering
def evaluate(
    model: ModelFile,
    data: Data = "diabetes",
    held_out: Annotated[
        bool, typer.Option("--held-out/--all-rows", help="Only the rows that train or demo held out of this data.")
    ] = False,
) -> None:
    """Judge a saved model: mean squared error, its root, mean absolute error and R2."""
    saved = load_model(model)
    dataset = _data_of(saved, data)
    if held_out:
        kept = saved.metadata
        same = kept.get("rows") == len(dataset) and Path(str(kept.get("data"))).name == Path(dataset.name).name
        if not same or not kept.get("test_fraction"):
            source = f"{kept.get('data')} with {kept.get('rows')} rows, {kept.get('test_fraction')} of them held out"
            raise ValueError(
                f"evaluate: --held-out needs the data that the model was trained on ({source}), "
                f"but got {dataset.name} with {len(dataset)} rows"
            )
        _, dataset = datasets.split(dataset, kept["test_fraction"], seed=kept["seed"])
    name = "held out" if held_out else "all rows"
    console.print(f"{model} on {dataset.name}, {len(dataset)} rows", soft_wrap=True)
    console.print(_metrics_table({name: measure(saved.model, dataset.X, dataset.y)}))


@app.command()
@_answering
def predict(
    model: ModelFile,
    data: Data = "diabetes",
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="CSV file to write. Default: standard output."),
    ] = None,
) -> None:
    """Predict the targets of rows and write them as CSV.

    The data needs the columns of the model's features; others may be there.
    """
    saved = load_model(model)
    X = _data_of(saved, data, with_targets=False).X
    predictions = apply(saved.model, X).tolist()
    rows = ([format(value, ".9g") for value in row] for row in predictions)
    if out is None:
        _write_rows(sys.stdout, saved.target_names, rows)
    else:
        _write_csv(out, saved.target_names, rows)


@app.command()
@_answering
def bench(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    row: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--row", help="Name of a row of the table; repeat it for several. Default: all."),
    ] = None,
    json: Annotated[Optional[Path], typer.Option("--json", help="Also write the figures to this file.")] = None,  # noqa: UP045
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes and fewer repeats.")] = False,
    grid: Annotated[bool, typer.Option("--grid", help="Also a grid of shapes, fused against eager.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the grid: float32, float64 or bfloat16.")] = "float32",
    no_rows: Annotated[bool, typer.Option("--no-rows", help="Nothing but the grid and the trials.")] = False,
    plot: Annotated[Optional[Path], typer.Option("--plot", help="Folder for the pictures.")] = None,  # noqa: UP045
    record: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--from", help="Measure nothing: show this record. Needs --plot or --table."),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Print the Markdown tables of the record.")] = False,
    crossover: Annotated[
        bool, typer.Option("--crossover", help="With cuda and --row, also from how many rows on the GPU wins.")
    ] = False,
    trials: Annotated[
        bool, typer.Option("--trials", help="Also time against the number of trials, 1 to 1000.")
    ] = False,
) -> None:
    """Time eager PyTorch, torch.compile, JAX and the fused operator side by side, after checking that they agree."""
    from .benchmark.command import main

    code = main(
        device,
        row,
        json,
        quick,
        grid=grid,
        dtype=dtype,
        no_rows=no_rows,
        plot=plot,
        record_path=record,
        table=table,
        crossover=crossover,
        trials=trials,
    )
    raise typer.Exit(code)


@app.command()
@_answering
def info() -> None:
    """Print what a bug report needs: versions, what is built in, devices and the kernels that will be used."""
    from .info import collect

    report = collect()
    width = max(len(label) for label in report)
    for label, value in report.items():
        typer.echo(f"{label:<{width}}  {value}")


def _dataset(data: str, target: Sequence[str] | None, feature: Sequence[str] | None, seed: int) -> datasets.Dataset:
    if data not in BUILT_IN:
        if not Path(data).suffix:
            raise ValueError(f"--data must be synthetic, diabetes or a file with a suffix, but got {data!r}")
        return datasets.read_table(data, target=target or None, features=feature or None)
    dataset = datasets.synthetic(seed=seed) if data == "synthetic" else datasets.diabetes()
    if target and tuple(target) != dataset.target_names:
        raise ValueError(f"--target must be {dataset.target_names[0]} for {data}, but got {', '.join(target)}")
    return dataset if not feature else _with_features(dataset, feature)


def _with_features(dataset: datasets.Dataset, names: Sequence[str]) -> datasets.Dataset:
    known = dataset.feature_names
    for name in names:
        if name not in known:
            raise ValueError(f"{dataset.name} has no feature {name!r}; it has {', '.join(known)}")
    columns = [known.index(name) for name in names]
    return datasets.Dataset(dataset.name, dataset.X[:, columns], dataset.y, tuple(names), dataset.target_names)


def _data_of(saved: SavedModel, data: str, with_targets: bool = True) -> datasets.Dataset:
    """Return the data in the columns that the model was trained with; without targets, ``y`` is empty."""
    if data in BUILT_IN:
        dataset = _dataset(data, None, None, seed=int(saved.metadata.get("seed", 0)))
        if with_targets and dataset.target_names != saved.target_names:
            wanted = ", ".join(saved.target_names)
            raise ValueError(f"the model predicts {wanted}, but {data} has the target {dataset.target_names[0]}")
        return _with_features(dataset, saved.feature_names)
    if with_targets:
        return datasets.read_table(data, target=saved.target_names, features=saved.feature_names)
    X = datasets.read_features(data, saved.feature_names)
    return datasets.Dataset(data, X, X[:, :0], saved.feature_names, ())


def _split(
    dataset: datasets.Dataset, fraction: float, seed: int, name: str = "--test-fraction"
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    if fraction == 0:
        return dataset, None
    if not 0 < fraction < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, but got {fraction}")
    return datasets.split(dataset, fraction, seed=seed)


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
def _trial_counter(trials: int) -> Iterator[Callable[[optuna.Study, optuna.trial.FrozenTrial], None]]:
    """Give an Optuna callback that shows a moving count on a terminal and nothing elsewhere."""
    with console.status("tuning...") as status:

        def count(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            loss = "diverged" if trial.user_attrs.get("diverged") else f"loss {trial.value:.6g}"
            status.update(f"trial {trial.number + 1} of {trials}: lr {trial.params['lr']:.5f}, {loss}")

        yield count


def _describe(
    dataset: datasets.Dataset, first: datasets.Dataset, second: datasets.Dataset | None, purpose: str = "held out"
) -> str:
    columns = (
        f"{dataset.X.shape[1]} feature{'s' if dataset.X.shape[1] > 1 else ''} -> {', '.join(dataset.target_names)}"
    )
    parts = f"{len(first)} to train" + ("" if second is None else f", {len(second)} {purpose}")
    return f"{dataset.name}: {len(dataset)} rows, {columns}; {parts}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _metrics_table(metrics: dict[str, dict[str, float]]) -> Table:
    table = _table("rows", "MSE", "RMSE", "MAE", "R2")
    for name, values in metrics.items():
        table.add_row(name, *(f"{values[key]:.6g}" for key in ("mse", "rmse", "mae", "r2")))
    return table


def _show_study(study: optuna.Study, judged_by: str, best: float | None) -> None:
    table = _table("trial", "lr", judged_by, "us/epoch", "plain PyTorch")
    finished = [trial for trial in study.trials if trial.value is not None]
    pairs = []
    for trial in finished:
        attributes = trial.user_attrs
        mine, plain = attributes["seconds_per_epoch"], attributes.get("reference_seconds_per_epoch")
        if plain is not None:
            pairs.append((mine, plain))
        diverged = attributes.get("diverged")
        table.add_row(
            str(trial.number),
            f"{trial.params['lr']:.6f}",
            f"diverged, epoch {attributes['diverged_epoch']}" if diverged else f"{trial.values[0]:.6g}",
            f"{mine * 1e6:.0f}",
            "-" if plain is None else f"{plain * 1e6:.0f}",
        )
    console.print(table)
    if best is not None:
        console.print(
            f"best lr: {best:.6g}, {judged_by} {study.best_value:.6g} (for torchintro train: --lr {best:.6g})"
        )
    if pairs:
        mine, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
        engine = finished[-1].user_attrs["engine"]
        console.print(
            f"seconds per epoch, median: {mine:.3g} with {engine}, {plain:.3g} in plain PyTorch: {plain / mine:.2f}x"
        )


def _write_csv(path: Path, header: Sequence[str], rows: Any) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        _write_rows(file, header, rows)


def _write_rows(file: Any, header: Sequence[str], rows: Any) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
