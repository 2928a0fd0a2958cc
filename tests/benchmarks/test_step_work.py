"""The peers of a step: each is right, whatever cannot run says why."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from bench_cases import ALL, CPU, LIMITS, SMALL, case_named

from benchmarks import measure, step
from benchmarks.cases import CASES, quick_case
from benchmarks.peers import chunked
from benchmarks.peers import jax as jax_peers
from benchmarks.timing import QUICK
from benchmarks.works import make_work
from torchintro import reference

CHUNKED = replace(SMALL, peers=("eager", "chunked", "fused"))


@pytest.mark.parametrize("name", [case.id for case in CASES if case.device == "cpu" and case.kind == "step"])
def test_every_peer_is_right(name):
    work = make_work(quick_case(case_named(name)), CPU, compile=False)
    for peer, checks in work.verify().items():
        assert checks
        for result, check in checks.items():
            assert check.passed, f"{peer}: {result} has an error of {check.error}, allowed {check.allowed}"


# torch.compile


def test_every_way_of_compiling_is_one_that_torch_takes():
    for arguments in step.COMPILED.values():
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
    case = replace(SMALL, peers=("eager", "compile", "max-autotune", "triton", "fused"))
    result = measure.run_case(case, CPU, LIMITS, QUICK)
    assert result.skipped == {
        "compile": "torch.compile failed here: no valid choices",
        "triton": "torch.compile (triton) failed here: no valid choices",
    }
    assert list(result.measurements) == ["eager", "max-autotune", "fused"]
    skipped = make_work(case, CPU, compile=False).skipped
    assert set(skipped.values()) == {"torch.compile is left out of this run"}
    assert set(skipped) == {"compile", "max-autotune", "triton"}


# PyTorch in chunks


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
    checks = make_work(replace(CHUNKED, dtype=dtype), CPU).verify()["chunked"]
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


# JAX


def test_without_jax_one_sentence(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jax" else find_spec(name))
    for name in ("P1", "P2", "P3"):
        work = make_work(quick_case(case_named(name)), CPU, compile=False)
        assert work.skipped["jax"] == 'JAX is not installed: pip install "torchintro[jax]"'
        assert "jax" not in work.calls
    assert jax_peers.why_not(torch.device("cuda")) == "JAX is compared on the CPU only"


def test_jax_that_breaks_down_is_left_out(monkeypatch):
    monkeypatch.setattr(jax_peers, "why_not", lambda device: "")

    def broken(*_, **__):
        raise RuntimeError("XLA says no\nand more")

    monkeypatch.setattr(jax_peers, "JaxStep", type("JaxStep", (), {"__init__": broken}))
    work = make_work(quick_case(case_named("P1")), CPU, compile=False)
    assert work.skipped["jax"] == "JAX failed here: XLA says no"


def test_jax_is_imported_where_a_row_wants_it_only(monkeypatch):
    monkeypatch.setattr(jax_peers, "_jax", lambda: pytest.fail("JAX was imported"))
    work = make_work(quick_case(case_named("P1")), CPU, compile=False, jax=False)
    assert work.skipped["jax"] == "JAX is left out of this run"
    make_work(replace(quick_case(case_named("P1")), peers=("eager", "fused")), CPU)


@pytest.mark.parametrize("name", ["P1", "P3", "P6b", "P7", "X3-1", "X3-4"])
def test_jax_does_the_same_work(name):
    pytest.importorskip("jax", reason="JAX is not installed")
    case = case_named(name)
    case = replace(case, rows=200) if case.measured else quick_case(case)
    result = measure.run_case(case, CPU, LIMITS, QUICK, compile=False, judge=False)
    assert result.status == "ok", result.failures
    assert result.checks["jax"]
    assert list(result.measurements) == [peer for peer in case.peers if peer != "compile"]
    assert result.measurements["jax"].median > 0
