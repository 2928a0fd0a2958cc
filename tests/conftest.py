"""Shared by all tests: what needs a GPU is skipped without one, and every test starts from the same random state."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:
    # The processes that share the suite share its cores, too: threads that wait must not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
else:
    # Compiled graphs are cached on disk by what was traced, which does not see that the operator was rebuilt since.
    _CACHE = tempfile.TemporaryDirectory(prefix="torchintro-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE.name

import pytest
import torch
from problems import DEVICES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Without a device these tests are skipped; with one they run in one process, as some of them measure its memory.
    if torch.cuda.is_available():
        mark = pytest.mark.xdist_group("cuda")
    else:
        mark = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(mark)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def needs_20_gb(device: str) -> Iterator[None]:
    """On a device memory is taken where on the CPU it is only spoken for."""
    if device == "cuda":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < 20 * 2**30:
            pytest.skip("needs 20 GB of free device memory")
    yield
    if device == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Give the function that runs one command, in an empty folder."""
    from command_line import run  # skips where the command line's packages are missing

    monkeypatch.chdir(tmp_path)
    return run
