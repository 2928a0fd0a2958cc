"""A pass over a table that is interrupted and gone on with, against one that is not."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from torchintro import LinearStatistics, fit, open_table, saving, tune
from torchintro.data import gather as _passes
from torchintro.data import table as tables
from torchintro.data.table import Table
from torchintro.nn import initial_linear

ROWS, FEATURES = 5000, 3
WIDTH = 4 * (FEATURES + 1)


@pytest.fixture(autouse=True)
def _many_pieces(monkeypatch):
    """Pieces of 64 rows, and nothing that is saved only because the clock says so."""
    monkeypatch.setattr(tables, "PIECE_BYTES", 64 * WIDTH)
    monkeypatch.setattr(_passes, "_SAVED_EVERY", 1e9)


def write(folder, kind="npy"):
    matrix = np.random.default_rng(0).standard_normal((ROWS, FEATURES + 1), np.float32)
    matrix[:, -1] += 1000 + matrix[:, 0]
    folder.mkdir(exist_ok=True)
    for k, part in enumerate(np.array_split(matrix, 3)):
        path = folder / f"{k}.{kind}"
        if kind == "npy":
            np.save(path, part)
            continue
        pyarrow = pytest.importorskip("pyarrow")
        columns = pyarrow.table({str(i): part[:, i] for i in range(FEATURES + 1)})
        if kind == "csv":
            pytest.importorskip("pyarrow.csv").write_csv(columns, path)
        else:
            pytest.importorskip("pyarrow.parquet").write_table(columns, path, row_group_size=700)
    return open_table(folder)


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "rows")


def bits(*parts):
    return [moment.tolist() for part in parts for moment in part.tensors]


class Stop:
    """A progress function that raises after so many rows."""

    def __init__(self, rows, error=KeyboardInterrupt):
        self.rows, self.error, self.seen = rows, error, []

    def __call__(self, rows, total, seconds):
        self.seen.append(rows)
        if rows >= self.rows:
            raise self.error


@pytest.fixture
def read(monkeypatch):
    """The arguments of each pass over a table from now on."""
    seen = []
    for name in ("pieces", "marked_pieces"):
        original = getattr(Table, name)

        def spy(self, *args, original=original, **options):
            seen.append(options | {"path": self.path})
            return original(self, *args, **options)

        monkeypatch.setattr(Table, name, spy)
    return seen


@pytest.mark.parametrize("kind", ["npy", "parquet", "csv"])
@pytest.mark.parametrize("share", [(0, 1), (1, 2)])
def test_going_on_gives_the_bits_of_a_whole_pass(kind, share, tmp_path, read):
    table, path = write(tmp_path / "rows", kind), tmp_path / "kept.pass"
    whole = table.split_statistics(0.3, seed=5, share=share)
    for rows in (500, 640, 200):
        with pytest.raises(KeyboardInterrupt):
            table.split_statistics(0.3, seed=5, share=share, checkpoint=path, progress=Stop(rows))
    train, held_out = table.split_statistics(0.3, seed=5, share=share, checkpoint=path)
    assert [options["start"] for options in read] == [0, 0, 512, 1152, 1408]
    assert bits(train, held_out) == bits(*whole)
    assert held_out.count.item() == pytest.approx(0.3 * (train.count + held_out.count).item(), rel=0.15)


def test_without_a_fraction_it_is_what_update_gathers(table, tmp_path, read):
    assert isinstance(table.statistics(), LinearStatistics)
    expected = LinearStatistics(FEATURES, 1).update(table)
    with pytest.raises(KeyboardInterrupt):
        table.statistics(checkpoint=str(tmp_path / "kept"), progress=Stop(1))
    assert bits(table.statistics(checkpoint=tmp_path / "kept")) == bits(expected)
    assert [options.get("start") for options in read] == [0, None, 0, 64]


def test_after_a_whole_pass_nothing_is_read_again(table, tmp_path, read):
    first = table.split_statistics(checkpoint=tmp_path / "kept")
    again = table.split_statistics(checkpoint=tmp_path / "kept", progress=Stop(0))
    assert bits(*first) == bits(*again)
    assert len(read) == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["kept"]


def test_a_part_of_a_table_has_a_pass_of_its_own(table, tmp_path):
    train, held_out = table.split(0.4, seed=1)
    with pytest.raises(KeyboardInterrupt):
        train.statistics(checkpoint=tmp_path / "kept", progress=Stop(700))
    assert bits(train.statistics(checkpoint=tmp_path / "kept")) == bits(train.statistics())
    with pytest.raises(ValueError, match=r"the table is another one or has changed since"):
        held_out.statistics(checkpoint=tmp_path / "kept")


@pytest.mark.parametrize("within", ["train", "held_out"])
def test_an_interrupt_within_a_piece_counts_it_neither_way(table, tmp_path, monkeypatch, within):
    update, calls = LinearStatistics.update, []

    def interrupted(self, *rows):
        result = update(self, *rows)
        calls.append(1)
        if len(calls) == (8 if within == "train" else 7):
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(LinearStatistics, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            table.split_statistics(checkpoint=tmp_path / "kept")
    assert saving.read_file("", tmp_path / "kept", "pass", 1, map_location="cpu")["rows"] == 3 * 64
    assert bits(*table.split_statistics(checkpoint=tmp_path / "kept")) == bits(*table.split_statistics())


def test_it_is_saved_from_time_to_time(table, tmp_path, monkeypatch):
    monkeypatch.setattr(_passes, "_SAVED_EVERY", 0.0)
    saved = []
    write = saving.write_file
    monkeypatch.setattr(saving, "write_file", lambda *args: saved.append(args[3]["rows"]) or write(*args))
    table.statistics(checkpoint=tmp_path / "kept")
    assert saved == [0, *range(64, ROWS, 64), ROWS, ROWS]  # the last when the last piece is there, and when all is


def test_the_time_of_earlier_runs_counts(table, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        table.statistics(checkpoint=tmp_path / "kept", progress=Stop(640))
    kept = saving.read_file("", tmp_path / "kept", "pass", 1, map_location="cpu")
    assert kept["seconds"] > 0
    gathered = _passes.gather("f", table, checkpoint=tmp_path / "kept")
    again = _passes.gather("f", table, checkpoint=tmp_path / "kept")
    assert kept["seconds"] < again.seconds <= gathered.seconds
    assert gathered.complete
    assert again.complete


def test_going_on_is_said(table, tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        table.statistics(checkpoint=tmp_path / "kept", progress=Stop(2000))
    table.statistics(checkpoint=tmp_path / "kept", progress=True)
    assert f"going on after the 2,048 rows that {tmp_path / 'kept'} holds\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.3}, "it was made with fraction=0.2, but this pass has 0.3"),
        ({"seed": 1}, "it was made with seed=0, but this pass has 1"),
        ({"share": (1, 2)}, r"it was made with share=\[0, 1\], but this pass has \[1, 2\]"),
    ],
)
def test_the_file_of_another_pass_is_refused(table, tmp_path, options, message):
    path = tmp_path / "kept"
    table.split_statistics(checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"^Table.split_statistics: checkpoint {path} must be of .*, but {message}: "):
        table.split_statistics(**options, checkpoint=path)
    assert path.read_bytes() == before


def test_the_file_of_a_table_that_has_changed_is_refused(table, tmp_path):
    table.statistics(checkpoint=tmp_path / "kept")
    np.save(table.path / "3.npy", np.ones((2, FEATURES + 1), np.float32))
    with pytest.raises(ValueError, match=r"the table is another one or has changed since: delete it, or give another$"):
        open_table(table.path).statistics(checkpoint=tmp_path / "kept")


def test_what_is_no_such_file_is_refused(table, tmp_path):
    LinearStatistics(FEATURES, 1).save(tmp_path / "statistics")
    (tmp_path / "text").write_text("text")
    for name, message in (
        ("statistics", "not a pass file of torchintro"),
        ("text", "not a pass file of torchintro, o"),
    ):
        with pytest.raises(ValueError, match=rf"^Table\.statistics: .*{message}"):
            table.statistics(checkpoint=tmp_path / name)
    saving.write_file(tmp_path / "empty", "pass", 1, {"identity": {}})
    with pytest.raises(ValueError, match=r"^Table\.statistics: checkpoint .*empty is damaged: delete it, or give"):
        table.statistics(checkpoint=tmp_path / "empty")
    table.statistics(checkpoint=tmp_path / "sizes")
    content = saving.read_file("", tmp_path / "sizes", "pass", 1, map_location="cpu")
    for name in ("format", "version"):
        del content[name]
    for part in (content["train"], content["held_out"]):
        part |= {name: part[name][..., :2].clone() for name in ("mean_x", "sxx")}
        part |= {name: part[name][:2].clone() for name in ("sxx", "sxy")}
    saving.write_file(tmp_path / "sizes", "pass", 1, content)
    with pytest.raises(ValueError, match=r"^Table\.statistics: checkpoint .*sizes is damaged: delete it, or give"):
        table.statistics(checkpoint=tmp_path / "sizes")
    with pytest.raises(ValueError, match=r"^Table\.statistics: checkpoint must be a file, but .* is a folder"):
        table.statistics(checkpoint=tmp_path)
    with pytest.raises(TypeError, match=r"^Table\.statistics: checkpoint must be a path or None, but got int"):
        table.statistics(checkpoint=3)


def test_a_place_that_cannot_be_written_is_met_before_the_pass(table, tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"^Table\.statistics: checkpoint .* must be in a folder that is there"):
        table.statistics(checkpoint=tmp_path / "nowhere" / "kept")
    assert read == []


def test_a_wrong_argument_leaves_no_file(table, tmp_path):
    for options, error in (({"fraction": 2}, ValueError), ({"share": 3}, TypeError), ({"seed": "a"}, TypeError)):
        with pytest.raises(error, match=r"^Table\."):
            table.split_statistics(**options, checkpoint=tmp_path / "kept")
        assert not (tmp_path / "kept").exists()


def test_a_wrong_value_leaves_no_file_that_stands_in_the_way(table, tmp_path):
    path = table.path / "2.npy"
    good = np.load(path)
    bad = good.copy()
    bad[100, 1] = np.nan
    np.save(path, bad)
    with pytest.raises(ValueError, match=r"^Table\.pieces: column '1' of .*2.npy has a missing value in row 101"):
        open_table(table.path).statistics(checkpoint=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    np.save(path, good)
    assert open_table(table.path).statistics(checkpoint=tmp_path / "kept").count.item() == ROWS


def test_a_killed_process_loses_what_was_not_saved_yet_and_no_more(table, tmp_path):
    script = tmp_path / "pass.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import time
            from torchintro.data import gather as _passes, table as tables
            from torchintro import open_table
            tables.PIECE_BYTES, _passes._SAVED_EVERY = {64 * WIDTH}, 0.0
            table = open_table({str(table.path)!r})
            table.split_statistics(checkpoint={str(tmp_path / "kept")!r}, progress=lambda *_: time.sleep(0.02))
            """
        )
    )
    process = subprocess.Popen([sys.executable, script])
    deadline, rows = time.monotonic() + 60, 0
    while rows < 640:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
        if (tmp_path / "kept").exists():
            rows = saving.read_file("", tmp_path / "kept", "pass", 1, map_location="cpu")["rows"]
    process.kill()
    process.wait()
    seen = Stop(1e9)
    assert bits(*table.split_statistics(checkpoint=tmp_path / "kept", progress=seen)) == bits(*table.split_statistics())
    assert seen.seen[-1] <= ROWS - rows


class TestFitAndTune:
    def test_fit_goes_on(self, table, tmp_path, read):
        plain, resumed = initial_linear(FEATURES, 1, seed=0), initial_linear(FEATURES, 1, seed=0)
        options = {"lr": 0.1, "validation": 0.2, "epochs": 5, "seed": 2}
        expected = fit(plain, table, **options)
        with pytest.raises(KeyboardInterrupt):
            table.split_statistics(0.2, seed=2, checkpoint=tmp_path / "kept", progress=Stop(1000))
        result = fit(resumed, table, checkpoint=tmp_path / "kept", **options)
        assert read[-1]["start"] == 1024
        assert torch.equal(plain.weight, resumed.weight)
        assert torch.equal(result.validation_losses, expected.validation_losses)

    def test_a_table_to_validate_with_has_a_file_too(self, table, tmp_path, read):
        other = write(tmp_path / "other", "npy")
        options = {"lr": 0.1, "epochs": 2, "checkpoint": tmp_path / "kept", "validation": other}
        for _ in range(2):
            fit(initial_linear(FEATURES, 1, seed=0), table, **options)
        assert [options["path"] for options in read] == [table.path, other.path]
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["kept", "kept.validation"]

    def test_a_pair_to_validate_with_takes_no_pass_over_the_rows_to_train_on(self, table, read):
        X, y = torch.randn(20, FEATURES), torch.randn(20, 1)
        fit(initial_linear(FEATURES, 1), table, lr=1e-3, epochs=2, batch_size=100, validation=(X, y))
        assert len(read) == 2  # one for each epoch

    def test_a_study_reads_once_in_its_life(self, table, tmp_path, read):
        options = {
            "storage": f"sqlite:///{tmp_path}/study.db",
            "study_name": "s",
            "validation": 0.2,
            "seed": 0,
            "epochs": 3,
            "checkpoint": tmp_path / "kept",
        }
        tune(table, n_trials=3, **options)
        study = tune(table, n_trials=6, **options)
        assert len(study.trials) == 6
        assert len(read) == 1

    def test_without_a_table_it_is_refused(self, tmp_path):
        X, y = torch.randn(20, FEATURES), torch.randn(20, 1)
        statistics = LinearStatistics(FEATURES, 1).update(X, y)
        for rows in ((X, y), (statistics,)):
            with pytest.raises(TypeError, match=r"^fit: checkpoint only goes with a table that is streamed, but"):
                fit(initial_linear(FEATURES, 1), *rows, lr=0.1, checkpoint="kept")
            with pytest.raises(
                TypeError, match=r"^tune: checkpoint only goes with a table that is streamed, but got '"
            ):
                tune(*rows, checkpoint="kept")


class TestCommands:
    @pytest.fixture
    def command_line(self):
        return pytest.importorskip("command_line")

    def test_ctrl_c_within_the_pass_and_on_from_there(self, command_line, tmp_path, monkeypatch, read):
        write(tmp_path / "rows")
        monkeypatch.chdir(tmp_path)
        original = _passes._Kept.reached

        def reached(self, gathered):
            original(self, gathered)
            if gathered.rows == 640 and len(read) == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(_passes._Kept, "reached", reached)
        command = ["tune", "--data", "rows", "--epochs", 3, "--trials", 4, "--out", "run"]
        result = command_line.run(*command, code=130)
        kept = "torchintro: interrupted; what was read of the table is kept in run, "
        assert result.stderr.splitlines()[-1] == f"{kept}the same command with --out run goes on from there"
        command_line.run(*command)
        assert [options["start"] for options in read] == [0, 640]
        command_line.run(*command, "--lr-high", 0.2)
        assert len(read) == 2
        # Other parts of the table are another pass, with a file of its own.
        command_line.run("train", *command[1:5], "--out", "run")
        command_line.run(*command, "--lr-high", 0.2)
        assert [options["start"] for options in read] == [0, 640, 0]
        assert len(list((tmp_path / "run").glob("pass-*.pt"))) == 2

    def test_a_signal_within_the_pass(self, command_line, tmp_path):
        write(tmp_path / "rows")
        program = textwrap.dedent(
            f"""
            import signal, time
            from torchintro.data import gather as _passes, table as tables
            from torchintro.__main__ import main

            def reached(self, gathered):
                original(self, gathered)
                if gathered.rows == 640:
                    print("here", flush=True)
                    time.sleep(60)

            # Where the suite runs in the background, the shell has it ignore Ctrl-C, and children inherit that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            tables.PIECE_BYTES = {64 * WIDTH}
            original, _passes._Kept.reached = _passes._Kept.reached, reached
            main()
            """
        )
        command = [sys.executable, "-c", program, "train", "--data", "rows", "--out", "run"]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert err.endswith("the same command with --out run goes on from there\n")
        [path] = (tmp_path / "run").glob("pass-*.pt")
        assert saving.read_file("", path, "pass", 1, map_location="cpu")["rows"] == 640
