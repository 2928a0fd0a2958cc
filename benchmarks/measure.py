"""One case, measured: its peers verified, timed in turn beside a probe of the machine's limit, and judged."""

from __future__ import annotations

import statistics
import subprocess
import time
from dataclasses import replace

import torch

from .cases import Case, count
from .machine import Limits, Probe, cpu_name, matrix_probe, products_probe, traffic_probe
from .memory import extra_peak
from .record import Bound, CaseResult, Verdict
from .step import StepWork
from .timing import DISTURBED, Effort, Interruptions, Measurement, disturbed_text, interleaved, once
from .units import dtype_name
from .work import Operator, Unavailable, Work
from .works import make_work

__all__ = ["run_case"]


def run_case(
    case: Case,
    device: torch.device,
    limits: Limits,
    effort: Effort,
    *,
    compile: bool = True,
    jax: bool = True,
    judge: bool = True,
    fused: Operator | None = None,
) -> CaseResult:
    """Verify the peers of a case, and if they are right, measure them.

    Args:
        case: The record.
        device: Where.
        limits: What the device can do at most.
        effort: How long to measure.
        compile: Whether to include ``torch.compile``.
        jax: Whether to include JAX.
        judge: Whether to compare with the case's targets.
        fused: What the peer ``"fused"`` of a step calls, by default :func:`torchintro.linear_mse_loss`.

    Returns:
        The figures, or in ``failures`` why there are none.
    """
    result = CaseResult(case, device.type)
    try:
        work = make_work(case, device, compile=compile, jax=jax, fused=fused)
        result.skipped = work.skipped
        result.scales = {peer: scale for peer, scale in work.scales.items() if scale != 1}
        result.checks = work.verify()
        result.notes = work.notes
        result.failures = [
            f"{peer} computes {name} with an error of {check.error:.2e}, where {check.allowed:.2e} is allowed"
            for peer, checks in result.checks.items()
            for name, check in checks.items()
            if not check.passed
        ]
        if result.failures:
            return result
        if case.kind == "memory":
            _measure_memory(result, work)
        else:
            _measure_time(result, work, limits, effort)
            if device.type == "cuda" and case.device == "cpu":
                result.transfer_seconds = _transfer_seconds(work)
    except torch.OutOfMemoryError:
        result.notes.append("left out: the GPU has not enough memory for it")
        return result
    except Unavailable as error:
        result.notes.append(f"left out: {error}")
        return result
    except Exception as error:  # the other cases are still worth having, and the exit code tells
        result.failures.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return result
    if judge and case.device == device.type:
        result.verdicts = _judge(result)
    return result


def _measure_memory(result: CaseResult, work: Work) -> None:
    for peer in work.calls:
        try:
            result.measurements[peer] = Measurement((float(extra_peak(result.case, peer, work.device)),))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            result.skipped[peer] = str(error)


def _measure_time(result: CaseResult, work: Work, limits: Limits, effort: Effort) -> None:
    case = result.case
    probe = _probe(work, limits)
    calls = {peer: call for peer, call in work.calls.items() if peer not in _ALONE and peer not in work.once}
    if probe is not None:
        probe.call()
        calls[_PROBE] = probe.call
    interruptions = Interruptions()
    timed = interleaved(calls, effort, work.device, cold=work.cold)
    result.interruptions = interruptions.per_second()
    if result.interruptions > DISTURBED:
        result.notes.append(disturbed_text(result.interruptions))
    if probe is not None:
        result.bound = _bound(case, probe, timed.pop(_PROBE), limits)
    alone = replace(effort, seconds=effort.seconds / len(work.calls))
    for peer in work.calls.keys() & _ALONE:
        timed.update(interleaved({peer: work.calls[peer]}, alone, work.device, cold=work.cold))
    timed.update((peer, once(work.calls[peer], work.device)) for peer in work.calls if peer in work.once)
    result.measurements = {peer: timed[peer].scaled(work.scales.get(peer, 1.0)) for peer in work.calls}


_PROBE = "probe"  # its name among the peers
# With threads of their own (XLA's, those of SciPy's BLAS): in turn with PyTorch, the threads of either still look for
# work while the other is timed. A study on 1M x 64 takes 49 ms, and 95 ms in turn with Ridge.
_ALONE = {"jax", "sklearn", "ridge"}


def _probe(work: Work, limits: Limits) -> Probe | None:
    """Return what to time among the peers of a case to know the case's limit at that moment and that size."""
    case = work.case
    floor = work.floor()
    if floor is not None:
        return Probe("W.sum().backward()" if case.limit == "call" else "a study with an empty objective", floor, 1)
    if case.limit in ("read", "copy"):
        return traffic_probe(case.limit, count(case).bytes, work.device)
    if case.limit == "matrix":
        dtype = limits.matrix_dtype(case.dtype)
        return matrix_probe(dtype, limits.ways[dtype_name(dtype)], limits.matrix_size, work.device)
    if case.limit == "products" and isinstance(work, StepWork):
        X, y = work.inputs()
        return products_probe(X, work.tensors["linear_weight"].detach(), y, case.gradients)
    return None


def _bound(case: Case, probe: Probe, timed: Measurement, limits: Limits) -> Bound:
    need = count(case)
    if case.limit == "products":
        return Bound(f"its {need.operations / 1e9:.3g} GFLOP of products by mm", timed.median, timed)
    if case.limit not in ("read", "copy", "matrix"):
        return Bound(probe.way, timed.median, timed)
    rate = probe.amount / timed.median
    if case.limit == "matrix":
        traffic, operations = need.bytes / limits.read, need.operations / rate
    else:
        traffic, operations = need.bytes / rate, need.operations / limits.rate(case.dtype)
    if operations > traffic:
        return Bound(f"{need.operations / 1e9:.3g} GFLOP of matrix products", operations, timed)
    return Bound(f"{case.limit} {need.bytes / 1e6:.3g} MB once", traffic, timed)


def _judge(result: CaseResult) -> list[Verdict]:
    verdicts = []
    for target in result.case.targets:
        if target.cpu not in cpu_name():
            continue
        fused = result.measurements["fused"].median if "fused" in result.measurements else 0.0
        if target.of == "limit":
            other = result.bound.seconds if result.bound else 0.0
        else:
            other = result.measurements[target.of].median if target.of in result.measurements else 0.0
        if fused > 0 and other > 0:
            best = target.ratio(result.bound.seconds, other) if result.bound and target.of != "limit" else None
            verdicts.append(Verdict(target, target.ratio(fused, other), target.met(fused, other), best))
        else:
            verdicts.append(Verdict(target, None, None))
    return verdicts


def _transfer_seconds(work: Work, samples: int = 3) -> float:
    """Return how long it takes to bring a case's data from ordinary memory to the GPU."""
    host = [tensor.cpu() for tensor in work.inputs()]
    times = []
    for _ in range(samples):
        torch.cuda.synchronize(work.device)
        start = time.perf_counter()
        for tensor in host:
            tensor.to(work.device)
        torch.cuda.synchronize(work.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
