"""The benchmark's cases: their counts, their targets, how they are chosen and scaled down."""

from dataclasses import replace

import pytest
import torch
from bench_cases import case_named

from benchmarks.cases import CASES, Case, Target, count, quick_case, select

TRAININGS = [case.id for case in CASES if case.kind in ("fit", "models", "study")]


@pytest.mark.parametrize(
    ("case", "bytes_read", "bytes_written", "operations"),
    [
        # X 100, y 100, W 1, b 1 in; dW 1, db 1, loss 1 out; 2 products of 2 * 100
        (Case("a", "step", 100, 1), 4 * 202, 4 * 3, 400),
        (Case("b", "step", 10, 3, 2, gradients=("linear_weight",)), 4 * (30 + 20 + 6 + 2), 4 * (6 + 1), 240),
        (Case("c", "step", 10, 3, 2, torch.bfloat16, ("input",)), 2 * 58, 2 * 31, 240),
        (Case("d", "step", 10, 3, 2, torch.float64, ("target", "linear_bias")), 8 * 58, 8 * (20 + 2 + 1), 120),
        (Case("e", "step", 4096, 1024, 1024, gradients=("input", "linear_weight")), 37752832, 20971524, 25769803776),
        (Case("f", "fit", 100, 1, epochs=7), 7 * 808, 7 * 12, 7 * 400),
        (Case("g", "study", 100, 1, epochs=7, trials=3), 21 * 808, 21 * 12, 21 * 400),
    ],
)
def test_count_is_that_by_hand(case, bytes_read, bytes_written, operations):
    need = count(case)
    assert (need.bytes_read, need.bytes_written, need.operations) == (bytes_read, bytes_written, operations)
    assert need.bytes == bytes_read + bytes_written


def test_cases_are_consistent():
    assert len({case.id for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.peers[-1] == "fused"  # the notes of a study are about its last peer
        assert case.peers[0].startswith("eager")
        for target in case.targets:
            assert target.of in case.peers or (target.of == "limit" and case.limit)
            assert (target.at_most is None) != (target.at_least is None)


def test_cases_are_chosen_by_name_or_its_beginning():
    assert [case.id for case in select(["p4C"])] == ["P4c-8", "P4c-16"]
    assert [case.id for case in select(["p4"])] == ["P4a", "P4b", "P4c-8", "P4c-16", "P4d"]
    assert [case.id for case in select(["P5-16", "P1"])] == ["P1", "P5-16"]
    assert [case.id for case in select(["P1"], [Case("P1", "step", 1, 1), Case("P10", "step", 1, 1)])] == ["P1"]
    assert select(None) == list(CASES)
    with pytest.raises(ValueError, match=r"row must be one of P1, P2, .*, but got 'P99'"):
        select(["P99"])


def test_quick_cases_are_small():
    for case in CASES:
        need = count(replace(quick_case(case), epochs=1, trials=1))
        assert need.bytes < 50e6
        assert need.operations < 4e9


def test_targets():
    assert Target("eager", at_most=0.5).met(1.0, 2.0)
    assert not Target("eager", at_most=0.5).met(1.1, 2.0)
    assert Target("eager", at_least=4).met(1.0, 4.0)
    assert not Target("eager", at_least=4).met(1.0, 3.9)
    assert str(Target("limit", at_most=1.25)) == "<= 1.25x limit"
    assert str(Target("eager", at_least=1000)) == ">= 1000x faster than eager"


def test_cases_of_few_outputs_stream_4_gib():
    cases = [case for case in CASES if case.id.startswith("G1")]
    assert {(case.dtype, case.out_features) for case in cases} == {
        (dtype, outputs) for dtype in (torch.float32, torch.bfloat16) for outputs in (1, 2, 4, 8)
    }
    for case in cases:
        assert case.device == "cuda"
        assert case.rows * case.in_features * case.dtype.itemsize == 1 << 32
        assert [target.at_most for target in case.targets if target.of == "limit"] == [1 / 0.85]
    assert ["input" in case.gradients for case in cases].count(True) == 1


def test_cases_of_many_outputs_have_a_target_against_each_peer():
    cases = [case for case in select(["G2"]) if case.kind == "step"]
    assert {case.in_features for case in cases} == {256, 1024, 4096}
    assert {case.out_features for case in cases} == {1024, 4096, 8192}
    for case in cases:
        assert case.targets == tuple(Target(peer, at_least=1.1) for peer in case.peers if peer != "fused")
        assert {"compile", "max-autotune", "triton", "chunked"} < set(case.peers)


def test_cases_and_targets_of_training():
    assert TRAININGS == ["P2", "P3", "P7", "P8a", "P8b", "P8c", "G3", "G4"]
    targets = {name: case_named(name).targets for name in TRAININGS}
    assert targets == {
        "P2": (Target("eager", at_least=1000), Target("jax", at_least=10)),
        "P3": (Target("limit", at_most=1.3),),
        "P7": (Target("eager", at_least=900),),
        "P8a": (Target("eager slices", at_least=8),),
        "P8b": (Target("eager shuffled", at_least=8),),
        "P8c": (),
        "G3": (Target("eager", at_least=100),),
        "G4": (Target("eager", at_least=500),),
    }
    assert [case.id for case in select(["P8"])] == ["P8a", "P8b", "P8c"]


def test_the_work_of_a_training_row_in_words():
    assert case_named("P2").work == "fit 100 epochs, 100x1 -> 1"
    assert case_named("P8a").work == "fit 1 epoch, 1000000x64 -> 1, 1024 in order"
    assert case_named("P8b").work == "fit 1 epoch, 1000000x64 -> 1, 1024 shuffled"
    assert case_named("P8c").work == "16 fits 1 epoch, 1000000x64 -> 1, 1024 shuffled"
