"""The examples run, and so do the examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import runpy
from pathlib import Path

import pytest

import torchintro

EXAMPLES = Path(__file__).parent.parent / "examples"
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
    ],
)
def test_example(capsys, name, expected):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name, tmp_path, monkeypatch):
    if name in ("torchintro.cli", "torchintro.demo"):
        pytest.importorskip("typer")
    monkeypatch.chdir(tmp_path)
    failures, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failures == 0
    assert os.listdir(tmp_path) == []  # noqa: PTH208
