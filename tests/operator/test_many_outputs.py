"""Many outputs on the CPU: tiles of rows and of outputs, threads with rows of their own, both libraries' products."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from problems import (
    DTYPES,
    assert_as_exact_as_eager,
    assert_sorted_rows_lose_no_digits,
    make_problem,
    padded_rows,
    transposed,
)
from programs import python_path
from torch.profiler import profile

import torchintro
from torchintro import _C
from torchintro.cli import info

# (threads, rows, in_features, out_features): with one thread a tile is 8 MB and about square, with several each has
# tiles of about 1 MB, if there are rows enough.
TILES = [
    pytest.param(1, 2500, 3, 1900, id="rows-and-outputs"),
    pytest.param(1, 300, 6, 8000, id="outputs"),
    pytest.param(1, 60001, 3, 83, id="rows"),
    pytest.param(2, 9001, 7, 150, id="lanes"),
    pytest.param(3, 40001, 2, 99, id="lanes-odd"),
]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


# Every dtype in tiles of both kinds with one thread, and with rows of their own for two; some in the others.
TILINGS = [
    pytest.param(*tile.values, *dtypes, id=f"{tile.id}-{i}")
    for tile, some in zip(TILES, [range(6), (0, 4), (1, 3), range(6), (2, 5)], strict=True)
    for i, dtypes in enumerate(DTYPES)
    if i in some
]


@pytest.mark.parametrize(("threads", "rows", "d", "o", "dtype", "target_dtype"), TILINGS, indirect=["threads"])
@pytest.mark.usefixtures("threads")
def test_every_tiling(rows: int, d: int, o: int, dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    problem = make_problem(rows, d, o, weight="row", dtype=dtype, target_dtype=target_dtype)
    assert_as_exact_as_eager(problem)


@pytest.mark.parametrize(("threads", "rows", "d", "o"), [TILES[0], TILES[3]], indirect=["threads"])
@pytest.mark.usefixtures("threads")
def test_strides_reach_every_tile(rows: int, d: int, o: int) -> None:
    problem = make_problem(rows, d, o, weight="element", bias=False)
    for stride in (transposed, padded_rows):
        assert_as_exact_as_eager(problem.map(stride))


@pytest.mark.parametrize(("threads", "rows", "d", "o"), TILES, indirect=["threads"])
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_from_run_to_run(rows: int, d: int, o: int, dtype: torch.dtype) -> None:
    problem = make_problem(rows, d, o, dtype=dtype)
    first = problem.results(torchintro.linear_mse_loss)
    again = problem.results(torchintro.linear_mse_loss)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("threads", "rows"), [(1, 70000), (2, 60000)], indirect=["threads"])
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_sorted_by_target_lose_no_digits(rows: int, dtype: torch.dtype) -> None:
    assert_sorted_rows_lose_no_digits(rows, 80, dtype, "cpu")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d", "o"), [(18, 33), (19, 33), (65, 130)])
def test_what_lies_between_the_rows_is_not_read(
    device: str, d: int, o: int, dtype: torch.dtype, reduction: str
) -> None:
    wanted = (reduction == "mean",) * 4
    problem = make_problem(310, d, o, dtype=dtype, reduction=reduction, requires_grad=wanted, device=device)
    assert_as_exact_as_eager(problem.map(padded_rows))


@pytest.mark.parametrize(("threads", "rows"), [(1, 2048), (2, 2048)], indirect=["threads"])
@pytest.mark.usefixtures("threads")
def test_no_temporary_is_as_large_as_the_prediction(rows: int) -> None:
    problem = make_problem(rows, 8, 16384, dtype=torch.float32, requires_grad=(True, True, False, True))
    leaves = problem.leaves()
    with profile(profile_memory=True) as profiler:
        problem.call(torchintro.linear_mse_loss, leaves).backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())
    prediction = problem.target.nbytes
    assert 0 < allocated < 0.35 * prediction


@pytest.mark.parametrize("route", ["blas", "onednn"])
def test_both_routes_are_exact(route: str) -> None:
    """Products from 128 rows, features and outputs on go the chosen way: whole, and added up over tiles."""
    program = """
import torch, torchintro
from problems import assert_as_exact_as_eager, make_problem
from torch.profiler import profile
torch.set_num_threads(1)
for rows, d, o in [(140, 130, 150), (2100, 129, 2900), (300, 40, 200)]:
    for dtype in (torch.float32, torch.float64):
        problem = make_problem(rows, d, o, dtype=dtype)
        assert_as_exact_as_eager(problem)
        with profile() as profiler:
            problem.results(torchintro.linear_mse_loss)
        onednn = sum(event.name == "mkldnn::_linear_pointwise" for event in profiler.events())
        print(torchintro._C.matrix_route(), onednn, end=" ")
"""
    environment = dict(os.environ)
    environment["TORCHINTRO_MATRIX_ROUTE"] = route
    environment["PYTHONPATH"] = python_path()
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    exists = torch.backends.mkldnn.is_available()
    products = [3, 0, 12, 0, 0, 0] if route == "onednn" and exists else [0] * 6
    assert run.stdout.split() == [word for count in products for word in (route, str(count))]


def test_info_reports_the_route() -> None:
    assert _C.matrix_route() in ("blas", "onednn")
    assert _C.matrix_route() in str(info.collect()["CPU matrix products"])
