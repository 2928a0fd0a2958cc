"""The roofline picture of a record."""

import json
import sys
from pathlib import Path

import pytest
from bench_cases import case_named

from benchmarks.cases import count, quick_case
from benchmarks.record import json_text
from benchmarks.report import roofline
from benchmarks.run import Options, main

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# Those with steps: a record of training rows has nothing for the roofline.
RECORDS = [
    path for path in sorted(RESULTS.glob("*-cpu-*.json")) if roofline.points(json.loads(path.read_text()), "cpu")
]
assert RECORDS


def test_points_of_the_picture(quick_run):
    record = quick_run.record
    (point,) = roofline.points(record, "cpu")  # P1 is only overhead
    assert point.case == "P4d"
    need = count(quick_case(case_named("P4d")))
    assert point.intensity == need.operations / need.bytes
    assert set(point.rates) == {"eager", "fused"}
    assert roofline.points(record, "cuda") == []


def test_the_picture_is_drawn_from_a_record(quick_run, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    record = {**quick_run.record, "trials": []}
    path = tmp_path / "record.json"
    path.write_text(json_text(record))
    assert main(Options(record=path, plot=tmp_path / "new")) == 0
    png, svg = tmp_path / "new" / "roofline.png", tmp_path / "new" / "roofline.svg"
    assert capsys.readouterr().out == f"written to {png}\nwritten to {svg}\n"
    assert png.read_bytes().startswith(b"\x89PNG")
    first = svg.read_text()
    assert "<svg" in first
    main(Options(record=path, plot=tmp_path / "new"))
    assert svg.read_text() == first


@pytest.mark.parametrize("path", RECORDS, ids=[path.stem for path in RECORDS])
def test_names_in_the_picture_do_not_overlap(path):
    Text = pytest.importorskip("matplotlib.text", reason="Matplotlib is not installed").Text
    record = json.loads(path.read_text())
    found = roofline.points(record, "cpu")
    figure = roofline._figure(record, "cpu", found)
    (axes,) = figure.axes
    names = {point.case for point in found}
    figure.canvas.draw()
    # Of an annotation the text alone: its line to the marks is not part of the name.
    boxes = [Text.get_window_extent(text) for text in axes.texts if text.get_text() in names]
    assert len(boxes) == len(names)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    canvas = figure.get_window_extent()
    assert all(canvas.x0 <= box.x0 and box.x1 <= canvas.x1 and box.y1 <= canvas.y1 for box in boxes)


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        ([0.2, 0.5, 0.8], [0.2, 0.5, 0.8]),  # far apart: they stay
        ([0.5, 0.5], [0.45, 0.55]),  # about their middle
        ([0.0, 0.0, 0.9, 0.95, 1.0], [0.05, 0.15, 0.75, 0.85, 0.95]),  # at the ends inwards
        ([0.3] * 10, [0.05 + 0.1 * i for i in range(10)]),  # as many as there is room for
    ],
)
def test_names_are_moved_no_further_than_they_must(wanted, places):
    assert roofline.spread(wanted, 0.1) == pytest.approx(places)


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
    assert main(Options(record=path, plot=tmp_path)) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_one_sentence_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(Options(plot=tmp_path)) == 2
    assert capsys.readouterr().err == 'bench: plot needs matplotlib: pip install "torchintro[cli]"\n'
