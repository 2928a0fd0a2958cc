"""Calls of the training-loop operator: bad ones and what they are told, and what a call leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fit_problems import WAYS, Way, make_problem, options_of, run
from torch import Tensor, nn


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


@pytest.mark.cuda
def test_nothing_is_read_back_before_the_end() -> None:
    """Only the read-back at the end of a call waits, the same number of times for one epoch and for many."""
    way = Way("_linear_mse_fit_decomposed", "cuda")

    def waits(epochs: int) -> int:
        p = make_problem(64, 3, settings=[{"momentum": 0.9}], epochs=epochs, batch_size=8, validation=True)
        run(way, p)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run(way, p)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::_local_scalar_dense")

    assert waits(1) == waits(5)


def test_schemas_are_the_same() -> None:
    def signature(operator: str) -> str:
        return str(getattr(torch.ops.torchintro, operator).default._schema).split("(", 1)[1]

    assert signature("_linear_mse_fit_decomposed") == signature("linear_mse_fit")


def good_call(device: str) -> dict[str, Any]:
    p = make_problem(8, 3, 2, settings=[{"momentum": 0.9}] * 2, epochs=4)
    assert p.bias is not None
    return {
        "input": p.x.to(device),
        "target": p.y.to(device),
        "linear_weight": p.weight.to(device),
        "linear_bias": p.bias.to(device),
        "lr": p.lr,
        "options": options_of("sgd", p.settings),
        "state": torch.zeros(2, 2, 8, dtype=torch.float64, device=device),
        "stopped": torch.full((2,), -1),
        "optimizer": "sgd",
    }


def like(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda call: {name: change(call[name])}


# name: error, sentence, change to the good call.
BAD_CALLS: dict[str, tuple[type[Exception], str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "input of one dimension": (
        ValueError,
        r"input must have shape \(N, 3\) with at least one row, but got \(8,\)",
        like("input", lambda t: t[:, 0]),
    ),
    "input of other features": (
        ValueError,
        r"input must have shape \(N, 3\) with at least one row, but got \(8, 2\)",
        like("input", lambda t: t[:, :2]),
    ),
    "no rows": (
        ValueError,
        r"input must have shape \(N, 3\) with at least one row, but got \(0, 3\)",
        like("input", lambda t: t[:0]),
    ),
    "input in 16 bits": (
        TypeError,
        "input must have dtype float32 or float64, but got Half",
        like("input", Tensor.half),
    ),
    "target of one dimension": (
        ValueError,
        r"target must have shape \(8, 2\), but got \(8,\)",
        like("target", lambda t: t[:, 0]),
    ),
    "target of another dtype": (
        TypeError,
        "target must have dtype Double, but got Float",
        like("target", Tensor.float),
    ),
    "weight of two dimensions": (
        ValueError,
        r"linear_weight must have shape \(models, out_features, in_features\), none of them 0, but got \(2, 3\)",
        like("linear_weight", lambda t: t[0]),
    ),
    "no models": (
        ValueError,
        r"linear_weight must have shape \(models, out_features, in_features\), none of them 0, but got \(0, 2, 3\)",
        like("linear_weight", lambda t: t[:0]),
    ),
    "weight that is not contiguous": (
        ValueError,
        r"linear_weight must be contiguous, but has strides",
        like("linear_weight", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    ),
    "weight of another dtype": (
        TypeError,
        "linear_weight must have dtype Double, but got Float",
        like("linear_weight", Tensor.float),
    ),
    "bias of other models": (
        ValueError,
        r"linear_bias must have shape \(2, 2\), but got \(1, 2\)",
        like("linear_bias", lambda t: t[:1]),
    ),
    "lr of one dimension": (
        ValueError,
        r"lr must have shape \(epochs, models\), but got \(4,\)",
        like("lr", lambda t: t[:, 0]),
    ),
    "lr of other models": (
        ValueError,
        r"lr must have shape \(4, 2\), but got \(4, 1\)",
        like("lr", lambda t: t[:, :1]),
    ),
    "lr in float32": (TypeError, "lr must have dtype Double, but got Float", like("lr", Tensor.float)),
    "options of other columns": (
        ValueError,
        r"options must have shape \(2, 5\), but got \(2, 4\)",
        like("options", lambda t: t[:, :4].contiguous()),
    ),
    "stopped in 32 bits": (TypeError, "stopped must have dtype Long, but got Int", like("stopped", Tensor.int)),
    "a state of too few rows": (
        ValueError,
        r"state must have shape \(2, 2, 8\), or more rows, but got \(1, 2, 8\)",
        like("state", lambda t: t[:1]),
    ),
    "a state in float32": (TypeError, "state must have dtype Double, but got Float", like("state", Tensor.float)),
    "an unknown optimizer": (
        ValueError,
        "optimizer must be 'sgd', 'adam' or 'adamw', but got 'rmsprop'",
        lambda call: {"optimizer": "rmsprop"},
    ),
    "a negative batch size": (
        ValueError,
        "batch_size must be at least 0, but got -1",
        lambda call: {"batch_size": -1},
    ),
    "a negative epoch": (
        ValueError,
        "epoch and step must be at least 0, but got -1 and 0",
        lambda call: {"epoch": -1},
    ),
    "half a validation set": (
        ValueError,
        "validation_input and validation_target must be given together, but got one of them",
        lambda call: {"validation_input": call["input"]},
    ),
    "a validation target of other rows": (
        ValueError,
        r"validation_target must have shape \(8, 2\), but got \(7, 2\)",
        lambda call: {"validation_input": call["input"], "validation_target": call["target"][:7]},
    ),
    "another device": (
        ValueError,
        "target must be on .*, but got meta",
        like("target", lambda t: torch.empty(8, 2, dtype=torch.float64, device="meta")),
    ),
    "a sparse input": (
        TypeError,
        r"input must be a dense \(strided\) tensor, but got layout Sparse",
        like("input", Tensor.to_sparse),
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(way: Way, name: str) -> None:
    error, sentence, change = BAD_CALLS[name]
    call = good_call(way.device)
    way(**call)
    if name in ("another device", "a sparse input"):
        # Which kernel such a call reaches is the dispatcher's choice; none of them may take it.
        with pytest.raises((error, NotImplementedError)):
            way(**call | change(call))
        return
    with pytest.raises(error, match=f"^linear_mse_fit: {sentence}"):
        way(**call | change(call))


def test_no_epochs(way: Way) -> None:
    call = good_call(way.device)
    losses, validation_losses = way(**call | {"lr": call["lr"][:0]})
    assert losses.shape == (0, 2)
    assert validation_losses.shape == (0, 2)


def test_parameters_of_a_module(way: Way) -> None:
    """Leaves that require a gradient are trained in place; nothing of it is recorded."""
    model = nn.Linear(3, 1).double().to(way.device)
    p = make_problem(settings=[{}])
    before = model.weight.detach().clone()
    state = torch.zeros(1, 1, 4, dtype=torch.float64, device=way.device)
    rest = (p.lr, options_of("sgd", [{}]), state, torch.tensor([-1]), "sgd")
    version = model.weight._version
    weight, bias = model.weight.detach().unsqueeze(0), model.bias.detach().unsqueeze(0)
    losses, _ = way(p.x.to(way.device), p.y.to(way.device), weight, bias, *rest)
    assert not torch.equal(before, model.weight)
    assert not losses.requires_grad
    assert model.weight._version > version
