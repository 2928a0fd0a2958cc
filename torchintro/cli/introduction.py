"""The introduction: PyTorch's six steps of supervised learning on the diabetes data, with this package's operator."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils import benchmark

from .. import _checks, functional, reference
from ..data import datasets
from ..data.datasets import Dataset
from ..evaluation import evaluate
from ..nn import LinearMSELoss, Standardize, initial_linear
from ..saving import save_model
from ..training.fit import FitResult, fit
from . import plots, report

__all__ = ["run_demo"]

EPOCHS = 100
TEST_FRACTION = 0.2


def run_demo(folder: Path, *, seed: int, trials: int, console: Console) -> None:
    """Go through the six steps, printing what each shows, and leave the model and two plots in ``folder``.

    Args:
        folder: Where the files go; it is made if need be.
        seed: Seed of the split, the parameters and the search.
        trials: Number of learning rates to try.
        console: Where the text goes.
    """
    trials = _checks.positive_integer("demo", "trials", trials)
    dataset = datasets.diabetes()
    device = _tensors(console)
    folder.mkdir(parents=True, exist_ok=True)
    _autograd(console, device, seed)
    _model(console, dataset.to(device), seed)
    train, test, standardize = _preprocessing(console, dataset.to(device), seed)
    lr, lrs, losses = _tuning(console, train, seed, trials)
    model, result = _training(console, train, standardize, lr, seed)
    metrics = _evaluation(console, model, train, test)
    _comparison(console, train, standardize, seed)

    _heading(console, f"Files in {folder}", "The model, which takes features in their own units, and two plots.")
    metadata = {
        "data": dataset.name,
        "rows": len(dataset),
        "test_fraction": TEST_FRACTION,
        "seed": seed,
        "lr": lr,
        "epochs": EPOCHS,
        "engine": result.engine,
        "metrics": {"held out": metrics},
    }
    names = {"feature_names": dataset.feature_names, "target_names": dataset.target_names}
    save_model(folder / "model.pt", model, metadata=metadata, **names)
    curve = {"training": result.losses.tolist()}
    plots.plot_loss_by_epoch(folder / "loss.png", curve, title=f"Training at lr = {lr:.3g}")
    plots.plot_loss_by_lr(folder / "lr.png", lrs, losses, ylabel="validation loss")
    console.print("  model.pt   the model")
    console.print("  loss.png   loss by epoch")
    console.print("  lr.png     loss against learning rate")
    console.print("Next:", style="italic")
    command = f"torchintro evaluate --data diabetes --held-out --model {folder / 'model.pt'}"
    console.print(f"  {command}", soft_wrap=True)


def _heading(console: Console, title: str, sentence: str) -> None:
    console.print()
    console.print(title, style="bold")
    console.print(sentence, style="italic")


def _tensors(console: Console) -> torch.device:
    _heading(console, "1  Tensors", "Arrays on a device. On the CPU they can share memory with a NumPy array.")
    array = np.array([1.0, 2.0, 3.0])
    tensor = torch.from_numpy(array)
    array[0] = 10
    console.print("  array = np.array([1., 2., 3.]); tensor = torch.from_numpy(array)")
    console.print(f"  array[0] = 10     tensor is {tensor.tolist()}: one memory, nothing was copied")
    tensor[2] = 30
    console.print(f"  tensor[2] = 30    array is  {array.tolist()}")
    device = _device()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"threads: {torch.get_num_threads()}"
    console.print(f"  device: {device.type} ({where}), PyTorch {torch.__version__}")
    return device


def _device() -> torch.device:
    """Return the GPU if there is one that the operator was built for, otherwise the CPU."""
    if torch.cuda.is_available():
        try:
            one = torch.ones(1, 1, device="cuda")
            functional.linear_mse_loss(one, one, one).item()
            return torch.device("cuda")
        except RuntimeError:
            pass
    return torch.device("cpu")


def _autograd(console: Console, device: torch.device, seed: int) -> None:
    _heading(console, "2  Autograd", "PyTorch records what is computed and differentiates it, the fused operator too.")
    x = torch.tensor(2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(x**3 + 2 * x**2 + x, x)
    console.print(f"  d/dx (x**3 + 2*x**2 + x) at x = 2: {gradient.item():g}; by hand, 3*x**2 + 4*x + 1 = 21")
    generator = torch.Generator().manual_seed(seed)
    X, W, b, y = (torch.randn(s, generator=generator).to(device) for s in ((1000, 10), (1, 10), (1,), (1000, 1)))
    inputs = [tensor.requires_grad_() for tensor in (X, W, b)]
    fused = torch.autograd.grad(functional.linear_mse_loss(X, W, y, linear_bias=b), inputs)
    plain = torch.autograd.grad(reference.linear_mse_loss(X, W, y, linear_bias=b), inputs)
    difference = max(((f - p).abs().max() / p.abs().max()).item() for f, p in zip(fused, plain, strict=True))
    console.print("  gradients of X (1000 x 10), W and b by linear_mse_loss(X, W, y, linear_bias=b)")
    console.print(f"  and by F.mse_loss(F.linear(X, W, b), y): largest relative difference {difference:.1e}")


def _model(console: Console, dataset: Dataset, seed: int) -> None:
    _heading(console, "3  Model", "A linear layer predicts. The mean squared error says how wrong it is.")
    model = initial_linear(dataset.X.shape[1], 1, seed=seed, device=dataset.X.device)
    with torch.no_grad():
        plain = nn.MSELoss()(model(dataset.X), dataset.y).item()
        fused = LinearMSELoss.from_linear(model)(dataset.X, dataset.y).item()
    console.print(f"  model = nn.{model}")
    console.print(f"  {plain:.2f} = nn.MSELoss()(model(X), y), before any training")
    console.print(f"  {fused:.2f} = LinearMSELoss.from_linear(model)(X, y), in one pass over X")


def _preprocessing(console: Console, dataset: Dataset, seed: int) -> tuple[Dataset, Dataset, Standardize]:
    _heading(console, "4  Preprocessing", "Some rows are held out. The others give each feature's mean and deviation.")
    train, test = datasets.split(dataset, TEST_FRACTION, seed=seed)
    standardize = Standardize.fit(train.X)
    scaled = standardize(train.X)
    patients, features = dataset.X.shape
    console.print(f"  {patients} patients x {features} measurements; target: {dataset.target_names[0]} of the disease")
    console.print(f"  {len(train)} rows to train, {len(test)} held out")
    table = report.table("  feature", "mean", "deviation", "then mean", "deviation")
    shown = 3
    for i, name in enumerate(dataset.feature_names[:shown]):
        figures = [figure for X in (train.X, scaled) for figure in (X[:, i].mean(), X[:, i].std(correction=0))]
        table.add_row(f"  {name}", *(f"{round(figure.item(), 3) + 0:.3f}" for figure in figures))
    table.add_row(f"  ({len(dataset.feature_names) - shown} more)")
    console.print(table)
    return train, test, standardize


def _tuning(console: Console, train: Dataset, seed: int, trials: int) -> tuple[float, list[float], list[float]]:
    from ..tuning.tune import best_lr, tune  # Optuna takes a second to import, and the steps above need not wait for it

    _heading(
        console,
        "5  Training",
        "First, Optuna looks for a learning rate. Some of the training rows judge it.",
    )
    fitted, validation = datasets.split(train, TEST_FRACTION, seed=seed)
    standardize = Standardize.fit(fitted.X)
    start = time.perf_counter()
    study = tune(
        standardize(fitted.X),
        fitted.y,
        n_trials=trials,
        epochs=EPOCHS,
        validation=(standardize(validation.X), validation.y),
        seed=seed,
        benchmark=True,
    )
    seconds = time.perf_counter() - start
    trials_done = sorted(study.trials, key=lambda trial: trial.values[0])
    pairs = [(trial.values[0], trial.params["lr"], trial.user_attrs) for trial in trials_done]
    spent, plain = (
        sum(attributes[name] * attributes["epochs"] for _, _, attributes in pairs)
        for name in ("seconds_per_epoch", "reference_seconds_per_epoch")
    )
    count, measured = len(pairs), pairs[0][2]["reference_epochs"]
    console.print(f"  {count} trials of {EPOCHS} epochs, lr from 1e-4 to 1e-1, by the engine {pairs[0][2]['engine']}:")
    took, besides, plain_took = (report.duration(figure) for figure in (spent, seconds, plain))
    console.print(f"  they took {took} to train ({besides} with Optuna and timing plain PyTorch);")
    console.print(f"  plain PyTorch would have taken {plain_took} (measured on {measured} epochs). The best:")
    table = report.table("  lr", "validation loss", "training loss", "us/epoch", "plain PyTorch")
    for loss, lr, attributes in pairs[:5]:
        table.add_row(
            f"  {lr:.5f}",
            f"{loss:.1f}",
            f"{attributes['train_loss']:.1f}",
            f"{attributes['seconds_per_epoch'] * 1e6:.3g}",
            f"{attributes['reference_seconds_per_epoch'] * 1e6:.0f}",
        )
    console.print(table)
    lr = best_lr(study)
    if lr is None:  # standardised features and lr <= 0.1: it takes other data to get here
        raise ArithmeticError("demo: every learning rate diverged")
    return lr, [pair[1] for pair in pairs], [pair[0] for pair in pairs]


def _training(
    console: Console,
    train: Dataset,
    standardize: Standardize,
    lr: float,
    seed: int,
) -> tuple[nn.Sequential, FitResult]:
    console.print(f"Then a model is trained on all {len(train)} training rows with lr = {lr:.5f}.", style="italic")
    linear = initial_linear(train.X.shape[1], 1, seed=seed, device=train.X.device)
    shown = report.EpochReport(console, EPOCHS, indent="  ")
    result = fit(linear, standardize(train.X), train.y, lr=lr, epochs=EPOCHS, seed=seed, progress=shown)
    console.print(f"  {EPOCHS} epochs took {report.duration(result.seconds)}")
    return nn.Sequential(standardize, linear), result


def _evaluation(console: Console, model: nn.Sequential, train: Dataset, test: Dataset) -> dict[str, float]:
    _heading(console, "6  Evaluation", "The rows held out judge the model, beside a constant and the exact solution.")
    standardize = model[0]
    ones = torch.ones(len(train), 1, device=train.X.device)
    solution = torch.linalg.lstsq(torch.cat([standardize(train.X), ones], dim=1), train.y).solution
    exact = initial_linear(train.X.shape[1], 1, device=train.X.device)
    constant = initial_linear(train.X.shape[1], 1, device=train.X.device)
    with torch.no_grad():
        exact.weight.copy_(solution[:-1].T)
        exact.bias.copy_(solution[-1])
        constant.weight.zero_()
        constant.bias.copy_(train.y.mean())
    table = report.table("  model", "MSE train", "held out", "RMSE", "MAE", "R2")
    metrics: dict[str, float] = {}
    for name, candidate in (
        ("mean of y", constant),
        ("least squares, exact", nn.Sequential(standardize, exact)),
        ("gradient descent", model),
    ):
        metrics = evaluate(candidate, test.X, test.y)
        table.add_row(
            f"  {name}",
            f"{evaluate(candidate, train.X, train.y)['mse']:.1f}",
            f"{metrics['mse']:.1f}",
            f"{metrics['rmse']:.2f}",
            f"{metrics['mae']:.2f}",
            f"{metrics['r2']:.3f}",
        )
    console.print(table)
    return metrics


def _comparison(console: Console, train: Dataset, standardize: Standardize, seed: int) -> None:
    _heading(
        console,
        "Fused against plain PyTorch",
        "Time of the loss and its gradients of weight and bias, measured here and now.",
    )
    device = train.X.device
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(200_000, 16, generator=generator).to(device)
    W, b = initial_linear(16, 1, seed=seed).to(device).parameters()
    y = X.sum(1, keepdim=True)
    table = report.table("  X", "fused, us", "plain, us", "plain/fused", "fused loss", "plain loss")
    diabetes = initial_linear(train.X.shape[1], 1, seed=seed, device=device)
    for inputs, weight, bias, target in (
        (standardize(train.X), diabetes.weight, diabetes.bias, train.y),
        (X, W, b, y),
    ):
        steps = [
            _step(operator, inputs, weight, bias, target)
            for operator in (functional.linear_mse_loss, reference.linear_mse_loss)
        ]
        losses, seconds = [step() for step in steps], [_seconds(step) for step in steps]
        table.add_row(
            f"  {inputs.shape[0]} x {inputs.shape[1]}",
            *(f"{value * 1e6:.1f}" for value in seconds),
            f"{seconds[1] / seconds[0]:.2f}",
            *(f"{loss:.6g}" for loss in losses),
        )
    console.print(table)


def _step(operator: Callable[..., Tensor], X: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Callable[[], float]:
    def step() -> float:
        loss = operator(X, weight, y, linear_bias=bias)
        torch.autograd.grad(loss, (weight, bias))
        return loss.item()

    return step


def _seconds(step: Callable[[], float]) -> float:
    """Return the median time of a step, of as many as take a fifth of a second."""
    timer = benchmark.Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.2).median
