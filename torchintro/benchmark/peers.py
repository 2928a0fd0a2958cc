"""What the peers of a row do, and the proof that they do it right: the same work once more in float64."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .. import functional, reference
from ..training import fit, initial_linear
from .rows import Row
from .timing import Call

__all__ = ["Check", "Operator", "StepWork", "Work", "make_work"]

Operator: TypeAlias = "Callable[..., Tensor]"
Outcome: TypeAlias = "dict[str, Tensor]"

# The fused peer may round this much worse than the baseline does, plus this many units of the dtype: the baseline's
# error can be small by luck, and one rounding of the result is nobody's fault.
ERROR_FACTOR = 4.0
ERROR_UNITS = 2.0

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


class Work(abc.ABC):
    """The data of a row on a device, its peers, and their verification.

    Attributes:
        row: The record.
        device: Where it runs.
        calls: The peers that can run here; a call of any is one sample of what the row measures.
        skipped: Why the others cannot.
        notes: What a reader should know besides.
    """

    cold = False  # whether a GPU's kernels alone are timed, see `interleaved`

    def __init__(self, row: Row, device: torch.device) -> None:
        self.row = row
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)
        self.calls: dict[str, Call] = {}
        self.skipped: dict[str, str] = {}
        self.notes: list[str] = [row.note] if row.note else []

    def verify(self) -> dict[str, dict[str, Check]]:
        """Run every peer once; return the errors of its results.

        The baseline's are the yardstick of the fused peer. The others are PyTorch's and may sum as carelessly as they
        like: half the digits of the dtype, or two where the sum is long, show that they do the same work.
        """
        errors = self._errors({peer: self._outcome(peer) for peer in self.calls})
        unit = torch.finfo(self.row.dtype).eps
        # The yardstick rounds too, which only shows where float64 itself is measured.
        tolerance = ERROR_UNITS * unit + math.sqrt(self.row.rows) * torch.finfo(torch.float64).eps
        sane = math.sqrt(unit) + min(self.row.rows * unit, 0.01)
        baseline = errors[self.row.peers[0]]
        return {
            peer: {
                name: Check(error, ERROR_FACTOR * baseline[name] + tolerance if peer == "fused" else sane)
                for name, error in found.items()
            }
            for peer, found in errors.items()
        }

    def floor(self) -> Call | None:
        """Return what takes the least time that the row can take, if the row's limit is of that kind."""
        return None

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


def make_work(row: Row, device: torch.device, *, compile: bool = True, fused: Operator | None = None) -> Work:
    """Make the data and the peers of a row.

    Args:
        row: The record; a memory row is verified as the step that it is.
        device: Where.
        compile: Whether ``torch.compile`` may be one of the peers.
        fused: What the peer ``"fused"`` of a step calls, by default :func:`torchintro.linear_mse_loss`.
    """
    if row.kind == "fit":
        return _FitWork(row, device)
    if row.kind == "study":
        return _StudyWork(row, device)
    return StepWork(row, device, compile, fused or functional.linear_mse_loss)


def _chunks(row: Row) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // max(row.in_features, row.out_features))
    for start in range(0, row.rows, size):
        yield slice(start, min(row.rows, start + size))


def _relative_error(result: Tensor, exact: Tensor) -> float:
    difference = torch.linalg.vector_norm(result.double() - exact)
    return float(difference / torch.linalg.vector_norm(exact))


class StepWork(Work):
    """Loss and gradients of one batch, by the operator."""

    def __init__(self, row: Row, device: torch.device, compile: bool, fused: Operator) -> None:
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
        operators: dict[str, Operator] = {"eager": reference.linear_mse_loss, "fused": fused}
        for peer in row.peers:
            if peer == "compile":
                self._add_compiled(compile)
            else:
                self.calls[peer] = self._step(operators[peer])

    def inputs(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.tensors["input"].detach(), self.tensors["target"].detach()

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def floor(self) -> Call | None:  # noqa: D102
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

    def _add_compiled(self, compile: bool) -> None:
        if not compile:
            self.skipped["compile"] = "torch.compile is left out of this run"
            return
        try:
            # Else the shapes of earlier rows count towards the limit after which torch.compile gives up silently.
            torch.compiler.reset()
            step = self._step(torch.compile(reference.linear_mse_loss, dynamic=False))
            step()
        except Exception as error:  # whatever the compiler behind torch.compile raises
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            self.skipped["compile"] = f"torch.compile failed here: {lines[0].strip()}"
        else:
            self.calls["compile"] = step

    def _outcome(self, peer: str) -> Outcome:
        loss = self.calls[peer]()
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
            errors[peer] = {name: _relative_error(outcome[name], sums[name]) for name in whole}
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


Batches: TypeAlias = "Callable[[Tensor, Tensor], Iterator[tuple[Tensor, Tensor]]]"


def _all_rows(X: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield X, y


def _slices(size: int, X: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, X.shape[0], size):
        yield X[start : start + size], y[start : start + size]


def _shuffled(size: int, X: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(X.shape[0], generator=torch.Generator().manual_seed(0)).to(X.device)
    for rows in torch.split(order, size):
        yield X[rows], y[rows]


def _train(model: nn.Linear, X: Tensor, y: Tensor, lr: float, epochs: int, batches: Batches = _all_rows) -> Tensor:
    """Train as the introduction does, by hand; return the last loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss = torch.tensor(math.nan)
    for _ in range(epochs):
        for X_batch, y_batch in batches(X, y):
            optimizer.zero_grad()
            loss = F.mse_loss(model(X_batch), y_batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return loss.detach()


class _FitWork(Work):
    """A training run, whose results are the parameters that it ends with."""

    def __init__(self, row: Row, device: torch.device) -> None:
        super().__init__(row, device)
        self.lr = 0.01
        self.X, self.y = self._data()
        self.initial = initial_linear(row.in_features, row.out_features, seed=0, dtype=row.dtype).to(device)
        self.model = initial_linear(row.in_features, row.out_features, dtype=row.dtype).to(device)
        self.batches: dict[str, Batches] = {
            "eager": _all_rows,
            "eager slices": functools.partial(_slices, row.batch_size),
            "eager shuffled": functools.partial(_shuffled, row.batch_size),
        }
        self.shuffled: Batches = self.batches["eager shuffled"] if row.batch_size else _all_rows
        self.engine = ""
        makers: dict[str, Call] = {"fit reference": self._fitted("reference"), "fused": self._fitted("auto")}
        for peer in row.peers:
            self.calls[peer] = makers[peer] if peer in makers else self._by_hand(self.batches[peer])

    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.X, self.y

    def verify(self) -> dict[str, dict[str, Check]]:
        checks = super().verify()
        self.notes.append(f'fused is fit(engine="auto"), which ran {self.engine!r}')
        return checks

    def _by_hand(self, batches: Batches) -> Call:
        return lambda: _train(self.model, self.X, self.y, self.lr, self.row.epochs, batches)

    def _fitted(self, engine: str) -> Call:
        batch_size = self.row.batch_size or None

        def run() -> None:
            self.engine = fit(
                self.model,
                self.X,
                self.y,
                lr=self.lr,
                epochs=self.row.epochs,
                batch_size=batch_size,
                engine=engine,
                seed=0,
            ).engine

        return run

    def _outcome(self, peer: str) -> Outcome:
        self.model.load_state_dict(self.initial.state_dict())
        self.calls[peer]()
        return {"parameters": self._flat(self.model)}

    def _errors(self, outcomes: dict[str, Outcome]) -> dict[str, dict[str, float]]:
        X, y = self.X.double(), self.y.double()

        @functools.cache
        def exact(batches: Batches) -> Tensor:
            model = nn.Linear(self.row.in_features, self.row.out_features).to(self.device, torch.float64)
            model.load_state_dict(self.initial.state_dict())
            _train(model, X, y, self.lr, self.row.epochs, batches)
            return self._flat(model)

        return {
            peer: {"parameters": _relative_error(found["parameters"], exact(self.batches.get(peer, self.shuffled)))}
            for peer, found in outcomes.items()
        }

    @staticmethod
    def _flat(model: nn.Linear) -> Tensor:
        # One vector, because a bias that is trained towards zero has no relative error of its own.
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class _StudyWork(Work):
    """An Optuna study over the learning rate, whose results are the losses of its trials."""

    LR = (1e-4, 1e-1)

    def __init__(self, row: Row, device: torch.device) -> None:
        super().__init__(row, device)
        from ..tuning import tune  # brings Optuna, which takes a second to import

        self.trials, self.epochs = row.measured or (row.trials, row.epochs)
        if row.measured:
            self.notes.append(
                f"not run in full: times of {self.trials} trials x {self.epochs} epochs, scaled up by {row.scale:.0f}"
            )
        self.X, self.y = self._data()
        self.study: Any = None
        tuned = functools.partial(tune, self.X, self.y, n_trials=self.trials, epochs=self.epochs, lr=self.LR, seed=0)

        def tuned_by(engine: str) -> Call:
            def run() -> None:
                self.study = tuned(engine=engine)

            return run

        calls: dict[str, Call] = {
            "eager": lambda: self._optimize(self._train_eagerly),
            "fit reference": tuned_by("reference"),
            "fused": tuned_by("auto"),
        }
        self.calls = {peer: calls[peer] for peer in row.peers}

    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.X, self.y

    def verify(self) -> dict[str, dict[str, Check]]:
        checks = super().verify()
        engines = {trial.user_attrs.get("engine") for trial in self.study.trials} - {None}
        self.notes.append(f'fused is tune(engine="auto"), which ran {", ".join(map(repr, sorted(engines)))}')
        return checks

    def floor(self) -> Call | None:
        return (lambda: self._optimize(lambda lr: lr)) if self.row.limit == "empty" else None

    def _initial(self) -> nn.Linear:
        row = self.row
        return initial_linear(row.in_features, row.out_features, seed=0, dtype=row.dtype).to(self.device)

    def _train_eagerly(self, lr: float) -> float:
        return _train(self._initial(), self.X, self.y, lr, self.epochs).item()

    def _optimize(self, value: Callable[[float], float]) -> None:
        """Run the study that a user would write without this package."""
        import optuna

        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            self.study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
            low, high = self.LR
            self.study.optimize(
                lambda trial: value(trial.suggest_float("lr", low, high, log=True)), n_trials=self.trials
            )
        finally:
            optuna.logging.set_verbosity(verbosity)

    def _outcome(self, peer: str) -> Outcome:
        self.calls[peer]()
        trials = [(trial.params["lr"], trial.value) for trial in self.study.trials]
        lrs, losses = torch.tensor(trials, dtype=torch.float64).unbind(1)
        return {"lr": lrs, "loss": losses}

    def _errors(self, outcomes: dict[str, Outcome]) -> dict[str, dict[str, float]]:
        X, y = self.X.double(), self.y.double()

        @functools.cache
        def exact(lr: float) -> float:
            return _train(self._initial().double(), X, y, lr, self.epochs).item()

        # Each peer is judged at its own learning rates: a rounding error can make the sampler go another way.
        errors = {}
        for peer, outcome in outcomes.items():
            losses = torch.tensor([exact(lr) for lr in outcome["lr"].tolist()], dtype=torch.float64)
            errors[peer] = {"loss": _relative_error(outcome["loss"], losses)}
        return errors
