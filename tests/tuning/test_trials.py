"""What is recorded of trials: pruned, refused, cut off by an error or by Ctrl-C; and what is shown of them."""

from __future__ import annotations

import math

import pytest
import torch

from torchintro.data.datasets import synthetic
from torchintro.nn import initial_linear
from torchintro.training.fit import fit

optuna = pytest.importorskip("optuna")  # the machine of `make gpu-check` may lack it
from optuna.trial import TrialState  # noqa: E402
from studies import Prescribed, lrs, states  # noqa: E402

from torchintro.tuning import trainer, trials  # noqa: E402
from torchintro.tuning.storage import open_storage  # noqa: E402
from torchintro.tuning.tune import best_lr, tune  # noqa: E402

DATA = synthetic(60, seed=3)
X, y = DATA.X, DATA.y


@pytest.mark.parametrize("with_validation", [False, True])
@pytest.mark.parametrize(
    "pruner",
    [
        optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=2),
        optuna.pruners.SuccessiveHalvingPruner(),
        optuna.pruners.HyperbandPruner(max_resource=30),
        optuna.pruners.PercentilePruner(30.0, n_startup_trials=2),
        optuna.pruners.ThresholdPruner(upper=5.0, n_warmup_steps=4),
        optuna.pruners.NopPruner(),
    ],
    ids=lambda pruner: type(pruner).__name__,
)
def test_a_pruner_decides_as_if_trials_came_one_after_the_other(pruner, with_validation):
    rates = [0.05, 0.3, 0.001, 2.0, 0.1, 0.0002, 0.4, 30.0, 0.02, 0.2, 0.0001, 0.5]
    validation = (X[:9], y[:9]) if with_validation else None

    def objective(trial):
        lr = trial.suggest_float("lr", 1e-4, 100.0, log=True)
        model = initial_linear(1, 1, seed=0)
        try:
            result = fit(model, X, y, lr=lr, epochs=30, validation=validation)
            values = result.losses if validation is None else result.validation_losses
        except ArithmeticError as error:
            # Its validation losses are not kept: those of the epochs before, trained again.
            values = torch.tensor([])
            if error.epoch > 1:
                again = fit(initial_linear(1, 1, seed=0), X, y, lr=lr, epochs=error.epoch - 1, validation=validation)
                values = again.losses if validation is None else again.validation_losses
        for epoch, value in enumerate(values.tolist()):
            trial.report(value, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value if len(values) == 30 else math.inf

    with pytest.MonkeyPatch.context() as quiet:
        quiet.setattr(optuna.logging.get_logger("optuna"), "disabled", True)
        expected = optuna.create_study(sampler=Prescribed(rates), pruner=pruner, study_name="s")
        expected.optimize(objective, n_trials=len(rates))
    study = tune(
        X,
        y,
        n_trials=len(rates),
        epochs=30,
        lr=(1e-4, 100.0),
        seed=0,
        validation=validation,
        engine="autograd",
        sampler=Prescribed(rates),
        pruner=pruner,
        trials_per_batch=5,
        study_name="s",  # Hyperband's brackets depend on it
    )
    assert study.pruner is pruner
    assert states(study) == states(expected)
    for trial, other in zip(study.trials, expected.trials, strict=True):
        assert trial.params == other.params
        assert trial.values == pytest.approx(other.values, rel=2e-4)
        assert trial.intermediate_values == pytest.approx(other.intermediate_values, rel=2e-4)
        if trial.state == TrialState.PRUNED:
            assert trial.user_attrs["epochs"] == len(trial.intermediate_values)
            assert "diverged" not in trial.user_attrs
    if not isinstance(pruner, optuna.pruners.NopPruner):
        assert "PRUNED" in states(study)
    assert math.isfinite(study.best_value)


def test_pruned_trials_count_and_are_not_the_best():
    pruner = optuna.pruners.ThresholdPruner(upper=0.0)
    study = tune(X, y, n_trials=12, epochs=5, pruner=pruner, seed=0)
    assert states(study) == ["PRUNED"] * 12
    assert best_lr(study) is None


def test_without_a_pruner_nothing_is_reported():
    study = tune(X, y, n_trials=2, epochs=5)
    assert isinstance(study.pruner, optuna.pruners.NopPruner)
    assert [trial.intermediate_values for trial in study.trials] == [{}, {}]


def test_the_callback_is_given_every_trial_and_may_stop_the_study():
    seen = []

    def callback(study, trial):
        seen.append(trial)
        trial.params.clear()  # its own copy
        if trial.number == 6:
            study.stop()

    study = tune(X, y, n_trials=20, epochs=2, trials_per_batch=4, progress=callback)
    assert [trial.number for trial in seen] == list(range(8))
    assert [trial.value for trial in seen] == [trial.value for trial in study.trials]
    assert all(trial.params for trial in study.trials)
    with pytest.raises(RuntimeError, match="supposed to be invoked inside"):
        study.stop()


def test_what_is_logged(caplog):
    optuna.logging.enable_propagation()
    try:
        pruner = optuna.pruners.ThresholdPruner(upper=5.0, n_warmup_steps=2)
        study = tune(X, y, n_trials=2, epochs=3, sampler=Prescribed([0.3, 1e-4]), pruner=pruner, progress=True, seed=0)
    finally:
        optuna.logging.disable_propagation()
    # Some releases of pytest see a record at its own logger too.
    messages = list(dict.fromkeys(message for message in caplog.messages if message.startswith("Trial")))
    assert states(study) == ["COMPLETE", "PRUNED"]
    assert len(messages) == 2
    for trial, message in zip(study.trials, messages, strict=True):
        expected = f"Trial {trial.number} pruned."
        if trial.state == TrialState.COMPLETE:
            expected = (
                f"Trial {trial.number} finished with value: {trial.value} and parameters: {trial.params}. Best is"
            )
        assert message.startswith(expected)


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


def test_parameters_that_do_not_go_together_are_failed_trials():
    space = {"momentum": [0.0, 0.9], "nesterov": [True, False]}
    seen = []
    study = tune(X, y, n_trials=20, epochs=2, search_space=space, seed=0, progress=lambda _, trial: seen.append(trial))
    assert {trial.number for trial in seen} == {trial.number for trial in study.trials}
    refused = [trial for trial in study.trials if trial.state.name == "FAIL"]
    assert len(study.trials) - len(refused) == 20
    assert refused
    for trial in study.trials:
        assert (trial in refused) == (trial.params["nesterov"] and trial.params["momentum"] == 0.0)
        if trial in refused:
            assert "Nesterov momentum requires a momentum" in trial.user_attrs["refused"]


def test_a_search_in_which_nothing_goes_together_ends(monkeypatch):
    class Unlucky(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, param_name, param_distribution):
            values = {"momentum": 0.0, "nesterov": True, "lr": 0.01}
            return values[param_name]

    monkeypatch.setattr(trials, "_MOST_REFUSED", 12)
    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(ValueError, match=r"^tune: search_space must hold values that go together, but 12 trials"):
        tune(
            X,
            y,
            n_trials=5,
            search_space={"momentum": [0.0, 0.9], "nesterov": [True, False]},
            sampler=Unlucky(),
            storage=storage,
            study_name="s",
        )
    assert {t.state.name for t in optuna.load_study(study_name="s", storage=storage).trials} == {"FAIL"}


def test_enqueued_trials_come_first_even_if_they_cannot_be():
    options = {"epochs": 1, "storage": optuna.storages.InMemoryStorage(), "study_name": "s"}
    options["search_space"] = {"momentum": (0.0, 0.9)}
    study = tune(X, y, n_trials=1, **options)
    study.enqueue_trial({"momentum": -1.0})
    study.enqueue_trial({"lr": 3.0, "momentum": 0.5})
    with pytest.warns(UserWarning, match="out of range"):
        study = tune(X, y, n_trials=4, **options)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL"] + ["COMPLETE"] * 3
    assert study.trials[1].params["momentum"] == -1.0
    assert study.trials[1].user_attrs["refused"].startswith("tune: momentum must be a finite number of at least 0")
    assert study.trials[2].params == {"lr": 3.0, "momentum": 0.5}
    study.enqueue_trial({"lr": -0.1})
    with pytest.raises(ValueError, match=r"`-0.1` is invalid value"):  # Optuna's, as study.optimize raises it
        tune(X, y, n_trials=5, **options)
    states = [trial.state.name for trial in tune(X, y, n_trials=5, **options).trials]
    assert states[5:] == ["FAIL", "COMPLETE"]


def test_an_error_in_training_leaves_failed_trials(monkeypatch):
    storage = optuna.storages.InMemoryStorage()
    options = {"epochs": 1, "seed": 0, "storage": storage, "study_name": "s"}
    with monkeypatch.context() as broken:

        def out_of_memory(*arguments, **options):
            raise RuntimeError("out of memory")

        broken.setattr(trainer, "train_models", out_of_memory)
        with pytest.raises(RuntimeError, match=r"^out of memory$"):
            tune(X, y, n_trials=4, **options)
    study = tune(X, y, n_trials=4, **options)
    assert states(study) == ["FAIL"] * 4 + ["COMPLETE"] * 4


def test_ctrl_c_while_a_batch_is_trained_together(monkeypatch):
    storage = optuna.storages.InMemoryStorage()
    options = {"epochs": 2, "seed": 0, "storage": storage, "study_name": "s"}
    with monkeypatch.context() as interrupted:

        def interrupt(*arguments, **options):
            raise KeyboardInterrupt

        interrupted.setattr("torchintro.training.train._drive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tune(X, y, n_trials=6, **options)
    study = tune(X, y, n_trials=6, **options)
    assert states(study) == ["FAIL"] * 6 + ["COMPLETE"] * 6


@pytest.mark.parametrize("interrupted", [0, 7, 9])
def test_ctrl_c_within_a_batch(tmp_path, interrupted):
    options = {
        "epochs": 2,
        "seed": 0,
        "storage": open_storage(f"sqlite:///{tmp_path}/study.db" if interrupted == 7 else tmp_path / "study.journal"),
        "study_name": "s",
        "trials_per_batch": 5,
    }

    def stop(study, trial):
        if trial.number == interrupted:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(X, y, n_trials=12, progress=stop, **options)
    asked = 5 * (interrupted // 5 + 1)
    before = states(optuna.load_study(study_name="s", storage=options["storage"]))
    assert before == ["COMPLETE"] * (interrupted + 1) + ["FAIL"] * (asked - interrupted - 1)
    study = tune(X, y, n_trials=12, **options)
    assert states(study) == before + ["COMPLETE"] * (12 - interrupted - 1)
    assert len({trial.params["lr"] for trial in study.trials}) == len(study.trials)


def test_ctrl_c_while_the_sampler_draws():
    class Slow(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, param_name, param_distribution):
            if trial.number == 2:
                raise KeyboardInterrupt
            return super().sample_independent(study, trial, param_name, param_distribution)

    storage, sampler = optuna.storages.InMemoryStorage(), Slow()
    with pytest.raises(KeyboardInterrupt):
        tune(X, y, n_trials=5, epochs=1, storage=storage, study_name="s", sampler=sampler)
    assert states(optuna.load_study(study_name="s", storage=storage)) == ["FAIL"] * 3


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
