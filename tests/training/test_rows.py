"""What came in, as rows: which kind it becomes, how it is cut, and what its moments and losses are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchintro import LinearStatistics, fit, open_table
from torchintro.functional import linear_mse_loss
from torchintro.nn import initial_linear
from torchintro.training.options import TrainingOptions
from torchintro.training.row_kinds import MemoryRows, StatisticsRows, TableRows
from torchintro.training.rows import as_rows

X = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
y = X @ torch.tensor([[1.0, 2.0], [0.5, 0.0], [-1.0, 3.0]]) + 0.5
HELD_OUT = X[:20] + 1, y[:20] - 1


@pytest.fixture
def table(tmp_path):
    np.save(tmp_path / "rows.npy", torch.cat([X, y], 1).numpy())
    return open_table(tmp_path / "rows.npy", target=["3", "4"])


def kinds(table):
    statistics, held_out = LinearStatistics(3, 2).update(X, y), LinearStatistics(3, 2).update(*HELD_OUT)
    return {
        "matrices": as_rows("train", X, y.numpy(), HELD_OUT),
        "a table": as_rows("train", table, None, HELD_OUT),
        "statistics": as_rows("train", statistics, None, held_out),
    }


def test_each_kind_of_data_becomes_its_kind_of_rows(table):
    rows = kinds(table)
    expected = {"matrices": MemoryRows, "a table": TableRows, "statistics": StatisticsRows}
    assert {name: type(one) for name, one in rows.items()} == expected
    assert {name: one.count for name, one in rows.items()} == {"matrices": 100, "a table": 100, "statistics": None}
    assert {name: one.in_memory is not None for name, one in rows.items()} == {
        "matrices": True,
        "a table": False,
        "statistics": False,
    }
    for one in rows.values():
        assert (one.function, one.in_features, one.out_features) == ("train", 3, 2)
        assert (one.dtype, one.device.type, one.has_validation) == (torch.float32, "cpu", True)
        assert one.has_rows == (type(one) is not StatisticsRows)
        assert one.is_shared == (type(one) is TableRows)


def test_all_kinds_of_the_same_rows_have_the_same_moments_and_losses(table):
    linear = initial_linear(3, 2, seed=0)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    matrices, *others = kinds(table).values()
    assert matrices.loss(weight, bias) == pytest.approx(linear_mse_loss(X, weight, y, linear_bias=bias).item())
    for other in others:
        for part, expected in zip(other.moments(), matrices.moments(), strict=True):
            for own, theirs in zip(part, expected, strict=True):
                assert torch.allclose(own, theirs, rtol=1e-10)
        assert other.loss(weight, bias) == pytest.approx(matrices.loss(weight, bias), rel=1e-6)
        losses = [one.validation_loss(linear_mse_loss, weight, bias) for one in (other, matrices)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("like", [None, torch.nn.Linear(3, 2, dtype=torch.float64)])
def test_rows_take_the_dtype_of_the_layer_or_their_own(table, like):
    dtype = torch.float32 if like is None else torch.float64
    statistics = LinearStatistics(3, 2).update(X, y)
    for given in ((X, y.double()), (table, None), (statistics, None)):
        assert as_rows("train", *given, like=like).dtype == dtype
    integers = as_rows("train", torch.ones(5, 3, dtype=torch.int64), torch.ones(5, 2, dtype=torch.int64), like=like)
    assert integers.dtype == dtype


def test_tensors_to_be_judged_may_have_any_shape():
    rows = as_rows("judge", torch.ones(5, 2, 3), torch.zeros(5), any_shape=True)
    assert [(X.shape, y.shape) for X, y in rows.slices(4)] == [((4, 2, 3), (4,)), ((1, 2, 3), (1,))]
    rows = as_rows("judge", torch.ones(5, 2), any_shape=True)
    assert rows.out_features == 0
    with pytest.raises(ValueError, match=r"^judge: y must have 5 rows, as X has, but got shape \(4, 2\)$"):
        as_rows("judge", torch.ones(5, 2), torch.ones(4, 2), any_shape=True)


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 3), (10, 5), (10, 1), (7, 7), (7, 100), (1, 1)])
def test_batches_hold_each_row_once(rows, batch_size):
    X = torch.arange(rows).unsqueeze(-1)
    data, options = MemoryRows(X, -X), TrainingOptions(1, batch_size)
    found = list(data.batches(options, torch.Generator().manual_seed(0)))
    assert [len(X_batch) for X_batch, _ in found[:-1]] == [min(batch_size, rows)] * (len(found) - 1)
    seen = torch.cat([X_batch for X_batch, _ in found])
    assert sorted(seen.flatten().tolist()) == list(range(rows))
    assert torch.equal(torch.cat([y_batch for _, y_batch in found]), -seen)
    in_order = torch.cat([X_batch for X_batch, _ in data.batches(TrainingOptions(1, batch_size, shuffle=False))])
    assert torch.equal(in_order, X)


def test_a_share_of_matrices_is_held_out_by_the_seed():
    rows, same = (as_rows("train", X, y, 0.25, seed=3) for _ in range(2))
    other = as_rows("train", X, y, 0.25, seed=4)
    assert (rows.count, len(rows.validation[0])) == (75, 25)
    assert torch.equal(rows.X, same.X)
    assert not torch.equal(rows.X, other.X)
    result = fit(initial_linear(3, 2, seed=0), X, y, lr=0.1, epochs=3, validation=0.25, seed=3)
    expected = fit(initial_linear(3, 2, seed=0), rows.X, rows.y, lr=0.1, epochs=3, validation=rows.validation)
    assert torch.equal(result.losses, expected.losses)
    assert torch.equal(result.validation_losses, expected.validation_losses)


def test_other_rows_have_another_identity(table):
    for name, rows in kinds(table).items():
        assert rows.identity(contents=True) == kinds(table)[name].identity(contents=True)
    changed = LinearStatistics(3, 2).update(X, 2 * y)
    for some, other in (
        (as_rows("t", X, y), as_rows("t", X, 2 * y)),
        (as_rows("t", X, y, HELD_OUT), as_rows("t", X, y)),
        (as_rows("t", LinearStatistics(3, 2).update(X, y)), as_rows("t", changed)),
        (as_rows("t", table, None, 0.2), as_rows("t", table, None, 0.3)),
        (as_rows("t", table, None, HELD_OUT), as_rows("t", table, None, (HELD_OUT[0], 2 * HELD_OUT[1]))),
        (as_rows("t", table, None, table), as_rows("t", table)),
    ):
        assert some.identity(contents=True) != other.identity(contents=True)


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ((X, None), {}, TypeError, "y must be a tensor or a NumPy array, but got None, which only goes with"),
        (("rows.csv", None), {}, TypeError, "X must be a tensor, an array or a table, but got a path: open it by"),
        ((X, y), {"checkpoint": "pass.pt"}, TypeError, "checkpoint only goes with a table .*, but got 'pass.pt'$"),
        ((X, y[:50]), {}, ValueError, r"y must have 100 rows, as X has, but got shape \(50, 2\)$"),
        ((X, y), {"validation": 1.5}, ValueError, "validation must be a fraction between 0 and 1, but got 1.5$"),
        ((X, y), {"validation": X}, TypeError, r"validation must be a pair \(X_val, y_val\), but got Tensor$"),
        ((X, y), {"like": torch.nn.Linear(4, 2)}, ValueError, "X must have 4 columns, the model's in_features, but"),
    ],
)
def test_bad_data_are_said(given, options, error, message):
    with pytest.raises(error, match=f"^train: {message}"):
        as_rows("train", *given, **options)


def test_bad_data_beside_a_table_are_said(table):
    nan = torch.full((2, 3), torch.nan), torch.zeros(2, 2)
    for validation, error, message in (
        (nan, ValueError, r"validation\[0\] must be finite, but element \[0, 0\] is nan$"),
        (
            (X, y[:, :1]),
            ValueError,
            r"validation\[1\] must have shape \(100, 2\), .*, but got \(100, 1\)",
        ),
        (LinearStatistics(3, 1), ValueError, "validation must be statistics of 3 features and 2 targets, as X has, "),
        (
            open_table(table.path),
            ValueError,
            "validation must be a table of 3 features and 2 targets, .*4 and 1",
        ),
        (True, TypeError, "validation must be a fraction between 0 and 1, but got True$"),
    ):
        with pytest.raises(error, match=f"^train: {message}"):
            as_rows("train", table, None, validation)
