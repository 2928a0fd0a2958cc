"""The operator library runs on CPUs other than the builder's, and in programs without Python."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from problems import DTYPES, assert_as_exact_as_eager, every_second, make_problem, transposed
from programs import python_path

import torchintro
from torchintro import _C

LEVELS = ["baseline", "avx2", "avx512"]  # in rising order


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed here")


def read(*command: str) -> list[str]:
    """Run a tool of binutils on the operator library."""
    result = subprocess.run(
        [*command, str(torchintro.library_path())], capture_output=True, text=True, check=True, timeout=120
    )
    return result.stdout.splitlines()


@needs("nm")
def test_no_symbol_of_python_is_needed():
    symbols = [line.split()[-1] for line in read("nm", "--dynamic", "--undefined-only")]
    assert any("c10" in symbol for symbol in symbols)
    assert [symbol for symbol in symbols if re.match(r"_?(Py|THP)", symbol)] == []


@needs("readelf")
def test_no_python_and_no_openmp_runtime_of_its_own_is_linked():
    libraries = re.findall(r"\(NEEDED\).*\[(.*)\]", "\n".join(read("readelf", "--dynamic", "--wide")))
    assert "libtorch_cpu.so" in libraries
    # torch brings its own OpenMP runtime; a second one would have a second pool of threads.
    assert [name for name in libraries if re.search(r"python|gomp|iomp|libomp", name)] == []


@needs("objdump")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels are those of x86-64")
def test_wide_instructions_occur_only_in_the_functions_of_their_level():
    # AVX: a mnemonic with a leading v. AVX-512: a register of 64 bytes, one beyond the sixteenth, or a mask.
    found = defaultdict(set)
    function = ""
    for line in read("objdump", "--disassemble", "--demangle", "--no-show-raw-insn", "--wide"):
        if match := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function = match[1]
        elif match := re.match(r"\s+[0-9a-f]+:\t(\S+)(.*)", line):
            mnemonic, operands = match.groups()
            if re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3\d)|%k[0-7]", operands):
                found["avx512"].add(function)
            elif mnemonic.startswith("v"):
                found["avx2"].add(function)

    def outside(functions: set[str], *levels: str) -> list[str]:
        return [name for name in functions if not re.search(rf"torchintro::cpu::({'|'.join(levels)})::", name)]

    assert found["avx512"]
    assert found["avx2"]
    assert outside(found["avx512"], "avx512") == []
    assert outside(found["avx2"], "avx2", "avx512") == []


# Both regimes, sizes that are no multiple of any vector and every small one, every dtype and way to read the input.
def check_values() -> None:
    for dtype, target_dtype in DTYPES:
        for in_features, out_features in itertools.product(range(1, 18), [1, 3, 16, 17]):
            assert_as_exact_as_eager(
                make_problem(45, in_features, out_features, weight="row", dtype=dtype, target_dtype=target_dtype)
            )
        for rows, in_features, out_features in [(1, 1, 1), (37, 19, 1), (300, 33, 5), (300, 33, 40)]:
            problem = make_problem(
                rows, in_features, out_features, weight="element", dtype=dtype, target_dtype=target_dtype
            )
            assert_as_exact_as_eager(problem)
            for stride in (transposed, every_second):
                assert_as_exact_as_eager(problem.map(stride))


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_exact(level):
    """The variable lowers the level, never raises it, and every level computes the same to rounding."""
    program = (
        "import test_portability as tests, torch; "
        "print(tests._C.cpu_level(), torch.backends.cpu.get_cpu_capability()); "
        "from torchintro.cli.info import collect; print(collect()['CPU kernels']); "
        "torch.manual_seed(0); tests.check_values()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    environment["TORCHINTRO_CPU_LEVEL"] = level
    environment["PYTHONPATH"] = python_path(Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(torchintro.__file__).parent.parent,  # where the program finds the package first
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    names, shown = result.stdout.splitlines()
    chosen, capability = names.split()
    assert shown == f"{chosen} (TORCHINTRO_CPU_LEVEL={level})"
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "baseline")
    assert chosen == min(level, best, key=LEVELS.index)


def test_info_reports_the_level():
    assert _C.cpu_level() in LEVELS
    assert _C.build_info()["torch"].split("+")[0] == torch.__version__.split("+")[0]
