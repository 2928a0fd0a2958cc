"""The search for hyper-parameters with Optuna: :func:`tune`. Only this, _search.py and _trials.py import Optuna."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from .. import _checks
from .._typing import ArrayLike
from ..nn import initial_linear
from ..statistics import LinearStatistics
from ..training.options import check_options
from ..training.rows import as_rows
from .space import batch_size_of, check_values, default_sampler, learning_rates, other_parameters
from .trials import Trainer, Trials, held_interrupts

if TYPE_CHECKING:
    from ..data.table import Table

__all__ = ["best_lr", "tune"]

_SETTINGS = "torchintro"  # the study's user attribute with what makes its values comparable
# How long to wait for another process to be done with a SQLite file: its own 5 seconds are few on a busy machine.
_LOCK_SECONDS = 60
# How often, and how long apart, to open a database of which another process makes the tables at the same time.
_OPENINGS = 20
_OPENING_SECONDS = 0.1


def tune(  # noqa: PLR0913 (a public function)
    X: ArrayLike | Table | LinearStatistics,
    y: ArrayLike | None = None,
    *,
    n_trials: int = 20,
    epochs: int = 100,
    lr: tuple[float, float] = (1e-4, 1e-1),
    search_space: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    optimizer_options: Mapping[str, Any] | None = None,
    validation: Sequence[ArrayLike] | Table | LinearStatistics | float | None = None,
    storage: str | optuna.storages.BaseStorage | None = None,
    study_name: str | None = None,
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    trials_per_batch: int | None = None,
    seed: int | None = None,
    engine: str = "auto",
    benchmark: bool = False,
    checkpoint: str | Path | None = None,
    progress: bool | Callable[[optuna.Study, FrozenTrial], None] = False,
) -> optuna.Study:
    """Search the learning rate, and if wanted other hyper-parameters, with which a linear layer trains best.

    Equivalent to ``study.optimize`` over an objective that takes ``lr`` from
    ``trial.suggest_float("lr", *lr, log=True)``, trains an ``nn.Linear`` and returns its final loss, except that
    Optuna is asked for several trials at once and these are trained together (by the engines ``"autograd"`` and
    ``"reference"`` one after the other). All trials start from the same parameters. A learning rate that diverges is a
    finished trial of value infinity.

    Two trials of a batch that differ in their learning rates only are at least 2 % of the range (on its logarithmic
    scale) apart, where a batch is of at most 20: one that is drawn closer by is moved to the nearest learning rate that
    is not. That goes for samplers that draw (TPE, random, GP, CMA-ES); what a grid or an enqueued trial prescribes is
    left as it is.

    With a ``storage`` and a ``study_name`` an interrupted study goes on where it was: ``n_trials`` counts the finished
    trials that the study holds, so that a second call only runs what is missing. Trials cut off by Ctrl-C are recorded
    as failed, the finished ones are kept, and the KeyboardInterrupt is raised again. Several processes may work on one
    study at a time; each beyond the first may add up to a batch to ``n_trials``. What a killed process leaves
    unfinished is not counted.

    Each finished trial's ``user_attrs`` hold ``engine``, ``epochs``, ``seconds_per_epoch`` (its share of the batch's
    time) and ``train_loss``; with ``benchmark`` also ``reference_seconds_per_epoch`` and the number of epochs on which
    that was measured, ``reference_epochs``; and if it diverged, ``diverged`` (True) and ``diverged_epoch``. A trial
    whose parameters do not go together, such as ``nesterov`` and a momentum of 0, is a failed one, with the optimizer's
    reason as ``refused``. ``study.user_attrs["engines"]`` says why each engine of the last call was taken.

    Args:
        X: Features ``(N, D)``, tensor or NumPy array; a floating-point type is that of the model. Or a table
            (:func:`torchintro.open_table`) of any size, which is streamed: once for the whole study with the full
            batch. Where ``torch.distributed`` is initialised, every process streams its own share of the table, rank 0
            runs the study, and all return it.
            Or :class:`torchintro.LinearStatistics` gathered before, for the full batch.
        y: Targets ``(N, T)``; None with a table or statistics, which have their own.
        n_trials: Number of finished trials wanted.
        epochs: Epochs of each trial.
        lr: Lowest and highest learning rate.
        search_space: Further hyper-parameters to search: ``"momentum"``, ``"weight_decay"``, ``"batch_size"`` or an
            option of the optimizer such as ``"nesterov"``; each a tuple ``(low, high)``, a list of choices or an Optuna
            distribution. The range of ``weight_decay`` or ``eps`` is searched on a logarithmic scale if low is above 0,
            and that of ``batch_size``, two integers, always is.
        batch_size: As for :func:`torchintro.fit`.
        optimizer: As for :func:`torchintro.fit`.
        momentum: As for :func:`torchintro.fit`.
        weight_decay: As for :func:`torchintro.fit`.
        optimizer_options: As for :func:`torchintro.fit`.
        validation: ``(X_val, y_val)``, with a table also another table, or the share of the rows to hold out (chosen by
            ``seed``); with a table or statistics those of the rows held out. The objective is the final validation
            loss; without validation, the final training loss.
        storage: Where Optuna keeps the study: a URL such as ``"sqlite:///study.db"`` or a storage object; None keeps
            it in memory.
        study_name: The study's name in the storage.
        sampler: Any Optuna sampler, by default ``TPESampler(constant_liar=False)``, seeded by ``seed`` plus the number
            of this call's first trial, so that neither two processes nor two calls with one seed draw the same. Of your
            own, give each process one with another seed.
        pruner: An Optuna pruner. It is shown the objective after each epoch, counted from 0, of one trial after the
            other, and tells the sampler what is not worth going on with; time it does not save, because a batch is
            trained to its end. Without a pruner no epochs are reported: recording them takes longer than training.
        trials_per_batch: How many trials to train together. None is all with a sampler that does not learn from
            results; as many as it draws at random with one that begins so; and then 5 or a quarter of the finished
            ones with TPE, 4 with others. Fewer where their parameters and optimizers would take over 256 MiB.
        seed: Seed of the initial parameters, the mini-batches, the split and the sampler.
        engine: As for :func:`torchintro.fit`.
        benchmark: Time plain PyTorch too, measured on a few epochs, once for this call and each batch size.
        checkpoint: As for :func:`torchintro.fit`. With a ``storage`` too, a killed study goes on wherever it was.
        progress: True lets Optuna log every trial; a callable is an Optuna callback, given ``(study, trial)`` once the
            trial is recorded. ``study.stop()`` in it takes effect after the batch.

    Returns:
        The study; ``study.best_params["lr"]`` is the best learning rate.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument has a wrong value, or the study in the storage was made with other settings.

    Example:
        >>> X = torch.randn(100, 1)
        >>> study = tune(X, 3 * X, n_trials=5, validation=0.2, seed=0)
        >>> 1e-4 <= study.best_params["lr"] <= 1e-1
        True
    """
    n_trials = _checks.positive_integer("tune", "n_trials", n_trials)
    if trials_per_batch is not None:
        trials_per_batch = _checks.positive_integer("tune", "trials_per_batch", trials_per_batch)
    training = check_options("tune", epochs=epochs, batch_size=batch_size, engine=engine, seed=seed)
    epochs, batch_size, seed = training.epochs, training.batch_size, training.seed
    _check_objects(sampler, pruner, progress)
    rates = learning_rates(lr)
    given = {
        **(optimizer_options if isinstance(optimizer_options, Mapping) else {}),
        **({"batch_size": batch_size} if batch_size is not None else {}),
        **({"momentum": momentum} if momentum != 0 else {}),
        **({"weight_decay": weight_decay} if weight_decay != 0 else {}),
    }
    others = other_parameters(search_space, optimizer=optimizer, given=given)
    rows = as_rows("tune", X, y, validation, seed=seed, checkpoint=checkpoint, progress=progress is True)
    initial = initial_linear(rows.in_features, rows.out_features, seed=seed, dtype=rows.dtype).to(rows.device)
    options: dict[str, Any] = {
        "optimizer": optimizer,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "optimizer_options": optimizer_options,
    }
    trainer = Trainer(rows, training, initial, **options)
    if others:
        check_values(others, trainer.refusal)
    else:
        trainer.check()
    settings = {
        "batch_size": batch_size,
        **options,
        "optimizer_options": None if optimizer_options is None else repr(dict(optimizer_options)),
        "search_space": repr(others) if others else None,
        "epochs": epochs,
        "seed": seed,
        **rows.identity(contents=storage is not None),  # only in a storage can a study be met again
    }

    with _logging(optuna.logging.INFO if progress is True else optuna.logging.ERROR):
        if trainer.rank > 0:
            return trainer.follow()
        with trainer.leading() as made:
            study = _open_study(storage, study_name, sampler or default_sampler(seed), pruner, settings)
            made(study)
            trials = Trials(
                study,
                trainer,
                lr=rates,
                others=others,
                prunes=pruner is not None,
                seed=seed if sampler is None else None,
                benchmark=benchmark,
                progress=progress,
            )
            with _interrupts(), _optimizing(study):
                while (missing := n_trials - _finished(study)) > 0 and not study._stop_flag:
                    with held_interrupts():
                        size = trials_per_batch or batch_size_of(study.sampler, n_trials - missing) or missing
                    trials.run(min(size, missing, trainer.most_models))
    return study


def best_lr(study: optuna.Study) -> float | None:
    """Return the learning rate of the lowest loss, or None if every trial diverged or was pruned.

    Args:
        study: A study made by :func:`tune`.

    Returns:
        The learning rate.

    Example:
        >>> X = torch.randn(100, 1)
        >>> best_lr(tune(X, 3 * X, n_trials=2, lr=(10, 1000), seed=0)) is None
        True
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    best = min(complete, key=lambda trial: trial.values[0], default=None)
    return float(best.params["lr"]) if best is not None and math.isfinite(best.values[0]) else None


def _finished(study: optuna.Study) -> int:
    with held_interrupts():
        return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def _check_objects(sampler: object, pruner: object, progress: object) -> None:
    if sampler is not None and not isinstance(sampler, optuna.samplers.BaseSampler):
        raise TypeError(f"tune: sampler must be an Optuna sampler or None, but got {type(sampler).__name__}")
    if pruner is not None and not isinstance(pruner, optuna.pruners.BasePruner):
        raise TypeError(f"tune: pruner must be an Optuna pruner or None, but got {type(pruner).__name__}")
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"tune: progress must be True, False or a callable, but got {progress!r}")


def _open_study(
    storage: object,
    study_name: str | None,
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner | None,
    settings: dict[str, Any],
) -> optuna.Study:
    if storage is not None and not isinstance(storage, (str, optuna.storages.BaseStorage)):
        raise TypeError(f"tune: storage must be a URL or an Optuna storage, but got {type(storage).__name__}")
    try:
        study = optuna.create_study(
            storage=_database(storage) if isinstance(storage, str) else storage,
            study_name=study_name,
            sampler=sampler,
            pruner=pruner or optuna.pruners.NopPruner(),
            direction="minimize",
            load_if_exists=True,
        )
    except Exception as error:  # whatever the storage's driver raises
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise ValueError(f"tune: storage {storage!r} cannot be used: {reason}") from error
    if study.directions != [optuna.study.StudyDirection.MINIMIZE]:
        raise ValueError(f"tune: the study {study.study_name!r} does not minimise one value, so it is not one of tune")
    # Read in this order: another process writes its settings before it asks for trials.
    has_trials = bool(study.get_trials(deepcopy=False))
    earlier = study.user_attrs.get(_SETTINGS)
    if earlier is None:
        if has_trials:
            raise ValueError(f"tune: the study {study.study_name!r} holds trials that are not tune's")
        study.set_user_attr(_SETTINGS, settings)
        return study
    for key, value in settings.items():
        if earlier.get(key) != value:
            raise ValueError(
                f"tune: the study {study.study_name!r} was made with {key}={earlier.get(key)!r}, but got {value!r}: "
                "give the same, or another study_name, because the losses would not compare"
            )
    return study


def _database(url: str) -> optuna.storages.BaseStorage | str:
    if not url.startswith("sqlite"):
        return url
    for attempt in range(1, _OPENINGS + 1):
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _LOCK_SECONDS}})
        except Exception as error:
            # Optuna asks whether the tables are there and then makes them, between which another process may have.
            raced = "already exists" in str(error) or "UNIQUE constraint" in str(error)
            if not raced or attempt == _OPENINGS:
                raise
            time.sleep(_OPENING_SECONDS)
    raise AssertionError


@contextlib.contextmanager
def _optimizing(study: optuna.Study) -> Iterator[None]:
    """Let ``study.stop()`` work as within ``study.optimize``: samplers and callbacks end a study by it."""
    study._stop_flag = False
    study._thread_local.in_optimize_loop = True
    try:
        yield
    finally:
        study._thread_local.in_optimize_loop = False
        study._storage.remove_session()


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Raise a KeyboardInterrupt that came while Optuna recorded a trial, of which its clean-up makes another error."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            cause = cause.__cause__ or cause.__context__
        raise


@contextlib.contextmanager
def _logging(level: int) -> Iterator[None]:
    """Set Optuna's logging level for a while; it's one for the whole process."""
    before = optuna.logging.get_verbosity()
    if before == level:  # setting it empties the caches of all loggers there are
        yield
        return
    optuna.logging.set_verbosity(level)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
