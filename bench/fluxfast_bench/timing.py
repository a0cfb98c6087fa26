"""Clocks and statistics. On a GPU all times are its own, between two events."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

import torch


@dataclass(frozen=True)
class Stats:
    """Seconds: median, the tenth and ninetieth of a hundred, and of how many."""

    seconds: float
    low: float
    high: float
    count: int

    def as_record(self) -> dict[str, Any]:
        return {
            key: round(value, 9) if isinstance(value, float) else value
            for key, value in asdict(self).items()
        }


def stats(samples: Sequence[float]) -> Stats:
    if len(samples) == 1:
        return Stats(samples[0], samples[0], samples[0], 1)
    tenths = quantiles(samples, n=10, method="inclusive")
    return Stats(median(samples), tenths[0], tenths[-1], len(samples))


# A rate that is more than this many times its ceiling: other programs ran while one of the two was
# measured. Small products run a quarter faster than a step's large ones, and what a CPU's
# caches hold is copied several times as fast as memory; a GPU's timings leave its caches out
MOST_OF_PRODUCTS = 1.5
MOST_OF_COPIES = {"cpu": 8.0, "cuda": 1.5}


def share_of(name: str, share: float, most: float) -> dict[str, Any]:
    """The share of a ceiling or a floor as a part of a record: {name: share}.

    Where it can't be, it is {"impossible": share} instead, so that no table shows it as a result.
    """
    return {name if share <= most else "impossible": round(share, 4)}


def share_told(record: Mapping[str, Any], name: str) -> str:
    """A record's share in per cent, "impossible" for one that can't be; "" where it has none."""
    if "impossible" in record:
        return "impossible"
    return f"{record[name]:.0%}" if name in record else ""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_each(call: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` calls that follow one another without a gap."""
    synchronize(device)
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            call()
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def best_time(call: Callable[[], object], device: torch.device, seconds: float = 0.2) -> float:
    """Seconds of the median call, warm, of 5 to 200 in about `seconds`."""
    first = min(time_each(call, 2, device))
    count = max(5, min(200, int(seconds / max(first, 1e-6))))
    return median(time_each(call, count, device))


class GpuClock:
    """A clock for pytest-benchmark: seconds of the current stream since it was first read."""

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None
        self._seconds = 0.0

    def __call__(self) -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        if self._last is not None:
            # from look to look: an event's elapsed time is fp32, too coarse for a whole run
            self._seconds += self._last.elapsed_time(now) / 1e3
        self._last = now
        return self._seconds


gpu_clock = GpuClock()


def captured(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """The calls as one CUDA graph, so that only the GPU's work is timed.

    Raises RuntimeError where that can't be.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in [*calls, *calls]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay
