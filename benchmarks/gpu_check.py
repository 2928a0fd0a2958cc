"""What `make gpu-check` runs on a machine with a GPU and torch: build, tests marked cuda, benchmarks, and their record.

Nothing is downloaded: the interpreter's own torch, ninja, pybind11 and pytest are used, and the extension is built in
place.
The record, benchmarks/results/<date>-<device>.json, is what every GPU figure in the documentation comes from.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    try:
        import torch
    except ImportError:
        return stop("torch is not installed for this interpreter; choose another with `make gpu-check PYTHON=...`.")
    if not torch.cuda.is_available():
        return stop("no CUDA device is available; `make cuda-build` checks what can be checked without one.")

    environment = os.environ | {"TORCHINTRO_CUDA": "1", "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    build = run([sys.executable, "setup.py", "build_ext", "--inplace"], environment)
    built = time.monotonic()
    if build.returncode:
        return stop("the build failed; its output is above.")
    tests = run([sys.executable, "-m", "pytest", "-m", "cuda", "tests"], environment)
    tested = time.monotonic()
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    now = datetime.now(timezone.utc)
    path = RESULTS / f"{now:%Y-%m-%d}-{name}.json"
    figures = RESULTS / "figures.tmp"
    bench = run([sys.executable, "-c", BENCHMARK.format(path=str(figures))], environment)

    record = {
        "date": now.isoformat(timespec="seconds"),
        "command": "make gpu-check",
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "device_memory": torch.cuda.get_device_properties(0).total_memory,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "build_seconds": round(built - started, 1),
        "tests_seconds": round(tested - built, 1),
        "tests": tests.stdout.strip().splitlines()[-1] if tests.stdout.strip() else "no output",
        "tests_passed": tests.returncode == 0,
        "benchmarks_passed": bench.returncode == 0,
        "benchmarks": json.loads(figures.read_text()) if figures.exists() else None,
    }
    figures.unlink(missing_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nRecord: {path.relative_to(ROOT)}: tests: {record['tests']}")
    return 0 if tests.returncode == 0 and bench.returncode == 0 else 1


BENCHMARK = """
import importlib.util, sys
from pathlib import Path
from torchintro.benchmark.command import main
from torchintro.benchmark.rows import ROWS
rows = None
if importlib.util.find_spec("optuna") is None:
    rows = [row.id for row in ROWS if row.kind != "study"]
    print("gpu-check: Optuna is not installed here; the rows that are studies are left out.")
sys.exit(main(device="cuda", rows=rows, json_path=Path({path!r}), quick=False))
"""


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command with its output both shown as it comes and kept."""
    print("$", " ".join(command[:6]), flush=True)
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
