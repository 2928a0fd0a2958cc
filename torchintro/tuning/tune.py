"""The search for hyper-parameters with Optuna: :func:`tune`. Only this folder imports Optuna."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from .. import _checks
from .._typing import ArrayLike
from ..nn import initial_linear
from ..statistics import LinearStatistics
from ..training.options import check_options
from ..training.row_kinds import processes
from ..training.rows import as_rows
from .sampler import default_sampler
from .space import check_values, learning_rates, other_parameters
from .storage import open_storage
from .study import logging_level, open_study, shared_study
from .trainer import Trainer
from .trials import Trials

if TYPE_CHECKING:
    from ..data.table import Table

__all__ = ["best_lr", "tune"]


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
    storage: str | Path | optuna.storages.BaseStorage | None = None,
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
            runs the study, and all return it: the others wait for it, within the timeout of the process group.
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
        storage: Where Optuna keeps the study: a file whose name ends in ``.journal`` or ``.log``, a URL such as
            ``"sqlite:///study.db"`` or a storage object; None keeps it in memory. The file is one of Optuna's
            ``JournalStorage``: a process that is killed holds up no other there, and leaves it whole.
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
        >>> import torch
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
    if sampler is not None and not isinstance(sampler, optuna.samplers.BaseSampler):
        raise TypeError(f"tune: sampler must be an Optuna sampler or None, but got {type(sampler).__name__}")
    if pruner is not None and not isinstance(pruner, optuna.pruners.BasePruner):
        raise TypeError(f"tune: pruner must be an Optuna pruner or None, but got {type(pruner).__name__}")
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"tune: progress must be True, False or a callable, but got {progress!r}")
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
    trainer = Trainer(rows, training, initial, options)
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

    def opened() -> optuna.Study:
        kept = open_storage(storage)
        closing.callback(kept.remove_session)
        return open_study(kept, study_name, sampler or default_sampler(seed), pruner, settings)

    def run(study: optuna.Study) -> optuna.Study:
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
        trials.run(n_trials, trials_per_batch)
        return study

    with logging_level(optuna.logging.INFO if progress is True else optuna.logging.ERROR), ExitStack() as closing:
        if rows.is_shared and processes() > 1:
            return shared_study(opened, rows.moments, run)
        return run(opened())


def best_lr(study: optuna.Study) -> float | None:
    """Return the learning rate of the lowest loss, or None if every trial diverged or was pruned.

    Args:
        study: A study made by :func:`tune`.

    Returns:
        The learning rate.

    Example:
        >>> import torch
        >>> X = torch.randn(100, 1)
        >>> best_lr(tune(X, 3 * X, n_trials=2, lr=(10, 1000), seed=0)) is None
        True
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    best = min(complete, key=lambda trial: trial.values[0], default=None)
    return float(best.params["lr"]) if best is not None and math.isfinite(best.values[0]) else None
