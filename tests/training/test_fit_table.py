"""Training on tables that are streamed, against training on the same rows in memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from torchintro import DivergedError, LinearStatistics, fit, open_table, saving, tune
from torchintro.nn import initial_linear


@pytest.fixture
def table(tmp_path):
    """A folder of two files, and the same rows as tensors."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(1000, 5, generator=generator)
    y = X @ torch.randn(5, 1, generator=generator) + 3 + 0.1 * torch.randn(1000, 1, generator=generator)
    folder = tmp_path / "rows"
    folder.mkdir()
    everything = torch.cat([X, y], 1).numpy()
    np.save(folder / "a.npy", everything[:600])
    np.save(folder / "b.npy", everything[600:])
    return open_table(folder), X, y


def parameters(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def model_for(X, dtype=torch.float32):
    return initial_linear(X.shape[1], 1, seed=1, dtype=dtype)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"optimizer": "adam"}])
def test_full_batch_is_one_pass_and_the_same_trajectory(table, options):
    table, X, y = table
    streamed, in_memory = model_for(X), model_for(X)
    result = fit(streamed, table, lr=0.02, epochs=30, validation=(X[:50], y[:50]), **options)
    expected = fit(in_memory, X, y, lr=0.02, epochs=30, validation=(X[:50], y[:50]), engine="autograd", **options)
    assert result.engine == "statistics"
    assert "table" in result.reason
    for series in ("losses", "validation_losses"):
        assert torch.allclose(getattr(result, series), getattr(expected, series), rtol=2e-5)
    assert torch.allclose(parameters(streamed), parameters(in_memory), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["auto", "fused", "autograd", "reference"])
@pytest.mark.parametrize("batch_size", [64, 1000, 7])
def test_mini_batches_are_slices_in_the_tables_order(table, batch_size, engine):
    table, X, y = table
    streamed, in_memory = model_for(X), model_for(X)
    if batch_size == 1000 and engine != "auto":
        with pytest.raises(ValueError, match=r"^fit: engine '.*' cannot do this: a table has no full batch in memory"):
            fit(streamed, table, lr=0.02, batch_size=batch_size, engine=engine)
        return
    options = {"lr": 0.02, "epochs": 3, "batch_size": batch_size, "momentum": 0.5}
    result = fit(streamed, table, validation=open_table(table.path), engine=engine, **options)
    expected = fit(in_memory, X, y, shuffle=False, validation=(X, y), engine="reference", **options)
    assert torch.allclose(result.losses, expected.losses, rtol=2e-5)
    assert torch.allclose(result.validation_losses, expected.validation_losses, rtol=2e-5)
    assert torch.allclose(parameters(streamed), parameters(in_memory), rtol=1e-4, atol=1e-5)


def test_any_optimizer_can_train_by_mini_batches_of_a_table(table):
    table, X, _ = table
    result = fit(model_for(X), table, lr=0.01, epochs=3, batch_size=100, optimizer="rmsprop")
    assert (result.engine, result.losses[-1] < result.losses[0]) == ("autograd", True)
    with pytest.raises(
        ValueError, match=r"^fit: no engine trains on all rows of a table at once with the optimizer RMS"
    ):
        fit(model_for(X), table, lr=0.01, optimizer="rmsprop")


@pytest.mark.parametrize("batch_size", [None, 100])
def test_a_share_is_held_out_by_the_seed(table, batch_size):
    table, X, _ = table
    train, held_out = table.split(0.25, seed=3)
    parts = [[torch.cat(part) for part in zip(*half.pieces(), strict=True)] for half in (train, held_out)]
    streamed, in_memory = model_for(X), model_for(X)
    options = {"lr": 0.05, "epochs": 4, "batch_size": batch_size}
    result = fit(streamed, table, validation=0.25, seed=3, **options)
    expected = fit(in_memory, *parts[0], shuffle=False, validation=parts[1], engine="autograd", **options)
    assert torch.allclose(result.losses, expected.losses, rtol=2e-5)
    assert torch.allclose(result.validation_losses, expected.validation_losses, rtol=2e-5)


@pytest.mark.parametrize("batch_size", [None, 100])
def test_statistics_may_judge_a_table(table, batch_size, monkeypatch):
    table, X, y = table
    held_out = LinearStatistics(5, 1).update(X[:300], y[:300])
    before = [moment.clone() for moment in held_out.tensors]
    options = {"lr": 0.05, "epochs": 3, "batch_size": batch_size}
    expected = fit(model_for(X), table, validation=(X[:300], y[:300]), **options)
    passes = []
    pieces = type(table).pieces
    monkeypatch.setattr(type(table), "pieces", lambda self, **options: passes.append(1) or pieces(self, **options))
    result = fit(model_for(X), table, validation=held_out, **options)
    assert torch.allclose(result.validation_losses, expected.validation_losses, rtol=1e-6)
    assert len(passes) == (1 if batch_size is None else 3)  # none for the rows held out
    assert all(torch.equal(own, was) for own, was in zip(held_out.tensors, before, strict=True))
    with pytest.raises(ValueError, match=r"^fit: validation must have at least one row of positive weight, but has"):
        fit(model_for(X), table, validation=LinearStatistics(5, 1), **options)
    with pytest.raises(ValueError, match=r"^fit: validation must be statistics of 5 features and 1 targets, as X has"):
        fit(model_for(X), table, validation=LinearStatistics(4, 1), **options)


def test_divergence_leaves_the_last_finite_parameters(table):
    table, X, _ = table
    for batch_size in (None, 100):
        model = model_for(X)
        with pytest.raises(DivergedError, match=r"^fit: the loss became (inf|nan) in epoch \d+ with lr=9") as caught:
            fit(model, table, lr=9.0, epochs=200, batch_size=batch_size)
        assert torch.isfinite(parameters(model)).all()
        assert len(caught.value.losses) == caught.value.epoch - 1
        assert torch.isfinite(caught.value.losses).all()


def test_progress_shows_the_pass_and_the_epochs(table, capsys):
    table, X, _ = table
    fit(model_for(X), table, lr=0.01, epochs=10, progress=True)
    printed = capsys.readouterr()
    assert printed.out.startswith("Engine: statistics (a table")
    assert "Epoch [10/10], Loss: " in printed.out


@pytest.mark.parametrize("batch_size", [None, 100])
def test_a_study_on_a_table_is_one_on_its_rows(table, batch_size, tmp_path):
    table, X, y = table
    options = {"n_trials": 12, "epochs": 5, "seed": 0, "batch_size": batch_size}
    study = tune(table, validation=(X[:50], y[:50]), storage=f"sqlite:///{tmp_path}/s.db", study_name="s", **options)
    assert {trial.user_attrs["engine"] for trial in study.trials} == {"fused" if batch_size else "statistics"}
    for trial in study.trials:
        model = initial_linear(5, 1, seed=0)
        alone = fit(
            model,
            X,
            y,
            lr=trial.params["lr"],
            epochs=5,
            batch_size=batch_size,
            shuffle=False,
            validation=(X[:50], y[:50]),
            engine="reference",
        )
        assert trial.value == pytest.approx(alone.validation_losses[-1].item(), rel=1e-4)
    again = tune(table, validation=(X[:50], y[:50]), storage=f"sqlite:///{tmp_path}/s.db", study_name="s", **options)
    assert len(again.trials) == 12
    np.save(table.path / "c.npy", np.zeros((3, 6), np.float32))
    with pytest.raises(ValueError, match=r"^tune: the study 's' was made with "):
        tune(
            open_table(table.path),
            validation=(X[:50], y[:50]),
            storage=f"sqlite:///{tmp_path}/s.db",
            study_name="s",
            **options,
        )


BAD_CALLS = [
    ({"y": torch.zeros(1000, 1)}, TypeError, "fit: y must be None with a table, which has its own targets, .*Tensor"),
    ({"shuffle": True, "batch_size": 10}, ValueError, "fit: shuffle must not be True for a table"),
    ({"validation": 1.5}, ValueError, "fit: validation must be a fraction between 0 and 1, but got 1.5"),
    ({"validation": torch.zeros(3, 5)}, TypeError, r"fit: validation must be a pair \(X_val, y_val\), but got Tensor"),
    ({"model": torch.nn.Linear(4, 1)}, ValueError, "fit: X must be a table of 4 features and 1 targets, .*5 and 1"),
    ({"engine": "autograd"}, ValueError, "fit: engine 'autograd' cannot do this: a table has no full batch in memory"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS)
def test_bad_calls_say_what_is_wrong(table, arguments, error, message):
    call = {"model": torch.nn.Linear(5, 1), "lr": 0.1} | arguments
    with pytest.raises(error, match=f"^{message}"):
        fit(call.pop("model"), table[0], call.pop("y", None), **call)


@pytest.mark.slow
def test_two_processes_share_a_table(table, tmp_path):
    """As torchrun starts them: each reads its own share, and both end with the single process's model."""
    table, X, _ = table
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, torch, torch.distributed
            from torchintro import fit, open_table, tune
            from torchintro.nn import initial_linear
            torch.distributed.init_process_group("gloo")
            model = initial_linear(5, 1, seed=1)
            kept = {{"checkpoint": {str(tmp_path / "kept")!r}, "validation": 0.2, "seed": 3}}
            result = fit(model, open_table({str(table.path)!r}), lr=0.05, epochs=20, **kept)
            rank = torch.distributed.get_rank()
            study = tune(open_table({str(table.path)!r}), n_trials=12, epochs=5, **kept)
            trials = [(trial.params["lr"], trial.value) for trial in study.trials]
            found = model.state_dict(), result.losses, result.validation_losses, trials
            torch.save(found, f"{tmp_path}/{{rank}}.pt")
            try:
                fit(model, open_table({str(table.path)!r}), lr=0.05, batch_size=10)
            except ValueError as error:
                print(error)
            torch.distributed.destroy_process_group()
            """
        )
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fit: batch_size must be None for a table and several processes") == 2
    kept = [saving.read_file("", tmp_path / f"kept.{rank}", "pass", 1, map_location="cpu") for rank in range(2)]
    assert [file["rows"] for file in kept] == [500, 500]
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = model_for(X)
    expected = fit(model, table, lr=0.05, epochs=20, validation=0.2, seed=3)
    study = tune(table, n_trials=12, epochs=5, validation=0.2, seed=3)
    trials = torch.tensor([(trial.params["lr"], trial.value) for trial in study.trials])
    for state, losses, validation_losses, found in states:
        assert torch.allclose(torch.tensor(found), trials, rtol=1e-6)
        assert torch.equal(state["weight"], states[0][0]["weight"])
        assert torch.allclose(state["weight"], model.weight, rtol=1e-6)
        assert torch.allclose(losses, expected.losses, rtol=1e-12)
        assert torch.allclose(validation_losses, expected.validation_losses, rtol=1e-12)
