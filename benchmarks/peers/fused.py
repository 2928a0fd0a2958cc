"""The training peers that are this package: its operator by itself, ``fit``, ``tune``, and many models at once.

What they call is written here and nowhere else in the benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchintro import functional
from torchintro.training.fit import fit
from torchintro.training.optimizers import Optimizer
from torchintro.training.options import TrainingOptions
from torchintro.training.row_kinds import MemoryRows
from torchintro.training.train import Trained, train_models

from ..work import Unavailable

if TYPE_CHECKING:
    import optuna

__all__ = ["ModelsAtOnce", "OperatorFit", "fitted", "tuned"]


def fitted(model: nn.Linear, X: Tensor, y: Tensor, *, lr: float, epochs: int, **options: Any) -> str:
    """Train a model further by :func:`torchintro.fit`, in place; return the engine that did it."""
    return fit(model, X, y, lr=lr, epochs=epochs, seed=0, **options).engine


def tuned(X: Tensor, y: Tensor, *, trials: int, epochs: int, lr: tuple[float, float]) -> optuna.Study:
    """Return the study of :func:`torchintro.tune` over the learning rate.

    Raises:
        Unavailable: Optuna is not installed.
    """
    try:
        from torchintro.tuning.tune import tune  # brings Optuna, which takes a second to import
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed: pip install {error.name}") from None
    return tune(X, y, n_trials=trials, epochs=epochs, lr=lr, seed=0)


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
