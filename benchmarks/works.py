"""Which work a case is."""

from __future__ import annotations

import torch

from torchintro import functional

from .cases import Case
from .fit import FitWork
from .models import ModelsWork
from .step import StepWork
from .study import StudyWork
from .work import Operator, Work

__all__ = ["make_work"]


def make_work(
    case: Case, device: torch.device, *, compile: bool = True, jax: bool = True, fused: Operator | None = None
) -> Work:
    """Make the data and the peers of a case.

    Args:
        case: The record; a memory case is verified as the step that it is.
        device: Where.
        compile: Whether ``torch.compile`` may be one of the peers.
        jax: Whether JAX may.
        fused: What the peer ``"fused"`` of a step calls, by default :func:`torchintro.linear_mse_loss`.

    Raises:
        Unavailable: What all peers of the case need is not installed.
    """
    if case.kind == "fit":
        return FitWork(case, device, compile, jax)
    if case.kind == "study":
        return StudyWork(case, device, compile, jax)
    if case.kind == "models":
        return ModelsWork(case, device, jax)
    return StepWork(case, device, compile, jax, fused or functional.linear_mse_loss)
