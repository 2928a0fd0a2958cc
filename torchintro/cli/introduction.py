"""The introduction: PyTorch's six steps of supervised learning on the diabetes data, with this package's operator."""

from __future__ import annotations

import contextlib
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

EPOCHS = 100
TEST_FRACTION = 0.2


def run_demo(folder: Path, *, seed: int, trials: int, console: Console) -> None:
    """Go through the six steps, printing what each shows, and leave the model and two plots in ``folder``."""
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
    source = {"data": dataset.name, "rows": len(dataset), "test_fraction": TEST_FRACTION, "seed": seed}
    metadata = {**source, "lr": lr, "epochs": EPOCHS, "engine": result.engine, "metrics": {"held out": metrics}}
    names = {"feature_names": dataset.feature_names, "target_names": dataset.target_names}
    save_model(folder / "model.pt", model, metadata=metadata, **names)
    curve = {"training": result.losses.tolist()}
    plots.plot_loss_by_epoch(folder / "loss.png", curve, title=f"Training at lr = {lr:.3g}")
    plots.plot_loss_by_lr(folder / "lr.png", lrs, losses, title="Tuning", ylabel="validation loss")
    console.print("  model.pt   the model\n  loss.png   loss by epoch\n  lr.png     loss against learning rate")
    console.print("Next:", style="italic")
    model_file = folder / "model.pt"
    console.print(f"  torchintro evaluate --data diabetes --held-out --model {model_file}", soft_wrap=True)


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
    device = torch.device("cpu")
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # where the operator was not built for this GPU
            one = torch.ones(1, 1, device="cuda")
            functional.linear_mse_loss(one, one, one).item()
            device = one.device
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

    _heading(console, "5  Training", "First, Optuna looks for a learning rate. Some of the training rows judge it.")
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
    ranked = sorted(study.trials, key=lambda trial: trial.values[0])
    pairs = [(trial.values[0], trial.params["lr"], trial.user_attrs) for trial in ranked]
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
        ours, theirs = attributes["seconds_per_epoch"] * 1e6, attributes["reference_seconds_per_epoch"] * 1e6
        table.add_row(f"  {lr:.5f}", f"{loss:.1f}", f"{attributes['train_loss']:.1f}", f"{ours:.3g}", f"{theirs:.0f}")
    console.print(table)
    lr = best_lr(study)
    if lr is None:  # standardised features and lr <= 0.1: it takes other data to get here
        raise ArithmeticError("demo: every learning rate diverged")
    return lr, [pair[1] for pair in pairs], [pair[0] for pair in pairs]


def _training(
    console: Console, train: Dataset, standardize: Standardize, lr: float, seed: int
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
    exact, constant = (initial_linear(train.X.shape[1], 1, device=train.X.device) for _ in range(2))
    with torch.no_grad():
        exact.weight.copy_(solution[:-1].T)
        exact.bias.copy_(solution[-1])
        constant.weight.zero_()
        constant.bias.copy_(train.y.mean())
    table = report.table("  model", "MSE train", "held out", "RMSE", "MAE", "R2")
    metrics: dict[str, float] = {}
    least_squares = nn.Sequential(standardize, exact)
    names = ("mean of y", "least squares, exact", "gradient descent")
    for name, candidate in zip(names, (constant, least_squares, model), strict=True):
        metrics = evaluate(candidate, test.X, test.y)
        digits = {"mse": 1, "rmse": 2, "mae": 2, "r2": 3}
        train_mse = evaluate(candidate, train.X, train.y)["mse"]
        table.add_row(f"  {name}", f"{train_mse:.1f}", *(f"{metrics[key]:.{count}f}" for key, count in digits.items()))
    console.print(table)
    return metrics


def _comparison(console: Console, train: Dataset, standardize: Standardize, seed: int) -> None:
    sentence = "Time of the loss and its gradients of weight and bias, measured here and now."
    _heading(console, "Fused against plain PyTorch", sentence)
    device = train.X.device
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(200_000, 16, generator=generator).to(device)
    W, b = initial_linear(16, 1, seed=seed).to(device).parameters()
    y = X.sum(1, keepdim=True)
    table = report.table("  X", "fused, us", "plain, us", "plain/fused", "fused loss", "plain loss")
    diabetes = initial_linear(train.X.shape[1], 1, seed=seed, device=device)
    for step in ((standardize(train.X), diabetes.weight, train.y, diabetes.bias), (X, W, y, b)):
        fused, fused_seconds = _timed(functional.linear_mse_loss, *step)
        plain, plain_seconds = _timed(reference.linear_mse_loss, *step)
        figures = (f"{fused_seconds * 1e6:.1f}", f"{plain_seconds * 1e6:.1f}", f"{plain_seconds / fused_seconds:.2f}")
        table.add_row(f"  {step[0].shape[0]} x {step[0].shape[1]}", *figures, f"{fused:.6g}", f"{plain:.6g}")
    console.print(table)


def _timed(operator: Callable[..., Tensor], X: Tensor, weight: Tensor, y: Tensor, bias: Tensor) -> tuple[float, float]:
    """Return the loss and the median time of a step, of as many as take a fifth of a second."""

    def step() -> float:
        loss = operator(X, weight, y, linear_bias=bias)
        torch.autograd.grad(loss, (weight, bias))
        return loss.item()

    timer = benchmark.Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return step(), timer.blocked_autorange(min_run_time=0.2).median
