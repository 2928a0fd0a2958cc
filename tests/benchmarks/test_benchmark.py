"""The benchmark: its counts, its verification, its table and its record. No figure that it measures is judged here."""

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import torchintro
from benchmarks import command
from benchmarks import fit as runs
from benchmarks.cases import ROWS, Row, Target, count, quick_row, select
from benchmarks.fit import StudyWork
from benchmarks.machine import Limits, describe
from benchmarks.memory import extra_peak
from benchmarks.peers import jax as jax_peers
from benchmarks.peers import loops
from benchmarks.report.text import Bound, RowResult, Verdict, row_lines, versus_lines
from benchmarks.step import make_work
from benchmarks.timing import QUICK, Interruptions, Measurement, interleaved
from torchintro import reference

CPU = torch.device("cpu")
LIMITS = Limits(
    read=1e10,
    copy=1e10,
    matrix={torch.float32: 1e11},
    matrix_size=64,
    ways={"read": "sum", "copy": "copy_", "float32": "mm"},
)


def row_named(name):
    (row,) = select([name])
    return row


# Rows


@pytest.mark.parametrize(
    ("row", "bytes_read", "bytes_written", "operations"),
    [
        # X 100, y 100, W 1, b 1 in; dW 1, db 1, loss 1 out; 2 products of 2 * 100
        (Row("a", "step", 100, 1), 4 * 202, 4 * 3, 400),
        (Row("b", "step", 10, 3, 2, gradients=("linear_weight",)), 4 * (30 + 20 + 6 + 2), 4 * (6 + 1), 240),
        (Row("c", "step", 10, 3, 2, torch.bfloat16, ("input",)), 2 * 58, 2 * 31, 240),
        (Row("d", "step", 10, 3, 2, torch.float64, ("target", "linear_bias")), 8 * 58, 8 * (20 + 2 + 1), 120),
        (Row("e", "step", 4096, 1024, 1024, gradients=("input", "linear_weight")), 37752832, 20971524, 25769803776),
        (Row("f", "fit", 100, 1, epochs=7), 7 * 808, 7 * 12, 7 * 400),
        (Row("g", "study", 100, 1, epochs=7, trials=3), 21 * 808, 21 * 12, 21 * 400),
    ],
)
def test_count_is_that_by_hand(row, bytes_read, bytes_written, operations):
    need = count(row)
    assert (need.bytes_read, need.bytes_written, need.operations) == (bytes_read, bytes_written, operations)
    assert need.bytes == bytes_read + bytes_written


def test_rows_are_consistent():
    assert len({row.id for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.peers[-1] == "fused"  # the notes of a study are about its last peer
        assert row.peers[0].startswith("eager")
        for target in row.targets:
            assert target.of in row.peers or (target.of == "limit" and row.limit)
            assert (target.at_most is None) != (target.at_least is None)


def test_rows_are_chosen_by_name_or_its_beginning():
    assert [row.id for row in select(["p4C"])] == ["P4c-8", "P4c-16"]
    assert [row.id for row in select(["p4"])] == ["P4a", "P4b", "P4c-8", "P4c-16", "P4d"]
    assert [row.id for row in select(["P5-16", "P1"])] == ["P1", "P5-16"]
    assert [row.id for row in select(["P1"], [Row("P1", "step", 1, 1), Row("P10", "step", 1, 1)])] == ["P1"]
    assert select(None) == list(ROWS)
    with pytest.raises(ValueError, match=r"row must be one of P1, P2, .*, but got 'P99'"):
        select(["P99"])


def test_quick_rows_are_small():
    for row in ROWS:
        need = count(replace(quick_row(row), epochs=1, trials=1))
        assert need.bytes < 50e6
        assert need.operations < 4e9


def test_targets():
    assert Target("eager", at_most=0.5).met(1.0, 2.0)
    assert not Target("eager", at_most=0.5).met(1.1, 2.0)
    assert Target("eager", at_least=4).met(1.0, 4.0)
    assert not Target("eager", at_least=4).met(1.0, 3.9)
    assert str(Target("limit", at_most=1.25)) == "<= 1.25x limit"
    assert str(Target("eager", at_least=1000)) == ">= 1000x faster than eager"


# Verification


@pytest.mark.parametrize("name", [row.id for row in ROWS if row.device == "cpu" and row.kind == "step"])
def test_every_peer_is_right(name):
    work = make_work(quick_row(row_named(name)), CPU, compile=False)
    for peer, checks in work.verify().items():
        assert checks
        for result, check in checks.items():
            assert check.passed, f"{peer}: {result} has an error of {check.error}, allowed {check.allowed}"


SMALL = Row(
    "small",
    "step",
    50,
    7,
    3,
    gradients=("input", "linear_weight", "linear_bias", "target"),
    peers=("eager", "fused"),
)


class ScaledGradient(torch.autograd.Function):
    """The identity, with a gradient that is off by a hundredth of a per cent."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.0001


def wrong_gradient(argument):
    def operator(input, linear_weight, target, *, linear_bias):
        tensors = {"input": input, "linear_weight": linear_weight, "target": target, "linear_bias": linear_bias}
        tensors[argument] = ScaledGradient.apply(tensors[argument])
        return reference.linear_mse_loss(**tensors)

    return operator


def wrong_loss(*args, **kwargs):
    return reference.linear_mse_loss(*args, **kwargs) * 1.0001


def not_a_number(*args, **kwargs):
    return reference.linear_mse_loss(*args, **kwargs) * float("nan")


@pytest.mark.parametrize(
    ("operator", "wrong"),
    [
        (wrong_loss, "loss"),
        (not_a_number, "loss"),
        *((wrong_gradient(name), name) for name in SMALL.gradients),
    ],
    ids=["loss", "nan", *SMALL.gradients],
)
def test_a_wrong_operator_fails_and_is_not_timed(operator, wrong):
    result = command.run_row(SMALL, CPU, LIMITS, QUICK, fused=operator)
    assert result.status == "failed"
    assert any(
        re.match(rf"fused computes {wrong} with an error of \S+, where \S+ is allowed", f) for f in result.failures
    )
    assert not result.measurements
    json.dumps(result.record(), allow_nan=False)
    assert not result.checks["fused"][wrong].passed
    if operator not in (wrong_loss, not_a_number):
        assert [name for name, check in result.checks["fused"].items() if not check.passed] == [wrong]


def test_the_right_operator_passes():
    result = command.run_row(SMALL, CPU, LIMITS, QUICK)
    assert result.status == "ok"
    assert set(result.measurements) == {"eager", "fused"}
    assert set(result.checks["fused"]) == {"loss", *SMALL.gradients}


def test_a_missing_gradient_fails():
    def detached(input, linear_weight, target, *, linear_bias):
        return reference.linear_mse_loss(input, linear_weight.detach(), target, linear_bias=linear_bias)

    result = command.run_row(SMALL, CPU, LIMITS, QUICK, fused=detached)
    assert "fused left no gradient of linear_weight" in result.failures[0]


def test_a_wrong_run_has_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(torchintro.functional, "linear_mse_loss", wrong_loss)
    assert command.main(rows=["P1"], quick=True) == 1
    out, err = capsys.readouterr()
    assert "FAILED: fused computes loss with an error of" in out
    assert "bench: P1 on cpu failed: fused computes loss" in err


# Timing


def test_measurement_statistics():
    measured = Measurement((4.0, 1.0, 2.0, 3.0, 5.0))
    assert measured.median == 3.0
    assert measured.quartiles == (2.0, 4.0)
    assert measured.spread == 2.0
    assert measured.scaled(2).samples == (8.0, 2.0, 4.0, 6.0, 10.0)
    assert Measurement((7.0,)).spread == 0.0


def test_interruptions_are_counted(monkeypatch):
    counts = iter([100, 100 + 50])
    monkeypatch.setattr(Interruptions, "_so_far", staticmethod(lambda: next(counts)))
    clock = iter([10.0, 10.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    rate = Interruptions().per_second()
    monkeypatch.undo()
    assert rate == 100


def test_peers_are_timed_in_turn():
    order = []
    calls = {name: lambda name=name: (order.append(name), sum(range(100_000))) for name in "abc"}
    timed = interleaved(calls, replace(QUICK, block=1e-9, rounds=(4, 4)), CPU)
    rounds = "".join(order)[-12:]
    assert rounds == "abcbcacababc"  # each round starts with another
    assert all(len(measured.samples) == 4 and measured.calls == 1 for measured in timed.values())


def test_fast_calls_are_repeated():
    timed = interleaved({"a": lambda: None}, replace(QUICK, block=1e-4), CPU)
    assert timed["a"].calls > 10
    assert timed["a"].median < 1e-4


# Table, record and exit codes


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "new" / "bench.json"
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = command.main("cpu", ["P1", "P4d"], path, quick=True)
    return code, out.getvalue(), err.getvalue(), json.loads(path.read_text())


def test_table(quick_run):
    code, out, err, _ = quick_run
    assert (code, err) == (0, "")
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
    _, _, _, record = quick_run
    assert record["schema"] == 2
    assert record["trials"] == []
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
        for measured in row["peers"].values():
            assert 0 < measured["first_quartile"] <= measured["median"] <= measured["third_quartile"]
            assert len(measured["samples"]) >= 3
        assert all(check["passed"] for check in row["verification"]["fused"].values())


def test_missed_targets_are_shown():
    row = replace(
        SMALL, targets=(Target("eager", at_least=1e9), Target("eager", at_most=1e9), Target("limit", at_most=1))
    )
    result = command.run_row(replace(row, limit=""), CPU, LIMITS, QUICK)
    assert result.status == "short of target"
    lines = "\n".join(row_lines(result, set()))
    assert re.search(r"fused .*>= 1e\+09x faster than eager, short of target: [\d.]+x$", lines, re.M)
    assert re.search(r"also <= 1e\+09x eager: [\d.]+x$", lines, re.M)
    assert "also <= 1x limit (not judged)" in lines
    assert [target["met"] for target in result.record()["targets"]] == [False, True, None]


def test_scaled_times_are_said_to_be():
    row = replace(row_named("P7"), rows=500, measured=(2, 3))
    result = command.run_row(row, CPU, LIMITS, QUICK, jax=False, judge=False)
    part = "not run in full: times of 2 trials x 3 epochs, scaled up by 333"
    assert any(note.startswith("eager") and note.endswith(part) for note in result.notes)
    assert result.measurements["eager"].median > 0.1  # 2000 steps cannot be done in less


@pytest.mark.parametrize(
    ("seconds", "trials", "epochs", "scale"), [((1.0, 9.0), 2, 3, 2000 / 6), ((1.0, 1.2), 20, 100, 1.0)]
)
def test_a_study_whose_time_does_not_grow_with_the_epochs_is_run_in_full(monkeypatch, seconds, trials, epochs, scale):
    asked = []
    monkeypatch.setattr(StudyWork, "_tune", lambda self, *_: asked.append((self.trials["fused"], self.epochs["fused"])))
    clock = iter([0.0, seconds[0], 100.0, 100.0 + seconds[1]])
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    work = make_work(replace(row_named("P7"), rows=50), CPU, jax=False)
    assert asked[1:] == [(2, 3), (2, 30)]
    assert (work.trials["fused"], work.epochs["fused"]) == (trials, epochs)
    assert work.scales == {"eager": pytest.approx(2000 / 6), "fused": pytest.approx(scale)}
    assert "ridge" in work.calls  # which does no trials
    assert [note for note in work.notes if "fused" in note and "scaled up" in note] == (
        [f"eager, fused: not run in full: times of 2 trials x 3 epochs, scaled up by {scale:.0f}"] if scale > 1 else []
    )


def test_exact_losses_are_those_of_training():
    row = replace(row_named("P7"), rows=60, in_features=5, out_features=2, measured=(2, 3))
    work = make_work(row, CPU, jax=False)
    X, y, lrs = work.X.double(), work.y.double(), torch.tensor([1e-3, 1e-1], dtype=torch.float64)
    trained = [loops.train(work._initial().double(), X, y, lr, 7) for lr in lrs.tolist()]
    found = runs.exact_losses(X, y, work._initial().double(), lrs, 7)
    torch.testing.assert_close(found, torch.stack(trained), rtol=1e-12, atol=0)


def test_memory_is_measured_in_bytes():
    row = quick_row(row_named("P6c"))
    prediction = row.rows * row.out_features * 4
    # Plain PyTorch holds the prediction and its gradient.
    assert 1.9 * prediction < extra_peak(row, "eager", CPU) < 3.5 * prediction
    result = RowResult(row, "cpu", {"fused": Measurement((3.0 * 2**20,))})
    assert "3.0 MiB" in "\n".join(row_lines(result, set()))
    assert result.record()["unit"] == "bytes"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_and_the_cpu(capsys):
    assert command.main("cuda", ["P1", "G1"], quick=True, crossover=True) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^bench: there is no GPU to use: .*; only the CPU is measured\.$", out, re.M)) == 1
    assert re.search(r"^P1 +step", out, re.M)
    assert "G1a-1: only for --device cuda on a machine with a GPU" in out
    assert "the GPU wins" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "bench: device must be cpu or cuda, but got 'tpu'"),
        ({"rows": ["P1", "nonsense"]}, "but got 'nonsense'"),
        ({"grid": True, "dtype": "int8"}, "bench: dtype must be one of float32, float64, bfloat16, but got 'int8'"),
        ({"no_rows": True}, "bench: no-rows leaves only the grid and the trials; it takes one of them and no row, and"),
        ({"no_rows": True, "trials": True, "rows": ["P1"]}, "bench: no-rows leaves only the grid and the trials"),
        ({"no_rows": True, "grid": True, "plot": Path("p")}, "bench: no-rows leaves only the grid and the trials"),
        ({"record_path": Path("r.json"), "table": True, "trials": True}, "bench: from shows a record; it takes plot"),
        ({"record_path": Path("r.json")}, "bench: from shows a record; it takes plot or table, and nothing else"),
        ({"record_path": Path("r.json"), "table": True, "grid": True}, "bench: from shows a record; it takes plot or"),
        ({"table": True}, "bench: table needs from, the record to make it of"),
        ({"plot": Path(__file__)}, "bench: plot must be a folder that can be written to, but got"),
    ],
)
def test_wrong_arguments_have_exit_code_2(arguments, message, capsys):
    assert command.main(**arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_a_json_path_that_cannot_be_written_is_refused_at_once(tmp_path, capsys):
    for path in (tmp_path, Path(__file__) / "bench.json"):
        assert command.main(json_path=path) == 2
        assert "bench: json must be a file that can be written, but got" in capsys.readouterr().err


def test_description_of_the_machine():
    machine = describe(CPU)
    assert machine["cpu"]
    assert machine["kernels"] in ("baseline", "avx2", "avx512")
    assert "gpu" not in machine


@pytest.mark.cuda
def test_on_a_gpu(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert command.main("cuda", ["P1", "P2", "P4a", "P6c"], path, quick=True) == 0
    assert "GPU against CPU" in capsys.readouterr().out
    assert {row["device"] for row in json.loads(path.read_text())["rows"]} == {"cpu", "cuda"}


def test_table_of_gpu_against_cpu():
    row = row_named("P4a")
    host = RowResult(row, "cpu", {"fused": Measurement((0.006,))})
    device = RowResult(row, "cuda", {"fused": Measurement((0.0002,))}, transfer_seconds=0.0198)
    lines = versus_lines([host], [device])
    assert re.search(r"^P4a .* 6\.000 ms +0\.2000 ms +30\.0x +19\.80 ms +0\.30x$", lines[-1])
    assert versus_lines([host], []) == []


# Verdicts beside the machine's limit


@pytest.mark.parametrize(
    ("target", "fused", "limit", "text", "possible"),
    [
        (
            Target("eager", at_least=4),
            0.012837,
            0.01137,
            ">= 4x faster than eager, short of target: 3.10x (this machine's limit allows 3.50x)",
            False,
        ),
        (Target("eager", at_least=4), 0.012837, 0.005, ">= 4x faster than eager, short of target: 3.10x", True),
        (Target("eager", at_least=3), 0.012837, 0.01137, ">= 3x faster than eager: 3.10x", True),
        (
            Target("eager", at_most=0.2),
            0.012837,
            0.01137,
            "<= 0.2x eager, short of target: 0.32x (this machine's limit allows 0.29x)",
            False,
        ),
        (Target("limit", at_most=1.1), 0.012837, 0.01137, "<= 1.1x limit, short of target: 1.13x", None),
    ],
)
def test_a_verdict_says_what_the_machine_allows(target, fused, limit, text, possible):
    result = RowResult(
        replace(SMALL, targets=(target,)),
        "cpu",
        {"eager": Measurement((0.0398,)), "fused": Measurement((fused,))},
        Bound("read", limit, Measurement((limit,))),
    )
    result.verdicts = command._judge(result)
    assert [str(verdict) for verdict in result.verdicts] == [text]
    assert result.status == ("short of target" if "short" in text else "ok")
    assert result.record()["targets"][0]["possible"] is possible


def test_a_target_of_a_peer_that_is_not_there_is_not_judged():
    result = RowResult(row_named("P2"), "cpu", {"eager": Measurement((1.0,)), "fused": Measurement((0.0005,))})
    result.verdicts = command._judge(result)
    assert [str(verdict) for verdict in result.verdicts] == [
        ">= 1000x faster than eager: 2000x",
        ">= 10x faster than jax (not judged)",
    ]
    assert str(Verdict(Target("jax", at_least=10), 12.0, True)) == ">= 10x faster than jax: 12.0x"


# JAX


def test_without_jax_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("P1", "P2", "P3"):
        work = make_work(quick_row(row_named(name)), CPU, compile=False)
        assert work.skipped["jax"] == 'JAX is not installed: pip install "torchintro[jax]"'
        assert "jax" not in work.calls
    assert jax_peers.why_not(torch.device("cuda")) == "JAX is compared on the CPU only"


def test_jax_that_breaks_down_is_left_out(monkeypatch):
    monkeypatch.setattr(jax_peers, "why_not", lambda device: "")

    def broken(*_, **__):
        raise RuntimeError("XLA says no\nand more")

    monkeypatch.setattr(jax_peers, "JaxStep", type("JaxStep", (), {"__init__": broken}))
    work = make_work(quick_row(row_named("P1")), CPU, compile=False)
    assert work.skipped["jax"] == "JAX failed here: XLA says no"


def test_jax_is_imported_where_a_row_wants_it_only(monkeypatch):
    monkeypatch.setattr(jax_peers, "_jax", lambda: pytest.fail("JAX was imported"))
    work = make_work(quick_row(row_named("P1")), CPU, compile=False, jax=False)
    assert work.skipped["jax"] == "JAX is left out of this run"
    make_work(replace(quick_row(row_named("P1")), peers=("eager", "fused")), CPU)


@pytest.mark.parametrize("name", ["P1", "P3", "P6b", "P7", "X3-1", "X3-4"])
def test_jax_does_the_same_work(name):
    pytest.importorskip("jax", reason="JAX is not installed")
    row = row_named(name)
    row = replace(row, rows=200) if row.measured else quick_row(row)
    result = command.run_row(row, CPU, LIMITS, QUICK, compile=False, judge=False)
    assert result.status == "ok", result.failures
    assert result.checks["jax"]
    assert list(result.measurements) == [peer for peer in row.peers if peer != "compile"]
    assert result.measurements["jax"].median > 0
