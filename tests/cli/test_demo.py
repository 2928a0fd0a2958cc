"""``torchintro demo``: the six steps."""

from __future__ import annotations

import re

import pytest
from command_line import start

from torchintro.data.datasets import diabetes, split
from torchintro.evaluation import evaluate
from torchintro.saving import load_model


def test_demo(run, tmp_path):
    result = run("demo", "--out", "run", "--trials", 6)
    text = result.stdout
    steps = ["1  Tensors", "2  Autograd", "3  Model", "4  Preprocessing", "5  Training", "6  Evaluation"]
    places = [text.index(step) for step in [*steps, "Fused against plain PyTorch", "Files in run"]]
    assert places == sorted(places)
    assert "at x = 2: 21;" in text
    difference = float(text.split("largest relative difference ")[1].split()[0])
    assert difference < 1e-5
    assert "6 trials of 100 epochs, lr from 1e-4 to 1e-1, by the engine statistics:" in text
    assert re.search(r"they took [\d.]+ [um]?s to train \([\d.]+ m?s with Optuna and timing plain PyTorch\);", text)
    assert re.search(r"plain PyTorch would have taken [\d.]+ m?s \(measured on \d+ epochs\)", text)
    assert "engine statistics: full batch" in text
    losses = [float(line.split("Loss: ")[1]) for line in text.splitlines() if "Epoch [" in line]
    assert len(losses) == 10
    assert losses == sorted(losses, reverse=True)
    plain, fused = (
        float(line.split()[0]) for line in text.splitlines() if " = nn.MSE" in line or " = LinearMSE" in line
    )
    assert fused == pytest.approx(plain, abs=0.01)  # as they are printed
    saved = load_model(tmp_path / "run" / "model.pt")
    _, test = split(diabetes(), 0.2, seed=0)
    mse = evaluate(saved.model, test.X, test.y)["mse"]
    line = next(line for line in text.splitlines() if "gradient descent" in line)
    assert f"{mse:.1f}" in line.split()
    exact = next(line for line in text.splitlines() if "least squares" in line)
    # Gradient descent cannot fit the training rows better than the exact solution.
    assert float(exact.split()[-5]) <= float(line.split()[-5])
    for name in ("loss.png", "lr.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    assert max(map(len, text.splitlines())) <= 80
    command = text.split("Next:")[1].split()
    assert f"{mse:.6g}" in run(*command[1:]).stdout


@pytest.mark.slow
def test_demo_without_a_terminal(tmp_path):
    with start("demo", "--trials", 3, "--out", "run", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"}) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == ""
    assert out.isascii()
    assert "\x1b" not in out
    assert "Files in run" in out
