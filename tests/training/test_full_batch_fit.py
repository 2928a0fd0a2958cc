"""The operator that trains in one call, against the loop written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from torchintro.functional import linear_full_batch_fit

OPERATOR = torch.ops.torchintro.linear_full_batch_fit


def problem(rows=200, features=7, outputs=2, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, features, generator=generator)
    W = torch.randn(outputs, features, generator=generator)
    y = X @ W.T + 2 + 0.1 * torch.randn(rows, outputs, generator=generator)
    start = torch.randn(outputs, features, generator=generator), torch.randn(outputs, generator=generator)
    return [tensor.to(device, dtype) for tensor in (X, y, *start)]


def by_hand(X, y, weight, bias, lrs, make=torch.optim.SGD, **options):
    leaves = [part.double().clone().requires_grad_() for part in (weight, bias) if part is not None]
    optimizer = make(leaves, lr=1.0, **options)
    losses = []
    for lr in lrs.tolist():
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = F.mse_loss(F.linear(X.double(), *leaves), y.double())
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return torch.tensor(losses, dtype=torch.float64), [leaf.detach() for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_bias", [True, False])
def test_is_gradient_descent(device, dtype, with_bias):
    X, y, weight, bias = problem(dtype=dtype, device=device)
    bias = bias if with_bias else None
    lrs = torch.linspace(0.1, 0.01, 30, dtype=torch.float64)
    expected, parameters = by_hand(X, y, weight, bias, lrs)
    version = weight._version
    losses = linear_full_batch_fit(X, weight, y, linear_bias=bias, lr=lrs)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(losses, expected, rtol=1e3 * torch.finfo(torch.float64).eps)
    for mine, theirs in zip((weight, bias) if with_bias else (weight,), parameters, strict=True):
        assert (mine.double() - theirs).abs().max() <= 4 * eps * theirs.abs().max()
    assert weight._version > version


@pytest.mark.parametrize(("features", "outputs"), [(1, 1), (513, 1), (2, 65)])
def test_any_size(device, features, outputs):
    """One pass of our own over the rows, or products for what is wider."""
    X, y, weight, bias = problem(features=features, outputs=outputs, device=device)
    lrs = torch.linspace(0.02, 0.01, 60, dtype=torch.float64)[::2]
    expected, parameters = by_hand(X, y, weight, bias, lrs)
    weight, bias = weight.t().contiguous().t(), bias.repeat_interleave(2)[::2]  # not contiguous
    losses = linear_full_batch_fit(X, weight, y, linear_bias=bias, lr=lrs)
    assert torch.allclose(losses, expected, rtol=1e-11)
    for mine, theirs in zip((weight, bias), parameters, strict=True):
        assert torch.allclose(mine.double(), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "make", "named"),
    [
        ("sgd", [0.9, 0.1, 0.01, 0, 0], torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
        ("adam", [0.8, 0.99, 0.01, 1e-6, 1], torch.optim.Adam, {"betas": (0.8, 0.99), "eps": 1e-6, "amsgrad": True}),
        ("adamw", [0.9, 0.999, 0.05, 1e-8, 0], torch.optim.AdamW, {"weight_decay": 0.05}),
    ],
)
def test_the_operator_takes_the_other_optimizers(name, options, make, named):
    X, y, weight, bias = problem()
    if name == "adam":
        named = {**named, "weight_decay": 0.01}
    lrs = torch.full((20,), 0.02, dtype=torch.float64)
    expected, parameters = by_hand(X, y, weight, bias, lrs, make, **named)
    losses = OPERATOR(X, y, weight, bias, lrs, name, options)
    assert torch.allclose(losses, expected, rtol=1e-9)
    assert torch.allclose(weight.double(), parameters[0], rtol=1e-5)


def test_strides_and_half_precision_rows():
    X, y, weight, bias = problem()
    lrs = torch.full((9,), 0.05, dtype=torch.float64)
    expected = linear_full_batch_fit(X, weight.clone(), y, linear_bias=bias.clone(), lr=lrs)
    transposed = weight.T.contiguous().T
    losses = linear_full_batch_fit(X.T.contiguous().T, transposed, y, linear_bias=bias.clone(), lr=lrs.repeat(2)[::2])
    assert torch.allclose(losses, expected, rtol=1e-12)
    half = linear_full_batch_fit(X.bfloat16(), weight.clone(), y, linear_bias=bias.clone(), lr=lrs)
    assert torch.allclose(half, expected, rtol=0.02)


def test_a_loss_that_is_not_finite_ends_it():
    X, y, weight, bias = problem()
    losses = linear_full_batch_fit(X, weight, y, linear_bias=bias, lr=torch.full((300,), 9.0, dtype=torch.float64))
    finite = int(torch.isfinite(losses.float()).sum())
    assert 1 < finite < 300
    assert torch.isfinite(weight).all()
    assert not torch.isfinite(losses.float()[finite:]).any()
    again = problem()
    linear_full_batch_fit(
        again[0], again[2], again[1], linear_bias=again[3], lr=torch.full((finite - 1,), 9.0, dtype=torch.float64)
    )
    assert torch.equal(again[2], weight)
    X[3, 2] = math.nan
    before = again[2].clone()
    losses = linear_full_batch_fit(X, again[2], y, linear_bias=None, lr=torch.ones(2, dtype=torch.float64))
    assert losses.isnan().all()
    assert torch.equal(again[2], before)


def test_torchscript_calls_it():
    X, y, weight, bias = problem()

    def train(X: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, lr: torch.Tensor):
        return torch.ops.torchintro.linear_full_batch_fit(X, y, weight, bias, lr)

    lr = torch.full((5,), 0.1, dtype=torch.float64)
    expected = linear_full_batch_fit(X, weight.clone(), y, linear_bias=bias.clone(), lr=lr)
    assert torch.equal(torch.jit.script(train)(X, y, weight.clone(), bias.clone(), lr), expected)


LR = torch.ones(2, dtype=torch.float64)
BAD_CALLS = [
    ({"linear_weight": torch.zeros(3)}, ValueError, "linear_weight must have shape"),
    ({"linear_weight": torch.zeros(0, 7)}, ValueError, r"linear_weight must have shape .*, none of them 0, but"),
    ({"linear_weight": torch.zeros(2, 7, dtype=torch.bfloat16)}, TypeError, "linear_weight must have dtype float32 or"),
    ({"input": torch.zeros(200, 6)}, ValueError, "input must have shape"),
    ({"input": torch.zeros(0, 7), "target": torch.zeros(0, 2)}, ValueError, "input must have shape"),
    ({"target": torch.zeros(200)}, ValueError, "target must have shape"),
    ({"linear_bias": torch.zeros(3)}, ValueError, "linear_bias must have shape"),
    ({"linear_bias": torch.zeros(2).double()}, TypeError, "linear_bias must have linear_weight's dtype"),
    ({"lr": torch.ones(2)}, ValueError, "lr must be float64 on the CPU"),
    ({"lr": LR[0]}, ValueError, "lr must be float64 on the CPU"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS)
def test_bad_calls_say_what_is_wrong(arguments, error, message):
    X, y, weight, bias = problem()
    call = {"input": X, "linear_weight": weight, "target": y, "linear_bias": bias, "lr": LR} | arguments
    with pytest.raises(error, match=f"^linear_full_batch_fit: {message}"):
        linear_full_batch_fit(call.pop("input"), call.pop("linear_weight"), call.pop("target"), **call)


def test_an_unknown_optimizer():
    X, y, weight, bias = problem()
    with pytest.raises(ValueError, match=r"^linear_full_batch_fit: optimizer must be .*, but got 'sdg'"):
        OPERATOR(X, y, weight, bias, LR, "sdg")
