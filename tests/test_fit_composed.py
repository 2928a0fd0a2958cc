"""The training-loop operator, in each of its ways, against the plain PyTorch loop with torch.optim."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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
    pytest.param(Way("_linear_mse_fit_composed", "cpu"), id="composed-cpu"),
    pytest.param(
        Way("linear_mse_fit", "cpu"),
        id="cpu",
        marks=pytest.mark.skipif(not has_kernel("CPU"), reason="linear_mse_fit has no CPU kernel"),
    ),
    pytest.param(Way("_linear_mse_fit_composed", "cuda"), id="composed-cuda", marks=pytest.mark.cuda),
    pytest.param(
        Way("linear_mse_fit", "cuda"),
        id="cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif(not has_kernel("CUDA"), reason="built without CUDA")],
    ),
]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


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
        state[0, k] = torch.cat([t.flatten() for t in finite] + ([] if b is not None else [torch.zeros(o)]))
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


# In float64 both round in the 16th digit, a few hundred times in a row.
EXACT = {"rtol": 1e-10, "atol": 1e-12}

OPTIMIZERS: dict[str, tuple[str, list[Setting]]] = {
    "sgd": ("sgd", [{}, {"weight_decay": 0.1}]),
    "momentum": ("sgd", [{"momentum": 0.9}, {"momentum": 0.5, "weight_decay": 0.1}]),
    "dampening": ("sgd", [{"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9}]),
    "nesterov": ("sgd", [{"momentum": 0.9, "nesterov": True}, {"momentum": 0.8, "nesterov": True}]),
    "all of sgd": (
        "sgd",
        [
            {},
            {"momentum": 0.9},
            {"dampening": 0.5},
            {"momentum": 0.9, "nesterov": True},
            {"momentum": 0.9, "dampening": 0.5},
            {"weight_decay": 0.2},
        ],
    ),
    "adam": ("adam", [{}, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}]),
    "amsgrad": ("adam", [{"amsgrad": True, "betas": (0.3, 0.4)}, {"betas": (0.3, 0.4)}]),
    "adamw": ("adamw", [{}, {"weight_decay": 0.3}, {"weight_decay": 0.3, "amsgrad": True, "betas": (0.3, 0.4)}]),
}
# name: batch_size, shuffle; the last batch is short.
BATCHES = {"full": (0, False), "slices": (10, False), "permuted": (5, True), "more than all": (100, True)}


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_plain_loop(way: Way, name: str, batches: str) -> None:
    optimizer, settings = OPTIMIZERS[name]
    batch_size, shuffle = BATCHES[batches]
    for o, validation in ((1, True), (3, False)):
        p = make_problem(
            o=o,
            optimizer=optimizer,
            settings=settings,
            batch_size=batch_size,
            shuffle=shuffle,
            validation=validation,
        )
        assert_agree(run(way, p), plain_loop(p), **EXACT)


# One feature, sizes around those at which the kernels change course, and more than the one-launch kernel takes.
@pytest.mark.parametrize(
    ("rows", "d", "o"),
    [(100, 1, 1), (1, 1, 1), (70, 33, 1), (70, 40, 2), (33, 5, 8), (40, 600, 1), (9, 7, 65), (300, 10, 2)],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_shapes(way: Way, rows: int, d: int, o: int, optimizer: str) -> None:
    p = make_problem(
        rows, d, o, optimizer=optimizer, settings=[{}, {}, {}], lr=[0.01 / d, 0.02 / d, 0.03 / d], validation=True
    )
    p = replace(p, batch_size=32, shuffle=True)
    assert_agree(run(way, p), plain_loop(p), **EXACT)


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_is_as_exact_as_the_plain_loop(way: Way, name: str, batches: str) -> None:
    optimizer, settings = OPTIMIZERS[name]
    batch_size, shuffle = BATCHES[batches]
    p = make_problem(
        50,
        4,
        2,
        epochs=20,
        optimizer=optimizer,
        settings=settings,
        batch_size=batch_size,
        shuffle=shuffle,
        dtype=torch.float32,
        validation=True,
    )
    exact, eager, actual = plain_loop(p.to(torch.float64)), plain_loop(p), run(way, p)
    eps = torch.finfo(torch.float32).eps
    for part in ("losses", "validation_losses", "weight", "bias"):
        truth = getattr(exact, part)
        allowed = 4 * (getattr(eager, part) - truth).abs().max() + 8 * eps * truth.abs().max()
        error = (getattr(actual, part).double() - truth).abs().max()
        assert error <= allowed, f"{part}: {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("train", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_parameters_that_are_not_trained_stay(way: Way, optimizer: str, train: tuple[bool, bool]) -> None:
    setting: Setting = {"momentum": 0.9} if optimizer == "sgd" else {"weight_decay": 0.1}
    p = make_problem(o=2, optimizer=optimizer, settings=[setting] * 2, batch_size=7)
    p = replace(p, train_weight=train[0], train_bias=train[1])
    if any(train):
        assert_agree(run(way, p), plain_loop(p), **EXACT)
    actual = run(way, p)
    assert train[0] or torch.equal(actual.weight, p.weight)
    assert p.bias is not None
    assert actual.bias is not None
    assert train[1] or torch.equal(actual.bias, p.bias)


def test_without_bias(way: Way) -> None:
    p = make_problem(o=3, settings=[{"momentum": 0.9}, {}], bias=False, batch_size=6, shuffle=True, validation=True)
    assert_agree(run(way, p), plain_loop(p), **EXACT)


@pytest.mark.parametrize("layout", ["transposed", "columns", "expanded"])
def test_strides(way: Way, layout: str) -> None:
    p = make_problem(d=4, o=2, settings=[{}, {}], batch_size=10, shuffle=True, validation=True)

    def laid_out(matrix: Tensor) -> Tensor:
        n, columns = matrix.shape
        if layout == "transposed":
            return matrix.T.contiguous().T
        if layout == "columns":
            return torch.full((n, 2 * columns + 1), float("nan"), dtype=matrix.dtype)[:, 1::2].copy_(matrix)
        return matrix[:1].expand(n, columns)

    assert p.validation is not None
    moved = replace(
        p, x=laid_out(p.x), y=laid_out(p.y), validation=(laid_out(p.validation[0]), laid_out(p.validation[1]))
    )
    assert_agree(run(way, moved), plain_loop(moved), **EXACT)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("batches", BATCHES)
def test_several_calls_equal_one_to_the_bit(way: Way, name: str, batches: str) -> None:
    optimizer, settings = OPTIMIZERS[name]
    batch_size, shuffle = BATCHES[batches]
    p = make_problem(
        optimizer=optimizer,
        settings=settings,
        epochs=9,
        batch_size=batch_size,
        shuffle=shuffle,
        validation=True,
        dtype=torch.float32,
    )
    p.settings.append(dict(p.settings[0]))  # and one model that diverges
    p.weight, p.bias = torch.cat([p.weight, p.weight[:1]]), torch.cat([p.bias, p.bias[:1]])  # type: ignore[list-item]
    p.lr = torch.cat([p.lr, torch.full((9, 1), 1e25 if optimizer != "sgd" else 1e7, dtype=torch.float64)], dim=1)
    one = run(way, p)
    assert one.stopped[-1] >= 0
    assert (one.stopped[:-1] == -1).all()
    for calls in ([1] * 9, [4, 5], [0, 9], [8, 1]):
        several = run(way, p, calls)
        for part in ("losses", "validation_losses", "weight", "bias", "state"):
            a, b = getattr(several, part), getattr(one, part)
            assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)), part
        assert torch.equal(several.stopped, one.stopped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("validation", [False, True])
def test_one_of_several_models_diverges(way: Way, dtype: torch.dtype, batches: str, validation: bool) -> None:
    batch_size, shuffle = BATCHES[batches]
    p = make_problem(
        settings=[{}, {"momentum": 0.9}, {}],
        lr=[0.05, 1e5 if dtype == torch.float32 else 1e40, 0.02],
        epochs=12,
        batch_size=batch_size,
        shuffle=shuffle,
        validation=validation,
        dtype=dtype,
    )
    actual, expected = run(way, p), plain_loop(p)
    assert expected.stopped[1] >= 0
    # The divergent model's losses grow by orders of magnitude each step, and so do their errors.
    assert actual.stopped.tolist() == expected.stopped.tolist()
    stopped = int(actual.stopped[1])
    assert actual.losses[stopped + 1 :, 1].isnan().all()
    loss = actual.losses[stopped, 1].item()
    if validation and math.isfinite(loss):
        assert not actual.validation_losses[stopped, 1].isfinite()
    else:
        assert not math.isfinite(loss)
        assert actual.validation_losses[stopped:, 1].isnan().all()
    torch.testing.assert_close(actual.losses, expected.losses, rtol=1e-3, atol=1e-5, equal_nan=True)
    # It is back at the parameters of the last finite loss.
    assert actual.bias is not None
    last = torch.cat([actual.weight[1].flatten(), actual.bias[1].flatten()])
    assert torch.equal(last, actual.state[0, 1])
    assert last.isfinite().all()
    # The others know nothing of it.
    alone = replace(
        p,
        weight=p.weight[[0, 2]],
        bias=None if p.bias is None else p.bias[[0, 2]],
        lr=p.lr[:, [0, 2]].contiguous(),
        settings=[p.settings[0], p.settings[2]],
    )
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else EXACT
    others = run(way, alone)
    torch.testing.assert_close(actual.weight[[0, 2]], others.weight, **tolerance)
    torch.testing.assert_close(actual.losses[:, [0, 2]], others.losses, **tolerance)


def test_a_loss_that_is_never_finite(way: Way) -> None:
    p = make_problem(settings=[{}, {}], dtype=torch.float32, validation=True)
    p.y[3] = float("nan")
    actual = run(way, p)
    assert actual.stopped.tolist() == [0, 0]
    assert torch.equal(actual.weight, p.weight)
    assert torch.equal(actual.bias, p.bias)
    assert actual.losses.isnan().all()
    assert actual.validation_losses.isnan().all()


def test_only_the_validation_loss_is_not_finite(way: Way) -> None:
    p = make_problem(settings=[{}], dtype=torch.float32, validation=True)
    assert p.validation is not None
    p.validation[1][2] = float("inf")
    actual = run(way, p)
    assert actual.stopped.tolist() == [0]
    assert torch.equal(actual.weight, p.weight)
    assert torch.equal(actual.bias, p.bias)
    assert actual.losses[0].isfinite().all()
    assert actual.losses[1:].isnan().all()
    assert actual.validation_losses[0].isinf().all()
    assert actual.validation_losses[1:].isnan().all()


def test_a_float32_loss_is_infinite_where_float32_ends(way: Way) -> None:
    p = make_problem(rows=4, d=1, settings=[{}], dtype=torch.float32)
    p.y.fill_(3e19)  # whose square is not a float32
    actual = run(way, p)
    assert actual.stopped.tolist() == [0]
    assert actual.losses[0].isinf().all()


def test_a_stopped_model_is_left_alone(way: Way) -> None:
    p = make_problem(settings=[{"momentum": 0.9}] * 2, validation=True)
    device = way.device
    weight = p.weight.to(device, copy=True)
    assert p.bias is not None
    assert p.validation is not None
    bias = p.bias.to(device, copy=True)
    state = torch.randn(2, 2, 4, dtype=torch.float64).to(device)
    before = state.clone()
    stopped = torch.tensor([-1, 3])
    losses, validation_losses = way(
        p.x.to(device),
        p.y.to(device),
        weight,
        bias,
        p.lr,
        options_of("sgd", p.settings),
        state,
        stopped,
        "sgd",
        7,
        7,
        validation_input=p.validation[0].to(device),
        validation_target=p.validation[1].to(device),
    )
    assert stopped.tolist() == [-1, 3]
    assert torch.equal(weight[1].cpu(), p.weight[1])
    assert torch.equal(bias[1].cpu(), p.bias[1])
    assert torch.equal(state[:, 1], before[:, 1])
    assert not torch.equal(state[:, 0], before[:, 0])
    for part in (losses, validation_losses):
        assert part[:, 1].isnan().all()
        assert part[:, 0].isfinite().all()


def test_the_generator_is_used_once_an_epoch(way: Way) -> None:
    p = make_problem(settings=[{}], epochs=3, batch_size=5, shuffle=True)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for _ in range(3):
        torch.randperm(p.x.size(0), generator=generators[0])
    device = way.device
    way(
        p.x.to(device),
        p.y.to(device),
        p.weight.to(device, copy=True),
        None,
        p.lr,
        options_of("sgd", p.settings),
        torch.zeros(1, 1, 4, dtype=torch.float64, device=device),
        torch.tensor([-1]),
        "sgd",
        batch_size=5,
        generator=generators[1],
    )
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_the_global_generator_is_used_without_one(way: Way) -> None:
    p = make_problem(settings=[{}], batch_size=5, shuffle=True)
    device = way.device
    losses = []
    for generator in (None, torch.Generator().manual_seed(11)):
        torch.manual_seed(11)
        weight = p.weight.to(device, copy=True)
        state = torch.zeros(1, 1, 4, dtype=torch.float64, device=device)
        rest = (p.lr, options_of("sgd", [{}]), state, torch.tensor([-1]), "sgd")
        losses.append(way(p.x.to(device), p.y.to(device), weight, None, *rest, batch_size=5, generator=generator)[0])
    assert torch.equal(*losses)


def test_more_updates_than_are_sent_at_once(way: Way) -> None:
    """Adam's factors of many updates, and epochs of many batches."""
    p = make_problem(40, 1, optimizer="adam", settings=[{}, {"betas": (0.99, 0.9)}], epochs=40, batch_size=1)
    assert_agree(run(way, p), plain_loop(p), rtol=1e-8, atol=1e-10)


def test_many_models(way: Way) -> None:
    p = make_problem(30, 3, 2, settings=[{"momentum": 0.01 * k} for k in range(70)], lr=[0.001 * k for k in range(70)])
    p = replace(p, batch_size=8, shuffle=True)
    assert_agree(run(way, p), plain_loop(p), **EXACT)


@pytest.mark.cuda
def test_nothing_is_read_back_before_the_end() -> None:
    """Only the read-back at the end of a call waits, the same number of times for one epoch and for many."""
    way = Way("_linear_mse_fit_composed", "cuda")

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

    assert signature("_linear_mse_fit_composed") == signature("linear_mse_fit")


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
