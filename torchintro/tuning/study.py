"""The study of :func:`torchintro.tune`: opened or gone on with, interrupted without loss, shared by several ranks."""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import optuna
import torch.distributed
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from .storage import unusable

__all__ = ["finished", "held_interrupts", "logging_level", "open_study", "shared_study"]

_SETTINGS = "torchintro"  # the study's user attribute with what makes its values comparable


def open_study(
    storage: BaseStorage,
    study_name: str | None,
    sampler: BaseSampler,
    pruner: BasePruner | None,
    settings: dict[str, Any],
) -> optuna.Study:
    """Return the study of that name, made if the storage has none; a ValueError if it was made with other settings."""
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=study_name,
            sampler=sampler,
            pruner=pruner or NopPruner(),
            direction="minimize",
            load_if_exists=True,
        )
    except Exception as error:  # whatever the storage's driver raises
        raise unusable(storage, error) from error
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


def finished(study: optuna.Study) -> int:
    """Return how many trials of a study are finished."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def shared_study(
    opened: Callable[[], optuna.Study], gather: Callable[[], Any], run: Callable[[optuna.Study], optuna.Study]
) -> optuna.Study:
    """Have rank 0 of ``torch.distributed`` open and run a study of rows that are shared; return it on all ranks.

    Every rank has a part in ``gather``, which gathers the rows' statistics; with them rank 0 can train alone.
    """
    studies: list[optuna.Study] = []

    def told() -> tuple[str, dict[str, Any], list[FrozenTrial]]:
        study = run(studies[0])
        return study.study_name, study.user_attrs, study.trials

    # A storage that cannot be used is noticed before the rows are read, which may take hours.
    _from_rank_0(lambda: studies.append(opened()))
    gather()
    name, attributes, trials = _from_rank_0(told)
    if studies:
        return studies[0]
    study = optuna.create_study(study_name=name, direction="minimize")
    study.add_trials(trials)
    for key, value in attributes.items():
        study.set_user_attr(key, value)
    return study


def _from_rank_0(make: Callable[[], Any]) -> Any:
    """Return on every rank what ``make`` returns on rank 0, the only one that calls it; an error there ends all."""
    message: list[Any] = [None, ""]
    try:
        if torch.distributed.get_rank() == 0:
            message[0] = make()
    except BaseException as error:
        message[1] = f"{type(error).__name__}: {error}"
        raise
    finally:
        torch.distributed.broadcast_object_list(message, src=0)
    if message[1]:
        raise RuntimeError(f"tune: rank 0 stopped the study: {message[1]}")
    return message[0]


@contextlib.contextmanager
def held_interrupts() -> Iterator[None]:
    """Hold a Ctrl-C back until the context ends, where a storage is at work; a second one comes through at once.

    SQLAlchemy lets KeyboardInterrupt pass through weak references' callbacks and clean-ups, where Python drops it,
    another error takes its place, or a connection is left with a lock that what comes next waits for; a journal's
    memory would miss what it was reading. A handler of the caller's own is left alone.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def hold(number: int, frame: types.FrameType | None) -> None:
        nonlocal came
        if came:
            signal.default_int_handler(number, frame)
        came = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def logging_level(level: int) -> Iterator[None]:
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
