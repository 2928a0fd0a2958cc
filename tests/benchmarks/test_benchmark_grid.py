"""The benchmark's grid of shapes and its picture, from times that are made up or mean nothing."""

import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import torchintro
from benchmarks import command
from benchmarks.cases import count, quick_row, select
from benchmarks.grid import FULL_GRID, PLANES, QUICK_GRID, Cell, Grid, Plane, plan, run_grid
from benchmarks.report import roofline
from benchmarks.report.text import json_text
from benchmarks.timing import Measurement
from torchintro import reference

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# Those with steps: a record of training rows has nothing for the roofline.
RECORDS = [
    path for path in sorted(RESULTS.glob("*-cpu-*.json")) if roofline.points(json.loads(path.read_text()), "cpu")
]
assert RECORDS


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    out = io.StringIO()
    with redirect_stdout(out):
        assert command.main("cpu", ["P1", "P4d"], path, quick=True, grid=True) == 0
    return out.getvalue(), json.loads(path.read_text())


# The grid


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
    assert command.main(quick=True, grid=True, no_rows=True) == 1
    out, err = capsys.readouterr()
    assert "grid dW db, float32: 0 cells" in out
    assert "left out: 18 cells, where the peers disagree" in out
    assert re.search(
        r"^bench: grid dW db, float32 failed: N=1, D=1, O=1: linear_bias is 1\.\d+e-02 from plain", err, re.M
    )


def test_grid_of_a_run(quick_run):
    out, record = quick_run
    assert out.count("CPU grid, d") == 2
    assert "CPU grid, dX dW db, float32: eager / fused, forward and backward" in out
    assert len(re.findall(r"^worst cell: N=\d+, D=\d+, O=\d+: [\d.]+x \(eager ", out, re.M)) == 2
    for plane in record["grid"]:
        assert len(plane["cells"]) == 18
        ratio = plane["columns"].index("ratio")
        assert plane["worst"][3] == min(measured[ratio] for measured in plane["cells"])


# Record and picture


def test_a_record_is_readable_json(quick_run):
    _, record = quick_run
    text = json_text({**record, "words": ["a [b", "c] d", 'JAX: "x[y]"'], "nothing": []})
    assert json.loads(text)["words"] == ["a [b", "c] d", 'JAX: "x[y]"']
    assert {**json.loads(text), **record} == json.loads(text)
    assert len(text.splitlines()) < 500


def test_points_of_the_picture(quick_run):
    _, record = quick_run
    (point,) = roofline.points(record, "cpu")  # P1 is only overhead
    assert point.row == "P4d"
    need = count(quick_row(select(["P4d"])[0]))
    assert point.intensity == need.operations / need.bytes
    assert set(point.rates) == {"eager", "fused"}
    assert roofline.points(record, "cuda") == []


def test_the_picture_is_drawn_from_a_record(quick_run, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    _, record = quick_run
    path = tmp_path / "record.json"
    path.write_text(json_text(record))
    assert command.main(record_path=path, plot=tmp_path / "new") == 0
    png, svg = tmp_path / "new" / "roofline.png", tmp_path / "new" / "roofline.svg"
    assert capsys.readouterr().out == f"written to {png}\nwritten to {svg}\n"
    assert png.read_bytes().startswith(b"\x89PNG")
    first = svg.read_text()
    assert "<svg" in first
    command.main(record_path=path, plot=tmp_path / "new")
    assert svg.read_text() == first


@pytest.mark.parametrize("path", RECORDS, ids=[path.stem for path in RECORDS])
def test_names_in_the_picture_do_not_overlap(path):
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    record = json.loads(path.read_text())
    found = roofline.points(record, "cpu")
    figure = roofline._figure(record, "cpu", found)
    (axes,) = figure.axes
    names = {point.row for point in found}
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text() in names]
    assert len(boxes) == len(names)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "bench: from must be a record that bench --json wrote, but got"),
        ("[]", "bench: from must be a record of schema 1 or 2 that bench --json wrote, but got"),
        (
            '{"schema": 1, "rows": []}',
            "bench: there is nothing to plot: the record holds no step whose limit was measured",
        ),
        ('{"schema": 1}', "bench: the record must be one that bench --json wrote, but it lacks 'rows'"),
    ],
)
def test_a_record_that_is_none_is_refused(text, message, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    path = tmp_path / "record.json"
    path.write_text(text)
    assert command.main(record_path=path, plot=tmp_path) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_one_sentence_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command.main(plot=tmp_path) == 2
    assert capsys.readouterr().err == 'bench: plot needs matplotlib: pip install "torchintro[cli]"\n'
