"""Finite differences of first and second order, in both regimes, for every subset of gradients x reduction.

Each of these meets every weight, with a bias and without: a subset at some reduction, a reduction at some subset.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import Problem, make_problem
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck

from torchintro import linear_mse_loss

SUBSETS = [subset for subset in itertools.product([False, True], repeat=4) if any(subset)]
SUBSET_IDS = ["".join(name for name, wanted in zip("xwtb", subset, strict=True) if wanted) for subset in SUBSETS]
# Few outputs, many outputs; small enough for finite differences of every element.
OUTPUTS = [pytest.param((3, 4, 2), id="few"), pytest.param((2, 2, 17), id="many")]


def as_function(problem: Problem):
    leaves = problem.leaves()
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        remaining = iter(tensors)
        return problem.call(
            linear_mse_loss, [next(remaining) if leaf is not None and leaf.requires_grad else leaf for leaf in leaves]
        )

    return function, wanted


@pytest.mark.parametrize("subset", SUBSETS, ids=SUBSET_IDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sizes", OUTPUTS)
def test_first_and_second_order(device: str, sizes: tuple, reduction: str, subset: tuple) -> None:
    rows, d, o = sizes
    first = SUBSETS.index(subset) + ["mean", "sum", "none"].index(reduction)
    for i, bias in enumerate([False, True]):
        weight = (None, "element", "row")[(first + i) % 3]
        if not bias and subset == (False, False, False, True):
            continue  # the only gradient asked for is that of a bias that is not there
        problem = make_problem(
            rows, d, o, bias=bias, weight=weight, reduction=reduction, requires_grad=subset, device=device
        )
        function, wanted = as_function(problem)
        assert gradcheck(function, wanted, fast_mode=o > 8)
        assert gradgradcheck(function, wanted, fast_mode=o > 8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, "element", "row"])
def test_forward_mode_and_batched_gradients(device: str, reduction: str, weight: str | None) -> None:
    function, wanted = as_function(make_problem(3, 4, 2, reduction=reduction, weight=weight, device=device))
    assert gradcheck(function, wanted, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, wanted, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("position", range(4))
def test_a_tangent_on_any_one_argument(device: str, position: int) -> None:
    problem = make_problem(5, 3, 2, device=device)
    tensors = problem.tensors()
    direction = torch.randn_like(tensors[position])
    with forward_ad.dual_level():
        duals = list(tensors)
        duals[position] = forward_ad.make_dual(tensors[position], direction)
        loss, tangent = forward_ad.unpack_dual(problem.call(linear_mse_loss, duals))
    name = ("input", "linear_weight", "target", "linear_bias")[position]
    expected = (problem.results(linear_mse_loss)[name] * direction).sum()
    torch.testing.assert_close(tangent, expected)
    torch.testing.assert_close(loss, problem.call(linear_mse_loss))


def test_third_order(device: str) -> None:
    problem = make_problem(4, 3, 2, bias=False, device=device)

    def cubic(weight: torch.Tensor) -> torch.Tensor:
        return linear_mse_loss(problem.input, weight**2, problem.target)

    def same(weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(problem.input @ (weight**2).T, problem.target)

    gradients = []
    for function in (cubic, same):
        weight = problem.linear_weight.detach().requires_grad_()
        value = function(weight)
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
            value = gradient.square().sum()
        gradients.append(gradient.detach())
    torch.testing.assert_close(*gradients)
