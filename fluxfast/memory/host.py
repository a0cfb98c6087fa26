"""Host memory that a GPU can read by itself: page-aligned, of the exact size, locked.

torch's own pinned allocator rounds each buffer up to a power of two, which wastes up to half of it.
This is ordinary memory that is registered with the driver.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

# takes address and size; returns what went wrong, or None
Pin = Callable[[int, int], str | None]
Unpin = Callable[[int], None]


class HostMemory:
    """Allocates buffers and pins them.

    A buffer that can't be pinned stays ordinary memory, and `shortfall` says so.
    """

    def __init__(self, pin: Pin | None = None, unpin: Unpin | None = None) -> None:
        self._pin = pin
        self._buffers: list[Tensor] = []
        self._pinned: list[int] = []
        self._error: str | None = None
        self.nbytes = self.pinned_bytes = 0
        self._release = weakref.finalize(self, _unpin_all, self._pinned, unpin)
        # at exit the driver is gone before we are called, and has unpinned everything itself
        self._release.atexit = False

    def allocate(self, nbytes: int) -> Tensor:
        """Bytes [nbytes], zeros."""
        if hasattr(mmap, "MAP_ANONYMOUS"):
            pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            pages = mmap.mmap(-1, nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # the first touch of tens of GB in pages of 4 KiB takes seconds
            pages.madvise(mmap.MADV_HUGEPAGE)
        buffer = torch.frombuffer(pages, dtype=torch.uint8)
        self._buffers.append(buffer)
        self.nbytes += nbytes
        if self._pin is not None and self._error is None:
            self._error = self._pin(buffer.data_ptr(), nbytes)
            if self._error is None:
                self._pinned.append(buffer.data_ptr())
                self.pinned_bytes += nbytes
        return buffer

    @property
    def shortfall(self) -> str | None:
        """One line on what could not be pinned, and what to do; None if all was pinned."""
        if self._error is None:
            return None
        return (
            f"{(self.nbytes - self.pinned_bytes) / 2**30:.2f} of {self.nbytes / 2**30:.2f} GiB "
            f"of host memory could not be pinned ({self._error}; limit on locked memory: "
            f"{locked_memory_limit()}): copies from ordinary memory are slower and hold up the "
            "step. Raise the limit (ulimit -l unlimited, memlock in /etc/security/limits.conf, "
            "docker's --ulimit memlock=-1) or free host memory"
        )

    def release(self) -> None:
        """Unpin everything; the buffers stay valid as ordinary memory."""
        self._release()


def _unpin_all(addresses: list[int], unpin: Unpin | None) -> None:
    for address in addresses:
        assert unpin is not None
        unpin(address)
    addresses.clear()


def locked_memory_limit() -> str:
    """RLIMIT_MEMLOCK in words."""
    try:
        import resource
    except ImportError:
        # Windows has no such limit
        return "none"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "none" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:g} MiB"


def cuda_pin(address: int, nbytes: int) -> str | None:
    """Register memory with the CUDA (or HIP) driver; returns what went wrong, or None."""
    code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
    if code == 0:
        return None
    _clear_cuda_error()
    return f"cudaHostRegister: {torch.cuda.CudaError(code)}"


def cuda_unpin(address: int) -> None:
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(address)))


def _clear_cuda_error() -> None:
    # the runtime remembers the error of a failed call, and the next launch would report it
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
