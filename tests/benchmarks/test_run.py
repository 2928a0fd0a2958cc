"""A run of the benchmark: its options, its table, its record and its exit codes. No figure is judged here."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_cases import CPU, case_named, measured, wrong_loss

import torchintro
from benchmarks import run
from benchmarks.crossover import Crossover, Series
from benchmarks.record import CaseResult, json_text
from benchmarks.report.text import versus_lines
from benchmarks.run import Options, main
from benchmarks.timing import Measurement


def test_table(quick_run):
    out = quick_run.out
    assert (quick_run.code, quick_run.err) == (0, "")
    assert out.isascii()
    assert f"torchintro {torchintro.__version__}, torch {torch.__version__}" in out
    assert re.search(r"CPU limits: read [\d.]+ GB/s \(\w+\); copy [\d.]+ GB/s .*; matrix float32 \d+ GFLOP/s", out)
    time = r" +[\d.]+ ms +[\d.]+ ms +"
    assert re.search(rf"^P1 +step 100x1 -> 1 f32 dW db +eager{time}1\.00x +- +- +\d+%$", out, re.M)
    assert re.search(rf"^P4d +step 2048x128 -> 1 f32 dX dW db +eager{time}1\.00x +[\d.]+ +[\d.]+ +\d+%$", out, re.M)
    assert len(re.findall(rf"^ +fused{time}[\d.]+x ", out, re.M)) == 2
    assert "limit: W.sum().backward()" in out
    assert out.count("torch.compile is left out of this run") == 1
    assert out.count("JAX is left out of this run") == 1
    assert "2 rows, 2 verified against float64" in out
    assert "no figure means anything" in out


def test_record(quick_run):
    record = quick_run.record
    assert record["schema"] == 2
    assert record["crossover"] == []  # that is for a GPU
    assert record["quick"] is True
    assert record["machine"]["torch"] == torch.__version__
    assert {"cpu", "cores", "threads", "kernels", "date", "command"} <= record["machine"].keys()
    assert record["limits"]["cpu"]["read_bytes_per_second"] > 0
    first, second = record["rows"]
    assert first["id"] == "P1"
    assert first["status"] == "ok"
    assert first["dtype"] == "float32"
    assert first["gradients"] == ["linear_weight", "linear_bias"]
    assert first["count"] == {"bytes_read": 808, "bytes_written": 12, "operations": 400, "bytes": 820}
    assert [(target["text"], target["met"]) for target in first["targets"]] == [("<= 0.52x eager", None)]
    assert second["limit"]["seconds"] > 0
    for row in record["rows"]:
        assert set(row["peers"]) == {"eager", "fused"}
        for figures in row["peers"].values():
            assert 0 < figures["first_quartile"] <= figures["median"] <= figures["third_quartile"]
            assert len(figures["samples"]) >= 3
        assert all(check["passed"] for check in row["verification"]["fused"].values())


def test_a_record_is_readable_json(quick_run):
    record = quick_run.record
    text = json_text({**record, "words": ["a [b", "c] d", 'JAX: "x[y]"'], "nothing": []})
    assert json.loads(text)["words"] == ["a [b", "c] d", 'JAX: "x[y]"']
    assert {**json.loads(text), **record} == json.loads(text)
    assert len(text.splitlines()) < 500


def test_a_wrong_run_has_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(torchintro.functional, "linear_mse_loss", wrong_loss)
    assert main(Options(cases=["P1"], quick=True)) == 1
    out, err = capsys.readouterr()
    assert "FAILED: fused computes loss with an error of" in out
    assert "bench: P1 on cpu failed: fused computes loss" in err


def test_without_a_gpu_one_sentence_and_the_cpu(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(
        run, "_run_cases", lambda cases, device, *_, **__: asked.append(([case.id for case in cases], device)) or []
    )
    assert main(Options("cuda", ["P1", "G1"], quick=True, crossover=True)) == 0
    assert asked == [(["P1"], CPU)]
    out = capsys.readouterr().out
    assert len(re.findall(r"^bench: there is no GPU to use: .*; only the CPU is measured\.$", out, re.M)) == 1
    assert "G1a-1: only for --device cuda on a machine with a GPU" in out
    assert "the GPU wins" not in out


def test_a_case_that_needs_what_is_not_installed_is_left_out(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "optuna" else find_spec(name))
    result = measured("P3")
    assert (result.status, result.measurements) == ("left out", {})
    assert result.notes == ["left out: Optuna is not installed: pip install optuna"]


GPU_MACHINE = """
import sys
for name in ("optuna", "polars", "pyarrow", "typer", "rich", "matplotlib", "sklearn", "tqdm", "jax"):
    sys.modules[name] = None
from benchmarks import cases, gpu_check, run, works
from benchmarks.report import text
sys.exit(run.main(run.Options(cases=["P1", "P2", "P3"], quick=True)))
"""


def test_a_machine_with_torch_alone_can_measure():
    root = Path(__file__).parents[2]
    path = os.pathsep.join([*sys.path, str(root)])  # the same torchintro as here, then the checkout's benchmarks
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", GPU_MACHINE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^P1 +step", done.stdout, re.M)
    assert re.search(r"^P2 +fit", done.stdout, re.M)
    assert "left out: Optuna is not installed" in done.stdout
    assert "2 verified against float64" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "bench: device must be cpu or cuda, but got 'tpu'"),
        ({"cases": ["P1", "nonsense"]}, "but got 'nonsense'"),
        ({"grid": True, "dtype": "int8"}, "bench: dtype must be one of float32, float64, bfloat16, but got 'int8'"),
        ({"no_rows": True}, "bench: no-rows leaves only the grid and the trials; it takes one of them and no row, and"),
        ({"no_rows": True, "trials": True, "cases": ["P1"]}, "bench: no-rows leaves only the grid and the trials"),
        ({"no_rows": True, "grid": True, "plot": Path("p")}, "bench: no-rows leaves only the grid and the trials"),
        ({"record": Path("r.json"), "table": True, "trials": True}, "bench: from shows a record; it takes plot"),
        ({"record": Path("r.json")}, "bench: from shows a record; it takes plot or table, and nothing else"),
        ({"record": Path("r.json"), "table": True, "grid": True}, "bench: from shows a record; it takes plot or"),
        ({"table": True}, "bench: table needs from, the record to make it of"),
        ({"plot": Path(__file__)}, "bench: plot must be a folder that can be written to, but got"),
    ],
)
def test_wrong_arguments_have_exit_code_2(arguments, message, capsys):
    assert main(Options(**arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_a_json_path_that_cannot_be_written_is_refused_at_once(tmp_path, capsys):
    for path in (tmp_path, Path(__file__) / "bench.json"):
        assert main(Options(json=path)) == 2
        assert "bench: json must be a file that can be written, but got" in capsys.readouterr().err


@pytest.mark.cuda
def test_on_a_gpu(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert main(Options("cuda", ["P1", "P2", "P4a", "P6c"], path, quick=True)) == 0
    assert "GPU against CPU" in capsys.readouterr().out
    assert {row["device"] for row in json.loads(path.read_text())["rows"]} == {"cpu", "cuda"}


def test_table_of_gpu_against_cpu():
    case = case_named("P4a")
    host = CaseResult(case, "cpu", {"fused": Measurement((0.006,))})
    device = CaseResult(case, "cuda", {"fused": Measurement((0.0002,))}, transfer_seconds=0.0198)
    lines = versus_lines([host], [device])
    assert re.search(r"^P4a .* 6\.000 ms +0\.2000 ms +30\.0x +19\.80 ms +0\.30x$", lines[-1])
    assert versus_lines([host], []) == []


@pytest.mark.parametrize(
    ("options", "asked"),
    [({}, True), ({"cases": ["P1"]}, False), ({"cases": ["P1"], "crossover": True}, True)],
    ids=["all rows", "a row", "a row and crossover"],
)
def test_the_crossover_is_measured_for_all_cases_or_when_asked(options, asked, monkeypatch, tmp_path, capsys):
    description = run.describe(CPU)
    monkeypatch.setattr(run, "_why_no_gpu", lambda: "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(run, "describe", lambda device: description)
    monkeypatch.setattr(run, "_run_cases", lambda *_, **__: [])
    failed = Crossover(Series(2, 1), failure="N = 1: RuntimeError: no")
    monkeypatch.setattr(run, "run_crossover", lambda device, effort, *, quick: [failed])
    path = tmp_path / "r.json"
    assert main(Options("cuda", json=path, **options)) == (1 if asked else 0)
    assert len(json.loads(path.read_text())["crossover"]) == asked
    assert ("bench: crossover 2 -> 1 failed: N = 1: RuntimeError: no" in capsys.readouterr().err) == asked
