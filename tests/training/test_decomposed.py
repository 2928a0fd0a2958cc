"""The training-loop operator, in each of its ways, against the plain PyTorch loop with torch.optim."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fit_problems import WAYS, Setting, Way, assert_agree, make_problem, options_of, plain_loop, run
from torch import Tensor


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


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
