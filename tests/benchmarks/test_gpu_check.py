"""`make gpu-check` without a GPU: its parts with made-up commands, the search for tools, the merging of records."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu_check
from benchmarks.cases import CASES, select

FIGURES = {
    "schema": 1,
    "rows": [{"id": "P1", "device": "cpu"}, {"id": "P1", "device": "cuda"}],
    "limits": {"cuda": 1},
    "crossover": [],
}


class Commands:
    """Answers every command by the first word that it holds; keeps all commands."""

    def __init__(self, figures_path, *, figures=FIGURES, **codes):
        self.figures_path, self.figures, self.codes, self.calls = figures_path, figures, codes, []

    def __call__(self, command, environment):
        self.calls.append((command, environment))
        text = " ".join(command)
        names = ("build_ext", "memcheck", "racecheck", "benchmarks", "pytest")
        name = next(name for name in names if name in text)
        if name == "benchmarks" and self.figures is not None:
            self.figures_path.write_text(json.dumps(self.figures))
        output = {
            "memcheck": "===== 38 passed in 9.15s =====\n========= ERROR SUMMARY: 0 errors\n",
            "racecheck": "38 passed, 2 skipped in 70.15s (0:01:10)\n========= RACECHECK SUMMARY: 1 hazard displayed\n",
            "pytest": "\n==== 900 passed in 80.10s ====\n",
        }.get(name, "done\n")
        return subprocess.CompletedProcess(command, self.codes.get(name, 0), output, "")


def check_with(tmp_path, asked=gpu_check.PARTS, which=lambda name: f"/tools/{name}", **options):
    path = tmp_path / "figures.tmp"
    commands = Commands(path, **options)
    return gpu_check.Check(asked, path, run=commands, environment={"HOME": "/home"}, which=which), commands


def test_all_parts(tmp_path):
    check, commands = check_with(tmp_path)
    results = check.run_parts()
    assert list(results) == list(gpu_check.PARTS)
    assert {result["state"] for result in results.values()} == {"passed"}
    assert results["tests"]["summary"] == "900 passed in 80.10s"
    assert results["benchmarks"]["summary"] == "2 rows"
    assert check.figures == FIGURES
    assert not check.figures_path.exists()
    assert gpu_check.exit_code(results) == 0
    for _, environment in commands.calls:
        assert environment["TORCHINTRO_CUDA"] == "1"
        assert environment["HOME"] == "/home"


def test_the_sanitizer_runs_its_tests_with_each_tool(tmp_path):
    check, commands = check_with(tmp_path, ["sanitizer"])
    result = check.run_parts()["sanitizer"]
    (memcheck, with_memcheck), (racecheck, with_racecheck) = commands.calls
    for command, tool in ((memcheck, "memcheck"), (racecheck, "racecheck")):
        assert command[:6] == ["/tools/compute-sanitizer", "--tool", tool, "--error-exitcode", "86", sys.executable]
        assert command[-3:] == ["-m", "cuda and sanitize", "tests/cuda/test_cuda_sanitize.py"]
    assert with_memcheck["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING" not in with_racecheck
    assert result["tools"]["memcheck"]["summary"] == "ERROR SUMMARY: 0 errors, 38 passed in 9.15s"
    assert "RACECHECK SUMMARY: 1 hazard displayed, 38 passed, 2 skipped in 70.15s (0:01:10)" in result["summary"]


def test_what_a_tool_finds_is_a_failure(tmp_path):
    check, _ = check_with(tmp_path, ["sanitizer"], racecheck=86)
    results = check.run_parts()
    assert results["sanitizer"]["state"] == "failed"
    assert results["sanitizer"]["tools"]["memcheck"]["state"] == "passed"
    assert gpu_check.exit_code(results) == 1


def test_without_the_sanitizer_one_sentence(tmp_path, capsys):
    check, commands = check_with(tmp_path, ["sanitizer"], which=lambda name: None)
    results = check.run_parts()
    assert results["sanitizer"]["state"] == "not run"
    assert results["sanitizer"]["summary"].startswith("compute-sanitizer is neither on PATH nor beside nvcc")
    assert capsys.readouterr().out.count("\n") == 1
    assert not commands.calls
    assert gpu_check.exit_code(results) == 0


def test_where_the_sanitizer_is_looked_for(tmp_path):
    def tool(folder):
        path = tmp_path / folder / "compute-sanitizer"
        path.parent.mkdir(parents=True)
        path.touch()
        return str(path)

    beside, home = tool("toolkit/bin"), tool("home/extras/compute-sanitizer")
    nvcc = {"nvcc": str(tmp_path / "toolkit/bin/nvcc")}
    environment = {"CUDA_HOME": str(tmp_path / "home")}
    find = gpu_check.sanitizer_path
    assert find(environment, {"compute-sanitizer": "/usr/bin/cs", **nvcc}.get) == "/usr/bin/cs"
    assert find(environment, nvcc.get) == beside
    assert find(environment, {}.get) == home
    assert find({}, {"nvcc": "/somewhere/nvcc"}.get, [tmp_path / "toolkit"]) == beside
    assert find({"CUDA_HOME": ""}, {}.get) is None
    assert find({"CUDA_PATH": str(tmp_path)}, {}.get) is None


def test_after_a_failed_build_nothing_runs(tmp_path):
    check, commands = check_with(tmp_path, build_ext=1)
    results = check.run_parts()
    assert len(commands.calls) == 1
    assert results["build"]["state"] == "failed"
    assert {results[part]["summary"] for part in gpu_check.PARTS[1:]} == {"the build failed"}
    assert gpu_check.exit_code(results) == 2


def test_a_benchmark_without_a_record_failed(tmp_path):
    check, _ = check_with(tmp_path, ["benchmarks"], figures=None)
    results = check.run_parts()
    assert results["benchmarks"]["state"] == "passed"
    assert results["benchmarks"]["summary"] == "0 rows"  # there may be no row that can run: it ended well
    check, _ = check_with(tmp_path, ["benchmarks"], figures=None, benchmarks=1)
    check.groups = ["G1"]
    results = check.run_parts()
    assert results["benchmarks"]["state"] == "failed"
    assert results["benchmarks"]["summary"] == "0 rows; G1: no record was written: done"
    assert check.figures is None


def test_groups_are_saved_one_by_one_and_added_to_what_is_there(tmp_path):
    check, commands = check_with(tmp_path, ["benchmarks"])
    old = {"id": "G2a", "device": "cuda", "status": "ok"}
    check.groups = ["G1", "crossover"]
    check.figures = {"schema": 1, "rows": [old], "limits": {"cpu": 2}, "crossover": ["kept"]}
    saved = []
    check.save = lambda results, figures: saved.append((dict(results["benchmarks"]), len(figures["rows"])))
    check.run_parts()
    assert saved[0][0]["summary"] == "3 rows; not yet run: crossover"
    assert saved[0][0]["state"] == "failed"  # until all have run
    assert saved[1][0]["state"] == "passed"
    assert check.figures["rows"] == [old, *FIGURES["rows"]]
    assert check.figures["limits"] == {"cpu": 2, "cuda": 1}
    assert check.figures["crossover"] == ["kept"]
    path = str(check.figures_path)
    assert [command[1:] for command, _ in commands.calls] == [
        ["-m", "benchmarks", "--device", "cuda", "--row", "G1", "--json", path],
        ["-m", "benchmarks", "--device", "cuda", "--row", "P1", "--crossover", "--json", path],
    ]


def test_every_case_is_in_one_group():
    groups = {name: cases for name, cases in gpu_check.GROUPS.items() if name != "crossover"}
    found = [case.id for cases in groups.values() for case in select(list(cases))]
    assert sorted(found) == sorted(case.id for case in CASES)


HEAD = {"device": "GPU"}
PASSED, FAILED = {"state": "passed", "summary": "fine"}, {"state": "failed", "summary": "bad"}
NOT_RUN = {"state": "not run", "summary": "no tool"}


def test_parts_not_asked_for_are_said_to_be():
    record = gpu_check.merged(None, HEAD, {"tests": PASSED}, None)
    assert record["device"] == "GPU"
    assert list(record["parts"]) == list(gpu_check.PARTS)
    assert record["parts"]["tests"] == PASSED
    assert record["parts"]["build"] == {"state": "not run", "summary": "not asked for (--only)"}
    assert record["benchmarks"] is None
    assert gpu_check.summary(record)[1] == "tests       passed: fine"


def test_a_later_run_keeps_what_an_earlier_one_left():
    first = gpu_check.merged(None, HEAD, {"build": PASSED, "tests": FAILED, "benchmarks": PASSED}, FIGURES)
    then = gpu_check.merged(first, HEAD, {"tests": PASSED, "sanitizer": NOT_RUN}, None)
    assert then["parts"] == {"build": PASSED, "tests": PASSED, "sanitizer": NOT_RUN, "benchmarks": PASSED}
    assert then["benchmarks"] == FIGURES


def test_what_cannot_run_now_leaves_the_earlier_result():
    first = gpu_check.merged(None, HEAD, {"sanitizer": PASSED, "benchmarks": PASSED}, FIGURES)
    then = gpu_check.merged(first, HEAD, {"build": FAILED, "sanitizer": NOT_RUN, "benchmarks": NOT_RUN}, None)
    assert then["parts"]["sanitizer"] == PASSED
    assert then["benchmarks"] == FIGURES


def test_new_figures_replace_old_ones_even_by_none():
    first = gpu_check.merged(None, HEAD, {"benchmarks": PASSED}, FIGURES)
    assert gpu_check.merged(first, HEAD, {"benchmarks": PASSED}, {"rows": []})["benchmarks"] == {"rows": []}
    assert gpu_check.merged(first, HEAD, {"benchmarks": FAILED}, None)["benchmarks"] is None


def test_the_record_of_the_day(tmp_path):
    path = tmp_path / "record.json"
    assert gpu_check.read_record(path) is None
    path.write_text('{"parts": {}}')
    assert gpu_check.read_record(path) == {"parts": {}}
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="must be a record to add to, but got"):
            gpu_check.read_record(path)


def test_a_group_without_its_part(monkeypatch, capsys):
    assert gpu_check.main(["--only", "tests", "--group", "G1"]) == 2
    assert "--group needs the part benchmarks, but only tests was asked for" in capsys.readouterr().err


def test_a_part_that_does_not_exist(capsys):
    with pytest.raises(SystemExit) as error:
        gpu_check.main(["--only", "everything"])
    assert error.value.code == 2
    assert "invalid choice: 'everything'" in capsys.readouterr().err


def test_without_a_gpu_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main(["--only", "tests"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gpu-check: no CUDA device is available; ")
    assert err.count("\n") == 1


def test_the_whole_command_with_a_made_up_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Some (R) GPU")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: type("", (), {"total_memory": 1}))
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "run", Commands(tmp_path / "figures.tmp"))
    assert gpu_check.main(["--only", "benchmarks"]) == 0
    assert gpu_check.main(["--only", "tests"]) == 0
    (path,) = tmp_path.glob("*.json")
    assert path.name.endswith("-some-r-gpu.json")
    record = json.loads(path.read_text())
    states = {part: result["state"] for part, result in record["parts"].items()}
    assert states == {"build": "not run", "tests": "passed", "sanitizer": "not run", "benchmarks": "passed"}
    assert {"seconds", "date", "commit"} < record["parts"]["tests"].keys()
    assert record["benchmarks"] == FIGURES
    assert "sanitizer   not run: not asked for (--only)" in capsys.readouterr().out
