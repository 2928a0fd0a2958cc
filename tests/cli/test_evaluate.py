"""``torchintro evaluate``, and what it needs for the rows that were held out."""

from __future__ import annotations

import torch
from command_line import houses

from torchintro import read_table
from torchintro.evaluation import evaluate
from torchintro.saving import load_model, save_model


def test_evaluate_on_the_rows_held_out(run):
    run("train", "--out", "run", "--epochs", 20, "--seed", 4)
    result = run("evaluate", "--model", "run/model.pt", "--held-out")
    mse = load_model("run/model.pt").metadata["metrics"]["held out"]["mse"]
    assert result.stdout.splitlines()[-1].split()[2] == f"{mse:.6g}"
    everything = run("evaluate", "--model", "run/model.pt")
    assert everything.stdout.splitlines()[-1].split()[2] != f"{mse:.6g}"


def test_held_out_rows_of_other_data_are_not_known(run, tmp_path):
    path = houses(tmp_path / "houses.csv")
    columns = ["--target", "price", "--feature", "area"]
    run("train", "--data", path, *columns, "--epochs", 2, "--out", "run")
    run("evaluate", "--data", "houses.csv", "--model", "run/model.pt", "--held-out")  # the same by a shorter path
    (tmp_path / "fewer.csv").write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    result = run("evaluate", "--data", "fewer.csv", "--model", "run/model.pt", "--held-out", code=2)
    assert "evaluate: --held-out needs the data that the model was trained on" in result.stderr
    run("train", "--data", path, *columns, "--epochs", 2, "--out", "run", "--test-fraction", 0)
    run("evaluate", "--data", path, "--model", "run/model.pt", "--held-out", code=2)


def test_a_model_of_16_bits_is_judged_by_targets_as_they_are(run, tmp_path):
    path = houses(tmp_path / "houses.csv")
    model = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
    save_model(tmp_path / "model.pt", model, feature_names=["area"], target_names=["price"])
    data = read_table(path, target="price", features=["area"])
    result = run("evaluate", "--data", path, "--model", "model.pt")
    assert result.stdout.splitlines()[-1].split()[2] == f"{evaluate(model, data.X, data.y)['mse']:.6g}"
