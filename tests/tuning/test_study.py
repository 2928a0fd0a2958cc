"""Studies that go on where they were, are refused, are interrupted, or are shared by several ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from torchintro.data.datasets import synthetic

optuna = pytest.importorskip("optuna")  # the machine of `make gpu-check` may lack it
from optuna.trial import TrialState  # noqa: E402
from studies import lrs  # noqa: E402

from torchintro.tuning.study import held_interrupts  # noqa: E402
from torchintro.tuning.tune import tune  # noqa: E402

DATA = synthetic(60, seed=3)
X, y = DATA.X, DATA.y


def test_a_study_goes_on_where_it_was(device, tmp_path):
    X, y = DATA.X.to(device), DATA.y.to(device)
    options = {"epochs": 3, "storage": f"sqlite:///{tmp_path}/study.db", "study_name": "s", "seed": 0}
    first = lrs(tune(X, y, n_trials=3, **options))
    study = tune(X, y, n_trials=8, **options)
    assert lrs(study)[:3] == first
    assert len(set(lrs(study))) == len(study.trials) == 8
    assert lrs(tune(X, y, n_trials=8, **options)) == lrs(study)
    assert len(tune(X, y, n_trials=2, **options).trials) == 8
    assert len(tune(X, y, n_trials=2, **(options | {"study_name": "other"})).trials) == 2


def test_a_storage_object():
    storage = optuna.storages.InMemoryStorage()
    tune(X, y, n_trials=2, epochs=2, storage=storage, study_name="s")
    assert len(tune(X, y, n_trials=5, epochs=2, storage=storage, study_name="s").trials) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 4}, "was made with epochs=3, but got 4: give the same, or another study_name"),
        ({"seed": 1}, "was made with seed=0, but got 1"),
        ({"optimizer": "adam"}, "was made with optimizer='sgd', but got 'adam'"),
        ({"optimizer_options": {"nesterov": False}}, "was made with optimizer_options=None, but got"),
        ({"validation": 0.5}, r"was made with X=\[60, 1\], but got \[30, 1\]"),
        ({"validation": (X[:5], y[:5])}, "was made with validation rows=0, but got 5"),
    ],
)
def test_a_study_is_not_gone_on_with_by_other_settings(change, message):
    options = {"n_trials": 1, "epochs": 3, "seed": 0, "storage": optuna.storages.InMemoryStorage(), "study_name": "s"}
    tune(X, y, **options)
    with pytest.raises(ValueError, match=f"^tune: the study 's' {message}"):
        tune(X, y, **(options | change))


def test_studies_of_others_are_refused():
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="mine")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(ValueError, match=r"^tune: the study 'mine' holds trials that are not tune's$"):
        tune(X, y, storage=storage, study_name="mine")
    optuna.create_study(storage=storage, study_name="max", direction="maximize")
    with pytest.raises(ValueError, match=r"^tune: the study 'max' does not minimise one value"):
        tune(X, y, storage=storage, study_name="max")


def test_a_study_of_other_rows_is_refused(device):
    X, y = DATA.X.to(device), DATA.y.to(device)
    storage = optuna.storages.InMemoryStorage()
    tune(X, y, n_trials=1, epochs=1, storage=storage, study_name="s")
    tune(X, y, n_trials=2, epochs=1, storage=storage, study_name="s")
    with pytest.raises(ValueError, match=r"was made with data \(SHA-256\)="):
        tune(X, y + 1, n_trials=3, epochs=1, storage=storage, study_name="s")


def test_a_study_of_another_search_space_is_refused():
    options = {"n_trials": 1, "epochs": 1, "storage": optuna.storages.InMemoryStorage(), "study_name": "s"}
    tune(X, y, search_space={"momentum": (0.0, 0.9)}, **options)
    tune(X, y, search_space={"momentum": (0.0, 0.9)}, **options)
    changed = "^tune: the study 's' was made with search_space=.*'momentum': FloatDistribution"
    with pytest.raises(ValueError, match=rf"{changed}.*, but got None"):
        tune(X, y, **options)
    with pytest.raises(ValueError, match=changed):
        tune(X, y, search_space={"momentum": (0.0, 0.5)}, **options)


def test_an_interrupt_while_a_trial_is_recorded():
    class Interrupted(optuna.storages.InMemoryStorage):
        def set_trial_state_values(self, *arguments, **options):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(X, y, n_trials=2, epochs=1, storage=Interrupted())


class Dropping(optuna.storages.InMemoryStorage):
    """Is interrupted while it records the third trial, and drops that, as a callback of a weak reference would."""

    def set_trial_state_values(self, trial_id, state, values=None):
        if state == TrialState.COMPLETE and self.get_trial(trial_id).number == 2:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                os.getpid()
            except KeyboardInterrupt:
                pass
        return super().set_trial_state_values(trial_id, state, values)


@pytest.mark.usefixtures("_ctrl_c_interrupts")
def test_ctrl_c_while_a_storage_is_at_work_is_not_lost():
    storage = Dropping()
    with pytest.raises(KeyboardInterrupt):
        tune(X, y, n_trials=6, epochs=2, seed=0, storage=storage, study_name="s")
    (study,) = storage.get_all_studies()
    left = [trial.state.name for trial in storage.get_all_trials(study._study_id)]
    assert left == ["COMPLETE"] * 3 + ["FAIL"] * 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("_ctrl_c_interrupts")
def test_a_second_ctrl_c_comes_through_at_once():
    reached = []

    def interrupted(times):
        with held_interrupts():
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                reached.append(os.getpid())
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        interrupted(1)
    assert reached[-1] == "the end"
    del reached[:]
    with pytest.raises(KeyboardInterrupt):
        interrupted(2)
    assert "the end" not in reached


SHARING = """
import os, sys, torch
import torch.distributed as dist
from torchintro.data.datasets import synthetic
from torchintro.training.row_kinds import MemoryRows
from torchintro.tuning.tune import tune
folder, children = sys.argv[1], []
MemoryRows.is_shared = True
for rank in range(2):  # one process that imports torch, and then two
    if child := os.fork():
        children.append(child)
        continue
    sys.stdout, sys.stderr = (open(f"{folder}/{rank}.{name}", "w", buffering=1) for name in ("out", "err"))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    data = synthetic(60, seed=3)
    torch.manual_seed(rank)  # without a seed the ranks have other parameters to start from
    study = tune(data.X, data.y, n_trials=13, epochs=5, study_name="s")
    print([(trial.number, trial.params, trial.value, trial.state.name, trial.user_attrs) for trial in study.trials])
    print(study.study_name, study.user_attrs)
    try:
        tune(data.X, data.y, n_trials=13, epochs=5, storage=f"sqlite:////no/such/folder/{rank}.db")
    except (ValueError, RuntimeError) as error:
        print("raised", type(error).__name__, error, file=sys.stderr)
    dist.destroy_process_group()
    os._exit(0)
sys.exit(max(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_ranks_that_share_the_rows_share_the_study(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SHARING, str(tmp_path)], timeout=180, check=False, env=environment)
    first, second = ([(tmp_path / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(2))
    assert done.returncode == 0, first[1] + second[1]
    assert first[0] == second[0]
    assert first[0].count("'COMPLETE'") == 13
    assert "raised ValueError tune: storage" in first[1]
    assert "raised RuntimeError tune: rank 0 stopped the study: ValueError: tune: storage" in second[1]
