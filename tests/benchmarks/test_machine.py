"""The machine's description and its limits."""

import sys
from dataclasses import replace

import torch
from bench_cases import CPU, SMALL

from benchmarks.cases import count
from benchmarks.machine import describe, products_probe


def test_description_of_the_machine():
    machine = describe(CPU)
    assert machine["cpu"]
    assert machine["kernels"] in ("baseline", "avx2", "avx512")
    assert "gpu" not in machine


def test_the_command_can_be_run_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/__main__.py", "--row", "P1", "--json", "a b.json"])
    assert describe(CPU)["command"] == "python -m benchmarks --row P1 --json 'a b.json'"


def test_the_limit_of_products_is_the_step_s_own_products(monkeypatch):
    X, weight, y = torch.randn(6, 2), torch.randn(3, 2), torch.randn(6, 3)
    done = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out=None: done.append((a.shape, b.shape)) or mm(a, b))
    probe = products_probe(X, weight, y, ("input", "linear_weight"))
    done.clear()
    probe.call()
    assert done == [((6, 2), (2, 3)), ((6, 3), (3, 2)), ((3, 6), (6, 2))]
    case = replace(SMALL, rows=6, in_features=2, gradients=("input", "linear_weight"))
    assert probe.amount == count(case).operations
    done.clear()
    products_probe(X, weight, y, ("linear_bias",)).call()
    assert done[1:] == [((6, 2), (2, 3))]
