"""Several threads at once, after a fork, more threads than rows, and more elements than 32 bits can count."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from problems import Problem, assert_as_exact_as_eager, make_problem
from programs import python_path
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import torchintro
from torchintro import linear_mse_loss

# Few and many outputs; with more than one thread, more than one takes part in either.
SIZES = [(20000, 64, 1), (20000, 9, 5), (3000, 64, 80)]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def problems() -> list[Problem]:
    torch.manual_seed(0)
    return [make_problem(*size, weight="row", dtype=torch.float32) for size in SIZES]


def all_results() -> list[dict[str, Tensor]]:
    return [problem.results(linear_mse_loss) for problem in problems()]


def same_bits(ours: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(ours, others, strict=True)
    )


def run_here(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program that may import this file, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": python_path(Path(__file__).parent)}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(torchintro.__file__).parent.parent,  # where the program finds the package first
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


# After a fork. OpenMP's threads do not survive it: once a parent had some, a child that asks for several waits for them
# for ever, be it in an operator of torch's or in this one. So a child has to ask for one, as DataLoader's workers do;
# work that is too small for a second thread never asks.


def ends_well(pid: int, seconds: float) -> bool:
    """Wait for a child that must end with status 0, and end it after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def fork_after_threads() -> None:
    small = make_problem(100, 10, 1, dtype=torch.float32)
    with threads(1):
        alone = all_results()
        alone_small = small.results(linear_mse_loss)
    torch.set_num_threads(2)
    all_results()  # wakes OpenMP's threads
    child = os.fork()
    if child == 0:
        right = same_bits([small.results(linear_mse_loss)], [alone_small])
        torch.set_num_threads(1)
        os._exit(0 if right and same_bits(all_results(), alone) else 1)
    assert ends_well(child, 300)
    assert same_bits(all_results()[:2], alone[:2])  # and the parent goes on as before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork() -> None:
    result = run_here("import test_safety as tests; tests.fork_after_threads()")
    assert result.returncode == 0, result.stderr


class Losses(Dataset):
    """A data set that computes with the operator where it is read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([value.flatten() for result in all_results() for value in result.values()])


def losses_from_workers() -> None:
    with threads(1):
        alone = Losses()[0]
    torch.set_num_threads(2)
    all_results()
    for losses in DataLoader(Losses(), batch_size=1, num_workers=2, multiprocessing_context="fork"):
        assert torch.equal(losses[0], alone)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_workers_of_a_data_loader() -> None:
    result = run_here("import test_safety as tests; tests.losses_from_workers()")
    assert result.returncode == 0, result.stderr


# Several Python threads


@pytest.mark.parametrize(("device", "count"), [("cpu", 1), ("cpu", 2), pytest.param("cuda", 1, marks=pytest.mark.cuda)])
def test_python_threads_with_data_of_their_own(device: str, count: int) -> None:
    def work(seed: int) -> list[dict[str, Tensor]]:
        torch.set_num_threads(count)  # a new thread starts with the default
        generator = torch.Generator(device).manual_seed(seed)
        options = {"generator": generator, "device": device}
        results = []
        for rows, in_features, out_features in SIZES:
            x = torch.randn(rows, in_features, **options)
            w = torch.randn(out_features, in_features, **options).requires_grad_()
            t = torch.randn(rows, out_features, **options)
            loss = linear_mse_loss(x, w, t)
            loss.backward()
            assert w.grad is not None
            results.append({"loss": loss.detach(), "linear_weight": w.grad})
        return results

    with threads(count):
        serial = [work(seed) for seed in range(8)]
        with ThreadPoolExecutor(8) as pool:
            parallel = list(pool.map(work, range(8)))
    for ours, others in zip(parallel, serial, strict=True):
        assert same_bits(ours, others)


@pytest.mark.parametrize("out_features", [1, 5, 80])
def test_python_threads_with_one_module(device: str, out_features: int) -> None:
    """All of them read the same data and parameters and add to the same gradients, whose sums have no fixed order."""
    criterion = torchintro.LinearMSELoss(64, out_features, device=device)
    x, t = (torch.randn(8, 2000, size, device=device) for size in (64, out_features))
    parameters = list(criterion.parameters())

    def work(i: int) -> list[Tensor]:
        torch.set_num_threads(1)
        loss = criterion(x[i], t[i])
        loss.backward(retain_graph=True)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    with threads(1):
        serial = [work(i) for i in range(8)]
        criterion.zero_grad()
        with ThreadPoolExecutor(8) as pool:
            parallel = list(pool.map(work, range(8)))
    for ours, others in zip(parallel, serial, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
    for i, parameter in enumerate(parameters):
        torch.testing.assert_close(parameter.grad, torch.stack([result[1 + i] for result in serial]).sum(0))


# One thread, and more threads than rows


@pytest.mark.parametrize(
    ("rows", "d", "o"),
    [(1, 1, 1), (3, 1, 1), (3, 8000, 1), (3, 1600, 5), (3, 70000, 1), (2, 9000, 40), (700, 64, 3), (257, 1, 1)],
)
def test_more_threads_than_rows(rows: int, d: int, o: int) -> None:
    problem = make_problem(rows, d, o, weight="row", dtype=torch.float32)
    results = []
    for count in (1, 2, 64):
        with threads(count):
            assert_as_exact_as_eager(problem)
            results.append(problem.results(linear_mse_loss))
    if d * o <= 8192:  # with more, so few rows are a matrix product of PyTorch's, which may depend on the threads
        assert same_bits(results[1:], results[:1] * 2)


# More elements than 32 bits can count. (Gradients with as many are tested by `make sanitize`, without their memory.)

BEYOND = 2**31


@pytest.mark.slow
@pytest.mark.parametrize(("d", "o", "dtype"), [(8, 1, torch.float32), (32, 3, torch.bfloat16), (8, 80, torch.float32)])
def test_more_elements_than_32_bits_count(device: str, d: int, o: int, dtype: torch.dtype) -> None:
    """One row, expanded: no memory, and every sum is the one row's."""
    rows = BEYOND // max(d, o) + 5
    x, w, t, b = (torch.randn(shape, device=device).to(dtype) for shape in ((1, d), (o, d), (1, o), (o,)))
    leaves = [tensor.double().requires_grad_() for tensor in (w, b)]
    expected = torch.nn.functional.mse_loss(torch.nn.functional.linear(x.double(), *leaves), t.double())
    expected.backward()
    w.requires_grad_()
    b.requires_grad_()
    loss = linear_mse_loss(x.expand(rows, d), w, t.expand(rows, o), linear_bias=b)
    loss.backward()
    # The same number added thousands of times is rounded the same way each time, where that is done in float32: chunks'
    # products, and sums of few outputs on a GPU. An index too short is off by half the rows.
    tolerance = 8 * torch.finfo(dtype).eps
    if o > 64 or device == "cuda":
        tolerance += 4096 * torch.finfo(torch.float32).eps
    for ours, exact in ((loss, expected), (w.grad, leaves[0].grad), (b.grad, leaves[1].grad)):
        assert ours is not None
        assert exact is not None
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("out_features", [2, 80])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("needs_20_gb")
def test_elements_that_are_far_apart(device: str, out_features: int, transposed: bool) -> None:
    """A few rows of tensors whose other elements are never touched, so that they take addresses but no memory."""
    problem = make_problem(3, 3, out_features, weight="element", dtype=torch.bfloat16, device=device)

    def spread(tensor: Tensor) -> Tensor:
        if tensor.dim() != 2 or tensor.shape[0] != 3:  # parameters
            return tensor
        rows, columns = tensor.shape
        if transposed:
            step = (BEYOND + 1000 - rows) // (columns - 1)
            size, strides = (columns - 1) * step + rows, (1, step)
        else:
            step = BEYOND // 2 + 100
            size, strides = (rows - 1) * step + columns, (step, 1)
        return torch.empty(size, dtype=tensor.dtype, device=device).as_strided(tensor.shape, strides).copy_(tensor)

    far = problem.map(spread)
    assert far.input.stride() != problem.input.stride()
    if device == "cpu" or out_features <= 16:  # for other strides cuBLAS may choose another product
        assert same_bits([far.results(linear_mse_loss)], [problem.results(linear_mse_loss)])
    assert_as_exact_as_eager(far)
