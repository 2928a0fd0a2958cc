"""How the benchmark takes times: peers in turn, many short rounds, medians and their spread."""

from __future__ import annotations

import contextlib
import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

__all__ = [
    "DISTURBED",
    "FULL",
    "QUICK",
    "Call",
    "Effort",
    "Interruptions",
    "Measurement",
    "disturbed_text",
    "interleaved",
    "once",
]

# Interruptions a second. Seen on two idle cores: up to 30 times a second. With one more busy process: 200 times.
DISTURBED = 60.0

Call = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        block: Seconds that one sample of a peer lasts at least; a fast call is repeated until then.
        seconds: Seconds for all samples of all peers of a case.
        rounds: Least and greatest number of samples of each peer.
    """

    block: float
    seconds: float
    rounds: tuple[int, int]


FULL = Effort(block=0.02, seconds=3.0, rounds=(5, 25))
_SLOW = 0.1  # seconds
QUICK = Effort(block=0.0005, seconds=0.05, rounds=(3, 5))


@dataclass(frozen=True)
class Measurement:
    """Samples of one peer: seconds of one call, or bytes.

    Attributes:
        samples: One per round.
        calls: Calls that each sample is the mean of.
    """

    samples: tuple[float, ...]
    calls: int = 1

    @property
    def median(self) -> float:
        """Middle of the samples."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the samples."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third

    @property
    def spread(self) -> float:
        """Interquartile range."""
        first, third = self.quartiles
        return third - first

    def scaled(self, factor: float) -> Measurement:
        """Return the measurement with every sample multiplied."""
        return Measurement(tuple(sample * factor for sample in self.samples), self.calls)


def interleaved(
    calls: Mapping[str, Call], effort: Effort, device: torch.device, *, cold: bool = True
) -> dict[str, Measurement]:
    """Time the peers in turn, so that whatever else the machine does in the meantime meets all of them.

    On the CPU a sample is the mean of as many calls as fill ``effort.block``, after an untimed one. On a GPU it is one
    call between two events with the L2 cache overwritten before, or, if not ``cold``, the mean of a loop on the host's
    clock, in which the launches count.

    Args:
        calls: The peers. Each must have run before: what the first call costs is not measured.
        effort: How long to measure.
        device: Where the peers compute.
        cold: On a GPU, measure the kernels alone, from an empty cache. The calls must not wait for the GPU.

    Returns:
        A measurement for each peer.
    """
    names = list(calls)
    if device.type == "cuda" and cold:
        sampler: Callable[[Call, int], float] = _EventSampler(device)
        repeats = dict.fromkeys(names, 1)
        costs = {name: max(sampler(calls[name], 1) for _ in range(2)) for name in names}
    else:
        sampler = _clock_on(device)
        costs = {name: _cost(sampler, calls[name]) for name in names}
        repeats = {name: max(1, math.ceil(effort.block / costs[name])) for name in names}
    round_cost = sum(costs[name] * repeats[name] for name in names)
    rounds = max(effort.rounds[0], min(effort.rounds[1], int(effort.seconds / round_cost)))

    samples: dict[str, list[float]] = {name: [] for name in names}
    with _no_collection():
        for i in range(rounds):
            # A peer does not always follow the same one, whose leftovers in the caches it would meet.
            for name in names[i % len(names) :] + names[: i % len(names)]:
                if repeats[name] > 1:
                    calls[name]()
                samples[name].append(sampler(calls[name], repeats[name]))
    return {name: Measurement(tuple(samples[name]), repeats[name]) for name in names}


def once(call: Call, device: torch.device) -> Measurement:
    """Time a single call, of a peer that has run before."""
    with _no_collection():
        return Measurement((_clock_on(device)(call, 1),))


def _cost(sampler: Callable[[Call, int], float], call: Call) -> float:
    """Return about what one call takes."""
    first = sampler(call, 1)
    # Of a slow call one look is enough to see that it fills a sample.
    return first if first > _SLOW else min(first, sampler(call, 1), sampler(call, 1))


class Interruptions:
    """Counts how often this process lost a core to another one, from its making on."""

    def __init__(self) -> None:
        self._count = self._so_far()
        self._start = time.perf_counter()

    def per_second(self) -> float:
        """Return the rate since then."""
        return (self._so_far() - self._count) / (time.perf_counter() - self._start)

    @staticmethod
    def _so_far() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def disturbed_text(per_second: float) -> str:
    """Say how often other processes took a core."""
    return f"disturbed: other processes took a core {per_second:.0f} times a second"


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from running inside somebody's sample."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _clock_on(device: torch.device) -> Callable[[Call, int], float]:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def sample(call: Call, repeats: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        return (time.perf_counter() - start) / repeats

    return sample


class _EventSampler:
    """Times one call on a GPU by events, from a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20
        # Twice the cache: writing as much as the cache holds could leave some of what was there.
        self.flush = torch.empty(max(2 * cache, 256 << 20), dtype=torch.int8, device=device)
        self.flush_seconds = self._time(self.flush.zero_, 0)
        self.flush_seconds = self._time(self.flush.zero_, 0)

    def __call__(self, call: Call, repeats: int) -> float:
        if repeats != 1:
            raise ValueError("bench: a call is timed once between two events")
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        host_seconds = time.perf_counter() - start
        # The GPU is kept busy by flushes until the host has queued the whole call; else the events would time the host.
        flushes = 1 + math.ceil(2 * host_seconds / self.flush_seconds)
        return self._time(call, min(flushes, 100))

    def _time(self, call: Call, flushes: int) -> float:
        stream = torch.cuda.current_stream(self.device)
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self.device)
        for _ in range(flushes):
            self.flush.zero_()
        start.record(stream)
        call()
        end.record(stream)
        torch.cuda.synchronize(self.device)
        return float(start.elapsed_time(end)) * 1e-3
