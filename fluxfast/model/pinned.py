"""Copies between the host and a GPU that do not wait for each other.

A copy from ordinary memory, and `.item()`, block the calling thread until the device has finished
all that is in its queue; then the device idles while Python prepares the next launches. A copy from
pinned memory is one more entry in the queue, and blocks nobody.

CUDA forbids pinning memory, in any thread, while a graph is captured (`capturing`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_may_pin = threading.Lock()


@contextmanager
def capturing() -> Iterator[None]:
    """A context in which a graph is captured: threads that want to pin memory wait for its end."""
    with _may_pin:
        yield


def pin(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor in memory that a GPU reads by itself; itself for any other device."""
    if device.type != "cuda":
        return tensor
    with _may_pin:
        return tensor.pin_memory()


def send(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the host on the device, as `dtype` where that is given.

    Does not wait for the copy. A pinned tensor (`pin`) may be read after this returns, so it must
    not change.
    """
    return tensor.to(device, dtype or tensor.dtype, non_blocking=True)


class Readback:
    """Numbers of the device on their way to the host.

    The copy enters the device's queue here, not when the numbers are read. `.item()` on an earlier
    step's loss would wait for all the later steps in the queue.
    """

    def __init__(self, *numbers: Tensor) -> None:
        """numbers: scalars, all on one device."""
        values = torch.stack([number.detach().float() for number in numbers])
        self._arrived: Any = None
        if values.device.type != "cuda":
            self._values = values
            return
        self._values = pin(torch.empty(len(numbers)), values.device)
        self._values.copy_(values, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def read(self) -> list[float]:
        """The numbers; waits until they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()
