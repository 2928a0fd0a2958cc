"""The search for a learning rate with Optuna: :func:`tune`. The only module that imports Optuna."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor, nn

from . import _checks
from .data import split_rows
from .training import ArrayLike, DivergedError, fit, initial_linear, prepare, validation_pair

__all__ = ["best_lr", "tune"]

_SETTINGS = "torchintro"  # the study's user attribute with what makes its values comparable
# How long to wait for another process to be done with a SQLite file: its own 5 seconds are few on a busy machine.
_LOCK_SECONDS = 60


def tune(
    X: ArrayLike,
    y: ArrayLike,
    *,
    n_trials: int = 20,
    epochs: int = 100,
    lr: tuple[float, float] = (1e-4, 1e-1),
    batch_size: int | None = None,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    optimizer_options: Mapping[str, Any] | None = None,
    validation: Sequence[ArrayLike] | float | None = None,
    storage: str | optuna.storages.BaseStorage | None = None,
    study_name: str | None = None,
    sampler: optuna.samplers.BaseSampler | None = None,
    seed: int | None = None,
    engine: str = "auto",
    benchmark: bool = False,
    progress: bool | Callable[[optuna.Study, FrozenTrial], None] = False,
) -> optuna.Study:
    """Search the learning rate at which a linear layer trains best.

    Equivalent to ``study.optimize`` over an objective that takes ``lr`` from
    ``trial.suggest_float("lr", *lr, log=True)``, trains an ``nn.Linear`` and returns its final loss. All trials start
    from the same parameters. A learning rate that diverges is a finished trial of value infinity.

    With a ``storage`` and a ``study_name`` an interrupted study goes on where it was: ``n_trials`` counts the finished
    trials that the study holds, so that a second call only runs what is missing. A trial cut off by Ctrl-C is recorded
    as failed, the finished ones are kept, and the KeyboardInterrupt is raised again.

    Each trial's ``user_attrs`` hold ``engine``, ``epochs``, ``seconds_per_epoch`` and ``train_loss``; with
    ``benchmark`` also ``reference_seconds_per_epoch``; and if it diverged, ``diverged`` (True) and ``diverged_epoch``.

    Args:
        X: Features ``(N, D)``, tensor or NumPy array; a floating-point type is that of the model.
        y: Targets ``(N, T)``.
        n_trials: Number of finished trials wanted.
        epochs: Epochs of each trial.
        lr: Lowest and highest learning rate.
        batch_size: As for :func:`torchintro.fit`.
        optimizer: As for :func:`torchintro.fit`.
        momentum: As for :func:`torchintro.fit`.
        weight_decay: As for :func:`torchintro.fit`.
        optimizer_options: As for :func:`torchintro.fit`.
        validation: ``(X_val, y_val)``, or the share of the rows to hold out (chosen by ``seed``). The objective is the
            final validation loss; without validation, the final training loss.
        storage: Where Optuna keeps the study: a URL such as ``"sqlite:///study.db"`` or a storage object; None keeps
            it in memory.
        study_name: The study's name in the storage.
        sampler: Any Optuna sampler, by default ``TPESampler``, seeded by ``seed`` plus the number of trials there are.
        seed: Seed of the initial parameters, the mini-batches, the split and the sampler.
        engine: As for :func:`torchintro.fit`.
        benchmark: Train each trial a second time with the ``"reference"`` engine, for its time only.
        progress: True lets Optuna log every trial; a callable is an Optuna callback, given ``(study, trial)``.

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
    epochs = _checks.positive_integer("tune", "epochs", epochs)
    low, high = _lr_range(lr)
    if seed is not None:
        seed = _checks.integer("tune", "seed", seed)
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"tune: progress must be True, False or a callable, but got {progress!r}")
    train, held_out = _data(X, y, validation, seed)
    initial = initial_linear(train[0].shape[1], train[1].shape[1], seed=seed, dtype=train[0].dtype)
    initial.to(train[0].device)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "optimizer": optimizer,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "optimizer_options": optimizer_options,
    }
    prepare("tune", initial, lr=low, engine=engine, **options)
    settings = {
        **options,
        "optimizer_options": None if optimizer_options is None else repr(dict(optimizer_options)),
        "epochs": epochs,
        "seed": seed,
        "X": list(train[0].shape),
        "y": list(train[1].shape),
        "validation rows": 0 if held_out is None else held_out[0].shape[0],
    }
    if storage is not None:  # only there a study can be met again
        settings["data (SHA-256)"] = _fingerprint(*train, *(held_out or ()))

    def run(trial_lr: float, engine: str, epochs: int = epochs) -> dict[str, Any]:
        return _run(
            copy.deepcopy(initial),
            *train,
            lr=trial_lr,
            epochs=epochs,
            validation=held_out,
            engine=engine,
            seed=seed,
            **options,
        )

    def objective(trial: optuna.Trial) -> float:
        trial_lr = trial.suggest_float("lr", low, high, log=True)
        outcome = run(trial_lr, engine)
        value: float = outcome.pop("value")
        if benchmark:
            plain = outcome if outcome["engine"] == "reference" else run(trial_lr, "reference")
            outcome["reference_seconds_per_epoch"] = plain["seconds_per_epoch"]
        for key, attribute in outcome.items():
            trial.set_user_attr(key, attribute)
        return value

    with _logging(optuna.logging.INFO if progress is True else optuna.logging.ERROR):
        study = _open_study(storage, study_name, sampler, settings)
        finished = _finished(study)
        if sampler is None:
            # Advanced by what is there, because the same seed again would propose the same learning rates again.
            study.sampler = optuna.samplers.TPESampler(seed=None if seed is None else seed + finished)
        if finished < n_trials:
            if benchmark:  # the first epoch of a process pays for what is loaded on first use
                run(low, engine, 1)
                run(low, "reference", 1)
            with _interrupts():
                study.optimize(
                    objective, n_trials=n_trials - finished, callbacks=[progress] if callable(progress) else None
                )
    return study


def best_lr(study: optuna.Study) -> float | None:
    """Return the learning rate of the lowest loss, or None if every trial diverged.

    Args:
        study: A study made by :func:`tune`.

    Returns:
        The learning rate.

    Example:
        >>> X = torch.randn(100, 1)
        >>> best_lr(tune(X, 3 * X, n_trials=2, lr=(10, 1000), seed=0)) is None
        True
    """
    best = study.best_trial
    return float(best.params["lr"]) if best.value is not None and math.isfinite(best.value) else None


def _run(model: nn.Linear, X: Tensor, y: Tensor, *, lr: float, epochs: int, **options: Any) -> dict[str, Any]:
    """Train once; return the objective's value and what is recorded of the trial."""
    start = time.perf_counter()
    try:
        result = fit(model, X, y, lr=lr, epochs=epochs, **options)
    except DivergedError as error:
        return {
            "value": math.inf,
            "engine": error.engine,
            "epochs": epochs,
            "seconds_per_epoch": (time.perf_counter() - start) / error.epoch,
            "train_loss": math.inf,
            "diverged": True,
            "diverged_epoch": error.epoch,
        }
    train_loss = result.losses[-1].item()
    return {
        "value": train_loss if result.validation_losses is None else result.validation_losses[-1].item(),
        "engine": result.engine,
        "epochs": epochs,
        "seconds_per_epoch": result.seconds / epochs,
        "train_loss": train_loss,
    }


def _fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _finished(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def _lr_range(lr: object) -> tuple[float, float]:
    if not isinstance(lr, (tuple, list)) or len(lr) != 2:
        raise TypeError(f"tune: lr must be a pair (lowest, highest), but got {lr!r}")
    low, high = (_checks.positive("tune", f"lr[{i}]", bound) for i, bound in enumerate(lr))
    if low >= high:
        raise ValueError(f"tune: lr must be a pair (lowest, highest), but got {lr!r}")
    return low, high


def _data(
    X: object, y: object, validation: object, seed: int | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    given = _checks.tensor("tune", "X", X)
    dtype = given.dtype if given.is_floating_point() else torch.get_default_dtype()
    features = _checks.matrix("tune", "X", given, dtype=dtype, device=given.device)
    targets = _checks.matrix("tune", "y", y, dtype=dtype, device=given.device)
    if targets.shape[0] != features.shape[0]:
        raise ValueError(f"tune: y must have {features.shape[0]} rows, as X has, but got shape {tuple(targets.shape)}")
    if validation is None:
        return (features, targets), None
    if isinstance(validation, (int, float)):
        train, held_out = (
            rows.to(given.device) for rows in split_rows("tune", "validation", features.shape[0], validation, seed)
        )
        return (features[train], targets[train]), (features[held_out], targets[held_out])
    X_validation, y_validation = validation_pair("tune", validation)
    return (features, targets), _checks.regression_data(
        "tune",
        X_validation,
        y_validation,
        in_features=features.shape[1],
        out_features=targets.shape[1],
        dtype=dtype,
        device=given.device,
        names=("validation[0]", "validation[1]"),
    )


def _open_study(
    storage: object, study_name: str | None, sampler: optuna.samplers.BaseSampler | None, settings: dict[str, Any]
) -> optuna.Study:
    if storage is not None and not isinstance(storage, (str, optuna.storages.BaseStorage)):
        raise TypeError(f"tune: storage must be a URL or an Optuna storage, but got {type(storage).__name__}")
    try:
        opened = storage
        if isinstance(storage, str) and storage.startswith("sqlite"):
            opened = optuna.storages.RDBStorage(storage, engine_kwargs={"connect_args": {"timeout": _LOCK_SECONDS}})
        study = optuna.create_study(
            storage=opened, study_name=study_name, sampler=sampler, direction="minimize", load_if_exists=True
        )
    except Exception as error:  # whatever the storage's driver raises
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise ValueError(f"tune: storage {storage!r} cannot be used: {reason}") from error
    if study.directions != [optuna.study.StudyDirection.MINIMIZE]:
        raise ValueError(f"tune: the study {study.study_name!r} does not minimise one value, so it is not one of tune")
    earlier = study.user_attrs.get(_SETTINGS)
    if earlier is None:
        if study.get_trials(deepcopy=False):
            raise ValueError(f"tune: the study {study.study_name!r} holds trials that are not tune's")
        study.set_user_attr(_SETTINGS, settings)
    for key, value in settings.items():
        if earlier is not None and earlier.get(key) != value:
            raise ValueError(
                f"tune: the study {study.study_name!r} was made with {key}={earlier.get(key)!r}, but got {value!r}: "
                "give the same, or another study_name, because the losses would not compare"
            )
    return study


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
    optuna.logging.set_verbosity(level)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
