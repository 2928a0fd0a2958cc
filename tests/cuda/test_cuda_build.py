"""A build with CUDA, on a machine that may have no GPU: which kernels it has, for which architectures, and how made."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

import torchintro
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
    on_cpu -= {f"{NAMESPACE}linear_statistics_fit"}  # whose tensors are on the CPU, wherever the rows were
    missing = {name for name in on_cpu if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")}
    assert not missing, f"no CUDA kernel: {sorted(missing)}"
    assert operators_with_kernel("CUDA") == on_cpu


@pytest.mark.parametrize("key", ["Autograd", "AutocastCUDA", "Meta"])
def test_the_operator_has_a_kernel_for_every_key_of_a_cuda_call(key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}linear_mse_loss", key)


def test_build_info_names_the_architectures() -> None:
    info = _C.build_info()
    assert info["cuda"] == torch.version.cuda
    assert info["cuda_architectures"]


def cuobjdump(*arguments: str) -> str:
    """What the toolkit's cuobjdump, or the one that Triton brings along, says of the library of the operators."""
    candidates = [shutil.which("cuobjdump"), f"{CUDA_HOME}/bin/cuobjdump"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(f"{Path(triton.origin).parent}/backends/nvidia/bin/cuobjdump")
    program = next((path for path in candidates if path is not None and Path(path).exists()), None)
    if program is None:
        pytest.skip("no cuobjdump")
    command = [program, *arguments, torchintro.library_path()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def architectures() -> tuple[set[str], set[str]]:
    """Those that the build was asked for: machine code, and PTX for whatever comes later."""
    asked = _C.build_info()["cuda_architectures"]
    if not re.fullmatch(r"(\d+\.\d+a?f?(\+PTX)?[; ]?)+", asked):
        pytest.skip(f"built for '{asked}'")
    names = re.split("[; ]", asked.strip("; "))
    number = {name: name.removesuffix("+PTX").replace(".", "") for name in names}
    return set(number.values()), {number[name] for name in names if name.endswith("+PTX")}


def test_the_library_holds_code_for_the_architectures() -> None:
    machine_code, ptx = architectures()
    assert set(re.findall(r"\.sm_(\w+)\.cubin", cuobjdump("--list-elf"))) == machine_code
    assert set(re.findall(r"\.sm_(\w+)\.ptx", cuobjdump("--list-ptx"))) == ptx


def resource_usage() -> Iterator[tuple[str, dict[str, int]]]:
    """Of each kernel for each architecture, its name and what ptxas allotted to it."""
    architecture = name = ""
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = f"{architecture} {match[1]}"
        elif name and (usage := dict(re.findall(r"(\w+):(\d+)", line))):
            yield name, {key: int(value) for key, value in usage.items()}
            name = ""


# A few values that loops do not change may lie in local memory; an array of what a loop works with has more.
A_FEW_BYTES = 32


def test_no_kernel_keeps_an_array_in_local_memory() -> None:
    usage = dict(resource_usage())
    assert any("residual" in name for name in usage)
    local = {name: used["STACK"] + used["LOCAL"] for name, used in usage.items()}
    spills = {name: size for name, size in local.items() if size > A_FEW_BYTES}
    listed = "\n".join(f"{size} bytes: {name}" for name, size in sorted(spills.items()))
    assert not spills, f"local memory of {len(spills)} of {len(usage)} kernels:\n{listed}"
