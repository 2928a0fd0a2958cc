"""Studies whose trials are trained together: which are asked for at once, what is recorded, and several processes."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from torchintro import training as engines
from torchintro.data.datasets import synthetic
from torchintro.nn import initial_linear
from torchintro.training import baseline as _plain
from torchintro.training.fit import fit
from torchintro.tuning import trials as _trials

optuna = pytest.importorskip("optuna")  # the machine of `make gpu-check` may lack it
from optuna.trial import TrialState  # noqa: E402

from torchintro.tuning.trials import held_interrupts  # noqa: E402
from torchintro.tuning.tune import best_lr, tune  # noqa: E402

DATA = synthetic(60, seed=3)
X, y = DATA.X, DATA.y
LOW, HIGH = 1e-4, 1e-1


class Prescribed(optuna.samplers.BaseSampler):
    """Gives the learning rates of a list by the trial's number, and of other parameters the first choice."""

    def __init__(self, rates):
        self.rates = rates

    def infer_relative_search_space(self, study, trial):
        return {}

    def sample_relative(self, study, trial, search_space):
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self.rates[trial.number]


class Stubborn(optuna.samplers.RandomSampler):
    """Draws the same learning rate again and again."""

    def sample_independent(self, study, trial, param_name, param_distribution):
        return 0.01 if param_name == "lr" else super().sample_independent(study, trial, param_name, param_distribution)


@pytest.fixture
def batches(monkeypatch):
    """The learning rates that were trained together, in order."""
    trained = []
    train_models = engines.train_models

    def spy(data, *, lr, **options):
        trained.append(list(lr))
        return train_models(data, lr=lr, **options)

    monkeypatch.setattr(engines, "train_models", spy)
    return trained


def positions(rates):
    return sorted(math.log(rate / LOW) / math.log(HIGH / LOW) for rate in rates)


def gaps(rates):
    return [after - before for before, after in itertools.pairwise(positions(rates))]


def states(study):
    return [trial.state.name for trial in study.trials]


@pytest.mark.parametrize(
    ("sampler", "arguments", "expected"),
    [
        (None, {}, [10, 5, 5]),
        (None, {"n_trials": 60}, [10, 5, 5, 5, 6, 7, 9, 11, 2]),
        (None, {"n_trials": 3}, [3]),
        (None, {"trials_per_batch": 1, "n_trials": 3}, [1, 1, 1]),
        (None, {"trials_per_batch": 8}, [8, 8, 4]),
        (optuna.samplers.TPESampler(n_startup_trials=3), {"n_trials": 9}, [3, 5, 1]),
        (optuna.samplers.RandomSampler(seed=0), {}, [20]),
        ("QMCSampler", {"n_trials": 7}, [7]),
        (optuna.samplers.NSGAIISampler(seed=0), {"n_trials": 9}, [4, 4, 1]),
        (optuna.samplers.GridSampler({"lr": [0.001, 0.01, 0.1]}), {"n_trials": 2}, [2]),
        (optuna.samplers.GridSampler({"lr": [0.001, 0.01, 0.1]}), {}, [3]),  # which is then at its end
    ],
)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_batches(batches, sampler, arguments, expected):
    if sampler == "QMCSampler":
        sampler = optuna.samplers.QMCSampler(seed=0)
    study = tune(X, y, epochs=1, seed=0, sampler=sampler, **arguments)
    assert [len(batch) for batch in batches] == expected
    # A trial holds what was trained.
    assert [trial.params["lr"] for trial in study.trials] == [rate for batch in batches for rate in batch]
    assert set(states(study)) == {"COMPLETE"}
    assert sampler is None or study.sampler is sampler


def test_a_study_that_goes_on_fills_the_first_batch_up(batches):
    options = {"epochs": 1, "seed": 0, "storage": optuna.storages.InMemoryStorage(), "study_name": "s"}
    tune(X, y, n_trials=4, **options)
    tune(X, y, n_trials=17, **options)
    assert [len(batch) for batch in batches] == [4, 6, 5, 2]


def test_batches_are_of_what_memory_allows(batches, monkeypatch):
    monkeypatch.setattr(_trials, "_BATCH_BYTES", 3 * 2 * 4 * 6)  # three models of two float32
    tune(X, y, n_trials=7, epochs=1)
    tune(X, y, n_trials=4, epochs=1, trials_per_batch=4)
    tune(X.double(), y.double(), n_trials=2, epochs=1)
    tune(X.expand(-1, 100), y, n_trials=2, epochs=1)
    assert [len(batch) for batch in batches] == [3, 3, 1, 3, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_no_two_learning_rates_of_a_batch_are_nearly_equal(batches, seed):
    tune(X, y, n_trials=60, epochs=2, seed=seed)
    assert min(gap for batch in batches if len(batch) > 1 for gap in gaps(batch)) >= 0.02 - 1e-9
    assert all(LOW <= rate <= HIGH for batch in batches for rate in batch)


@pytest.mark.parametrize("size", [2, 20, 50])
def test_what_is_drawn_too_close_is_moved_to_the_nearest_place(batches, size):
    study = tune(X, y, n_trials=size, epochs=1, sampler=Stubborn())
    assert batches == [[trial.params["lr"] for trial in study.trials]]
    assert study.trials[0].params["lr"] == 0.01
    gap = min(0.02, 0.4 / size)
    assert gaps(batches[0]) == pytest.approx([gap] * (size - 1))


def test_of_trials_that_differ_otherwise_too_none_is_moved(batches):
    tune(X, y, n_trials=6, epochs=1, sampler=Stubborn(), search_space={"momentum": (0.1, 0.9)})
    assert batches == [[0.01] * 6]


@pytest.mark.parametrize("rates", [[0.01, 0.01, 0.0101]])
def test_what_is_prescribed_is_not_moved(batches, rates):
    tune(X, y, n_trials=3, epochs=1, sampler=Prescribed(rates), trials_per_batch=3)
    options = {"epochs": 1, "storage": optuna.storages.InMemoryStorage(), "study_name": "s", "trials_per_batch": 5}
    study = tune(X, y, n_trials=1, **options)
    for rate in rates:
        study.enqueue_trial({"lr": rate})
    tune(X, y, n_trials=6, **options)
    assert batches[0] == rates
    assert batches[2][:3] == rates
    assert min(gaps(batches[2][2:])) >= 0.02 - 1e-9  # but what is drawn keeps off it


def test_values_are_those_of_models_trained_alone(batches):
    train, held_out = (X[:45], y[:45]), (X[45:], y[45:])
    for options in ({}, {"batch_size": 16}, {"optimizer": "adam"}, {"momentum": 0.9, "weight_decay": 0.01}):
        study = tune(*train, n_trials=12, epochs=20, seed=1, validation=held_out, lr=(1e-3, 0.3), **options)
        for trial in study.trials:
            result = fit(
                initial_linear(1, 1, seed=1),
                *train,
                lr=trial.params["lr"],
                epochs=20,
                validation=held_out,
                seed=1,
                engine="autograd",
                **options,
            )
            assert trial.value == pytest.approx(result.validation_losses[-1].item(), rel=2e-4)
            assert trial.user_attrs["train_loss"] == pytest.approx(result.losses[-1].item(), rel=2e-4)
    assert [len(batch) for batch in batches] == [10, 2] * 4


@pytest.mark.parametrize("with_validation", [False, True])
@pytest.mark.parametrize(
    "pruner",
    [
        optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=2),
        optuna.pruners.SuccessiveHalvingPruner(),
        optuna.pruners.HyperbandPruner(max_resource=30),
        optuna.pruners.PercentilePruner(30.0, n_startup_trials=2),
        optuna.pruners.ThresholdPruner(upper=5.0, n_warmup_steps=4),
        optuna.pruners.NopPruner(),
    ],
    ids=lambda pruner: type(pruner).__name__,
)
def test_a_pruner_decides_as_if_trials_came_one_after_the_other(pruner, with_validation):
    rates = [0.05, 0.3, 0.001, 2.0, 0.1, 0.0002, 0.4, 30.0, 0.02, 0.2, 0.0001, 0.5]
    validation = (X[:9], y[:9]) if with_validation else None

    def objective(trial):
        lr = trial.suggest_float("lr", 1e-4, 100.0, log=True)
        model = initial_linear(1, 1, seed=0)
        try:
            result = fit(model, X, y, lr=lr, epochs=30, validation=validation)
            values = result.losses if validation is None else result.validation_losses
        except ArithmeticError as error:
            # Its validation losses are not kept: those of the epochs before, trained again.
            values = torch.tensor([])
            if error.epoch > 1:
                again = fit(initial_linear(1, 1, seed=0), X, y, lr=lr, epochs=error.epoch - 1, validation=validation)
                values = again.losses if validation is None else again.validation_losses
        for epoch, value in enumerate(values.tolist()):
            trial.report(value, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value if len(values) == 30 else math.inf

    with pytest.MonkeyPatch.context() as quiet:
        quiet.setattr(optuna.logging.get_logger("optuna"), "disabled", True)
        expected = optuna.create_study(sampler=Prescribed(rates), pruner=pruner, study_name="s")
        expected.optimize(objective, n_trials=len(rates))
    study = tune(
        X,
        y,
        n_trials=len(rates),
        epochs=30,
        lr=(1e-4, 100.0),
        seed=0,
        validation=validation,
        engine="autograd",
        sampler=Prescribed(rates),
        pruner=pruner,
        trials_per_batch=5,
        study_name="s",  # Hyperband's brackets depend on it
    )
    assert study.pruner is pruner
    assert states(study) == states(expected)
    for trial, other in zip(study.trials, expected.trials, strict=True):
        assert trial.params == other.params
        assert trial.values == pytest.approx(other.values, rel=2e-4)
        assert trial.intermediate_values == pytest.approx(other.intermediate_values, rel=2e-4)
        if trial.state == TrialState.PRUNED:
            assert trial.user_attrs["epochs"] == len(trial.intermediate_values)
            assert "diverged" not in trial.user_attrs
    if not isinstance(pruner, optuna.pruners.NopPruner):
        assert "PRUNED" in states(study)
    assert math.isfinite(study.best_value)


def test_pruned_trials_count_and_are_not_the_best():
    pruner = optuna.pruners.ThresholdPruner(upper=0.0)
    study = tune(X, y, n_trials=12, epochs=5, pruner=pruner, seed=0)
    assert states(study) == ["PRUNED"] * 12
    assert best_lr(study) is None


def test_without_a_pruner_nothing_is_reported():
    study = tune(X, y, n_trials=2, epochs=5)
    assert isinstance(study.pruner, optuna.pruners.NopPruner)
    assert [trial.intermediate_values for trial in study.trials] == [{}, {}]


def test_the_callback_is_given_every_trial_and_may_stop_the_study():
    seen = []

    def callback(study, trial):
        seen.append(trial)
        trial.params.clear()  # its own copy
        if trial.number == 6:
            study.stop()

    study = tune(X, y, n_trials=20, epochs=2, trials_per_batch=4, progress=callback)
    assert [trial.number for trial in seen] == list(range(8))
    assert [trial.value for trial in seen] == [trial.value for trial in study.trials]
    assert all(trial.params for trial in study.trials)
    with pytest.raises(RuntimeError, match="supposed to be invoked inside"):
        study.stop()


def test_what_is_logged(caplog):
    optuna.logging.enable_propagation()
    try:
        pruner = optuna.pruners.ThresholdPruner(upper=5.0, n_warmup_steps=2)
        study = tune(X, y, n_trials=2, epochs=3, sampler=Prescribed([0.3, 1e-4]), pruner=pruner, progress=True, seed=0)
    finally:
        optuna.logging.disable_propagation()
    # Some releases of pytest see a record at its own logger too.
    messages = list(dict.fromkeys(message for message in caplog.messages if message.startswith("Trial")))
    assert states(study) == ["COMPLETE", "PRUNED"]
    assert len(messages) == 2
    for trial, message in zip(study.trials, messages, strict=True):
        expected = f"Trial {trial.number} pruned."
        if trial.state == TrialState.COMPLETE:
            expected = (
                f"Trial {trial.number} finished with value: {trial.value} and parameters: {trial.params}. Best is"
            )
        assert message.startswith(expected)


@pytest.mark.parametrize("batch_sizes", [None, [8, 16]])
def test_the_plain_loop_is_timed_once_a_batch_size(monkeypatch, batch_sizes):
    timed = []
    plain = _plain.train_models

    def spy(rows, options, *arguments, **others):
        timed.append((options.batch_size, options.epochs))
        assert options.engine == "reference"
        return plain(rows, options, *arguments, **others)

    monkeypatch.setattr(_plain, "train_models", spy)
    space = batch_sizes and {"batch_size": batch_sizes}
    options = {"n_trials": 15, "epochs": 2, "search_space": space, "validation": 0.2, "seed": 0}
    study = tune(X, y, benchmark=True, **options)
    sizes = batch_sizes or [None]
    assert 3 * len(sizes) <= len(timed) <= 5 * len(sizes)
    assert all(1 <= epochs <= 50 for _, epochs in timed)
    for size in sizes:
        times = {
            trial.user_attrs["reference_seconds_per_epoch"]
            for trial in study.trials
            if trial.params.get("batch_size") == size
        }
        assert len(times) == 1
        assert 0 < times.pop() < 1
    assert all(1 <= trial.user_attrs["reference_epochs"] <= 50 for trial in study.trials)
    assert study.user_attrs["engines"].keys() == {trial.user_attrs["engine"] for trial in study.trials}
    assert all("reference_seconds_per_epoch" not in trial.user_attrs for trial in tune(X, y, **options).trials)


def test_an_error_in_training_leaves_failed_trials(monkeypatch):
    storage = optuna.storages.InMemoryStorage()
    options = {"epochs": 1, "seed": 0, "storage": storage, "study_name": "s"}
    with monkeypatch.context() as broken:

        def out_of_memory(*arguments, **options):
            raise RuntimeError("out of memory")

        broken.setattr(engines, "train_models", out_of_memory)
        with pytest.raises(RuntimeError, match=r"^out of memory$"):
            tune(X, y, n_trials=4, **options)
    study = tune(X, y, n_trials=4, **options)
    assert states(study) == ["FAIL"] * 4 + ["COMPLETE"] * 4


def test_ctrl_c_while_a_batch_is_trained_together(monkeypatch):
    storage = optuna.storages.InMemoryStorage()
    options = {"epochs": 2, "seed": 0, "storage": storage, "study_name": "s"}
    with monkeypatch.context() as interrupted:

        def interrupt(*arguments, **options):
            raise KeyboardInterrupt

        interrupted.setattr("torchintro.training.train._drive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tune(X, y, n_trials=6, **options)
    study = tune(X, y, n_trials=6, **options)
    assert states(study) == ["FAIL"] * 6 + ["COMPLETE"] * 6


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


@pytest.fixture
def _ctrl_c_interrupts():
    # Where the suite runs in a shell's background, that Ctrl-C is ignored is inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


def test_an_engine_that_trains_one_after_the_other_is_recorded_so(batches):
    told = []
    tune(X, y, n_trials=4, epochs=1, engine="autograd", progress=lambda *_: told.append(len(batches)))
    assert told == [1, 2, 3, 4]
    del batches[:], told[:]
    tune(X, y, n_trials=4, epochs=1, engine="fused", progress=lambda *_: told.append(len(batches)))
    assert told == [1, 1, 1, 1]


@pytest.mark.parametrize("interrupted", [0, 7, 9])
def test_ctrl_c_within_a_batch(tmp_path, interrupted):
    options = {
        "epochs": 2,
        "seed": 0,
        "storage": f"sqlite:///{tmp_path}/study.db",
        "study_name": "s",
        "trials_per_batch": 5,
    }

    def stop(study, trial):
        if trial.number == interrupted:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(X, y, n_trials=12, progress=stop, **options)
    asked = 5 * (interrupted // 5 + 1)
    before = states(optuna.load_study(study_name="s", storage=options["storage"]))
    assert before == ["COMPLETE"] * (interrupted + 1) + ["FAIL"] * (asked - interrupted - 1)
    study = tune(X, y, n_trials=12, **options)
    assert states(study) == before + ["COMPLETE"] * (12 - interrupted - 1)
    assert len({trial.params["lr"] for trial in study.trials}) == len(study.trials)


def test_ctrl_c_while_the_sampler_draws():
    class Slow(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, param_name, param_distribution):
            if trial.number == 2:
                raise KeyboardInterrupt
            return super().sample_independent(study, trial, param_name, param_distribution)

    storage, sampler = optuna.storages.InMemoryStorage(), Slow()
    with pytest.raises(KeyboardInterrupt):
        tune(X, y, n_trials=5, epochs=1, storage=storage, study_name="s", sampler=sampler)
    assert states(optuna.load_study(study_name="s", storage=storage)) == ["FAIL"] * 3


def test_a_journal(tmp_path):
    journal = pytest.importorskip("optuna.storages.journal")
    options = {"epochs": 2, "seed": 0, "study_name": "s"}

    def storage():
        return optuna.storages.JournalStorage(journal.JournalFileBackend(str(tmp_path / "journal.log")))

    tune(X, y, n_trials=7, storage=storage(), **options)
    study = tune(X, y, n_trials=13, storage=storage(), **options)
    again = optuna.load_study(study_name="s", storage=storage())
    assert states(study) == states(again) == ["COMPLETE"] * 13
    assert [trial.user_attrs for trial in study.trials] == [trial.user_attrs for trial in again.trials]


SCRIPT = """
import json, sys
from torchintro.data.datasets import synthetic
from torchintro.tuning.tune import tune  # noqa: E402
data = synthetic(60, seed=3)
study = tune(data.X, data.y, epochs=20, seed=0, study_name="s", progress=lambda study, trial: print(
    json.dumps([trial.number, trial.params["lr"]]), flush=True), **json.loads(sys.argv[1]))
"""


def start(**arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_two_processes_at_once(tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    # Both find no file, and make it.
    processes = [start(storage=storage, n_trials=40, trials_per_batch=3) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    told = [[json.loads(line) for line in output.splitlines()] for output, _ in outputs]
    study = optuna.load_study(study_name="s", storage=storage)
    assert set(states(study)) == {"COMPLETE"}
    assert 40 <= len(study.trials) <= 43  # while one fills the study up, the other may be at a batch
    assert sorted(map(tuple, told[0] + told[1])) == [(trial.number, trial.params["lr"]) for trial in study.trials]
    assert all(told)
    assert len({trial.params["lr"] for trial in study.trials}) == len(study.trials)
    # A third has nothing to do.
    assert len(tune(X, y, n_trials=40, epochs=20, seed=0, storage=storage, study_name="s").trials) == len(study.trials)


@pytest.mark.slow
def test_a_process_killed_within_a_batch(tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    with start(storage=storage, n_trials=1000, trials_per_batch=8) as process:
        seen = [json.loads(process.stdout.readline()) for _ in range(11)]
        process.send_signal(signal.SIGKILL)
        seen += [json.loads(line) for line in process.stdout]
    left = states(optuna.load_study(study_name="s", storage=storage))
    assert "RUNNING" in left
    # The kill may have come between a trial's record and its printing.
    finished = left.count("COMPLETE")
    assert len(seen) <= finished <= len(seen) + 1
    study = tune(X, y, n_trials=finished + 7, epochs=20, seed=0, storage=storage, study_name="s")
    assert states(study).count("COMPLETE") == finished + 7
    assert states(study)[: len(left)] == left
    assert len({trial.params["lr"] for trial in study.trials if trial.params}) == sum(
        1 for trial in study.trials if trial.params
    )


FOLLOWING = """
import sys, torch
import torch.distributed as dist
from dataclasses import replace
from torchintro.tuning import tune as tuning
from torchintro.data.datasets import synthetic
rank, rendezvous = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
made = tuning._study_data
tuning._study_data = lambda *arguments, **options: replace(made(*arguments, **options), shared=True)
data = synthetic(60, seed=3)
torch.manual_seed(rank)  # without a seed the ranks still have to start from the same parameters
study = tuning.tune(data.X, data.y, n_trials=13, epochs=5, study_name="s")
print([(trial.number, trial.params, trial.value, trial.state.name, trial.user_attrs) for trial in study.trials])
print(study.study_name, study.user_attrs)
try:
    tuning.tune(data.X, data.y, n_trials=13, epochs=5, storage=f"sqlite:////no/such/folder/{rank}.db")
except (ValueError, RuntimeError) as error:
    print("raised", type(error).__name__, error, file=sys.stderr)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_ranks_that_share_the_rows_share_the_study(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FOLLOWING, str(rank), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][0].count("'COMPLETE'") == 13
    assert "raised ValueError tune: storage" in outputs[0][1]
    assert "raised RuntimeError tune: rank 0 stopped the study: ValueError: tune: storage" in outputs[1][1]
