"""The extra peak memory of a step: the most that it holds at once beyond what was there before.

On a GPU PyTorch's allocator counts it exactly. On the CPU nothing counts what PyTorch's operators, their libraries and
this package's kernels allocate, except the operating system: a fresh process makes the data, runs one step to load all
that is loaded on first use, resets its peak of resident memory, and runs the step again.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from .cases import Case
from .step import StepWork
from .works import make_work

__all__ = ["HOW", "extra_peak"]

HOW = {
    "cpu": "peak resident memory of a fresh process in its second step, over what it held before that step",
    "cuda": "peak of PyTorch's CUDA allocator in the second step, over what was allocated before that step",
}

# By default glibc keeps freed blocks of up to 32 MB for later, and the second step would find the memory of the first.
# This package keeps the memory of large gradients likewise.
_ALLOCATOR = {"TORCHINTRO_KEEP_MEMORY": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_RESET_PEAK = "5"  # what /proc/self/clear_refs takes for it
_SECONDS = 300


def extra_peak(case: Case, peer: str, device: torch.device) -> int:
    """Return the extra peak memory of one peer's step in bytes.

    Raises:
        RuntimeError: The system does not tell, or the peer does not run there.
    """
    alone = replace(case, kind="step", peers=(peer,))
    if device.type == "cuda":
        return _extra_peak_of_cuda(alone, device)
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-m", __name__],
        input=pickle.dumps((alone, torch.get_num_threads())),
        capture_output=True,
        timeout=_SECONDS,
        check=False,
        env={**os.environ, **_ALLOCATOR, "PYTHONPATH": path},
    )
    if child.returncode != 0:
        reason = (child.stderr.decode(errors="replace").strip().splitlines() or ["it died"])[-1]
        raise RuntimeError(f"bench: the process that measures memory failed: {reason}")
    return int(json.loads(child.stdout.splitlines()[-1])["extra_peak_bytes"])


def _work(case: Case, device: torch.device) -> tuple[StepWork, str]:
    work = make_work(case, device)
    (peer,) = case.peers
    if not isinstance(work, StepWork) or peer not in work.calls:
        raise RuntimeError(f"bench: {work.skipped.get(peer, 'only steps can be measured')}")
    work.calls[peer]()
    work.clear()
    return work, peer


def _extra_peak_of_cuda(case: Case, device: torch.device) -> int:
    work, peer = _work(case, device)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work.calls[peer]()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _extra_peak_of_process(case: Case) -> int:
    work, peer = _work(case, torch.device("cpu"))
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError as error:
        raise RuntimeError(f"bench: this system cannot reset a process's peak memory ({error})") from error
    before = _status("VmRSS")
    work.calls[peer]()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"bench: this system does not tell {name}")


def _main() -> None:
    case, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    print(json.dumps({"extra_peak_bytes": _extra_peak_of_process(case)}))


if __name__ == "__main__":
    _main()
