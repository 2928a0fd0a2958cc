"""``torchintro evaluate``, and what it needs for the rows that were held out."""

from __future__ import annotations

from command_line import houses

from torchintro.saving import load_model


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
