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

    def test_held_out_rows_are_the_same_however_they_are_read(self, run, tmp_path):
        path = houses(tmp_path / "houses.csv")
        columns = ["--target", "price", "--feature", "area", "--feature", "rooms", "--epochs", 5]
        for way in ("--stream", "--no-stream"):
            run("train", "--data", path, *columns, way, "--out", "run")
            expected = load_model("run/model.pt").metadata["metrics"]["held out"]["mse"]
            for other in ("--stream", "--no-stream"):
                result = run("evaluate", "--data", path, "--model", "run/model.pt", "--held-out", other)
                assert float(result.stdout.splitlines()[-1].split()[2]) == pytest.approx(expected, rel=1e-4)

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


class TestBothWays:
    """The same command with and without ``--stream``."""

    def both(self, run, command, path, *arguments):
        results = []
        for way in ("--stream", "--no-stream"):
            results.append(run(command, "--data", path, *arguments, way, "--out", way[2:]))
            assert results[-1].stdout.startswith(f"{path}: ")
        first, second = (result.stdout.splitlines()[0].split("; ")[1] for result in results)
        assert first == second  # as many rows in each part
        return results

    def test_train(self, run, tmp_path):
        path = houses(tmp_path / "houses.csv")
        columns = ["--target", "price", "--feature", "area", "--feature", "rooms"]
        self.both(run, "train", path, *columns, "--seed", 2, "--epochs", 30)
        streamed, read = (losses(tmp_path / way / "losses.csv") for way in ("stream", "no-stream"))
        assert streamed.keys() == read.keys() == {"epoch", "training", "held out"}
        for name, figures in read.items():
            assert streamed[name] == pytest.approx(figures, rel=1e-4)
        models = [load_model(tmp_path / way / "model.pt") for way in ("stream", "no-stream")]
        assert torch.allclose(models[0].model[0].mean, models[1].model[0].mean)
        for name, figures in models[0].metadata["metrics"].items():
            other = models[1].metadata["metrics"][name]
            assert figures == pytest.approx({key: other[key] for key in figures}, rel=1e-3)

    def test_tune(self, run, tmp_path):
        path = houses(tmp_path / "houses.csv")
        columns = ["--target", "price", "--feature", "area", "--feature", "rooms"]
        self.both(
            run, "tune", path, *columns, "--trials", 3, "--epochs", 10, "--no-benchmark", "--storage", "sqlite://"
        )
        streamed, read = (losses(tmp_path / way / "trials.csv") for way in ("stream", "no-stream"))
        assert streamed["lr"] == read["lr"]
        assert streamed["validation loss"] == pytest.approx(read["validation loss"], rel=1e-4)

    @pytest.mark.parametrize("way", ["--stream", "--no-stream"])
    def test_a_column_far_from_zero_keeps_its_digits(self, run, tmp_path, way):
        # Unix seconds of one day, one a minute: in float32 two minutes are one number.
        seconds = 1_700_000_000 + 60 * np.arange(1440)
        lines = [f"{second},{(second - 1_700_000_000) / 60}" for second in seconds]
        path = tmp_path / "day.csv"
        path.write_text("\n".join(["time,minute", *lines]) + "\n")
        run("train", "--data", path, way, "--lr", 0.4, "--out", "run")
        saved = load_model("run/model.pt")
        # A minute lost or gained would be an error of 1.
        assert saved.metadata["metrics"]["held out"]["rmse"] < 0.05
        result = run("evaluate", "--data", path, "--model", "run/model.pt", "--held-out", way)
        assert float(result.stdout.splitlines()[-1].split()[3]) < 0.05
        predicted = run("predict", "--data", path, "--model", "run/model.pt", way).stdout.split()[1:]
        assert np.abs(np.array(predicted, float) - np.arange(1440)).max() < 0.2


def losses(path):
    """Return the columns of numbers of a CSV file."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0] if name not in ("state", "engine")}
