"""LinearStatistics against direct computation in float64, on hard data, in parts, in files and over processes."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import traceback
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import every_second, padded_rows, transposed
from programs import python_path
from rows_of_moments import EPS, SIZES, assert_close, direct, make, same
from torch import Tensor
from torch.nn import functional

from torchintro import LinearStatistics

HERE = Path(__file__).resolve()
WORLD_SIZE = 2


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "d", "o"), SIZES)
def test_against_two_passes_in_float64(device, rows, d, o, weighted):
    X, y = (tensor.to(device) for tensor in make(rows, d, o))
    weight = torch.rand(rows, dtype=torch.float64).to(device) if weighted else None
    statistics = LinearStatistics(d, o, device=device)
    assert statistics.update(X, y, weight) is statistics
    assert_close(statistics, direct(X, y, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target_dtype", [torch.float64, torch.float32, None])
@pytest.mark.parametrize("d", [2, 33, 514])
def test_other_dtypes_are_widened_first(device, dtype, target_dtype, d):
    X, y = make(500, d, 2, dtype=dtype)
    y = y.to(target_dtype or dtype)
    weight = torch.rand(500).to(dtype)
    assert_close(LinearStatistics(d, 2).update(X.to(device), y.to(device), weight.to(device)), direct(X, y, weight))


@pytest.mark.parametrize("kind", ["int64", "int8", "bool", "numpy", "big-endian"])
def test_whole_numbers_and_arrays(kind):
    X = torch.randint(0, 2, (50, 3))
    y = torch.randint(0, 2, (50, 1))
    if kind in ("numpy", "big-endian"):
        given = [tensor.numpy().astype(">f8" if kind == "big-endian" else np.float32) for tensor in (X, y)]
    else:
        given = [tensor.to(getattr(torch, kind)) for tensor in (X, y)]
    assert_close(LinearStatistics(3, 1).update(*given), direct(X, y))


@pytest.mark.parametrize("stride", [transposed, every_second, padded_rows, lambda tensor: tensor[:1].expand_as(tensor)])
@pytest.mark.parametrize("d", [4, 40, 514])
def test_strides(device, stride, d):
    X, y = (stride(tensor.to(device)) for tensor in make(333, d, 2))
    assert_close(LinearStatistics(d, 2).update(X, y), direct(X, y))


@pytest.mark.parametrize("ratio", [1e4, 1e8])
@pytest.mark.parametrize("d", [3, 24, 514])
def test_a_mean_far_above_the_spread(device, ratio, d):
    """What is compared is the spread's own size: the rows are exact in float64, and so must their deviations be."""
    X, y = make(4000, d, 1, offset=0)
    X, y = X + ratio, y - ratio
    statistics = LinearStatistics(d, 1).update(X.to(device), y.to(device))
    assert_close(statistics, direct(X, y))
    # Also by parts, whose means each have a rounding of their own.
    parts = LinearStatistics(d, 1)
    for rows in range(0, 4000, 700):
        parts.update(X[rows : rows + 700], y[rows : rows + 700])
    expected = direct(X, y)
    error = (parts.sxx - expected[3]).abs().max() / expected[3].max()
    assert error <= 100 * EPS + ratio * EPS / 10


def test_sorted_rows_and_rows_that_jump():
    """The shift is taken from rows all over the table: what the first rows are like does not matter."""
    X = torch.cat([torch.zeros(5000, 2), 1e6 + torch.randn(5000, 2, dtype=torch.float64)])
    X[:, 1] = torch.linspace(-1e3, 1e3, 10000, dtype=torch.float64) ** 3
    y = X[:, :1].flip(0).contiguous()
    assert_close(LinearStatistics(2, 1).update(X, y), direct(X, y))


@pytest.mark.parametrize("value", [0.1, 1e8 / 3, -7.0])
@pytest.mark.parametrize("d", [2, 20, 514])
def test_constant_columns_do_not_vary(device, value, d):
    X = torch.full((1000, d), value, dtype=torch.float64)
    X[:, 0] = torch.randn(1000)
    statistics = LinearStatistics(d, 1).update(X.to(device), X[:, 1:2].to(device))
    assert statistics.syy.item() == 0
    assert bool((statistics.sxx[1:, 1:] == 0).all())
    assert bool((statistics.mean_x[1:].cpu() == value).all())


@pytest.mark.parametrize("d", [3, 30, 514])
def test_a_whole_weight_is_so_many_rows(device, d):
    X, y = (tensor.to(device) for tensor in make(200, d, 2))
    weight = torch.randint(0, 4, (200,), device=device)
    repeated = LinearStatistics(d, 2).update(X.repeat_interleave(weight, 0), y.repeat_interleave(weight, 0))
    assert_close(LinearStatistics(d, 2).update(X, y, weight), [moment.cpu() for moment in repeated.tensors])


def test_weights_of_zero_count_nothing(device):
    X, y = (tensor.to(device) for tensor in make(100, 2, 1))
    statistics = LinearStatistics(2, 1).update(X, y, torch.zeros(100))
    assert all(bool((moment == 0).all()) for moment in statistics.tensors)
    one = torch.zeros(100)
    one[3] = 0.5
    statistics.update(X, y, one)
    assert statistics.count.item() == 0.5
    torch.testing.assert_close(statistics.mean_x, X[3].cpu(), rtol=4 * EPS, atol=0)
    assert statistics.sxx.abs().max() < 1e-25


def test_exact_sums():
    """Whole numbers, against exact arithmetic: nothing but the last rounding."""
    rng = np.random.default_rng(0)
    X = rng.integers(-1000, 1000, (257, 2))
    y = rng.integers(-1000, 1000, (257, 1))
    statistics = LinearStatistics(2, 1).update(X, y)
    columns = [[Fraction(int(value)) for value in column] for column in (X[:, 0], X[:, 1], y[:, 0])]
    means = [sum(column) / 257 for column in columns]
    found = [
        [statistics.sxx[0, 0], statistics.sxx[0, 1], statistics.sxy[0, 0]],
        [statistics.sxx[1, 0], statistics.sxx[1, 1], statistics.sxy[1, 0]],
    ]
    for i in range(2):
        for j in range(3):
            exact = sum((a - means[i]) * (b - means[j]) for a, b in zip(columns[i], columns[j], strict=True))
            assert float(abs(Fraction(found[i][j].item()) - exact)) <= 1e-15 * 257 * 1e6


# --- parts


def test_no_rows_change_nothing(device):
    X, y = (tensor.to(device) for tensor in make(20, 3, 2))
    statistics = LinearStatistics(3, 2, device=device).update(X[:0], y[:0])
    assert statistics.count.item() == 0
    statistics.update(X, y)
    before = copy.deepcopy(statistics)
    assert same(statistics.update(X[:0], y[:0]), before)
    assert same(statistics.merge(LinearStatistics(3, 2)), before)
    assert same(LinearStatistics(3, 2, device=device).merge(before), before)


def test_any_cut_gives_the_same():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    X, y = make(300, 4, 2, offset=1e3)
    weight = torch.rand(300)
    whole = direct(X, y, weight)

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
    @hypothesis.given(st.lists(st.integers(0, 300), max_size=6), st.booleans())
    def check(cuts: list[int], merging: bool) -> None:
        statistics = LinearStatistics(4, 2)
        borders = [0, *sorted(cuts), 300]
        for begin, end in itertools.pairwise(borders):
            rows = slice(begin, end)
            if merging:
                part = LinearStatistics(4, 2).update(X[rows], y[rows], weight[rows])
                before = copy.deepcopy(part)
                assert statistics.merge(part) is statistics
                assert same(part, before)
            else:
                statistics.update(X[rows], y[rows], weight[rows])
        # A part's mean is rounded to its size, which the deviations between parts inherit.
        assert_close(statistics, whole, factor=3000)

    check()


class Table:
    """What update knows of a table."""

    def __init__(self, *pieces: tuple[Tensor, Tensor]) -> None:
        self.given = pieces

    def pieces(self):
        yield from self.given


def test_a_table_is_added_whole_or_not_at_all():
    X, y = make(100, 3, 1)
    statistics = LinearStatistics(3, 1).update(X[:10], y[:10])
    before = copy.deepcopy(statistics)
    with pytest.raises(ValueError, match="y must have shape"):
        statistics.update(Table((X[10:50], y[10:50]), (X[50:], y[50:, 0])))
    assert same(statistics, before)
    with pytest.raises(TypeError, match=r"^LinearStatistics.update: y must be None with a table, but got Tensor$"):
        statistics.update(Table((X, y)), y)
    assert_close(statistics.update(Table((X[10:50], y[10:50]), (X[50:], y[50:]))), direct(X, y))


@pytest.mark.parametrize("d", [3, 64, 200])
def test_the_same_bits_for_any_number_of_threads(d):
    X, y = make(60_000 if d < 200 else 12_000, d, 2, dtype=torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(LinearStatistics(d, 2).update(X, y))
    finally:
        torch.set_num_threads(before)
    assert all(same(found[0], other) for other in found[1:])


# --- loss, gradient and solution


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("o", [1, 3])
def test_loss_and_gradient_are_the_plain_ones(device, bias, o):
    X, y = (tensor.to(device) for tensor in make(400, 6, o))
    W = torch.randn(o, 6, dtype=torch.float64, device=device, requires_grad=True)
    b = torch.randn(o, dtype=torch.float64, device=device, requires_grad=True)
    expected = functional.mse_loss(functional.linear(X, W, b if bias else None), y)
    statistics = LinearStatistics(6, o, device=device).update(X, y)
    loss = statistics.loss(W, b if bias else None)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    wanted = (W, b) if bias else (W,)
    gradients = torch.autograd.grad(expected, wanted)
    dW, db = statistics.gradient(W, b if bias else None)
    assert not dW.requires_grad
    found = (dW, db) if bias else (dW,)
    for ours, through_loss, exact in zip(found, torch.autograd.grad(loss, wanted), gradients, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(through_loss, exact, rtol=1e-11, atol=1e-12)


def test_gradient_by_differences():
    X, y = make(50, 3, 2)
    statistics = LinearStatistics(3, 2).update(X, y, torch.rand(50))
    W = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(statistics.loss, (W, b))
    for ours, exact in zip(statistics.gradient(W, b), torch.autograd.grad(statistics.loss(W, b), (W, b)), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_weighted_loss():
    X, y = make(300, 4, 2)
    weight = torch.rand(300, dtype=torch.float64)
    W, b = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    squares = (functional.linear(X, W, b) - y) ** 2
    expected = (weight[:, None] * squares).sum() / (2 * weight.sum())
    torch.testing.assert_close(LinearStatistics(4, 2).update(X, y, weight).loss(W, b), expected, rtol=1e-13, atol=0)


def test_a_near_perfect_fit():
    """A loss of 1e-13 of the variance: right to the cancellation of terms of its size, and never negative."""
    X, _ = make(5000, 8, 1)
    W = torch.randn(1, 8, dtype=torch.float64)
    y = X @ W.T + 1e-6 * torch.randn(5000, 1, dtype=torch.float64)
    statistics = LinearStatistics(8, 1).update(X, y)
    variance = (statistics.syy / statistics.count).item()
    weight, bias = statistics.solve()
    expected = functional.mse_loss(functional.linear(X, weight, bias), y).item()
    assert 1e-14 < expected / variance < 1e-11
    assert abs(statistics.loss(weight, bias).item() - expected) <= 50 * EPS * variance
    exact = LinearStatistics(8, 1).update(X, X @ W.T)
    assert 0 <= exact.loss(W, torch.zeros(1)).item() <= 50 * EPS * variance


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.7, 1e3])
@pytest.mark.parametrize("o", [1, 3])
def test_solve_against_scikit_learn(device, ridge, weighted, o):
    linear_model = pytest.importorskip("sklearn.linear_model")
    X, y = make(500, 7, o)
    X = X * torch.logspace(-3, 3, 7, dtype=torch.float64)  # units of all sizes
    weight = torch.rand(500) if weighted else None
    weights = None if weight is None else weight.double().numpy()
    sklearn_model = linear_model.Ridge(alpha=ridge, solver="svd").fit(X.numpy(), y.numpy(), sample_weight=weights)
    statistics = LinearStatistics(7, o, device=device).update(X, y, weight)
    found, bias = statistics.solve(ridge)
    expected = torch.as_tensor(sklearn_model.coef_).reshape(o, 7)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(bias.cpu(), torch.as_tensor(sklearn_model.intercept_).reshape(o), rtol=1e-8, atol=1e-8)
    # The penalised loss is stationary there.
    dW, db = (gradient.cpu() for gradient in statistics.gradient(found, bias))
    penalty = 2 * ridge * found.cpu() / (statistics.count.item() * o)
    scale = statistics.sxx.diagonal().sqrt().cpu() * statistics.syy.max().sqrt().cpu() / statistics.count.cpu()
    assert bool(((dW + penalty).abs() <= 1e-9 * (1 + scale)).all())
    assert db.abs().max() <= 1e-9


@pytest.mark.parametrize("o", [1, 2])
def test_solve_of_collinear_columns_has_the_least_norm(device, o):
    X, y = make(200, 6, o)
    X[:, 3] = 10 * X[:, 0] - 2 * X[:, 1]
    X[:, 4] = 5.0
    X[:, 5] = 0.0
    weight, bias = LinearStatistics(6, o, device=device).update(X, y).solve()
    centred = (X - X.mean(0)).numpy()
    centred[:, 4:] = 0
    expected, _, rank, _ = np.linalg.lstsq(centred, (y - y.mean(0)).numpy(), rcond=1e-10)
    assert rank == 3
    torch.testing.assert_close(weight.T.cpu(), torch.as_tensor(expected), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(bias.cpu(), y.mean(0) - weight.cpu() @ X.mean(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("difference", [1e-3, 1e-5])
def test_solve_of_nearly_collinear_columns(difference):
    X, _ = make(3000, 2, 1)
    X = torch.cat([X, X[:, :1] + difference * torch.randn(3000, 1, dtype=torch.float64)], 1)
    y = X @ torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64) + 0.5
    weight, bias = LinearStatistics(3, 1).update(X, y).solve()
    # An eigenvalue of difference^2: so many digits are left.
    tolerance = 100 * EPS / difference**2
    torch.testing.assert_close(weight, torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), rtol=0, atol=tolerance)
    assert functional.mse_loss(functional.linear(X, weight, bias), y) < 1e-12


def test_solve_with_fewer_rows_than_features():
    X, y = make(5, 12, 1)
    weight, bias = LinearStatistics(12, 1).update(X, y).solve()
    torch.testing.assert_close(functional.linear(X, weight, bias), y, rtol=1e-9, atol=1e-9)
    expected = np.linalg.lstsq((X - X.mean(0)).numpy(), (y - y.mean(0)).numpy(), rcond=1e-10)[0]
    torch.testing.assert_close(weight.T, torch.as_tensor(expected), rtol=1e-8, atol=1e-10)


def test_solve_of_one_row_is_its_target():
    weight, bias = LinearStatistics(2, 1).update(torch.ones(1, 2), torch.tensor([[7.0]])).solve()
    assert weight.tolist() == [[0.0, 0.0]]
    assert bias.tolist() == [7.0]


# --- files, devices, text


def test_save_and_load(tmp_path, device):
    X, y = make(50, 3, 2)
    statistics = LinearStatistics(3, 2, device=device).update(X, y)
    path = statistics.save(str(tmp_path / "statistics.pt"))
    loaded = LinearStatistics.load(path, device=device)
    assert isinstance(loaded, LinearStatistics)
    assert loaded.device.type == device
    assert same(loaded, statistics)
    content = torch.load(path, weights_only=True)
    assert content["format"] == "torchintro statistics"
    assert_close(loaded.update(X, y), direct(torch.cat([X, X]), torch.cat([y, y])))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = LinearStatistics(1, 1).save(tmp_path / "statistics.pt")
    before = path.read_bytes()

    def half(content, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        LinearStatistics(1, 1).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_none(tmp_path):
    path = tmp_path / "statistics.pt"
    with pytest.raises(FileNotFoundError, match=f"^LinearStatistics.load: there is no file {path}$"):
        LinearStatistics.load(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"is not a statistics file of torchintro, or it is damaged$"):
        LinearStatistics.load(path)
    torch.save({"format": "torchintro model", "version": 1}, path)
    with pytest.raises(ValueError, match=r"is a PyTorch file but not a statistics file of torchintro$"):
        LinearStatistics.load(path)
    LinearStatistics(2, 1).save(path)
    good = torch.load(path, weights_only=True)
    for change, message in (
        ({"version": 2}, "has version 2 of the statistics file, but this torchintro reads version 1$"),
        ({"sxx": None}, "is damaged: it must hold six tensors of float64$"),
        ({"sxx": good["sxx"].float()}, "is damaged: it must hold six tensors of float64$"),
        ({"sxx": good["sxx"][:1]}, r"is damaged: sxx must be finite and have shape \(2, 2\), but has \(1, 2\)$"),
        ({"mean_x": good["mean_x"] / 0}, r"is damaged: mean_x must be finite and have shape \(2,\)"),
    ):
        torch.save(good | change, path)
        with pytest.raises(ValueError, match=message):
            LinearStatistics.load(path)


def test_to_moves_in_place(device):
    statistics = LinearStatistics(3, 1).update(*make(10, 3, 1))
    assert statistics.to(device) is statistics
    assert {moment.device.type for moment in statistics.tensors} == {device}
    assert (
        repr(statistics) == f"LinearStatistics(in_features=3, out_features=1, count=10, device='{statistics.device}')"
    )


# --- several processes


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("check", ["shares", "an_empty_share", "other_sizes"])
def test_two_processes(device: str, check: str, tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.device_count() < WORLD_SIZE:
        pytest.skip("needs a CUDA device for each process")
    # They meet at a file: a port found free here could be taken by another process before they bind it.
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE), device, check, str(rank), str(tmp_path / "rendezvous"), str(tmp_path)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert f"{check} holds" in output
    if check != "other_sizes":
        first, second = (LinearStatistics.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD_SIZE))
        assert same(first, second)


def reduce_shares(device: str, rank: int, folder: str, border: int) -> None:
    torch.manual_seed(0)
    X, y = make(100, 4, 2, offset=1e3)
    rows = slice(0, border) if rank == 0 else slice(border, 100)
    statistics = LinearStatistics(4, 2, device=device).update(X[rows], y[rows])
    assert statistics.reduce() is statistics
    assert_close(statistics, direct(X, y), factor=3000)
    statistics.save(Path(folder) / f"rank{rank}.pt")


def shares(device: str, rank: int, folder: str) -> None:
    reduce_shares(device, rank, folder, 37)
    if device == "cuda":
        with pytest.raises(ValueError, match=r"must be on the GPU with the backend nccl, but are on cpu: use \.to"):
            LinearStatistics(4, 2).reduce()


def an_empty_share(device: str, rank: int, folder: str) -> None:
    reduce_shares(device, rank, folder, 0)


def other_sizes(device: str, rank: int, folder: str) -> None:
    statistics = LinearStatistics(3 + rank, 1, device=device)
    message = r"rank 0 has \[3, 1\] and rank 1 has \[4, 1\]$"
    with pytest.raises(ValueError, match=message):
        statistics.reduce()


def main(device: str, check: str, rank: str, rendezvous: str, folder: str) -> int:
    import torch.distributed as dist

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(rank))
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=int(rank), world_size=WORLD_SIZE)
    try:
        globals()[check](device, dist.get_rank(), folder)
    except Exception:
        traceback.print_exc()
        return 1
    print(f"{check} holds")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Without Python's finalization: gloo's threads may still hold tensors, and one that lets go of a tensor in those
    # moments ends the process with SIGABRT (https://github.com/pytorch/pytorch/pull/179291).
    os._exit(status)
