"""Blocks' inputs in host memory between forward and backward: what checkpointing keeps.

Each is copied to the host right after it was used, and back before it is asked for: when a block's
backward fetches its input, the input of the block before it is already on its way. The one kept
last stays on the device as well, since backward begins with it.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from fluxfast.memory.engine import Event
from fluxfast.memory.host import HostMemory, cuda_pin, cuda_unpin


class _HostBuffer:
    """A buffer on the host, and the event of the last copy from or to it."""

    def __init__(self, bytes: Tensor) -> None:
        self.bytes = bytes
        self.event: Event = None


class HostInput:
    """A tensor that was moved to the host.

    `on_device` is its copy on the device while there is one, to be read after `arrival`.
    """

    def __init__(self, x: Tensor, buffer: _HostBuffer) -> None:
        self.shape, self.dtype, self.device, self.buffer = x.shape, x.dtype, x.device, buffer
        self.on_device: Tensor | None = x
        self.arrival: Event = None
        self.fetched = False

    @property
    def on_host(self) -> Tensor:
        return self.buffer.bytes.view(self.dtype).view(self.shape)


class _Mover:
    """Copies tensors out and back at once, on a CPU."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory

    def move_out(self, kept: HostInput, x: Tensor) -> None:
        kept.on_host.copy_(x)

    def move_in(self, kept: HostInput) -> None:
        kept.on_device = kept.on_host.clone()

    def wait(self, arrival: Event) -> None:
        """Let the compute stream wait for a tensor's way back."""


class _CudaMover(_Mover):
    """Copies tensors beside the computation, both ways at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.memory = HostMemory(cuda_pin, cuda_unpin)
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)

    @property
    def _compute(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def move_out(self, kept: HostInput, x: Tensor) -> None:
        self._out.wait_stream(self._compute)
        if kept.buffer.event is not None:
            self._out.wait_event(kept.buffer.event)
        with torch.cuda.stream(self._out):
            kept.on_host.copy_(x, non_blocking=True)
            kept.buffer.event = self._out.record_event()
        # keep the allocator from handing out its memory before it has been copied
        x.record_stream(self._out)

    def move_in(self, kept: HostInput) -> None:
        on_device = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
        # kernels that are still to run may use the memory that the allocator gave us
        self._in.wait_stream(self._compute)
        self._in.wait_event(kept.buffer.event)
        with torch.cuda.stream(self._in):
            on_device.copy_(kept.on_host, non_blocking=True)
            kept.buffer.event = kept.arrival = self._in.record_event()
        on_device.record_stream(self._in)
        kept.on_device = on_device

    def wait(self, arrival: Event) -> None:
        self._compute.wait_event(arrival)


class HostInputs:
    """Moves tensors to host memory and back.

    Its buffers are reused: there are as many as are kept at the same time.
    """

    def __init__(self, device: torch.device, memory: HostMemory | None = None) -> None:
        """memory: what buffers are taken from on another device than a GPU; None: plain memory."""
        self._mover = (
            _CudaMover(device) if device.type == "cuda" else _Mover(memory or HostMemory())
        )
        self._free: dict[int, list[_HostBuffer]] = {}
        self._kept: list[weakref.ref[HostInput]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of host memory taken so far."""
        return self._mover.memory.nbytes

    def keep(self, x: Tensor) -> HostInput:
        """Start copying x, which must not be empty and must not change any more, to the host."""
        x = x.detach()
        free = self._free.setdefault(x.nbytes, [])
        kept = HostInput(
            x, free.pop() if free else _HostBuffer(self._mover.memory.allocate(x.nbytes))
        )
        self._mover.move_out(kept, x)
        live = self._live()
        if live:
            live[-1].on_device = None
        self._kept.append(weakref.ref(kept))
        weakref.finalize(kept, free.append, kept.buffer)
        return kept

    def fetch(self, kept: HostInput) -> Tensor:
        """The tensor, on the device that it came from.

        Of those kept before it, the last one that has not been fetched yet is started on its way
        back.
        """
        x = self._come(kept)
        if kept.arrival is not None:
            self._mover.wait(kept.arrival)
        live = self._live()
        kept.fetched = True
        # a block may keep several inputs and fetch them in the same order, so the next one is not
        # simply the one before: skip those that have been fetched
        waiting = (
            other
            for other in reversed(live[: live.index(kept)])
            if not other.fetched and other.on_device is None
        )
        if (ahead := next(waiting, None)) is not None:
            self._come(ahead)
        kept.on_device = kept.arrival = None
        return x

    def _come(self, kept: HostInput) -> Tensor:
        if kept.on_device is None:
            self._mover.move_in(kept)
        assert kept.on_device is not None
        return kept.on_device

    def _live(self) -> list[HostInput]:
        live = [kept for ref in self._kept if (kept := ref()) is not None]
        self._kept = [weakref.ref(kept) for kept in live]
        return live

    def close(self) -> None:
        """Unpin the buffers."""
        self._mover.memory.release()
