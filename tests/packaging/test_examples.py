"""The examples run, and so do the examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import torchintro

EXAMPLES = Path(__file__).parents[2] / "examples"
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(torchintro.__path__, "torchintro.")
    if not module.name.endswith((".__main__", "._C", "._call", "._ops"))
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("training_loop", "sin(2 * 0.5) = 0.8415, predicted 0.84"),
        ("tune_learning_rate", "y = 2.9"),
        ("save_a_model", "price at area, rooms = 90, 3: 27"),
        ("torchrun_table", "rank 0 read 40000 of 40000 rows\nengine statistics: "),
    ],
)
def test_example(capsys, monkeypatch, name, expected):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert expected in capsys.readouterr().out


@pytest.mark.slow
def test_the_table_by_two_processes():
    script = str(EXAMPLES / "torchrun_table.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank} read 20000 of 40000 rows" in done.stdout
    assert done.stdout.count("engine statistics: ") == 1


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name, tmp_path, monkeypatch):
    if name.startswith("torchintro.cli"):
        pytest.importorskip("typer")
    monkeypatch.chdir(tmp_path)
    failures, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failures == 0
    assert os.listdir(tmp_path) == []  # noqa: PTH208
