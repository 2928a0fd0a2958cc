"""How many trials are asked for at once, and how far apart their learning rates are."""

from __future__ import annotations

import itertools
import math

import pytest

from torchintro.data.datasets import synthetic

optuna = pytest.importorskip("optuna")  # the machine of `make gpu-check` may lack it
from optuna.distributions import CategoricalDistribution, FloatDistribution  # noqa: E402
from studies import Prescribed, states  # noqa: E402

from torchintro.tuning.tune import tune  # noqa: E402

DATA = synthetic(60, seed=3)
X, y = DATA.X, DATA.y
LOW, HIGH = 1e-4, 1e-1


class Stubborn(optuna.samplers.RandomSampler):
    """Draws the same learning rate again and again."""

    def sample_independent(self, study, trial, param_name, param_distribution):
        return 0.01 if param_name == "lr" else super().sample_independent(study, trial, param_name, param_distribution)


def positions(rates):
    return sorted(math.log(rate / LOW) / math.log(HIGH / LOW) for rate in rates)


def gaps(rates):
    return [after - before for before, after in itertools.pairwise(positions(rates))]


@pytest.mark.parametrize(
    ("sampler", "arguments", "expected"),
    [
        (None, {}, [10, 5, 5]),
        (None, {"n_trials": 60}, [10, 5, 5, 5, 6, 7, 9, 11, 2]),
        (None, {"n_trials": 3}, [3]),
        (None, {"trials_per_batch": 1, "n_trials": 3}, [1, 1, 1]),
        (None, {"trials_per_batch": 8}, [8, 8, 4]),
        (optuna.samplers.TPESampler(n_startup_trials=3), {"n_trials": 9}, [3, 5, 1]),
        (optuna.samplers.RandomSampler(seed=0), {}, [20]),
        ("QMCSampler", {"n_trials": 7}, [7]),
        (optuna.samplers.NSGAIISampler(seed=0), {"n_trials": 9}, [4, 4, 1]),
        (optuna.samplers.GridSampler({"lr": [0.001, 0.01, 0.1]}), {"n_trials": 2}, [2]),
        (optuna.samplers.GridSampler({"lr": [0.001, 0.01, 0.1]}), {}, [3]),  # which is then at its end
    ],
)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_batches(batches, sampler, arguments, expected):
    if sampler == "QMCSampler":
        sampler = optuna.samplers.QMCSampler(seed=0)
    study = tune(X, y, epochs=1, seed=0, sampler=sampler, **arguments)
    assert [len(batch) for batch in batches] == expected
    # A trial holds what was trained.
    assert [trial.params["lr"] for trial in study.trials] == [rate for batch in batches for rate in batch]
    assert set(states(study)) == {"COMPLETE"}
    assert sampler is None or study.sampler is sampler


def test_a_study_that_goes_on_fills_the_first_batch_up(batches):
    options = {"epochs": 1, "seed": 0, "storage": optuna.storages.InMemoryStorage(), "study_name": "s"}
    tune(X, y, n_trials=4, **options)
    tune(X, y, n_trials=17, **options)
    assert [len(batch) for batch in batches] == [4, 6, 5, 2]


@pytest.mark.parametrize("seed", range(5))
def test_no_two_learning_rates_of_a_batch_are_nearly_equal(batches, seed):
    tune(X, y, n_trials=60, epochs=2, seed=seed)
    assert min(gap for batch in batches if len(batch) > 1 for gap in gaps(batch)) >= 0.02 - 1e-9
    assert all(LOW <= rate <= HIGH for batch in batches for rate in batch)


@pytest.mark.parametrize("size", [2, 20, 50])
def test_what_is_drawn_too_close_is_moved_to_the_nearest_place(batches, size):
    study = tune(X, y, n_trials=size, epochs=1, sampler=Stubborn())
    assert batches == [[trial.params["lr"] for trial in study.trials]]
    assert study.trials[0].params["lr"] == 0.01
    gap = min(0.02, 0.4 / size)
    assert gaps(batches[0]) == pytest.approx([gap] * (size - 1))


def test_of_trials_that_differ_otherwise_too_none_is_moved(batches):
    tune(X, y, n_trials=6, epochs=1, sampler=Stubborn(), search_space={"momentum": (0.1, 0.9)})
    assert batches == [[0.01] * 6]


@pytest.mark.parametrize("rates", [[0.01, 0.01, 0.0101]])
def test_what_is_prescribed_is_not_moved(batches, rates):
    tune(X, y, n_trials=3, epochs=1, sampler=Prescribed(rates), trials_per_batch=3)
    options = {"epochs": 1, "storage": optuna.storages.InMemoryStorage(), "study_name": "s", "trials_per_batch": 5}
    study = tune(X, y, n_trials=1, **options)
    for rate in rates:
        study.enqueue_trial({"lr": rate})
    tune(X, y, n_trials=6, **options)
    assert batches[0] == rates
    assert batches[2][:3] == rates
    assert min(gaps(batches[2][2:])) >= 0.02 - 1e-9  # but what is drawn keeps off it


def test_what_is_drawn_with_the_others_is_moved_too(batches):
    """A sampler that draws all parameters of a trial at once, as multivariate TPE does."""

    class Together(optuna.samplers.RandomSampler):
        def infer_relative_search_space(self, study, trial):
            return {"lr": FloatDistribution(LOW, HIGH, log=True), "momentum": CategoricalDistribution([0.0, 0.9])}

        def sample_relative(self, study, trial, search_space):
            return {"lr": 0.01, "momentum": [0.0, 0.9][trial.number % 2]}

    study = tune(X, y, n_trials=6, epochs=1, search_space={"momentum": [0.0, 0.9]}, sampler=Together())
    for momentum in (0.0, 0.9):
        rates = [trial.params["lr"] for trial in study.trials if trial.params["momentum"] == momentum]
        assert rates[0] == 0.01
        assert gaps(rates) == pytest.approx([0.02] * 2)


def test_two_calls_with_one_seed_draw_other_learning_rates():
    options = {"epochs": 1, "seed": 0, "storage": optuna.storages.InMemoryStorage(), "study_name": "s"}
    tune(X, y, n_trials=5, **options)
    rates = [trial.params["lr"] for trial in tune(X, y, n_trials=10, **options).trials]
    assert len(set(rates)) == 10
