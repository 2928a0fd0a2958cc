"""torch.func, autocast, torch.compile, torch.export, TorchScript, fake and meta tensors, subclasses: all of PyTorch."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from problems import DTYPES, make_problem
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import torchintro
from torchintro import LinearMSELoss, linear_mse_loss, reference

OUTPUTS = [pytest.param(2, id="few"), pytest.param(20, id="many")]


def assert_same(first, second) -> None:
    torch.testing.assert_close(first, second)


@pytest.fixture(params=OUTPUTS)
def problem(request: pytest.FixtureRequest, device: str):
    return make_problem(6, 3, request.param, weight="row", device=device)


# torch.func


def both(function, *arguments):
    return function(linear_mse_loss)(*arguments), function(reference.linear_mse_loss)(*arguments)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "in_dims", [d for d in itertools.product([0, None], repeat=3) if any(x is not None for x in d)]
)
def test_vmap(problem, reduction: str, in_dims: tuple) -> None:
    def batch(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor if dim is None else torch.stack([tensor, tensor * 2, tensor - 1])

    arguments = [
        batch(tensor, dim)
        for tensor, dim in zip((problem.input, problem.linear_weight, problem.target), in_dims, strict=True)
    ]

    def mapped(operator):
        return torch.vmap(lambda x, w, t: operator(x, w, t, weight=problem.weight, reduction=reduction), in_dims)

    assert_same(*both(mapped, *arguments))


def test_per_sample_gradients(problem) -> None:
    def per_sample(operator):
        def loss(w: Tensor, b: Tensor, x: Tensor, t: Tensor) -> Tensor:
            return operator(x, w, t, linear_bias=b)

        return torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), (None, None, 0, 0))

    assert_same(*both(per_sample, problem.linear_weight, problem.linear_bias, problem.input, problem.target))


def test_gradients_of_many_models_at_once(problem) -> None:
    weights = torch.stack([problem.linear_weight * k for k in range(4)])

    def models(operator):
        return torch.func.vmap(torch.func.grad_and_value(lambda w: operator(problem.input, w, problem.target)))

    assert_same(*both(models, weights))


@pytest.mark.parametrize("transform", [torch.func.hessian, torch.func.jacrev, torch.func.jacfwd])
def test_jacobians_and_hessians(problem, transform) -> None:
    def transformed(operator):
        return transform(lambda w: operator(problem.input, w, problem.target, linear_bias=problem.linear_bias))

    assert_same(*both(transformed, problem.linear_weight))


def test_jvp_and_vjp(problem) -> None:
    def with_jvp(operator):
        return lambda w: torch.func.jvp(lambda w: operator(problem.input, w, problem.target), (w,), (w.cos(),))

    def with_vjp(operator):
        return lambda w: torch.func.vjp(lambda w: operator(problem.input, w, problem.target), w)[1](w.sum())

    assert_same(*both(with_jvp, problem.linear_weight))
    assert_same(*both(with_vjp, problem.linear_weight))


def test_functional_call(device: str) -> None:
    criterion = LinearMSELoss(3, 2, device=device)
    x, y = torch.randn(5, 3, device=device), torch.randn(5, 2, device=device)
    parameters = dict(criterion.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(criterion, p, (x, y)))(parameters)
    criterion(x, y).backward()
    for name, parameter in criterion.named_parameters():
        assert_same(gradients[name], parameter.grad)


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_exact_as_eager_under_autocast(device: str, dtype: torch.dtype) -> None:
    problem = make_problem(200, 30, 2, weight="row", dtype=torch.float32, device=device)
    with torch.autocast(device, dtype):
        ours = problem.results(linear_mse_loss)
        eager = problem.results(reference.linear_mse_loss)
    exact = problem.map(Tensor.double).results(reference.linear_mse_loss)
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype == torch.float32, name
        error, eager_error = ((result[name].double() - exact[name]).abs().max() for result in (ours, eager))
        assert error <= 2 * eager_error + torch.finfo(dtype).eps * exact[name].abs().max(), name


def test_autocast_leaves_float64_alone(device: str) -> None:
    problem = make_problem(20, 3, 2, device=device)
    with torch.autocast(device, torch.bfloat16):
        results = problem.results(linear_mse_loss)
    assert all(value.dtype == torch.float64 for value in results.values())
    assert_same(results, problem.results(linear_mse_loss))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_the_operator_in_the_autocast_dtype(device: str, dtype: torch.dtype) -> None:
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "linear_mse_loss" in str(func):
                seen.extend(argument.dtype for argument in args[:3])
            return func(*args, **(kwargs or {}))

    problem = make_problem(8, 3, 2, dtype=torch.float32, device=device)
    with torch.autocast(device, dtype), Record():
        problem.call(linear_mse_loss)
    assert seen == [dtype, dtype, torch.float32]


@pytest.mark.parametrize("out_features", [1, 32])
def test_gradient_scaling_of_float16_autocast(device: str, out_features: int) -> None:
    """A loss scale of 2^16, GradScaler's first, exceeds float16: it must never be multiplied in it."""
    problem = make_problem(2048, 16, out_features, dtype=torch.float32, device=device)
    for tensor in problem.tensors()[1:]:  # small residuals, so that scaled gradients are in range
        tensor.div_(256)
    with torch.autocast(device, torch.float16):
        scaled = problem.results(linear_mse_loss, upstream=2.0**16)
        plain = problem.results(linear_mse_loss, upstream=1.0)
    for name in ("linear_weight", "linear_bias"):
        torch.testing.assert_close(scaled[name] / 2**16, plain[name], rtol=4e-3, atol=1e-6)


@pytest.mark.parametrize("out_features", [1, 32])
def test_training_with_a_gradient_scaler(device: str, out_features: int) -> None:
    """A step that overflows is left out and the scale halved; the others are eager's but for float16's rounding."""
    x, y = torch.randn(64, 5, device=device), torch.randn(64, out_features, device=device)
    start = torch.randn(out_features, 5, device=device)
    weights = []
    for operator in (linear_mse_loss, reference.linear_mse_loss):
        w = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([w], lr=0.1)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
        for overflows in (False, False, True, False):
            before = w.detach().clone()
            with torch.autocast(device, torch.float16):
                loss = operator(x * 1e6 if overflows else x, w, y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(w, before) == overflows
        assert scaler.get_scale() == 2.0**11
        weights.append(w.detach())
    torch.testing.assert_close(*weights, rtol=4e-3, atol=4e-3)
    assert not torch.equal(weights[0], start)


# torch.compile, torch.export


def step(x: Tensor, w: Tensor, t: Tensor, b: Tensor) -> Tensor:
    return linear_mse_loss(x * 2, w, t, linear_bias=b) * 0.3


@pytest.mark.parametrize(
    ("backend", "dynamic", "dtype"),
    [
        ("aot_eager", False, torch.float32),
        ("aot_eager", True, torch.float16),
        ("inductor", False, torch.float16),
        ("inductor", True, torch.float32),
    ],
)
def test_compile_fullgraph(device: str, backend: str, dynamic: bool, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    counter = torch._dynamo.utils.counters
    counter.clear()
    for rows in (6, 9, 12) if dynamic else (6, 9):  # for sizes that are not dynamic each is compiled anew
        leaves = make_problem(rows, 3, 2, dtype=dtype, device=device).leaves()
        gradients = torch.autograd.grad(compiled(*leaves), leaves)
        expected = torch.autograd.grad(step(*leaves), leaves)
        assert_same(gradients, expected)
    assert not counter["graph_break"]
    if dynamic:
        assert counter["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_a_whole_training_step(device: str, backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, y = torch.randn(64, 5, device=device), torch.randn(64, 2, device=device)
    criteria = [LinearMSELoss(5, 2, device=device) for _ in range(2)]
    criteria[1].load_state_dict(criteria[0].state_dict())
    optimizers = [torch.optim.SGD(criterion.parameters(), lr=0.1) for criterion in criteria]

    def train(criterion: LinearMSELoss, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = criterion(x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    compiled = torch.compile(train, backend=backend)
    for _ in range(5):
        assert_same(compiled(criteria[0], optimizers[0]), train(criteria[1], optimizers[1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_compiled_autograd(device: str, dtype: torch.dtype) -> None:
    from torch._dynamo import compiled_autograd

    torch._dynamo.reset()
    for rows in (5, 8, 11):
        problem = make_problem(rows, 3, 2, dtype=dtype, device=device)
        expected = problem.results(linear_mse_loss, 0.3)
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager", fullgraph=True)):
            assert_same(problem.results(linear_mse_loss, 0.3), expected)


def test_export_and_run_again(device: str, tmp_path) -> None:
    criterion = LinearMSELoss(3, 2, device=device)
    x, y = torch.randn(5, 3, device=device), torch.randn(5, 2, device=device)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(criterion, (x, y), dynamic_shapes=({0: rows}, {0: rows}))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "torchintro.linear_mse_loss.default" in targets
    torch.export.save(program, tmp_path / "criterion.pt2")
    loaded = torch.export.load(tmp_path / "criterion.pt2").module()
    for count in (2, 7):
        x, y = torch.randn(count, 3, device=device), torch.randn(count, 2, device=device)
        assert_same(loaded(x, y), criterion(x, y))


@pytest.mark.slow
def test_ahead_of_time_compiled_package(device: str, tmp_path) -> None:
    """AOTInductor: both operators end up in a package that runs without Python's tracing."""

    class Step(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            loss, _, gradient, _, _ = torch.ops.torchintro._linear_mse_loss_grads(
                x, w, t, None, None, "mean", [False, True, False, False]
            )
            return loss + linear_mse_loss(x, w, t), gradient

    arguments = tuple(torch.randn(shape, device=device) for shape in ((6, 3), (2, 3), (6, 2)))
    program = torch.export.export(Step(), arguments)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.pt2"))
    assert_same(torch._inductor.aoti_load_package(path)(*arguments), Step()(*arguments))


def test_make_fx_keeps_the_operators(problem) -> None:
    traced = make_fx(lambda x, w, t: torch.autograd.grad(linear_mse_loss(x, w, t), w)[0], tracing_mode="symbolic")(
        problem.input, problem.linear_weight.detach().requires_grad_(), problem.target
    )
    targets = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert "torchintro._linear_mse_loss_grads.default" in targets


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("dtype", "target_dtype"), DTYPES)
def test_opcheck(device: str, dtype: torch.dtype, target_dtype: torch.dtype, reduction: str) -> None:
    """Any two of dtype, reduction and weight meet."""
    pytest.importorskip("expecttest")  # torch.library.opcheck imports it
    number = DTYPES.index((dtype, target_dtype)) + ["mean", "sum", "none"].index(reduction)
    weight = (None, "element", "row")[number % 3]
    problem = make_problem(
        (2, 3), 4, 2, weight=weight, reduction=reduction, dtype=dtype, target_dtype=target_dtype, device=device
    )
    x, w, t, b = problem.leaves()
    torch.library.opcheck(
        torch.ops.torchintro.linear_mse_loss.default,
        (x, w, t),
        {"linear_bias": b, "weight": problem.weight, "reduction": reduction},
    )
    if reduction != "none":
        arguments = (*problem.tensors(), problem.weight, reduction, [True, False, True, True])
        torch.library.opcheck(torch.ops.torchintro._linear_mse_loss_grads.default, arguments)


# TorchScript


def script_step(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return torchintro.linear_mse_loss(x, w, t, reduction="sum")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript(problem) -> None:
    scripted = torch.jit.script(script_step)
    arguments = problem.input, problem.linear_weight.detach().requires_grad_(), problem.target
    for _ in range(3):  # the profiling executor specialises on the second run
        assert_same(
            torch.autograd.grad(scripted(*arguments), arguments[1]),
            torch.autograd.grad(script_step(*arguments), arguments[1]),
        )


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_torchscript_module_saved_and_loaded(device: str, reduction: str, bias: bool) -> None:
    criterion = LinearMSELoss(3, 2, bias=bias, reduction=reduction, device=device)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(criterion), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    x, y, weight = (torch.rand(shape, device=device) for shape in ((5, 3), (5, 2), (5,)))
    assert_same(loaded(x, y), criterion(x, y))
    assert_same(loaded(x, y, weight), criterion(x, y, weight))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_trace(device: str) -> None:
    criterion = LinearMSELoss(3, 2, device=device)
    x, y = torch.randn(5, 3, device=device), torch.randn(5, 2, device=device)
    traced = torch.jit.trace(criterion, (x, y))
    assert_same(traced(x * 2, y), criterion(x * 2, y))


# Tensors without data, and subclasses


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_meta_tensors(device: str, reduction: str, requires_grad: bool) -> None:
    problem = make_problem(
        (4, 5),
        3,
        2,
        weight="row",
        reduction=reduction,
        requires_grad=(requires_grad,) * 4,
        dtype=torch.bfloat16,
        target_dtype=torch.float32,
        device=device,
    )
    results, shapes = problem.results(linear_mse_loss), problem.map(lambda t: t.to("meta")).results(linear_mse_loss)
    assert results.keys() == shapes.keys()
    for name, value in results.items():
        assert shapes[name].device.type == "meta"
        assert (shapes[name].shape, shapes[name].dtype, shapes[name].stride()) == (
            value.shape,
            value.dtype,
            value.stride(),
        )


def test_fake_tensors(problem) -> None:
    with FakeTensorMode() as mode:
        results = problem.map(mode.from_tensor).results(linear_mse_loss)
    for name, value in problem.results(linear_mse_loss).items():
        assert (results[name].shape, results[name].dtype, results[name].device) == (
            value.shape,
            value.dtype,
            value.device,
        )


def test_a_tensor_subclass_that_knows_only_aten(problem) -> None:
    double = [TwoTensor(tensor.detach(), tensor.detach() * 2).requires_grad_() for tensor in problem.tensors()]
    loss = linear_mse_loss(*double[:3], linear_bias=double[3])
    assert isinstance(loss, TwoTensor)
    loss.backward()
    for half, factor in (("a", 1), ("b", 2)):
        expected = problem.map(lambda tensor, factor=factor: tensor * factor)
        results = type(expected)(*expected.tensors()).results(linear_mse_loss)
        assert_same(getattr(loss, half), results["loss"])
        for leaf, name in zip(double, ("input", "linear_weight", "target", "linear_bias"), strict=True):
            assert_same(getattr(leaf.grad, half), results[name])


def test_compiled_tensor_subclass(problem) -> None:
    torch._dynamo.reset()
    double = [TwoTensor(tensor.detach(), tensor.detach() * 2) for tensor in problem.tensors()]
    weight = double[1].requires_grad_()

    def loss(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return linear_mse_loss(x, w, t)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(double[0], weight, double[2]), weight)[0]
    expected = torch.autograd.grad(loss(double[0], weight, double[2]), weight)[0]
    assert_same(ours.a, expected.a)
    assert_same(ours.b, expected.b)


def test_parameters_shared_with_an_existing_head(device: str) -> None:
    head = torch.nn.Linear(3, 2, device=device)
    criterion = LinearMSELoss.from_linear(head)
    assert criterion.linear is head
    x, y = torch.randn(5, 3, device=device), torch.randn(5, 2, device=device)
    criterion(x, y).backward()
    ours = [parameter.grad.clone() for parameter in head.parameters()]
    head.zero_grad()
    torch.nn.functional.mse_loss(head(x), y).backward()
    assert_same(ours, [parameter.grad for parameter in head.parameters()])
