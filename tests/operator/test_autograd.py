"""What autograd asks of an operator beyond right numbers: what is saved, when it may run again, who owns the memory."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from problems import NAMES, make_problem
from torch import Tensor

from torchintro import linear_mse_loss, reference

OUTPUTS = [pytest.param(2, id="few"), pytest.param(20, id="many")]


def call(leaves: list[Tensor]) -> Tensor:
    return linear_mse_loss(*leaves[:3], linear_bias=leaves[3])


@pytest.fixture(params=OUTPUTS)
def leaves(request: pytest.FixtureRequest, device: str) -> list[Tensor]:
    return make_problem(6, 3, request.param, device=device).leaves()


def exact(leaves: list[Tensor], upstream: float = 1.0) -> tuple[Tensor, ...]:
    loss = reference.linear_mse_loss(*leaves[:3], linear_bias=leaves[3])
    return torch.autograd.grad(loss * upstream, leaves)


def assert_equal_lists(first, second) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_it_is_one_node(leaves: list[Tensor]) -> None:
    loss = call(leaves)
    assert loss.grad_fn.name() == "LinearMSELossBackward"
    edges = [function for function, _ in loss.grad_fn.next_functions]
    assert all(edge.variable is leaf for edge, leaf in zip(edges, leaves, strict=True))


@pytest.mark.parametrize("upstream", [1.0, -0.3, 0.0])
def test_a_kept_graph_runs_again_and_a_freed_one_does_not(leaves: list[Tensor], upstream: float) -> None:
    loss = call(leaves)
    expected = exact(leaves, upstream)
    for _ in range(3):
        gradients = torch.autograd.grad(loss * upstream, leaves, retain_graph=True)
        assert_equal_lists(gradients, expected)
        for gradient in gradients:
            gradient.fill_(float("nan"))  # the caller's memory: the saved gradients are others
    assert_equal_lists(torch.autograd.grad(loss * upstream, leaves), expected)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def test_backward_accumulates(leaves: list[Tensor]) -> None:
    call(leaves).backward()
    first = [leaf.grad.clone() for leaf in leaves]
    (call(leaves) * 2).backward()
    assert_equal_lists([leaf.grad for leaf in leaves], [gradient * 3 for gradient in first])


def test_every_upstream_gradient(leaves: list[Tensor]) -> None:
    expected = exact(leaves)
    device = leaves[0].device
    for upstream in (
        torch.tensor(0.5, dtype=torch.float64, device=device),
        torch.tensor([0.5, 9.0], dtype=torch.float64, device=device)[0],
        torch._efficientzerotensor((), dtype=torch.float64, device=device),
        torch.tensor(-0.5, dtype=torch.complex128, device=device).conj().imag.neg() + 0.5,
    ):
        gradients = torch.autograd.grad(call(leaves), leaves, grad_outputs=upstream)
        assert_equal_lists(gradients, [gradient * upstream.clone().item() for gradient in expected])


def test_a_loss_used_twice(leaves: list[Tensor]) -> None:
    loss = call(leaves)
    gradients = torch.autograd.grad(loss * loss, leaves)
    assert_equal_lists(gradients, [2 * loss.detach() * gradient for gradient in exact(leaves)])


def test_only_what_backward_is_asked_for(leaves: list[Tensor]) -> None:
    loss = call(leaves)
    (gradient,) = torch.autograd.grad(loss, leaves[1])
    torch.testing.assert_close(gradient, exact(leaves)[1])


def test_no_upstream_gradient_gives_none(leaves: list[Tensor]) -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    assert torch.autograd.grad(Stop.apply(call(leaves)), leaves, allow_unused=True) == (None,) * 4


def test_only_the_gradients_asked_for_are_computed(leaves: list[Tensor]) -> None:
    """The mask reaches the kernel: what it returns is counted by a dispatch mode."""
    masks = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "linear_mse_loss" in str(func):
                masks.append((func._schema.name, args[-1] if "grads" in func._schema.name else None))
            return func(*args, **(kwargs or {}))

    with Record():
        linear_mse_loss(leaves[0].detach(), leaves[1], leaves[2].detach(), linear_bias=leaves[3])
        with torch.no_grad():
            call(leaves)
    assert masks == [
        ("torchintro::_linear_mse_loss_grads", [False, True, False, True]),
        ("torchintro::linear_mse_loss", None),
    ]


@pytest.mark.parametrize("out_features", OUTPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_changing_an_argument_in_place_before_backward(device: str, dtype: torch.dtype, out_features: int) -> None:
    """The gradients are those of the forward pass's values; a second derivative that needs the old ones is refused."""
    leaves = make_problem(6, 3, out_features, dtype=dtype, device=device).leaves()
    expected = torch.autograd.grad(call(leaves), leaves)
    loss = call(leaves)
    with torch.no_grad():
        leaves[1].add_(1.0)
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_equal_lists(gradients, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_saved_tensor_hooks(leaves: list[Tensor]) -> None:
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index]):
        loss = call(leaves)
    before = [tensor.clone() for tensor in packed]
    assert_equal_lists(torch.autograd.grad(loss * 3.0, leaves), exact(leaves, 3.0))
    assert_equal_lists(packed, before)  # what the hooks returned is the user's


def test_save_on_cpu_and_checkpoint(leaves: list[Tensor]) -> None:
    with torch.autograd.graph.save_on_cpu():
        loss = call(leaves)
    assert_equal_lists(torch.autograd.grad(loss, leaves), exact(leaves))
    loss = torch.utils.checkpoint.checkpoint(lambda *tensors: call(list(tensors)), *leaves, use_reentrant=False)
    assert_equal_lists(torch.autograd.grad(loss, leaves), exact(leaves))


def test_gradient_memory_is_handed_over_not_copied(device: str) -> None:
    leaves = make_problem(50, 400, 1, device=device).leaves()
    call(leaves).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for leaf in leaves:
            leaf.grad = None
        loss = call(leaves)
        loss.backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::clone" not in names
    assert "aten::copy_" not in names
    assert "aten::mul" not in names


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_anomaly_mode_and_detect_nan(leaves: list[Tensor]) -> None:
    with torch.autograd.detect_anomaly(check_nan=True):
        call(leaves).backward()
        with torch.no_grad():
            leaves[0][0, 0] = float("nan")
        with pytest.raises(RuntimeError, match=r"LinearMSELossBackward.*nan"):
            call(leaves).backward()


def test_several_threads_share_the_parameters(device: str) -> None:
    problem = make_problem(300, 20, 2, device=device)
    weight = problem.linear_weight.requires_grad_()
    expected = 8 * torch.autograd.grad(reference.linear_mse_loss(problem.input, weight, problem.target), weight)[0]

    def work() -> None:
        for _ in range(4):
            linear_mse_loss(problem.input, weight, problem.target).backward()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(weight.grad, expected)


def test_no_graph_without_need(leaves: list[Tensor]) -> None:
    detached = [leaf.detach() for leaf in leaves]
    assert call(detached).grad_fn is None
    with torch.no_grad():
        assert call(leaves).grad_fn is None
    with torch.inference_mode():
        loss = call(leaves)
    assert loss.is_inference()
    torch.testing.assert_close(loss.clone(), call(detached))


def test_inference_tensors_cannot_be_saved(leaves: list[Tensor]) -> None:
    with torch.inference_mode():
        target = leaves[2].clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        linear_mse_loss(leaves[0], leaves[1], target)


def test_inside_a_network_and_an_optimizer(device: str) -> None:
    torch.manual_seed(1)
    body = torch.nn.Sequential(torch.nn.Linear(5, 7, device=device), torch.nn.Tanh())
    head = torch.nn.Linear(7, 2, device=device)
    models = [torch.nn.ModuleList([body, head]), copy.deepcopy(torch.nn.ModuleList([body, head]))]
    x, y = torch.randn(64, 5, device=device), torch.randn(64, 2, device=device)
    losses: list[list[float]] = []
    for model, operator in zip(models, (linear_mse_loss, reference.linear_mse_loss), strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        losses.append([])
        for _ in range(30):
            optimizer.zero_grad()
            loss = operator(model[0](x), model[1].weight, y, linear_bias=model[1].bias)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_gradients_have_their_arguments_shape_and_dtype(device: str) -> None:
    problem = make_problem((2, 3), 4, 2, dtype=torch.bfloat16, target_dtype=torch.float32, device=device)
    results = problem.results(linear_mse_loss)
    for name, argument in zip(NAMES, problem.tensors(), strict=True):
        assert results[name].shape == argument.shape
        assert results[name].dtype == argument.dtype


def test_an_upstream_gradient_with_a_tangent(leaves: list[Tensor]) -> None:
    """Backward is linear in the upstream gradient, so a tangent of it passes as the gradient itself does."""
    import torch.autograd.forward_ad as fwad

    loss, expected = call(leaves), exact(leaves)
    with fwad.dual_level():
        upstream = fwad.make_dual(torch.ones_like(loss), torch.full_like(loss, 3.0))
        gradients = torch.autograd.grad(loss, leaves, upstream)
        primals, tangents = zip(*map(fwad.unpack_dual, gradients), strict=True)
        assert_equal_lists(primals, expected)
        assert_equal_lists(tangents, [3.0 * gradient for gradient in expected])


def test_batched_upstream_gradients(leaves: list[Tensor]) -> None:
    loss, expected = call(leaves), exact(leaves)
    upstream = torch.arange(3.0, device=loss.device)
    for retain in (True, False):  # a freed graph gives its memory away, but not to three gradients at once
        batched = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, retain_graph=retain)
        for i, factor in enumerate(upstream):
            assert_equal_lists([gradient[i] for gradient in batched], [factor * gradient for gradient in expected])
