"""`python -m benchmarks --from RECORD --table`: the documentation's figures from the records that they came from."""

import json
from pathlib import Path

import pytest
from bench_cases import case_named

from benchmarks.record import Bound, CaseResult
from benchmarks.report import markdown as table
from benchmarks.run import Options, main
from benchmarks.timing import Measurement

ROOT = Path(__file__).parents[2]
OF_THE_STEPS = ROOT / "benchmarks" / "results" / "2026-11-25-cpu-intel-xeon-amx.json"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GPU_TIMES = {"eager": 4.0e-3, "compile": 3.0e-3, "max-autotune": 2.5e-3, "triton": 2.2e-3, "chunked": 2.0e-3}


def result_of(name, device="cuda", fused=1.6e-3, limit=1.5e-3):
    case = case_named(name)
    times = {peer: GPU_TIMES[peer] for peer in case.peers if peer in GPU_TIMES} | {"fused": fused}
    if case.kind == "memory":
        return CaseResult(case, device, {peer: Measurement((time * 2**40,)) for peer, time in times.items()})
    measured = {peer: Measurement((time,)) for peer, time in times.items()}
    return CaseResult(case, device, measured, Bound("copy", limit, Measurement((limit,))))


@pytest.fixture
def gpu_record():
    rows = [result_of("P4a", "cpu"), result_of("P4a"), *map(result_of, ("G1a-1", "G1d-8", "G2d", "G2m-1"))]
    series = {"in_features": 64, "out_features": 1, "rows": [1, 4], "wins_from": {"GPU": 4, "GPU with transfer": None}}
    return {"schema": 2, "quick": False, "rows": [row.record() for row in rows], "grid": [], "crossover": [series]}


def test_the_documented_table_comes_from_its_record(capsys):
    assert main(Options(record=OF_THE_STEPS, table=True)) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 2 + len(table.CPU_ROWS)
    assert any(out in page.read_text() for page in PAGES)


def test_the_documented_table_of_training_comes_from_its_record(capsys):
    record = OF_THE_STEPS.with_name("2026-11-25-cpu-training-intel-xeon-amx.json")
    assert main(Options(record=record, table=True)) == 0
    out = capsys.readouterr().out
    assert out.count("| study, ") == 2
    assert any(out in page.read_text() for page in PAGES)


def test_tables_of_a_gpu(gpu_record):
    assert table.markdown(gpu_record)[2:] == [
        "| step, 1M x 64 -> 1 | 4.00 ms | 3.00 ms | - | 1.60 ms | 2.5x | 94 % |",
        "",
        "| work | eager | torch.compile | max-autotune | chunked | fused | against the best peer | of limit |",
        "|---|---|---|---|---|---|---|---|",
        "| step, 2^24 x 64 -> 1 | 4.00 ms | 3.00 ms | 2.50 ms | 2.00 ms | 1.60 ms | 1.2x (chunked) | 94 % |",
        "| step, 2^21 x 1024 -> 8, bfloat16 | 4.00 ms | 3.00 ms | 2.50 ms | 2.00 ms "
        "| 1.60 ms | 1.2x (chunked) | 94 % |",
        "| step, 16384 x 4096 -> 4096, bfloat16, with the input's gradient | 4.00 ms | 3.00 ms | 2.50 ms | 2.00 ms "
        "| 1.60 ms | 1.2x (chunked) | 94 % |",
        "| extra peak memory, 65536 x 1024 -> 8192, bfloat16 | 4194 MiB | 3146 MiB | - | 2097 MiB | 1678 MiB "
        "| 0.80 of chunked's | |",
        "",
        "| step, float32 | the GPU wins | with the transfer |",
        "|---|---|---|",
        "| N x 64 -> 1 | from N = 4 on | never up to N = 4 |",
    ]


def test_peers_that_were_skipped_leave_a_gap(gpu_record):
    row = gpu_record["rows"][2]
    for peer in ("compile", "max-autotune", "chunked"):
        del row["peers"][peer]
    assert "| 4.00 ms | - | - | - | 1.60 ms | 2.5x (eager) | 94 % |" in table.markdown(gpu_record)[5 + 1]
    del row["peers"]["eager"]
    assert "| - | - | - | - | 1.60 ms | - | 94 % |" in table.markdown(gpu_record)[6]


def test_the_record_of_gpu_check_is_taken_too(gpu_record, tmp_path, capsys):
    path = tmp_path / "record.json"
    for record in (gpu_record, {"device": "GPU", "parts": {}, "benchmarks": gpu_record}):
        path.write_text(json.dumps(record))
        assert main(Options(record=path, table=True)) == 0
        assert capsys.readouterr().out == "\n".join(table.markdown(gpu_record)) + "\n"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"parts": {}, "benchmarks": None}, "bench: from must be a record with figures, but "),
        (
            {"parts": {}, "benchmarks": {"schema": 9}},
            "bench: from must be a record of schema 1 or 2 that bench --json wrote",
        ),
        ({"schema": 1, "quick": True, "rows": []}, "bench: table needs a record of a full run, but got a quick one: "),
        ({"schema": 1, "quick": False, "rows": []}, "bench: there is nothing to make a table of: the record holds no"),
    ],
)
def test_records_without_a_table(record, message, tmp_path, capsys):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    assert main(Options(record=path, table=True)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.63e-5, "0.046 ms"), (9.6e-4, "0.96 ms"), (1.4e-3, "1.40 ms"), (9.996e-3, "10.0 ms"), (0.114, "114 ms"),
     (1.234, "1234 ms"), (60.12, "60.1 s"), (2e-6, "0.0020 ms")],
)  # fmt: skip
def test_times_have_two_or_three_digits(seconds, text):
    assert table._time(seconds) == text


def test_ratios_have_two_digits():
    assert [table._digits(value, 2) for value in (0.456, 1.04, 9.96, 17.3, 912.0)] == ["0.46", "1.0", "10", "17", "912"]


def training_result(name, device, times, **options):
    return CaseResult(case_named(name), device, {peer: Measurement((time,)) for peer, time in times.items()}, **options)


def test_table_of_training():
    rows = [
        training_result("P2", "cpu", {"eager": 5e-3, "compile": 3e-4, "jax": 5e-5, "fit": 2e-5, "fused": 4e-6}),
        training_result(
            "P7", "cpu", {"eager": 60.0, "jax": 10.0, "ridge": 0.3, "fused": 0.06}, scales={"eager": 333.3}
        ),
        training_result("P8a", "cpu", {"eager slices": 0.08, "DataLoader": 3.4, "sklearn": 0.3, "fused": 0.008}),
        training_result("P8c", "cpu", {"eager shuffled": 3.2, "fused": 0.03}, scales={"eager shuffled": 16.0}),
        training_result("G3", "cuda", {"eager": 2e-2, "graph": 1e-3, "fit": 3e-4, "fused": 1e-4}),
        training_result("P2", "cuda", {"eager": 2e-2, "fused": 1e-4}),
    ]
    record = {"schema": 2, "rows": [row.record() for row in rows]}
    assert table.markdown(record) == [
        "| work | eager | torch.compile | DataLoader | JAX | scikit-learn | fit | fused | against eager "
        "| against JAX |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| fit, 100 epochs, 100 x 1 -> 1 | 5.00 ms | 0.30 ms | - | 0.050 ms | - | 0.020 ms | 0.0040 ms | 1250x | 13x |",
        "| study, 20 trials x 100 epochs, 1M x 64 -> 1 | 60.0 s* | - | - | 10.0 s | 300 ms | - | 60.0 ms "
        "| 1000x | 167x |",
        "| fit, 1 epoch, 1M x 64 -> 1, batches of 1024 in order | 80.0 ms | - | 3400 ms | - | 300 ms | - | 8.00 ms "
        "| 10x | - |",
        "| 16 learning rates, 1 epoch, 1M x 64 -> 1, batches of 1024 shuffled | 3200 ms* | - | - | - | - | - | 30.0 ms "
        "| 107x | - |",
        "",
        "*: a part was run, and its time scaled up.",
        "",
        "| work | eager | CUDA graph | fit | fused | against eager |",
        "|---|---|---|---|---|---|",
        "| fit, 100 epochs, 100 x 1 -> 1 | 20.0 ms | 1.00 ms | 0.30 ms | 0.10 ms | 200x |",
    ]


def test_trainings_of_an_older_record_are_left_out():
    row = training_result("P2", "cpu", {"eager": 5e-3, "fused": 4e-6}).record()
    with pytest.raises(ValueError, match="the record holds no row with figures"):
        table.markdown({"schema": 1, "rows": [row]})
