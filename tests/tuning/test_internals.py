"""What is used of Optuna beyond its documented interface is there, and means what it meant."""

from __future__ import annotations

import pytest

optuna = pytest.importorskip("optuna")  # the machine of `make gpu-check` may lack it

from torchintro.tuning.internals import grid_size, is_stopped, startup_trials, stoppable  # noqa: E402


def test_a_grid_has_points():
    assert grid_size(optuna.samplers.GridSampler({"lr": [0.1, 0.2, 0.3], "momentum": [0.0, 0.9]})) == 6


@pytest.mark.parametrize(("sampler", "expected"), [("TPESampler", 10), ("GPSampler", 10), ("RandomSampler", 0)])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_samplers_that_begin_at_random(sampler, expected):
    assert startup_trials(getattr(optuna.samplers, sampler)()) == expected


def test_a_study_is_stopped_within_only():
    study = optuna.create_study()
    with stoppable(study):
        assert not is_stopped(study)
        study.stop()
        assert is_stopped(study)
    with pytest.raises(RuntimeError, match="supposed to be invoked inside"):
        study.stop()
    with stoppable(study):
        assert not is_stopped(study)
