"""Show that the tests find planted faults: plant each in a copy of this checkout and run the tests there.

    python tests/faults/plant.py                    all faults of faults.py
    python tests/faults/plant.py --only NAME        one of them; may be repeated, and may be a pattern such as "*bias*"
    python tests/faults/plant.py --list             what they are
    python tests/faults/plant.py --folder FOLDER    keep the copy and its build there, for the next time

The tests likeliest to find a fault are run first. If one of them fails, so does `make test`, which runs them among all
others; only if none does, the others are run too. A fault is found if a test fails or crashes that passes once the
fault is taken out again. The exit code is 1 if a fault is not found or cannot be planted.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from faults import FAULTS, Fault, find_tests, place

ROOT = Path(__file__).resolve().parents[2]
# The list of faults says of every planted one that it does not apply, which is no finding of the tests.
LEFT_OUT = "tests/faults/"
# How a line of `pytest -v` begins, and how it ends where the test went wrong.
TEST = re.compile(r"^(\S+\.py::.+?)(?: (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*| ?Fatal Python error.*| *)$", re.M)


class NoVerdict(Exception):  # noqa: N818
    """Neither found nor missed, and this is why."""


@dataclass(frozen=True)
class Verdict:
    """What became of a fault.

    Attributes:
        fault: The fault.
        found: Whether a test found it.
        by: The test that did, or what happened instead.
        seconds: What it took, the build included.
    """

    fault: Fault
    found: bool
    by: str
    seconds: float


class Copy:
    """A copy of the checkout, in which faults are planted.

    Args:
        folder: Where it is, or is to be. One that is there already is brought up to date.
        limit: Seconds after which a run of the tests is given up.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.root, self.kept, self.output = folder / "checkout", folder / "kept", folder / "output"
        self.limit = limit
        self.output.mkdir(parents=True, exist_ok=True)
        self._bring_up_to_date()

    def _bring_up_to_date(self) -> None:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split("\0")
        wanted = {name for name in listed if name and not name.startswith(LEFT_OUT) and (ROOT / name).is_file()}
        for path in [path for path in self.root.rglob("*") if path.is_file()]:
            name = path.relative_to(self.root).as_posix()
            if name not in wanted and path.suffix != ".so" and not name.startswith("build/"):
                path.unlink()
        # A file that stays the same keeps its time, by which the build sees what is new.
        for name in wanted:
            source, target = ROOT / name, self.root / name
            if not target.exists() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                shutil.copymode(source, target)

    def prepare(self, build: bool) -> None:
        """Build the libraries, or take the checkout's; make sure that the tests will take them from here."""
        libraries = sorted((ROOT / "torchintro").glob("*.so"))
        if build or not libraries:
            print("Building the copy without a fault", flush=True)
            self.build(self.output / "build.txt")
            self._keep()
        else:
            for library in libraries:
                shutil.copy2(library, self.root / "torchintro")
        code = "import torchintro; print(torchintro.__file__)"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=self.root, env=self._environment(), capture_output=True, text=True
        )
        if done.returncode or not Path(done.stdout.strip()).is_relative_to(self.root.resolve()):
            sys.exit(f"plant: the tests would not take torchintro from {self.root}: {done.stdout or done.stderr}")

    def build(self, output: Path) -> None:
        """Build what has changed since the last time."""
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        with output.open("w") as file:
            done = subprocess.run(command, cwd=self.root, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            raise NoVerdict(f"it does not compile: {_last_line(output)}")

    def _built(self, root: Path) -> list[Path]:
        paths = [*(root / "build").rglob("*"), *(root / "torchintro").glob("*.so")]
        return [path.relative_to(root) for path in paths if path.is_file()]

    def _keep(self) -> None:
        shutil.rmtree(self.kept, ignore_errors=True)
        _copy_all(self._built(self.root), self.root, self.kept)

    def plant(self, fault: Fault, hinted_only: bool) -> Verdict:
        """Plant a fault, run the tests, and take it out again."""
        begin = time.perf_counter()
        try:
            path, planted = place(fault, self.root)
        except LookupError as error:
            return Verdict(fault, False, str(error), 0.0)
        original, state = path.read_bytes(), path.stat()
        try:
            try:
                path.write_text(planted, encoding="utf-8")
                if fault.is_compiled:
                    self.build(self.output / f"{fault.name}.build.txt")
                test = self._find(fault, hinted_only)
            finally:
                path.write_bytes(original)
                os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
                if fault.is_compiled:  # with the build's own records, so that nothing is compiled a second time
                    _copy_all(self._built(self.kept), self.kept, self.root)
            found, by = test is not None, test or "no test"
        except NoVerdict as error:
            found, by = False, str(error)
        return Verdict(fault, found, by, time.perf_counter() - begin)

    def confirm(self, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """Run the tests that found faults where there is none; what fails here too has found nothing."""
        tests = list(dict.fromkeys(verdict.by for verdict in verdicts if verdict.found))
        if not tests:
            return list(verdicts)
        _, text = self._run(tests, self.output / "without-a-fault.txt", stop=False)
        passed = {test for test, outcome in TEST.findall(text) if outcome == "PASSED"}
        return [
            verdict
            if not verdict.found or verdict.by in passed
            else replace(verdict, found=False, by=f"{verdict.by} fails without the fault too")
            for verdict in verdicts
        ]

    def _find(self, fault: Fault, hinted_only: bool) -> str | None:
        """Return the first test that fails, or None."""
        hinted = list(
            dict.fromkeys(os.path.relpath(test, self.root) for test in find_tests(fault, self.root / "tests"))
        )
        if hinted:
            test = self._failing(fault, hinted, self.output / f"{fault.name}.txt")
            if test is not None or hinted_only:
                return test
        ignored = [f"--ignore={test}" for test in hinted if "::" not in test]
        return self._failing(fault, ["tests", *ignored], self.output / f"{fault.name}.rest.txt")

    def _failing(self, fault: Fault, tests: Sequence[str], output: Path) -> str | None:
        code, text = self._run(tests, output)
        if code == 0:
            return None
        lines: list[tuple[str, str]] = TEST.findall(text)
        wrong = next((test for test, outcome in lines if outcome in ("FAILED", "ERROR")), None)
        if code == 1 and wrong is not None:
            return wrong
        if code < 0 and lines:
            return lines[-1][0]
        raise NoVerdict(f"pytest ended with {code} and without a test that failed: {_last_line(output)}")

    def _run(self, tests: Sequence[str], output: Path, stop: bool = True) -> tuple[int, str]:
        """Run tests, until the first fails; return the exit code, negative for a signal, and what was printed."""
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *(["-x"] if stop else [])]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", "0"]
        with output.open("w") as file:
            process = subprocess.Popen(
                [*command, *tests],
                cwd=self.root,
                env=self._environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(self.limit)
            except subprocess.TimeoutExpired:
                raise NoVerdict(f"no answer within {self.limit:g} s: {_last_line(output)}") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return code, output.read_text(errors="replace")

    def _environment(self) -> dict[str, str]:
        paths = [str(self.root), *filter(None, [os.environ.get("PYTHONPATH")])]
        # Planted files come and go within a second, by which a compiled one would be taken for up to date.
        return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


def _last_line(output: Path) -> str:
    lines = output.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _copy_all(names: Sequence[Path], source: Path, target: Path) -> None:
    """Copy files with their times, those that differ in them."""
    for name in names:
        there, here = target / name, source / name
        if not there.exists() or there.stat().st_mtime_ns != here.stat().st_mtime_ns:
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(here, there)


def _chosen(patterns: Sequence[str] | None) -> list[Fault]:
    if patterns is None:
        return list(FAULTS)
    for pattern in patterns:
        if not fnmatch.filter([fault.name for fault in FAULTS], pattern):
            sys.exit(f"plant: there is no fault {pattern!r}; --list shows them")
    return [fault for fault in FAULTS if any(fnmatch.fnmatch(fault.name, pattern) for pattern in patterns)]


def _table(verdicts: Sequence[Verdict]) -> str:
    head = ("fault", "layer", "found by", "seconds")
    rows = [
        (v.fault.name, v.fault.layer, v.by if v.found else f"NOT FOUND: {v.by}", f"{v.seconds:.0f}") for v in verdicts
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(2)]
    return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[3]:>7}  {row[2]}" for row in (head, *rows))


def main() -> int:
    parser = argparse.ArgumentParser(description="Show that the tests find planted faults.")
    parser.add_argument("--only", metavar="NAME", action="append", help="this fault only; a pattern; may be repeated")
    parser.add_argument("--list", action="store_true", help="list the faults and plant none")
    parser.add_argument("--folder", type=Path, help="where the copy is made and kept; by default a temporary folder")
    parser.add_argument("--hinted-only", action="store_true", help="run the tests that a fault names and no others")
    parser.add_argument("--limit", type=float, default=7200, help="seconds for a run of the tests (%(default)g)")
    arguments = parser.parse_args()
    faults = _chosen(arguments.only)
    if arguments.list:
        print("\n".join(f"{fault.name}  ({fault.layer})\n    {fault.broken}" for fault in faults))
        return 0
    with tempfile.TemporaryDirectory(prefix="torchintro-faults-") as temporary:
        copy = Copy((arguments.folder or Path(temporary)).resolve(), arguments.limit)
        try:
            copy.prepare(build=any(fault.is_compiled for fault in faults))
            verdicts = []
            for number, fault in enumerate(faults, 1):
                verdict = copy.plant(fault, arguments.hinted_only)
                verdicts.append(verdict)
                found = f"{'found by' if verdict.found else 'NOT FOUND:'} {verdict.by}"
                print(f"[{number}/{len(faults)}] {fault.name}: {found}, {verdict.seconds:.0f} s", flush=True)
            print("Running the tests that found them without a fault", flush=True)
            verdicts = copy.confirm(verdicts)
        except NoVerdict as error:
            sys.exit(f"plant: {error}")
    print(f"\n{_table(verdicts)}")
    missed = sum(not verdict.found for verdict in verdicts)
    print(f"\n{len(verdicts) - missed} of {len(verdicts)} faults were found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
