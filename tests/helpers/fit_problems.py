"""Runs of the training-loop operator in each of its ways, and of the plain PyTorch loop that they replace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, mse_loss

import torchintro  # noqa: F401  loads the operators


def has_kernel(key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("torchintro::linear_mse_fit", key)


@dataclass(frozen=True)
class Way:
    """One operator on one device."""

    operator: str
    device: str

    def __call__(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            losses: tuple[Tensor, Tensor] = getattr(torch.ops.torchintro, self.operator)(*arguments, **keywords)
        return losses


WAYS = [
    pytest.param(Way("_linear_mse_fit_decomposed", "cpu"), id="decomposed-cpu"),
    pytest.param(
        Way("linear_mse_fit", "cpu"),
        id="cpu",
        marks=pytest.mark.skipif(not has_kernel("CPU"), reason="linear_mse_fit has no CPU kernel"),
    ),
    pytest.param(Way("_linear_mse_fit_decomposed", "cuda"), id="decomposed-cuda", marks=pytest.mark.cuda),
    pytest.param(
        Way("linear_mse_fit", "cuda"),
        id="cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif(not has_kernel("CUDA"), reason="built without CUDA")],
    ),
]


Setting = dict[str, Any]
SGD_DEFAULTS = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
ADAM_DEFAULTS = {"betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False}


def options_of(optimizer: str, settings: Sequence[Setting]) -> Tensor:
    """The operator's `options`, a row a model."""
    rows = []
    for setting in settings:
        if optimizer == "sgd":
            s = SGD_DEFAULTS | setting
            rows.append([s["momentum"], s["dampening"], s["weight_decay"], float(s["nesterov"]), 0.0])
        else:
            s = ADAM_DEFAULTS | setting
            rows.append([*s["betas"], s["weight_decay"], s["eps"], float(s["amsgrad"])])
    return torch.tensor(rows, dtype=torch.float64)


@dataclass
class Problem:
    """The arguments of a run of K models on the CPU, from which each way and the plain loop begin."""

    x: Tensor
    y: Tensor
    weight: Tensor  # (K, O, D)
    bias: Tensor | None
    lr: Tensor  # (E, K)
    optimizer: str = "sgd"
    settings: list[Setting] = field(default_factory=list)
    batch_size: int = 0
    shuffle: bool = False
    seed: int = 5
    validation: tuple[Tensor, Tensor] | None = None
    train_weight: bool = True
    train_bias: bool = True

    @property
    def epochs(self) -> int:
        return self.lr.size(0)

    @property
    def updates_an_epoch(self) -> int:
        return 1 if self.batch_size == 0 else math.ceil(self.x.size(0) / self.batch_size)

    def to(self, dtype: torch.dtype) -> Problem:
        validation = None if self.validation is None else (self.validation[0].to(dtype), self.validation[1].to(dtype))
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(
            self, x=self.x.to(dtype), y=self.y.to(dtype), weight=self.weight.to(dtype), bias=bias, validation=validation
        )


def make_problem(
    rows: int = 23,
    d: int = 3,
    o: int = 1,
    *,
    epochs: int = 6,
    optimizer: str = "sgd",
    settings: Sequence[Setting] = ({},),
    lr: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    validation: bool = False,
    **others: Any,
) -> Problem:
    models = len(settings)
    base = 0.05 if optimizer == "sgd" else 0.02
    rates = torch.tensor(lr if lr is not None else [base * (1 + 0.3 * k) for k in range(models)], dtype=torch.float64)
    # A schedule: every epoch its own rate.
    schedule = torch.linspace(1, 0.5, max(epochs, 1), dtype=torch.float64)[:epochs].unsqueeze(1)
    true = torch.randn(o, d, dtype=dtype)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, d, dtype=dtype)
        return x, x @ true.T + 0.5 + 0.1 * torch.randn(n, o, dtype=dtype)

    x, y = draw(rows)
    return Problem(
        x,
        y,
        torch.randn(1, o, d, dtype=dtype).repeat(models, 1, 1),
        torch.randn(1, o, dtype=dtype).repeat(models, 1) if bias else None,
        rates * schedule,
        optimizer,
        list(settings),
        validation=draw(9) if validation else None,
        **others,
    )


@dataclass
class Outcome:
    """What a run leaves behind, on the CPU."""

    losses: Tensor
    validation_losses: Tensor
    weight: Tensor
    bias: Tensor | None
    state: Tensor
    stopped: Tensor


def run(way: Way, p: Problem, calls: Sequence[int] | None = None) -> Outcome:
    """Run all epochs, in one call or in calls of so many epochs each."""
    models, o, d = p.weight.shape
    device = way.device

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, copy=True)

    weight, bias = p.weight.to(device, copy=True), there(p.bias)
    x, y = p.x.to(device), p.y.to(device)
    validation = (None, None) if p.validation is None else (there(p.validation[0]), there(p.validation[1]))
    state = torch.zeros(4, models, o * d + o, dtype=p.x.dtype, device=device)
    stopped = torch.full((models,), -1)
    generator = torch.Generator().manual_seed(p.seed)
    results = []
    epoch = 0
    for count in [p.epochs] if calls is None else calls:
        losses = way(
            x,
            y,
            weight,
            bias,
            p.lr[epoch : epoch + count].contiguous(),
            options_of(p.optimizer, p.settings),
            state,
            stopped,
            p.optimizer,
            epoch,
            epoch * p.updates_an_epoch,
            p.batch_size,
            p.shuffle,
            generator,
            *validation,
            p.train_weight,
            p.train_bias,
        )
        results.append(losses)
        epoch += count
    assert epoch == p.epochs
    for pair in results:
        for losses_part in pair:
            assert losses_part.dtype == torch.float64
            assert losses_part.device.type == "cpu"
    return Outcome(
        torch.cat([pair[0] for pair in results]),
        torch.cat([pair[1] for pair in results]),
        weight.cpu(),
        None if bias is None else bias.cpu(),
        state.cpu(),
        stopped,
    )


def plain_loop(p: Problem) -> Outcome:
    """The same by torch.optim, a model at a time, with `torch.optim`'s single-tensor implementations."""
    models, o, d = p.weight.shape
    nan = float("nan")
    losses = torch.full((p.epochs, models), nan, dtype=torch.float64)
    validation_losses = torch.full((p.epochs if p.validation else 0, models), nan, dtype=torch.float64)
    state = torch.zeros(4, models, o * d + o, dtype=p.x.dtype)
    stopped = torch.full((models,), -1)
    weights, biases = [], []
    for k in range(models):
        w = p.weight[k].clone().requires_grad_(p.train_weight)
        b = None if p.bias is None else p.bias[k].clone().requires_grad_(p.train_bias)
        trained = [t for t in (w, b) if t is not None and t.requires_grad]
        classes: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        defaults = {"weight_decay": 0.0} if p.optimizer == "adamw" else {}
        optimizer = classes[p.optimizer](trained, lr=1.0, foreach=False, **(defaults | p.settings[k]))
        generator = torch.Generator().manual_seed(p.seed)
        rows = p.x.size(0)
        size = p.batch_size or rows
        finite = [t.detach().clone() for t in (w, b) if t is not None]

        def put_back(w: Tensor = w, b: Tensor | None = b) -> None:
            with torch.no_grad():
                for tensor, before in zip((w, b), finite, strict=False):  # noqa: B023
                    if tensor is not None:
                        tensor.copy_(before)

        for e in range(p.epochs):
            order = torch.randperm(rows, generator=generator) if p.shuffle and size < rows else torch.arange(rows)
            optimizer.param_groups[0]["lr"] = p.lr[e, k].item()
            total = 0.0
            for chosen in order.split(size):
                loss = mse_loss(linear(p.x[chosen], w, b), p.y[chosen])
                total += loss.item() * len(chosen)
                if not math.isfinite(loss.item()):
                    stopped[k] = e
                    put_back()
                    break
                finite = [t.detach().clone() for t in (w, b) if t is not None]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses[e, k] = total / rows
            if stopped[k] >= 0:
                break
            if p.validation is not None:
                with torch.no_grad():
                    validation_losses[e, k] = mse_loss(linear(p.validation[0], w, b), p.validation[1])
                if not math.isfinite(validation_losses[e, k].item()):
                    stopped[k] = e
                    put_back()
                    break
        for tensor, before, begin in zip((w, b), finite, (0, o * d), strict=False):
            if tensor is not None and tensor.requires_grad:
                state[0, k, begin : begin + tensor.numel()] = before.flatten()
        names = ["momentum_buffer"] if p.optimizer == "sgd" else ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
        for row, name in enumerate(names, start=1):
            for tensor, begin in ((w, 0), (b, o * d)):
                memory = None if tensor is None else optimizer.state[tensor].get(name)
                if tensor is not None and memory is not None:
                    state[row, k, begin : begin + tensor.numel()] = memory.flatten()
        weights.append(w.detach())
        biases.append(None if b is None else b.detach())
    return Outcome(
        losses,
        validation_losses,
        torch.stack(weights),
        None if p.bias is None else torch.stack([b for b in biases if b is not None]),
        state,
        stopped,
    )


def assert_agree(actual: Outcome, expected: Outcome, rtol: float, atol: float) -> None:
    close: Callable[..., None] = torch.testing.assert_close
    assert actual.stopped.tolist() == expected.stopped.tolist()
    close(actual.losses, expected.losses, rtol=rtol, atol=atol, equal_nan=True)
    close(actual.validation_losses, expected.validation_losses, rtol=rtol, atol=atol, equal_nan=True)
    close(actual.weight, expected.weight, rtol=rtol, atol=atol)
    close(actual.state, expected.state, rtol=rtol, atol=atol)
    assert (actual.bias is None) == (expected.bias is None)
    if actual.bias is not None:
        close(actual.bias, expected.bias, rtol=rtol, atol=atol)
