"""How long a call takes, by the device's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


def seconds_of(call: Callable[[], object], device: torch.device, budget: float = 0.05) -> float:
    """The median of warm calls, by the device's clock.

    As many calls as fit in `budget` seconds, but at least one and at most 20.
    """
    call()
    samples = [_seconds(call, device)]
    more = min(19, int(budget / max(samples[0], 1e-6)))
    return median([*samples, *(_seconds(call, device) for _ in range(more))])


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3
