"""A C++ program trains with the operator, from TorchScript and by the dispatcher, with no Python in the process."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import torchintro

EXAMPLES = Path(__file__).parents[2] / "examples"
COMPILER = os.environ.get("CXX", "g++")
STEPS, LEARNING_RATE = 5, 0.5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("cpp"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler ('{COMPILER}')"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """Compile and link the example, as its head says, with every warning an error."""
    path = tmp_path_factory.mktemp("cpp") / "example"
    command = [COMPILER, "-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    for folder in include_paths():
        command += ["-isystem", folder]
    command += [str(EXAMPLES / "cpp" / "main.cpp"), "-o", str(path)]
    for folder in library_paths():
        command += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    return path


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("torchscript") / "criterion.pt"
    runpy.run_path(str(EXAMPLES / "torchscript.py"))["export"](str(path))
    return path


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    # With nothing that Python has set up for itself in the environment.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment
    )


def train(loss_of, parameters) -> list[float]:
    losses = []
    for _ in range(STEPS):
        loss = loss_of()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in parameters:
                parameter -= LEARNING_RATE * parameter.grad
                parameter.grad = None
    return losses


def test_program_trains_as_python_does(program, module):
    result = run(program, torchintro.library_path(), module)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]

    # The same steps in plain PyTorch.
    x = torch.linspace(0, 1, 100).unsqueeze(1)
    y = 3 * x
    linear = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    expected = train(lambda: torch.nn.functional.mse_loss(linear(x), y), list(linear.parameters()))
    assert expected[-1] < expected[0] / 10

    for what in ("module", "operator"):
        printed = [line for line in lines if line[0] == what]
        assert [int(step) for _, step, _ in printed] == list(range(STEPS))
        assert [float(loss) for _, _, loss in printed] == pytest.approx(expected, rel=1e-5)
    assert lines[-2][0] == "learned"
    assert [float(value) for value in lines[-2][1:]] == pytest.approx(
        [linear.weight.item(), linear.bias.item()], rel=1e-5
    )
    assert lines[-1] == ["python", "no"]


def test_scripted_module_trains_in_python_too(module):
    criterion = torch.jit.load(module)
    x = torch.linspace(0, 1, 100).unsqueeze(1)
    again = torchintro.LinearMSELoss(1, 1)
    again.load_state_dict(criterion.state_dict())
    scripted = train(lambda: criterion(x, 3 * x), list(criterion.parameters()))
    assert scripted == train(lambda: again(x, 3 * x), list(again.parameters()))


def test_module_needs_the_operator_library(program, module):
    some_other_library = Path(library_paths()[0]) / "libtorch.so"
    result = run(program, some_other_library, module)
    assert result.returncode == 1
    assert "torchintro::linear_mse_loss" in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_library(program, module, tmp_path):
    result = run(program, tmp_path / "missing.so", module)
    assert result.returncode == 1
    assert "missing.so" in result.stderr


def test_usage(program):
    result = run(program)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")
