"""The checkout's `benchmarks` can be imported; it comes last, so that `torchintro` stays the installed one."""

import contextlib
import gc
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture(scope="module", autouse=True)
def _few_objects():
    """Spare each measurement, which collects garbage first, the walk over all that torch made when it was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """Give all that one quick run prints and writes: its exit code, its output and its record."""
    from benchmarks.run import Options, main

    path = tmp_path_factory.mktemp("bench") / "new" / "bench.json"
    options = Options(cases=["P1", "P4d"], json=path, quick=True, grid=True, trials=True)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(options)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), record=json.loads(path.read_text()))
