"""What is known of a case after it ran, and the record of a run as JSON."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .cases import Case, Target, count
from .timing import Measurement
from .units import dtype_name, ratio_text
from .work import Check

__all__ = ["RATED", "READABLE", "SCHEMA", "Bound", "CaseResult", "Verdict", "json_text", "read_record"]

# Of the JSON record; counts up when a field changes its meaning or goes. In schema 1 the peer "fused" of the case P2 is
# that which is now called "fit", the case P8 is now P8a and P8b, and there are neither scales nor trials.
SCHEMA = 2
READABLE = (1, SCHEMA)

RATED = ("read", "copy", "matrix", "products")  # limits of cases whose bytes and operations say something


@dataclass(frozen=True)
class Bound:
    """What the machine allows for a case, measured among its peers.

    Attributes:
        name: What bounds it.
        seconds: The least time that the case can take.
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
class CaseResult:
    """All that is known of one case on one device after it ran."""

    case: Case
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
        need = count(self.case)
        verdicts = {verdict.target: verdict for verdict in self.verdicts}
        return {
            **asdict(self.case),
            "dtype": dtype_name(self.case.dtype),
            "target_device": self.case.device,
            "device": self.device,
            "work": self.case.work,
            "status": self.status,
            "unit": "bytes" if self.case.kind == "memory" else "seconds",
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
                "kind": self.case.limit,
                "name": self.bound.name,
                "seconds": self.bound.seconds,
                "probe": _statistics(self.bound.probe),
            },
            "targets": [_target_record(target, verdicts.get(target)) for target in self.case.targets],
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


def read_record(path: Path) -> dict[str, Any]:
    """Return the benchmark's record in a file, which may be one of ``make gpu-check``.

    Raises:
        ValueError: The file holds none, or one of a schema that is not read.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"bench: from must be a record that bench --json wrote, but got {path}: {error}") from None
    if isinstance(record, dict) and "benchmarks" in record and "schema" not in record:  # that of make gpu-check
        if record["benchmarks"] is None:
            raise ValueError(f"bench: from must be a record with figures, but {path} says that no benchmark ran")
        record = record["benchmarks"]
    if not isinstance(record, dict) or record.get("schema") not in READABLE:
        schemas = " or ".join(map(str, READABLE))
        raise ValueError(f"bench: from must be a record of schema {schemas} that bench --json wrote, but got {path}")
    return record
