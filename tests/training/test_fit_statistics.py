"""Training and tuning on second moments gathered before, and their standardisation, against the same on the rows."""

from __future__ import annotations

import functools

import pytest
import torch

import torchintro
from torchintro import DivergedError, LinearStatistics, fit
from torchintro.nn import Standardize, initial_linear


@pytest.fixture
def rows():
    """Features of different units, one of them constant, and two targets."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(500, 4, generator=generator) * torch.tensor([1.0, 100.0, 1e-3, 0.0])
    X += torch.tensor([5.0, 1e4, 0.0, 7.1])
    y = X[:, :2] * torch.tensor([2.0, 0.03]) + torch.randn(500, 2, generator=generator)
    return X, y


def gathered(X, y, *, parts=3, weight=None):
    statistics = LinearStatistics(X.shape[1], y.shape[1])
    weights = [None] * parts if weight is None else torch.chunk(weight, parts)
    for some_X, some_y, some_weight in zip(torch.chunk(X, parts), torch.chunk(y, parts), weights, strict=True):
        statistics.update(some_X, some_y, some_weight)
    return statistics


def close(actual, expected, tolerance=1e-10):
    """Compare statistics by what they are about: deviations and correlations."""
    deviation_x, deviation_y = (s.sqrt() for s in (expected.sxx.diagonal(), expected.syy))
    deviation_x = torch.where(deviation_x > 0, deviation_x, 1.0)
    scales = (1, deviation_x, deviation_y, deviation_x.outer(deviation_x), deviation_x.outer(deviation_y), expected.syy)
    for own, other, scale in zip(actual.tensors, expected.tensors, scales, strict=True):
        assert ((own - other).abs() <= tolerance * scale + 1e-300).all()


def test_standardized_is_what_the_standardised_rows_have(rows):
    X, y = (tensor.double() for tensor in rows)
    scaled, standardize = gathered(X, y).standardized(dtype=torch.float64)
    expected = Standardize.fit(X)
    assert torch.allclose(standardize.mean, expected.mean, rtol=1e-14)
    assert torch.allclose(standardize.scale, expected.scale, rtol=1e-10)
    assert standardize.scale[3] == 1
    close(scaled, gathered(standardize(X), y))
    assert scaled.mean_x.abs().max() < 1e-12
    assert torch.allclose(scaled.sxx.diagonal()[:3], torch.full((3,), 500.0, dtype=torch.float64))


def test_a_module_in_float32_is_reckoned_with_as_it_is(rows):
    X, y = rows
    statistics = gathered(X, y)
    before = [moment.clone() for moment in statistics.tensors]
    scaled, standardize = statistics.standardized()
    assert standardize.mean.dtype == torch.float32
    close(scaled, gathered(standardize.double()(X.double()), y))
    assert all(torch.equal(own, was) for own, was in zip(statistics.tensors, before, strict=True))


def test_held_out_rows_are_scaled_as_the_training_rows(rows):
    X, y = rows
    _, standardize = gathered(X[:400], y[:400]).standardized()
    scaled, same = gathered(X[400:], y[400:], parts=1).standardized(standardize)
    assert same is standardize
    close(scaled, gathered(standardize.double()(X[400:].double()), y[400:]))
    assert scaled.mean_x[:3].abs().min() > 1e-4  # they have means of their own


def test_weights_count_in_mean_and_deviation(rows):
    X, y = rows
    weight = torch.arange(500) % 3
    _, standardize = gathered(X, y, weight=weight).standardized()
    expected = Standardize.fit(X.repeat_interleave(weight, 0))
    assert torch.allclose(standardize.mean, expected.mean)
    assert torch.allclose(standardize.scale, expected.scale)


@pytest.mark.parametrize("value", [0.1, -1e20, 3e-30, 0.0])
def test_constant_columns_leave_nothing_behind(value):
    X = torch.full((1000, 2), value)
    X[:, 1] = torch.linspace(-1, 1, 1000)
    scaled, standardize = gathered(X, X[:, 1:], parts=7).standardized()
    assert standardize.scale[0] == 1
    assert standardize.mean[0] == X[0, 0]
    assert scaled.mean_x[0] == 0
    assert not scaled.sxx[0].any()
    assert not scaled.sxy[0].any()


def test_what_cannot_be_standardised_is_said(rows):
    statistics = gathered(*rows)
    with pytest.raises(ValueError, match=r"^LinearStatistics.standardized: the statistics must have at least one row"):
        LinearStatistics(1, 1).standardized()
    with pytest.raises(TypeError, match=r"^LinearStatistics.standardized: dtype must be a floating-point type, .*int"):
        statistics.standardized(dtype=torch.int32)
    with pytest.raises(TypeError, match=r"standardized: standardize must be a Standardize, but got Linear$"):
        statistics.standardized(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"^LinearStatistics.standardized: standardize must be for 4 features, .* 1$"):
        statistics.standardized(Standardize(torch.zeros(1), torch.ones(1)))
    wide = LinearStatistics(1, 1).update(torch.tensor([[1e60], [2e60]], dtype=torch.float64), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"must be within float32$"):
        wide.standardized()
    assert wide.standardized(dtype=torch.float64)[0].sxx.item() == pytest.approx(2)
    small = Standardize(torch.zeros(4), torch.full((4,), 1e-200, dtype=torch.float64).float().clamp_min(1e-38))
    with pytest.raises(ValueError, match="these overflow: scale them down"):
        LinearStatistics(4, 1).update(torch.randn(9, 4).double() * 1e140, torch.zeros(9, 1)).standardized(small)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"optimizer": "adamw", "weight_decay": 0.01}])
def test_fit_is_that_of_the_rows(rows, options):
    X, y = rows
    standardize = Standardize.fit(X[:400])
    Z = standardize(X)
    on_rows, on_statistics = (initial_linear(4, 2, seed=0) for _ in range(2))
    options |= {"lr": 0.05, "epochs": 40}
    expected = fit(on_rows, Z[:400], y[:400], validation=(Z[400:], y[400:]), engine="autograd", **options)
    parts = gathered(Z[:400], y[:400]), gathered(Z[400:], y[400:])
    result = fit(on_statistics, parts[0], validation=parts[1], **options)
    assert (result.engine, result.reason) == ("statistics", "second moments instead of rows")
    assert torch.allclose(result.losses, expected.losses, rtol=1e-4)
    assert torch.allclose(result.validation_losses, expected.validation_losses, rtol=1e-4)
    assert torch.allclose(on_statistics.weight, on_rows.weight, rtol=1e-3, atol=1e-3)
    assert fit(on_statistics, parts[0], lr=0.01, epochs=1, engine="statistics").reason == "asked for"


def test_divergence_leaves_the_last_finite_parameters(rows):
    model = initial_linear(4, 2, seed=0)
    with pytest.raises(DivergedError, match=r"^fit: the loss became inf in epoch \d+ with lr=0.1") as caught:
        fit(model, gathered(*rows), lr=0.1)  # of features in their own units
    assert torch.isfinite(model.weight).all()
    assert len(caught.value.losses) == caught.value.epoch - 1


def test_a_reporter_may_hear_later(rows):
    heard = []

    class Reporter:
        def begin(self, engine, reason):
            heard.append((engine, reason))

        def __call__(self, epoch, loss):
            heard.append((epoch, loss))

    result = fit(initial_linear(4, 2), gathered(*rows).standardized()[0], lr=0.1, epochs=30, progress=Reporter())
    assert heard == [("statistics", result.reason), *enumerate(result.losses.tolist(), 1)]


BAD_CALLS = [
    ({"y": torch.zeros(500, 2)}, TypeError, "y must be None with LinearStatistics, which have their own .* Tensor"),
    ({"batch_size": 10}, ValueError, "batch_size must be None with LinearStatistics, which have no rows to cut, .* 10"),
    ({"engine": "fused"}, ValueError, "engine must be 'statistics' or 'auto' with LinearStatistics, .*'fused'"),
    ({"optimizer": "rmsprop"}, ValueError, "no engine trains on LinearStatistics with the optimizer RMSprop"),
    ({"validation": 0.2}, TypeError, "validation must be LinearStatistics or None, as X is, but got float"),
    ({"validation": LinearStatistics(3, 2)}, ValueError, "validation must be of 4 features and 2 targets, .* 3 and 2"),
    ({"validation": LinearStatistics(4, 2)}, ValueError, "validation must have at least one row of positive weight"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS)
@pytest.mark.parametrize("function", ["fit", "tune"])
def test_bad_calls_say_what_is_wrong(rows, function, arguments, error, message):
    pytest.importorskip("optuna")
    train = functools.partial(fit, initial_linear(4, 2), lr=0.1) if function == "fit" else torchintro.tune
    with pytest.raises(error, match=rf"^{function}: {message}"):
        train(gathered(*rows), **{"y": None} | arguments)


def test_the_model_must_fit(rows):
    with pytest.raises(ValueError, match=r"^fit: X must be statistics of 3 features and 2 targets, .* 4 and 2$"):
        fit(initial_linear(3, 2), gathered(*rows), lr=0.1)
    with pytest.raises(ValueError, match=r"^fit: X must have at least one row of positive weight, but has none$"):
        fit(initial_linear(3, 2), LinearStatistics(3, 2), lr=0.1)
    with pytest.raises(ValueError, match=r"^fit: no engine trains on LinearStatistics with bfloat16 parameters"):
        fit(initial_linear(4, 2, dtype=torch.bfloat16), gathered(*rows), lr=0.1)


def test_a_study_on_statistics_is_that_of_the_rows(rows, tmp_path):
    pytest.importorskip("optuna")
    from torchintro import tune

    X, y = rows
    Z = Standardize.fit(X)(X)
    train, held_out = gathered(Z[:400], y[:400]), gathered(Z[400:], y[400:])
    options = {"n_trials": 6, "epochs": 30, "lr": (1e-3, 0.5), "seed": 0}
    study = tune(train, validation=held_out, **options)
    expected = tune(Z[:400], y[:400], validation=(Z[400:], y[400:]), engine="autograd", **options)
    assert [trial.params for trial in study.trials] == [trial.params for trial in expected.trials]
    for own, other in zip(study.trials, expected.trials, strict=True):
        assert own.value == pytest.approx(other.value, rel=1e-3)
        assert own.user_attrs["engine"] == "statistics"

    stored = {"storage": f"sqlite:///{tmp_path / 'study.db'}", "study_name": "s"}
    tune(train, validation=held_out, **options, **stored)
    tune(gathered(Z[:400], y[:400]), validation=held_out, **options, **stored)  # the same rows: it goes on
    with pytest.raises(ValueError, match=r"^tune: the study 's' was made with statistics \(SHA-256\)="):
        tune(gathered(Z[:400], 2 * y[:400]), validation=held_out, **options, **stored)
