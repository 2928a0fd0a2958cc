"""The benchmark's grid of shapes, from times that are made up or mean nothing."""

import re

import pytest
import torch
from bench_cases import CPU

import torchintro
from benchmarks.grid import FULL_GRID, PLANES, QUICK_GRID, Cell, Grid, Plane, plan, run_grid
from benchmarks.run import Options, main
from benchmarks.timing import Measurement
from torchintro import reference


def cell(eager, fused, shape=(1, 1, 1), **kwargs):
    return Cell(*shape, Measurement(tuple(eager)), Measurement(tuple(fused)), **kwargs)


def test_the_grid_leaves_out_what_is_too_large():
    grid = Grid((1, 1000), (1, 100), 1e7, FULL_GRID.looks)
    shapes = plan(grid, PLANES[0], torch.float32, 600_000)
    assert len(shapes) == 8
    assert [shape for shape, reason in shapes.items() if not reason] == [
        *((1, d, o) for d in (1, 100) for o in (1, 100)),
        *((1000, 1, 1), (1000, 100, 1)),
    ]
    assert shapes[1000, 1, 100] == "which would take more than 0.0 GiB of memory"
    assert plan(grid, PLANES[0], torch.float32, 1e12)[1000, 100, 100] == "of more than 1e+07 operations a step"
    assert plan(grid, PLANES[1], torch.float32, 600_000)[1000, 100, 1].startswith("which would take")
    assert plan(grid, PLANES[0], torch.float64, 600_000)[1000, 100, 1].startswith("which would take")


def test_the_full_grid_is_the_one_that_was_promised():
    assert FULL_GRID.features == (1, 4, 16, 64, 256, 1024, 4096)
    assert FULL_GRID.batches == (1, 16, 256, 4096, 65536, 1_000_000)


@pytest.mark.parametrize(
    ("eager", "fused", "ratio", "mark"),
    [
        ([2.0] * 7, [1.0] * 7, 2.0, ""),
        ([0.9] * 7, [1.0] * 7, 0.9, "!"),
        ([0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 1.2], [1.0] * 7, 0.9, "~"),  # of seven rounds the slowest may be the truth
        ([0.9] * 14 + [1.2], [1.0] * 15, 0.9, "!"),
        ([0.9] * 10 + [1.2] * 5, [1.0] * 15, 0.9, "~"),
    ],
)
def test_a_cell_is_only_called_slower_beyond_noise(eager, fused, ratio, mark):
    measured = cell(eager, fused)
    assert measured.ratio == pytest.approx(ratio)
    assert measured.mark == mark
    assert measured.interval[0] <= ratio <= measured.interval[1]


def test_the_table_and_the_worst_cell():
    plane = Plane(PLANES[0], torch.float32, seconds=12.0)
    plane.cells = [
        cell([2.0] * 7, [1.0] * 7, (1, 1, 1)),
        cell([0.5] * 7, [1.0] * 7, (1, 16, 1), again=True),
        cell([12.0] * 7, [1.0] * 7, (1, 16, 64)),
    ]
    plane.left_out = {(1, 64, 64): "of more than 2e+11 operations a step"}
    assert plane.table(1, QUICK_GRID) == [
        "",
        "N = 1",
        "              O = 1    O = 16    O = 64",
        "D = 1         2.00         -         -",
        "D = 16        0.50!        -      12.0",
        "D = 64           -         -         -",
    ]
    assert plane.summary() == [
        "grid dW db, float32: 3 cells in 12 s",
        "left out: 1 cells, of more than 2e+11 operations a step",
        "slower than eager: 1 cells; below 1 within noise: 0; measured again: 1; median of all: 2.00x",
        "worst cell: N=1, D=16, O=1: 0.50x (eager 500.0 ms, fused 1000.0 ms; 95 % interval of 7 "
        "rounds: 0.50x to 0.50x)",
    ]
    record = plane.record()
    assert record["worst"] == [1, 16, 1, 0.5]
    assert record["slower"] == 1
    assert record["cells"][1] == [1, 16, 1, 0.5, 1.0, 0.5, 0.5, 0.5, 7, True]
    assert len(record["columns"]) == len(record["cells"][0])


def test_a_cell_that_seems_slower_is_measured_again(monkeypatch):
    looks = []

    def timed(calls, effort, device):
        looks.append(effort)
        eager = 0.5 if effort is grid.looks[0] else 1.5
        return {"eager": Measurement((eager,) * 7), "fused": Measurement((1.0,) * 7)}

    monkeypatch.setattr("benchmarks.grid.interleaved", timed)
    grid = Grid((4,), (2,), 1e9, FULL_GRID.looks)
    (plane,) = run_grid(grid, CPU, planes=PLANES[:1], show=lambda line: None)
    assert looks == list(grid.looks)
    assert [(found.ratio, found.again) for found in plane.cells] == [(1.5, True)]


def test_a_wrong_cell_is_not_timed_and_fails_the_run(monkeypatch, capsys):
    def wrong(input, linear_weight, target, *, linear_bias):
        linear_bias.register_hook(lambda gradient: gradient * 1.01)
        return reference.linear_mse_loss(input, linear_weight, target, linear_bias=linear_bias)

    monkeypatch.setattr(torchintro.functional, "linear_mse_loss", wrong)
    assert main(Options(quick=True, grid=True, no_rows=True)) == 1
    out, err = capsys.readouterr()
    assert "grid dW db, float32: 0 cells" in out
    assert "left out: 18 cells, where the peers disagree" in out
    assert re.search(
        r"^bench: grid dW db, float32 failed: N=1, D=1, O=1: linear_bias is 1\.\d+e-02 from plain", err, re.M
    )


def test_grid_of_a_run(quick_run):
    out, record = quick_run.out, quick_run.record
    assert out.count("CPU grid, d") == 2
    assert "CPU grid, dX dW db, float32: eager / fused, forward and backward" in out
    assert len(re.findall(r"^worst cell: N=\d+, D=\d+, O=\d+: [\d.]+x \(eager ", out, re.M)) == 2
    for plane in record["grid"]:
        assert len(plane["cells"]) == 18
        ratio = plane["columns"].index("ratio")
        assert plane["worst"][3] == min(measured[ratio] for measured in plane["cells"])
