"""Loads the operator library, after making sure that it fits the torch that runs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["direct_calls", "library_path"]

_REBUILD = "rebuild it in its source folder: `pip install --no-build-isolation --force-reinstall --no-deps .`"


def library_path() -> Path:
    """Return the shared library that defines the operators.

    It holds no Python symbols: a C++ program links or ``dlopen``s it to call ``torchintro::linear_mse_loss`` or to run
    a TorchScript module that does.

    Raises:
        ImportError: The package has not been built.
    """
    found = sorted(Path(__file__).parent.glob("_ops*.so"))
    if not found:
        raise ImportError(
            "torchintro: the operator library is not built; in a source checkout run "
            "`pip install --no-build-isolation -e .`"
        )
    return found[0]


def _release(version: str) -> str:
    return version.split("+")[0]


def _check_build(built_torch: str, built_cuda: str) -> None:
    """Raise ImportError if the library was built against another torch than the one imported."""
    if _release(built_torch) != _release(torch.__version__):
        raise ImportError(
            f"torchintro: built for torch {built_torch}, but torch {torch.__version__} is running; {_REBUILD} "
            f"(or install torch {_release(built_torch)})"
        )
    running_cuda = torch.version.cuda or ""
    if built_cuda and built_cuda.split(".")[0] != running_cuda.split(".")[0]:
        running = f"CUDA {running_cuda}" if running_cuda else "no CUDA"
        raise ImportError(f"torchintro: built for CUDA {built_cuda}, but this torch has {running}; {_REBUILD}")


def _warn_of_choice(variable: str, expected: str, active: str) -> None:
    """Warn if an environment variable asks for what does not exist or cannot be had."""
    wanted = os.environ.get(variable)
    if wanted and wanted != active:
        warnings.warn(
            f"torchintro: {variable} must be {expected}, but is {wanted!r}; using {active}",
            stacklevel=2,
        )


def _load() -> tuple[Callable[..., Tensor | None], Callable[..., Tensor | None]]:
    """Load the operators; return the ways to call the public ones that do not go through torch.ops."""
    path = library_path()
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(f"torchintro: its build is incomplete ({error}); {_REBUILD}") from error
    info = _C.build_info()
    _check_build(info["torch"], info["cuda"])
    levels = "baseline, avx2 or avx512, and one that this processor has"
    _warn_of_choice("TORCHINTRO_CPU_LEVEL", levels, _C.cpu_level())
    _warn_of_choice("TORCHINTRO_MATRIX_ROUTE", "blas or onednn", _C.matrix_route())
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(f"torchintro: {path.name} does not load ({error}); {_REBUILD}") from error
    try:
        from . import _call
    except ImportError as error:
        raise ImportError(f"torchintro: its build is incomplete ({error}); {_REBUILD}") from error
    return _call.linear_mse_loss, _call.linear_full_batch_fit


# Each returns its result, or None for a call that has to go through torch.ops: see csrc/python/call.cpp.
direct_calls = _load()
