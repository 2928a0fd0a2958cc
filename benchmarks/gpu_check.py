"""What `make gpu-check` runs on a machine with a GPU and torch: build, tests, sanitizer, benchmarks, and their record.

    python -m benchmarks.gpu_check                                # everything
    python -m benchmarks.gpu_check --only build --only tests      # some parts; the day's record keeps the others'
    python -m benchmarks.gpu_check --only benchmarks --group G1   # and of the benchmarks some cases

Nothing is downloaded: the interpreter's own torch, ninja, pybind11 and pytest are used, and the extension is built in
place. The record is written again after every part and every group of cases, so that a run that is killed loses no more
than what it was at.
The record, benchmarks/results/<date>-<device>.json, is what every GPU figure in the documentation comes from; the
benchmark's own record is in it under "benchmarks".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("build", "tests", "sanitizer", "benchmarks")
NOT_ASKED_FOR = "not asked for (--only)"
FOUND_ERRORS = 86  # the exit code of compute-sanitizer then: none of pytest's

# What each tool is told besides. Out of PyTorch's cache every tensor would have neighbours that are not out of bounds.
SANITIZERS: dict[str, dict[str, str]] = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}}

# Each in a process of its own: what the names of its cases begin with, as --row of the benchmark takes them.
GROUPS: dict[str, tuple[str, ...]] = {
    "P": tuple(f"P{number}" for number in range(1, 9)),
    "X": ("X1", "X2", "X3"),
    "G1": ("G1",),
    "G2": ("G2",),
    "G3": ("G3",),
    "G4": ("G4",),
    "crossover": ("P1",),
}

Save = Callable[[Mapping[str, Mapping[str, Any]], "Mapping[str, Any] | None"], None]
Run = Callable[[list[str], Mapping[str, str]], "subprocess.CompletedProcess[str]"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description="Checks and measures on a machine with a GPU.")
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="Run this part; repeat it for several. Default: all."
    )
    parser.add_argument(
        "--group",
        action="append",
        choices=GROUPS,
        help="Of the benchmarks run this group, and keep the day's others; repeat it for several. Default: all.",
    )
    chosen = parser.parse_args(arguments)
    asked = chosen.only or PARTS
    if chosen.group and "benchmarks" not in asked:
        return stop(f"--group needs the part benchmarks, but only {', '.join(asked)} was asked for.")
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError:
        return stop("torch is not installed for this interpreter; choose another with `make gpu-check PYTHON=...`.")
    if not torch.cuda.is_available():
        return stop("no CUDA device is available; `make cuda-build` checks what can be checked without one.")

    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    now = datetime.now(timezone.utc)
    path = RESULTS / f"{now:%Y-%m-%d}-{name}.json"
    try:
        old = read_record(path)
    except ValueError as error:
        return stop(str(error))
    head = {
        "command": "make gpu-check",
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "device_memory": torch.cuda.get_device_properties(0).total_memory,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    stamp = {"date": now.isoformat(timespec="seconds"), "commit": commit(), "torch": torch.__version__}
    record: dict[str, Any] = {}

    def save(results: Mapping[str, Mapping[str, Any]], figures: Mapping[str, Any] | None) -> None:
        record.update(merged(old, head, {part: {**result, **stamp} for part, result in results.items()}, figures))
        path.write_text(json.dumps(record, indent=1) + "\n")

    check = Check(
        tuple(part for part in PARTS if part in asked),
        RESULTS / "figures.tmp",
        groups=tuple(group for group in GROUPS if group in (chosen.group or GROUPS)),
        figures=(old or {}).get("benchmarks") if chosen.group else None,
        save=save,
        toolkits=tuple(Path(home) for home in [CUDA_HOME] if home),
    )
    results = check.run_parts()
    print(f"\nRecord: {path.relative_to(ROOT)}")
    print("\n".join(summary(record)))
    return exit_code(results)


@dataclass
class Check:
    """The parts that are asked for, run one after the other.

    Attributes:
        asked: Their names, in the order of PARTS.
        figures_path: Where the benchmark may write its record for a moment.
        groups: Names of the benchmark's groups of cases.
        save: Is told the results and the figures so far, after every part and every group.
        run: Runs a command.
        environment: Of the commands.
        which: Finds a program on the path.
        toolkits: Folders of CUDA's toolkit, as far as torch knows one.
        figures: The benchmark's record, once it ran; what is there before it runs is added to.
    """

    asked: Sequence[str]
    figures_path: Path
    groups: Sequence[str] = tuple(GROUPS)
    save: Save = field(default_factory=lambda: lambda results, figures: None)
    run: Run = field(default_factory=lambda: run)
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    which: Callable[[str], str | None] = shutil.which
    toolkits: Sequence[Path] = ()
    figures: dict[str, Any] | None = None

    def run_parts(self) -> dict[str, dict[str, Any]]:
        """Return for each part asked for its state ("passed", "failed" or "not run"), a summary and its seconds."""
        do = {"build": self.build, "tests": self.tests, "sanitizer": self.sanitizer}
        results: dict[str, dict[str, Any]] = {}
        for part in self.asked:
            if results.get("build", {}).get("state") == "failed":
                results[part] = {"state": "not run", "summary": "the build failed"}
                continue
            start = time.monotonic()
            if part == "benchmarks":
                for so_far in self.benchmarks():
                    results[part] = {**so_far, "seconds": round(time.monotonic() - start, 1)}
                    self.save(results, self.figures)
                continue
            results[part] = do[part]()
            results[part]["seconds"] = round(time.monotonic() - start, 1)
            self.save(results, self.figures)
        self.save(results, self.figures)
        return results

    def build(self) -> dict[str, Any]:
        done = self._python("setup.py", "build_ext", "--inplace")
        return outcome(done.returncode == 0, "built in place" if done.returncode == 0 else last_line(done))

    def tests(self) -> dict[str, Any]:
        done = self._python("-m", "pytest", "-m", "cuda", "tests")
        return outcome(done.returncode == 0, last_line(done))

    def sanitizer(self) -> dict[str, Any]:
        program = sanitizer_path(self.environment, self.which, self.toolkits)
        if program is None:
            sentence = (
                "compute-sanitizer is neither on PATH nor beside nvcc or in CUDA_HOME; it comes with CUDA's toolkit"
            )
            print(f"gpu-check: {sentence}.", flush=True)
            return {"state": "not run", "summary": sentence}
        pytest = [
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-m",
            "cuda and sanitize",
            "tests/cuda/test_cuda_sanitize.py",
        ]
        tools = {}
        for tool, settings in SANITIZERS.items():
            options = ["--tool", tool, "--error-exitcode", str(FOUND_ERRORS)]
            done = self._run([program, *options, sys.executable, *pytest], settings)
            tools[tool] = outcome(done.returncode == 0, sanitizer_summary(done.stdout))
        passed = all(result["state"] == "passed" for result in tools.values())
        return outcome(passed, "; ".join(f"{tool}: {result['summary']}" for tool, result in tools.items())) | {
            "tools": tools
        }

    def benchmarks(self) -> Iterator[dict[str, Any]]:
        """Run the groups one after the other; yield after each what the part has come to."""
        wrong: list[str] = []
        for i, group in enumerate(self.groups):
            self.figures_path.unlink(missing_ok=True)
            cases = [argument for name in GROUPS[group] for argument in ("--row", name)]
            crossover = ["--crossover"] if group == "crossover" else []
            done = self._python(
                "-m", "benchmarks", "--device", "cuda", *cases, *crossover, "--json", str(self.figures_path)
            )
            try:
                self.figures = with_figures(self.figures, json.loads(self.figures_path.read_text()))
            except FileNotFoundError:
                if done.returncode != 0:
                    wrong.append(f"{group}: no record was written: {last_line(done)}")
            except ValueError:
                wrong.append(f"{group}: its record cannot be read: {last_line(done)}")
            else:
                if done.returncode != 0:
                    wrong.append(f"{group}: {last_line(done)}")
            finally:
                self.figures_path.unlink(missing_ok=True)
            rows = len(self.figures["rows"]) if self.figures else 0
            left = self.groups[i + 1 :]
            summary = "; ".join([f"{rows} rows", *wrong, *([f"not yet run: {', '.join(left)}"] if left else [])])
            yield outcome(not wrong and not left, summary)

    def _python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._run([sys.executable, *arguments], {})

    def _run(self, command: list[str], settings: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        return self.run(command, {**self.environment, "TORCHINTRO_CUDA": "1", "PYTHONPATH": str(ROOT), **settings})


def with_figures(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    """Return a benchmark's record with the rows of another added, or put in the place of the same rows."""
    if old is None:
        return dict(new)
    rows = {(row["id"], row["device"]): row for row in [*old["rows"], *new["rows"]]}
    limits = {**old["limits"], **new["limits"]}
    crossover = new.get("crossover") or old.get("crossover") or []
    return {**new, "rows": list(rows.values()), "limits": limits, "crossover": crossover}


def outcome(passed: bool, summary: str) -> dict[str, Any]:
    return {"state": "passed" if passed else "failed", "summary": summary}


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stdout.strip().splitlines()
    return lines[-1].strip("= ") if lines else "no output"


def sanitizer_summary(output: str) -> str:
    """Return what a tool found and how the tests ended, from their common output."""
    found = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", output, re.M)
    tests = re.findall(r"^=* ?(\d+ (?:passed|failed|skipped|deselected|error).*? in [\d.]+s.*?)=*$", output, re.M)
    return ", ".join([*found[-1:], *(line.strip() for line in tests[-1:])]) or "no summary"


def sanitizer_path(
    environment: Mapping[str, str], which: Callable[[str], str | None], toolkits: Sequence[Path] = ()
) -> str | None:
    """Return compute-sanitizer on the path, beside nvcc (maybe a wrapper), in a toolkit or CUDA_HOME, or None."""
    name = "compute-sanitizer"
    found = which(name)
    if found:
        return found
    nvcc = which("nvcc")
    roots = [Path(nvcc).resolve().parent.parent, *toolkits] if nvcc else [*toolkits]
    roots += [Path(environment[variable]) for variable in ("CUDA_HOME", "CUDA_PATH") if environment.get(variable)]
    for root in roots:
        for folder in ("bin", "compute-sanitizer", "extras/compute-sanitizer"):
            path = root / folder / name
            if path.is_file():
                return str(path)
    return None


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record of an earlier run of the day, or None if there is none."""
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a record to add to, but got what cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} must be a record to add to, but got a {type(record).__name__}")
    return record


def merged(
    old: Mapping[str, Any] | None,
    head: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    figures: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return a record with the parts that ran now, and of the others what an earlier run of the day left there.

    Args:
        old: The record of the earlier run, or None.
        head: What was used.
        results: The parts of this run.
        figures: The benchmark's record, if this run made one.
    """
    before = (old or {}).get("parts", {})
    parts = {}
    for part in PARTS:
        now, then = results.get(part), before.get(part)
        # What could not run now says nothing against what ran earlier.
        ran_then = then is not None and then["state"] != "not run"
        if now is None or (now["state"] == "not run" and ran_then):
            parts[part] = dict(then) if then is not None else {"state": "not run", "summary": NOT_ASKED_FOR}
        else:
            parts[part] = dict(now)
    ran = results.get("benchmarks", {}).get("state", "not run") != "not run"
    kept = figures if ran else (old or {}).get("benchmarks")
    return {**head, "parts": parts, "benchmarks": kept}


def summary(record: Mapping[str, Any]) -> list[str]:
    return [f"{part:<11} {result['state']}: {result['summary']}" for part, result in record["parts"].items()]


def exit_code(results: Mapping[str, Mapping[str, Any]]) -> int:
    """Return 2 if the build failed, 1 if another part did, else 0: a missing tool is no failure."""
    failed = [part for part, result in results.items() if result["state"] == "failed"]
    return 2 if "build" in failed else 1 if failed else 0


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ""


def run(command: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command with its output both shown as it comes and kept."""
    print("$", " ".join(command[:9]), flush=True)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return subprocess.CompletedProcess(command, process.wait(), "".join(lines), "")


def stop(sentence: str) -> int:
    print(f"gpu-check: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
