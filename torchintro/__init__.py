"""A linear layer and the mean squared error, fused: one pass over the input for the loss and its gradients.

The operator is :func:`linear_mse_loss`, its module :class:`LinearMSELoss`; :func:`fit`, :func:`tune`, :func:`evaluate`
and :func:`predict` train, tune, judge and use linear models with it, of data in memory or streamed from files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import reference
from ._extension import library_path
from ._version import __version__
from .data.datasets import Dataset, diabetes, split, synthetic
from .data.open import open_table, read_table
from .data.table import Table
from .evaluation import evaluate, predict
from .functional import linear_mse_loss
from .nn import LinearMSELoss, Standardize, initial_linear
from .saving import SavedModel, load_model, save_model
from .statistics import LinearStatistics
from .training.fit import DivergedError, FitResult, fit

if TYPE_CHECKING:
    from .tuning.tune import best_lr, tune

__all__ = [
    "Dataset",
    "DivergedError",
    "FitResult",
    "LinearMSELoss",
    "LinearStatistics",
    "SavedModel",
    "Standardize",
    "Table",
    "__version__",
    "best_lr",
    "diabetes",
    "evaluate",
    "fit",
    "initial_linear",
    "library_path",
    "linear_mse_loss",
    "load_model",
    "open_table",
    "predict",
    "read_table",
    "reference",
    "save_model",
    "split",
    "synthetic",
    "tune",
]


def __getattr__(name: str) -> Any:
    # Optuna takes longer to import than all the rest: only who tunes pays for it.
    if name in ("best_lr", "tune"):
        from .tuning import tune as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
