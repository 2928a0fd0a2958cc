"""Build of torchintro's three libraries; everything that needs no build logic is in pyproject.toml.

torchintro._ops   the operators, without Python symbols, so that a C++ program can load it too
torchintro._call  the operator's way in from Python, past torch.ops
torchintro._C     pybind11: what was built, readable under any torch, so that a mismatch is answered by a sentence

Environment: TORCHINTRO_CUDA=0|1 overrides the choice below; TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS as in PyTorch.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
VERSION: str = runpy.run_path(str(ROOT / "torchintro" / "_version.py"))["__version__"]

# Object files of an editable install. Ninja compares commands and the times of sources and headers.
OBJECTS = ROOT / "build" / "objects"

# Compiled without a GPU at hand: data-centre GPUs from Ampere on, and PTX for what comes after.
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"


def stop(sentence: str) -> None:
    sys.exit(f"torchintro: {sentence}")


try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, is_ninja_available
except ImportError as error:
    stop(f"torch cannot be imported here ({error}); run `pip install torch`, then build with `--no-build-isolation`.")
try:
    import pybind11
except ImportError:
    stop("pybind11 is not installed here; run `pip install pybind11` and build again.")
with contextlib.suppress(ImportError):
    import ninja

    # An environment that is used without being activated has its ninja, but not on the PATH.
    os.environ["PATH"] = os.pathsep.join(filter(None, [os.environ.get("PATH"), ninja.BIN_DIR]))
if not is_ninja_available():
    stop("ninja is not installed here; run `pip install ninja` and build again.")
compiler = os.environ.get("CXX", "c++").split()[0]
if shutil.which(compiler) is None:
    stop(f"no C++ compiler: '{compiler}' was not found; install one (`apt-get install g++`, say) or set CXX.")
if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    stop(f"torch must be 2.11 or newer, but {torch.__version__} is installed; run `pip install --upgrade torch`.")


def choose_cuda() -> bool:
    """Decide whether the CUDA kernels are built, and say so."""
    wanted = os.environ.get("TORCHINTRO_CUDA", "")
    if wanted not in ("", "0", "1"):
        stop(f"TORCHINTRO_CUDA must be 0 or 1, but is '{wanted}'.")
    nvcc = CUDA_HOME is not None and shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin")) is not None
    missing = "torch has no CUDA" if torch.version.cuda is None else "" if nvcc else "nvcc was not found"
    if wanted == "1" and missing:
        stop(f"TORCHINTRO_CUDA=1, but {missing}; install a CUDA build of torch and the CUDA toolkit, or set it to 0.")
    built = wanted != "0" and not missing
    reason = f"CUDA {torch.version.cuda}, {CUDA_HOME}" if built else (missing or "TORCHINTRO_CUDA=0")
    print(f"torchintro: building {'with' if built else 'without'} CUDA kernels ({reason}), torch {torch.__version__}")
    return built


def sources(*folders: str) -> list[str]:
    found = [
        path for folder in folders for path in (ROOT / "csrc" / folder).glob("*") if path.suffix in (".cpp", ".cu")
    ]
    return sorted(str(path.relative_to(ROOT)) for path in found)


with_cuda = choose_cuda()
operator_folders = [
    ".",
    "autograd",
    "autocast",
    "composite",
    "cpu",
    "cpu/kernels",
    "fit",
    "fit/cpu",
    "functorch",
    "meta",
]
include_dirs = [str(ROOT / "csrc")]
# -g0: the -g that Python was built with would double the compile time and make the library twenty times as large.
flags = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# GCC's own intrinsics warn of themselves (GCC bug 105593).
flags += ["-Wno-maybe-uninitialized"]
# Messages name their source file: csrc/..., not where it lay on the machine that built the library.
flags += [f"-ffile-prefix-map={folder}/=" for folder in (ROOT, Path(torch.__file__).resolve().parent.parent)]
# Compiled with OpenMP but not linked to it: the symbols come from the OpenMP runtime that torch has loaded, so that
# both share one pool of threads.
compile_flags = {"cxx": [*flags, "-fopenmp"]}
architectures = ""
if with_cuda:
    operator_folders += ["cuda", "cuda/kernels", "fit/cuda"]
    compile_flags["nvcc"] = ["-O3", "--expt-relaxed-constexpr"]
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "native")
    # Headers of the CUDA libraries that torch's own headers include, where pip installed them.
    major = str(torch.version.cuda).split(".")[0]
    include_dirs += [str(path) for path in Path(torch.__file__).parent.parent.glob(f"nvidia/cu{major}/include")]

# py_limited_api: no Python in it, hence nothing of one Python version.
operators = (CUDAExtension if with_cuda else CppExtension)(  # type: ignore[no-untyped-call]
    "torchintro._ops",
    sources(*operator_folders),
    include_dirs=include_dirs,
    extra_compile_args=compile_flags,
    py_limited_api=True,
)
call = CppExtension(  # type: ignore[no-untyped-call]
    "torchintro._call", ["csrc/python/call.cpp"], include_dirs=include_dirs, extra_compile_args=flags
)
module = CppExtension(  # type: ignore[no-untyped-call]
    "torchintro._C",
    ["csrc/python/module.cpp", "csrc/cpu/kernels/level.cpp", "csrc/cpu/kernels/matrix_route.cpp"],
    include_dirs=[*include_dirs, pybind11.get_include()],
    define_macros=[
        ("TORCHINTRO_TORCH_VERSION", f'"{torch.__version__}"'),
        ("TORCHINTRO_CUDA_VERSION", f'"{torch.version.cuda if with_cuda else ""}"'),
        ("TORCHINTRO_CUDA_ARCHITECTURES", f'"{architectures}"'),
    ],
    extra_compile_args=flags,
)
module.libraries = []  # not linked to torch: it must import under any torch to say which one is needed


class Build(BuildExtension):
    """Keep the object files of an editable install, so that the next one compiles only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        if self.editable_mode:
            # A folder for each library: two sources are in two of them, compiled with other flags.
            self.build_temp = str(OBJECTS / ext.name)
        super().build_extension(ext)


setup(version=VERSION, ext_modules=[operators, call, module], cmdclass={"build_ext": Build})
