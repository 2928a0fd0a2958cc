"""Metrics and predictions: against scikit-learn's, in every mode and on every shape."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from torchintro import LinearStatistics, open_table
from torchintro.evaluation import evaluate, predict
from torchintro.nn import Standardize, initial_linear

X5 = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
y5 = X5[:, :2] + 1
NAN = X5.clone()
NAN[2, 1] = math.nan


def problem(rows=37, outputs=2, dtype=torch.float64, device="cpu"):
    X = torch.randn(rows, 3, dtype=dtype, device=device)
    return X, X @ torch.randn(3, outputs, dtype=dtype, device=device) + 0.5


def model_for(X, y):
    return initial_linear(X.shape[1], y.shape[1], seed=1, dtype=X.dtype, device=X.device)


@pytest.mark.parametrize("outputs", [1, 3])
def test_against_scikit_learn(device, outputs):
    metrics = pytest.importorskip("sklearn.metrics")
    X, y = problem(rows=40_000, outputs=outputs, device=device)  # more rows than a chunk has
    model = model_for(X, y)
    predicted = model(X).detach().cpu().numpy()
    result = evaluate(model, X, y)
    y = y.cpu().numpy()
    mse = metrics.mean_squared_error(y, predicted)
    expected = {
        "mse": mse,
        "rmse": math.sqrt(mse),
        "mae": metrics.mean_absolute_error(y, predicted),
        "r2": metrics.r2_score(y, predicted),
    }
    # Sums of 40,000 terms of one sign in float64.
    assert result == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("constant", [0.5, 0.1])
def test_constant_targets(device, constant):
    metrics = pytest.importorskip("sklearn.metrics")
    y = torch.full((10, 3), constant, dtype=torch.float64)
    y[:, 2] = torch.arange(10.0)
    predicted = y.clone()
    predicted[0, 1] += 1
    predicted[0, 2] += 1
    # At 0.1 the rounding of the mean keeps scikit-learn from seeing that the column is constant.
    expected = metrics.r2_score(y, predicted) if constant == 0.5 else (1 + 0 + 1 - 1 / 82.5) / 3
    assert evaluate(nn.Identity(), predicted.to(device), y.to(device))["r2"] == pytest.approx(expected, rel=1e-14)


def test_accumulates_in_float64(device):
    # 1e8 + 1 is 1e8 in float32, so a float32 sum of these squared errors loses all the ones.
    errors = torch.cat([torch.tensor([[1e4]]), torch.ones(20_000, 1)]).to(device)
    assert evaluate(nn.Identity(), errors, torch.zeros_like(errors))["mse"] == pytest.approx(
        (1e8 + 20_000) / 20_001, rel=1e-12
    )


def test_one_row_has_no_r2(device):
    result = evaluate(nn.Identity(), torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device))
    assert math.isnan(result["r2"])
    assert result["mse"] == 1


def test_leaves_the_mode_and_takes_no_gradients():
    seen = []

    class Probe(nn.Module):
        def forward(self, input):
            seen.append((self.training, torch.is_grad_enabled()))
            return input

    model = nn.Sequential(Probe(), nn.Dropout(0.5), nn.BatchNorm1d(2))
    model[1].eval()
    evaluate(model, torch.ones(4, 2), torch.ones(4, 2))
    assert seen == [(False, False)]
    assert [module.training for module in model.modules()] == [True, True, False, True]
    with pytest.raises(ValueError, match="evaluate: y must have shape"):
        evaluate(model, torch.ones(4, 2), torch.ones(4, 3))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert torch.is_grad_enabled()


def test_moves_the_data_to_the_model(device):
    X, y = problem(dtype=torch.float32)
    model = model_for(X, y).to(device)
    expected = evaluate(model, X.to(device), y.to(device))
    assert evaluate(model, X.double().numpy(), y.numpy()) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("model", "X", "y", "error", "message"),
    [
        (print, X5, y5, TypeError, "evaluate: model must be an nn.Module, but got builtin_function_or_method"),
        (
            nn.Identity(),
            X5,
            y5,
            ValueError,
            r"evaluate: y must have shape \(5, 3\), the prediction's, but got \(5, 2\)",
        ),
        (
            nn.Identity(),
            X5[:, :1],
            y5[:, 0],
            ValueError,
            r"evaluate: y must have shape \(5, 1\), .*use y.unsqueeze",
        ),
        (nn.Identity(), X5, X5[:4], ValueError, r"evaluate: y must have 5 rows, as X has, but got shape \(4, 3\)"),
        (nn.Identity(), NAN, X5, ValueError, r"evaluate: X must be finite, but element \[2, 1\] is nan"),
        (nn.Identity(), X5, NAN, ValueError, r"evaluate: y must be finite, but element \[2, 1\] is nan"),
        (nn.Identity(), X5[:0], X5[:0], ValueError, "evaluate: X must have at least one row"),
        (nn.LSTM(3, 2), X5, y5, TypeError, "evaluate: model must return a tensor, but returned tuple"),
    ],
)
def test_bad_calls(model, X, y, error, message):
    with pytest.raises(error, match=f"^{message}"):
        evaluate(model, X, y)


def test_predict(device):
    X, y = problem(rows=20_000, device=device)
    model = model_for(X, y)
    prediction = predict(model, X)
    assert not prediction.requires_grad
    assert prediction.device.type == "cpu"
    assert (prediction - model(X).cpu()).abs().max() < 16 * torch.finfo(torch.float64).eps * prediction.abs().max()


def test_a_model_of_nan_scores_nan(device):
    model = torch.nn.Linear(2, 1, device=device)
    torch.nn.init.constant_(model.weight, float("nan"))
    assert math.isnan(evaluate(model, torch.randn(10, 2, device=device), torch.randn(10, 1, device=device))["r2"])


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".parquet"])
def test_a_table_is_judged_as_its_rows(suffix, tmp_path):
    rows = 40_000  # several chunks
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(rows, 4, generator=generator) * 10
    columns[:, 3] = 2.5
    columns[:, 2] += 1000
    path = tmp_path / f"table{suffix}"
    names = ["a", "b", "c", "d"]
    if suffix == ".npy":
        np.save(path, columns.numpy())
        names = ["0", "1", "2", "3"]
    elif suffix == ".csv":
        header = ",".join(names)
        np.savetxt(path, columns.numpy(), fmt="%.9g", delimiter=",", header=header, comments="")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")

        parquet.write_table(pyarrow.table(dict(zip(names, columns.numpy().T, strict=True))), path)
    if suffix != ".npy":
        pytest.importorskip("pyarrow")
    table = open_table(path, target=names[2:])
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    X, y = columns[:, :2], columns[:, 2:]
    assert evaluate(model, table) == pytest.approx(evaluate(model, X, y), rel=1e-6)
    exact = nn.Linear(2, 1)  # a constant target that is met counts 1, as in memory
    with torch.no_grad():
        exact.weight.zero_()
        exact.bias.fill_(2.5)
    assert evaluate(exact, open_table(path, target=names[3], features=names[:2]))["r2"] == 1.0
    without = open_table(path, features=names[1:3], target=())
    piece, nothing = next(iter(without.pieces()))
    assert torch.equal(piece, columns[: len(piece), 1:3])
    assert nothing.shape == (len(piece), 0)


def test_what_does_not_go_with_a_table_is_said(tmp_path):
    np.save(tmp_path / "table.npy", np.ones((5, 3), np.float32))
    table = open_table(tmp_path / "table.npy")
    with pytest.raises(
        TypeError, match=r"^evaluate: y must be None with a table, which has its own targets, .* Tensor"
    ):
        evaluate(nn.Linear(2, 1), table, torch.ones(5, 1))
    with pytest.raises(TypeError, match=r"^evaluate: y must be a tensor or a NumPy array, but got None"):
        evaluate(nn.Linear(2, 1), torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"^evaluate: X must be a table of as many targets as the model predicts"):
        evaluate(nn.Linear(2, 2), table)
    with pytest.raises(TypeError, match=r"^evaluate: progress must be True, False or a callable, but got 1"):
        evaluate(nn.Linear(2, 1), table, progress=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [1, 3])
def test_statistics_are_judged_as_their_rows(bias, outputs, device):
    X, y = problem(rows=500, outputs=outputs, device=device)
    X = X * 3 + 1e4  # features in their own units
    model = model_for(X, y)
    if not bias:
        model.bias = None
    statistics = LinearStatistics(3, outputs, device=device).update(X[:200], y[:200]).update(X[200:], y[200:])
    for judged in (model, nn.Sequential(Standardize.fit(X), model)):
        expected = evaluate(judged, X, y)
        del expected["mae"]
        assert evaluate(judged, statistics) == pytest.approx(expected, rel=1e-10)


def test_a_constant_target_and_one_row_of_statistics():
    X, y = X5, torch.full((5, 1), 2.5, dtype=torch.float64)
    exact, wrong = (nn.Linear(3, 1, dtype=torch.float64) for _ in range(2))
    for model, bias in ((exact, 2.5), (wrong, 3.5)):
        nn.init.zeros_(model.weight)
        nn.init.constant_(model.bias, bias)
    statistics = LinearStatistics(3, 1).update(X, y)
    assert evaluate(exact, statistics) == {"mse": 0.0, "rmse": 0.0, "r2": 1.0}
    assert evaluate(wrong, statistics) == {"mse": 1.0, "rmse": 1.0, "r2": 0.0}
    alone = evaluate(wrong, LinearStatistics(3, 1).update(X[:1], y[:1]))
    assert (alone["mse"], math.isnan(alone["r2"])) == (1.0, True)
    nn.init.constant_(wrong.weight, math.nan)
    assert all(math.isnan(value) for value in evaluate(wrong, statistics).values())


def test_rows_of_statistics_count_by_their_weights():
    X, y = problem(rows=30, outputs=1)
    weight = torch.arange(30) % 3
    model = model_for(X, y)
    expected = evaluate(model, X.repeat_interleave(weight, 0), y.repeat_interleave(weight, 0))
    del expected["mae"]
    assert evaluate(model, LinearStatistics(3, 1).update(X, y, weight)) == pytest.approx(expected, rel=1e-10)


STATISTICS = LinearStatistics(3, 2).update(X5, y5)


@pytest.mark.parametrize(
    ("model", "X", "y", "error", "message"),
    [
        (
            nn.Linear(3, 2),
            STATISTICS,
            y5,
            TypeError,
            "evaluate: y must be None with Lin.*, but got Tensor",
        ),
        (
            print,
            STATISTICS,
            None,
            TypeError,
            "evaluate: model must be an nn.Module, but got builtin_function_or_method",
        ),
        (
            nn.Identity(),
            STATISTICS,
            None,
            TypeError,
            r"evaluate: model must be an nn.Linear, or .* got Identity$",
        ),
        (
            nn.Sequential(nn.Linear(3, 2), nn.ReLU()),
            STATISTICS,
            None,
            TypeError,
            r"evaluate: model must be an nn.Linear, or nn.Sequential\(Standardize, nn.Linear\), .* got Sequential$",
        ),
        (
            nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)),
            STATISTICS,
            None,
            TypeError,
            r"evaluate: model must be an nn.Linear, or nn.Sequential\(Standardize, nn.Linear\), .* got Sequential$",
        ),
        (
            nn.Linear(4, 2),
            STATISTICS,
            None,
            ValueError,
            "evaluate: X must be statistics of 4 features and 2 targets, as the model has, but has 3 and 2$",
        ),
        (
            nn.Linear(3, 2),
            LinearStatistics(3, 2),
            None,
            ValueError,
            "evaluate: X must have at least one row of positive weight, but has none$",
        ),
        (
            nn.Linear(3, 2),
            "rows.csv",
            None,
            TypeError,
            "evaluate: X must be a tensor, an array or a table, but got a",
        ),
        (nn.Linear(3, 2), [[1.0]], y5, TypeError, "evaluate: X must be a tensor or a NumPy array, but got list$"),
    ],
)
def test_bad_calls_with_other_kinds_of_rows(model, X, y, error, message):
    with pytest.raises(error, match=f"^{message}"):
        evaluate(model, X, y)


def test_predict_of_a_table_is_that_of_its_rows(tmp_path):
    rows = torch.randn(40_000, 4, generator=torch.Generator().manual_seed(0))  # several pieces
    np.save(tmp_path / "table.npy", rows.numpy())
    model = initial_linear(3, 1, seed=1)
    expected = predict(model, rows[:, :3])
    table = open_table(tmp_path / "table.npy")
    shown = []
    pieces = table.pieces

    def spy(**options):
        shown.append(options["progress"])
        return pieces(rows=7000)

    assert torch.allclose(predict(model, table), expected, rtol=1e-6)
    table.pieces = spy
    prediction = predict(model, table, progress=True)
    assert shown == [True]
    assert prediction.shape == (40_000, 1)
    assert prediction.device.type == "cpu"
    assert torch.allclose(prediction, expected, rtol=1e-6)
    without = open_table(tmp_path / "table.npy", features=["0", "1", "2"], target=())
    assert torch.allclose(predict(model, without), expected, rtol=1e-6)
    np.save(tmp_path / "table64.npy", rows.double().numpy())
    wide = open_table(tmp_path / "table64.npy", dtype=torch.float64)
    assert predict(model, wide).dtype == torch.float32  # the model's


def test_bad_calls_of_predict(tmp_path):
    np.save(tmp_path / "table.npy", np.ones((5, 3), np.float32))
    table = open_table(tmp_path / "table.npy")
    for model, X, error, message in (
        (print, table, TypeError, "model must be an nn.Module, but got builtin_function_or_method"),
        (print, X5, TypeError, "model must be an nn.Module, but got builtin_function_or_method"),
        (nn.LSTM(2, 2), table, TypeError, "model must return a tensor, but returned tuple"),
        (nn.Linear(3, 2), STATISTICS, TypeError, "X must be a tensor, an array or a table, but got LinearStatistics"),
        (nn.Linear(3, 2), "rows.csv", TypeError, "X must be a tensor, an array or a table, but got a path"),
        (nn.Linear(3, 2), [[1.0]], TypeError, "X must be a tensor or a NumPy array, but got list"),
        (nn.Linear(3, 2), X5[:0], ValueError, r"X must have at least one row, but got shape \(0, 3\)"),
        (nn.Linear(3, 2), torch.ones(()), ValueError, r"X must have at least one row, but got shape \(\)"),
    ):
        with pytest.raises(error, match=f"^predict: {message}"):
            predict(model, X)
    with pytest.raises(TypeError, match=r"^predict: progress must be True, False or a callable, but got 1$"):
        predict(nn.Linear(2, 1), table, progress=1)
    table.pieces = lambda **options: (pair for pair in ())
    for function in (predict, evaluate):
        with pytest.raises(ValueError, match=rf"^{function.__name__}: X must have at least one row, but the table has"):
            function(nn.Linear(2, 1), table)
