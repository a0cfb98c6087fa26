"""Tensors on their way between the host and a GPU without anybody waiting.

A copy from ordinary memory, and `.item()`, hold the calling thread until the device has worked off
all that it was asked for, so that it idles while Python prepares the next launches. From pinned
memory a copy is one more entry in the device's queue.

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
    """No thread pins memory in here: whoever wants to waits until the graph is captured."""
    with _may_pin:
        yield


def pin(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, which is on the CPU, in memory that `device` reads by itself: itself unless that is
    a GPU.
    """
    if device.type != "cuda":
        return tensor
    with _may_pin:
        return tensor.pin_memory()


def send(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the host on the device; does not wait for the copy. Pinned (`pin`), it is read
    later than this returns.
    """
    return tensor.to(device, dtype or tensor.dtype, non_blocking=True)


class Readback:
    """Numbers of the device on their way to the host.

    They are asked for when they have been computed, not when they are read: `.item()` on an earlier
    step's loss waits for the later steps that are in the queue by then.
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
        """The numbers, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()
