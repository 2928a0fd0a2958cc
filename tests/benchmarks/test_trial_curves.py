"""`python -m benchmarks --trials`: what is run, what is scaled up and said to be, and the picture of it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from bench_cases import CPU

from benchmarks import run, trials
from benchmarks.peers import fused
from benchmarks.record import json_text
from benchmarks.report import trials as trials_picture
from benchmarks.run import Options, main
from benchmarks.trials import FULL_PLAN, QUICK_PLAN, SHAPES, Curve, Plan, Point, Shape, lines, measure

SHAPE = Shape(40, 2)
PLAN = Plan(trials=(1, 3, 10), epochs=10, part=2, seconds=1e9, sample=0.0, samples=1)


class Clock:
    """Every call of a way takes so many seconds a trial and epoch; nothing is measured."""

    def __init__(self, monkeypatch, **seconds):
        self.now, self.calls = 0.0, []
        self.seconds = seconds
        for line in trials.LINES:
            monkeypatch.setattr(trials._Trainings, line, self._way(line))
        monkeypatch.setattr(trials, "once", self._once)

    def _way(self, line):
        def run(data, count, epochs):
            self.calls.append((line, count, epochs))
            self.now += self.seconds[line] * count * epochs
            lrs = torch.full((count,), 0.01, dtype=torch.float64)
            exact = trials.exact_losses(data.X.double(), data.y.double(), data.initial.double(), lrs, epochs)
            return lrs, exact

        return run

    def _once(self, call, device):
        before = self.now
        call()
        return type("Measured", (), {"median": self.now - before})

    def __call__(self):
        return self.now


def test_the_plan():
    assert FULL_PLAN.trials == (1, 3, 10, 30, 100, 300, 1000)
    assert FULL_PLAN.epochs == 100
    assert [shape.name for shape in SHAPES] == ["100 x 1 -> 1", "1000000 x 64 -> 1"]


def test_every_line_is_verified_and_measured():
    curve = measure(SHAPE, CPU, PLAN)
    assert (curve.failure, curve.skipped) == ("", {})
    assert list(curve.lines) == ["loop", "models", "tune"]
    for points in curve.lines.values():
        assert [point.trials for point in points] == [1, 3, 10]
        assert all(point.seconds > 0 and len(point.samples) == 1 and point.part is None for point in points)
    assert all(check.passed for check in curve.checks.values())
    assert set(curve.engines) == {"models", "tune"}


def test_a_wrong_line_is_not_timed_and_fails_the_run(monkeypatch, capsys):
    class Wrong(fused.ModelsAtOnce):
        def __call__(self, lrs):
            trained = super().__call__(lrs)
            trained.losses *= 1.001
            return trained

    monkeypatch.setattr(fused, "ModelsAtOnce", Wrong)
    monkeypatch.setattr(run, "QUICK_PLAN", replace(QUICK_PLAN, trials=(1,)))
    assert main(Options(quick=True, trials=True, no_rows=True)) == 1
    out, err = capsys.readouterr()
    assert out.count("FAILED: models computes losses with an error of") == 2
    assert "bench: trials 100 x 1 -> 1 failed: models computes losses with an error of" in err


def test_the_loop_is_scaled_up_where_it_takes_too_long(monkeypatch):
    clock = Clock(monkeypatch, loop=0.1, models=0.0, tune=0.0)
    curve = measure(SHAPE, CPU, replace(PLAN, seconds=5.0), clock=clock)
    # A trial of ten epochs takes a second: ten of them are too many.
    assert [call for call in clock.calls if call[0] == "loop"] == [("loop", 3, 2), ("loop", 1, 10), ("loop", 3, 10)]
    assert [(point.trials, point.part) for point in curve.lines["loop"]] == [(1, None), (3, None), (10, (3, 10))]
    assert [point.seconds for point in curve.lines["loop"]] == pytest.approx([1.0, 3.0, 10.0])
    assert curve.lines["loop"][-1].samples == ()


def test_where_a_single_trial_takes_too_long_a_part_of_its_epochs_is_run(monkeypatch):
    clock = Clock(monkeypatch, loop=1.0, models=1e-9, tune=1e-9)
    curve = measure(SHAPE, CPU, replace(PLAN, seconds=5.0), clock=clock)
    assert [call for call in clock.calls if call[0] == "loop"] == [("loop", 3, 2), ("loop", 1, 2)]
    assert [(point.seconds, point.part) for point in curve.lines["loop"]] == [
        (pytest.approx(10.0), (1, 2)),
        (pytest.approx(30.0), (1, 2)),
        (pytest.approx(100.0), (1, 2)),
    ]
    text = "\n".join(lines(curve))
    assert re.search(r"^40 x 2 -> 1 +1 +10\.0 s\* ", text, re.M)
    assert "*: scaled up from 1 trial x 2 epochs" in text


def test_other_lines_end_where_they_would_take_too_long(monkeypatch):
    clock = Clock(monkeypatch, loop=0.0, models=0.1, tune=1e-9)
    curve = measure(SHAPE, CPU, replace(PLAN, seconds=5.0), clock=clock)
    assert [point.trials for point in curve.lines["models"]] == [1, 3]
    assert all(point.part is None for point in curve.lines["models"])
    assert curve.skipped == {"models": "not measured from 10 trials on, which would take too long"}
    assert [point.trials for point in curve.lines["tune"]] == [1, 3, 10]
    assert "models: not measured from 10 trials on" in "\n".join(lines(curve))


def test_a_disturbed_curve_says_so():
    curve = made_up_curve(SHAPE, 1)
    for rate, said in ((None, False), (30.0, False), (90.0, True)):
        curve.interruptions = rate
        text = "\n".join(lines(curve))
        assert ("disturbed: other processes took a core 90 times a second" in text) is said


def test_what_breaks_down_keeps_what_was_measured_before(monkeypatch):
    clock = Clock(monkeypatch, loop=0.0, models=0.0, tune=0.0)

    def broken(*_):
        raise RuntimeError("no memory\nand more")

    monkeypatch.setattr(trials._Trainings, "models", broken)
    curve = measure(SHAPE, CPU, PLAN, clock=clock)
    assert curve.failure == "models: RuntimeError: no memory"
    assert set(curve.lines) == {"loop", "tune"}
    json.dumps(curve.record(), allow_nan=False)


# The picture


def made_up_curve(shape, factor):
    loop = [Point(1, 0.01 * factor, (0.01 * factor,)), Point(1000, 10.0 * factor, part=(1, 100))]
    models = [Point(1, 1e-4, (1e-4,)), Point(1000, 4e-3 * factor, (4e-3 * factor,))]
    return Curve(shape, "cpu", 100, {"loop": loop, "models": models, "tune": models[:1]})


@pytest.fixture
def record():
    machine = {"cpu": "A $processor$", "threads": 2, "torch": "2.13.0", "date": "2026-01-01T00:00:00"}
    curves = [made_up_curve(shape, factor).record() for shape, factor in zip(SHAPES, (1, 300), strict=True)]
    return {"schema": 2, "quick": False, "machine": machine, "limits": {}, "rows": [], "trials": curves}


def test_record_of_a_curve(record):
    curve = json.loads(json_text(record))["trials"][0]
    assert (curve["rows"], curve["in_features"], curve["epochs"], curve["device"]) == (100, 1, 100, "cpu")
    assert curve["lines"]["loop"] == [
        {"trials": 1, "seconds": 0.01, "samples": [0.01], "measured": None},
        {"trials": 1000, "seconds": 10.0, "samples": [], "measured": {"trials": 1, "epochs": 100}},
    ]


def test_the_picture_is_drawn_from_a_record(record, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    path = tmp_path / "record.json"
    path.write_text(json_text(record))
    assert main(Options(record=path, plot=tmp_path / "new")) == 0
    png, svg = tmp_path / "new" / "trials.png", tmp_path / "new" / "trials.svg"
    assert capsys.readouterr().out == f"written to {png}\nwritten to {svg}\n"
    assert png.read_bytes().startswith(b"\x89PNG")
    first = svg.read_text()
    assert len(first) < 200_000
    main(Options(record=path, plot=tmp_path / "new"))
    assert svg.read_text() == first


def test_what_was_scaled_up_is_hollow_and_said_to_be(record):
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    figure = trials_picture._figure(record, "cpu", record["trials"])
    assert len(figure.axes) == len(SHAPES)
    ratios = ["100x", "30 000x"]
    for axes in figure.axes:
        (hollow,) = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
        assert list(hollow.get_xdata()) == [1000]
        # The ratio to the loop stands at the last point of each other line.
        assert [text.get_text() for text in axes.texts if text.get_text().endswith("x")] == [ratios.pop(0), "2 500x"]
    assert any("scaled up" in text.get_text() for text in figure.texts)
    for curve in record["trials"]:
        curve["lines"]["loop"] = curve["lines"]["loop"][:1]
    full = trials_picture._figure(record, "cpu", record["trials"])
    assert not any("scaled up" in text.get_text() for text in full.texts)


def test_nothing_to_draw(record, tmp_path):
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    assert trials_picture.draw({**record, "trials": []}, tmp_path) == []
    del record["trials"][0]["lines"]
    with pytest.raises(ValueError, match="the record must be one that bench --json wrote, but it lacks 'lines'"):
        trials_picture.draw(record, tmp_path)


def test_the_curves_of_a_run(quick_run):
    assert re.search(r"^100 x 1 -> 1 +1 +[\d.]+ ms\*? ", quick_run.out, re.M)
    assert re.search(r"^1000 x 64 -> 1 +1 ", quick_run.out, re.M)
    curves = quick_run.record["trials"]
    assert [curve["rows"] for curve in curves] == [100, 1000]
    for curve in curves:
        assert list(curve["lines"]) == ["loop", "models", "tune"]
        assert all(check["passed"] for check in curve["verification"].values())


def test_without_rows_the_trials_alone(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    monkeypatch.setattr(run, "_run_cases", lambda cases, *_, **__: pytest.fail("cases were measured") if cases else [])
    monkeypatch.setattr(run, "run_trials", lambda device, plan: [made_up_curve(SHAPE, 1)] * (plan is QUICK_PLAN))
    path = tmp_path / "record.json"
    assert main(Options(json=path, quick=True, no_rows=True, trials=True, plot=tmp_path)) == 0
    record = json.loads(path.read_text())
    assert [curve["rows"] for curve in record["trials"]] == [SHAPE.rows]
    assert record["rows"] == []
    assert (tmp_path / "trials.svg").exists()
    assert not (tmp_path / "roofline.svg").exists()
