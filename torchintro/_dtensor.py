"""DTensor's rules for the operators, registered when (and only if) DTensor is imported.

Eager autograd decomposes a call on DTensors before it gets here; what arrives is a call without autograd (inference
mode) or one that torch.compile traces. Both operators then become operators that DTensor shards itself. The
decomposition has no ``mse_loss``, whose gradient on a batch-sharded DTensor is wrong by the number of shards in torch
2.13.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

__all__ = ["register_when_imported"]

_MODULE = "torch.distributed.tensor"
_DECOMPOSED = {
    "linear_mse_loss": torch.ops.torchintro._linear_mse_loss_decomposed.default,
    "_linear_mse_loss_grads": torch.ops.torchintro._linear_mse_loss_grads_decomposed.default,
}


def _register(module: ModuleType) -> None:
    for name, decomposed in _DECOMPOSED.items():

        def rule(
            cls: type, func: Any, types: Any, args: Any, kwargs: Any, decomposed: torch._ops.OpOverload = decomposed
        ) -> Any:
            return decomposed.decompose(*args, **(kwargs or {}))

        torch.library.register_torch_dispatch(f"torchintro::{name}", module.DTensor, rule)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it has the real finders find the module, and registers once the module has run."""

    _asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:  # stays until now: whoever asked for the spec need not have imported it
                    sys.meta_path.remove(self)
                    _register(module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Register the rules now if DTensor is there, else as soon as it is: importing it takes half a second."""
    module = sys.modules.get(_MODULE)
    if module is not None and hasattr(module, "DTensor"):
        _register(module)
    else:
        sys.meta_path.insert(0, _AfterImport())
