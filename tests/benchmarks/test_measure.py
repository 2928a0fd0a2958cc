"""One case, measured: a wrong peer is found before any time is taken, and targets are judged."""

import json
import re
from dataclasses import replace

import pytest
import torch
from bench_cases import CPU, LIMITS, SMALL, case_named, wrong_loss

from benchmarks import measure
from benchmarks.cases import Target, quick_case
from benchmarks.record import Bound, CaseResult, Verdict
from benchmarks.report.text import case_lines
from benchmarks.timing import QUICK, Measurement
from torchintro import reference


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
    result = measure.run_case(SMALL, CPU, LIMITS, QUICK, fused=operator)
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
    result = measure.run_case(SMALL, CPU, LIMITS, QUICK)
    assert result.status == "ok"
    assert set(result.measurements) == {"eager", "fused"}
    assert set(result.checks["fused"]) == {"loss", *SMALL.gradients}


def test_a_missing_gradient_fails():
    def detached(input, linear_weight, target, *, linear_bias):
        return reference.linear_mse_loss(input, linear_weight.detach(), target, linear_bias=linear_bias)

    result = measure.run_case(SMALL, CPU, LIMITS, QUICK, fused=detached)
    assert "fused left no gradient of linear_weight" in result.failures[0]


@pytest.mark.parametrize("name", ["G1e", "G2d"])
def test_cases_for_a_gpu_run_on_the_cpu_when_small(name):
    case = quick_case(case_named(name))
    result = measure.run_case(case, CPU, LIMITS, QUICK, compile=False, judge=False)
    assert result.status == "ok", result.failures
    assert list(result.measurements) == ["eager", "chunked", "fused"]
    assert set(result.skipped) == set(case.peers) - {"eager", "chunked", "fused"}
    lines = "\n".join(case_lines(result, set()))
    if case.limit == "products":
        assert result.bound.name.endswith("GFLOP of products by mm")
        assert result.bound.seconds == result.bound.probe.median
        assert "limit: its" in lines


def test_scaled_times_are_said_to_be():
    case = replace(case_named("P7"), rows=500, measured=(2, 3), peers=("eager", "fused"))
    result = measure.run_case(case, CPU, LIMITS, QUICK, jax=False, judge=False)
    part = "not run in full: times of 2 trials x 3 epochs, scaled up by 333"
    assert any(note.startswith("eager") and note.endswith(part) for note in result.notes)
    assert result.measurements["eager"].median > 0.1  # 2000 steps cannot be done in less


# Targets


def test_missed_targets_are_shown():
    case = replace(
        SMALL, targets=(Target("eager", at_least=1e9), Target("eager", at_most=1e9), Target("limit", at_most=1))
    )
    result = measure.run_case(replace(case, limit=""), CPU, LIMITS, QUICK)
    assert result.status == "short of target"
    lines = "\n".join(case_lines(result, set()))
    assert re.search(r"fused .*>= 1e\+09x faster than eager, short of target: [\d.]+x$", lines, re.M)
    assert re.search(r"also <= 1e\+09x eager: [\d.]+x$", lines, re.M)
    assert "also <= 1x limit (not judged)" in lines
    assert [target["met"] for target in result.record()["targets"]] == [False, True, None]


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
    result = CaseResult(
        replace(SMALL, targets=(target,)),
        "cpu",
        {"eager": Measurement((0.0398,)), "fused": Measurement((fused,))},
        Bound("read", limit, Measurement((limit,))),
    )
    result.verdicts = measure._judge(result)
    assert [str(verdict) for verdict in result.verdicts] == [text]
    assert result.status == ("short of target" if "short" in text else "ok")
    assert result.record()["targets"][0]["possible"] is possible


def test_a_target_of_a_peer_that_is_not_there_is_not_judged():
    result = CaseResult(case_named("P2"), "cpu", {"eager": Measurement((1.0,)), "fused": Measurement((0.0005,))})
    result.verdicts = measure._judge(result)
    assert [str(verdict) for verdict in result.verdicts] == [
        ">= 1000x faster than eager: 2000x",
        ">= 10x faster than jax (not judged)",
    ]
    assert str(Verdict(Target("jax", at_least=10), 12.0, True)) == ">= 10x faster than jax: 12.0x"
