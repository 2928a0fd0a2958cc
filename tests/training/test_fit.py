"""The training loop against loops written out by hand, and everything that can end it early."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from plain_loop import plain_loop
from torch import nn

from torchintro import functional, reference
from torchintro.nn import initial_linear
from torchintro.training.fit import DivergedError, FitResult, fit
from torchintro.training.optimizers import optimizer_names
from torchintro.training.options import ENGINES

# A learning rate at which each optimizer moves the small problem of `problem()` without blowing up.
LRS = dict.fromkeys(optimizer_names(), 0.05) | {"LBFGS": 0.5, "Adadelta": 1.0}


def problem(rows=37, features=3, outputs=2, dtype=torch.float64, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    W = torch.randn(outputs, features, generator=generator, dtype=torch.float64)
    y = X @ W.T + 0.5 + 0.1 * torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
    return X.to(device, dtype), y.to(device, dtype)


def model_for(X, y, bias=True):
    model = initial_linear(X.shape[1], y.shape[1], seed=1, dtype=X.dtype, device=X.device)
    if not bias:
        model.bias = None
    return model


def parameters(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [(name, batch_size) for name in optimizer_names() if name != "Muon" for batch_size in (None, 8)]
    + [("SGD", 1), ("SGD", 37), ("SGD", 1000)],
)
def test_reference_engine_is_the_plain_loop(device, name, batch_size):
    X, y = problem(device=device, dtype=torch.float32)
    validation = problem(device=device, rows=11, seed=5, dtype=torch.float32)
    by_hand, model = model_for(X, y), model_for(X, y)
    # `fit` gives every optimizer no weight decay and no momentum unless asked.
    options = {"weight_decay": 0.0} if name == "AdamW" else {}
    optimizer = getattr(torch.optim, name)(by_hand.parameters(), lr=LRS[name], **options)
    expected, expected_validation = plain_loop(
        by_hand, X, y, optimizer, epochs=5, batch_size=batch_size, seed=3, validation=validation
    )
    result = fit(
        model,
        X,
        y,
        lr=LRS[name],
        epochs=5,
        batch_size=batch_size,
        optimizer=name.upper(),
        validation=validation,
        engine="reference",
        seed=3,
    )
    assert torch.equal(result.losses, expected)
    assert torch.equal(result.validation_losses, expected_validation)
    for mine, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("name", "batch_size"),
    # LBFGS across batches magnifies rounding without bound, so that nothing could be told from it.
    [(name, None) for name in optimizer_names() if name != "Muon"]
    + [(name, 8) for name in optimizer_names() if name not in ("Muon", "LBFGS")],
)
def test_engines_agree(device, name, batch_size, bias):
    X, y = problem(device=device)
    validation = problem(device=device, rows=11, seed=5)
    results, models = {}, {}
    operators = [] if name not in ("SGD", "Adam", "AdamW") else ["fused"] if batch_size else ["fused", "statistics"]
    engines = ["auto", *operators, "autograd", "reference"]
    for engine in engines:
        models[engine] = model_for(X, y, bias)
        results[engine] = fit(
            models[engine],
            X,
            y,
            lr=LRS[name],
            epochs=8,
            batch_size=batch_size,
            optimizer=name,
            validation=validation,
            engine=engine,
            seed=3,
        )
    expected = results["reference"]
    # Float64 rounding, let grow 1e4-fold by the optimizers that divide by small moving averages.
    tolerance = 1e4 * torch.finfo(torch.float64).eps
    for engine in engines:
        for series in ("losses", "validation_losses"):
            mine, theirs = getattr(results[engine], series), getattr(expected, series)
            assert ((mine - theirs).abs() / theirs.abs()).max() < tolerance
        for mine, theirs in zip(models[engine].parameters(), models["reference"].parameters(), strict=True):
            assert (mine - theirs).abs().max() < tolerance * theirs.abs().max()
    for engine in {"fused", "statistics"} - {*operators}:
        with pytest.raises(ValueError, match=f"^fit: engine '{engine}' cannot do this: .*; auto finds one that can$"):
            fit(model_for(X, y, bias), X, y, lr=0.1, epochs=2, batch_size=batch_size, optimizer=name, engine=engine)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "optimizer_options": {"nesterov": True}}])
@pytest.mark.parametrize("batch_size", [None, 8])
def test_float32_is_as_near_to_float64_as_plain_pytorch_is(device, batch_size, options):
    X, y = problem(device=device, rows=200, features=20, outputs=1)
    series, weights = {}, {}
    for key, dtype in (("exact", torch.float64), ("autograd", torch.float32), ("reference", torch.float32)):
        model = model_for(X, y).to(dtype)
        engine = "reference" if key == "exact" else key
        result = fit(model, X, y, lr=0.02, epochs=40, batch_size=batch_size, engine=engine, seed=3, **options)
        series[key], weights[key] = result.losses, model.weight.detach().double()
    eps = torch.finfo(torch.float32).eps
    for figures in (series, weights):
        error = {key: (figures[key] - figures["exact"]).abs().max() for key in ("autograd", "reference")}
        assert error["autograd"] <= 3 * error["reference"] + 4 * eps * figures["exact"].abs().max()


def test_result_describes_the_run(device):
    X, y = problem(device=device)
    result = fit(model_for(X, y), X, y, lr=0.1, epochs=7)
    assert isinstance(result, FitResult)
    assert (result.engine, result.epochs, result.validation_losses) == ("fused", 7, None)
    assert "float64" in result.reason
    assert result.losses.shape == (7,)
    assert result.losses.dtype == torch.float64
    assert 0 < result.seconds < 60
    model = model_for(X, y)
    before = F.mse_loss(model(X), y).item()
    assert fit(model, X, y, lr=0.1, epochs=1).losses.tolist() == pytest.approx([before], rel=1e-14)


def test_weight_decay_and_momentum_reach_the_optimizer(device):
    X, y = problem(device=device)
    by_hand, model = model_for(X, y), model_for(X, y)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.8, weight_decay=0.3, dampening=0.1)
    expected, _ = plain_loop(by_hand, X, y, optimizer, epochs=9)
    options = {"dampening": 0.1}
    result = fit(
        model, X, y, lr=0.05, epochs=9, momentum=0.8, weight_decay=0.3, optimizer_options=options, engine="reference"
    )
    assert torch.equal(result.losses, expected)
    assert not torch.equal(fit(model_for(X, y), X, y, lr=0.05, epochs=9, engine="reference").losses, expected)


def test_muon_trains_a_layer_without_bias(device):
    X, y = problem(device=device, dtype=torch.float32)
    model = model_for(X, y, bias=False)
    result = fit(model, X, y, lr=0.05, epochs=20, optimizer="muon")
    assert result.losses[-1] < result.losses[0] / 2


def test_seed_decides_the_batches(device):
    X, y = problem(device=device)

    def losses(seed):
        return fit(model_for(X, y), X, y, lr=0.1, epochs=3, batch_size=5, seed=seed).losses

    assert torch.equal(losses(1), losses(1))
    assert not torch.equal(losses(1), losses(2))
    torch.manual_seed(9)
    first = losses(None)
    second = losses(None)
    torch.manual_seed(9)
    assert torch.equal(losses(None), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "convert",
    [
        lambda t: t.numpy(),
        lambda t: t.numpy().astype(np.float32),
        lambda t: t.numpy()[::-1][::-1],
        lambda t: np.flip(np.flip(t.numpy(), 0).copy(), 0),
        lambda t: np.broadcast_to(t.numpy(), t.shape),
        lambda t: t.numpy().astype(">f8"),
        lambda t: np.asfortranarray(t.numpy()),
        lambda t: t.double().requires_grad_(),
        lambda t: t.T.contiguous().T,
    ],
)
def test_what_counts_as_data(device, convert):
    X, y = problem(dtype=torch.float32)
    X_given, y_given = convert(X.double()), convert(y.double())
    kept = copy.deepcopy(X_given.detach() if isinstance(X_given, torch.Tensor) else X_given)
    expected = fit(model_for(X, y).to(device), X, y, lr=0.1, epochs=4, engine="reference").losses
    losses = fit(model_for(X, y).to(device), X_given, y_given, lr=0.1, epochs=4, engine="reference").losses
    # A transposed matrix product may round differently.
    assert (losses - expected).abs().max() <= 8 * torch.finfo(torch.float32).eps * expected.max()
    assert bool(
        (
            torch.as_tensor(
                np.asarray(X_given if isinstance(X_given, np.ndarray) else X_given.detach()).astype(np.float64)
            )
            == torch.as_tensor(np.asarray(kept).astype(np.float64))
        ).all()
    )
    if isinstance(X_given, torch.Tensor):
        assert X_given.grad is None


def test_integers_and_booleans_are_numbers(device):
    X = torch.tensor([[0, 1], [1, 1], [2, 0], [3, 1]])
    y = torch.tensor([[True], [False], [True], [True]])

    def losses(X, y):
        return fit(initial_linear(2, 1, seed=0, device=device), X, y, lr=0.1, epochs=3).losses

    expected = losses(X.float(), y.float())
    assert torch.equal(losses(X, y), expected)
    assert torch.equal(losses(X.numpy(), y.numpy()), expected)


def test_frozen_parameters_stay(device):
    X, y = problem(device=device)
    model = model_for(X, y)
    model.bias.requires_grad_(False)
    weight, bias = parameters(model)
    fit(model, X, y, lr=0.1, epochs=5)
    assert torch.equal(model.bias, bias)
    assert not torch.equal(model.weight, weight)


def test_trains_under_no_grad_and_leaves_no_gradients(device):
    X, y = problem(device=device)
    model = model_for(X, y)
    with torch.no_grad():
        result = fit(model, X, y, lr=0.1, epochs=5)
        assert not torch.is_grad_enabled()
    assert result.losses[-1] < result.losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_initial_linear_is_that_of_manual_seed_and_leaves_the_global_state(device):
    state = torch.get_rng_state()
    model = initial_linear(4, 3, seed=7, device=device)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    expected = nn.Linear(4, 3)
    torch.set_rng_state(state)
    assert torch.equal(model.weight.cpu(), expected.weight)
    assert torch.equal(model.bias.cpu(), expected.bias)


X5, y5 = problem(rows=5)
NAN = X5.clone()
NAN[2, 1] = math.nan
BAD_CALLS = [
    ({"model": nn.Sequential(nn.Linear(3, 2))}, TypeError, "fit: model must be an nn.Linear, but got Sequential"),
    ({"model": nn.LazyLinear(2)}, ValueError, "fit: model must have initialised parameters, but got a lazy layer"),
    ({"model": nn.Linear(3, 2, dtype=torch.complex64)}, TypeError, "fit: model must have floating-point parameters"),
    ({"model": nn.Linear(3, 2).requires_grad_(False)}, ValueError, "fit: model must have a parameter that requires"),
    ({"model": nn.Linear(4, 2)}, ValueError, r"fit: X must have 4 columns, the model's in_features, .*\(5, 3\)"),
    ({"lr": 0}, ValueError, "fit: lr must be a positive, finite number, but got 0"),
    ({"lr": -0.1}, ValueError, "fit: lr must be a positive, finite number, but got -0.1"),
    ({"lr": math.nan}, ValueError, "fit: lr must be a positive, finite number, but got nan"),
    ({"lr": math.inf}, ValueError, "fit: lr must be a positive, finite number, but got inf"),
    ({"lr": "0.1"}, TypeError, "fit: lr must be a positive, finite number, but got '0.1'"),
    ({"lr": 1e39}, ValueError, "fit: lr must be within the model's float32, but got 1e\\+39"),
    (
        {"X": "rows.parquet", "y": None},
        TypeError,
        "fit: X must be a tensor, an array or a table, but got a path: open it by open_table",
    ),
    ({"y": None}, TypeError, "fit: y must be a tensor or a NumPy array, but got None, which only goes with a table"),
    ({"lr": True}, TypeError, "fit: lr must be a positive, finite number, but got True"),
    ({"epochs": 0}, ValueError, "fit: epochs must be at least 1, but got 0"),
    ({"epochs": 2.0}, TypeError, "fit: epochs must be an integer, but got 2.0"),
    ({"batch_size": 0}, ValueError, "fit: batch_size must be at least 1, but got 0"),
    ({"batch_size": 2.5}, TypeError, "fit: batch_size must be an integer, but got 2.5"),
    ({"seed": "0"}, TypeError, "fit: seed must be an integer, but got '0'"),
    (
        {"engine": "fast"},
        ValueError,
        "fit: engine must be one of auto, fused, statistics, autograd, reference, but got 'fast'",
    ),
    ({"optimizer": "sdg"}, ValueError, "fit: optimizer must be one of ASGD, .*, but got 'sdg'"),
    ({"optimizer": "SparseAdam"}, ValueError, "fit: optimizer must be one of .*, but got 'SparseAdam'"),
    ({"optimizer": torch.optim.SGD}, ValueError, "fit: optimizer must be one of .*, but got <class"),
    ({"optimizer": "adam", "momentum": 0.9}, ValueError, "fit: momentum must be 0 for Adam, .*, but got 0.9"),
    ({"optimizer": "lbfgs", "weight_decay": 0.1}, ValueError, "fit: weight_decay must be 0 for LBFGS, .*got 0.1"),
    ({"momentum": -1}, ValueError, "fit: momentum must be a finite number of at least 0, but got -1"),
    ({"weight_decay": math.nan}, ValueError, "fit: weight_decay must be a finite number of at least 0, but got nan"),
    ({"optimizer": "muon"}, ValueError, "fit: optimizer Muon refused this model or its options: .*2D"),
    (
        {"optimizer_options": {"beta": 1}},
        ValueError,
        "fit: optimizer_options holds 'beta', which is not an argument of",
    ),
    ({"optimizer_options": {"lr": 1}}, ValueError, "fit: optimizer_options holds 'lr', which is a named argument"),
    ({"optimizer_options": {"nesterov": True}}, ValueError, "fit: optimizer SGD refused .*[Nn]esterov"),
    ({"optimizer_options": [1]}, TypeError, "fit: optimizer_options must be a mapping, but got list"),
    ({"progress": 10}, TypeError, "fit: progress must be True, False or a callable, but got 10"),
    ({"X": X5.tolist()}, TypeError, "fit: X must be a tensor or a NumPy array, but got list"),
    ({"X": X5[0]}, ValueError, r"fit: X must have two dimensions, but got shape \(3,\): use X.unsqueeze\(-1\)"),
    ({"X": X5[None]}, ValueError, r"fit: X must have two dimensions, but got shape \(1, 5, 3\)"),
    ({"X": X5[:0], "y": y5[:0]}, ValueError, r"fit: X must have at least one row, but got shape \(0, 3\)"),
    ({"X": X5.to_sparse()}, TypeError, "fit: X must be a dense tensor of real numbers, but got sparse_coo"),
    ({"X": X5.cfloat()}, TypeError, "fit: X must be a dense tensor of real numbers, but got complex64"),
    ({"X": np.array([["a"] * 3] * 5)}, TypeError, "fit: X must hold real numbers, but got a NumPy array of <U1"),
    ({"X": np.array([[None] * 3] * 5)}, TypeError, "fit: X must hold real numbers, but got a NumPy array of object"),
    ({"X": NAN}, ValueError, r"fit: X must be finite, but element \[2, 1\] is nan"),
    ({"y": y5 / 0}, ValueError, r"fit: y must be finite, but element \[0, 0\] is -?inf"),
    ({"X": X5 * 1e200}, ValueError, r"fit: X in the model's float32 must be finite, but element \[0, 0\] is -?inf"),
    ({"y": y5[:, :1]}, ValueError, r"fit: y must have shape \(5, 2\), the prediction's, but got \(5, 1\)"),
    ({"y": y5[:4]}, ValueError, r"fit: y must have shape \(5, 2\), the prediction's, but got \(4, 2\)"),
    (
        {"model": nn.Linear(3, 1), "y": y5[:, 0]},
        ValueError,
        r"fit: y must have shape \(5, 1\), the prediction's, but got \(5,\): use y.unsqueeze\(-1\)",
    ),
    ({"validation": X5}, TypeError, r"fit: validation must be a pair \(X_val, y_val\), but got Tensor"),
    ({"validation": (X5,)}, TypeError, r"fit: validation must be a pair \(X_val, y_val\), but got 1 elements"),
    ({"validation": (X5, y5[:, 0])}, ValueError, r"fit: validation\[1\] must have shape \(5, 2\), .* but got \(5,\)"),
    ({"validation": (NAN, y5)}, ValueError, r"fit: validation\[0\] must be finite, but element \[2, 1\] is nan"),
    ({"validation": (X5[:0], y5[:0])}, ValueError, r"fit: validation\[0\] must have at least one row"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS)
def test_bad_calls_say_what_is_wrong_and_change_nothing(arguments, error, message):
    call = {"model": nn.Linear(3, 2), "X": X5, "y": y5, "lr": 0.1, "epochs": 2} | arguments
    lazy = isinstance(call["model"], nn.LazyLinear)
    before = [] if lazy else parameters(call["model"])
    with pytest.raises(error, match=f"^{message}") as caught:
        fit(call.pop("model"), call.pop("X"), call.pop("y"), **call)
    assert "\n" not in str(caught.value)
    model = (arguments | {"model": arguments.get("model")})["model"]
    if model is not None and not lazy:
        assert all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))


def test_a_model_that_is_not_finite_is_refused():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.bias[1] = math.inf
    with pytest.raises(ValueError, match=r"^fit: model.bias must be finite, but element \[1\] is inf"):
        fit(model, X5, y5, lr=0.1)


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_divergence_names_the_epoch_and_leaves_the_last_finite_parameters(device, engine):
    X, y = problem(device=device, dtype=torch.float32)
    model = model_for(X, y)
    with pytest.raises(
        DivergedError, match=r"fit: the loss became (inf|nan) in epoch \d+ with lr=5, .*lower lr"
    ) as caught:
        fit(model, X, y, lr=5.0, epochs=200, engine=engine)
    error = caught.value
    assert isinstance(error, ArithmeticError)
    assert (error.lr, error.engine, error.kind) == (5.0, engine, "loss")
    assert not math.isfinite(error.loss)
    assert f"became {error.loss} in epoch {error.epoch} " in str(error)
    assert len(error.losses) == error.epoch - 1
    assert torch.isfinite(error.losses).all()
    # The loss was last finite after epoch - 2 updates: at the start of the epoch before the failing one.
    expected = model_for(X, y)
    fit(expected, X, y, lr=5.0, epochs=error.epoch - 2, engine=engine)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    loss = (reference if engine == "reference" else functional).linear_mse_loss
    assert math.isfinite(loss(X, model.weight, y, linear_bias=model.bias).item())
    again = pickle.loads(pickle.dumps(error))
    assert (again.epoch, again.lr, str(again)) == (error.epoch, error.lr, str(error))


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_divergence_within_an_epoch_of_mini_batches(device, engine):
    X, y = problem(device=device, dtype=torch.float32)
    model = model_for(X, y)
    with pytest.raises(DivergedError) as caught:
        fit(model, X, y, lr=5.0, epochs=200, batch_size=4, seed=0, engine=engine)
    assert caught.value.epoch > 1
    assert len(caught.value.losses) == caught.value.epoch - 1
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    # Some batch had a finite loss at these parameters.
    assert any(math.isfinite(F.mse_loss(model(row), target).item()) for row, target in zip(X, y, strict=True))


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_divergence_at_the_first_loss_changes_nothing(device, engine):
    X, y = problem(device=device, dtype=torch.float32)
    model = model_for(X, y)
    before = parameters(model)
    with pytest.raises(DivergedError, match="in epoch 1 ") as caught:
        fit(model, X, y * 1e30, lr=0.1, engine=engine)
    assert caught.value.losses.shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_divergence_by_the_last_update_is_found(device, engine):
    X, y = problem(device=device, dtype=torch.float32)
    model = model_for(X, y)
    before = parameters(model)
    with pytest.raises(DivergedError, match="in epoch 1 ") as caught:
        fit(model, X, y * 1e10, lr=1e35, epochs=1, engine=engine)
    assert len(caught.value.losses) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_divergence_of_the_validation_loss(device, engine):
    X, y = problem(device=device, dtype=torch.float32)
    model = model_for(X, y)
    before = parameters(model)
    with pytest.raises(DivergedError, match="fit: the validation loss became inf in epoch 1 ") as caught:
        fit(model, X, y, lr=0.1, validation=(X * 1e30, y), engine=engine)
    assert caught.value.kind == "validation loss"
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))


def test_ctrl_c_during_an_update_leaves_a_whole_model(device, monkeypatch):
    X, y = problem(device=device)
    steps = []
    step = torch.optim.SGD.step

    def interrupted_step(self, closure=None):
        loss = step(self, closure)
        steps.append(loss)
        if len(steps) == 4:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.nan)  # as if only half of the update had been done
            raise KeyboardInterrupt
        return loss

    model, expected = model_for(X, y), model_for(X, y)
    fit(expected, X, y, lr=0.1, epochs=3, engine="autograd")
    monkeypatch.setattr(torch.optim.SGD, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        fit(model, X, y, lr=0.1, epochs=10, engine="autograd")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_an_exception_of_progress_ends_the_run(device, engine):
    X, y = problem(device=device)
    model, expected = model_for(X, y), model_for(X, y)

    def stop(epoch, loss):
        if epoch == 4:
            raise StopIteration(f"{loss:.17g}")

    with pytest.raises(StopIteration) as caught:
        fit(model, X, y, lr=0.1, epochs=10, progress=stop, engine=engine)
    fit(expected, X, y, lr=0.1, epochs=3, engine=engine)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    loss = functional.linear_mse_loss(X, model.weight, y, linear_bias=model.bias).item()
    assert loss == pytest.approx(float(str(caught.value)), rel=1e-12)


@pytest.mark.parametrize(
    ("epochs", "printed"), [(100, range(10, 101, 10)), (25, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]), (3, [1, 2, 3])]
)
def test_progress_prints_every_tenth(capsys, epochs, printed):
    X, y = problem()
    result = fit(model_for(X, y), X, y, lr=0.01, epochs=epochs, progress=True)
    losses = result.losses
    expected = [f"Engine: {result.engine} ({result.reason})"]
    expected += [f"Epoch [{epoch}/{epochs}], Loss: {losses[epoch - 1]:.4f}" for epoch in printed]
    assert capsys.readouterr().out.splitlines() == expected
    fit(model_for(X, y), X, y, lr=0.01, epochs=epochs)
    assert capsys.readouterr().out == ""


def test_progress_calls_with_epoch_and_loss():
    X, y = problem()
    calls = []
    losses = fit(model_for(X, y), X, y, lr=0.01, epochs=5, progress=lambda *call: calls.append(call)).losses
    assert calls == list(zip(range(1, 6), losses.tolist(), strict=True))


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_autocast_around_fit_changes_nothing(device, engine):
    """Autocast keeps what it has cast: a loop within it would train against the first epoch's parameters."""
    X, y = torch.randn(50, 3, device=device), torch.randn(50, 1, device=device)
    models = [initial_linear(3, 1, seed=0, device=device) for _ in range(2)]
    expected = fit(models[0], X, y, lr=0.1, epochs=20, engine=engine).losses
    with torch.autocast(device, torch.bfloat16):
        losses = fit(models[1], X, y, lr=0.1, epochs=20, engine=engine).losses
    assert torch.equal(losses, expected)
