"""Blocks' inputs in host memory between forward and backward: what checkpointing keeps, off the
device.

Each is copied out right after it was used and back before it is asked for: when a block's backward
fetches its input, that of the block before it starts on its way. The last one kept stays on the
device too, since backward begins with it.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from fluxfast.memory.engine import Event
from fluxfast.memory.host import HostMemory, cuda_pin, cuda_unpin


class _Place:
    """A buffer on the host, and the event of the last copy from or to it."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.event: Event = None


class Kept:
    """A tensor put aside. `near` is its copy on the device while there is one, to be read after
    `arrival`.
    """

    def __init__(self, x: Tensor, place: _Place) -> None:
        self.shape, self.dtype, self.device, self.place = x.shape, x.dtype, x.device, place
        self.near: Tensor | None = x
        self.arrival: Event = None
        self.fetched = False

    @property
    def far(self) -> Tensor:
        return self.place.buffer.view(self.dtype).view(self.shape)


class _Mover:
    """Moves tensors out and back at once, on a CPU."""

    def __init__(self) -> None:
        self.memory = HostMemory()

    def move_out(self, kept: Kept, x: Tensor) -> None:
        kept.far.copy_(x)

    def move_in(self, kept: Kept) -> None:
        kept.near = kept.far.clone()

    def wait(self, arrival: Event) -> None:
        """The compute stream waits for a tensor's way back."""


class _CudaMover(_Mover):
    """Moves tensors beside the computation, both ways at a time."""

    def __init__(self, device: torch.device) -> None:
        self.memory = HostMemory(cuda_pin, cuda_unpin)
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)

    @property
    def _compute(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def move_out(self, kept: Kept, x: Tensor) -> None:
        self._out.wait_stream(self._compute)
        if kept.place.event is not None:
            self._out.wait_event(kept.place.event)
        with torch.cuda.stream(self._out):
            kept.far.copy_(x, non_blocking=True)
            kept.place.event = self._out.record_event()
        # its memory is not handed out again before it has been copied
        x.record_stream(self._out)

    def move_in(self, kept: Kept) -> None:
        near = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
        # kernels still to run may be using the memory that the allocator gave
        self._in.wait_stream(self._compute)
        self._in.wait_event(kept.place.event)
        with torch.cuda.stream(self._in):
            near.copy_(kept.far, non_blocking=True)
            kept.place.event = kept.arrival = self._in.record_event()
        near.record_stream(self._in)
        kept.near = near

    def wait(self, arrival: Event) -> None:
        self._compute.wait_event(arrival)


class HostInputs:
    """Puts tensors aside in host memory. Its buffers are used again and again: as many as are ever
    kept at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._mover = _CudaMover(device) if device.type == "cuda" else _Mover()
        self._free: dict[int, list[_Place]] = {}
        self._kept: list[weakref.ref[Kept]] = []

    @property
    def nbytes(self) -> int:
        """Host memory taken so far."""
        return self._mover.memory.nbytes

    def keep(self, x: Tensor) -> Kept:
        """Start copying x, which must not be empty and must not change any more, to the host."""
        x = x.detach()
        free = self._free.setdefault(x.nbytes, [])
        kept = Kept(x, free.pop() if free else _Place(self._mover.memory.allocate(x.nbytes)))
        self._mover.move_out(kept, x)
        live = self._live()
        if live:
            live[-1].near = None
        self._kept.append(weakref.ref(kept))
        weakref.finalize(kept, free.append, kept.place)
        return kept

    def fetch(self, kept: Kept) -> Tensor:
        """The tensor, on the device it came from; of those kept before it, the last one not fetched
        yet starts on its way.
        """
        x = self._come(kept)
        if kept.arrival is not None:
            self._mover.wait(kept.arrival)
        live = self._live()
        kept.fetched = True
        # a block may keep several and fetch them in that order: one that has been fetched is not
        # the next
        waiting = (
            other
            for other in reversed(live[: live.index(kept)])
            if not other.fetched and other.near is None
        )
        if (ahead := next(waiting, None)) is not None:
            self._come(ahead)
        kept.near = kept.arrival = None
        return x

    def _come(self, kept: Kept) -> Tensor:
        if kept.near is None:
            self._mover.move_in(kept)
        assert kept.near is not None
        return kept.near

    def _live(self) -> list[Kept]:
        live = [kept for ref in self._kept if (kept := ref()) is not None]
        self._kept = [weakref.ref(kept) for kept in live]
        return live

    def close(self) -> None:
        """Unpin the buffers."""
        self._mover.memory.release()
