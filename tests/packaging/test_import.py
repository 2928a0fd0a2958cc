"""What a build or an import without its prerequisites says, and what an import costs."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchintro
from torchintro import _extension as _library

ROOT = Path(__file__).parents[2]
PACKAGE = Path(torchintro.__file__).parent

# Runs setup.py as a build would, after the statements in the first argument.
BUILD = """
import runpy, sys
exec(sys.argv[1])
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


# The program given by -c finds modules in `cwd` first.
def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def build(statements: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    # A CUDA toolkit that is not there makes the answer the same on every machine.
    environment = {"TORCHINTRO_CUDA": "", "CUDA_HOME": "/nonexistent", "CXX": sys.executable, **environment}
    return python("-c", BUILD, statements, cwd=ROOT, **environment)


def test_build_with_everything_says_what_it_builds():
    result = build()
    assert result.returncode == 0, result.stderr
    choice, version = result.stdout.splitlines()
    assert choice.startswith("torchintro: building without CUDA kernels (")
    assert choice.endswith(f"), torch {torch.__version__}")
    assert version == torchintro.__version__


@pytest.mark.parametrize(
    ("statements", "environment", "sentence"),
    [
        pytest.param(
            "sys.modules['torch'] = None",
            {},
            "torch cannot be imported here (.*); run `pip install torch`, then build with `--no-build-isolation`.",
            id="torch",
        ),
        pytest.param(
            "import torch; torch.__version__ = '2.10.1+cpu'",
            {},
            r"torch must be 2\.11 or newer, but 2\.10\.1\+cpu is installed; run `pip install --upgrade torch`\.",
            id="old torch",
        ),
        pytest.param(
            "sys.modules['pybind11'] = None",
            {},
            "pybind11 is not installed here; run `pip install pybind11` and build again.",
            id="pybind11",
        ),
        pytest.param(
            "sys.modules['ninja'] = None",
            {"PATH": "/nonexistent"},
            "ninja is not installed here; run `pip install ninja` and build again.",
            id="ninja",
        ),
        pytest.param(
            "",
            {"CXX": "/nonexistent/g++"},
            r"no C\+\+ compiler: '/nonexistent/g\+\+' was not found; install one \(.*\) or set CXX\.",
            id="compiler",
        ),
        pytest.param("", {"TORCHINTRO_CUDA": "2"}, "TORCHINTRO_CUDA must be 0 or 1, but is '2'.", id="CUDA=2"),
        pytest.param(
            "",
            {"TORCHINTRO_CUDA": "1"},
            "TORCHINTRO_CUDA=1, but (torch has no CUDA|nvcc was not found); install a CUDA build of torch and the CUDA "
            "toolkit, or set it to 0.",
            id="CUDA=1",
        ),
    ],
)
def test_build_without_a_prerequisite_is_one_sentence(statements, environment, sentence):
    result = build(statements, **environment)
    assert result.returncode == 1
    assert result.stdout == ""
    # A CUDA build of torch logs (W for warning) that it finds no CUDA device; that is not ours to word.
    lines = [line for line in result.stderr.splitlines() if not re.match(r"W\d{4} .*cpp_extension\.py", line)]
    assert len(lines) == 1, result.stderr
    assert re.fullmatch(f"torchintro: {sentence}", lines[0])


def test_build_finds_the_ninja_of_an_environment_that_is_not_activated(tmp_path):
    ninja = pytest.importorskip("ninja", reason="ninja is not a package of this environment")
    if not ninja.BIN_DIR:
        pytest.skip("the ninja package of this environment has no program")
    result = build(PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("built_torch", "built_cuda", "message"),
    [
        (
            "2.5.0",
            "",
            r"^torchintro: built for torch 2\.5\.0, but torch 9\.1\.0\+cu130 is running; rebuild it .*2\.5\.0\)$",
        ),
        ("9.1.1+cu130", "13.0", r"built for torch 9\.1\.1\+cu130, but torch 9\.1\.0\+cu130 is running; rebuild it"),
        ("9.1.0", "12.8", r"^torchintro: built for CUDA 12\.8, but this torch has CUDA 13\.0; rebuild it"),
    ],
)
def test_check_build_refuses(monkeypatch, built_torch, built_cuda, message):
    monkeypatch.setattr(torch, "__version__", "9.1.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ImportError, match=message):
        _library._check_build(built_torch, built_cuda)


def test_check_build_refuses_cuda_library_without_cuda(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.1.0+cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ImportError, match=r"built for CUDA 13\.0, but this torch has no CUDA; rebuild it"):
        _library._check_build("9.1.0+cu130", "13.0")


@pytest.mark.parametrize(
    ("built_torch", "built_cuda"),
    [("9.1.0+cu130", "13.0"), ("9.1.0+cpu", ""), ("9.1.0", "13.1")],
    ids=["same", "CPU library under a CUDA torch", "another minor CUDA"],
)
def test_check_build_accepts(monkeypatch, built_torch, built_cuda):
    monkeypatch.setattr(torch, "__version__", "9.1.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    _library._check_build(built_torch, built_cuda)


def test_import_under_another_torch_says_rebuild():
    result = python("-c", "import torch; torch.__version__ = '9.1.0'; import torchintro", cwd=PACKAGE.parent)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        f"ImportError: torchintro: built for torch {torch.__version__}, but torch 9.1.0 is running; rebuild it "
    )


def _copy(to: Path, *libraries: str) -> Path:
    """Copy the package without its libraries but those named."""
    copy = to / "torchintro"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for pattern in libraries:
        for library in PACKAGE.glob(pattern):
            shutil.copy(library, copy)
    return copy


def _import_error(path: Path) -> str:
    # The finder of an editable install would find in the checkout what the copy lacks.
    program = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]; import torchintro"
    result = python("-c", program, cwd=path)
    assert result.returncode == 1
    return result.stderr.splitlines()[-1]


def test_import_of_an_unbuilt_checkout(tmp_path):
    _copy(tmp_path)
    assert _import_error(tmp_path) == (
        "ImportError: torchintro: the operator library is not built; in a source checkout run "
        "`pip install --no-build-isolation -e .`"
    )


def test_import_of_half_a_build(tmp_path):
    _copy(tmp_path, "_ops*.so")
    message = _import_error(tmp_path)
    assert message.startswith("ImportError: torchintro: its build is incomplete (")
    assert "); rebuild it in its source folder: " in message


def test_import_of_a_build_without_the_way_in(tmp_path):
    _copy(tmp_path, "_ops*.so", "_C.*.so")
    message = _import_error(tmp_path)
    assert message.startswith("ImportError: torchintro: its build is incomplete (cannot import name '_call'")
    assert "); rebuild it in its source folder: " in message


def test_import_of_a_damaged_library(tmp_path):
    (library,) = _copy(tmp_path, "*.so").glob("_ops*.so")
    library.write_bytes(b"not a library")
    message = _import_error(tmp_path)
    assert message.startswith(f"ImportError: torchintro: {library.name} does not load (")
    assert "); rebuild it in its source folder: " in message


def test_import_loads_no_heavy_package_and_is_quicker_than_torch():
    program = """
import sys, time
heavy = {"jax", "matplotlib", "optuna", "pandas", "pyarrow", "rich", "sklearn", "typer"}
start = time.process_time(); import torch
middle = time.process_time(); before = set(sys.modules); import torchintro
end = time.process_time()
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(middle - start, end - middle, *sorted(loaded & heavy))
"""
    quotients = []
    for _ in range(3):  # the processor's time, which others' work on a busy machine is not part of
        result = python("-c", program, cwd=PACKAGE.parent)
        assert result.returncode == 0, result.stderr
        torch_seconds, our_seconds, *heavy = result.stdout.split()
        assert heavy == []
        quotients.append(float(our_seconds) / float(torch_seconds))
        if quotients[-1] < 0.5:
            break
    assert min(quotients) < 0.5


def test_the_installed_version_is_the_package_s():
    try:
        installed = importlib.metadata.version("torchintro")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("torchintro runs from its source folder and is not installed here")
    assert installed == torchintro.__version__


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        ("TORCHINTRO_CPU_LEVEL", "must be baseline, avx2 or avx512"),
        ("TORCHINTRO_MATRIX_ROUTE", "must be blas or onednn"),
    ],
)
def test_an_unknown_choice_is_answered_by_a_warning(variable, sentence):
    environment = os.environ | {variable: "other"}
    code = "import torchintro"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert f"{variable} {sentence}" in result.stderr
    assert "but is 'other'; using " in result.stderr
