"""The benchmark's results and how they are shown: a plain table for people, a record for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..cases import Row, Target, count
from ..memory import HOW
from ..step import Check
from ..timing import Measurement

__all__ = [
    "RATED",
    "READABLE",
    "SCHEMA",
    "Bound",
    "RowResult",
    "Verdict",
    "header",
    "json_text",
    "machine_lines",
    "ratio_text",
    "row_lines",
    "time_text",
    "versus_lines",
]

# Of the JSON record; counts up when a field changes its meaning or goes. In schema 1 the peer "fused" of the row P2 is
# that which is now called "fit", the row P8 is now P8a and P8b, and there are neither scales nor trials.
SCHEMA = 2
READABLE = (1, SCHEMA)

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
RATED = ("read", "copy", "matrix", "products")  # limits of rows whose bytes and operations say something
_WIDTHS = tuple(width for _, width in _COLUMNS)
_LEFT = 3


@dataclass(frozen=True)
class Bound:
    """What the machine allows for a row, measured among its peers.

    Attributes:
        name: What bounds it.
        seconds: The least time that the row can take.
        probe: The time of the probe that this follows from.
    """

    name: str
    seconds: float
    probe: Measurement


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured.

    Attributes:
        target: The claim.
        ratio: What was measured; None where the comparison was not made.
        met: Whether that keeps the bound.
        best: The ratio of a peer that takes the least time that the machine allows, where a limit was measured.
    """

    target: Target
    ratio: float | None
    met: bool | None
    best: float | None = None

    @property
    def possible(self) -> bool | None:
        """Whether this machine's own limit allows the target, as far as it was measured."""
        return None if self.best is None else self.target.met_by(self.best)

    def __str__(self) -> str:
        if self.ratio is None:
            return f"{self.target} (not judged)"
        if self.met:
            return f"{self.target}: {ratio_text(self.ratio)}x"
        reason = f" (this machine's limit allows {ratio_text(self.best)}x)" if self.best and not self.possible else ""
        return f"{self.target}, short of target: {ratio_text(self.ratio)}x{reason}"


@dataclass
class RowResult:
    """All that is known of one row on one device after it ran."""

    row: Row
    device: str
    measurements: dict[str, Measurement] = field(default_factory=dict)
    bound: Bound | None = None
    checks: dict[str, dict[str, Check]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)  # of peers that ran a part, whose time was multiplied
    notes: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    transfer_seconds: float | None = None
    interruptions: float | None = None  # a second

    @property
    def status(self) -> str:
        """``"failed"``, ``"left out"``, ``"short of target"`` or ``"ok"``."""
        if self.failures:
            return "failed"
        if not self.measurements:
            return "left out"
        return "short of target" if any(verdict.met is False for verdict in self.verdicts) else "ok"

    def record(self) -> dict[str, Any]:
        """Return the result for JSON."""
        row = asdict(self.row)
        need = count(self.row)
        verdicts = {verdict.target: verdict for verdict in self.verdicts}
        return {
            **row,
            "dtype": str(self.row.dtype).removeprefix("torch."),
            "target_device": self.row.device,
            "device": self.device,
            "work": self.row.work,
            "status": self.status,
            "unit": "bytes" if self.row.kind == "memory" else "seconds",
            "count": {**asdict(need), "bytes": need.bytes},
            "peers": {name: _statistics(measured) for name, measured in self.measurements.items()},
            "skipped": self.skipped,
            "scales": self.scales,
            "verification": {
                peer: {name: check.record() for name, check in checks.items()} for peer, checks in self.checks.items()
            },
            "limit": None
            if self.bound is None
            else {
                "kind": self.row.limit,
                "name": self.bound.name,
                "seconds": self.bound.seconds,
                "probe": _statistics(self.bound.probe),
            },
            "targets": [_target_record(target, verdicts.get(target)) for target in self.row.targets],
            "transfer_seconds": self.transfer_seconds,
            "interruptions_per_second": self.interruptions,
            "notes": self.notes,
            "failures": self.failures,
        }


def _target_record(target: Target, verdict: Verdict | None) -> dict[str, Any]:
    verdict = verdict or Verdict(target, None, None)
    return {
        **asdict(target),
        "text": str(target),
        "ratio": verdict.ratio,
        "met": verdict.met,
        "limit_allows": verdict.best,
        "possible": verdict.possible,
    }


def _statistics(measured: Measurement) -> dict[str, Any]:
    first, third = measured.quartiles
    return {
        "median": measured.median,
        "first_quartile": first,
        "third_quartile": third,
        "calls_per_sample": measured.calls,
        "samples": list(measured.samples),
    }


def json_text(record: dict[str, Any]) -> str:
    """Return a record as JSON with lists of plain values on one line each, so that it can be read and compared."""
    text = json.dumps(record, indent=1)
    # No string holds a line break, so that none is changed.
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\n\s*", " ", found[0]), text) + "\n"


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


def row_lines(result: RowResult, said: set[str]) -> list[str]:
    """Return the lines of one row: a line per peer, the limit, and what is to be said besides.

    Args:
        result: The row.
        said: Sentences that stand in the table already and are not repeated; new ones are added.
    """
    row, lines = result.row, []
    baseline = result.measurements.get(row.peers[0])
    verdicts = [str(verdict) for verdict in result.verdicts]
    label = [row.id, row.work]
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
    if row.kind == "memory":
        sentences.append(HOW[result.device])
    remarks += [sentence for sentence in sentences if sentence not in said]
    said.update(sentences)
    remarks += [f"FAILED: {failure}" for failure in result.failures]
    lines += [_line(["", remark]) for remark in remarks]
    return [line.rstrip() for line in lines]


def _cells(result: RowResult, peer: str, baseline: Measurement | None) -> list[str]:
    row, measured = result.row, result.measurements[peer]
    ratio = ratio_text(baseline.median / measured.median) + "x" if baseline and measured.median else "-"
    if row.kind == "memory":
        return [f"{measured.median / 2**20:.1f} MiB", f"{measured.spread / 2**20:.1f} MiB", ratio, "-", "-", "-"]
    need = count(row)
    # Where overhead is all there is, a rate is no information.
    rates = [f"{amount / measured.median / 1e9:.1f}" for amount in (need.bytes, need.operations)]
    return [
        time_text(measured.median),
        time_text(measured.spread),
        ratio,
        *(rates if row.limit in RATED else ["-", "-"]),
        f"{result.bound.seconds / measured.median:.0%}" if result.bound else "-",
    ]


def versus_lines(cpu: Sequence[RowResult], gpu: Sequence[RowResult]) -> list[str]:
    """Return the table of the fused peer on the GPU against the CPU, for the rows timed on both."""
    columns = (("row", 7), ("work", 46), ("CPU", 12), ("GPU", 12), ("CPU / GPU", 10), ("transfer", 12), ("with it", 10))
    widths = [width for _, width in columns]
    lines = []
    by_id = {result.row.id: result for result in gpu}
    for host in cpu:
        device = by_id.get(host.row.id)
        if device is None or device.transfer_seconds is None:
            continue
        if "fused" not in host.measurements or "fused" not in device.measurements:
            continue
        here, there = host.measurements["fused"].median, device.measurements["fused"].median
        cells = [host.row.id, host.row.work, time_text(here), time_text(there), ratio_text(here / there) + "x"]
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


def time_text(seconds: float) -> str:
    """Return a time in milliseconds, or seconds if it is long."""
    if seconds >= 10:
        return f"{seconds:.1f} s"
    milliseconds = seconds * 1e3
    digits = 4 if milliseconds < 1 else 3 if milliseconds < 10 else 2 if milliseconds < 100 else 1
    return f"{milliseconds:.{digits}f} ms"


def ratio_text(value: float) -> str:
    """Return a ratio with as many digits as mean something."""
    return (
        f"{value:.3f}"
        if value < 0.1
        else f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
        if value < 100
        else f"{value:.0f}"
    )
