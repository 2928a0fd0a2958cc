"""Studies: what a trial records, divergence, seeds, and studies that were interrupted."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import textwrap
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

from torchintro.tuning.tune import best_lr, tune  # noqa: E402

DATA = synthetic(60, seed=3)
X, y = DATA.X, DATA.y


def lrs(study):
    return [trial.params["lr"] for trial in study.trials if trial.state == TrialState.COMPLETE]


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


def test_a_study_goes_on_where_it_was(device, tmp_path):
    X, y = DATA.X.to(device), DATA.y.to(device)
    options = {"epochs": 3, "storage": f"sqlite:///{tmp_path}/study.db", "study_name": "s", "seed": 0}
    first = lrs(tune(X, y, n_trials=3, **options))
    study = tune(X, y, n_trials=8, **options)
    assert lrs(study)[:3] == first
    assert len(set(lrs(study))) == len(study.trials) == 8
    assert lrs(tune(X, y, n_trials=8, **options)) == lrs(study)
    assert len(tune(X, y, n_trials=2, **options).trials) == 8
    assert len(tune(X, y, n_trials=2, **(options | {"study_name": "other"})).trials) == 2


def test_a_storage_object():
    storage = optuna.storages.InMemoryStorage()
    tune(X, y, n_trials=2, epochs=2, storage=storage, study_name="s")
    assert len(tune(X, y, n_trials=5, epochs=2, storage=storage, study_name="s").trials) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 4}, "was made with epochs=3, but got 4: give the same, or another study_name"),
        ({"seed": 1}, "was made with seed=0, but got 1"),
        ({"optimizer": "adam"}, "was made with optimizer='sgd', but got 'adam'"),
        ({"optimizer_options": {"nesterov": False}}, "was made with optimizer_options=None, but got"),
        ({"validation": 0.5}, r"was made with X=\[60, 1\], but got \[30, 1\]"),
        ({"validation": (X[:5], y[:5])}, "was made with validation rows=0, but got 5"),
    ],
)
def test_a_study_is_not_gone_on_with_by_other_settings(change, message):
    options = {"n_trials": 1, "epochs": 3, "seed": 0, "storage": optuna.storages.InMemoryStorage(), "study_name": "s"}
    tune(X, y, **options)
    with pytest.raises(ValueError, match=f"^tune: the study 's' {message}"):
        tune(X, y, **(options | change))


def test_studies_of_others_are_refused():
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="mine")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(ValueError, match=r"^tune: the study 'mine' holds trials that are not tune's$"):
        tune(X, y, storage=storage, study_name="mine")
    optuna.create_study(storage=storage, study_name="max", direction="maximize")
    with pytest.raises(ValueError, match=r"^tune: the study 'max' does not minimise one value"):
        tune(X, y, storage=storage, study_name="max")


def test_ctrl_c_keeps_the_finished_trials():
    storage = optuna.storages.InMemoryStorage()

    def stop(study, trial):
        if trial.number == 2:
            raise KeyboardInterrupt

    options = {"epochs": 2, "seed": 0, "storage": storage, "study_name": "s"}
    level = optuna.logging.get_verbosity()
    with pytest.raises(KeyboardInterrupt):
        tune(X, y, n_trials=9, progress=stop, **options)
    assert optuna.logging.get_verbosity() == level
    states = [trial.state for trial in optuna.load_study(study_name="s", storage=storage).trials]
    assert states == [TrialState.COMPLETE] * 3 + [TrialState.FAIL] * 6
    assert len(lrs(tune(X, y, n_trials=5, **options))) == 5


def test_ctrl_c_within_training(monkeypatch):
    storage = optuna.storages.InMemoryStorage()
    steps = []
    step = torch.optim.SGD.step

    def interrupted_step(self, closure=None):
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", interrupted_step)
    options = {"epochs": 3, "seed": 0, "storage": storage, "study_name": "s", "engine": "autograd"}
    with pytest.raises(KeyboardInterrupt):
        tune(X, y, n_trials=9, **options)
    states = [trial.state for trial in optuna.load_study(study_name="s", storage=storage).trials]
    assert states == [TrialState.COMPLETE] * 2 + [TrialState.FAIL] * 7  # this engine trains one after the other
    study = tune(X, y, n_trials=4, **options)
    assert len(set(lrs(study))) == 4


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    script = tmp_path / "study.py"
    script.write_text(
        textwrap.dedent(f"""
        from torchintro.data.datasets import synthetic
        from torchintro.tuning.tune import tune
        data = synthetic(60, seed=3)
        tune(data.X, data.y, n_trials=1000, epochs=100, seed=0, storage={storage!r}, study_name="s",
             progress=lambda study, trial: print(trial.params["lr"], flush=True))
        """)
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        seen = [float(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGKILL)
        seen += [float(line) for line in process.stdout]
    assert process.returncode == -signal.SIGKILL
    study = tune(X, y, n_trials=len(seen) + 4, epochs=100, seed=0, storage=storage, study_name="s")
    finished = lrs(study)
    # The kill may have come between a trial's record and its printing.
    assert finished[: len(seen)] == seen
    assert len(finished) == len(set(finished)) == len(seen) + 4
    # What was cut off is still there, is not taken for finished, and does not stand in the way.
    assert len(study.trials) - len(finished) <= 10


def test_an_interrupt_while_a_trial_is_recorded():
    class Interrupted(optuna.storages.InMemoryStorage):
        def set_trial_state_values(self, *arguments, **options):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(X, y, n_trials=2, epochs=1, storage=Interrupted())


def test_logging_is_quiet_unless_asked_for(caplog):
    optuna.logging.enable_propagation()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        tune(X, y, n_trials=1, epochs=1)
        assert caplog.messages == []
        tune(X, y, n_trials=1, epochs=1, progress=True)
        assert any("Trial 0 finished" in message for message in caplog.messages)
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.disable_propagation()


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
        ({"storage": 3}, TypeError, "tune: storage must be a URL or an Optuna storage, but got int"),
        ({"storage": "study.db"}, ValueError, "tune: storage 'study.db' cannot be used: Could not parse"),
        ({"storage": "sqlite:////no/such/folder/a.db"}, ValueError, "tune: storage 'sqlite:.*' cannot be used: .*open"),
    ],
)
def test_bad_calls(arguments, error, message):
    call = {"X": X, "y": y} | arguments
    with pytest.raises(error, match=f"^{message}") as caught:
        tune(call.pop("X"), call.pop("y"), **call)
    assert "\n" not in str(caught.value)


def test_a_study_of_other_rows_is_refused(device, tmp_path):
    X, y = DATA.X.to(device), DATA.y.to(device)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    tune(X, y, n_trials=1, epochs=1, storage=storage, study_name="s")
    tune(X, y, n_trials=2, epochs=1, storage=storage, study_name="s")
    with pytest.raises(ValueError, match=r"was made with data \(SHA-256\)="):
        tune(X, y + 1, n_trials=3, epochs=1, storage=storage, study_name="s")
