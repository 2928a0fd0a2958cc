"""What is trained together, that each trial is the model trained alone, and what the plain loop takes."""

from __future__ import annotations

import pytest

from torchintro.data.datasets import synthetic
from torchintro.nn import initial_linear
from torchintro.training import baseline
from torchintro.training.fit import fit

optuna = pytest.importorskip("optuna")  # the machine of `make gpu-check` may lack it

from torchintro.tuning import trainer  # noqa: E402
from torchintro.tuning.tune import tune  # noqa: E402

DATA = synthetic(60, seed=3)
X, y = DATA.X, DATA.y


def test_batches_are_of_what_memory_allows(batches, monkeypatch):
    monkeypatch.setattr(trainer, "_BATCH_BYTES", 3 * 2 * 4 * 6)  # three models of two float32
    tune(X, y, n_trials=7, epochs=1)
    tune(X, y, n_trials=4, epochs=1, trials_per_batch=4)
    tune(X.double(), y.double(), n_trials=2, epochs=1)
    tune(X.expand(-1, 100), y, n_trials=2, epochs=1)
    assert [len(batch) for batch in batches] == [3, 3, 1, 3, 1, 1, 1, 1, 1]


def test_values_are_those_of_models_trained_alone(batches):
    train, held_out = (X[:45], y[:45]), (X[45:], y[45:])
    for options in ({}, {"batch_size": 16}, {"optimizer": "adam"}, {"momentum": 0.9, "weight_decay": 0.01}):
        study = tune(*train, n_trials=12, epochs=20, seed=1, validation=held_out, lr=(1e-3, 0.3), **options)
        for trial in study.trials:
            result = fit(
                initial_linear(1, 1, seed=1),
                *train,
                lr=trial.params["lr"],
                epochs=20,
                validation=held_out,
                seed=1,
                engine="autograd",
                **options,
            )
            assert trial.value == pytest.approx(result.validation_losses[-1].item(), rel=2e-4)
            assert trial.user_attrs["train_loss"] == pytest.approx(result.losses[-1].item(), rel=2e-4)
    assert [len(batch) for batch in batches] == [10, 2] * 4


@pytest.mark.parametrize("batch_sizes", [None, [8, 16]])
def test_the_plain_loop_is_timed_once_a_batch_size(monkeypatch, batch_sizes):
    timed = []
    plain = baseline.train_models

    def spy(rows, options, *arguments, **others):
        timed.append((options.batch_size, options.epochs))
        assert options.engine == "reference"
        return plain(rows, options, *arguments, **others)

    monkeypatch.setattr(baseline, "train_models", spy)
    space = batch_sizes and {"batch_size": batch_sizes}
    options = {"n_trials": 15, "epochs": 2, "search_space": space, "validation": 0.2, "seed": 0}
    study = tune(X, y, benchmark=True, **options)
    sizes = batch_sizes or [None]
    assert 3 * len(sizes) <= len(timed) <= 5 * len(sizes)
    assert all(1 <= epochs <= 50 for _, epochs in timed)
    for size in sizes:
        times = {
            trial.user_attrs["reference_seconds_per_epoch"]
            for trial in study.trials
            if trial.params.get("batch_size") == size
        }
        assert len(times) == 1
        assert 0 < times.pop() < 1
    assert all(1 <= trial.user_attrs["reference_epochs"] <= 50 for trial in study.trials)
    assert study.user_attrs["engines"].keys() == {trial.user_attrs["engine"] for trial in study.trials}
    assert all("reference_seconds_per_epoch" not in trial.user_attrs for trial in tune(X, y, **options).trials)


def test_an_engine_that_trains_one_after_the_other_is_recorded_so(batches):
    told = []
    tune(X, y, n_trials=4, epochs=1, engine="autograd", progress=lambda *_: told.append(len(batches)))
    assert told == [1, 2, 3, 4]
    del batches[:], told[:]
    tune(X, y, n_trials=4, epochs=1, engine="fused", progress=lambda *_: told.append(len(batches)))
    assert told == [1, 1, 1, 1]


def test_trials_of_an_equal_batch_size_are_trained_together(monkeypatch):
    groups = []
    train_models = trainer.train_models

    def spy(data, *, lr, options, **others):
        groups.append((options.batch_size, list(lr)))
        return train_models(data, lr=lr, options=options, **others)

    monkeypatch.setattr(trainer, "train_models", spy)
    study = tune(X, y, n_trials=10, epochs=2, search_space={"batch_size": [8, 16, None]}, seed=0)
    assert sorted((size or 0) for size, _ in groups) == [0, 8, 16]
    for size, rates in groups:
        assert rates == [trial.params["lr"] for trial in study.trials if trial.params["batch_size"] == size]
