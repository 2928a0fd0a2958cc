"""A build with CUDA, on a machine that may have no GPU: it imports, and no operator lacks its CUDA kernel."""

from __future__ import annotations

import pytest
import torch

import torchintro  # noqa: F401  registers the operators
from torchintro import _C

NAMESPACE = "torchintro::"

pytestmark = pytest.mark.skipif(_C.build_info()["cuda"] == "", reason="built without CUDA")


def operators_with_kernel(dispatch_key: str) -> set[str]:
    """The operators of this package with a kernel of their own for a dispatch key (a fallback does not count)."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key(dispatch_key)
    return {name for name in registered if name.startswith(NAMESPACE)}


def test_every_operator_has_a_cuda_kernel() -> None:
    on_cpu = operators_with_kernel("CPU")
    assert {f"{NAMESPACE}linear_mse_loss", f"{NAMESPACE}_linear_mse_loss_grads"} <= on_cpu
    missing = {name for name in on_cpu if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")}
    assert not missing, f"no CUDA kernel: {sorted(missing)}"
    assert operators_with_kernel("CUDA") == on_cpu


def test_build_info_names_the_architectures() -> None:
    info = _C.build_info()
    assert info["cuda"] == torch.version.cuda
    assert info["cuda_architectures"]
