"""A linear layer and the mean squared error, fused: one pass over the input for the loss and its gradients.

The operator is :func:`linear_mse_loss`, its module :class:`LinearMSELoss`; :func:`fit`, :func:`tune` and
:func:`evaluate` train, tune and judge linear models with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import reference
from ._library import library_path
from ._version import __version__
from .evaluation import evaluate
from .functional import linear_mse_loss
from .nn import LinearMSELoss
from .statistics import LinearStatistics
from .training import DivergedError, FitResult, fit

if TYPE_CHECKING:
    from .tables import Table, open_table
    from .tuning import tune

__all__ = [
    "DivergedError",
    "FitResult",
    "LinearMSELoss",
    "LinearStatistics",
    "Table",
    "__version__",
    "evaluate",
    "fit",
    "library_path",
    "linear_mse_loss",
    "open_table",
    "reference",
    "tune",
]


def __getattr__(name: str) -> Any:
    # Optuna takes longer to import than all the rest: only who tunes pays for it.
    if name == "tune":
        from .tuning import tune

        return tune
    if name in ("Table", "open_table"):
        from . import tables

        return getattr(tables, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
