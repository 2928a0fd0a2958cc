"""``torchintro predict``: from a file to a model to predictions."""

from __future__ import annotations

import csv
import io

import pytest
import torch
from command_line import houses, start

from torchintro.data.datasets import diabetes
from torchintro.saving import load_model, save_model


def test_train_evaluate_and_predict_on_a_file(run, tmp_path):
    path = houses(tmp_path / "houses.csv")
    model = tmp_path / "run" / "model.pt"
    columns = ["--target", "price", "--feature", "area", "--feature", "rooms"]
    run("train", "--data", path, *columns, "--epochs", 500, "--lr", 0.3, "--test-fraction", 0, "--out", "run")
    assert load_model(model).metadata["metrics"].keys() == {"training"}

    # The prices follow a rule exactly, so that what is left is the training's and the rounding's.
    result = run("evaluate", "--data", path, "--model", model)
    mse = float(result.stdout.splitlines()[-1].split()[2])
    assert mse < 1e-4
    assert "80 rows" in result.stdout

    result = run("predict", "--data", path, "--model", model)
    rows = list(csv.reader(io.StringIO(result.stdout)))
    assert rows[0] == ["price"]
    with path.open() as file:
        prices = [float(row["price"]) for row in csv.DictReader(file)]
    assert [float(row[0]) for row in rows[1:]] == pytest.approx(prices, abs=0.05)
    run("predict", "--data", path, "--model", model, "--out", "predicted.csv")
    assert (tmp_path / "predicted.csv").read_text() == result.stdout

    # New rows need the features alone, in any order.
    new = tmp_path / "new.csv"
    new.write_text("note,rooms,area\nbig,5,150\n")
    assert float(run("predict", "--data", new, "--model", model).stdout.split()[1]) == pytest.approx(440, abs=0.05)


@pytest.mark.slow
def test_the_reader_of_a_pipe_may_leave(tmp_path):
    save_model(tmp_path / "model.pt", torch.nn.Linear(10, 1), feature_names=diabetes().feature_names)
    with start("predict", "--model", "model.pt", cwd=tmp_path) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        process.wait(timeout=60)
