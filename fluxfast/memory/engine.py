"""Copies between host and device: in a CUDA stream beside the computation, or at once on a CPU.

Copies are carried out in the order in which they are given. Each can be told to start after an
event of the compute stream, and that stream can be told to wait for the end of a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluxfast.memory.host import HostMemory, cuda_pin, cuda_unpin

Event = Any


class Engine:
    """Plain copies, in the program's order: every event has happened when it is made."""

    # whether copies may be issued from another thread than the one that computes
    any_thread = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = HostMemory()

    def slot(self, nbytes: int) -> Tensor:
        """Bytes [nbytes] on the device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy(self, source: Tensor, target: Tensor, after: Event | None) -> Event:
        """Start copying bytes from the host to the device after an event.

        Returns the event of the copy's end.
        """
        target.copy_(source)
        return None

    def wait(self, event: Event) -> None:
        """Everything issued on the compute stream from here on runs after the event."""

    def mark(self) -> Event:
        """An event that happens when all that was issued on the compute stream so far has run."""
        return None

    def synchronize(self, event: Event) -> None:
        """Block the calling thread until the event has happened."""

    def close(self) -> None:
        """Wait for all copies, and unpin the host's memory."""
        self.memory.release()


class CudaEngine(Engine):
    """Asynchronous copies, in a stream of their own.

    With `use_stream` false they run between the kernels of the compute stream.
    """

    def __init__(self, device: torch.device, use_stream: bool = True) -> None:
        super().__init__(device)
        self.memory = HostMemory(cuda_pin, cuda_unpin)
        self._side = torch.cuda.Stream(device) if use_stream else None
        self.any_thread = use_stream

    @property
    def _compute(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def slot(self, nbytes: int) -> Tensor:
        slot = super().slot(nbytes)
        if self._side is not None:
            # kernels that are still to run may use the memory that the allocator gave us
            self._side.wait_stream(self._compute)
        return slot

    def copy(self, source: Tensor, target: Tensor, after: Event | None) -> Event:
        stream = self._side or self._compute
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def wait(self, event: Event) -> None:
        self._compute.wait_event(event)

    def mark(self) -> Event:
        return self._compute.record_event()

    def synchronize(self, event: Event) -> None:
        event.synchronize()

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        super().close()


def engine_for(device: torch.device, use_stream: bool = True) -> Engine:
    """The engine of a device; `use_stream` matters on CUDA devices only."""
    return CudaEngine(device, use_stream) if device.type == "cuda" else Engine(device)
