"""What the commands print: durations, tables of metrics and of trials, and what a run would have cost otherwise."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import optuna

# So many trials are all shown; of more, the best few.
MOST_TRIALS, BEST_TRIALS = 50, 20


def duration(seconds: float) -> str:
    """Return a duration with its unit."""
    for limit, unit, name in ((1e-3, 1e-6, "us"), (1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 3600:.3g} h"


class EpochReport:
    """Hears of a run of ``fit``: prints the engine, and the loss every tenth of the run; counts the epochs."""

    def __init__(self, console: Console, epochs: int, indent: str = "") -> None:
        self.epochs, self.done, self.engine = epochs, 0, ""
        self._console, self._indent = console, indent

    def begin(self, engine: str, reason: str) -> None:
        """Print the engine, before the first epoch."""
        self.engine = engine
        self._console.print(f"{self._indent}engine {engine}: {reason}", soft_wrap=True)

    def __call__(self, epoch: int, loss: float) -> None:
        """Print the loss, after the epochs that are shown."""
        self.done = epoch
        if epoch * 10 // self.epochs > (epoch - 1) * 10 // self.epochs:
            self._console.print(f"{self._indent}Epoch [{epoch}/{self.epochs}], Loss: {loss:.4f}")


def against_plain(seconds: float, plain_epoch: float, measured: int, epochs: int) -> str:
    """Say what ``epochs`` that took ``seconds`` would have taken in plain PyTorch, which ran ``measured`` of them."""
    plain = plain_epoch * epochs
    on = f"measured on {measured} epoch{'s' * (measured > 1)} of plain PyTorch, not run in full"
    ratio = plain / max(seconds, 1e-9)
    times = f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.2g}x"
    return f"plain PyTorch would have taken {duration(plain)} ({on}): {times}"


def table(*columns: str) -> Table:
    """Make a table whose first column is at the left."""
    made = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right")
    return made


def metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    """Show metrics by the name of the rows; what was not computed is a dash."""
    shown = table("rows", "MSE", "RMSE", "MAE", "R2")
    for name, values in metrics.items():
        shown.add_row(name, *(f"{values[key]:.6g}" if key in values else "-" for key in ("mse", "rmse", "mae", "r2")))
    return shown


def state_of(trial: optuna.trial.FrozenTrial) -> str:
    """Return what became of a trial, in a word."""
    if trial.user_attrs.get("diverged"):
        return "diverged"
    return "refused" if "refused" in trial.user_attrs else str(trial.state.name).lower()


def _loss(trial: optuna.trial.FrozenTrial) -> str:
    state = state_of(trial)
    if state == "diverged":
        return f"diverged, epoch {trial.user_attrs['diverged_epoch']}"
    if state == "pruned":
        return f"pruned, epoch {trial.user_attrs['epochs']}"
    return state if trial.value is None else f"{trial.value:.6g}"


def _ended(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.trials if trial.state.is_finished()]


def _parameters(trials: Iterable[optuna.trial.FrozenTrial]) -> list[str]:
    """Return the names of what was searched, the learning rate first."""
    return list(dict.fromkeys(["lr", *(name for trial in trials for name in trial.params)]))


def _value(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def show_study(console: Console, study: optuna.Study, judged_by: str) -> None:
    """Print the trials, of many only the best, and the best parameters as options of ``torchintro train``."""
    trials = _ended(study)
    names = _parameters(trials)
    shown = trials
    if len(trials) > MOST_TRIALS:
        complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
        shown = sorted(complete, key=lambda trial: trial.values[0])[:BEST_TRIALS]
        console.print(f"the best {len(shown)} of {len(trials)} trials (trials.csv has all):")
    made = table("trial", "lr", *names[1:], judged_by, "us/epoch", "plain PyTorch")
    for trial in shown:
        times = (trial.user_attrs.get(f"{kind}seconds_per_epoch") for kind in ("", "reference_"))
        made.add_row(
            str(trial.number),
            f"{trial.params['lr']:.6f}",
            *(_value(trial.params.get(name, "-")) for name in names[1:]),
            _loss(trial),
            *("-" if seconds is None else f"{seconds * 1e6:.3g}" for seconds in times),
        )
    console.print(made)
    finite = [trial for trial in trials if trial.state.name == "COMPLETE" and math.isfinite(trial.values[0])]
    if finite:
        best = min(finite, key=lambda trial: trial.values[0])
        found = ", ".join(f"{name} {_value(best.params[name])}" for name in names if name in best.params)
        console.print(f"best {found}, {judged_by} {best.values[0]:.6g} ({_for_train(best.params)})", soft_wrap=True)


def _for_train(parameters: Mapping[str, Any]) -> str:
    options = ("lr", "momentum", "weight_decay", "batch_size")
    own = " ".join(
        f"--{name.replace('_', '-')} {_value(parameters[name])}" for name in options if parameters.get(name) is not None
    )
    rest = "".join(f" --optimizer-option {name}={_value(v)}" for name, v in parameters.items() if name not in options)
    return f"for torchintro train: {own}{rest}"


def cost_of_study(
    study: optuna.Study, numbers: Iterable[int], seconds: float, epochs: int, pass_seconds: float | None
) -> list[str]:
    """Return sentences: the engine and why, what these trials took, and what they would have in plain PyTorch.

    ``numbers`` are those of the trials of one call, which took ``seconds``, Optuna and the storage included, and
    ``pass_seconds`` for a pass over its table, if it streamed one.
    """
    wanted = set(numbers)
    trials = [trial for trial in study.trials if trial.number in wanted and "engine" in trial.user_attrs]
    if not trials:
        return []
    reasons = study.user_attrs.get("engines", {})
    engines = dict.fromkeys(trial.user_attrs["engine"] for trial in trials)
    sentences = [f"engine {engine}: {reasons.get(engine, 'asked for')}" for engine in engines]

    def run(trial: optuna.trial.FrozenTrial) -> int:
        return int(trial.user_attrs.get("diverged_epoch", trial.user_attrs["epochs"]))

    trained = sum(trial.user_attrs["seconds_per_epoch"] * run(trial) for trial in trials)
    count = f"{len(trials)} trial{'s' * (len(trials) > 1)}"
    timed = [trial for trial in trials if "reference_seconds_per_epoch" in trial.user_attrs]
    besides = "Optuna, the storage and timing plain PyTorch" if timed else "Optuna and the storage"
    times = f"{duration(trained)} to train, {duration(seconds)} with {besides}"
    sentences.append(f"{count} of {epochs} epochs took {times}")
    if len(timed) == len(trials):
        plain = sum(trial.user_attrs["reference_seconds_per_epoch"] * run(trial) for trial in trials)
        measured = max(trial.user_attrs["reference_epochs"] for trial in trials)
        sentences.append(against_plain(trained, plain, measured, 1))
    elif pass_seconds is not None:
        sentences.append(of_passes(pass_seconds, sum(map(run, trials)), count))
    return sentences


def of_passes(pass_seconds: float, epochs: int, what: str) -> str:
    """Say what the plain loop, which reads a table in every epoch, would have taken at least."""
    return (
        f"plain PyTorch reads the table in each of {epochs} epochs of {what}: at least "
        f"{duration(pass_seconds * epochs)} (measured on this one pass of {duration(pass_seconds)}, not run in full)"
    )


def write_trials(path: Path, study: optuna.Study, judged_by: str) -> None:
    """Write every trial that ended as a line of CSV."""
    trials = _ended(study)
    names = _parameters(trials)
    rows = []
    for trial in trials:
        loss = "" if trial.value is None else trial.value
        parameters = (trial.params.get(name, "") for name in names)
        rows.append([trial.number, *parameters, loss, state_of(trial), trial.user_attrs.get("engine", "")])
    write_csv(path, ["trial", *names, judged_by, "state", "engine"], rows)


def write_csv(path: Path, header: Sequence[str], rows: Any) -> None:
    """Write a header and rows to a file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        write_rows(file, header, rows)


def write_rows(file: Any, header: Sequence[str], rows: Any) -> None:
    """Write a header and rows to an open file."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
