"""What a step costs besides its work: the operators it dispatches, the tensors it allocates, the way it is called."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

import torchintro
from torchintro.functional import _direct_call, _operator

OURS = {"torchintro::linear_mse_loss", "torchintro::_linear_mse_loss_grads", "LinearMSELossBackward"}


def tensors(in_features: int = 1, out_features: int = 1, device: str = "cpu") -> list[torch.Tensor]:
    shapes = (100, in_features), (out_features, in_features), (100, out_features), (out_features,)
    input, linear_weight, target, linear_bias = (torch.randn(shape, device=device) for shape in shapes)
    return [input, linear_weight.requires_grad_(), target, linear_bias.requires_grad_()]


def recorded(call) -> tuple[Counter[str], int]:
    """Return how often each operator was dispatched in a call, and how often memory was allocated for a tensor."""
    call()  # what happens once happens here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    return (
        Counter(event.name() for event in events if event.name() != "[memory]"),
        sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events),
    )


@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (64, 1), (5, 3)])
def test_forward_dispatches_nothing_and_allocates_its_results(in_features, out_features):
    input, linear_weight, target, linear_bias = tensors(in_features, out_features)
    names, allocations = recorded(
        lambda: torchintro.linear_mse_loss(input, linear_weight, target, linear_bias=linear_bias)
    )
    assert {name for name in names if "::" in name} <= OURS
    assert allocations == 3  # the loss and two gradients


def test_forward_without_gradients_allocates_the_loss():
    input, linear_weight, target, linear_bias = (tensor.detach() for tensor in tensors())
    names, allocations = recorded(
        lambda: torchintro.linear_mse_loss(input, linear_weight, target, linear_bias=linear_bias)
    )
    assert {name for name in names if "::" in name} <= OURS
    assert allocations == 1


def test_backward_costs_what_any_backward_does():
    input, linear_weight, target, linear_bias = tensors()

    def step() -> None:
        linear_weight.grad = linear_bias.grad = None
        loss = torchintro.linear_mse_loss(input, linear_weight, target, linear_bias=linear_bias)
        loss.backward(one)

    one = torch.ones(())
    names, allocations = recorded(step)
    # AccumulateGrad detaches a gradient that it takes over. A copy would show as aten::clone, a scaling as aten::mul_.
    assert {name for name in names if name.startswith("aten::")} <= {"aten::detach"}
    assert allocations == 3


def ways(call):
    """The same call directly and by torch.ops: what each returns or raises."""
    answers = []
    for function in (torchintro.linear_mse_loss, _operator):
        try:
            answers.append(call(function))
        except Exception as error:
            answers.append((type(error), str(error)))
    return answers


def test_the_direct_way_is_taken_by_tensors_and_parameters(device):
    input, linear_weight, target, linear_bias = tensors(device=device)
    for weight in (linear_weight, torch.nn.Parameter(linear_weight.detach())):
        direct = _direct_call(input, weight, target, linear_bias, None, "mean")
        torch.testing.assert_close(direct, _operator(input, weight, target, linear_bias=linear_bias), rtol=0, atol=0)
        assert direct.grad_fn.name() == "LinearMSELossBackward"


class Subclass(torch.Tensor):
    pass


class Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("other", [torch.ones(2).as_subclass(Subclass), [1.0], 1.0, "x", torch.float32])
def test_the_direct_way_leaves_other_arguments_to_torch_ops(index, other):
    arguments = [*tensors(), None]
    arguments[index] = other
    assert _direct_call(*arguments, "mean") is None


def test_the_direct_way_leaves_none_where_a_tensor_must_be_to_torch_ops():
    for index in range(3):
        arguments = [*tensors(), None]
        arguments[index] = None
        assert _direct_call(*arguments, "mean") is None
    assert _direct_call(*tensors(), None, b"mean") is None


def test_a_torch_function_mode_sees_the_operator(device):
    input, linear_weight, target, linear_bias = tensors(device=device)
    with Recorder() as mode:
        torchintro.linear_mse_loss(input, linear_weight, target, linear_bias=linear_bias)
    assert mode.functions == [_operator]


def test_a_trace_holds_the_operator(device):
    input, linear_weight, target, _ = (tensor.detach() for tensor in tensors(device=device))
    traced = torch.jit.trace(lambda x: torchintro.linear_mse_loss(x, linear_weight, target, reduction="sum"), input)
    assert "torchintro::linear_mse_loss" in str(traced.graph)


@pytest.mark.parametrize(
    "change",
    [
        {"target": torch.zeros(100)},
        {"reduction": "average"},
        {"reduction": "\ud800"},
        {"reduction": None},
        {"weight": torch.zeros(7)},
        {"linear_bias": torch.zeros(1, dtype=torch.float64)},
        {"input": torch.zeros(100, 1).to_sparse()},
        {"target": [1.0]},
    ],
    ids=repr,
)
def test_both_ways_say_the_same_of_a_wrong_call(change):
    input, linear_weight, target, linear_bias = tensors()
    arguments = {"input": input, "linear_weight": linear_weight, "target": target, "linear_bias": linear_bias} | change
    direct, by_operator = ways(lambda function: function(**arguments))
    assert isinstance(direct, tuple)
    assert direct == by_operator


def test_the_direct_way_counts_its_arguments():
    with pytest.raises(TypeError, match="linear_mse_loss: expected 6 arguments, but got 2"):
        _direct_call(torch.zeros(1, 1), torch.zeros(1, 1))
