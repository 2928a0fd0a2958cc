"""What computes a training run, and which of them suits a problem.

``fused``
    The whole loop in one operator, ``torchintro::linear_mse_fit``: sgd, adam and adamw, float32 and float64.
``statistics``
    For full batches: one pass over the rows for their second moments, then ``torchintro::linear_statistics_fit``, whose
    epochs cost ``in_features ** 2`` however many rows there are.
``autograd``
    The PyTorch loop around :func:`torchintro.linear_mse_loss`: every optimizer of ``torch.optim``, every dtype.
``reference``
    The same loop in plain PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from . import _checks, functional, reference
from .optimizers import Optimizer, Rule

__all__ = ["ENGINES", "Choice", "Data", "Failure", "Trained", "choose", "train_models"]

_LOSS_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "autograd": functional.linear_mse_loss,
    "reference": reference.linear_mse_loss,
}
ENGINES = ("auto", "fused", "statistics", *_LOSS_FUNCTIONS)

# What `choose` reckons with: two cores of an Intel Xeon with AVX-512. It only has to be right where the engines are far
# apart, and a factor of two does not matter where they are near.
_READ = 25e9  # bytes a second that a pass over the rows reads
_PRODUCTS = 100e9  # multiplications a second in float32, of the fused loop
_MOMENTS = 40e9  # multiplications a second in float64, of the pass for the second moments
_MOMENT_EPOCHS = 8e9  # of the epochs on second moments
_STEP = 0.2e-6  # seconds that an update takes besides
# More features than this need more than a quarter of a gigabyte for their second moments.
_MOST_FEATURES = 4096
# Outputs of the fused loop's kernel; more of them are products of matrices, where the PyTorch loop is as good.
_FEW_OUTPUTS = 64
# Seconds that one call of an operator may take: how long Ctrl-C waits.
_CALL_SECONDS = 0.25

# Called after an epoch, counted from 1, with the models' losses (K,).
Report: TypeAlias = "Callable[[int, Tensor], None]"
# From the number of epochs done, how many more until somebody wants to hear of one.
Wanted: TypeAlias = "Callable[[int], int]"


@dataclass(frozen=True)
class Choice:
    """An engine and why it was taken.

    Attributes:
        engine: Its name.
        reason: A few words for the user.
    """

    engine: str
    reason: str


@dataclass(frozen=True)
class Failure:
    """How the training of a model ended early.

    Attributes:
        epoch: Counted from 1.
        loss: The loss that was not finite.
        kind: ``"loss"`` or ``"validation loss"``.
        finite: How many epochs had a finite training loss.
    """

    epoch: int
    loss: float
    kind: str
    finite: int


@dataclass(eq=False)
class Trained:
    """Models that were trained together.

    Attributes:
        weight: ``(K, out_features, in_features)``: of a model that failed, those of the last finite loss.
        bias: ``(K, out_features)``, or None for models without.
        losses: ``(epochs, K)``, float64 on the CPU; NaN from the epoch on in which a model failed.
        validation_losses: Likewise, or None without validation data.
        failures: One per model; None for those that reached the end.
        engine: The engine that ran.
        reason: Why it was chosen.
        seconds: Wall-clock time.
    """

    weight: Tensor
    bias: Tensor | None
    losses: Tensor
    validation_losses: Tensor | None
    failures: list[Failure | None]
    engine: str
    reason: str
    seconds: float


@dataclass(eq=False)
class Data:
    """Rows to train on, and rows to validate with: matrices in one dtype on one device.

    Attributes:
        X: Features ``(N, in_features)``.
        y: Targets ``(N, out_features)``.
        validation: Features and targets of the rows held out, or None.
        function: Whose arguments these are, for its sentences.
        names: What the four matrices are called there.
        is_finite: Whether they are known to be finite, which the engines that read them need to be sure of.
    """

    X: Tensor
    y: Tensor
    validation: tuple[Tensor, Tensor] | None = None
    function: str = "fit"
    names: tuple[tuple[str, str], tuple[str, str]] = (("X", "y"), ("validation[0]", "validation[1]"))
    is_finite: bool = False
    _moments: tuple[list[Tensor], list[Tensor]] | None = None

    @property
    def rows(self) -> int:
        """N."""
        return self.X.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of all matrices, and of the model."""
        return self.X.dtype

    def check_finite(self) -> None:
        """Raise the ValueError that names the first element that is NaN or infinite."""
        if not self.is_finite:
            for part, names in zip(((self.X, self.y), self.validation), self.names, strict=True):
                for matrix, name in zip(part or (), names, strict=False):
                    _checks.check_finite(self.function, name, matrix)
            self.is_finite = True

    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the second moments of the training rows and of those held out (or none), gathered once.

        They are not finite if an element is not, and then no loss is: see :meth:`check_finite`'s callers.
        """
        if self._moments is None:
            self._moments = _gather(self.X, self.y), [] if self.validation is None else _gather(*self.validation)
        return self._moments

    def loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return the loss of the training rows."""
        if bias is not None:
            bias = bias.to(self.X.device, self.dtype)
        with torch.no_grad():
            loss = functional.linear_mse_loss(self.X, weight.to(self.X.device, self.dtype), self.y, linear_bias=bias)
        return float(loss.item())


def _gather(X: Tensor, y: Tensor) -> list[Tensor]:
    return [moment.cpu() for moment in torch.ops.torchintro._linear_moments(X, y, None)]


def choose(data: Data, *, engine: str, optimizers: Sequence[Optimizer], batch_size: int | None, epochs: int) -> Choice:
    """Decide which engine trains, the only place that knows what ``"auto"`` means.

    Args:
        data: The rows.
        engine: What was asked for, one of :data:`ENGINES`.
        optimizers: One a model.
        batch_size: Rows of a step, None for all.
        epochs: Passes over the rows.

    Raises:
        ValueError: The engine that was asked for cannot do it.
    """
    full = batch_size is None or batch_size >= data.rows
    unknown = _why_not_operators(data.dtype, optimizers)
    if engine in _LOSS_FUNCTIONS:
        return Choice(engine, "asked for")
    if engine != "auto":
        if engine == "statistics" and not full:
            unknown = f"it has no mini-batches, but batch_size is {batch_size} of {data.rows} rows"
        if unknown:
            raise ValueError(f"{data.function}: engine {engine!r} cannot do this: {unknown}; auto finds one that can")
        return Choice(engine, "asked for")
    if unknown:
        return Choice("autograd", unknown)
    if full and data.dtype == torch.float64:
        if data.y.shape[1] > _FEW_OUTPUTS:
            return Choice("autograd", "products of matrices, with so many targets")
        return Choice("fused", "full batch in float64, of which second moments would lose digits")
    models = len(optimizers)
    if full and data.X.shape[1] <= _MOST_FEATURES:
        once, again, epoch = _seconds(data, models)
        if once + again * epochs < epoch * epochs:
            return Choice("statistics", "full batch: one pass over the rows serves all epochs")
    if data.y.shape[1] > _FEW_OUTPUTS or (data.X.is_cuda and models == 1 and not _is_small(data)):
        return Choice("autograd", "each step is worth a launch of its own")
    return Choice("fused", "mini-batches" if not full else "so few rows that second moments are not worth it")


def _is_small(data: Data) -> bool:
    # What one block of a GPU works through about as fast as the host can launch anything.
    return data.X.numel() <= 1 << 16


def _why_not_operators(dtype: torch.dtype, optimizers: Sequence[Optimizer]) -> str:
    """Return why the training-loop operators cannot do a run, or an empty string."""
    if dtype not in (torch.float32, torch.float64):
        return f"{str(dtype).removeprefix('torch.')} parameters, whose rounding in each step only the loop itself has"
    rules = {optimizer.class_name: optimizer.rule() for optimizer in optimizers}
    for name, rule in rules.items():
        if rule is None:
            return f"the optimizer {name} with these options is none of plain sgd, adam and adamw"
    return ""


def _seconds(data: Data, models: int) -> tuple[float, float, float]:
    """Estimate the seconds of gathering second moments, of an epoch on them, and of a fused epoch over the rows."""
    rows, features = data.X.shape
    outputs = data.y.shape[1]
    columns = features + outputs
    once = rows * columns * columns / 2 / _MOMENTS
    again = models * (outputs * features * features / _MOMENT_EPOCHS + _STEP / 4)
    read = rows * features * data.X.element_size() / _READ
    epoch = max(read, 2 * rows * features * outputs * models / _PRODUCTS) + models * _STEP
    return once, again, epoch


class _OperatorRun:
    """K models on their way through the epochs, by an operator that trains them in place."""

    def __init__(self, initial: nn.Linear, rules: Sequence[Rule], *, dtype: torch.dtype) -> None:
        models = len(rules)
        weight, bias = initial.weight.detach(), initial.bias
        self.weight = weight.to(dtype).expand(models, -1, -1).contiguous().clone()
        self.bias = None if bias is None else bias.detach().to(dtype).expand(models, -1).contiguous().clone()
        self.rule = rules[0].name
        self.options = torch.tensor([rule.options for rule in rules], dtype=torch.float64)
        rows = 1 + max(rule.memory for rule in rules)
        parameters = weight.numel() + weight.shape[0]
        self.state = torch.zeros(rows, models, parameters, dtype=dtype, device=self.weight.device)
        self.state[0, :, : weight.numel()] = self.weight.flatten(1)
        if self.bias is not None:
            self.state[0, :, weight.numel() :] = self.bias
        self.stopped = torch.full((models,), -1)
        self.trained = initial.weight.requires_grad, bias is not None and bias.requires_grad
        self.epoch = self.step = 0
        self.steps_an_epoch = 1
        self.seconds_an_epoch = 0.0

    def advance(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        """Run as many epochs as ``lr`` (E, K) has rows; return their losses and validation losses."""
        losses: tuple[Tensor, Tensor] = self._call(lr)
        self.epoch += lr.shape[0]
        self.step += lr.shape[0] * self.steps_an_epoch
        return losses

    def _call(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def put_back(self, model: int | None = None) -> None:
        """Put the parameters of one model or of all back to what they were when their loss was last finite."""
        chosen = slice(None) if model is None else slice(model, model + 1)
        last, weights = self.state[0, chosen], self.weight[0].numel()
        if self.trained[0]:
            self.weight[chosen].copy_(last[:, :weights].view_as(self.weight[chosen]))
        if self.bias is not None and self.trained[1]:
            self.bias[chosen].copy_(last[:, weights:])

    def all_stopped(self) -> bool:
        return bool((self.stopped >= 0).all())


class _FusedRun(_OperatorRun):
    def __init__(
        self,
        data: Data,
        initial: nn.Linear,
        rules: Sequence[Rule],
        *,
        batch_size: int | None,
        shuffle: bool,
        generator: torch.Generator | None,
    ) -> None:
        data.check_finite()
        super().__init__(initial, rules, dtype=data.dtype)
        self.data = data
        self.batch_size = data.rows if batch_size is None else min(batch_size, data.rows)
        self.shuffle, self.generator = shuffle, generator
        self.steps_an_epoch = -(-data.rows // self.batch_size)
        self.seconds_an_epoch = _seconds(data, len(rules))[2] + self.steps_an_epoch * _STEP

    def _call(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        held_out = self.data.validation or (None, None)
        losses: tuple[Tensor, Tensor] = torch.ops.torchintro.linear_mse_fit(
            self.data.X,
            self.data.y,
            self.weight,
            self.bias,
            lr,
            self.options,
            self.state,
            self.stopped,
            self.rule,
            self.epoch,
            self.step,
            self.batch_size,
            self.shuffle,
            self.generator,
            *held_out,
            *self.trained,
        )
        return losses


class _StatisticsRun(_OperatorRun):
    def __init__(self, data: Data, initial: nn.Linear, rules: Sequence[Rule]) -> None:
        self.moments = data.moments()
        # On the host, where an epoch of some features takes less than a launch.
        host = copy.deepcopy(initial).cpu() if initial.weight.device.type != "cpu" else initial
        super().__init__(host, rules, dtype=torch.float64)
        self.largest = torch.finfo(data.dtype).max
        self.seconds_an_epoch = _seconds(data, len(rules))[1]

    def _call(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        losses: tuple[Tensor, Tensor] = torch.ops.torchintro.linear_statistics_fit(
            *self.moments,
            self.weight,
            self.bias,
            lr,
            self.options,
            self.state,
            self.stopped,
            self.rule,
            self.epoch,
            self.step,
            *self.trained,
            self.largest,
        )
        return losses


def _make_run(
    choice: Choice,
    data: Data,
    initial: nn.Linear,
    optimizers: Sequence[Optimizer],
    batch_size: int | None,
    shuffle: bool,
    generator: torch.Generator | None,
) -> _OperatorRun:
    rules = [rule for rule in (optimizer.rule() for optimizer in optimizers) if rule is not None]
    if choice.engine == "statistics":
        return _StatisticsRun(data, initial, rules)
    return _FusedRun(data, initial, rules, batch_size=batch_size, shuffle=shuffle, generator=generator)


def _drive(run: _OperatorRun, data: Data, lr: Tensor, report: Report | None, wanted: Wanted | None) -> Trained:
    """Run all epochs, a part at a call; the results are those of one call to the bit."""
    epochs, models = lr.shape
    start = time.perf_counter()
    losses: list[Tensor] = []
    validation_losses: list[Tensor] = []
    size = max(1, int(_CALL_SECONDS / max(run.seconds_an_epoch, 1e-9)))
    while run.epoch < epochs:
        first = run.epoch
        count = min(size, epochs - first, epochs if wanted is None else wanted(first))
        began = time.perf_counter()
        some, of_held_out = run.advance(lr[first : first + count])
        size = max(1, int(count * min(2.0, _CALL_SECONDS / max(time.perf_counter() - began, 1e-9))))
        losses.append(some)
        validation_losses.append(of_held_out)
        stopped = run.stopped.min().item() >= 0
        if first == 0 and run.stopped.max().item() >= 0 and bool((run.stopped == 0).any()):
            data.check_finite()  # what the pass for second moments did not look for
        if report is not None:
            # An epoch in which all models failed has no loss to report.
            last = int(run.stopped.max()) if stopped else first + count
            for epoch in range(first, min(first + count, last)):
                report(epoch + 1, some[epoch - first])
        if stopped:
            break
    every = torch.cat(losses) if len(losses) > 1 else losses[0]
    held_out = torch.cat(validation_losses) if len(losses) > 1 else validation_losses[0]
    if every.shape[0] < epochs:
        rest = every.new_full((epochs - every.shape[0], models), math.nan)
        every = torch.cat([every, rest])
        held_out = torch.cat([held_out, rest]) if held_out.shape[0] else held_out
    failures = _failures(run, data, every, held_out)
    return Trained(
        weight=run.weight.to(data.X.device, data.dtype),
        bias=None if run.bias is None else run.bias.to(data.X.device, data.dtype),
        losses=every,
        validation_losses=held_out if data.validation is not None else None,
        failures=failures,
        engine="",
        reason="",
        seconds=time.perf_counter() - start,
    )


def _failures(run: _OperatorRun, data: Data, losses: Tensor, validation_losses: Tensor) -> list[Failure | None]:
    """Say of each model how it failed, and find out a last update that no later loss would."""
    epochs, models = losses.shape
    failures: list[Failure | None] = [None] * models
    largest = torch.finfo(data.dtype).max
    extremes = [parameter.flatten(1).abs().amax(1) for parameter in (run.weight, run.bias) if parameter is not None]
    within = [all(extreme[k].item() <= largest for extreme in extremes) for k in range(models)]

    def in_dtype(loss: float) -> float:
        return math.inf if loss > largest else loss

    for k, stopped in enumerate(run.stopped.tolist()):
        if stopped >= 0:
            loss = in_dtype(losses[stopped, k].item())
            if math.isfinite(loss):
                loss = in_dtype(validation_losses[stopped, k].item())
                failures[k] = Failure(stopped + 1, loss, "validation loss", stopped + 1)
            else:
                failures[k] = Failure(stopped + 1, loss, "loss", stopped)
        elif not within[k]:
            bias = None if run.bias is None else run.bias[k]
            failures[k] = Failure(epochs, data.loss(run.weight[k], bias), "loss", epochs)
            run.put_back(k)
    return failures


def train_models(
    data: Data,
    *,
    initial: nn.Linear,
    lr: Sequence[float] | Sequence[Sequence[float]],
    epochs: int,
    batch_size: int | None,
    optimizers: Sequence[Optimizer],
    shuffle: bool = True,
    seed: int | None = None,
    engine: str = "auto",
    begin: Callable[[Choice], None] | None = None,
    report: Report | None = None,
    wanted: Wanted | None = None,
    into: nn.Linear | None = None,
) -> Trained:
    """Train K models that begin with the same parameters, each batch of rows read once for all of them.

    Args:
        data: The rows.
        initial: The parameters that all begin with, and which of them are trained; stays as it is.
        lr: One learning rate a model, or one a model and epoch.
        epochs: Passes over the rows.
        batch_size: Rows of a step, None for all.
        optimizers: One a model, all of one class.
        shuffle: Whether mini-batches are cut from a permutation drawn each epoch, or from the rows as they are.
        seed: Seed of the permutations; None draws them from PyTorch's global random state.
        engine: One of :data:`ENGINES`.
        begin: Called with the choice before the first epoch.
        report: Called with the epoch, counted from 1, and the losses ``(K,)``.
        wanted: How many epochs may pass until ``report`` is called again; None if it can wait.
        into: A layer that is given the parameters of the only model, whatever ends the run.

    Returns:
        The models. One whose loss is not finite ends early and does not disturb the others.

    Raises:
        ValueError: The engine that was asked for cannot do it, or the rows are not finite.
    """
    choice = choose(data, engine=engine, optimizers=optimizers, batch_size=batch_size, epochs=epochs)
    if begin is not None:
        begin(choice)
    rates = [[rate] * epochs if isinstance(rate, (int, float)) else list(rate) for rate in lr]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if choice.engine in _LOSS_FUNCTIONS:
        data.check_finite()
        trained = _loop_through(
            data, initial, rates, epochs, batch_size, optimizers, shuffle, seed, choice.engine, report, into
        )
    else:
        table = torch.tensor(rates, dtype=torch.float64).t().contiguous()
        run = _make_run(choice, data, initial, optimizers, batch_size, shuffle, generator)
        try:
            trained = _drive(run, data, table, report, wanted)
        except BaseException:
            run.put_back()
            raise
        finally:
            if into is not None:
                with torch.no_grad():
                    into.weight.copy_(run.weight[0])
                    if run.bias is not None:
                        into.bias.copy_(run.bias[0])
    trained.engine, trained.reason = choice.engine, choice.reason
    return trained


def _loop_through(
    data: Data,
    initial: nn.Linear,
    lr: Sequence[Sequence[float]],
    epochs: int,
    batch_size: int | None,
    optimizers: Sequence[Optimizer],
    shuffle: bool,
    seed: int | None,
    engine: str,
    report: Report | None,
    into: nn.Linear | None,
) -> Trained:
    """Train the models one after the other by the PyTorch loop."""
    start = time.perf_counter()
    models = len(optimizers)
    losses = torch.full((epochs, models), math.nan, dtype=torch.float64)
    held_out = losses.clone() if data.validation is not None else None
    failures: list[Failure | None] = [None] * models
    trained = []
    for k, optimizer in enumerate(optimizers):
        model = copy.deepcopy(initial) if into is None else into
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loop = Loop(model, optimizer.make(data.function, parameters, lr[k][0]), engine)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        epoch = 0
        try:
            with loop.guarded():
                for epoch in range(epochs):
                    loop.set_lr(lr[k][epoch])
                    rows = batches(data.X, data.y, batch_size, shuffle, generator)
                    losses[epoch, k] = loop.epoch(rows, data.rows)
                    if held_out is not None and data.validation is not None:
                        held_out[epoch, k] = loop.validate(*data.validation)
                    if report is not None:
                        report(epoch + 1, losses[epoch])
                loop.check_parameters(data.X, data.y)
        except NonFiniteLossError as error:
            failures[k] = Failure(epoch + 1, error.loss, error.kind, int(losses[:, k].isfinite().sum()))
        trained.append(model)
    bias = trained[0].bias
    return Trained(
        weight=torch.stack([model.weight.detach() for model in trained]),
        bias=None if bias is None else torch.stack([model.bias.detach() for model in trained]),
        losses=losses,
        validation_losses=held_out,
        failures=failures,
        engine="",
        reason="",
        seconds=time.perf_counter() - start,
    )


class NonFiniteLossError(Exception):
    """The loss of a :class:`Loop` was not finite."""

    def __init__(self, loss: float, kind: str) -> None:
        super().__init__(loss)
        self.loss = loss
        self.kind = kind


class Loop:
    """The PyTorch loop of one model: its optimizer and a copy of the parameters of the last finite loss."""

    def __init__(self, model: nn.Linear, optimizer: torch.optim.Optimizer, engine: str) -> None:
        self.model = model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer
        self.loss_function = _LOSS_FUNCTIONS[engine]
        self.saved = [torch.empty_like(parameter, requires_grad=False) for parameter in self.parameters]
        self.saved_is_whole = False

    def set_lr(self, lr: float) -> None:
        """Take this learning rate from now on."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def epoch(self, batches: Iterable[tuple[Tensor, Tensor]], rows: int) -> float:
        """Update the parameters once per batch; return the row-weighted mean of the losses before each update."""
        mean = 0.0
        for X, y in batches:
            mean += self.step(X, y) * (X.shape[0] / rows)
        return mean

    def step(self, X: Tensor, y: Tensor) -> float:
        """Update the parameters once; return the loss before that."""
        first_loss: list[float] = []

        def closure() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(X, y)
            loss.backward()  # type: ignore[no-untyped-call]
            # An optimizer such as LBFGS calls this several times a step; only the first is at a settled point.
            if not first_loss:
                first_loss.append(_finite(loss))
                self.save()
            return loss

        # The closure runs before any parameter is changed, so raising in it leaves them as they are.
        self.optimizer.step(closure)  # type: ignore[arg-type]
        return first_loss[0]

    def loss(self, X: Tensor, y: Tensor) -> Tensor:
        """Return the loss at the parameters of the moment."""
        return self.loss_function(X, self.model.weight, y, linear_bias=self.model.bias)

    def validate(self, X: Tensor, y: Tensor) -> float:
        """Return the loss of rows held out."""
        with torch.no_grad():
            return _finite(self.loss(X, y), "validation loss")

    def check_parameters(self, X: Tensor, y: Tensor) -> None:
        """Find out a last update that no later loss would: raise unless the parameters are finite."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters):
            with torch.no_grad():
                _finite(self.loss(X, y))
            raise NonFiniteLossError(math.nan, "loss")

    def save(self) -> None:
        """Remember the parameters as those of the last finite loss."""
        # While the copy is incomplete the parameters themselves are the ones of the last finite loss.
        self.saved_is_whole = False
        with torch.no_grad():
            for saved, parameter in zip(self.saved, self.parameters, strict=True):
                saved.copy_(parameter)
        self.saved_is_whole = True

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Put the saved parameters back if the run ends by an exception; drop the gradients in any case."""
        try:
            # Autocast would go on with the first epoch's parameters: it keeps what it has cast until its context ends.
            with torch.enable_grad(), torch.autocast(self.model.weight.device.type, enabled=False):
                yield
        except BaseException:
            if self.saved_is_whole:
                with torch.no_grad():
                    for saved, parameter in zip(self.saved, self.parameters, strict=True):
                        parameter.copy_(saved)
            raise
        finally:
            self.optimizer.zero_grad(set_to_none=True)


def _finite(loss: Tensor, kind: str = "loss") -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise NonFiniteLossError(value, kind)
    return value


def batches(
    X: Tensor, y: Tensor, batch_size: int | None, shuffle: bool, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut the rows into mini-batches, from a random permutation or as they are."""
    if batch_size is None or batch_size >= X.shape[0]:
        yield X, y
    elif shuffle:
        order = torch.randperm(X.shape[0], generator=generator).to(X.device)
        for rows in torch.split(order, batch_size):
            yield X.index_select(0, rows), y.index_select(0, rows)
    else:
        yield from zip(torch.split(X, batch_size), torch.split(y, batch_size), strict=True)
