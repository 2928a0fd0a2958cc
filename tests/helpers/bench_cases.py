"""What the benchmark's tests have in common: small cases, made-up limits, and an operator that is wrong."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.cases import Case, quick_case, select
from benchmarks.machine import Limits
from benchmarks.measure import run_case
from benchmarks.timing import QUICK
from torchintro import reference

__all__ = ["ALL", "CPU", "LIMITS", "SMALL", "case_named", "measured", "wrong_loss"]

CPU = torch.device("cpu")
ALL = ("input", "linear_weight", "linear_bias", "target")
LIMITS = Limits(
    read=1e10,
    copy=1e10,
    matrix={torch.float32: 1e11},
    matrix_size=64,
    ways={"read": "sum", "copy": "copy_", "float32": "mm"},
)
SMALL = Case("small", "step", 50, 7, 3, gradients=ALL, peers=("eager", "fused"))


def case_named(name):
    (case,) = select([name])
    return case


def measured(name, **changes):
    """Measure a case, scaled down and changed, without a compiler."""
    case = replace(quick_case(case_named(name)), **changes)
    return run_case(case, CPU, LIMITS, QUICK, compile=False, judge=False)


def wrong_loss(*args, **kwargs):
    return reference.linear_mse_loss(*args, **kwargs) * 1.0001
