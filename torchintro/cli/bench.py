"""``torchintro bench``: a few steps of the fused operator beside plain PyTorch and torch.compile, verified and timed.

The full benchmark, with more peers, the machine's limits and targets, is ``python -m benchmarks`` in a checkout.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Optional

import torch
import typer
from rich import box
from rich.table import Column, Table
from torch import Tensor
from torch.utils.benchmark import Timer

from .. import _C, functional, reference
from .info import collect
from .shell import console

# Fused may be so many times as far from float64 as plain PyTorch, which can be close by luck, and units of the dtype.
ERROR_FACTOR, ERROR_UNITS = 4.0, 2.0
PEERS = ("eager", "compiled", "fused")


class Shape(NamedTuple):
    """A step's sizes, and what has a gradient."""

    rows: int
    in_features: int
    out_features: int
    gradients: tuple[str, ...] = ("linear_weight", "linear_bias")

    def __str__(self) -> str:
        input_gradient = ", dX" if "input" in self.gradients else ""
        return f"{self.rows} x {self.in_features} -> {self.out_features}{input_gradient}"


SHAPES = (
    Shape(100, 1, 1),
    Shape(65536, 64, 1),
    Shape(65536, 1024, 1),
    Shape(4096, 1024, 1024, ("input", "linear_weight", "linear_bias")),
)


def bench(
    device: Annotated[str, typer.Option(help="cpu or cuda. Default: both, where there is a GPU.")] = "",
    path: Annotated[Optional[Path], typer.Option("--json", help="Also write the figures to this file.")] = None,  # noqa: UP045
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes and little time: does everything work?")] = False,
) -> None:
    """Time one step of plain PyTorch, torch.compile and the fused operator, after checking that they agree."""
    table = Table(Column("N x D -> O", no_wrap=True), "device", *PEERS, "speed-up", box=box.SIMPLE)
    results: list[dict[str, Any]] = []
    for where, shape in itertools.product(_devices(device), SHAPES):
        if quick:
            n, d, o, gradients = shape
            shape = Shape(min(n, 1024), min(d, 128), min(o, 128), gradients)
        tensors = _tensors(shape, where)
        wrong = _disagreement(tensors, shape)
        times, skipped = ({}, "") if wrong else _times(tensors, shape, min_run_time=0.005 if quick else 0.5)
        medians = {peer: f"{figures['median'] * 1e3:.4g} ms" for peer, figures in times.items()}
        ratio = f"{times['eager']['median'] / times['fused']['median']:.2f}x" if times else "wrong"
        table.add_row(str(shape), where, *(medians.get(peer, "-") for peer in PEERS), ratio)
        found = {"device": where, "dtype": "float32", "seconds": times, "skipped": skipped, "wrong": wrong}
        results.append({"shape": str(shape), **shape._asdict(), **found})
    console.print(table)
    for reason in dict.fromkeys(result["skipped"] for result in results if result["skipped"]):
        console.print(reason, soft_wrap=True)
    if path is not None:
        path.write_text(json.dumps({"quick": quick, "machine": collect(), "results": results}, indent=1) + "\n")
        console.print(f"written to {path}", soft_wrap=True)
    failures = [result for result in results if result["wrong"]]
    for result in failures:
        typer.echo(f"torchintro: bench: {result['shape']} on {result['device']}: {result['wrong']}", err=True)
    if failures:
        raise typer.Exit(1)


def _devices(device: str) -> list[str]:
    if device not in ("", "cpu", "cuda"):
        raise ValueError(f"bench: --device must be cpu or cuda, but got {device!r}")
    there = torch.cuda.is_available() and bool(_C.build_info()["cuda"])
    if device == "cuda" and not there:
        raise ValueError("bench: --device cuda needs a GPU and a build with CUDA kernels; see torchintro info")
    return [device] if device else ["cpu", *(["cuda"] if there else [])]


def _tensors(shape: Shape, device: str) -> dict[str, Tensor]:
    random = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    return {
        "input": random(shape.rows, shape.in_features),
        "linear_weight": random(shape.out_features, shape.in_features) / math.sqrt(shape.in_features),
        "linear_bias": random(shape.out_features),
        "target": random(shape.rows, shape.out_features),
    }


def _step(operator: Callable[..., Tensor], tensors: dict[str, Tensor], shape: Shape) -> Callable[[], list[Tensor]]:
    """Return a step, forward and backward, which returns the loss and the gradients."""
    made = {name: tensor.detach().requires_grad_(name in shape.gradients) for name, tensor in tensors.items()}
    leaves = [made[name] for name in shape.gradients]

    def step() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        loss = operator(**made)
        loss.backward()  # type: ignore[no-untyped-call]
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    return step


def _disagreement(tensors: dict[str, Tensor], shape: Shape) -> str:
    """Return what of the fused step is further from float64 than rounding explains, in words, or an empty string."""
    exact = _step(reference.linear_mse_loss, {name: x.double() for name, x in tensors.items()}, shape)()
    eager = _step(reference.linear_mse_loss, tensors, shape)()
    fused = _step(functional.linear_mse_loss, tensors, shape)()
    if len(fused) != len(exact):
        return "the fused operator leaves out a gradient"
    norm = torch.linalg.vector_norm
    for name, ours, theirs, right in zip(("loss", *shape.gradients), fused, eager, exact, strict=True):
        error, eager_error = (float(norm(found.double() - right) / norm(right)) for found in (ours, theirs))
        allowed = ERROR_FACTOR * eager_error + ERROR_UNITS * torch.finfo(ours.dtype).eps
        if not error <= allowed:
            return f"the fused {name} has an error of {error:.2e}, where {allowed:.2e} is allowed"
    return ""


def _times(tensors: dict[str, Tensor], shape: Shape, min_run_time: float) -> tuple[dict[str, dict[str, float]], str]:
    """Time the three; return their figures, and why torch.compile is not among them, or an empty string."""
    torch.compiler.reset()  # else torch.compile gives up silently after some shapes
    plain, fused = reference.linear_mse_loss, functional.linear_mse_loss
    times, skipped = {}, ""
    for peer, operator in zip(PEERS, (plain, torch.compile(plain, dynamic=False), fused), strict=True):
        step = _step(operator, tensors, shape)
        try:
            step()
        except Exception as error:  # whatever the compiler behind torch.compile raises
            if peer != "compiled":
                raise
            skipped = f"torch.compile cannot run here: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
            continue
        timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        measured = timer.blocked_autorange(min_run_time=min_run_time)
        times[peer] = {"median": measured.median, "iqr": measured.iqr}
    return times, skipped
