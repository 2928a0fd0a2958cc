"""What the benchmark has for a GPU, as far as it can be tested on the CPU: peers, limits, rows."""

from dataclasses import replace

import pytest
import torch

from benchmarks import command
from benchmarks import step as peers
from benchmarks.cases import ROWS, Row, Target, count, quick_row, select
from benchmarks.machine import Limits, products_probe
from benchmarks.peers import chunked
from benchmarks.report.text import row_lines
from benchmarks.step import make_work
from benchmarks.timing import QUICK
from torchintro import reference

CPU = torch.device("cpu")
ALL = ("input", "linear_weight", "linear_bias", "target")
LIMITS = Limits(1e10, 1e10, {torch.float32: 1e11}, 64, {"read": "sum", "copy": "copy_", "float32": "mm"})
SMALL = Row("small", "step", 50, 7, 3, gradients=ALL, peers=("eager", "chunked", "fused"))


# Peers


@pytest.mark.parametrize("wanted", [ALL, ("linear_weight",), ("input", "linear_bias"), ("target",)], ids="-".join)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_elements", [1, 21, 1 << 24])
def test_chunked_is_right(wanted, bias, chunk_elements):
    shapes = {"input": (20, 4), "linear_weight": (3, 4), "target": (20, 3), "linear_bias": (3,)}
    tensors = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    if not bias:
        del tensors["linear_bias"]
    leaves = [tensors[name].requires_grad_() for name in wanted if name in tensors]

    def results(operator, **options):
        loss = operator(**tensors, **options)
        return [loss, *torch.autograd.grad(0.7 * loss, leaves)] if leaves else [loss]

    found = results(chunked.linear_mse_loss, chunk_elements=chunk_elements)
    torch.testing.assert_close(found, results(reference.linear_mse_loss), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_is_verified_like_any_peer(dtype):
    checks = make_work(replace(SMALL, dtype=dtype), CPU).verify()["chunked"]
    assert set(checks) == {"loss", *ALL}
    assert all(check.passed for check in checks.values())


def test_chunked_holds_no_more_than_a_chunk(monkeypatch):
    largest = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args: largest.append(len(args[1])) or addmm(*args))
    chunked.linear_mse_loss(
        torch.ones(10, 2), torch.ones(4, 2), torch.ones(10, 4), linear_bias=torch.ones(4), chunk_elements=16
    )
    assert largest == [4, 4, 2]


def test_chunked_hands_its_gradients_on_without_a_copy(monkeypatch):
    made = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x: made.append(empty_like(x)) or made[-1])
    X = torch.ones(3, 2, requires_grad=True)
    loss = chunked.linear_mse_loss(X, torch.ones(1, 2), torch.ones(3, 1))
    pointer = made.pop().data_ptr()
    loss.backward()
    assert X.grad.data_ptr() == pointer


def test_chunked_cannot_go_backward_twice():
    X = torch.ones(3, 2, requires_grad=True)
    loss = chunked.linear_mse_loss(X, torch.ones(1, 2), torch.ones(3, 1))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_way_of_compiling_is_one_that_torch_takes():
    for arguments in peers.COMPILED.values():
        torch.compile(reference.linear_mse_loss, dynamic=False, **arguments)


def test_no_compiled_peer_undoes_what_another_compiled(monkeypatch):
    done = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda function, **_: done.append("compile") or function)
    make_work(replace(SMALL, peers=("eager", "compile", "max-autotune", "fused")), CPU)
    make_work(SMALL, CPU)
    assert done == ["reset", "compile", "compile"]


def test_a_way_of_compiling_that_fails_is_skipped_with_its_reason(monkeypatch):
    def compile(function, *, dynamic, options=None, mode=None):
        def broken(*args, **kwargs):
            raise RuntimeError("no valid choices\nand more")

        return function if mode else broken

    monkeypatch.setattr(torch, "compile", compile)
    row = replace(SMALL, peers=("eager", "compile", "max-autotune", "triton", "fused"))
    result = command.run_row(row, CPU, LIMITS, QUICK)
    assert result.skipped == {
        "compile": "torch.compile failed here: no valid choices",
        "triton": "torch.compile (triton) failed here: no valid choices",
    }
    assert list(result.measurements) == ["eager", "max-autotune", "fused"]
    skipped = make_work(row, CPU, compile=False).skipped
    assert set(skipped.values()) == {"torch.compile is left out of this run"}
    assert set(skipped) == {"compile", "max-autotune", "triton"}


# Rows and their limit


def test_rows_of_few_outputs_stream_4_gib():
    rows = [row for row in ROWS if row.id.startswith("G1")]
    assert {(row.dtype, row.out_features) for row in rows} == {
        (dtype, outputs) for dtype in (torch.float32, torch.bfloat16) for outputs in (1, 2, 4, 8)
    }
    for row in rows:
        assert row.device == "cuda"
        assert row.rows * row.in_features * row.dtype.itemsize == 1 << 32
        assert [target.at_most for target in row.targets if target.of == "limit"] == [1 / 0.85]
    assert ["input" in row.gradients for row in rows].count(True) == 1


def test_rows_of_many_outputs_have_a_target_against_each_peer():
    rows = [row for row in select(["G2"]) if row.kind == "step"]
    assert {row.in_features for row in rows} == {256, 1024, 4096}
    assert {row.out_features for row in rows} == {1024, 4096, 8192}
    for row in rows:
        assert row.targets == tuple(Target(peer, at_least=1.1) for peer in row.peers if peer != "fused")
        assert {"compile", "max-autotune", "triton", "chunked"} < set(row.peers)


def test_the_limit_of_products_is_the_step_s_own_products(monkeypatch):
    X, weight, y = torch.randn(6, 2), torch.randn(3, 2), torch.randn(6, 3)
    done = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out=None: done.append((a.shape, b.shape)) or mm(a, b))
    probe = products_probe(X, weight, y, ("input", "linear_weight"))
    done.clear()
    probe.call()
    assert done == [((6, 2), (2, 3)), ((6, 3), (3, 2)), ((3, 6), (6, 2))]
    row = replace(SMALL, rows=6, in_features=2, gradients=("input", "linear_weight"))
    assert probe.amount == count(row).operations
    done.clear()
    products_probe(X, weight, y, ("linear_bias",)).call()
    assert done[1:] == [((6, 2), (2, 3))]


@pytest.mark.parametrize("name", ["G1e", "G2d"])
def test_rows_for_a_gpu_run_on_the_cpu_when_small(name):
    (row,) = select([name])
    row = quick_row(row)
    result = command.run_row(row, CPU, LIMITS, QUICK, compile=False, judge=False)
    assert result.status == "ok", result.failures
    assert list(result.measurements) == ["eager", "chunked", "fused"]
    assert set(result.skipped) == set(row.peers) - {"eager", "chunked", "fused"}
    lines = "\n".join(row_lines(result, set()))
    if row.limit == "products":
        assert result.bound.name.endswith("GFLOP of products by mm")
        assert result.bound.seconds == result.bound.probe.median
        assert "limit: its" in lines
