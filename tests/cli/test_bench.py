"""``torchintro bench``."""

from __future__ import annotations

import sys
import types
from pathlib import Path


def test_bench_hands_its_options_on(run, monkeypatch):
    calls = []
    module = types.ModuleType("benchmarks.command")
    monkeypatch.setattr(module, "main", lambda *call, **options: calls.append((*call, options)) or 3, raising=False)
    monkeypatch.setitem(sys.modules, "benchmarks.command", module)
    run("bench", code=3)
    run("bench", "--device", "cuda", "--row", "P1", "--row", "P4a", "--json", "out.json", "--quick", code=3)
    shown = ["--plot", "pictures", "--from", "r.json", "--table", "--crossover", "--trials"]
    run("bench", "--grid", "--dtype", "bfloat16", "--no-rows", *shown, code=3)
    nothing = {
        "grid": False,
        "dtype": "float32",
        "no_rows": False,
        "plot": None,
        "record_path": None,
        "table": False,
        "crossover": False,
        "trials": False,
    }
    everything = {
        "grid": True,
        "dtype": "bfloat16",
        "no_rows": True,
        "plot": Path("pictures"),
        "record_path": Path("r.json"),
        "table": True,
        "crossover": True,
        "trials": True,
    }
    assert calls == [
        ("cpu", None, None, False, nothing),
        ("cuda", ["P1", "P4a"], Path("out.json"), True, nothing),
        ("cpu", None, None, False, everything),
    ]
