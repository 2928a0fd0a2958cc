"""CUDA graphs: steps captured by hand, by make_graphed_callables and by torch.compile, replayed on other data."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchintro import _C, LinearMSELoss, linear_mse_loss

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(_C.build_info()["cuda"] == "", reason="built without CUDA"),
]

# Few and many outputs: kernels of this package's own, and PyTorch's products around one.
REGIMES = [3, 40]
ROWS, FEATURES = 500, 20


def sgd_step(x: Tensor, w: Tensor, t: Tensor, b: Tensor, v: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        loss = linear_mse_loss(x, w, t, linear_bias=b, weight=v)
        grad_w, grad_b = torch.autograd.grad(loss, (w, b))
        with torch.no_grad():
            w.sub_(0.1 * grad_w)
            b.sub_(0.1 * grad_b)
        return loss.detach()

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_features", REGIMES)
def test_graph_of_a_training_step(out_features: int, dtype: torch.dtype) -> None:
    x = torch.randn(ROWS, FEATURES, device="cuda", dtype=dtype)
    t = torch.randn(ROWS, out_features, device="cuda", dtype=dtype)
    v = torch.rand(ROWS, device="cuda", dtype=dtype)
    w0, b0 = torch.randn(out_features, FEATURES, device="cuda"), torch.randn(out_features, device="cuda")

    def parameters() -> tuple[Tensor, Tensor]:
        return w0.to(dtype, copy=True).requires_grad_(), b0.to(dtype, copy=True).requires_grad_()

    w, b = parameters()
    eager_step = sgd_step(x, w, t, b, v)
    expected = [eager_step() for _ in range(5)]

    captured_w, captured_b = parameters()
    step = sgd_step(x, captured_w, t, captured_b, v)
    on_a_side_stream(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        captured_w.copy_(w0)
        captured_b.copy_(b0)
    losses = []
    for _ in range(5):
        graph.replay()
        losses.append(loss.clone())

    def check(captured: Tensor, eager: Tensor) -> None:
        if out_features <= 16:  # the same kernels in the same order; PyTorch may choose another product under capture
            assert torch.equal(captured, eager)
        else:
            rounding = 100 * torch.finfo(dtype).eps if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(captured, eager, rtol=rounding, atol=rounding)

    check(torch.stack(losses), torch.stack(expected))
    check(captured_w, w)
    check(captured_b, b)

    x.copy_(2 * x)  # a replay reads the tensors that are there now
    graph.replay()
    check(loss, eager_step())


def on_a_side_stream(step: Callable[[], object], times: int = 1) -> None:
    """What is set up on first use must not be set up under capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(side)


class Model(nn.Module):
    """The operator behind a layer, so that the input's gradient is part of every step."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh())
        self.criterion = LinearMSELoss(FEATURES, out_features)

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        return self.criterion(self.body(x), y, weight)


def batches(out_features: int, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [
        (
            torch.randn(ROWS, FEATURES, device="cuda"),
            torch.randn(ROWS, out_features, device="cuda"),
            torch.rand(ROWS, device="cuda"),
        )
        for _ in range(count)
    ]


OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "Adam": functools.partial(torch.optim.Adam, lr=0.01, capturable=True),
}


# With no autocast (None) and with it. Both loops round alike, but for products that PyTorch may choose otherwise under
# capture; where a step is lost or done twice, or data are old, they differ by more than a learning rate.
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("out_features", REGIMES)
def test_graph_of_a_whole_training_step_with_an_optimizer(
    out_features: int, optimizer_name: str, dtype: torch.dtype | None, tolerance: float
) -> None:
    models = [Model(out_features).cuda()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [OPTIMIZERS[optimizer_name](model.parameters()) for model in models]

    def step(index: int, batch: tuple[Tensor, ...]) -> Tensor:
        # A graph must not find casts made before it, which a replay does not repeat.
        with torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
            loss = models[index](*batch)
        loss.backward()
        optimizers[index].step()
        return loss.detach()

    def whole_step(index: int, batch: tuple[Tensor, ...]) -> Tensor:
        optimizers[index].zero_grad(set_to_none=True)
        return step(index, batch)

    static, *data = batches(out_features, 7)
    warm_up = 3
    expected = [whole_step(0, batch) for batch in [static] * warm_up + data][warm_up:]

    on_a_side_stream(lambda: whole_step(1, static), warm_up)
    optimizers[1].zero_grad(set_to_none=True)  # the gradients' memory is then the graph's
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(1, static)
    losses = []
    for batch in data:
        for old, new in zip(static, batch, strict=True):
            old.copy_(new)
        graph.replay()
        losses.append(loss.clone())

    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    for captured, eager in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(captured, eager, rtol=tolerance, atol=tolerance)
    assert len({loss.item() for loss in losses}) == len(losses)


def assert_same_training(graphed: Callable[..., Tensor], model: nn.Module, plain: nn.Module, out_features: int) -> None:
    """Compare losses and gradients on data that differ from call to call; ``graphed`` computes with ``model``."""
    for x, y, _ in batches(out_features, 4):
        results = []
        for function, owner in ((graphed, model), (plain, plain)):
            owner.zero_grad(set_to_none=True)
            leaf = x.clone().requires_grad_()
            torch.compiler.cudagraph_mark_step_begin()
            loss = function(leaf, y)
            (0.5 * loss).backward()
            gradients = [parameter.grad.clone() for parameter in owner.parameters()]
            results.append([loss.detach().clone(), leaf.grad.clone(), *gradients])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("out_features", REGIMES)
def test_make_graphed_callables(out_features: int) -> None:
    plain = Model(out_features).cuda()
    model = copy.deepcopy(plain)
    x, y, _ = batches(out_features, 1)[0]
    graphed = torch.cuda.make_graphed_callables(model, (x.requires_grad_(), y))
    assert_same_training(graphed, model, plain, out_features)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("out_features", REGIMES)
def test_compiled(out_features: int, mode: str) -> None:
    pytest.importorskip("triton")  # what Inductor compiles to
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain = Model(out_features).cuda()
    model = copy.deepcopy(plain)
    assert_same_training(torch.compile(model, mode=mode, fullgraph=True), model, plain, out_features)
    assert counters["inductor"]["cudagraph_skips"] == 0  # nothing about the operator keeps it out of a graph
    assert not counters["graph_break"]
