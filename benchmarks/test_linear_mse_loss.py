"""The benchmark's cases for pytest-benchmark: `pytest benchmarks --benchmark-only`.

One test per case and peer, grouped by case. The peers of a case are verified first, as in `python -m benchmarks`.
Unlike there they run one after the other and without the machine's limits, so that command is the one to quote figures
from.
"""

import functools

import pytest
import torch

from .cases import CASES
from .works import make_work

CPU = torch.device("cpu")
PEERS = [(case, peer) for case in CASES if case.device == "cpu" and case.kind != "memory" for peer in case.peers]


@functools.lru_cache(maxsize=1)  # the largest cases hold a gigabyte
def verified_work(case):
    work = make_work(case, CPU)
    for peer, checks in work.verify().items():
        for name, check in checks.items():
            assert check.passed, f"{peer}: {name} has an error of {check.error}, allowed {check.allowed}"
    return work


@pytest.mark.parametrize(("case", "peer"), PEERS, ids=[f"{case.id}-{peer.replace(' ', '_')}" for case, peer in PEERS])
def test_case(benchmark, case, peer):
    work = verified_work(case)
    if peer in work.skipped:
        pytest.skip(work.skipped[peer])
    benchmark.group = f"{case.id}: {case.work}"
    if work.scales.get(peer, 1) != 1:
        benchmark.extra_info["times to full"] = work.scales[peer]
        benchmark.group += " (not in full)"
    benchmark(work.calls[peer])
