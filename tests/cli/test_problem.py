"""The command line on tables that are streamed."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest
import torch
from command_line import houses

from torchintro.cli import problem as _problem
from torchintro.data.table import Table
from torchintro.evaluation import evaluate
from torchintro.saving import load_model


def rows_in_a_folder(folder, *, rows=3000, offset=0.0):
    """Write three files, and return features in their own units, one of them constant, and the target."""
    generator = np.random.default_rng(0)
    X = generator.standard_normal((rows, 4)) * [1, 10, 100, 0] + [0, 5, 1000, 7]
    y = X @ [1, 0.2, 0.03, 0] + 3 + generator.standard_normal(rows) + offset
    everything = np.c_[X, y].astype(np.float32)
    folder.mkdir()
    for k, part in enumerate(np.array_split(everything, 3)):
        np.save(folder / f"{k}.npy", part)
    return torch.from_numpy(everything[:, :4].copy()), torch.from_numpy(everything[:, 4:].copy())


class TestStreamed:
    @pytest.fixture
    def rows(self, tmp_path):
        return rows_in_a_folder(tmp_path / "rows")

    def test_a_folder_is_read_once_and_gives_the_model_of_its_rows(self, run, rows, tmp_path, monkeypatch):
        from torchintro import fit, open_table
        from torchintro.nn import Standardize, initial_linear

        passes = []
        marked = Table.marked_pieces
        monkeypatch.setattr(Table, "marked_pieces", lambda self, *a, **k: passes.append(1) or marked(self, *a, **k))
        monkeypatch.setattr(Table, "pieces", lambda self, **options: pytest.fail("a second pass"))
        result = run("train", "--data", "rows", "--seed", 3, "--out", "run")
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        assert len(passes) == 1
        train, held_out = (
            tuple(torch.cat(part) for part in zip(*half.pieces(), strict=True))
            for half in open_table("rows").split(0.2, seed=3)
        )
        assert (
            f"rows: 3000 rows, 4 features -> 4; {len(train[0])} to train, {len(held_out[0])} held out" in result.output
        )
        assert "engine statistics: second moments instead of rows" in result.stdout
        assert re.search(r"plain PyTorch reads the table in each of 100 epochs of this run: at least ", result.stdout)
        saved = load_model("run/model.pt")
        standardize = Standardize.fit(train[0])
        assert torch.allclose(saved.model[0].mean, standardize.mean)
        assert torch.allclose(saved.model[0].scale, standardize.scale)
        linear = initial_linear(4, 1, seed=3)
        expected = fit(linear, standardize(train[0]), train[1], lr=0.1, engine="autograd")
        with open("run/losses.csv") as file:  # noqa: PTH123
            losses = [float(row["training"]) for row in csv.DictReader(file)]
        assert losses == pytest.approx(expected.losses.tolist(), rel=1e-4)
        for name, part in (("training", train), ("held out", held_out)):
            own, other = saved.metadata["metrics"][name], evaluate(saved.model, *part)
            assert own.keys() == {"mse", "rmse", "r2"}
            assert own == pytest.approx({key: other[key] for key in own}, rel=1e-4)
        judged = run("evaluate", "--data", "rows", "--model", "run/model.pt", "--held-out").stdout
        mse = float(judged.splitlines()[-1].split()[2])
        assert mse == pytest.approx(saved.metadata["metrics"]["held out"]["mse"], rel=1e-4)
        assert f"{len(held_out[0])} rows" in judged

    def test_mini_batches_and_predictions(self, run, rows, tmp_path):
        X, y = rows
        run("train", "--data", "rows", "--batch-size", 64, "--epochs", 3, "--lr", 0.05, "--out", "run")
        saved = load_model("run/model.pt")
        assert saved.metadata["engine"] == "fused"
        assert 0.5 < evaluate(saved.model, X, y)["mse"] < 1.5
        lines = run("predict", "--data", "rows", "--model", "run/model.pt").stdout.splitlines()
        with torch.no_grad():
            expected = saved.model(X).flatten().tolist()
        assert [float(line) for line in lines[1:]] == pytest.approx(expected, rel=1e-5)

    def test_a_file_is_streamed_if_wanted(self, run, tmp_path):
        path = houses(tmp_path / "houses.csv")
        columns = ["--target", "price", "--feature", "area", "--feature", "rooms", "--epochs", 300, "--lr", 0.3]
        run("train", "--data", path, *columns, "--stream", "--test-fraction", 0, "--out", "run")
        line = run("evaluate", "--data", path, "--model", "run/model.pt").stdout.splitlines()[-1]
        assert float(line.split()[2]) < 1e-3
        streamed = run("evaluate", "--data", path, "--model", "run/model.pt", "--stream").stdout.splitlines()[-1]
        assert float(streamed.split()[2]) == pytest.approx(float(line.split()[2]), rel=1e-4)
        run("train", "--data", path, *columns, "--no-stream", "--out", "run")
        result = run("evaluate", "--data", path, "--model", "run/model.pt", "--stream", "--held-out", code=2)
        assert "evaluate: --held-out needs the data that the model was trained on" in result.stderr

    def test_a_large_file_is_streamed_by_itself(self, monkeypatch, tmp_path):
        path = houses(tmp_path / "houses.csv")
        assert _problem.is_streamed(str(path), None) is False
        monkeypatch.setattr(_problem, "STREAMED_BYTES", 100)
        assert _problem.is_streamed(str(path), None) is True
        assert _problem.is_streamed(str(path), False) is False

    def test_tune_holds_out_twice(self, run, rows, tmp_path):
        result = run("tune", "--data", "rows", "--trials", 4, "--seed", 3, "--search", "momentum=0:0.9", "--out", "run")
        counts = [int(word) for word in re.findall(r"(\d+) to", result.stdout)]
        assert abs(counts[0] - 3000 * 0.64) < 5 * (3000 * 0.64 * 0.36) ** 0.5
        assert abs(counts[1] - 3000 * 0.16) < 5 * (3000 * 0.16 * 0.84) ** 0.5
        assert "engine statistics: second moments instead of rows" in result.stdout
        assert "plain PyTorch reads the table in each of 400 epochs of 4 trials" in result.stdout
        result = run("tune", "--data", "rows", "--trials", 6, "--seed", 3, "--search", "momentum=0:0.9", "--out", "run")
        assert "2 trials of 100 epochs took" in result.stdout  # the same rows: it goes on
        sizes = ["--search", "batch-size=64,256", "--epochs", 2]
        result = run("tune", "--data", "rows", "--trials", 2, *sizes, "--out", "other")
        assert "engine fused: a table, mini-batches in its order" in result.stdout

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["train", "--optimizer", "rmsprop"], "fit: no engine trains on all rows of a table at once with the"),
            (["train", "--engine", "fused"], "fit: engine 'fused' cannot do this: a table has no full batch in memory"),
            (["train", "--batch-size", 5, "--shuffle"], "fit: shuffle must not be True for a table"),
            (["train", "--no-stream"], "--no-stream needs a file, but --data rows is a folder, which is always stre"),
            (["train", "--lr", -1], "fit: lr must be a positive, finite number, but got -1.0"),
            (["train", "--target", "9"], "open_table: rows has no column '9'; it has 0, 1, 2, 3, 4"),
            (["train", "--test-fraction", 1], "--test-fraction must be at least 0 and below 1, but got 1.0"),
            (["tune", "--trials", 0], "tune: n_trials must be at least 1, but got 0"),
            (["tune", "--search", "batch_size=0,1"], "tune: search_space['batch_size'] must hold integers of at least"),
            (["tune", "--engine", "fused"], "tune: engine must be 'statistics' or 'auto' with LinearStatistics"),
        ],
    )
    def test_mistakes_are_answered_before_the_pass(self, run, rows, monkeypatch, arguments, sentence):
        for name in ("pieces", "marked_pieces"):
            monkeypatch.setattr(Table, name, lambda *a, **k: pytest.fail("a pass"))
        result = run(arguments[0], "--data", "rows", *arguments[1:], code=2)
        assert result.stderr.startswith(f"torchintro: {sentence}")
        assert result.stderr.count("\n") == 1
