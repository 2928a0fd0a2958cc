"""The extra peak memory of a step."""

from bench_cases import CPU, case_named

from benchmarks.cases import quick_case
from benchmarks.memory import extra_peak
from benchmarks.record import CaseResult
from benchmarks.report.text import case_lines
from benchmarks.timing import Measurement


def test_memory_is_measured_in_bytes():
    case = quick_case(case_named("P6c"))
    prediction = case.rows * case.out_features * 4
    # Plain PyTorch holds the prediction and its gradient.
    assert 1.9 * prediction < extra_peak(case, "eager", CPU) < 3.5 * prediction
    result = CaseResult(case, "cpu", {"fused": Measurement((3.0 * 2**20,))})
    assert "3.0 MiB" in "\n".join(case_lines(result, set()))
    assert result.record()["unit"] == "bytes"
