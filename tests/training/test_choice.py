"""Problems that are hard for second moments, and which engine ``auto`` takes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engine_runs import EPS, OPTIMIZERS, Outcome, options_of, parameters_of, rows_of
from plain_loop import plain_loop
from torch import Tensor

from torchintro.nn import initial_linear
from torchintro.training.choice import choose
from torchintro.training.fit import fit
from torchintro.training.optimizers import parse_optimizer
from torchintro.training.options import TrainingOptions

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


# Problems that are hard for second moments. Of each the precision that is kept is stated: none but the first loses any.


@dataclass(frozen=True, eq=False)
class Hard:
    """Rows in float32, and a run on them; `scale` multiplies the initial weights."""

    X: Tensor
    y: Tensor
    lr: float
    epochs: int = 100
    optimizer: str = "sgd"
    bias: bool = True
    scale: float = 1.0

    def run(self, engine: str, dtype: torch.dtype) -> Outcome:
        model = initial_linear(self.X.shape[1], self.y.shape[1], seed=1, dtype=torch.float32)
        with torch.no_grad():
            model.weight *= self.scale
        if not self.bias:
            model.bias = None
        model = model.to(dtype)
        X, y = self.X.to(dtype), self.y.to(dtype)
        if engine == "plain":
            class_name, options = OPTIMIZERS[self.optimizer]
            optimizer = getattr(torch.optim, class_name)(model.parameters(), lr=self.lr, **options)
            losses, _ = plain_loop(model, X, y, optimizer, epochs=self.epochs)
        else:
            arguments = {"lr": self.lr, "epochs": self.epochs, "engine": engine, **options_of(self.optimizer)}
            losses = fit(model, X, y, **arguments).losses
        return Outcome(losses, losses[:0], parameters_of(model))


def draw_rows(rows: int = 500, features: int = 4, noise: float = 0.1, bias: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    y = X @ torch.randn(features, 1, generator=generator, dtype=torch.float64) + bias
    return X, y + noise * y.std(correction=0).nan_to_num(1.0) * torch.randn(
        rows, 1, generator=generator, dtype=torch.float64
    )


def make_hard(X: Tensor, y: Tensor, lr: float, **others: Any) -> Hard:
    return Hard(X.float(), y.float(), lr, **others)


def collinear(difference: float) -> tuple[Tensor, Tensor]:
    X, y = draw_rows()
    X[:, 1] = X[:, 0] + difference * X[:, 1]
    return X, y


X4, y4 = draw_rows()
HARD: dict[str, Hard] = {
    "means": make_hard(X4 + 1e4, y4, 1e-9, epochs=200),
    "means of the targets too": make_hard(X4 + 1e4, y4 + 1e4, 1e-9, epochs=200),
    "means, adam": make_hard(X4 + 1e4, y4, 1e-3, epochs=200, optimizer="adam"),
    "collinear to 1e-2": make_hard(*collinear(1e-2), 0.3, epochs=300),
    "collinear to 1e-4": make_hard(*collinear(1e-4), 0.3, epochs=300),
    "collinear to 1e-4, momentum": make_hard(*collinear(1e-4), 0.05, epochs=300, optimizer="momentum"),
    "collinear to 1e-4, adam": make_hard(*collinear(1e-4), 0.01, epochs=300, optimizer="adam"),
    "small features": make_hard(X4 * 1e-10, y4, 1e19, bias=False, scale=1e10),
    "small features, small steps": make_hard(X4 * 1e-10, y4, 0.1),
    "large features": make_hard(X4 * 1e10, y4, 1e-21, scale=1e-10),
    "large features and targets": make_hard(X4 * 1e10, y4 * 1e10, 1e-21),
    "small targets": make_hard(X4, y4 * 1e-10, 0.1),
    "large targets": make_hard(X4, y4 * 1e10, 0.1),
    "fewer rows than features": make_hard(*draw_rows(5, 12), 0.05, epochs=300),
    "fewer rows than features, adam": make_hard(*draw_rows(5, 12), 0.05, optimizer="adam"),
    "one row": make_hard(*draw_rows(1, 3), 0.05, epochs=300),
    "one row and feature": make_hard(*draw_rows(1, 1), 0.05),
}


@functools.cache
def exact_run(name: str) -> Outcome:
    return HARD[name].run("plain", torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HARD)
def test_second_moments_keep_all_digits_of_the_parameters(name, dtype):
    """The loop is in float64: what float32 rows lose is the rounding of the result, half a unit, and never more.

    In float64 second moments are rounded once where the plain loop rounds residuals: a thousand roundings of the
    largest parameter are allowed, for what the updates magnify (a hundred are met with nearly collinear columns).
    """
    exact, outcome = exact_run(name), HARD[name].run("statistics", dtype)
    allowed = EPS[dtype] / 2 + 1000 * EPS[torch.float64]
    for key, parameter in outcome.parameters.items():
        theirs = exact.parameters[key]
        assert ((parameter.double() - theirs).abs().max() / theirs.abs().max()).item() <= allowed, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HARD)
def test_second_moments_keep_the_digits_of_every_loss(name, dtype):
    """Each loss to 16 roundings, in float64, of what cancels in it: the targets' mean square and the first loss."""
    exact, losses = exact_run(name).losses, HARD[name].run("statistics", dtype).losses
    size = max(exact[0].item(), HARD[name].y.double().square().mean().item())
    assert (losses - exact).abs().max() <= 16 * EPS[torch.float64] * size


@pytest.mark.parametrize("engine", ["fused", "statistics"])
@pytest.mark.parametrize("name", HARD)
def test_hard_problems_are_no_harder_than_for_the_plain_loop(name, engine):
    """In float32, at most four times as far from float64 as the plain loop is, or eight roundings."""
    exact, plain = exact_run(name), HARD[name].run("plain", torch.float32)
    allowed = 4 * max(plain.distance(exact), 8 * EPS[torch.float32])
    assert HARD[name].run(engine, torch.float32).distance(exact) <= allowed


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("share", [1e-8, 1e-10, 1e-12])
def test_second_moments_of_near_perfect_fits(share, optimizer):
    """Residuals of 1e-8, 1e-10, 1e-12 of the targets' variance: eight, six, four digits of the loss are documented.

    Met are a digit less, 1e-16 being the rounding of each of some sums. That is still more than the float32 loop has,
    whose residuals are differences of rounded numbers, and the parameters keep all their digits.
    """
    lr = {"sgd": 0.3, "momentum": 0.03}[optimizer]
    X, y = draw_rows(noise=math.sqrt(share))
    hard = make_hard(X, y, lr, epochs=300, optimizer=optimizer)
    exact = hard.run("plain", torch.float64)
    variance = hard.y.double().var(correction=0)
    assert 0.5 * share <= exact.losses[-1] / variance <= 2 * share

    def error(outcome: Outcome) -> float:
        return ((outcome.losses - exact.losses).abs() / exact.losses).max().item()

    ours, plain = hard.run("statistics", torch.float32), hard.run("plain", torch.float32)
    assert error(ours) <= 16 * EPS[torch.float64] / share
    assert error(ours) < error(plain)
    for name, parameter in ours.parameters.items():
        theirs = exact.parameters[name]
        assert (parameter.double() - theirs).abs().max() <= (EPS[torch.float32] / 2 + 1e-13) * theirs.abs().max()
    assert (ours.losses >= 0).all()


@pytest.mark.parametrize("name", ["fewer rows than features", "one row", "one row and feature"])
def test_second_moments_of_a_perfect_fit_are_never_negative(name):
    losses = HARD[name].run("statistics", torch.float32).losses
    assert (losses >= 0).all()
    assert losses[-1] <= 16 * EPS[torch.float64] * losses[0]


# What `auto` takes.

AUTO: dict[str, tuple[tuple[int, int, int], torch.dtype, dict[str, Any], str, str]] = {
    "many rows": (
        (20000, 4, 1),
        torch.float32,
        {},
        "statistics",
        "full batch: one pass over the rows serves all epochs",
    ),
    "many rows, a batch of all": (
        (20000, 4, 1),
        torch.float32,
        {"batch_size": 20000},
        "statistics",
        "full batch: one pass over the rows serves all epochs",
    ),
    "many rows, adamw": ((20000, 4, 3), torch.float32, {"optimizer": "adamw"}, "statistics", "full batch: one pass"),
    "many rows, one epoch": ((20000, 40, 1), torch.float32, {"epochs": 1}, "fused", "so few rows that second moments"),
    "mini-batches": ((20000, 4, 1), torch.float32, {"batch_size": 256}, "fused", "mini-batches"),
    "mini-batches in float64": ((200, 4, 1), torch.float64, {"batch_size": 8}, "fused", "mini-batches"),
    "float64": ((20000, 4, 1), torch.float64, {}, "fused", "full batch in float64, of which second moments would lose"),
    "few rows, few features": ((10, 4, 1), torch.float32, {}, "statistics", "full batch: one pass over the rows"),
    "fewer rows than few features": ((3, 4, 1), torch.float32, {}, "statistics", "full batch: one pass over the rows"),
    "fewer rows than features": (
        (10, 200, 1),
        torch.float32,
        {},
        "fused",
        "so few rows that second moments are not worth it",
    ),
    "more features than second moments are for": ((10, 4097, 1), torch.float32, {"epochs": 2}, "fused", "so few rows"),
    "rmsprop": ((200, 4, 1), torch.float32, {"optimizer": "rmsprop"}, "autograd", "the optimizer RMSprop with these"),
    "maximize": (
        (200, 4, 1),
        torch.float32,
        {"lr": 1e-5, "optimizer_options": {"maximize": True}},
        "autograd",
        "the optimizer SGD with these options, none of plain sgd, adam and adamw",
    ),
    "options that are the default": (
        (20000, 4, 1),
        torch.float32,
        {"optimizer_options": {"maximize": False, "foreach": True}},
        "statistics",
        "full batch",
    ),
    "bfloat16": ((200, 4, 1), torch.bfloat16, {}, "autograd", "bfloat16 parameters, whose rounding in each step only"),
    "float16": ((200, 4, 1), torch.float16, {"batch_size": 8}, "autograd", "float16 parameters, whose rounding"),
    "64 targets": ((200, 4, 64), torch.float32, {"batch_size": 8}, "fused", "mini-batches"),
    "65 targets": ((200, 4, 65), torch.float32, {"batch_size": 8}, "autograd", "products of matrices, with so many"),
    "65 targets in float64": ((200, 4, 65), torch.float64, {}, "autograd", "products of matrices, with so many"),
    "65 targets, many rows": ((20000, 4, 65), torch.float32, {"epochs": 50}, "statistics", "full batch: one pass"),
    "65 targets, few rows": ((10, 200, 65), torch.float32, {"epochs": 3}, "autograd", "products of matrices"),
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_takes(name):
    (rows, features, outputs), dtype, given, engine, reason = AUTO[name]
    X, y = torch.randn(rows, features).to(dtype), torch.randn(rows, outputs).to(dtype)
    model = initial_linear(features, outputs, seed=0, dtype=dtype)
    arguments = {"lr": 1e-3, "epochs": 20, "seed": 0, **given}
    result = fit(model, X, y, **arguments)
    assert result.engine == engine
    assert result.reason.startswith(reason)
    if engine != "autograd" or dtype in (torch.float32, torch.float64):
        same = initial_linear(features, outputs, seed=0, dtype=dtype)
        asked = fit(same, X, y, engine=engine, **arguments)
        assert (asked.engine, asked.reason) == (engine, "asked for")
        assert torch.equal(asked.losses, result.losses)
        assert torch.equal(same.weight, model.weight)


@pytest.mark.parametrize(
    ("models", "outputs", "engine"), [(1, 65, "autograd"), (2, 65, "fused"), (1, 1, "fused"), (40, 1, "fused")]
)
def test_auto_takes_the_number_of_models_into_account(models, outputs, engine):
    optimizer = parse_optimizer("train", "sgd", 0.0, 0.0, None)
    options = TrainingOptions(epochs=3, batch_size=8)
    choice = choose(rows_of(100, outputs=outputs), options, [optimizer] * models)
    assert choice.engine == engine


@pytest.mark.parametrize("engine", ["fused", "statistics"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"optimizer": "rmsprop"}, "the optimizer RMSprop with these options, none of plain sgd, adam and adamw"),
        ({"optimizer_options": {"maximize": True}}, "the optimizer SGD with these options, none of plain sgd, .*"),
        ({"dtype": torch.bfloat16}, "bfloat16 parameters, whose rounding in each step only the loop itself has"),
        ({"dtype": torch.float16}, "float16 parameters, whose rounding in each step only the loop itself has"),
    ],
)
def test_what_an_engine_cannot_do_it_says(engine, change, reason):
    dtype = change.get("dtype", torch.float32)
    arguments = {key: value for key, value in change.items() if key != "dtype"}
    model = initial_linear(2, 1, seed=0, dtype=dtype)
    before = parameters_of(model)
    X, y = torch.randn(5, 2).to(dtype), torch.randn(5, 1).to(dtype)
    sentence = f"^fit: engine '{engine}' cannot do this: {reason}; auto finds one that can$"
    with pytest.raises(ValueError, match=sentence):
        fit(model, X, y, lr=0.1, epochs=2, engine=engine, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in parameters_of(model).items())
    assert fit(model, X, y, lr=1e-3, epochs=2, **arguments).engine == "autograd"
