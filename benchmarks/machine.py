"""The machine that the benchmark runs on: its description and its measured limits."""

from __future__ import annotations

import datetime
import functools
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchintro import _C
from torchintro._version import __version__

from .timing import Call, Effort, interleaved
from .units import dtype_name

__all__ = [
    "Limits",
    "Probe",
    "cpu_name",
    "describe",
    "free_memory",
    "matrix_probe",
    "measure_limits",
    "products_probe",
    "traffic_probe",
    "traffic_probes",
]

_PAGE = 1024

# What reads fastest differs from machine to machine, and between the caches and memory.
READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "vector_norm": torch.linalg.vector_norm,
    "dot": lambda x: torch.dot(x, x),
    # A matrix of a page a row by a vector that stays in the cache, and the other way around.
    "mv": lambda x: torch.mv(x.view(-1, _PAGE), x[:_PAGE]),
    "mv_t": lambda x: torch.mv(x.view(-1, _PAGE).t(), x[: x.numel() // _PAGE]),
}
COPIERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "copy_": lambda to, x: to.copy_(x),
    "neg": lambda to, x: torch.neg(x, out=to),
}
_CHOICE = Effort(block=0.002, seconds=0.1, rounds=(3, 7))  # to choose the way for one case

# Where a dtype's own products are emulated, or so slow that measuring them takes minutes, float32's rate is the limit.
MATRIX_DTYPES = (torch.float32, torch.bfloat16)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b.t())


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    # Not a public operator, but the only way to oneDNN where PyTorch itself chooses MKL.
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mm": _mm, "oneDNN": _onednn}


@dataclass(frozen=True)
class Probe:
    """A call that does nothing but reach one limit of the machine.

    Attributes:
        way: The operator that it uses.
        call: The call.
        amount: Bytes or operations of a call.
    """

    way: str
    call: Call
    amount: int


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most, as far as PyTorch's own operators show.

    Attributes:
        read: Bytes per second of reading.
        copy: Bytes per second of reading and writing as much, both counted.
        matrix: Operations per second of matrix products, by dtype.
        matrix_size: Side of the matrices.
        ways: The operator that reached each limit.
    """

    read: float
    copy: float
    matrix: dict[torch.dtype, float]
    matrix_size: int
    ways: dict[str, str]

    def matrix_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype whose rate stands for this one's: float32 if its own was not measured."""
        return dtype if dtype in self.matrix else torch.float32

    def rate(self, dtype: torch.dtype) -> float:
        """Return the matrix rate of a dtype."""
        return self.matrix[self.matrix_dtype(dtype)]

    def record(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {
            "read_bytes_per_second": self.read,
            "copy_bytes_per_second": self.copy,
            "matrix_operations_per_second": {str(dtype): rate for dtype, rate in self.matrix.items()},
            "ways": self.ways,
        }

    def lines(self) -> list[str]:
        """Return the figures for people."""
        rates = [f"read {self.read / 1e9:.1f} GB/s ({self.ways['read']})"]
        rates.append(f"copy {self.copy / 1e9:.1f} GB/s ({self.ways['copy']}, read + written)")
        for dtype, rate in self.matrix.items():
            rates.append(f"matrix {dtype_name(dtype)} {rate / 1e9:.0f} GFLOP/s ({self.ways[dtype_name(dtype)]})")
        return rates


def traffic_probes(limit: str, size: int, device: torch.device) -> list[Probe]:
    """Return a probe for each way of reading ``size`` bytes, or for ``"copy"`` of reading half and writing as many."""
    if limit == "copy":
        x = torch.ones(max(1, size // 8), device=device)
        to = torch.empty_like(x)
        return [Probe(way, functools.partial(copier, to, x), 2 * x.nbytes) for way, copier in COPIERS.items()]
    x = torch.ones(max(1, size // (4 * _PAGE)) * _PAGE, device=device)
    return [Probe(way, functools.partial(reader, x), x.nbytes) for way, reader in READERS.items()]


def traffic_probe(limit: str, size: int, device: torch.device) -> Probe:
    """Return the fastest of :func:`traffic_probes` for this many bytes."""
    probes = traffic_probes(limit, size, device)
    _, probe = _fastest(probes, _CHOICE, device)
    return probe


def matrix_probe(dtype: torch.dtype, way: str, size: int, device: torch.device) -> Probe:
    """Return a probe that multiplies two square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = PRODUCTS[way]
    return Probe(way, lambda: product(a, b), 2 * size**3)


def products_probe(X: Tensor, weight: Tensor, prediction: Tensor, gradients: Sequence[str]) -> Probe:
    """Return a probe that does a step's own products one after the other: X W', G W and G' X, as far as asked for.

    Args:
        X: ``(N, D)``.
        weight: ``(O, D)``.
        prediction: ``(N, O)``, whose values stand for those of its gradient G.
        gradients: Names of the tensors whose gradients the step computes.
    """
    products = [(X, weight.t())]
    if "input" in gradients:
        products.append((prediction, weight))
    if "linear_weight" in gradients:
        products.append((prediction.t(), X))
    made = [(a, b, torch.mm(a, b)) for a, b in products]

    def call() -> None:
        for a, b, out in made:
            torch.mm(a, b, out=out)

    return Probe("mm", call, sum(2 * a.numel() * b.shape[1] for a, b, _ in made))


def measure_limits(device: torch.device, effort: Effort, *, quick: bool) -> Limits:
    """Measure the limits of a device, each in several ways of which the fastest counts."""
    ways: dict[str, str] = {}

    def fastest(name: str, probes: list[Probe]) -> float:
        rate, probe = _fastest(probes, effort, device)
        ways[name] = probe.way
        return rate

    size = (1 << 24) if quick else (1 << 28) if device.type == "cpu" else (1 << 30)
    read = fastest("read", traffic_probes("read", size, device))
    copy = fastest("copy", traffic_probes("copy", size, device))
    side = 256 if quick else 2048 if device.type == "cpu" else 8192
    matrix = {}
    for dtype in MATRIX_DTYPES:
        probes = [matrix_probe(dtype, way, side, device) for way in PRODUCTS if _works(way, dtype, device)]
        matrix[dtype] = fastest(dtype_name(dtype), probes)
    return Limits(read, copy, matrix, side, ways)


def _fastest(probes: list[Probe], effort: Effort, device: torch.device) -> tuple[float, Probe]:
    """Return the greatest rate that any of the probes reached, and which."""
    timed = interleaved({probe.way: probe.call for probe in probes}, effort, device)
    # A limit is what was reached once, not what is reached on average.
    rates = [probe.amount / min(timed[probe.way].samples) for probe in probes]
    rate = max(rates)
    return rate, probes[rates.index(rate)]


def _works(way: str, dtype: torch.dtype, device: torch.device) -> bool:
    try:
        matrix_probe(dtype, way, 16, device).call()
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return True


def describe(device: torch.device) -> dict[str, Any]:
    """Return what a reader of the figures must know of the machine and of the software."""
    machine: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": _C.cpu_level(),
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        # Other work on the machine is the commonest reason for figures that nobody can repeat.
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "torchintro": __version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([*_program(), *sys.argv[1:]]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return machine


def _program() -> list[str]:
    path = Path(sys.argv[0])
    return ["python", "-m", path.parent.name] if path.name == "__main__.py" else [path.name]


def cpu_name() -> str:
    """Return the processor's model."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def free_memory(device: torch.device) -> float:
    """Return the bytes that a step can take without anything else giving way; infinity where nobody tells."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024.0
    except OSError:
        pass
    return math.inf
