"""Mistakes: one sentence, an exit code, and nothing left behind."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from command_line import houses
from rich.console import Console

from torchintro.cli import shell
from torchintro.saving import save_model


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--data", "nothing.csv"], "read_table: there is no file or folder nothing.csv"),
        (
            ["train", "--data", "nothing"],
            "--data must be synthetic, diabetes, a file with a suffix or a folder, but got 'nothing'",
        ),
        (["train", "--data", "table.txt"], "read_table: table.txt must end in one of .csv, .parquet, .npy, .npz"),
        (
            ["train", "--data", "houses.csv"],
            "read_table: column 'id' of houses.csv must be numeric, but holds 'h0' in row 1",
        ),
        (
            ["train", "--data", "houses.csv", "--target", "prize"],
            "read_table: houses.csv has no column 'prize'; it has",
        ),
        (["train", "--data", "gaps.csv"], "read_table: column 'a' of gaps.csv has a missing value in row 2"),
        (["train", "--target", "age"], "--target must be progression for diabetes, but got age"),
        (["train", "--feature", "height"], "diabetes has no feature 'height'; it has age, sex, bmi"),
        (
            ["train", "--engine", "fast"],
            "fit: engine must be one of auto, fused, statistics, autograd",
        ),
        (["train", "--optimizer", "sdg"], "fit: optimizer must be one of ASGD"),
        (["train", "--optimizer", "adam", "--momentum", "0.9"], "fit: momentum must be 0 for Adam"),
        (
            ["train", "--optimizer-option", "nesterov"],
            "train: --optimizer-option must be NAME=VALUE, but got 'ne",
        ),
        (
            ["tune", "--optimizer-option", "betas=0.9,"],
            "tune: --optimizer-option must be NAME=VALUE, but got 'bet",
        ),
        (["train", *["--optimizer-option", "dampening=0"] * 2], "train: --optimizer-option must name each argument on"),
        (["train", "--optimizer-option", "speed=1"], "fit: optimizer_options holds 'speed', which is not an argument"),
        (["train", "--optimizer-option", "momentum=1"], "fit: optimizer_options holds 'momentum', which is a named ar"),
        (["train", "--optimizer-option", "nesterov=true"], "fit: optimizer SGD refused this model or its options: Nes"),
        (["train", "--optimizer", "adam", "--optimizer-option", "betas=1"], "fit: optimizer Adam refused this model o"),
        (["train", "--lr", "-1"], "fit: lr must be a positive, finite number, but got -1.0"),
        (["train", "--epochs", "0"], "fit: epochs must be at least 1, but got 0"),
        (["train", "--batch-size", "0"], "fit: batch_size must be at least 1, but got 0"),
        (["train", "--test-fraction", "1"], "--test-fraction must be at least 0 and below 1, but got 1.0"),
        (["train", "--out", "houses.csv"], "--out must be a folder, but houses.csv is a file"),
        (["tune", "--validation-fraction", "-1"], "--validation-fraction must be at least 0 and below 1, but got -1.0"),
        (["tune", "--trials", "0"], "tune: n_trials must be at least 1, but got 0"),
        (["tune", "--lr-low", "1"], "tune: --lr-low must be below --lr-high, but got 1 and 0.1"),
        (["tune", "--search", "momentum"], "tune: --search must be NAME=LOW:HIGH or NAME=a,b,c, but got 'momentum'"),
        (["tune", "--search", "momentum="], "tune: --search must be NAME=LOW:HIGH or NAME=a,b,c, but got 'momentum='"),
        (["tune", "--search", "a=1:2:3"], "tune: --search must be NAME=LOW:HIGH or NAME=a,b,c, but got 'a=1:2:3'"),
        (["tune", "--search", "momentum=a:b"], "tune: --search momentum=LOW:HIGH must have two numbers, but got 'a:b'"),
        (["tune", "--search", "lr=1:2"], "tune: --search must not be of lr, whose range is --lr-low and --lr-high"),
        (["tune", "--search", "momentum=0:0.5", "--search", "momentum=0,1"], "tune: --search must name each parameter"),
        (["tune", "--search", "speed=1,2"], "tune: search_space holds 'speed', which is not an argument of SGD"),
        (["tune", "--search", "momentum=0:0.9", "--momentum", 0.5], "tune: search_space holds 'momentum', which is g"),
        (["tune", "--pruner", "best"], "tune: --pruner must be median, hyperband or none, but got 'best'"),
        (["tune", "--trials-per-batch", 0], "tune: trials_per_batch must be at least 1, but got 0"),
        (["train", "--stream"], "--stream needs a .csv, .parquet or .npy file or a folder of them, but --data is dia"),
        (["tune", "--storage", "study.db"], "tune: storage 'study.db' cannot be used: Could not parse"),
        (["demo", "--trials", "0"], "demo: trials must be at least 1, but got 0"),
        (["evaluate", "--model", "nothing.pt"], "load_model: there is no file nothing.pt"),
        (["evaluate", "--model", "houses.csv"], "load_model: houses.csv is not a model file of torchintro"),
        (["evaluate", "--model", "model.pt", "--data", "synthetic"], "the model predicts price, but synthetic has the"),
        (
            ["evaluate", "--model", "model.pt", "--data", "gaps.csv"],
            "read_table: gaps.csv has no column 'price'; it has",
        ),
        (
            ["evaluate", "--model", "model.pt", "--data", "houses.csv", "--held-out"],
            "evaluate: --held-out needs the data",
        ),
        (
            ["predict", "--model", "model.pt", "--data", "gaps.csv"],
            "read_table: gaps.csv has no column 'area'; it has",
        ),
        (["predict", "--model", "model.pt"], "diabetes has no feature 'area'; it has age"),
        (
            ["predict", "--model", "model.pt", "--data", "houses.csv", "--out", "no/f.csv"],
            "No such file or directory: no/",
        ),
    ],
)
def test_mistakes_are_answered_in_one_sentence(run, tmp_path, arguments, sentence):
    houses(tmp_path / "houses.csv")
    (tmp_path / "gaps.csv").write_text("a,b\n1,2\n,3\n")
    (tmp_path / "table.txt").write_text("a,b\n1,2\n")
    save_model(tmp_path / "model.pt", torch.nn.Linear(1, 1), feature_names=["area"], target_names=["price"])
    before = sorted(tmp_path.rglob("*"))
    result = run(*arguments, code=2)
    assert result.stderr.startswith(f"torchintro: {sentence}")
    assert result.stderr.count("\n") == 1
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.name != "runs"] == []


def test_a_missing_package_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = run("train", code=2)
    assert result.stderr == 'torchintro: diabetes: needs scikit-learn: pip install "torchintro[cli]"\n'


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_command_line_packages(monkeypatch, capsys, package):
    from torchintro.__main__ import main

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == (f'torchintro: the command line needs {package}: pip install "torchintro[cli]"\n')


class TestRowProgress:
    @pytest.fixture
    def shown(self, monkeypatch):
        """Give the function that shows a pass of two pieces on a console, and returns its text."""

        def show(terminal):
            file = io.StringIO()
            monkeypatch.setattr(shell, "notices", Console(file=file, force_terminal=terminal, width=100))
            with shell.row_progress() as progress:
                progress(1000, 4000, 2.0)
                progress(3000, 4000, 12.0)
                progress(4000, 4000, 13.0)
            return file.getvalue()

        return show

    def test_lines_now_and_then_without_a_terminal(self, shown):
        assert shown(False) == "3,000 of 4,000 rows in 12.0 s, 250 rows/s\n"

    def test_a_bar_on_a_terminal(self, shown):
        assert "4,000 rows in 13.0 s, 308 rows/s" in shown(True)


def test_a_folder_in_which_nothing_was_put_goes_again(tmp_path):
    with shell.made(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b").exists()
    with shell.made(tmp_path / "c"):
        (tmp_path / "c" / "file").touch()
    assert (tmp_path / "c" / "file").exists()
