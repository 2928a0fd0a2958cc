"""The commands: through typer's runner in this process, and as processes where signals and streams matter."""

from __future__ import annotations

import csv
import io
import re
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")

from command_line import houses, start
from typer.testing import CliRunner

from torchintro.cli import app as cli
from torchintro.data.datasets import diabetes, split, synthetic
from torchintro.evaluation import evaluate
from torchintro.saving import load_model, save_model

COMMANDS = ["demo", "train", "tune", "evaluate", "predict", "bench", "info"]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(run, command):
    result = run(*([command] if command else []), "--help")
    assert "Usage: " in result.output
    for word in [command] if command else COMMANDS:
        assert word in result.output


def test_no_arguments_print_the_help():
    assert "Usage: " in CliRunner().invoke(cli.app, []).output


def test_version(run):
    import torchintro

    assert run("--version").output == f"torchintro {torchintro.__version__}\n"


def test_train_on_diabetes(run, tmp_path):
    result = run("train", "--out", "run", "--epochs", 50, "--seed", 3)
    saved = load_model(tmp_path / "run" / "model.pt")
    train, test = split(diabetes(), 0.2, seed=3)
    assert saved.feature_names == train.feature_names
    assert saved.target_names == ("progression",)
    assert saved.metadata["metrics"]["held out"] == evaluate(saved.model, test.X, test.y)
    assert saved.metadata["metrics"]["training"] == evaluate(saved.model, train.X, train.y)
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


def test_evaluate_on_the_rows_held_out(run):
    run("train", "--out", "run", "--epochs", 20, "--seed", 4)
    result = run("evaluate", "--model", "run/model.pt", "--held-out")
    mse = load_model("run/model.pt").metadata["metrics"]["held out"]["mse"]
    assert result.stdout.splitlines()[-1].split()[2] == f"{mse:.6g}"
    everything = run("evaluate", "--model", "run/model.pt")
    assert everything.stdout.splitlines()[-1].split()[2] != f"{mse:.6g}"


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


def test_tune_and_go_on(run, tmp_path):
    arguments = ["tune", "--out", "run", "--epochs", 30, "--lr-high", 1000, "--seed", 1]
    result = run(*arguments, "--trials", 8)
    with (tmp_path / "run" / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert [int(trial["trial"]) for trial in trials] == list(range(8))
    best = min(trials, key=lambda trial: float(trial["validation loss"]))
    assert f"best lr {float(best['lr']):.6g}, validation loss {float(best['validation loss']):.6g}" in result.stdout
    assert "engine statistics: full batch" in result.stdout
    assert "8 trials of 30 epochs took " in result.stdout
    assert "epochs of plain PyTorch, not run in full): " in result.stdout
    assert {trial["engine"] for trial in trials} == {"statistics"}
    assert {trial["state"] for trial in trials} == {"complete", "diverged"}
    for trial in trials:
        line = next(line for line in result.stdout.splitlines() if line.split()[:1] == [trial["trial"]])
        assert line.split()[1] == f"{float(trial['lr']):.6f}"
        assert ("diverged, epoch" in line) == (trial["validation loss"] == "inf")
    assert any(trial["validation loss"] == "inf" for trial in trials)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lr.png", "study.db", "trials.csv"]

    result = run(*arguments, "--trials", 10, "--no-benchmark")
    assert "2 trials of 30 epochs took " in result.stdout
    assert "not run in full" not in result.stdout
    with (tmp_path / "run" / "trials.csv").open() as file:
        assert list(csv.DictReader(file))[:8] == trials
    result = run(*arguments[:-2], "--seed", 2, code=2)
    assert result.stderr.startswith("torchintro: tune: the study 'torchintro' was made with seed=1, but got 2")


def test_tune_judged_by_the_training_loss(run):
    result = run(
        "tune", "--out", "run", "--data", "synthetic", "--trials", 2, "--epochs", 5, "--validation-fraction", 0
    )
    assert "training loss" in result.stdout
    assert "to judge by" not in result.stdout


def test_tune_when_all_diverge(run):
    result = run("tune", "--out", "run", "--trials", 2, "--lr-low", 10, "--lr-high", 100, code=1)
    assert result.stderr == "torchintro: tune: every learning rate diverged: lower --lr-low and --lr-high\n"


def test_train_that_diverges(run, tmp_path):
    result = run("train", "--lr", 5, "--out", "run", code=1)
    assert "became inf in epoch" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--data", "nothing.csv"], "read_table: there is no file nothing.csv"),
        (
            ["train", "--data", "nothing"],
            "--data must be synthetic, diabetes, a file with a suffix or a folder, but got 'nothing'",
        ),
        (["train", "--data", "table.txt"], "read_table: table.txt must end in one of .csv, .parquet, .npy, .npz"),
        (["train", "--data", "houses.csv"], "read_table: column 'id' of houses.csv must be numeric, but holds string"),
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
            "read_features: gaps.csv has no column 'area'; it has",
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


def test_info_prints_the_report(run, monkeypatch):
    report = {"torchintro": "1.2.3", "a longer label": ["x", "y"]}
    module = types.ModuleType("torchintro.cli.info")
    monkeypatch.setattr(module, "collect", lambda: report, raising=False)
    monkeypatch.setitem(sys.modules, "torchintro.cli.info", module)
    assert run("info").stdout == "torchintro      1.2.3\na longer label  ['x', 'y']\n"


def test_bench_hands_its_options_on(run, monkeypatch):
    calls = []
    module = types.ModuleType("torchintro.benchmark.command")
    monkeypatch.setattr(module, "main", lambda *call, **options: calls.append((*call, options)) or 3, raising=False)
    monkeypatch.setitem(sys.modules, "torchintro.benchmark.command", module)
    run("bench", code=3)
    run("bench", "--device", "cuda", "--row", "P1", "--row", "P4a", "--json", "out.json", "--quick", code=3)
    shown = ["--plot", "pictures", "--from", "r.json", "--table", "--crossover", "--trials"]
    run("bench", "--grid", "--dtype", "bfloat16", "--no-rows", *shown, code=3)
    nothing = {
        "grid": False,
        "dtype": "float32",
        "no_rows": False,
        "plot": None,
        "record_path": None,
        "table": False,
        "crossover": False,
        "trials": False,
    }
    everything = {
        "grid": True,
        "dtype": "bfloat16",
        "no_rows": True,
        "plot": Path("pictures"),
        "record_path": Path("r.json"),
        "table": True,
        "crossover": True,
        "trials": True,
    }
    assert calls == [
        ("cpu", None, None, False, nothing),
        ("cuda", ["P1", "P4a"], Path("out.json"), True, nothing),
        ("cpu", None, None, False, everything),
    ]


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
class TestProcesses:
    def test_demo_without_a_terminal(self, tmp_path):
        with start("demo", "--trials", 3, "--out", "run", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"}) as process:
            out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert err == ""
        assert out.isascii()
        assert "\x1b" not in out
        assert "Files in run" in out

    def test_ctrl_c_keeps_the_model(self, tmp_path):
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

    def test_ctrl_c_keeps_the_trials(self, tmp_path):
        arguments = ["tune", "--epochs", 50, "--out", "run", "--no-benchmark"]
        with start(*arguments, "--trials", 10**6, cwd=tmp_path) as process:
            assert process.stdout.readline().startswith("diabetes: 442 rows")
            database = tmp_path / "run" / "study.db"
            deadline = time.monotonic() + 120
            while not (database.exists() and finished_trials(database) >= 2):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert err.startswith("torchintro: interrupted; the finished trials are kept in sqlite:///run/study.db")
        assert err.count("\n") == 1
        assert finished_trials(database) >= 2

    def test_the_reader_of_a_pipe_may_leave(self, tmp_path):
        save_model(tmp_path / "model.pt", torch.nn.Linear(10, 1), feature_names=diabetes().feature_names)
        with start("predict", "--model", "model.pt", cwd=tmp_path) as process:
            process.stdout.close()
            assert process.stderr.read() == ""
            process.wait(timeout=60)


def finished_trials(database):
    import sqlite3

    with sqlite3.connect(database) as connection:
        try:
            return connection.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'").fetchone()[0]
        except sqlite3.OperationalError:
            return 0


def test_search_pruner_and_trials_that_have_no_value(run, tmp_path):
    space = ["--search", "momentum=0,0.9", "--search", "nesterov=true,false"]
    result = run("tune", "--trials", 12, *space, "--pruner", "median", "--trials-per-batch", 4, "--out", "run")
    with (tmp_path / "run" / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert list(trials[0]) == ["trial", "lr", "momentum", "nesterov", "validation loss", "state", "engine"]
    refused = [trial for trial in trials if trial["state"] == "refused"]
    assert refused
    assert all((trial["nesterov"], float(trial["momentum"])) == ("True", 0) for trial in refused)
    assert all((trial["validation loss"], trial["engine"]) == ("", "") for trial in refused)
    assert len(trials) - len(refused) == 12
    assert any(trial["state"] == "pruned" for trial in trials)
    best = min((trial for trial in trials if trial["state"] == "complete"), key=lambda t: float(t["validation loss"]))
    command = re.search(
        r"\(for torchintro (train: --lr .* --momentum .* --optimizer-option nesterov=\w+)\)", result.stdout
    )
    arguments = command[1].replace(":", "").split()
    assert float(arguments[2]) == pytest.approx(float(best["lr"]), rel=1e-5)
    run(*arguments, "--out", "best")
    assert load_model("best/model.pt").metadata["optimizer_options"] == {"nesterov": best["nesterov"] == "True"}


def test_many_trials_are_not_all_shown(run, tmp_path):
    result = run("tune", "--trials", 60, "--epochs", 3, "--no-benchmark", "--out", "run")
    assert "the best 20 of 60 trials (trials.csv has all):" in result.stdout
    assert len((tmp_path / "run" / "trials.csv").read_text().splitlines()) == 61


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
