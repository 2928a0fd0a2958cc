"""All that is used of Optuna beyond its documented interface, of which a test looks whether it is there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import optuna
from optuna.samplers import BaseSampler, GridSampler

__all__ = ["grid_size", "is_stopped", "startup_trials", "stoppable"]


def grid_size(sampler: GridSampler) -> int:
    """Return how many points a grid has."""
    return len(sampler._all_grids)


def startup_trials(sampler: BaseSampler) -> int:
    """Return how many trials a sampler draws at random before it learns from results; 0 of one that begins at once."""
    return int(getattr(sampler, "_n_startup_trials", 0))


@contextlib.contextmanager
def stoppable(study: optuna.Study) -> Iterator[None]:
    """Let ``study.stop()`` work as within ``study.optimize``: samplers and callbacks end a study by it."""
    study._stop_flag = False
    study._thread_local.in_optimize_loop = True
    try:
        yield
    finally:
        study._thread_local.in_optimize_loop = False


def is_stopped(study: optuna.Study) -> bool:
    """Return whether something called ``study.stop()``."""
    return study._stop_flag
