"""The introduction: PyTorch's six steps of supervised learning on the diabetes data, with this package's operator."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from . import data, functional, plots, reference
from .artifacts import save_model
from .evaluation import evaluate
from .training import FitResult, fit, initial_linear

__all__ = ["run_demo"]

EPOCHS = 100


def run_demo(folder: Path, *, seed: int, trials: int, console: Console) -> None:
    """Go through the six steps, printing what each shows, and leave the model and two plots in ``folder``.

    Args:
        folder: Where the files go; it is made if need be.
        seed: Seed of the split, the parameters and the search.
        trials: Number of learning rates to try.
        console: Where the text goes.
    """
    device = _tensors(console)
    _autograd(console, device, seed)
    dataset = data.diabetes()
    _model(console, device, dataset, seed)
    train, test, standardize = _preprocessing(console, device, dataset, seed)
    lr, lrs, losses = _tuning(console, device, train, seed, trials)
    linear, result = _training(console, train, test, standardize, lr, seed)
    model = nn.Sequential(standardize, linear)
    metrics = _evaluation(console, model, train, test)
    _fused_against_plain(console, train, standardize, seed)

    folder.mkdir(parents=True, exist_ok=True)
    assert result.validation_losses is not None
    curves = {"training": result.losses.tolist(), "held-out": result.validation_losses.tolist()}
    files = {
        "the model": save_model(
            folder / "model.pt",
            model,
            feature_names=dataset.feature_names,
            target_names=dataset.target_names,
            metadata={
                "data": "diabetes",
                "rows": len(dataset),
                "test_fraction": 0.2,
                "seed": seed,
                "lr": lr,
                "epochs": EPOCHS,
                "engine": result.engine,
                "metrics": {"held-out": metrics},
            },
        ),
        "loss by epoch": plots.plot_loss_by_epoch(folder / "loss.png", curves, title=f"Diabetes, lr = {lr:.3g}"),
        "loss against lr": plots.plot_loss_by_lr(folder / "lr.png", lrs, losses, ylabel="validation loss (MSE)"),
    }
    _heading(console, f"Files in {folder}", "The trained model and two plots.")
    for what, path in files.items():
        console.print(f"  {path.name:<10} {what}")
    console.print(f"  Try: torchintro evaluate --model {folder / 'model.pt'} --data diabetes --held-out")


def _heading(console: Console, title: str, sentence: str) -> None:
    console.print()
    console.print(f"[bold]{title}[/bold]")
    console.print(f"[dim]{sentence}[/dim]")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="underline")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _tensors(console: Console) -> torch.device:
    _heading(console, "1. Tensors", "A tensor is an array on a device; on the CPU it can share a NumPy array's memory.")
    array = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    tensor = torch.from_numpy(array)
    array[0] = 10.0
    console.print("  array = np.array([1, 2, 3]); tensor = torch.from_numpy(array); array[0] = 10")
    console.print(f"  tensor: {tensor.tolist()}, shape {tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}")
    tensor[2] = 30.0
    console.print(f"  tensor[2] = 30 and the array holds {array.tolist()}: one memory, nothing was copied")
    device = _device()
    threads = torch.get_num_threads()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} thread{'s'[: threads != 1]}"
    console.print(f"  device of this run: {device.type} ({where}), PyTorch {torch.__version__}")
    return device


def _device() -> torch.device:
    """Return the GPU if there is one that the operator was built for, otherwise the CPU."""
    if torch.cuda.is_available():
        try:
            one = torch.ones(1, 1, device="cuda")
            functional.linear_mse_loss(one, one, one).item()
            return torch.device("cuda")
        except (RuntimeError, NotImplementedError):
            pass
    return torch.device("cpu")


def _autograd(console: Console, device: torch.device, seed: int) -> None:
    _heading(console, "2. Autograd", "PyTorch records what is computed and differentiates it; the fused operator joins in.")
    x = torch.tensor(2.0, requires_grad=True)
    (x**3 + 2 * x**2 + x).backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    console.print(f"  x**3 + 2*x**2 + x at x = 2: gradient {x.grad.item():g} (3*x**2 + 4*x + 1 = 21)")
    generator = torch.Generator().manual_seed(seed)
    X, W, b, y = (torch.randn(s, generator=generator).to(device) for s in ((1000, 10), (1, 10), (1,), (1000, 1)))
    fused, plain = (_gradients(operator, X, W, b, y) for operator in (functional, reference))
    difference = max(
        ((f - p).abs().max() / p.abs().max()).item() for f, p in zip(fused, plain, strict=True)
    )
    console.print("  linear_mse_loss(X, W, y, linear_bias=b) for 1000 x 10 rows, gradients of X, W and b beside those of")
    console.print(f"  F.mse_loss(F.linear(X, W, b), y): largest relative difference {difference:.1e}")


def _gradients(operator: object, X: Tensor, W: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    inputs = [tensor.clone().requires_grad_() for tensor in (X, W, b)]
    function: Callable[..., Tensor] = operator.linear_mse_loss  # type: ignore[attr-defined]
    return torch.autograd.grad(function(inputs[0], inputs[1], y, linear_bias=inputs[2]), inputs)


def _model(console: Console, device: torch.device, dataset: data.Dataset, seed: int) -> None:
    _heading(console, "3. Model", "A linear layer predicts; the criterion says how wrong it is: the mean squared error.")
    features = len(dataset.feature_names)
    model = initial_linear(features, 1, seed=seed, device=device)
    X, y = dataset.X.to(device), dataset.y.to(device)
    with torch.no_grad():
        plain = nn.MSELoss()(model(X), y).item()
        fused = functional.linear_mse_loss(X, model.weight, y, linear_bias=model.bias).item()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"  model = nn.{model}: {parameters} parameters")
    console.print(f"  nn.MSELoss()(model(X), y)                                       = {plain:.2f} before any training")
    console.print(f"  linear_mse_loss(X, model.weight, y, linear_bias=model.bias)     = {fused:.2f} in one pass over X")


def _preprocessing(
    console: Console, device: torch.device, dataset: data.Dataset, seed: int
) -> tuple[data.Dataset, data.Dataset, data.Standardize]:
    _heading(console, "4. Preprocessing", "Rows are held out for the end; each feature is shifted and scaled to mean 0 and deviation 1.")
    rows = torch.arange(len(dataset), device=device)
    on_device = data.Dataset(
        dataset.name, dataset.X.to(device), dataset.y.to(device), dataset.feature_names, dataset.target_names
    ).select(rows)
    train, test = data.split(on_device, 0.2, seed=seed)
    standardize = data.Standardize.fit(train.X)
    console.print(
        f"  {len(dataset)} patients x {dataset.X.shape[1]} measurements, target: {dataset.target_names[0]} after a year; "
        f"{len(train)} to train, {len(test)} held out"
    )
    scaled = standardize(train.X)
    table = _table("  feature", "mean", "deviation", "then mean", "deviation")
    for i, name in list(enumerate(dataset.feature_names))[:4]:
        before, after = train.X[:, i], scaled[:, i]
        figures = (before.mean(), before.std(correction=0), after.mean().abs(), after.std(correction=0))
        table.add_row(f"  {name}", *(f"{figure.item():.3f}" for figure in figures))
    table.add_row("  ...", *[""] * 4)
    console.print(table)
    return train, test, standardize
