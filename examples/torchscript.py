"""Exports a criterion as TorchScript, for a program without Python: ``python examples/torchscript.py criterion.pt``.

``examples/cpp/main.cpp`` loads the file and trains it.
"""

from __future__ import annotations

import sys

import torch

import torchintro


def export(path: str) -> torch.jit.ScriptModule:
    """Script a criterion of one feature and one output, weight and bias zero, and save it to ``path``."""
    criterion = torchintro.LinearMSELoss(1, 1)
    with torch.no_grad():
        for parameter in criterion.parameters():
            parameter.zero_()
    scripted = torch.jit.script(criterion)
    torch.jit.save(scripted, path)
    return scripted


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FILE.pt")
    export(sys.argv[1])
    print(f"saved {sys.argv[1]}")
