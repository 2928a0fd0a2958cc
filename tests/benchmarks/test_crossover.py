"""From how many rows on a GPU is worth it: the decision, and the loop with the CPU in the GPU's place."""

import json
import re

import pytest
import torch
from bench_cases import CPU

from benchmarks import crossover
from benchmarks.crossover import WAYS, Crossover, Series, lines, measure, run_crossover, wins_from
from benchmarks.timing import QUICK, Measurement


@pytest.mark.parametrize(
    ("cpu", "gpu", "rows"),
    [
        ({1: 1.0, 4: 2.0, 16: 8.0}, {1: 3.0, 4: 3.0, 16: 3.0}, 16),
        ({1: 1.0, 4: 4.0, 16: 8.0}, {1: 3.0, 4: 3.0, 16: 3.0}, 4),
        ({1: 4.0, 4: 4.0}, {1: 3.0, 4: 3.0}, 1),
        ({1: 1.0, 4: 2.0}, {1: 3.0, 4: 3.0}, None),
        ({1: 3.0, 4: 3.0}, {1: 3.0, 4: 3.0}, None),  # as fast does not win
        ({1: 4.0, 4: 2.0, 16: 8.0}, {1: 3.0, 4: 3.0, 16: 3.0}, 16),  # won once, lost again, then for good
        ({1: 4.0, 4: 4.0, 16: 2.0}, {1: 3.0, 4: 3.0, 16: 3.0}, None),  # lost in the end
        ({16: 8.0, 1: 1.0, 4: 4.0}, {4: 3.0, 16: 3.0, 1: 3.0}, 4),  # in any order
        ({1: 4.0, 4: 4.0, 16: 4.0}, {1: 3.0, 4: 3.0}, 1),  # as far as both were measured
        ({}, {}, None),
    ],
)
def test_the_gpu_wins_from_the_smallest_number_of_rows_on(cpu, gpu, rows):
    assert wins_from(cpu, gpu) == rows


def made(*times):
    seconds = {way: dict(zip((1, 4, 16), of_way, strict=True)) for way, of_way in zip(WAYS, times, strict=True)}
    return Crossover(Series(64, 1), seconds)


def test_the_sentences():
    result = made((0.001, 0.004, 0.016), (0.002, 0.002, 0.002), (0.02, 0.02, 0.02))
    text = lines(result)
    assert re.search(r"^64 -> 1 +1 +1\.000 ms +2\.000 ms +0\.50x +20\.00 ms +0\.05", text[0])
    assert text[-1].strip() == "the GPU wins: from N = 4 on; with the transfer: never up to N = 16"
    assert result.record()["wins_from"] == {"GPU": 4, "GPU with transfer": None}
    assert Crossover(Series(64, 1)).sentence("GPU") == "not measured"


def test_the_loop_measures_powers_of_4_and_is_recorded():
    result = measure(Series(5, 2), CPU, QUICK, most_rows=100)
    for way in WAYS:
        assert list(result.seconds[way]) == [1, 4, 16, 64]
        assert all(seconds > 0 for seconds in result.seconds[way].values())
    assert (result.ended, result.failure) == ("", "")
    record = json.loads(json.dumps(result.record(), allow_nan=False))
    assert record["rows"] == [1, 4, 16, 64]
    assert record["wins_from"].keys() == {"GPU", "GPU with transfer"}


def test_a_series_ends_before_it_takes_too_long(monkeypatch):
    monkeypatch.setattr(crossover, "interleaved", lambda calls, *_, **__: dict.fromkeys(calls, Measurement((1.0,))))
    clock = iter([0.0, 0.0, 1.0, 3.0, 7.0])  # the numbers of rows take 1, 2 and 4 seconds
    result = measure(Series(2, 1), CPU, QUICK, seconds=20, clock=lambda: next(clock))
    assert list(result.seconds["CPU"]) == [1, 4, 16]
    assert result.ended == "before N = 64, which would take too long"
    assert "it ended before N = 64, which would take too long" in lines(result)[-1]


def test_a_series_ends_where_the_memory_does(monkeypatch):
    monkeypatch.setattr(crossover, "free_memory", lambda device: 4000.0)
    result = measure(Series(9, 1), CPU, QUICK)
    assert list(result.seconds["CPU"]) == [1, 4, 16]  # 2 x 4 x 10 x 16 bytes are below 0.4 x 4000, 64 rows are not
    assert result.ended == "before N = 64, for want of memory"


def test_a_wrong_result_fails(monkeypatch):
    right, calls = crossover.functional.linear_mse_loss, []

    def wrong(*args, **kwargs):
        calls.append(1)
        return right(*args, **kwargs) * (1.01 if len(calls) == 2 else 1.0)

    monkeypatch.setattr(crossover.functional, "linear_mse_loss", wrong)
    result = measure(Series(2, 1), CPU, QUICK)
    assert result.failure == "N = 1: RuntimeError: the loss of GPU is not that of the CPU"
    assert "FAILED: N = 1" in lines(result)[0]
    assert result.sentence("GPU") == "not measured"


def test_all_series_are_printed(capsys):
    results = run_crossover(CPU, QUICK, quick=True, series=[Series(3, 1), Series(3, 2)])
    out = capsys.readouterr().out
    assert [result.series.name for result in results] == ["3 -> 1", "3 -> 2"]
    assert (
        len(re.findall(r"^ +the GPU wins: (?:from N = \d+ on|never up to N = 64); with the transfer: ", out, re.M)) == 2
    )
    assert out.isascii()


@pytest.mark.cuda
def test_on_a_gpu(capsys):
    result = measure(Series(64, 1), torch.device("cuda", torch.cuda.current_device()), QUICK, most_rows=64)
    assert not result.failure
    assert list(result.seconds["GPU with transfer"]) == [1, 4, 16, 64]
