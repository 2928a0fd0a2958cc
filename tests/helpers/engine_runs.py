"""Training runs by every engine and by hand, and how far they may be apart.

The yardstick is that loop in float64, on rows and initial parameters that float32 holds exactly. A distance from it is
the largest difference in a series (losses, validation losses, each parameter) over the series' largest number.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from plain_loop import plain_loop
from torch import Tensor, nn

from torchintro.nn import initial_linear
from torchintro.training.fit import fit
from torchintro.training.options import ENGINES
from torchintro.training.row_kinds import MemoryRows

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}

# Name: class of torch.optim, its arguments.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "momentum and dampening": ("SGD", {"momentum": 0.8, "dampening": 0.3}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "weight decay": ("SGD", {"weight_decay": 0.2}),
    "adam": ("Adam", {}),
    "adam and weight decay": ("Adam", {"weight_decay": 0.2, "betas": (0.8, 0.95)}),
    "amsgrad": ("Adam", {"amsgrad": True, "betas": (0.7, 0.9), "eps": 1e-6}),
    "adamw": ("AdamW", {"weight_decay": 0.2}),
}
# Of 23 rows: two kinds of short last batches.
BATCHES: dict[str, dict[str, Any]] = {
    "full": {},
    "slices": {"batch_size": 8, "shuffle": False},
    "shuffled": {"batch_size": 6, "seed": 3},
    "one batch": {"batch_size": 100, "seed": 3},
}
# The engines with the kinds of batches that they take.
TAKEN = [
    (engine, batches)
    for engine, batches in itertools.product(ENGINES[1:], BATCHES)
    if engine != "statistics" or batches in ("full", "one batch")
]
PARAMETERS = ("all", "no bias", "frozen bias", "frozen weight")


@dataclass(frozen=True)
class Case:
    """A run of :func:`torchintro.fit` in all but engine and dtype; hashable, so that an oracle serves every engine."""

    optimizer: str = "sgd"
    batches: str = "full"
    parameters: str = "all"
    schedule: bool = False
    outputs: int = 1
    validation: bool = False
    rows: int = 23
    features: int = 5
    epochs: int = 4
    seed: int = 0

    @property
    def lr(self) -> float | list[float]:
        rate = 0.05 if OPTIMIZERS[self.optimizer][0] == "SGD" else 0.02
        return [rate * (1 - 0.2 * epoch / self.epochs) for epoch in range(self.epochs)] if self.schedule else rate

    def draw(self, dtype: torch.dtype) -> tuple[nn.Linear, list[Tensor]]:
        """Return the model, the rows and those held out, which are the same numbers in any dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        true = torch.randn(self.outputs, self.features, generator=generator)
        data = []
        for rows in (self.rows, 9):
            X = torch.randn(rows, self.features, generator=generator)
            data += [X, X @ true.T + 0.5 + 0.1 * torch.randn(rows, self.outputs, generator=generator)]
        model = initial_linear(self.features, self.outputs, seed=self.seed + 1, dtype=torch.float32)
        if self.parameters == "no bias":
            model.bias = None
        if self.parameters == "frozen bias":
            model.bias.requires_grad_(False)
        if self.parameters == "frozen weight":
            model.weight.requires_grad_(False)
        return model.to(dtype), [part.to(dtype) for part in data]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run left: its losses and its parameters by name."""

    losses: Tensor
    validation_losses: Tensor
    parameters: dict[str, Tensor]

    def series(self) -> Iterator[tuple[str, Tensor]]:
        yield "losses", self.losses
        yield "validation losses", self.validation_losses
        yield from self.parameters.items()

    def distance(self, exact: Outcome) -> float:
        """How far it is from the exact one."""
        distances = [0.0]
        for (name, mine), (other, theirs) in zip(self.series(), exact.series(), strict=True):
            assert name == other
            assert mine.shape == theirs.shape, name
            if theirs.numel():
                distances.append(((mine.double() - theirs).abs().max() / theirs.abs().max()).item())
        return max(distances)

    def equals(self, other: Outcome) -> bool:
        """Say whether it is the same to the bit, with NaN where the other has it."""
        pairs = zip(self.series(), other.series(), strict=True)
        return all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for (_, a), (_, b) in pairs)


def parameters_of(model: nn.Linear) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def options_of(optimizer: str) -> dict[str, Any]:
    """The arguments of `fit` for one of OPTIMIZERS."""
    class_name, given = OPTIMIZERS[optimizer]
    named = {key: given[key] for key in ("momentum", "weight_decay") if key in given}
    return {
        "optimizer": class_name,
        **named,
        "optimizer_options": {key: value for key, value in given.items() if key not in named},
    }


@functools.cache
def run_by_hand(case: Case, dtype: torch.dtype) -> Outcome:
    model, (X, y, X_held_out, y_held_out) = case.draw(dtype)
    class_name, options = OPTIMIZERS[case.optimizer]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = getattr(torch.optim, class_name)(trained, lr=case.lr[0] if case.schedule else case.lr, **options)
    losses = plain_loop(
        model,
        X,
        y,
        optimizer,
        epochs=case.epochs,
        validation=(X_held_out, y_held_out) if case.validation else None,
        lr=case.lr if case.schedule else None,
        **BATCHES[case.batches],
    )
    return Outcome(*losses, parameters_of(model))


def run_engine(case: Case, dtype: torch.dtype, engine: str, **others: Any) -> Outcome:
    model, (X, y, X_held_out, y_held_out) = case.draw(dtype)
    result = fit(
        model,
        X,
        y,
        lr=case.lr,
        epochs=case.epochs,
        validation=(X_held_out, y_held_out) if case.validation else None,
        engine=engine,
        **options_of(case.optimizer),
        **BATCHES[case.batches],
        **others,
    )
    assert result.engine == engine or engine == "auto"
    for losses in (result.losses, result.validation_losses):
        assert losses is None or (losses.dtype, losses.shape) == (torch.float64, (case.epochs,))
    assert (result.validation_losses is None) == (not case.validation)
    held_out = torch.zeros(0, dtype=torch.float64) if result.validation_losses is None else result.validation_losses
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    return Outcome(result.losses, held_out, parameters_of(model))


def assert_as_the_plain_loop(case: Case, dtype: torch.dtype, engine: str) -> None:
    """Compare with float64.

    How far the plain loop in float32 is off, in roundings, says how much the problem magnifies them; eight at least,
    for what it happens to hit exactly. An engine may be four times as far off, in roundings of its own dtype.
    """
    exact, plain = run_by_hand(case, torch.float64), run_by_hand(case, torch.float32)
    roundings = max(plain.distance(exact) / EPS[torch.float32], 8.0)
    distance = run_engine(case, dtype, engine).distance(exact)
    assert distance <= 4 * roundings * EPS[dtype], f"{case}: {distance:.3e}, {roundings:.1f} roundings"


def rows_of(rows: int, features: int = 5, outputs: int = 1, dtype: torch.dtype = torch.float32) -> MemoryRows:
    _, (X, y, X_held_out, y_held_out) = Case(rows=rows, features=features, outputs=outputs).draw(dtype)
    return MemoryRows(X, y, (X_held_out, y_held_out))
