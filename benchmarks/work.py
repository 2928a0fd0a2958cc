"""What every kind of work has in common: data, peers, and the proof that the peers do the same work.

The proof is the same work once more, in float64.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .cases import Case
from .timing import Call

__all__ = ["Check", "Operator", "Outcome", "Unavailable", "Work", "chunks", "first_line", "relative_error"]

Operator: TypeAlias = "Callable[..., Tensor]"
Outcome: TypeAlias = "dict[str, Tensor]"

# The fused peer may round this much worse than the baseline does, plus this many units of the dtype: the baseline's
# error can be small by luck, and one rounding of the result is nobody's fault.
ERROR_FACTOR = 4.0
ERROR_UNITS = 2.0

# The peers that are this package.
OURS = ("fit", "fused")

# Rows of an input are converted to float64 in pieces of this many elements.
CHUNK_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Check:
    """The error of one result of one peer.

    Attributes:
        error: Distance to float64's result in the Euclidean norm, divided by that result's norm.
        allowed: The largest error that passes.
    """

    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """False also for NaN."""
        return self.error <= self.allowed

    def record(self) -> dict[str, float | bool | None]:
        """Return the check for JSON, which has no NaN."""
        return {
            "error": self.error if math.isfinite(self.error) else None,
            "allowed": self.allowed,
            "passed": self.passed,
        }


class Unavailable(Exception):  # noqa: N818
    """A peer cannot run here, and this is why."""


class Work(abc.ABC):
    """The data of a case on a device, its peers, and their verification.

    Attributes:
        case: The record.
        device: Where it runs.
        calls: The peers that can run here; a call of any is one sample of what the case measures.
        skipped: Why the others cannot.
        scales: By how much the time of a call is multiplied, for peers that do another share of the case than others.
        once: The peers that are timed by a single call, because it takes seconds.
        unlike: The peers that do other work than the case's, each with the check that it does it right.
        notes: What a reader should know besides.
    """

    cold = False  # whether a GPU's kernels alone are timed, see `interleaved`

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)
        self.calls: dict[str, Call] = {}
        self.skipped: dict[str, str] = {}
        self.scales: dict[str, float] = {}
        self.once: set[str] = set()
        self.unlike: dict[str, Callable[[], dict[str, Check]]] = {}
        self.notes: list[str] = [case.note] if case.note else []

    def verify(self) -> dict[str, dict[str, Check]]:
        """Run every peer once; return the errors of its results.

        The baseline's are the yardstick of this package's. The others are PyTorch's and may sum as carelessly as they
        like: half the digits of the dtype, or two where the sum is long, show that they do the same work.
        """
        errors = self._errors({peer: self._outcome(peer) for peer in self.calls if peer not in self.unlike})
        unit = torch.finfo(self.case.dtype).eps
        # The yardstick rounds too, which only shows where float64 itself is measured.
        tolerance = ERROR_UNITS * unit + math.sqrt(self.case.rows) * torch.finfo(torch.float64).eps
        sane = math.sqrt(unit) + min(self.case.rows * unit, 0.01)
        baseline = errors[self.case.peers[0]]
        checks = {
            peer: {
                name: Check(error, ERROR_FACTOR * baseline[name] + tolerance if peer in OURS else sane)
                for name, error in found.items()
            }
            for peer, found in errors.items()
        }
        checks.update((peer, check()) for peer, check in self.unlike.items())
        return checks

    def floor(self) -> Call | None:
        """Return what takes the least time that the case can take, if the case's limit is of that kind."""
        return None

    def _add(self, peer: str, make: Callable[[], Call]) -> None:
        """Make a peer, or keep the reason why it cannot run here."""
        try:
            self.calls[peer] = make()
        except Unavailable as error:
            self.skipped[peer] = str(error)

    @abc.abstractmethod
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return the input and the target, which a run on a GPU must have there first."""

    @abc.abstractmethod
    def _outcome(self, peer: str) -> Outcome:
        """Run a peer from the same start as any other; return its results."""

    @abc.abstractmethod
    def _errors(self, outcomes: dict[str, Outcome]) -> dict[str, dict[str, float]]:
        """Return the relative errors of each peer's results."""

    def _data(self) -> tuple[Tensor, Tensor]:
        """Make an input and a target that a linear layer explains up to a tenth."""
        case = self.case
        options: dict[str, Any] = {"device": self.device, "generator": self.generator}
        X = torch.empty(case.rows, case.in_features, dtype=case.dtype, device=self.device)
        y = torch.empty(case.rows, case.out_features, dtype=case.dtype, device=self.device)
        truth = torch.randn(case.out_features, case.in_features, **options) / math.sqrt(case.in_features)
        # In float32, because some 16-bit products are emulated.
        for rows in chunks(case):
            X_rows = torch.randn(rows.stop - rows.start, case.in_features, **options)
            X[rows] = X_rows
            y_rows = F.linear(X_rows, truth)
            y[rows] = y_rows.add_(torch.randn(y_rows.shape, **options), alpha=0.1)
        return X, y


def chunks(case: Case) -> Iterator[slice]:
    """Yield the rows of a case in pieces that float64 copies can be made of."""
    size = max(1, CHUNK_ELEMENTS // max(case.in_features, case.out_features))
    for start in range(0, case.rows, size):
        yield slice(start, min(case.rows, start + size))


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its name if it says nothing."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].strip()


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Return the distance of a result to the exact one, divided by that one's norm."""
    difference = torch.linalg.vector_norm(result.double() - exact)
    return float(difference / torch.linalg.vector_norm(exact))
