"""The training loop of a linear model: :func:`fit`, its result and the error that it raises when it diverges."""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import _checks, functional, reference

__all__ = ["ENGINES", "ArrayLike", "DivergedError", "FitResult", "Progress", "fit", "initial_linear"]

ArrayLike: TypeAlias = "Tensor | npt.NDArray[Any]"
Progress: TypeAlias = "bool | Callable[[int, float], None]"
_LossFunction: TypeAlias = "Callable[..., Tensor]"

_LOSS_FUNCTIONS: dict[str, _LossFunction] = {
    "autograd": functional.linear_mse_loss,
    "reference": reference.linear_mse_loss,
}
ENGINES = ("auto", *_LOSS_FUNCTIONS)

# These take gradients that a dense linear layer does not have.
_UNSUITABLE_OPTIMIZERS = {"SparseAdam"}


@dataclass(frozen=True, eq=False)
class FitResult:
    """What :func:`fit` did.

    Attributes:
        losses: One training loss per epoch, float64 on the CPU. With the full batch it is the loss before that epoch's
            update; with mini-batches, the row-weighted mean of the batch losses met during the epoch, each before its
            own update.
        validation_losses: One validation loss per epoch, after that epoch's update, or None without validation data.
        engine: The engine that ran.
        epochs: The number of epochs.
        seconds: Wall-clock time of the loop, validation included.
    """

    losses: Tensor
    validation_losses: Tensor | None
    engine: str
    epochs: int
    seconds: float


class DivergedError(ArithmeticError):
    """The loss of a training run became infinite or NaN.

    The model keeps the parameters of the last moment at which its loss was finite.

    Attributes:
        epoch: The epoch, counted from 1, in which it happened.
        loss: The non-finite loss.
        lr: The learning rate.
        losses: The finite training losses, one per epoch until then, float64.
        engine: The engine that ran.
        kind: ``"loss"`` or ``"validation loss"``.
    """

    def __init__(self, epoch: int, loss: float, lr: float, losses: Tensor, engine: str, kind: str = "loss") -> None:
        super().__init__(
            f"fit: the {kind} became {loss} in epoch {epoch} with lr={lr:g}, and the model keeps the parameters of the "
            "last finite loss: lower lr, or standardise the features"
        )
        self.epoch = epoch
        self.loss = loss
        self.lr = lr
        self.losses = losses
        self.engine = engine
        self.kind = kind

    def __reduce__(self) -> tuple[type[DivergedError], tuple[int, float, float, Tensor, str, str]]:
        return type(self), (self.epoch, self.loss, self.lr, self.losses, self.engine, self.kind)


def initial_linear(
    in_features: int,
    out_features: int,
    *,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Linear:
    """Make an ``nn.Linear`` whose initial parameters depend on ``seed`` alone.

    Equivalent to ``torch.manual_seed(seed); nn.Linear(in_features, out_features)`` on the CPU, except that the global
    random state is left as it was.

    Args:
        in_features: Number of features.
        out_features: Number of targets.
        seed: Seed of the parameters; None draws them from the global random state.
        dtype: Type of the parameters, by default ``torch.get_default_dtype()``.
        device: Where the parameters are moved.

    Returns:
        The layer.

    Example:
        >>> bool((initial_linear(3, 1, seed=0).weight == initial_linear(3, 1, seed=0).weight).all())
        True
    """
    if seed is None:
        return nn.Linear(in_features, out_features, dtype=dtype, device=device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Linear(in_features, out_features, dtype=dtype).to(device)


def fit(
    model: nn.Linear,
    X: ArrayLike,
    y: ArrayLike,
    *,
    lr: float,
    epochs: int = 100,
    batch_size: int | None = None,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    optimizer_options: Mapping[str, Any] | None = None,
    validation: Sequence[ArrayLike] | None = None,
    engine: str = "auto",
    seed: int | None = None,
    progress: Progress = False,
) -> FitResult:
    """Train a linear layer in place to the least mean squared error.

    Equivalent to the ordinary loop::

        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for epoch in range(epochs):
            optimizer.zero_grad()
            loss = F.mse_loss(model(X), y)
            loss.backward()
            optimizer.step()

    Whatever ends the run early (a non-finite loss, Ctrl-C, an exception from ``progress``), the model is left with the
    parameters at which the last finite training loss was computed.

    Args:
        model: The layer to train. Parameters that do not require a gradient stay as they are.
        X: Features ``(N, in_features)``, tensor or NumPy array; converted to the model's dtype and device.
        y: Targets ``(N, out_features)``; a target of shape ``(N,)`` is an error.
        lr: Learning rate.
        epochs: Number of passes over the rows.
        batch_size: Rows a step, cut from one random permutation an epoch (the last batch may be shorter); None or
            anything from N up means all rows in their own order.
        optimizer: Class name of an optimizer of ``torch.optim``, in any case.
        momentum: The optimizer's argument; an error where the optimizer has none.
        weight_decay: The optimizer's argument, zero by default whatever the optimizer's own default.
        optimizer_options: Further keyword arguments of the optimizer, such as ``{"nesterov": True}``.
        validation: ``(X_val, y_val)``: their loss is computed after each epoch.
        engine: ``"autograd"`` for the fused operator in a PyTorch loop, ``"reference"`` for the same loop in plain
            PyTorch; ``"auto"``, today the same as ``"autograd"``, for the one that fits.
        seed: Seed of the permutations; None draws them from PyTorch's global random state.
        progress: True prints the loss every tenth of the run; a callable is given ``(epoch, loss)`` every epoch.

    Returns:
        The losses and the time taken.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument has a wrong value. Nothing was changed.
        DivergedError: The loss became infinite or NaN.

    Example:
        >>> X = torch.linspace(-1, 1, 50).unsqueeze(-1)
        >>> model = nn.Linear(1, 1)
        >>> result = fit(model, X, 3 * X, lr=0.5, epochs=100)
        >>> round(model.weight.item(), 3)
        3.0
    """
    _check_model(model)
    lr = _checks.positive("fit", "lr", lr)
    epochs = _checks.positive_integer("fit", "epochs", epochs)
    generator = None
    if seed is not None:
        generator = torch.Generator().manual_seed(_checks.integer("fit", "seed", seed))
    report = _reporter(progress, epochs)
    train, held_out = _check_data(model, X, y, validation)
    loop = prepare(
        "fit",
        model,
        lr=lr,
        batch_size=batch_size,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        optimizer_options=optimizer_options,
        engine=engine,
    )

    losses: list[float] = []
    validation_losses: list[float] = []
    start = time.perf_counter()
    with loop.guarded():
        try:
            for epoch in range(1, epochs + 1):
                losses.append(loop.epoch(*train, generator))
                if held_out is not None:
                    validation_losses.append(loop.validate(*held_out))
                report(epoch, losses[-1])
            loop.check_parameters(*train)
        except _NonFiniteLossError as error:
            # The failing epoch is the one that has no loss yet, unless it was found out after its last update.
            epoch = len(losses) + (error.kind == "loss" and len(losses) < epochs)
            finite = torch.tensor(losses, dtype=torch.float64)
            raise DivergedError(epoch, error.loss, lr, finite, loop.engine, error.kind) from None
    return FitResult(
        losses=torch.tensor(losses, dtype=torch.float64),
        validation_losses=None if held_out is None else torch.tensor(validation_losses, dtype=torch.float64),
        engine=loop.engine,
        epochs=epochs,
        seconds=time.perf_counter() - start,
    )


def prepare(
    function: str,
    model: nn.Linear,
    *,
    lr: float,
    batch_size: object,
    optimizer: object,
    momentum: object,
    weight_decay: object,
    optimizer_options: object,
    engine: object,
) -> _Loop:
    """Check what ``function`` has in common with :func:`fit`; return the training run that it describes."""
    if batch_size is not None:
        batch_size = _checks.positive_integer(function, "batch_size", batch_size)
    name, loss_function = _choose_engine(function, engine)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _Loop(
        model,
        parameters,
        _make_optimizer(function, optimizer, parameters, lr, momentum, weight_decay, optimizer_options),
        name,
        loss_function,
        batch_size,
    )


class _NonFiniteLossError(Exception):
    def __init__(self, loss: float, kind: str) -> None:
        super().__init__(loss)
        self.loss = loss
        self.kind = kind


class _Loop:
    """One training run: the model, its optimizer and a copy of the parameters of the last finite loss."""

    def __init__(
        self,
        model: nn.Linear,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        engine: str,
        loss_function: _LossFunction,
        batch_size: int | None,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.optimizer = optimizer
        self.engine = engine
        self.loss_function = loss_function
        self.batch_size = batch_size
        self.saved = [torch.empty_like(parameter, requires_grad=False) for parameter in parameters]
        self.saved_is_whole = False

    def epoch(self, X: Tensor, y: Tensor, generator: torch.Generator | None) -> float:
        """Update the parameters once per batch; return the row-weighted mean of the losses before each update."""
        mean = 0.0
        for X_batch, y_batch in _batches(X, y, self.batch_size, generator):
            mean += self.step(X_batch, y_batch) * (X_batch.shape[0] / X.shape[0])
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
        return self.loss_function(X, self.model.weight, y, linear_bias=self.model.bias)

    def validate(self, X: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            return _finite(self.loss(X, y), "validation loss")

    def check_parameters(self, X: Tensor, y: Tensor) -> None:
        """Find out a last update that no later loss would: raise unless the parameters are finite."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters):
            with torch.no_grad():
                _finite(self.loss(X, y))
            raise _NonFiniteLossError(math.nan, "loss")

    def save(self) -> None:
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
        raise _NonFiniteLossError(value, kind)
    return value


def _batches(
    X: Tensor, y: Tensor, batch_size: int | None, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    if batch_size is None or batch_size >= X.shape[0]:
        yield X, y
        return
    order = torch.randperm(X.shape[0], generator=generator).to(X.device)
    for rows in torch.split(order, batch_size):
        yield X.index_select(0, rows), y.index_select(0, rows)


def _choose_engine(function: str, engine: object) -> tuple[str, _LossFunction]:
    """Return the name of the engine to run and its loss; the only place that knows what ``"auto"`` means."""
    chosen = _checks.one_of(function, "engine", engine, ENGINES)
    if chosen == "auto":
        chosen = "autograd"
    return chosen, _LOSS_FUNCTIONS[chosen]


def _check_model(model: object) -> None:
    model = _checks.plain_linear("fit", "model", model)
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError("fit: model must have initialised parameters, but got a lazy layer: call it on a batch first")
    if not model.weight.is_floating_point():
        raise TypeError(f"fit: model must have floating-point parameters, but got {model.weight.dtype}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("fit: model must have a parameter that requires a gradient, but all are frozen")
    for name, parameter in model.named_parameters():
        _checks.check_finite("fit", f"model.{name}", parameter.detach())


def _check_data(
    model: nn.Linear, X: object, y: object, validation: object
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    def checked(X: object, y: object, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
        return _checks.regression_data(
            "fit",
            X,
            y,
            in_features=model.in_features,
            out_features=model.out_features,
            dtype=model.weight.dtype,
            device=model.weight.device,
            names=names,
        )

    train = checked(X, y, ("X", "y"))
    if validation is None:
        return train, None
    X_validation, y_validation = validation_pair("fit", validation)
    return train, checked(X_validation, y_validation, ("validation[0]", "validation[1]"))


def validation_pair(function: str, validation: object) -> tuple[object, object]:
    """Return the two members of ``validation``, which must be a pair ``(X_val, y_val)``."""
    if not isinstance(validation, (tuple, list)) or len(validation) != 2:
        got = f"{len(validation)} elements" if isinstance(validation, (tuple, list)) else type(validation).__name__
        raise TypeError(f"{function}: validation must be a pair (X_val, y_val), but got {got}")
    return validation[0], validation[1]


def _reporter(progress: object, epochs: int) -> Callable[[int, float], None]:
    if callable(progress):
        return progress
    if not isinstance(progress, bool):
        raise TypeError(f"fit: progress must be True, False or a callable, but got {progress!r}")

    def report(epoch: int, loss: float) -> None:
        if progress and epoch * 10 // epochs > (epoch - 1) * 10 // epochs:
            print(f"Epoch [{epoch}/{epochs}], Loss: {loss:.4f}")

    return report


def optimizer_names() -> tuple[str, ...]:
    """Return the class names of the optimizers of ``torch.optim`` that can train a linear layer."""
    classes = {
        name: value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    return tuple(sorted(classes.keys() - _UNSUITABLE_OPTIMIZERS))


def _make_optimizer(
    function: str,
    name: object,
    parameters: list[nn.Parameter],
    lr: float,
    momentum: object,
    weight_decay: object,
    options: object,
) -> torch.optim.Optimizer:
    known = {known.lower(): known for known in optimizer_names()}
    if not isinstance(name, str) or name.lower() not in known:
        raise ValueError(f"{function}: optimizer must be one of {', '.join(known.values())}, but got {name!r}")
    class_name = known[name.lower()]
    make: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, class_name)
    accepted = inspect.signature(make).parameters

    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"{function}: optimizer_options must be a mapping, but got {type(options).__name__}")
    arguments: dict[str, Any] = dict(options or {})
    for key in arguments:
        if key not in accepted or key in ("params", "lr", "momentum", "weight_decay"):
            known_as = "is a named argument" if key in accepted else f"is not an argument of {class_name}"
            raise ValueError(f"{function}: optimizer_options holds {key!r}, which {known_as}")
    for key, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        number = _checks.non_negative(function, key, value)
        if key in accepted:
            arguments[key] = number
        elif number != 0:
            raise ValueError(
                f"{function}: {key} must be 0 for {class_name}, which has no such argument, but got {value!r}"
            )
    try:
        return make(parameters, lr=lr, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{function}: optimizer {class_name} refused this model or its options: {error}") from error
