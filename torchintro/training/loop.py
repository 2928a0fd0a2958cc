"""The PyTorch loop that trains one model, by the fused operator or in plain PyTorch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from .. import functional, reference
from .optimizers import Optimizer

__all__ = ["LOSS_FUNCTIONS", "Loop", "NonFiniteLossError"]

LOSS_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "autograd": functional.linear_mse_loss,
    "reference": reference.linear_mse_loss,
}


class NonFiniteLossError(Exception):
    """The loss of a :class:`Loop` was not finite."""

    def __init__(self, loss: float, kind: str) -> None:
        super().__init__(loss)
        self.loss = loss
        self.kind = kind


class Loop:
    """The PyTorch loop of one model: its optimizer and a copy of the parameters of the last finite loss."""

    def __init__(self, model: nn.Linear, optimizer: Optimizer, lr: float, engine: str) -> None:
        self.model = model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer.make(self.parameters, lr)
        self.loss_function = LOSS_FUNCTIONS[engine]
        self.saved = [torch.empty_like(parameter, requires_grad=False) for parameter in self.parameters]
        self.saved_is_whole = False

    def set_lr(self, lr: float) -> None:
        """Take this learning rate from now on."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def epoch(self, batches: Iterable[tuple[Tensor, Tensor]], rows: int | None) -> float:
        """Update the parameters once per batch; return the row-weighted mean of the losses before each update.

        Their number, where it is known, makes it the sum that the plain loop forms, to the bit.
        """
        mean, count = 0.0, 0
        for X, y in batches:
            mean += self.step(X, y) * (X.shape[0] / (rows or 1))
            count += X.shape[0]
        return mean if rows else mean / count

    def step(self, X: Tensor, y: Tensor) -> float:
        """Update the parameters once; return the loss before that."""
        first_loss: list[float] = []

        def closure() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss_function(X, self.model.weight, y, linear_bias=self.model.bias)
            loss.backward()  # type: ignore[no-untyped-call]
            # An optimizer such as LBFGS calls this several times a step; only the first is at a settled point.
            if not first_loss:
                value = loss.item()
                if not math.isfinite(value):
                    raise NonFiniteLossError(value, "loss")
                first_loss.append(value)
                self.save()
            return loss

        # The closure runs before any parameter is changed, so raising in it leaves them as they are.
        self.optimizer.step(closure)  # type: ignore[arg-type]
        return first_loss[0]

    def detached(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias of the moment outside any graph."""
        bias = self.model.bias
        return self.model.weight.detach(), None if bias is None else bias.detach()

    def is_finite(self) -> bool:
        """Say whether the parameters are finite: they may not be since the last update, which no loss has seen."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters)

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
