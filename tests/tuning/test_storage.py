"""Where a study is kept: journals and databases that several processes share, and from which some are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from torchintro.data.datasets import synthetic

optuna = pytest.importorskip("optuna")  # the machine of `make gpu-check` may lack it
from studies import lrs, states  # noqa: E402

from torchintro.tuning.storage import open_storage  # noqa: E402
from torchintro.tuning.tune import tune  # noqa: E402

DATA = synthetic(60, seed=3)
X, y = DATA.X, DATA.y


@pytest.mark.parametrize(
    "kind", [str, lambda path: path, lambda path: os.path.relpath(path)], ids=["str", "Path", "rel"]
)
def test_a_journal(tmp_path, kind):
    storage = kind(tmp_path / "study.journal")
    options = {"epochs": 2, "seed": 0, "study_name": "s"}
    tune(X, y, n_trials=7, storage=storage, **options)
    study = tune(X, y, n_trials=13, storage=storage, **options)
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.journal"))
    again = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend))
    assert states(study) == states(again) == ["COMPLETE"] * 13
    assert [trial.user_attrs for trial in study.trials] == [trial.user_attrs for trial in again.trials]
    assert [path.name for path in tmp_path.iterdir()] == ["study.journal"]


def test_half_a_line_at_a_journals_end_is_taken_away(tmp_path):
    options = {"epochs": 2, "seed": 0, "study_name": "s", "storage": tmp_path / "study.log"}
    tune(X, y, n_trials=3, **options)
    whole = options["storage"].read_bytes()
    options["storage"].write_bytes(whole + b'{"op_code":8,"trial_')
    assert states(tune(X, y, n_trials=5, **options)) == ["COMPLETE"] * 5
    assert options["storage"].read_bytes().startswith(whole)
    assert states(tune(X, y, n_trials=5, **options)) == ["COMPLETE"] * 5


def test_a_process_killed_with_the_journals_lock_holds_up_no_other(tmp_path):
    storage = open_storage(tmp_path / "study.log")
    code = f"""
import os, signal
from torchintro.tuning.storage import _JournalLock
_JournalLock({str(tmp_path / "study.log")!r}).acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    start = time.monotonic()
    optuna.create_study(storage=storage, study_name="s")
    assert time.monotonic() - start < 20  # Optuna's own locks wait for 30 seconds


FORKING = """
import json, os, sys
from torchintro.data.datasets import synthetic
from torchintro.tuning.tune import tune
children = []
for child, arguments in enumerate(json.loads(sys.argv[1])):  # one process that imports torch, and then several
    def told(study, trial):
        os.write(1, (json.dumps([child, os.getpid(), trial.number, trial.params["lr"]]) + chr(10)).encode())
    if process := os.fork():
        children.append(process)
        continue
    data = synthetic(60, seed=3)  # not before: what torch's threads hold would stay held
    try:
        tune(data.X, data.y, epochs=20, seed=0, study_name="s", progress=told, **arguments)
    except BaseException as error:
        print("raised", type(error), error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
sys.exit(int(any(os.waitpid(process, 0)[1] for process in children)))
"""


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-c", FORKING, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def storages(tmp_path):
    return [f"sqlite:///{tmp_path}/study.db", f"{tmp_path}/study.journal"]


@pytest.mark.slow
def test_two_processes_at_once(storages):
    # Both find no file, and make it.
    process = start([{"storage": storages[child % 2], "n_trials": 40, "trials_per_batch": 3} for child in range(4)])
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    told = [json.loads(line) for line in output.splitlines()]
    assert {child for child, *_ in told} == set(range(4))
    for kind, storage in enumerate(storages):
        study = optuna.load_study(study_name="s", storage=open_storage(storage))
        assert set(states(study)) == {"COMPLETE"}
        assert 40 <= len(study.trials) <= 43  # while one fills the study up, the other may be at a batch
        trained = sorted((number, lr) for child, _, number, lr in told if child % 2 == kind)
        assert trained == [(trial.number, trial.params["lr"]) for trial in study.trials]
        assert len({trial.params["lr"] for trial in study.trials}) == len(study.trials)
        # A third has nothing to do.
        again = tune(X, y, n_trials=40, epochs=20, seed=0, storage=storage, study_name="s")
        assert len(again.trials) == len(study.trials)


@pytest.mark.slow
def test_a_process_killed_within_a_batch(storages):
    with start([{"storage": storage, "n_trials": 1000, "trials_per_batch": 8} for storage in storages]) as process:
        seen = {child: [] for child in range(2)}
        for line in process.stdout:
            child, number, *trial = json.loads(line)
            seen[child].append(trial)
            if len(seen[child]) == 11:
                os.kill(number, signal.SIGKILL)
    for child, storage in enumerate(storages):
        before = optuna.load_study(study_name="s", storage=open_storage(storage))
        left = states(before)
        assert "RUNNING" in left
        # The kill may have come between a trial's record and its printing.
        finished = left.count("COMPLETE")
        assert len(seen[child]) <= finished <= len(seen[child]) + 1
        assert lrs(before)[: len(seen[child])] == [lr for _, lr in seen[child]]
        study = tune(X, y, n_trials=finished + 7, epochs=20, seed=0, storage=storage, study_name="s")
        # What was cut off is still there, is not taken for finished, and does not stand in the way.
        assert states(study)[: len(left)] == left
        assert states(study)[len(left) :] == ["COMPLETE"] * 7
        assert len(left) - finished <= 8
        drawn = [trial.params["lr"] for trial in study.trials if trial.params]
        assert len(set(drawn)) == len(drawn)
