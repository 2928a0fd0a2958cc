"""``torchintro info``: versions, what was built in, devices, and the kernels that calls will use."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata

import torch

from .. import _C
from .. import _extension as _library
from .._version import __version__

_OPERATOR = "torchintro::linear_mse_loss"
_KEYS = ("CPU", "CUDA", "Meta", "Autograd", "AutocastCPU", "AutocastCUDA", "FuncTorchBatched")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Name the processor as the system does; platform.processor() is empty on Linux."""
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _choice(chosen: str, variable: str) -> str:
    forced = os.environ.get(variable)
    return chosen + (f" ({variable}={forced})" if forced else "")


def collect() -> dict[str, object]:
    """Gather the report that ``torchintro info`` prints, made to be pasted into a bug report.

    Returns:
        Label to value, in the order to print them.

    Example:
        >>> collect()["torchintro"] == __version__
        True
    """
    build = _C.build_info()
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    kernels = "built and used" if torch.cuda.is_available() else "built, but no CUDA device is available"
    registered = [key for key in _KEYS if torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATOR, key)]
    return {
        "torchintro": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "optuna": _version("optuna"),
        "built for torch": build["torch"],
        "built with": f"{build['compiler']}, C++{build['cxx_standard'] // 100 % 100}",
        "built for CUDA": f"{build['cuda']} ({build['cuda_architectures']})" if build["cuda"] else "no",
        "operator library": str(_library.library_path()),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "CPU kernels": _choice(_C.cpu_level(), "TORCHINTRO_CPU_LEVEL"),
        "CPU matrix products": _choice(_C.matrix_route(), "TORCHINTRO_MATRIX_ROUTE"),
        "CUDA devices": ", ".join(devices) or "none",
        "CUDA kernels": kernels if build["cuda"] else "not built: CUDA tensors use PyTorch's own operators",
        "registered for": ", ".join(registered),
    }


def info() -> None:
    """Print what a bug report needs: versions, what is built in, devices and the kernels that will be used."""
    report = collect()
    width = max(len(label) for label in report)
    for label, value in report.items():
        print(f"{label:<{width}}  {value}")
