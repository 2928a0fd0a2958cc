"""How the benchmark takes times. No figure is judged here."""

from dataclasses import replace

from bench_cases import CPU

from benchmarks.timing import QUICK, Interruptions, Measurement, interleaved


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
