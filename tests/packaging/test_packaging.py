"""A source distribution, a wheel built from it alone, and an installed package that runs."""

from __future__ import annotations

import contextlib
import email
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import torchintro

ROOT = Path(__file__).parents[2]
NAME = f"torchintro-{torchintro.__version__}"
# What git does not keep: the tests must not depend on git, nor on what earlier builds left here.
IGNORED = shutil.ignore_patterns(
    ".git",
    ".venv*",
    "build",
    "dist",
    "runs",
    "*.so",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    ".benchmarks",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("wheel"),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++").split()[0]) is None, reason="no C++ compiler"),
]


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run Python with a CPU build's environment, outside the source folder unless `cwd` says so."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**inherited, "TORCHINTRO_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("checkout") / "torchintro"
    shutil.copytree(ROOT, copy, ignore=IGNORED)
    return copy


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    pytest.importorskip("build", reason="the package `build` is not installed here")
    folder = tmp_path_factory.mktemp("sdist")
    run("-m", "build", "--sdist", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    return folder / NAME


# A compiler that looks first whether the checkout has the object file of the same command, folders aside.
COMPILER = """#!{python}
import json, os, pathlib, shutil, sys
arguments = sys.argv[1:]
if "-c" in arguments and "-MF" in arguments:
    source, target = (arguments[arguments.index(name) + 1] for name in ("-c", "-o"))
    dependencies = arguments[arguments.index("-MF") + 1]
    command = " ".join(a for a in arguments if a not in (target, dependencies)).replace({folder!r}, "@")
    built = json.loads(pathlib.Path({known!r}).read_text()).get(command)
    if built is not None:
        shutil.copy(built, target)
        pathlib.Path(dependencies).write_text(f"{{target}}: {{source}}\\n")
        sys.exit()
os.execvp({compiler!r}, [{compiler!r}, *arguments])
"""


def objects_of_the_checkout() -> dict[str, str]:
    """Return the object files of the editable install that are up to date, each by the command that compiled it."""
    known = {}
    folders = os.environ.get("PATH")
    with contextlib.suppress(ImportError):
        import ninja

        folders = os.pathsep.join(filter(None, [os.environ.get("PATH"), ninja.BIN_DIR]))  # the one that setup.py takes
    program = shutil.which("ninja", path=folders)
    for folder in (ROOT / "build" / "objects").glob("*/"):
        state = subprocess.run([program, "-n"], cwd=folder, capture_output=True, text=True, check=False)
        if state.returncode != 0 or "no work to do" not in state.stdout:
            continue
        listed = subprocess.run([program, "-t", "commands"], cwd=folder, capture_output=True, text=True, check=True)
        for line in listed.stdout.splitlines():
            arguments = shlex.split(line)[1:]
            target, dependencies = (arguments[arguments.index(name) + 1] for name in ("-o", "-MF"))
            command = " ".join(argument for argument in arguments if argument not in (target, dependencies))
            for before, after in ((f"{ROOT}/csrc", "@/csrc"), (f"-map={ROOT}/=", "-map=@/=")):
                command = command.replace(before, after)
            known[command] = target
    return known


@pytest.fixture(scope="module")
def wheel(source, unpacked, tmp_path_factory) -> Path:
    """Build from the source distribution alone, which has the checkout's sources: what is compiled already is taken."""
    folder = tmp_path_factory.mktemp("wheel")
    names = {name for name in files(source) if name.startswith("csrc/") or name == "setup.py"}
    same = names <= files(unpacked) and all((source / n).read_bytes() == (unpacked / n).read_bytes() for n in names)
    tools = tmp_path_factory.mktemp("tools")
    known, compiler = tools / "objects.json", tools / "g++"
    known.write_text(json.dumps(objects_of_the_checkout() if same else {}))
    names = {"folder": str(unpacked), "known": str(known), "compiler": os.environ.get("CXX", "c++")}
    compiler.write_text(COMPILER.format(python=sys.executable, **names))
    compiler.chmod(0o755)
    command = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, unpacked]
    run(*command, cwd=folder, CXX=str(compiler))
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_sdist_holds_what_is_needed_to_build_test_and_change_it(sdist, source, unpacked):
    assert sdist.name == f"{NAME}.tar.gz"
    expected = {
        name
        for name in files(source)
        if re.match(
            r"(torchintro|csrc|tests|examples)/|benchmarks/[^/]*\.py$|[^/]*\.(py|toml|md|in)$|LICENSE$|Makefile$", name
        )
    }
    assert {"LICENSE", "README.md", "MANIFEST.in", "torchintro/py.typed", "torchintro/_C.pyi"} <= expected
    assert {"csrc/linear_mse_loss.h", "tests/conftest.py", "examples/cpp/main.cpp"} <= expected
    held = files(unpacked)
    assert expected - held == set()
    assert [name for name in held if re.search(r"\.(so|o|pyc)$|__pycache__|^build/|\.venv", name)] == []


def test_wheel_holds_the_package_and_nothing_else(wheel, source):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(f"{NAME}.dist-info/METADATA"))
        entry_points = archive.read(f"{NAME}.dist-info/entry_points.txt").decode()
        tags = archive.read(f"{NAME}.dist-info/WHEEL").decode()
    modules = {str(path.relative_to(source)) for path in (source / "torchintro").rglob("*.py*")}
    libraries = {name for name in names if name.endswith(".so")}
    extra = {name for name in names if name.startswith(f"{NAME}.dist-info/")}
    assert names - extra == modules | libraries | {"torchintro/py.typed"}
    assert "torchintro/_C.pyi" in modules
    assert len(libraries) == 3
    assert {name.split(".")[0] for name in libraries} == {"torchintro/_ops", "torchintro/_call", "torchintro/_C"}
    assert any(name.endswith("/LICENSE") for name in extra)

    assert "Root-Is-Purelib: false" in tags
    assert f"-cp{sys.version_info.major}{sys.version_info.minor}-" in wheel.name
    assert metadata["Version"] == torchintro.__version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"cli", "test"} <= set(metadata.get_all("Provides-Extra"))
    required = {re.match(r"[\w-]+", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == {"torch", "numpy", "optuna"}
    assert re.search(r"^torchintro\s*=\s*torchintro\.__main__:main$", entry_points, re.MULTILINE)


def test_libraries_name_no_folder_of_the_builder(wheel, unpacked):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                content = archive.read(name)
                for folder in (unpacked, Path(torch.__file__).parent):
                    assert os.fsencode(folder) not in content, name


def test_installed_wheel_runs(installed, tmp_path):
    program = """
import importlib.metadata, torch, torchintro
from torchintro import _C

x, t = torch.randn(64, 5), torch.randn(64, 2)
criterion = torchintro.LinearMSELoss(5, 2)
loss = criterion(x, t)
loss.backward()
plain = torch.nn.Linear(5, 2)
plain.load_state_dict(criterion.linear.state_dict())
expected = torch.nn.functional.mse_loss(plain(x), t)
expected.backward()
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(criterion.linear.weight.grad, plain.weight.grad)
torch.testing.assert_close(criterion.linear.bias.grad, plain.bias.grad)
print(torchintro.__file__)
print(importlib.metadata.version("torchintro"), torchintro.__version__)
print(_C.build_info()["torch"], repr(_C.build_info()["cuda"]))
"""
    lines = run("-c", program, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert lines[0] == str(installed / "torchintro" / "__init__.py")
    assert lines[1] == f"{torchintro.__version__} {torchintro.__version__}"
    assert lines[2] == f"{torch.__version__} ''"


def test_installed_command_runs(installed, tmp_path):
    pytest.importorskip("typer", reason="the command line's packages are not installed here")
    assert "info" in run("-m", "torchintro", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert torchintro.__version__ in run("-m", "torchintro", "info", cwd=tmp_path, PYTHONPATH=str(installed))
