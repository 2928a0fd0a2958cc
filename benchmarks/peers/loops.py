"""Training loops as users write them: by hand, over a DataLoader, compiled, and as a CUDA graph."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset

from ..timing import Call
from ..work import Unavailable, first_line

__all__ = [
    "STEPS_A_CALL",
    "Batches",
    "Steps",
    "all_rows",
    "captured",
    "compiled_steps",
    "learning_rates",
    "loaded",
    "ordered",
    "plain_steps",
    "sampled",
    "shuffled",
    "slices",
    "train",
    "tried",
]

Batches: TypeAlias = "Callable[[Tensor, Tensor], Iterator[tuple[Tensor, Tensor]]]"
# So many steps on the same rows, with the learning rate a number or a tensor; returns the last loss before its update.
Steps: TypeAlias = "Callable[[Tensor, Tensor, Tensor, Tensor, float | Tensor], Tensor]"

# Full-batch steps that one compiled call makes. Measured for 100 epochs of 100 x 1 on two cores: eager 8.5 ms; one step
# a call 4.1 ms; 10 steps 0.65 ms, compiled in 2.6 s; all 100 steps 0.26 ms, compiled in 19 s.
STEPS_A_CALL = 25


def all_rows(X: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the full batch."""
    yield X, y


def slices(size: int, X: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows in their order, which copies nothing."""
    for start in range(0, X.shape[0], size):
        yield X[start : start + size], y[start : start + size]


def shuffled(size: int, X: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of a permutation that is drawn anew and is the same each time."""
    order = torch.randperm(X.shape[0], generator=torch.Generator().manual_seed(0)).to(X.device)
    yield from ordered(order, size, X, y)


def ordered(order: Tensor, size: int, X: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of a given permutation."""
    for rows in torch.split(order, size):
        yield X[rows], y[rows]


def loaded(size: int, shuffle: bool, X: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of the tutorials' DataLoader, whose permutation is the same each time."""
    dataset = TensorDataset(X, y)
    # What shuffle=True and False make; given by name so that the permutation has a seed of its own.
    sampler = _random_sampler(dataset) if shuffle else SequentialSampler(dataset)
    yield from DataLoader(dataset, batch_size=size, sampler=sampler)


def sampled(size: int, X: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same batches as a shuffling DataLoader, quickly."""
    yield from ordered(torch.tensor(list(_random_sampler(TensorDataset(X)))), size, X, y)


def _random_sampler(dataset: TensorDataset) -> RandomSampler:
    return RandomSampler(dataset, generator=torch.Generator().manual_seed(0))


def learning_rates(low: float, high: float, count: int) -> list[float]:
    """Return so many learning rates, evenly spaced by their logarithm."""
    ends = math.log10(low), math.log10(high)
    rates: list[float] = torch.logspace(*ends, count, dtype=torch.float64).tolist()
    return rates


def train(model: nn.Linear, X: Tensor, y: Tensor, lr: float, epochs: int, batches: Batches = all_rows) -> Tensor:
    """Train as the introduction does, by hand; return the last loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss = torch.tensor(math.nan)
    for _ in range(epochs):
        for X_batch, y_batch in batches(X, y):
            optimizer.zero_grad()
            loss = F.mse_loss(model(X_batch), y_batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return loss.detach()


def _loss(weight: Tensor, bias: Tensor, X: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(F.linear(X, weight, bias), y)


_value_and_gradients = torch.func.grad_and_value(_loss, argnums=(0, 1))


def plain_steps(steps: int, weight: Tensor, bias: Tensor, X: Tensor, y: Tensor, lr: float | Tensor) -> Tensor:
    """Make steps of gradient descent on the same rows, in place; return the last loss, which is before its update.

    By functions instead of ``backward()`` and an optimizer, so that ``torch.compile`` makes one piece of it.
    """
    loss = torch.empty(())
    for _ in range(steps):
        (d_weight, d_bias), loss = _value_and_gradients(weight, bias, X, y)
        weight.sub_(lr * d_weight)
        bias.sub_(lr * d_bias)
    return loss


def compiled_steps(compile: bool, steps: int) -> Steps:
    """Return :func:`plain_steps` through ``torch.compile``.

    Raises:
        Unavailable: It is left out of this run.
    """
    if not compile:
        raise Unavailable("torch.compile is left out of this run")
    # What was compiled before counts towards a limit after which torch.compile gives up silently.
    torch.compiler.reset()
    run: Steps = torch.compile(functools.partial(plain_steps, steps), dynamic=False, fullgraph=True)
    return run


def tried(call: Call, what: str) -> Call:
    """Run a call once, which compiles or captures it, and return it.

    Raises:
        Unavailable: It failed.
    """
    try:
        call()
    except Exception as error:  # whatever the compiler behind torch.compile, or CUDA, raises
        raise Unavailable(f"{what} failed here: {first_line(error)}") from None
    return call


def captured(call: Call, device: torch.device) -> Call:
    """Return the replay of a CUDA graph of a call, which must have no result and must not wait for the GPU.

    The call runs three times on a side stream first, as capturing asks for, so that whatever it trains must be set
    afterwards.

    Raises:
        Unavailable: There is no GPU, or capturing failed.
    """
    if device.type != "cuda":
        raise Unavailable("a CUDA graph needs a GPU")
    try:
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever CUDA raises
        raise Unavailable(f"a CUDA graph failed here: {first_line(error)}") from None
    return graph.replay
