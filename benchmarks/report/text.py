"""The benchmark's table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..cases import count
from ..memory import HOW
from ..record import RATED, CaseResult
from ..timing import Measurement
from ..units import ratio_text, time_text

__all__ = ["case_lines", "header", "machine_lines", "versus_lines"]

# The heading and the width of each column; the first three are aligned to the left.
_COLUMNS = (
    ("row", 7),
    ("work", 46),
    ("peer", 14),
    ("median", 11),
    ("IQR", 10),
    ("speed-up", 8),
    ("GB/s", 6),
    ("GFLOP/s", 7),
    ("of limit", 8),
)
_WIDTHS = tuple(width for _, width in _COLUMNS)
_LEFT = 3


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """Return the description of the machine for people."""
    lines = [
        f"torchintro {machine['torchintro']}, torch {machine['torch']}, Python {machine['python']}, {machine['date']}",
        f"command  {machine['command']}",
        f"CPU      {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; kernels: "
        f"{machine['kernels']}, PyTorch's: {machine['torch_kernels']}; load average {machine['load_average']}",
    ]
    if "gpu" in machine:
        gpu = machine["gpu"]
        lines.append(
            f"GPU      {gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['multiprocessors']} "
            f"multiprocessors, {gpu['memory_bytes'] / 1e9:.0f} GB, CUDA {gpu['cuda']}"
        )
    return lines


def header() -> list[str]:
    """Return the head of the table, with what its columns mean."""
    return [
        "median, IQR: of one call, and the interquartile range; speed-up: the row's first peer / this peer;",
        "GB/s, GFLOP/s: from the least bytes and operations that the row needs; of limit: the least time that the",
        "machine allows / this peer",
        "",
        _line([name for name, _ in _COLUMNS]) + "  target",
        _line(["-" * width for width in _WIDTHS]) + "  " + "-" * 24,
    ]


def case_lines(result: CaseResult, said: set[str]) -> list[str]:
    """Return the lines of one case: a line per peer, the limit, and what is to be said besides.

    Args:
        result: The case.
        said: Sentences that stand in the table already and are not repeated; new ones are added.
    """
    case, lines = result.case, []
    baseline = result.measurements.get(case.peers[0])
    verdicts = [str(verdict) for verdict in result.verdicts]
    label = [case.id, case.work]
    for peer in result.measurements:
        verdict = "  " + verdicts.pop(0) if peer == "fused" and verdicts else ""
        lines.append(_line([*label, peer, *_cells(result, peer, baseline)]) + verdict)
        label = ["", ""]
    if not lines:
        lines.append(_line(label))
    if result.bound is not None:
        lines.append(_line(["", f"limit: {result.bound.name}", "", time_text(result.bound.seconds)]))
    remarks = [f"also {verdict}" for verdict in verdicts]
    sentences = [*result.skipped.values(), *result.notes]
    if case.kind == "memory":
        sentences.append(HOW[result.device])
    remarks += [sentence for sentence in sentences if sentence not in said]
    said.update(sentences)
    remarks += [f"FAILED: {failure}" for failure in result.failures]
    lines += [_line(["", remark]) for remark in remarks]
    return [line.rstrip() for line in lines]


def _cells(result: CaseResult, peer: str, baseline: Measurement | None) -> list[str]:
    case, measured = result.case, result.measurements[peer]
    ratio = ratio_text(baseline.median / measured.median) + "x" if baseline and measured.median else "-"
    if case.kind == "memory":
        return [f"{measured.median / 2**20:.1f} MiB", f"{measured.spread / 2**20:.1f} MiB", ratio, "-", "-", "-"]
    need = count(case)
    # Where overhead is all there is, a rate is no information.
    rates = [f"{amount / measured.median / 1e9:.1f}" for amount in (need.bytes, need.operations)]
    return [
        time_text(measured.median),
        time_text(measured.spread),
        ratio,
        *(rates if case.limit in RATED else ["-", "-"]),
        f"{result.bound.seconds / measured.median:.0%}" if result.bound else "-",
    ]


def versus_lines(cpu: Sequence[CaseResult], gpu: Sequence[CaseResult]) -> list[str]:
    """Return the table of the fused peer on the GPU against the CPU, for the cases timed on both."""
    columns = (("row", 7), ("work", 46), ("CPU", 12), ("GPU", 12), ("CPU / GPU", 10), ("transfer", 12), ("with it", 10))
    widths = [width for _, width in columns]
    lines = []
    by_id = {result.case.id: result for result in gpu}
    for host in cpu:
        device = by_id.get(host.case.id)
        if device is None or device.transfer_seconds is None:
            continue
        if "fused" not in host.measurements or "fused" not in device.measurements:
            continue
        here, there = host.measurements["fused"].median, device.measurements["fused"].median
        cells = [host.case.id, host.case.work, time_text(here), time_text(there), ratio_text(here / there) + "x"]
        cells += [time_text(device.transfer_seconds), ratio_text(here / (there + device.transfer_seconds)) + "x"]
        lines.append(_line(cells, widths, left=2))
    if not lines:
        return []
    head = [
        "",
        "GPU against CPU, fused; transfer: input and target from the host, once; with it: CPU / (GPU + transfer)",
        "",
        _line([name for name, _ in columns], widths, left=2),
        _line(["-" * width for width in widths], widths, left=2),
    ]
    return head + lines


def _line(cells: Sequence[str], widths: Sequence[int] = _WIDTHS, left: int = _LEFT) -> str:
    pairs = enumerate(zip(cells, widths, strict=False))
    return "  ".join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in pairs)
