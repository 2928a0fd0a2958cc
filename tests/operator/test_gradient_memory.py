"""Large gradients on the CPU reuse each other's memory, never while somebody still holds it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from programs import python_path

import torchintro

ROWS, FEATURES = 1 << 16, 160  # 42 MB of float32

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux only")


def input_gradient(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, FEATURES, generator=generator).requires_grad_()
    w = torch.randn(1, FEATURES, generator=generator)
    t = torch.randn(ROWS, 1, generator=generator)
    torchintro.linear_mse_loss(x, w, t).backward()
    assert x.grad is not None
    return x.grad


def test_memory_that_is_given_back_serves_the_next_gradient() -> None:
    first = input_gradient()
    address = first.data_ptr()
    del first
    gc.collect()
    assert input_gradient().data_ptr() == address


def test_memory_that_is_held_does_not() -> None:
    held = [input_gradient(seed) for seed in range(4)]
    copies = [gradient.clone() for gradient in held]
    input_gradient(5)
    assert len({gradient.data_ptr() for gradient in held}) == len(held)
    assert all(torch.equal(gradient, copy) for gradient, copy in zip(held, copies, strict=True))


def test_a_gradient_is_an_ordinary_tensor() -> None:
    gradient = input_gradient()
    expected = gradient.clone()
    view = gradient[100:200]
    del gradient
    input_gradient(1)
    assert torch.equal(view, expected[100:200])  # a view keeps the memory
    grown = input_gradient()
    grown.resize_(2 * ROWS, FEATURES)
    assert torch.equal(grown[:ROWS], expected)
    shared = input_gradient().share_memory_()
    assert torch.equal(shared, expected)


def test_several_threads_at_once() -> None:
    expected = [input_gradient(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            for seed, gradient in enumerate(pool.map(input_gradient, range(3))):
                assert torch.equal(gradient, expected[seed])


@pytest.mark.slow
def test_nothing_is_kept_where_it_is_not_wanted() -> None:
    program = """
from pathlib import Path
from test_gradient_memory import input_gradient
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
input_gradient()
before = resident()
gradient = input_gradient()
during = resident()
size = gradient.nbytes
del gradient
print((during - before) / size, (resident() - before) / size)
"""
    shares = {}
    for keep in ("0", "1"):
        environment = {
            **os.environ,
            "TORCHINTRO_KEEP_MEMORY": keep,
            "PYTHONPATH": python_path(Path(__file__).parent),
            "MALLOC_MMAP_THRESHOLD_": "65536",  # else malloc keeps the input's memory
        }
        command = [sys.executable, "-c", program]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        shares[keep] = [float(share) for share in run.stdout.split()]
    assert shares["0"][0] > 0.9  # a gradient's memory appears with it
    assert shares["0"][1] < 0.5  # and goes with it
    assert shares["1"][0] < 0.5  # kept: it was there already
