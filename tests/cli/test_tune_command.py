"""``torchintro tune``: on rows in memory."""

from __future__ import annotations

import csv
import re
import signal
import time

import pytest
from command_line import start

from torchintro.saving import load_model


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
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lr.png", "study.journal", "trials.csv"]

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


@pytest.mark.slow
def test_ctrl_c_keeps_the_trials(tmp_path):
    arguments = ["tune", "--epochs", 50, "--out", "run", "--no-benchmark"]
    with start(*arguments, "--trials", 10**6, cwd=tmp_path) as process:
        assert process.stdout.readline().startswith("diabetes: 442 rows")
        journal = tmp_path / "run" / "study.journal"
        deadline = time.monotonic() + 120
        while not (journal.exists() and finished_trials(journal) >= 2):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.startswith("torchintro: interrupted; the finished trials are kept in run/study.journal, ")
    assert err.count("\n") == 1
    assert finished_trials(journal) >= 2


def test_a_folder_of_an_earlier_version_goes_on(run, tmp_path):
    """Its study is in a database, study.db."""
    from optuna.storages import RDBStorage

    folder = tmp_path / "run"
    folder.mkdir()
    arguments = ["tune", "--epochs", 5, "--out", "run", "--no-benchmark"]
    run(*arguments, "--trials", 2, "--storage", f"sqlite:///{folder / 'study.db'}")
    result = run(*arguments, "--trials", 3)
    assert "the study in sqlite:///run/study.db" in result.stdout
    assert not (folder / "study.journal").exists()
    storage = RDBStorage(f"sqlite:///{folder / 'study.db'}")
    assert len(storage.get_all_trials(storage.get_all_studies()[0]._study_id)) == 3


def finished_trials(journal):
    return sum('"state": 1' in line or '"state":1' in line for line in journal.read_text().splitlines())
