"""What tune searches beside the learning rate: each hyper-parameter, and every mistake in saying so."""

from __future__ import annotations

import math

import pytest

from torchintro.data.datasets import synthetic
from torchintro.nn import initial_linear
from torchintro.training.fit import fit

optuna = pytest.importorskip("optuna")  # the machine of `make gpu-check` may lack it
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402

from torchintro.tuning.tune import tune  # noqa: E402

DATA = synthetic(60, seed=3)
X, y = DATA.X, DATA.y


@pytest.mark.parametrize(
    ("name", "values", "arguments", "distribution"),
    [
        ("momentum", (0.0, 0.95), {}, FloatDistribution(0.0, 0.95)),
        ("momentum", [0.0, 0.5, 0.9], {}, CategoricalDistribution([0.0, 0.5, 0.9])),
        ("momentum", FloatDistribution(0.1, 0.9, step=0.2), {}, FloatDistribution(0.1, 0.9, step=0.2)),
        ("weight_decay", (1e-5, 0.1), {}, FloatDistribution(1e-5, 0.1, log=True)),
        ("weight_decay", (0, 1), {}, FloatDistribution(0.0, 1.0)),
        ("batch_size", (4, 60), {}, IntDistribution(4, 60, log=True)),
        ("batch_size", [7, 30, None], {}, CategoricalDistribution([7, 30, None])),
        ("dampening", (0.0, 0.5), {"momentum": 0.9}, FloatDistribution(0.0, 0.5)),
        ("nesterov", [True, False], {"momentum": 0.9}, CategoricalDistribution([True, False])),
        ("eps", (1e-10, 1e-2), {"optimizer": "adam"}, FloatDistribution(1e-10, 1e-2, log=True)),
        ("amsgrad", [False, True], {"optimizer": "AdamW"}, CategoricalDistribution([False, True])),
        ("alpha", (0.5, 0.999), {"optimizer": "rmsprop"}, FloatDistribution(0.5, 0.999)),
        ("centered", [True], {"optimizer": "rmsprop"}, CategoricalDistribution([True])),
        ("max_iter", (1, 3), {"optimizer": "lbfgs"}, IntDistribution(1, 3)),
    ],
)
def test_every_kind_of_parameter(name, values, arguments, distribution):
    options = {"epochs": 6, "seed": 2, **arguments}
    study = tune(X, y, n_trials=8, search_space={name: values}, lr=(1e-3, 1e-1), **options)
    drawn = [trial.params[name] for trial in study.trials]
    assert all(trial.state.name == "COMPLETE" for trial in study.trials)
    assert [trial.distributions[name] for trial in study.trials] == [distribution] * 8
    assert len(set(drawn)) > 1 or distribution.single()
    if isinstance(values, tuple):
        assert all(values[0] <= value <= values[1] for value in drawn)
    for trial, value in zip(study.trials, drawn, strict=True):
        named = {name: value} if name in ("momentum", "weight_decay", "batch_size") else {}
        others = {} if named else {"optimizer_options": {name: value}}
        model = initial_linear(1, 1, seed=2)
        result = fit(model, X, y, lr=trial.params["lr"], engine="autograd", **(options | named | others))
        assert trial.value == pytest.approx(result.losses[-1].item(), rel=2e-4)


def test_several_at_once_with_the_sampler_learning():
    space = {"momentum": (0.0, 0.9), "weight_decay": [0.0, 0.01], "nesterov": [False]}
    study = tune(X, y, n_trials=20, epochs=3, search_space=space, seed=0)
    assert all(trial.params.keys() == {"lr", "momentum", "weight_decay", "nesterov"} for trial in study.trials)
    again = tune(X, y, n_trials=20, epochs=3, search_space=space, seed=0)
    assert [trial.params for trial in study.trials] == [trial.params for trial in again.trials]


def test_the_others_of_a_trial_keep_equal_learning_rates_together():
    class Stubborn(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, param_name, param_distribution):
            return 0.01 if param_name == "lr" else [0.0, 0.9][trial.number % 2]

    study = tune(X, y, n_trials=6, epochs=1, search_space={"momentum": [0.0, 0.9]}, sampler=Stubborn())
    for momentum in (0.0, 0.9):
        rates = [trial.params["lr"] for trial in study.trials if trial.params["momentum"] == momentum]
        assert rates[0] == 0.01
        assert len(set(rates)) == 3


TAKEN = "must hold values that the optimizer takes"
PAIR = r"a pair \(low, high\), a list of choices or an Optuna distribution"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"search_space": ["momentum"]}, TypeError, "search_space must be a mapping, but got list"),
        ({"search_space": {"lr": (0.1, 1.0)}}, ValueError, "search_space holds 'lr', which is a named argument"),
        (
            {"search_space": {"moment": (0.1, 1.0)}},
            ValueError,
            "search_space holds 'moment', which is not an argument of SGD",
        ),
        ({"search_space": {1: (0.1, 1.0)}}, ValueError, "search_space holds 1, which is not an argument of SGD"),
        ({"search_space": {"params": [1]}}, ValueError, "search_space holds 'params', which is not an argument of SGD"),
        (
            {"search_space": {"momentum": (0.1, 0.9)}, "optimizer": "adam"},
            ValueError,
            "search_space holds 'momentum', which is not an argument of Adam",
        ),
        (
            {"search_space": {"momentum": (0.1, 0.9)}, "optimizer": "sdg"},
            ValueError,
            "optimizer must be one of ASGD.* but got 'sdg'",
        ),
        (
            {"search_space": {"momentum": (0.1, 0.9)}, "momentum": 0.5},
            ValueError,
            "search_space holds 'momentum', which is given as 0.5 too",
        ),
        (
            {"search_space": {"weight_decay": (0.1, 0.9)}, "weight_decay": 0.5},
            ValueError,
            "search_space holds 'weight_decay', which is given as 0.5 too",
        ),
        (
            {"search_space": {"batch_size": [8]}, "batch_size": 8},
            ValueError,
            "search_space holds 'batch_size', which is given as 8 too",
        ),
        (
            {"search_space": {"dampening": (0.0, 0.5)}, "optimizer_options": {"dampening": 0.0}},
            ValueError,
            "search_space holds 'dampening', which is given as 0.0 too",
        ),
        ({"search_space": {"momentum": 0.9}}, TypeError, rf"search_space\['momentum'\] must be {PAIR}, but got 0.9"),
        ({"search_space": {"momentum": []}}, TypeError, rf"search_space\['momentum'\] must be {PAIR}, but got \[\]"),
        (
            {"search_space": {"momentum": (0.1,)}},
            TypeError,
            rf"search_space\['momentum'\] must be {PAIR}, but got \(0.1,",
        ),
        (
            {"search_space": {"momentum": (0.9, 0.1)}},
            ValueError,
            r"search_space\['momentum'\] must be a pair \(low, high\) of finite numbers, low < high, but got",
        ),
        (
            {"search_space": {"momentum": (0.1, math.inf)}},
            ValueError,
            r"search_space\['momentum'\] must be a pair .* but got \(0.1, inf\)",
        ),
        (
            {"search_space": {"momentum": ("a", "b")}},
            TypeError,
            r"search_space\['momentum'\] must be a pair of numbers, but got \('a', 'b'\)",
        ),
        (
            {"search_space": {"nesterov": (False, True)}},
            TypeError,
            r"search_space\['nesterov'\] must be a pair of numbers, but got \(False, True\)",
        ),
        (
            {"search_space": {"batch_size": (8.0, 16.0)}},
            TypeError,
            r"search_space\['batch_size'\] must be a pair of integers, but got \(8.0, 16.0\)",
        ),
        (
            {"search_space": {"batch_size": [0, 8]}},
            ValueError,
            r"search_space\['batch_size'\] must hold integers of at least 1 or None, but got 0",
        ),
        (
            {"search_space": {"batch_size": [True]}},
            ValueError,
            r"search_space\['batch_size'\] must hold integers of at least 1 or None, but got True",
        ),
        (
            {"search_space": {"batch_size": FloatDistribution(1.0, 8.0)}},
            ValueError,
            r"search_space\['batch_size'\] must hold integers of at least 1 or None, but got 1.0",
        ),
        (
            {"search_space": {"momentum": [(0.1, 0.2)]}},
            TypeError,
            r"search_space\['momentum'\] must hold numbers, booleans, None or strings, but got \(0.1, 0.2\)",
        ),
        (
            {"search_space": {"momentum": [0.9, -1.0]}},
            ValueError,
            rf"search_space\['momentum'\] {TAKEN}, but got -1.0: momentum must",
        ),
        (
            {"search_space": {"momentum": ["much"]}},
            ValueError,
            rf"search_space\['momentum'\] {TAKEN}, but got 'much': momentum must be",
        ),
        (
            {"search_space": {"nesterov": [True, False]}},
            ValueError,
            rf"search_space\['nesterov'\] {TAKEN}, but got True: optimizer SGD refused",
        ),
        (
            {"search_space": {"eps": (-1.0, 1.0)}, "optimizer": "adam"},
            ValueError,
            rf"search_space\['eps'\] {TAKEN}, but got -1.0: optimizer Adam refused",
        ),
        (
            {"search_space": {"eps": (1e-9, 1e-7)}, "optimizer": "adam", "optimizer_options": {"beta": 1}},
            ValueError,
            rf"search_space\['eps'\] {TAKEN}, but got 1e-09: optimizer_options holds 'beta'",
        ),
    ],
)
def test_bad_search_spaces(arguments, error, message):
    with pytest.raises(error, match=f"^tune: {message}") as caught:
        tune(X, y, **arguments)
    assert "\n" not in str(caught.value)
