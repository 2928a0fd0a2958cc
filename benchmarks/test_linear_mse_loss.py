"""The benchmark's rows as pytest-benchmark cases: `pytest benchmarks --benchmark-only`.

One case per row and peer, grouped by row. The peers of a row are verified first, as in `torchintro bench`; unlike there
they run one after the other and without the machine's limits, so that command is the one to quote figures from.
"""

import functools

import pytest
import torch

from .cases import ROWS
from .step import make_work

CPU = torch.device("cpu")
CASES = [(row, peer) for row in ROWS if row.device == "cpu" and row.kind != "memory" for peer in row.peers]


@functools.lru_cache(maxsize=1)  # the largest rows hold a gigabyte
def verified_work(row):
    work = make_work(row, CPU)
    for peer, checks in work.verify().items():
        for name, check in checks.items():
            assert check.passed, f"{peer}: {name} has an error of {check.error}, allowed {check.allowed}"
    return work


@pytest.mark.parametrize(("row", "peer"), CASES, ids=[f"{row.id}-{peer.replace(' ', '_')}" for row, peer in CASES])
def test_row(benchmark, row, peer):
    work = verified_work(row)
    if peer in work.skipped:
        pytest.skip(work.skipped[peer])
    benchmark.group = f"{row.id}: {row.work}"
    if work.scales.get(peer, 1) != 1:
        benchmark.extra_info["times to full"] = work.scales[peer]
        benchmark.group += " (not in full)"
    benchmark(work.calls[peer])
