"""What the peers of a row do, and the proof that they do it right: the same work once more in float64.

Steps are here; training runs and studies, which follow the same plan, in :mod:`torchintro.benchmark.runs`, and
trainings of many models at once in :mod:`torchintro.benchmark.models`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from torchintro import functional, reference
from torchintro.nn import initial_linear

from .cases import Row
from .peers import chunked
from .peers import jax as jax_peers
from .timing import Call

__all__ = [
    "Check",
    "Operator",
    "Outcome",
    "StepWork",
    "Unavailable",
    "Work",
    "first_line",
    "make_work",
    "relative_error",
]

Operator: TypeAlias = "Callable[..., Tensor]"
Outcome: TypeAlias = "dict[str, Tensor]"
T = TypeVar("T")

# The fused peer may round this much worse than the baseline does, plus this many units of the dtype: the baseline's
# error can be small by luck, and one rounding of the result is nobody's fault.
ERROR_FACTOR = 4.0
ERROR_UNITS = 2.0

# Peers that are this package.
OURS = ("fit", "fused")

# Peers that are torch.compile, and how it is asked for.
COMPILED: dict[str, dict[str, Any]] = {
    "compile": {},
    # Without CUDA graphs: a replay overwrites the results of the one before, and the kernels are what is compared.
    "max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    # Every product by Inductor's own Triton templates, with their epilogues, none by the vendor's library.
    "triton": {"options": {"max_autotune": True, "max_autotune_gemm_backends": "TRITON"}},
}

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
    """The data of a row on a device, its peers, and their verification.

    Attributes:
        row: The record.
        device: Where it runs.
        calls: The peers that can run here; a call of any is one sample of what the row measures.
        skipped: Why the others cannot.
        scales: By how much the time of a call is multiplied, for peers that do another share of the row than others.
        once: The peers that are timed by a single call, because it takes seconds.
        unlike: The peers that do other work than the row's, each with the check that it does it right.
        notes: What a reader should know besides.
    """

    cold = False  # whether a GPU's kernels alone are timed, see `interleaved`

    def __init__(self, row: Row, device: torch.device) -> None:
        self.row = row
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)
        self.calls: dict[str, Call] = {}
        self.skipped: dict[str, str] = {}
        self.scales: dict[str, float] = {}
        self.once: set[str] = set()
        self.unlike: dict[str, Callable[[], dict[str, Check]]] = {}
        self.notes: list[str] = [row.note] if row.note else []

    def verify(self) -> dict[str, dict[str, Check]]:
        """Run every peer once; return the errors of its results.

        The baseline's are the yardstick of this package's. The others are PyTorch's and may sum as carelessly as they
        like: half the digits of the dtype, or two where the sum is long, show that they do the same work.
        """
        errors = self._errors({peer: self._outcome(peer) for peer in self.calls if peer not in self.unlike})
        unit = torch.finfo(self.row.dtype).eps
        # The yardstick rounds too, which only shows where float64 itself is measured.
        tolerance = ERROR_UNITS * unit + math.sqrt(self.row.rows) * torch.finfo(torch.float64).eps
        sane = math.sqrt(unit) + min(self.row.rows * unit, 0.01)
        baseline = errors[self.row.peers[0]]
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
        """Return what takes the least time that the row can take, if the row's limit is of that kind."""
        return None

    def _make_jax(self, wanted: bool, make: Callable[[], T]) -> T | None:
        """Return JAX's side of the row, or None and the reason among those skipped."""
        reason = jax_peers.why_not(self.device) if wanted else "JAX is left out of this run"
        if not reason:
            try:
                return make()
            except Exception as error:  # whatever XLA raises
                reason = f"JAX failed here: {first_line(error)}"
        self.skipped["jax"] = reason
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
        row = self.row
        options: dict[str, Any] = {"device": self.device, "generator": self.generator}
        X = torch.empty(row.rows, row.in_features, dtype=row.dtype, device=self.device)
        y = torch.empty(row.rows, row.out_features, dtype=row.dtype, device=self.device)
        truth = torch.randn(row.out_features, row.in_features, **options) / math.sqrt(row.in_features)
        # In float32, because some 16-bit products are emulated.
        for rows in _chunks(row):
            X_rows = torch.randn(rows.stop - rows.start, row.in_features, **options)
            X[rows] = X_rows
            y_rows = F.linear(X_rows, truth)
            y[rows] = y_rows.add_(torch.randn(y_rows.shape, **options), alpha=0.1)
        return X, y


def make_work(
    row: Row, device: torch.device, *, compile: bool = True, jax: bool = True, fused: Operator | None = None
) -> Work:
    """Make the data and the peers of a row.

    Args:
        row: The record; a memory row is verified as the step that it is.
        device: Where.
        compile: Whether ``torch.compile`` may be one of the peers.
        jax: Whether JAX may.
        fused: What the peer ``"fused"`` of a step calls, by default :func:`torchintro.linear_mse_loss`.
    """
    from .fit import FitWork, StudyWork
    from .models import ModelsWork

    if row.kind == "fit":
        return FitWork(row, device, compile, jax)
    if row.kind == "study":
        return StudyWork(row, device, compile, jax)
    if row.kind == "models":
        return ModelsWork(row, device, jax)
    return StepWork(row, device, compile, jax, fused or functional.linear_mse_loss)


def _chunks(row: Row) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // max(row.in_features, row.out_features))
    for start in range(0, row.rows, size):
        yield slice(start, min(row.rows, start + size))


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its name if it says nothing."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].strip()


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Return the distance of a result to the exact one, divided by that one's norm."""
    difference = torch.linalg.vector_norm(result.double() - exact)
    return float(difference / torch.linalg.vector_norm(exact))


class StepWork(Work):
    """Loss and gradients of one batch, by the operator."""

    def __init__(self, row: Row, device: torch.device, compile: bool, jax: bool, fused: Operator) -> None:
        super().__init__(row, device)
        self.cold = row.limit != "call"
        X, y = self._data()
        model = initial_linear(row.in_features, row.out_features, seed=0).to(device, row.dtype)
        self.tensors = {
            "input": X,
            "linear_weight": model.weight.detach(),
            "linear_bias": model.bias.detach(),
            "target": y,
        }
        self.leaves = {name: self.tensors[name].requires_grad_() for name in row.gradients}
        operators: dict[str, Operator] = {
            "eager": reference.linear_mse_loss,
            "chunked": chunked.linear_mse_loss,
            "fused": fused,
        }
        if compile and not COMPILED.keys().isdisjoint(row.peers):
            # Once a row, as it undoes what was compiled before: else the shapes of earlier rows count towards the limit
            # after which torch.compile gives up silently.
            torch.compiler.reset()
        for peer in row.peers:
            if peer in COMPILED:
                self._add_compiled(peer, compile)
            elif peer == "jax":
                step = self._make_jax(jax, lambda: jax_peers.JaxStep(self.tensors, row.gradients))
                if step is not None:
                    self.calls[peer] = step
            else:
                self.calls[peer] = self._step(operators[peer])

    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.tensors["input"].detach(), self.tensors["target"].detach()

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def floor(self) -> Call | None:
        if self.row.limit != "call":
            return None
        weight = self.leaves["linear_weight"]

        def least() -> None:
            weight.grad = None
            weight.sum().backward()  # type: ignore[no-untyped-call]

        return least

    def _step(self, operator: Operator) -> Callable[[], Tensor]:
        X, weight, bias, y = self.tensors.values()
        leaves = tuple(self.leaves.values())

        def step() -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            loss = operator(X, weight, y, linear_bias=bias)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        return step

    def _add_compiled(self, peer: str, compile: bool) -> None:
        if not compile:
            self.skipped[peer] = "torch.compile is left out of this run"
            return
        try:
            step = self._step(torch.compile(reference.linear_mse_loss, dynamic=False, **COMPILED[peer]))
            step()
        except Exception as error:  # whatever the compiler behind torch.compile raises
            way = "" if peer == "compile" else f" ({peer})"
            self.skipped[peer] = f"torch.compile{way} failed here: {first_line(error)}"
        else:
            self.calls[peer] = step

    def _outcome(self, peer: str) -> Outcome:
        step = self.calls[peer]
        if isinstance(step, jax_peers.JaxStep):
            return step.outcome()
        loss = step()
        if not isinstance(loss, Tensor):
            raise TypeError(f"bench: {peer} must return the loss, but got {type(loss).__name__}")
        gradients = {name: leaf.grad for name, leaf in self.leaves.items()}
        self.clear()
        for name, leaf in self.leaves.items():
            gradient = gradients[name]
            if gradient is None or gradient.shape != leaf.shape:
                raise RuntimeError(f"bench: {peer} left no gradient of {name}, or one of another shape")
        return {
            "loss": loss.detach(),
            **{name: gradient for name, gradient in gradients.items() if gradient is not None},
        }

    def _errors(self, outcomes: dict[str, Outcome]) -> dict[str, dict[str, float]]:
        by_row = [name for name in self.leaves if name in ("input", "target")]
        whole = ["loss", *(name for name in self.leaves if name not in by_row)]
        sums = {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in whole}
        norm = dict.fromkeys(by_row, 0.0)
        distance = {peer: dict.fromkeys(by_row, 0.0) for peer in outcomes}
        # Piece by piece, because float64 copies of the largest inputs would not fit beside them.
        for rows in _chunks(self.row):
            exact = self._exact(rows)
            for name in whole:
                sums[name] = sums[name] + exact[name]
            for name in by_row:
                norm[name] += float(exact[name].square().sum())
                for peer, outcome in outcomes.items():
                    distance[peer][name] += float((outcome[name][rows].double() - exact[name]).square().sum())
        errors: dict[str, dict[str, float]] = {}
        for peer, outcome in outcomes.items():
            errors[peer] = {name: relative_error(outcome[name], sums[name]) for name in whole}
            errors[peer].update((name, math.sqrt(distance[peer][name] / norm[name])) for name in by_row)
        return errors

    def _exact(self, rows: slice) -> Outcome:
        """Return some rows' share of the loss and of the gradients, by autograd in float64."""
        tensors = {
            name: (tensor[rows] if name in ("input", "target") else tensor).detach().double()
            for name, tensor in self.tensors.items()
        }
        leaves = [tensors[name].requires_grad_() for name in self.leaves]
        total = reference.linear_mse_loss(
            tensors["input"],
            tensors["linear_weight"],
            tensors["target"],
            linear_bias=tensors["linear_bias"],
            reduction="sum",
        )
        share = total / (self.row.rows * self.row.out_features)
        gradients = torch.autograd.grad(share, leaves)
        return {"loss": share.detach(), **dict(zip(self.leaves, gradients, strict=True))}
