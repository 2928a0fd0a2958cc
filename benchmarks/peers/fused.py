"""The training peers that are this package: its operator by itself, and many models at once.

What they call is written here and nowhere else in the benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchintro import functional
from torchintro.training.optimizers import Optimizer
from torchintro.training.options import TrainingOptions
from torchintro.training.row_kinds import MemoryRows
from torchintro.training.train import Trained, train_models

__all__ = ["ModelsAtOnce", "OperatorFit"]


class OperatorFit:
    """A training run of SGD by one call of the operator, its tensors made once: as compiled code of JAX is called.

    Every call trains a model further, in place.
    """

    NOTE = "fused is the operator itself, its tensors made once, as compiled JAX is called; fit is what is around it"

    def __init__(self, model: nn.Linear, X: Tensor, y: Tensor, *, lr: float, epochs: int) -> None:
        self.arguments = X, model.weight.detach(), y
        self.options = {
            "linear_bias": model.bias.detach(),
            "lr": torch.full((epochs,), lr, dtype=torch.float64),
        }

    def __call__(self) -> object:
        """Train; return the losses."""
        return functional.linear_full_batch_fit(*self.arguments, **self.options)


class ModelsAtOnce:
    """Trainings from the same start, one for each learning rate, which share every batch."""

    def __init__(
        self, X: Tensor, y: Tensor, initial: nn.Linear, *, epochs: int, batch_size: int | None, shuffle: bool = True
    ) -> None:
        self.X, self.y, self.initial = X, y, initial
        self.options = TrainingOptions(epochs=epochs, batch_size=batch_size, shuffle=shuffle, seed=0)
        self.trained: Trained | None = None

    def __call__(self, lrs: Sequence[float]) -> Trained:
        """Train; return what :func:`torchintro.training.train.train_models` does.

        The data are handed over anew each time, so that whatever is gathered from them is in the time.
        """
        data = MemoryRows(self.X, self.y, function="bench")
        optimizers = [Optimizer("SGD", {})] * len(lrs)
        self.trained = train_models(data, self.options, self.initial, lr=list(lrs), optimizers=optimizers)
        return self.trained
