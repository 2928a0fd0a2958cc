"""The benchmark's command line: `python -m benchmarks`."""

from pathlib import Path

import pytest

from benchmarks.__main__ import parse
from benchmarks.run import Options, main


def test_without_arguments_all_is_as_by_default():
    assert parse([]) == Options()


def test_every_option():
    arguments = ["--device", "cuda", "--row", "P1", "--row", "G2", "--json", "r.json", "--quick", "--grid"]
    arguments += ["--dtype", "bfloat16", "--no-rows", "--plot", "p", "--from", "old.json", "--table", "--crossover"]
    assert parse([*arguments, "--trials"]) == Options(
        device="cuda",
        cases=("P1", "G2"),
        json=Path("r.json"),
        quick=True,
        grid=True,
        dtype="bfloat16",
        no_rows=True,
        plot=Path("p"),
        record=Path("old.json"),
        table=True,
        crossover=True,
        trials=True,
    )


def test_a_record_is_shown_by_from_and_table_alone(tmp_path, capsys):
    missing = str(tmp_path / "missing.json")
    assert main(parse(["--from", missing, "--table"])) == 2
    assert "bench: from must be a record that bench --json wrote, but got" in capsys.readouterr().err
    assert main(parse(["--from", missing, "--table", "--row", "P1"])) == 2
    assert "bench: from shows a record; it takes plot or table, and nothing else" in capsys.readouterr().err


def test_an_unknown_option_has_exit_code_2(capsys):
    with pytest.raises(SystemExit) as error:
        parse(["--rows", "P1"])
    assert error.value.code == 2
    assert "unrecognized arguments: --rows" in capsys.readouterr().err
