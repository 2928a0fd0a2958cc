"""``torchintro train``: on rows in memory."""

from __future__ import annotations

import csv
import re
import signal

import pytest
import torch
from command_line import start

from torchintro.data.datasets import diabetes, split, synthetic
from torchintro.evaluation import evaluate
from torchintro.saving import load_model


def test_train_on_diabetes(run, tmp_path):
    result = run("train", "--out", "run", "--epochs", 50, "--seed", 3)
    saved = load_model(tmp_path / "run" / "model.pt")
    train, test = split(diabetes(), 0.2, seed=3)
    assert saved.feature_names == train.feature_names
    assert saved.target_names == ("progression",)
    standardize, linear = saved.model
    for name, part in (("training", train), ("held out", test)):  # standardised in float64
        expected = evaluate(linear, standardize(part.X.double()).float(), part.y)
        assert saved.metadata["metrics"][name] == expected
        assert expected == pytest.approx(evaluate(saved.model, part.X, part.y), rel=1e-5)
    assert saved.metadata["metrics"]["training"]["r2"] > 0.4
    assert saved.metadata["engine"] == "statistics"
    assert result.stdout.splitlines()[1].startswith("engine statistics: full batch: one pass over the rows")
    assert re.search(
        r"^50 epochs took [\d.]+ [um]?s, [\d.]+ [um]?s each, with the engine statistics$", result.stdout, re.M
    )
    measured = r"measured on \d+ epochs? of plain PyTorch, not run in full"
    assert re.search(rf"^plain PyTorch would have taken .* \({measured}\): [\d.]+x$", result.stdout, re.M)
    assert "plain PyTorch" not in run("train", "--out", "other", "--no-benchmark").stdout
    with (tmp_path / "run" / "losses.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["epoch", "training", "held out"]
    assert len(rows) == 51
    assert [f"Epoch [{epoch}/50], Loss: {float(rows[epoch][1]):.4f}" for epoch in range(5, 51, 5)] == [
        line for line in result.stdout.splitlines() if line.startswith("Epoch")
    ]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"{saved.metadata['metrics']['held out']['mse']:.6g}" in result.stdout
    assert result.stderr == ""


def test_synthetic_is_the_introductions(run):
    run("train", "--data", "synthetic", "--out", "run", "--lr", 0.3)
    saved = load_model("run/model.pt")
    slope = (saved.model[1].weight / saved.model[0].scale).item()
    # Five standard errors of a slope from 80 rows with noise of 0.1.
    assert abs(slope - 3) < 5 * 0.1 / synthetic().X.std().item() / 80**0.5
    result = run("predict", "--data", "synthetic", "--model", "run/model.pt")
    assert len(result.stdout.splitlines()) == 101


def test_a_run_without_out_gets_its_own_folder(run, tmp_path):
    result = run("train", "--epochs", 2)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("train-")
    assert f"runs/{folder.name}" in result.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["loss.png", "losses.csv", "model.pt"]


def test_train_that_diverges(run, tmp_path):
    result = run("train", "--lr", 5, "--out", "run", code=1)
    assert "became inf in epoch" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_optimizer(run):
    for name, value in (("a", "0.9,0.999"), ("b", "0.5,0.9")):
        options = ["--optimizer", "adam", "--optimizer-option", f"betas={value}", "--optimizer-option", "amsgrad=true"]
        result = run("train", *options, "--epochs", 3, "--out", name)
        assert "engine statistics" in result.stdout or "engine fused" in result.stdout
    models = [load_model(f"{name}/model.pt") for name in "ab"]
    assert models[1].metadata["optimizer_options"] == {"betas": [0.5, 0.9], "amsgrad": True}
    assert not torch.equal(models[0].model[1].weight, models[1].model[1].weight)
    run("tune", *options, "--trials", 2, "--epochs", 2, "--out", "run")
    message = run("tune", "--optimizer", "adam", "--trials", 3, "--epochs", 2, "--out", "run", code=2).stderr
    assert "was made with optimizer_options=\"{'betas': (0.5, 0.9), 'amsgrad': True}\", but got None" in message


def test_mini_batches_in_order(run):
    run("train", "--batch-size", 32, "--no-shuffle", "--epochs", 2, "--seed", 1, "--out", "a")
    run("train", "--batch-size", 32, "--shuffle", "--epochs", 2, "--seed", 1, "--out", "b")
    run("train", "--batch-size", 32, "--epochs", 2, "--seed", 1, "--out", "c")
    weights = [load_model(f"{name}/model.pt").model[1].weight for name in "abc"]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


@pytest.mark.slow
def test_ctrl_c_keeps_the_model(tmp_path):
    # Long enough that it is still training when this process, on a busy machine, gets round to the signal.
    arguments = ["train", "--epochs", 100_000, "--out", "run", "--engine", "autograd"]
    with start(*arguments, cwd=tmp_path) as process:
        assert process.stdout.readline().startswith("diabetes: 442 rows")
        assert process.stdout.readline() == "engine autograd: asked for\n"
        assert process.stdout.readline().startswith("Epoch [10000/100000]")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.startswith("torchintro: interrupted; the model after ")
    assert err.endswith("is kept in run/model.pt\n")
    assert err.count("\n") == 1
    saved = load_model(tmp_path / "run" / "model.pt")
    assert saved.metadata["interrupted"] is True
    assert 10_000 <= saved.metadata["epochs"] < 100_000
    data = diabetes()
    assert evaluate(saved.model, data.X, data.y)["r2"] > 0.3
