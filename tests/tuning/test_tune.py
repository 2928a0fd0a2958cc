"""The whole of tune: what a trial records, divergence, seeds, and every mistake in calling it."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import pytest
import torch

import torchintro
from torchintro.data.datasets import split, synthetic
from torchintro.nn import initial_linear
from torchintro.training.fit import fit
from torchintro.training.options import ENGINES

optuna = pytest.importorskip("optuna")  # the machine of `make gpu-check` may lack it
from optuna.trial import TrialState  # noqa: E402
from studies import lrs  # noqa: E402

from torchintro.tuning.tune import best_lr, tune  # noqa: E402

DATA = synthetic(60, seed=3)
X, y = DATA.X, DATA.y


def near(value):
    """Equal but for rounding: models that are trained together sum up in another order."""
    return pytest.approx(value, rel=2e-4)


def test_the_package_gives_tune_away():
    assert torchintro.tune is tune


def test_importing_the_package_loads_no_extra_package():
    extras = ["optuna", "sklearn", "matplotlib", "pyarrow", "typer", "rich"]
    # What torch itself imports (rich, in some releases) is not ours to answer for.
    code = (
        f"import sys, torch; before = set(sys.modules); import torchintro; "
        f"print([name for name in {extras} if name in sys.modules and name not in before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_every_trial_is_fit_from_the_same_start(device):
    X, y = DATA.X.to(device), DATA.y.to(device)
    study = tune(X, y, n_trials=4, epochs=7, seed=5, batch_size=16, optimizer="adam", weight_decay=0.01)
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    assert len(set(lrs(study))) == 4
    for trial in study.trials:
        assert 1e-4 <= trial.params["lr"] <= 1e-1
        assert trial.distributions["lr"].log
        model = initial_linear(1, 1, seed=5, device=device)
        options = {"batch_size": 16, "optimizer": "adam", "weight_decay": 0.01, "seed": 5}
        result = fit(model, X, y, lr=trial.params["lr"], epochs=7, engine="autograd", **options)
        assert trial.value == near(result.losses[-1].item())
        attributes = trial.user_attrs
        assert attributes.keys() == {"engine", "epochs", "seconds_per_epoch", "train_loss"}
        assert attributes["engine"] in set(ENGINES) - {"auto"}
        assert (attributes["epochs"], attributes["train_loss"]) == (7, trial.value)
        assert 0 < attributes["seconds_per_epoch"] < 10
    assert best_lr(study) == study.best_params["lr"] == min(study.trials, key=lambda trial: trial.value).params["lr"]


def test_validation_pair_is_the_objective(device):
    train, held_out = split(DATA, 0.25, seed=1)
    X = train.X.numpy() if device == "cpu" else train.X.to(device)  # the others are moved to where X is
    study = tune(X, train.y, n_trials=2, epochs=7, seed=5, validation=(held_out.X, held_out.y.numpy()))
    for trial in study.trials:
        model = initial_linear(1, 1, seed=5, device=device)
        lr = trial.params["lr"]
        result = fit(model, train.X, train.y, lr=lr, epochs=7, validation=(held_out.X, held_out.y))
        assert trial.value == near(result.validation_losses[-1].item())
        assert trial.user_attrs["train_loss"] == near(result.losses[-1].item())


def test_validation_fraction_is_split(device):
    X, y = DATA.X.to(device), DATA.y.to(device)
    train, held_out = split(DATA, 0.25, seed=5)
    expected = tune(train.X.to(device), train.y, n_trials=2, epochs=7, seed=5, validation=(held_out.X, held_out.y))
    study = tune(X, y, n_trials=2, epochs=7, seed=5, validation=0.25)
    assert [trial.value for trial in study.trials] == [near(trial.value) for trial in expected.trials]


def test_seed_decides_everything():
    def values(seed):
        return [trial.value for trial in tune(X, y, n_trials=3, epochs=3, seed=seed).trials]

    state = torch.get_rng_state()
    assert values(1) == values(1)
    assert values(1) != values(2)
    assert torch.equal(torch.get_rng_state(), state)
    # Without a seed, the starting point comes from PyTorch's global state and the rates from the system.
    assert values(None) != values(None)


def test_float64_data_trains_a_float64_model(device):
    X, y = DATA.X.to(device), DATA.y.to(device)
    study = tune(X.double(), y.double(), n_trials=1, epochs=3, seed=5)
    model = initial_linear(1, 1, seed=5, dtype=torch.float64, device=device)
    result = fit(model, X.double(), y.double(), lr=study.trials[0].params["lr"], epochs=3)
    assert study.trials[0].value == pytest.approx(result.losses[-1].item(), rel=1e-12)


@pytest.mark.parametrize("in_file", [False, True])
def test_divergence_is_recorded_and_the_study_goes_on(device, tmp_path, in_file):
    X, y = DATA.X.to(device), DATA.y.to(device)
    storage = f"sqlite:///{tmp_path}/study.db" if in_file else None
    options = {"n_trials": 15, "epochs": 60, "lr": (1e-2, 100.0), "seed": 0, "benchmark": True, "study_name": "wide"}
    study = tune(X, y, storage=storage, **options)
    if in_file:
        study = optuna.load_study(study_name="wide", storage=storage)
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    diverged = [trial for trial in study.trials if trial.user_attrs.get("diverged")]
    assert 0 < len(diverged) < 15
    for trial in study.trials:
        lr = trial.params["lr"]
        assert trial.user_attrs["engine"] in set(ENGINES) - {"auto"}
        assert trial.user_attrs["seconds_per_epoch"] > 0
        assert trial.user_attrs["reference_seconds_per_epoch"] > 0
        if trial not in diverged:
            assert math.isfinite(trial.value)
            assert "diverged_epoch" not in trial.user_attrs
            continue
        assert trial.value == trial.user_attrs["train_loss"] == math.inf
        with pytest.raises(torchintro.DivergedError) as caught:
            fit(initial_linear(1, 1, seed=0, device=device), X, y, lr=lr, epochs=60, engine="autograd")
        assert abs(caught.value.epoch - trial.user_attrs["diverged_epoch"]) <= 1  # what overflows first is rounding's
    assert best_lr(study) < 2
    assert math.isfinite(study.best_value)


def test_no_best_lr_when_all_diverge():
    study = tune(X, y, n_trials=2, lr=(10.0, 100.0), seed=0)
    assert [trial.value for trial in study.trials] == [math.inf] * 2
    assert best_lr(study) is None


@pytest.mark.parametrize(
    "sampler", [optuna.samplers.RandomSampler(seed=1), optuna.samplers.GridSampler({"lr": [0.001, 0.01, 0.1]})]
)
def test_any_sampler(sampler):
    study = tune(X, y, n_trials=3, epochs=2, sampler=sampler)
    assert study.sampler is sampler
    if isinstance(sampler, optuna.samplers.GridSampler):
        assert sorted(lrs(study)) == [0.001, 0.01, 0.1]
    assert len(lrs(study)) == 3


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tune(X, y, n_trials=12, epochs=30, lr=(1e-3, 50.0), seed=0, benchmark=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_trials": 0}, ValueError, "tune: n_trials must be at least 1, but got 0"),
        ({"epochs": -1}, ValueError, "tune: epochs must be at least 1, but got -1"),
        ({"lr": 0.1}, TypeError, r"tune: lr must be a pair \(lowest, highest\), but got 0.1"),
        ({"lr": (0.1, 0.01)}, ValueError, r"tune: lr must be a pair \(lowest, highest\), but got \(0.1, 0.01\)"),
        ({"lr": (0, 0.01)}, ValueError, r"tune: lr\[0\] must be a positive, finite number, but got 0"),
        ({"lr": (0.1, math.inf)}, ValueError, r"tune: lr\[1\] must be a positive, finite number, but got inf"),
        ({"batch_size": 0}, ValueError, "tune: batch_size must be at least 1, but got 0"),
        ({"optimizer": "sdg"}, ValueError, "tune: optimizer must be one of ASGD.* but got 'sdg'"),
        ({"optimizer": "adam", "momentum": 1}, ValueError, "tune: momentum must be 0 for Adam"),
        ({"engine": "fast"}, ValueError, "tune: engine must be one of auto, .*autograd, .*, but got 'fast'"),
        (
            {"engine": "statistics", "batch_size": 8},
            ValueError,
            "tune: engine 'statistics' cannot do this: it has no mini-batches, but batch_size is 8 of 60 rows",
        ),
        ({"trials_per_batch": 0}, ValueError, "tune: trials_per_batch must be at least 1, but got 0"),
        ({"trials_per_batch": 1.5}, TypeError, "tune: trials_per_batch must be an integer, but got 1.5"),
        ({"sampler": "tpe"}, TypeError, "tune: sampler must be an Optuna sampler or None, but got str"),
        ({"pruner": True}, TypeError, "tune: pruner must be an Optuna pruner or None, but got bool"),
        ({"optimizer_options": 3}, TypeError, "tune: optimizer_options must be a mapping, but got int"),
        ({"seed": 0.5}, TypeError, "tune: seed must be an integer, but got 0.5"),
        ({"progress": 1}, TypeError, "tune: progress must be True, False or a callable, but got 1"),
        ({"validation": 1.5}, ValueError, "tune: validation must be a fraction between 0 and 1, but got 1.5"),
        ({"validation": X}, TypeError, r"tune: validation must be a pair \(X_val, y_val\), but got Tensor"),
        ({"validation": (X, y[:3])}, ValueError, r"tune: validation\[1\] must have shape \(60, 1\), .* got \(3, 1\)"),
        ({"y": y[:, 0]}, ValueError, r"tune: y must have two dimensions, but got shape \(60,\): use y.unsqueeze\(-1\)"),
        ({"y": y[:3]}, ValueError, r"tune: y must have 60 rows, as X has, but got shape \(3, 1\)"),
        ({"X": X * math.nan}, ValueError, r"tune: X must be finite, but element \[0, 0\] is nan"),
        (
            {"storage": 3},
            TypeError,
            "tune: storage must be a URL, the path of a journal or an Optuna storage, but got int",
        ),
        ({"storage": "study.db"}, ValueError, "tune: storage 'study.db' cannot be used: Could not parse"),
        ({"storage": "/no/such/folder/a.journal"}, ValueError, "tune: storage '/no.*' cannot be used: .*No such file"),
        ({"storage": "sqlite:////no/such/folder/a.db"}, ValueError, "tune: storage 'sqlite:.*' cannot be used: .*open"),
    ],
)
def test_bad_calls(arguments, error, message):
    call = {"X": X, "y": y} | arguments
    with pytest.raises(error, match=f"^{message}") as caught:
        tune(call.pop("X"), call.pop("y"), **call)
    assert "\n" not in str(caught.value)
