"""The module and the public names."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from problems import DEVICES
from torch import nn

import torchintro
from torchintro import LinearMSELoss


def plain(criterion: LinearMSELoss, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(criterion.linear(x), y, reduction=criterion.reduction)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_a_linear_layer_and_its_loss(device: str, bias: bool, reduction: str) -> None:
    options = {"dtype": torch.float64, "device": device}
    criterion = LinearMSELoss(4, 3, bias=bias, reduction=reduction, **options)
    x, y = torch.randn(2, 5, 4, **options), torch.randn(2, 5, 3, **options)
    torch.testing.assert_close(criterion(x, y), plain(criterion, x, y))
    assert (criterion.linear.bias is None) == (not bias)


def test_weight_is_passed_on(device: str) -> None:
    criterion = LinearMSELoss(4, 1, device=device)
    x, y, weight = (torch.rand(shape, device=device) for shape in ((5, 4), (5, 1), (5,)))
    expected = (weight * (criterion.linear(x) - y).squeeze().square()).sum() / weight.sum()
    torch.testing.assert_close(criterion(x, y, weight), expected)


def test_it_initialises_as_linear_does(device: str) -> None:
    torch.manual_seed(3)
    criterion = LinearMSELoss(4, 3, device=device)
    torch.manual_seed(3)
    linear = nn.Linear(4, 3, device=device)
    assert torch.equal(criterion.linear.weight, linear.weight)
    assert torch.equal(criterion.linear.bias, linear.bias)


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
def test_device_and_dtype(device: str) -> None:
    criterion = LinearMSELoss(4, 3, device=device, dtype=torch.bfloat16)
    assert criterion.linear.weight.device.type == device
    assert criterion.linear.weight.dtype == torch.bfloat16


def test_it_is_an_ordinary_module(device: str) -> None:
    criterion = LinearMSELoss(4, 3, reduction="sum", device=device)
    x, y = torch.randn(5, 4, device=device), torch.randn(5, 3, device=device)
    assert [name for name, _ in criterion.named_parameters()] == ["linear.weight", "linear.bias"]
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        torch.testing.assert_close(other(x, y), criterion(x, y))
    fresh = LinearMSELoss(4, 3, reduction="sum", device=device)
    fresh.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(fresh(x, y), criterion(x, y))
    assert "reduction='sum'" in repr(criterion)
    assert criterion.double()(x.double(), y.double()).dtype == torch.float64


def test_from_linear_shares_the_parameters(device: str) -> None:
    head = nn.Linear(4, 3, device=device)
    criterion = LinearMSELoss.from_linear(head, reduction="sum")
    criterion(torch.randn(5, 4, device=device), torch.randn(5, 3, device=device)).backward()
    assert head.weight.grad is not None
    assert criterion.linear is head
    assert criterion.reduction == "sum"


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"LinearMSELoss.from_linear: linear must be an nn.Linear, but got Conv1d"):
        LinearMSELoss.from_linear(nn.Conv1d(1, 1, 1))
    for make in (
        lambda: LinearMSELoss(4, 3, reduction="avg"),
        lambda: LinearMSELoss.from_linear(nn.Linear(4, 3), reduction="avg"),
    ):
        with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', but got 'avg'"):
            make()


def test_public_names_exist() -> None:
    for name in torchintro.__all__:
        assert getattr(torchintro, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        torchintro.nothing  # noqa: B018


def spectral(linear: nn.Linear) -> nn.Linear:
    return torch.nn.utils.spectral_norm(linear)


def hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda module, inputs, output: output * 2)
    return linear


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    "make", [lambda: spectral(nn.Linear(3, 2)), lambda: hooked(nn.Linear(3, 2)), lambda: Scaled(3, 2)]
)
def test_a_layer_that_computes_something_else_is_refused(make) -> None:
    with pytest.raises(TypeError, match=r"linear must compute F.linear\(x, weight, bias\), but got"):
        LinearMSELoss.from_linear(make())
    with pytest.raises(TypeError, match=r"fit: model must compute F.linear"):
        torchintro.fit(make(), torch.randn(5, 3), torch.randn(5, 2), lr=0.1)


def test_parametrized_and_lazy_layers_are_taken(device: str) -> None:
    x, y = torch.randn(5, 3, device=device), torch.randn(5, 2, device=device)
    linear = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2, device=device))
    torch.testing.assert_close(LinearMSELoss.from_linear(linear)(x, y), nn.functional.mse_loss(linear(x), y))
    lazy = nn.LazyLinear(2, device=device)
    criterion = LinearMSELoss.from_linear(lazy)
    lazy(x)
    torch.testing.assert_close(criterion(x, y), nn.functional.mse_loss(lazy(x), y))
